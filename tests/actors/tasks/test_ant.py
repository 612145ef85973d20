import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco.ant_v5 import AntEnv

from actors.tasks.ant import NUM_BODIES, AntDir, AntGoal, AntVel


def gymnasium_ant(with_xy, contact_obs):
    return AntEnv(
        ctrl_cost_weight=0.005,
        healthy_reward=0.05,
        exclude_current_positions_from_observation=not with_xy,
        include_cfrc_ext_in_observation=contact_obs,
    )


def task_term(task, info, data):
    if "direction" in task:
        return task["direction"] * info["x_velocity"]
    if "velocity" in task:
        return 1.0 - abs(info["x_velocity"] - task["velocity"])
    return 4.0 - np.abs(data.qpos[:2] - task["goal"]).sum()


@pytest.mark.parametrize("contact_obs", [False, True])
@pytest.mark.parametrize("maker", [AntDir, AntVel, AntGoal])
def test_batch_equals_gymnasium_step_by_step(maker, contact_obs):
    num_envs, num_steps = 3, 80
    family = maker(horizon=num_steps, contact_obs=contact_obs, action_scale=0.5)
    tasks = family.sample(np.random.default_rng(0), num_envs)
    env = family.make(num_envs)
    start, _ = env.reset(seed=1, options={"tasks": tasks})
    qpos, qvel = env.qpos.copy(), env.qvel.copy()
    rng = np.random.default_rng(2)
    actions = rng.normal(0.0, 2.0, (num_steps, num_envs, 8)).astype(np.float32)
    actions[:, 0] *= 0.1  # one calm ant that does not fall
    steps = [env.step(action) for action in actions]
    single = gymnasium_ant(maker is AntGoal, contact_obs)
    assert single.frame_skip == env.frame_skip
    assert single.model.nbody == NUM_BODIES
    largest_force = 0.0
    for i, task in enumerate(tasks):
        mujoco.mj_resetData(single.model, single.data)
        single.set_state(qpos[i], qvel[i])
        np.testing.assert_array_equal(start[i], single._get_obs().astype(np.float32))
        for t in range(num_steps):
            control = np.clip(actions[t, i].astype(np.float64) * 0.5, -1, 1)
            obs, _, terminated, _, info = single.step(control)
            np.testing.assert_array_equal(steps[t][0][i], obs.astype(np.float32))
            costs = info["reward_ctrl"] + info["reward_contact"]
            expected = task_term(task, info, single.data) + 0.05 + costs
            assert steps[t][1][i] == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert steps[t][2][i] == (terminated or t == num_steps - 1)
            largest_force = max(largest_force, -info["reward_contact"])
            if terminated:
                break
    assert largest_force > 0  # contact forces were really there
    single.close()


def test_the_contact_observation_is_off_unless_asked_for():
    assert AntDir().spec.obs_size == 27
    assert AntGoal().spec.obs_size == 29
    assert AntVel(contact_obs=True).spec.obs_size == 105
    assert AntGoal(contact_obs=True).spec.obs_size == 107


def test_healthy_heights():
    env = AntDir().make(6)
    env.reset(seed=0, options={"tasks": [{"direction": 1.0}] * 6})
    env.qpos[:, 2] = [0.19, 0.2, 1.0, 1.01, 0.5, 0.5]
    env.qvel[4, 3] = np.inf
    assert env.alive().tolist() == [False, True, True, False, False, True]


def test_a_fallen_ant_ends_and_is_left_alone():
    env = AntDir().make(2)
    env.reset(seed=0, options={"tasks": [{"direction": 1.0}] * 2})
    env.qpos[0, 2] = 1.2
    env.qvel[0] = 0.0
    zeros = np.zeros((2, 8))
    obs, reward, terminated, truncated, _ = env.step(zeros)
    assert terminated.tolist() == [True, False]
    assert not truncated.any()
    assert reward[0] != 0
    later, reward, terminated, _, _ = env.step(zeros)
    np.testing.assert_array_equal(later[0], obs[0])
    assert reward[0] == 0
    assert terminated.tolist() == [True, False]


def test_goal_distance_is_to_the_observed_position():
    env = AntGoal().make(1)
    env.reset(seed=0, options={"tasks": [{"goal": [3.0, -2.0]}]})
    obs, reward, *_ = env.step(np.zeros((1, 8)))
    distance = abs(obs[0, 0] - 3.0) + abs(obs[0, 1] + 2.0)
    contact = 0.0005 * np.square(np.clip(env.arrays()["contact"], -1, 1)).sum()
    assert reward[0] == pytest.approx(4.05 - distance - contact, abs=1e-5)


def test_a_bad_state_ends_the_episode():
    env = AntDir().make(2)
    env.reset(seed=0, options={"tasks": [{"direction": 1.0}] * 2})
    env.qvel[1] = 1e11
    _, reward, terminated, _, _ = env.step(np.zeros((2, 8)))
    assert np.isnan(reward).tolist() == [False, True]
    assert terminated.tolist() == [False, True]
    assert env.num_bad_states == 1

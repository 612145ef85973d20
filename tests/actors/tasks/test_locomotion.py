import dataclasses

import gymnasium
import mujoco
import numpy as np
import pytest

from actors.tasks import load_family
from actors.tasks.mujoco_batch import load_model

ROBOTS = {
    "hopper": "Hopper-v5",
    "half-cheetah": "HalfCheetah-v5",
    "walker2d": "Walker2d-v5",
    "ant": "Ant-v5",
    "humanoid": "Humanoid-v5",
}
FALLING = {"hopper": 1, "walker2d": 1, "ant": 2, "humanoid": 2}
"""The column of qpos that holds the height."""

every_robot = pytest.mark.parametrize("name", ROBOTS)


def started(name, num_envs, seed=1, **options):
    env = load_family(name, options).make(num_envs)
    obs, _ = env.reset(seed=seed, options={"tasks": [{}] * num_envs})
    return env, obs


@pytest.fixture
def make_single(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs a warning about Gymnasium's file where it stands
    made = []

    def make(name):
        made.append(gymnasium.make(ROBOTS[name]))
        made[-1].reset(seed=0)
        return made[-1]

    yield make
    for single in made:
        single.close()


@every_robot
def test_batch_equals_gymnasium_step_by_step(name, make_single):
    single = make_single(name)
    inner = single.unwrapped
    num_envs, num_steps = 3, 80
    env, start = started(name, num_envs)
    assert env.dt == inner.dt
    assert env.single_action_space == inner.action_space
    assert env.single_observation_space.shape == inner.observation_space.shape
    qpos, qvel = env.qpos.copy(), env.qvel.copy()
    rng = np.random.default_rng(2)
    space = inner.action_space
    actions = rng.uniform(space.low, space.high, (num_steps, num_envs, *space.shape))
    actions[:, 0] *= 0.05  # one calm robot that stays on its feet for longer
    actions = actions.astype(np.float32)
    actions[0, 1] = space.high
    steps = [env.step(action) for action in actions]
    seen = {False: 0, True: 0}
    strongest = 0.0
    for i in range(num_envs):
        mujoco.mj_resetData(inner.model, inner.data)
        inner.set_state(qpos[i], qvel[i])
        np.testing.assert_array_equal(start[i], inner._get_obs().astype(np.float32))
        for t in range(num_steps):
            obs, reward, terminated, _, _ = inner.step(actions[t, i])
            np.testing.assert_array_equal(steps[t][0][i], obs.astype(np.float32))
            assert steps[t][1][i] == np.float32(reward)
            assert steps[t][2][i] == terminated
            seen[bool(terminated)] += 1
            strongest = max(strongest, np.abs(inner.data.cfrc_ext).max())
            if terminated:
                break
        np.testing.assert_array_equal(env.qpos[i], inner.data.qpos)
        np.testing.assert_array_equal(env.qvel[i], inner.data.qvel)
    assert seen[False] > 40
    # What the comparison must have met: forces beyond the clip, early ends.
    assert strongest > 1.0
    assert seen[True] > 0 or name in ("half-cheetah", "ant")


@pytest.mark.parametrize("name", ["hopper", "half-cheetah", "walker2d"])
def test_high_velocities_are_observed_as_by_gymnasium(name, make_single):
    inner = make_single(name).unwrapped
    env, _ = started(name, 1)
    env.qvel[:] = np.linspace(-30.0, 30.0, env.qvel.shape[1])
    inner.data.qpos[:], inner.data.qvel[:] = env.qpos[0], env.qvel[0]
    np.testing.assert_array_equal(env.observe()[0], inner._get_obs().astype(np.float32))


@every_robot
def test_health_equals_gymnasiums_around_every_bound(name, make_single):
    inner = make_single(name).unwrapped
    if name not in FALLING:
        assert started(name, 1)[0].alive() is None
        return
    rng = np.random.default_rng(0)
    num_envs = 200
    env, _ = started(name, num_envs)
    env.qpos[:] = rng.uniform(-1.2, 1.2, env.qpos.shape)
    env.qpos[:, FALLING[name]] = rng.uniform(0.1, 2.2, num_envs)
    env.qpos[: num_envs // 2, 2] = rng.uniform(0.1, 0.3, num_envs // 2)
    env.qpos[:5, FALLING[name]] = [0.7, 0.8, 1.0, 2.0, 0.2]
    env.qvel[5:60:5] = rng.uniform(-150.0, 150.0, (11, env.qvel.shape[1]))
    env.qpos[60:80:4, -1] = [99.9, 100.0, -100.0, -99.9, 101.0]
    expected = []
    for qpos, qvel in zip(env.qpos, env.qvel, strict=True):
        inner.data.qpos[:], inner.data.qvel[:] = qpos, qvel
        expected.append(bool(inner.is_healthy))
    assert env.alive().tolist() == expected
    assert len(set(expected)) == 2


@every_robot
def test_actions_out_of_bounds_are_clipped_before_they_are_paid_for(name):
    (wild, _), (bounded, _) = started(name, 2), started(name, 2)
    high = np.stack([wild.single_action_space.high, wild.single_action_space.low])
    for _ in range(3):
        left, right = wild.step(7.0 * high), bounded.step(high)
        np.testing.assert_array_equal(left[0], right[0])
        np.testing.assert_array_equal(left[1], right[1])


@every_robot
def test_start_noise_is_gymnasiums(name, make_single):
    inner = make_single(name).unwrapped
    env, _ = started(name, 400)
    scale = inner._reset_noise_scale
    offset = env.qpos - load_model(inner.fullpath).qpos0
    assert 0.99 * scale < np.abs(offset).max() <= scale
    normal = name in ("half-cheetah", "ant")
    assert env.qvel.std() == pytest.approx(scale if normal else scale / np.sqrt(3), rel=0.05)
    assert (np.abs(env.qvel).max() > scale) == normal


@every_robot
def test_the_horizon_terminates(name):
    env, _ = started(name, 2, horizon=3)
    calm = np.zeros((2, *env.single_action_space.shape))
    ends = [env.step(calm)[2].tolist() for _ in range(3)]
    assert ends == [[False, False], [False, False], [True, True]]


@pytest.mark.parametrize("name", FALLING)
def test_a_fallen_robot_ends_and_is_left_alone(name):
    env, _ = started(name, 2)
    env.qpos[0, FALLING[name]] = 1.2 if name == "ant" else 0.1
    calm = np.zeros((2, *env.single_action_space.shape))
    obs, reward, terminated, truncated, _ = env.step(calm)
    assert terminated.tolist() == [True, False]
    assert not truncated.any()
    assert reward[0] != 0
    later, reward, terminated, _, _ = env.step(calm)
    np.testing.assert_array_equal(later[0], obs[0])
    assert reward[0] == 0
    assert reward[1] != 0
    assert terminated.tolist() == [True, False]


@every_robot
def test_the_delay_is_told_and_changes_nothing_else(name):
    plain, delayed = load_family(name), load_family(f"delayed-{name}")
    assert plain.spec.reward_delay == 1
    assert delayed.spec.reward_delay == 20
    assert plain.spec.horizon == 1000
    assert dataclasses.replace(delayed.spec, reward_delay=1) == plain.spec
    assert load_family(name, {"delay": 7}).spec.reward_delay == 7
    runs = []
    for chosen in (name, f"delayed-{name}"):
        env, _ = started(chosen, 2)
        runs.append([env.step(np.full((2, env.model.nu), 0.1))[1] for _ in range(3)])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (np.array(runs[0]) != 0).all()


@pytest.mark.parametrize("value", [0, -20, 2.5, True, "20"])
@pytest.mark.parametrize("option", ["delay", "horizon"])
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1"):
        load_family("delayed-hopper", {option: value})


def test_there_is_one_task():
    family = load_family("walker2d")
    assert family.finite_tasks == [{}]
    assert family.sample(np.random.default_rng(0), 3) == [{}, {}, {}]

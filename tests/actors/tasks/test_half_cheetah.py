import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

from actors.tasks.half_cheetah import HalfCheetahDir, HalfCheetahVel


@pytest.fixture
def single(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs a warning about Gymnasium's file where it stands
    env = HalfCheetahEnv(ctrl_cost_weight=0.05)
    yield env
    env.close()


def place(single, qpos, qvel):
    """What Gymnasium's reset does, at a given state instead of a random one."""
    mujoco.mj_resetData(single.model, single.data)
    single.set_state(qpos, qvel)
    return single._get_obs()


def test_frame_skip_is_gymnasiums(single):
    env = HalfCheetahDir().make(1)
    assert single.frame_skip == env.frame_skip
    assert env.dt == single.dt


@pytest.mark.parametrize("action_scale", [1.0, 0.1])
@pytest.mark.parametrize("kind", ["direction", "velocity"])
def test_batch_equals_gymnasium_step_by_step(single, kind, action_scale):
    num_envs, num_steps = 3, 120
    maker = HalfCheetahDir if kind == "direction" else HalfCheetahVel
    family = maker(horizon=num_steps, action_scale=action_scale)
    tasks = family.sample(np.random.default_rng(0), num_envs)
    env = family.make(num_envs)
    start, _ = env.reset(seed=1, options={"tasks": tasks})
    qpos, qvel = env.qpos.copy(), env.qvel.copy()
    rng = np.random.default_rng(2)
    actions = (rng.normal(0.0, 1.0, (num_steps, num_envs, 6)) / action_scale).astype(np.float32)
    steps = [env.step(action) for action in actions]
    for i, task in enumerate(tasks):
        obs = place(single, qpos[i], qvel[i])
        np.testing.assert_array_equal(start[i], obs.astype(np.float32))
        for t in range(num_steps):
            control = np.clip(actions[t, i].astype(np.float64) * action_scale, -1, 1)
            obs, _, _, _, info = single.step(control)
            np.testing.assert_array_equal(steps[t][0][i], obs.astype(np.float32))
            speed = info["x_velocity"]
            goal = (
                task["direction"] * speed if kind == "direction" else -abs(speed - task["velocity"])
            )
            expected = goal - 0.05 * np.sum(control**2)
            assert steps[t][1][i] == pytest.approx(expected, rel=1e-6, abs=1e-6)
        np.testing.assert_array_equal(env.qpos[i], single.data.qpos)
        np.testing.assert_array_equal(env.qvel[i], single.data.qvel)
    assert not any(step[2].any() for step in steps[:-1])
    assert steps[-1][2].all()


def test_reset_noise():
    env = HalfCheetahDir().make(400)
    env.reset(seed=0, options={"tasks": [{"direction": 1.0}] * 400})
    offset = env.qpos - env.model.qpos0
    assert np.abs(offset).max() <= 0.1
    assert offset.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.05)
    assert env.qvel.std() == pytest.approx(0.1, rel=0.05)


def test_control_cost_is_an_option():
    rewards = []
    for cost in (0.0, 0.5):
        env = HalfCheetahVel(control_cost=cost).make(1)
        env.reset(seed=0, options={"tasks": [{"velocity": 1.0}]})
        rewards.append(env.step(np.full((1, 6), 2.0))[1][0])
    assert rewards[0] - rewards[1] == pytest.approx(0.5 * 6, abs=1e-5)

import numpy as np
import pytest
import torch

from actors.tasks.navigation_2d import Navigation2D, Navigation2DEnv


class SinglePoint:
    """The task written for one environment, from the paper's definition."""

    def __init__(self, goal, horizon, action_scale):
        self.goal, self.horizon, self.action_scale = np.array(goal), horizon, action_scale
        self.position, self.steps = np.zeros(2), 0

    def step(self, action):
        self.position = self.position + np.clip(action * self.action_scale, -0.1, 0.1)
        self.steps += 1
        dx, dy = self.position - self.goal
        reached = abs(dx) < 0.01 and abs(dy) < 0.01
        return self.position, -np.hypot(dx, dy), reached or self.steps == self.horizon


def towards(goal, position, action_scale):
    return np.clip((goal - position) / action_scale, -0.1 / action_scale, 0.1 / action_scale)


@pytest.mark.parametrize("action_scale", [1.0, 0.1, 3.0])
def test_batch_equals_single_environments(action_scale):
    family = Navigation2D(horizon=30, action_scale=action_scale)
    rng = np.random.default_rng(0)
    tasks = family.sample(rng, 16)
    env = family.make(16)
    obs, _ = env.reset(seed=0, options={"tasks": tasks})
    assert torch.equal(obs, torch.zeros(16, 2))
    singles = [SinglePoint(task["goal"], 30, action_scale) for task in tasks]
    ended, lengths = [False] * 16, [0] * 16
    for _ in range(30):
        noise = rng.normal(0.0, 0.2, (16, 2))
        actions = np.stack(
            [
                towards(single.goal, single.position, action_scale) if i < 8 else noise[i]
                for i, single in enumerate(singles)
            ]
        ).astype(np.float32)
        obs, reward, terminated, _, _ = env.step(torch.from_numpy(actions))
        for i, single in enumerate(singles):
            if ended[i]:
                assert terminated[i]
                assert reward[i] == 0
                continue
            position, expected, ended[i] = single.step(actions[i].astype(np.float64))
            lengths[i] += 1
            np.testing.assert_allclose(obs[i], position, atol=1e-6)
            assert reward[i].item() == pytest.approx(expected, abs=1e-6)
            assert bool(terminated[i]) == ended[i]
    assert all(ended)
    assert max(lengths[:8]) < 10  # those that went straight to the goal ended early
    assert min(lengths[8:]) >= 1


def test_the_action_is_clipped_inside():
    env = Navigation2D().make(2)
    env.reset(seed=0, options={"tasks": [{"goal": [0.5, 0.5]}] * 2})
    obs, *_ = env.step(torch.tensor([[5.0, -5.0], [0.03, -0.04]]))
    torch.testing.assert_close(obs, torch.tensor([[0.1, -0.1], [0.03, -0.04]]))


def test_early_end_needs_both_axes():
    env = Navigation2D().make(3)
    env.reset(seed=0, options={"tasks": [{"goal": [0.05, 0.05]}] * 3})
    actions = torch.tensor([[0.0595, 0.0405], [0.05, 0.061], [0.05, 0.05]])
    _, reward, terminated, _, _ = env.step(actions)
    assert terminated.tolist() == [True, False, True]
    assert reward[2] == 0


def test_reference_returns():
    family = Navigation2D()
    tasks = family.sample(np.random.default_rng(0), 4000)
    env = family.make(4000)
    obs, _ = env.reset(seed=0, options={"tasks": tasks})
    goals = torch.tensor([task["goal"] for task in tasks])
    still = torch.zeros(4000)
    for _ in range(100):
        still += env.step(torch.zeros(4000, 2))[1]
    assert still.mean().item() == pytest.approx(-38.25, abs=0.6)
    obs, _ = env.reset()
    straight = torch.zeros(4000)
    for _ in range(100):
        obs, reward, *_ = env.step(goals - obs)
        straight += reward
    assert straight.mean().item() == pytest.approx(-0.51, abs=0.02)


def test_a_bad_action_is_not_hidden():
    env = Navigation2D().make(2)
    env.reset(seed=0, options={"tasks": [{"goal": [0.5, 0.5]}] * 2})
    _, reward, *_ = env.step(torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]))
    assert reward.isnan().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu():
    family = Navigation2D(horizon=20)
    tasks = family.sample(np.random.default_rng(0), 8)
    envs = [Navigation2DEnv(family, 8, device) for device in ("cpu", "cuda")]
    for env in envs:
        env.reset(seed=0, options={"tasks": tasks})
    for seed in range(20):
        action = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)) * 0.1
        left, right = (env.step(action.to(env.device)) for env in envs)
        torch.testing.assert_close(left[0], right[0].cpu())
        torch.testing.assert_close(left[1], right[1].cpu())
        assert torch.equal(left[2], right[2].cpu())

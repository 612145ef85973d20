import numpy as np
import pytest
import torch

from actors.tasks.tabular_mdp import TabularMDP


def test_batch_equals_single_environments():
    family = TabularMDP(states=4, actions=3, horizon=25)
    tasks = family.sample(np.random.default_rng(0), 6)
    env = family.make(6)
    obs, _ = env.reset(seed=3, options={"tasks": tasks})
    generator = torch.Generator().manual_seed(3)
    states = [0] * 6
    rng = np.random.default_rng(1)
    visited = set()
    for t in range(25):
        assert obs.argmax(1).tolist() == states
        assert torch.equal(obs.sum(1), torch.ones(6))
        action = rng.integers(3, size=6)
        obs, reward, terminated, _, _ = env.step(torch.from_numpy(action))
        noise = torch.randn(6, dtype=torch.float64, generator=generator)
        draw = torch.rand(6, 1, dtype=torch.float64, generator=generator)
        for i, task in enumerate(tasks):
            mean_reward = np.reshape(task["mean_reward"], (4, 3))
            transition = np.reshape(task["transition"], (4, 3, 4))
            expected = mean_reward[states[i], action[i]] + noise[i].item()
            assert reward[i].item() == pytest.approx(expected, abs=1e-6)
            remaining, following = draw[i].item(), 0
            while following < 3 and remaining >= transition[states[i], action[i], following]:
                remaining -= transition[states[i], action[i], following]
                following += 1
            states[i] = following
            visited.add(following)
        assert terminated.all() == (t == 24)
    assert visited == {0, 1, 2, 3}


def test_frequencies_follow_the_tables():
    transition = [0.5, 0.2, 0.3, 0.0, 1.0, 0.0] * 3
    mean_reward = [2.0, -1.0] * 3
    env = TabularMDP(states=3, actions=2, horizon=1).make(6000)
    task = {"mean_reward": mean_reward, "transition": transition}
    env.reset(seed=0, options={"tasks": [task] * 6000})
    action = torch.arange(6000) % 2
    obs, reward, *_ = env.step(action)
    assert torch.equal(obs[action == 1][:, 1], torch.ones(3000))
    np.testing.assert_allclose(obs[action == 0].mean(0), [0.5, 0.2, 0.3], atol=0.03)
    for arm, mean in enumerate((2.0, -1.0)):
        assert reward[action == arm].mean().item() == pytest.approx(mean, abs=0.08)
        assert reward[action == arm].std().item() == pytest.approx(1.0, abs=0.05)


def test_tables_are_drawn_as_published():
    tasks = TabularMDP().sample(np.random.default_rng(0), 200)
    rewards = np.array([task["mean_reward"] for task in tasks])
    transitions = np.array([task["transition"] for task in tasks]).reshape(-1, 10)
    assert rewards.mean() == pytest.approx(1.0, abs=0.05)
    assert rewards.std() == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(transitions.sum(1), 1.0)
    # Dirichlet(1, …, 1) over 10 states: variance 9 / (100 · 11).
    assert transitions.var() == pytest.approx(9 / 1100, rel=0.05)


def test_tables_that_are_no_probabilities_are_refused():
    task = {"mean_reward": [0.0] * 4, "transition": [0.7, 0.7] * 4}
    with pytest.raises(ValueError, match="add up to 1"):
        TabularMDP(states=2, actions=2).make(1).reset(options={"tasks": [task]})

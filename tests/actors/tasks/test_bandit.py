import numpy as np
import pytest
import torch

from actors.tasks.bandit import Bandit


def test_batch_equals_single_pulls():
    family = Bandit(arms=4, pulls=1)
    tasks = family.sample(np.random.default_rng(0), 50)
    env = family.make(50)
    obs, _ = env.reset(seed=3, options={"tasks": tasks})
    assert torch.equal(obs, torch.ones(50, 1))
    draws = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    arms = np.random.default_rng(1).integers(4, size=50)
    obs, reward, terminated, _, _ = env.step(torch.from_numpy(arms))
    for i, task in enumerate(tasks):
        assert reward[i].item() == (1.0 if draws[i].item() < task["means"][arms[i]] else 0.0)
    assert torch.equal(obs, torch.ones(50, 1))
    assert terminated.all()


def test_arms_pay_their_means():
    means = [0.0, 1.0, 0.3]
    env = Bandit(arms=3).make(3000)
    env.reset(seed=0, options={"tasks": [{"means": means}] * 3000})
    arms = torch.arange(3000) % 3
    _, reward, *_ = env.step(arms)
    assert reward[arms == 0].max() == 0
    assert reward[arms == 1].min() == 1
    assert reward[arms == 2].mean().item() == pytest.approx(0.3, abs=0.06)


def test_means_are_probabilities():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Bandit(arms=2).make(1).reset(options={"tasks": [{"means": [0.5, 1.5]}]})

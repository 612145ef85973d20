"""PPO against a plain loss with torch's own optimizer, finite differences and a small problem."""

import dataclasses

import numpy as np
import pytest
import torch

from learners.config import PpoConfig
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.params import flatten_members, unflatten_members
from learners.core.trajectory import Spec
from learners.ppo import Minibatch, Ppo
from tests.learners.core.test_actor_critic import (
    chain_probabilities,
    copied,
    make_state,
    make_stream,
    members,
    plain_outputs,
)
from tests.learners.core.test_returns import slow_stream_gae

SETTINGS = {
    "num_steps": 8,
    "num_epochs": 1,
    "num_minibatches": 1,
    "hidden": (5, 4),
    "gamma": 0.9,
    "entropy_coef": 0.02,
}
SEVERAL = {"num_epochs": 2, "num_minibatches": 4, "normalize_obs": True, "normalize_reward": True}


def make_learner(discrete: bool = False, **settings) -> Ppo:
    spec = Spec(3, 4 if discrete else 2, discrete, horizon=100)
    return Ppo(PpoConfig(**SETTINGS | settings), spec)


def update(learner, state, batch):
    return learner.meta_update(state, [learner.begin(state, 2)[1]], [batch])


def plain_loss(learner, params, data: Minibatch, m: int) -> torch.Tensor:
    """Equation 7, the clipped value loss and the entropy, of one member."""
    dist, value = plain_outputs(learner, params, data.obs[m])
    ratio = torch.exp(dist.log_prob(data.action[m]) - data.log_prob[m])
    advantage, returns, old = data.advantage[m], data.returns[m], data.value[m]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    near = old + (value - old).clamp(-0.2, 0.2)
    value_loss = torch.maximum((value - returns) ** 2, (near - returns) ** 2) / 2
    return (-gain + 0.5 * value_loss - 0.02 * dist.entropy()).mean()


def plain_minibatch(learner, state, batch) -> Minibatch:
    """The whole rollout as one minibatch, advantages by slow loops."""

    def value(obs: torch.Tensor) -> np.ndarray:
        rows = []
        for m in range(len(obs)):
            params = {n: p[m] for n, p in state["params"].items()}
            rows.append(plain_outputs(learner, params, obs[m].flatten(0, -2))[1])
        return torch.stack(rows).view(obs.shape[:-1]).numpy()

    ends = batch.terminated.numpy(), batch.truncated.numpy()
    arrays = [batch.reward.numpy(), value(batch.obs), value(batch.last_obs)]
    _, found = slow_stream_gae([*arrays, value(batch.final_obs), *ends], 0.9, 0.95)
    advantage, old = torch.from_numpy(found), torch.from_numpy(arrays[1])
    centred = advantage - advantage.mean((1, 2), keepdim=True)
    standard = centred / centred.square().mean((1, 2), keepdim=True).sqrt()
    flat = [t.flatten(1, 2) for t in (batch.log_prob, standard, advantage + old, old)]
    return Minibatch(batch.obs.flatten(1, 2), batch.action.flatten(1, 2), *flat)


@pytest.mark.parametrize("discrete", [False, True])
def test_loss_equals_the_plain_one_and_its_gradient_finite_differences(discrete):
    learner = make_learner(discrete)
    state = make_state(learner)
    data = plain_minibatch(learner, state, make_stream(learner, state))
    like = {n: p[0] for n, p in state["params"].items()}
    generator = torch.Generator().manual_seed(1)
    theta = flatten_members(state["params"])
    theta = theta + 0.1 * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    params = unflatten_members(theta, like)
    loss, parts = learner.loss(params, data)
    for m in range(2):
        expected = plain_loss(learner, {n: p[m] for n, p in params.items()}, data, m)
        torch.testing.assert_close(loss[m], expected, rtol=1e-10, atol=1e-12)
    assert parts["meta/kl"].shape == (2,)
    assert torch.autograd.gradcheck(
        lambda moved: learner.loss(unflatten_members(moved, like), data)[0].sum(),
        theta.requires_grad_(),
    )


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
@pytest.mark.parametrize("discrete", [False, True])
def test_first_step_equals_torch_s_adam_on_the_plain_loss(discrete, max_grad_norm):
    learner = make_learner(discrete, max_grad_norm=max_grad_norm)
    state = make_state(learner)
    state["optimizer"] = {n: torch.zeros_like(s) for n, s in state["optimizer"].items()}
    batch = make_stream(learner, state)
    after, _ = update(learner, state, batch)
    data = plain_minibatch(learner, state, batch)
    for m in range(2):
        params = {n: p[m].clone().requires_grad_() for n, p in state["params"].items()}
        optimizer = torch.optim.Adam(params.values(), lr=3e-4, eps=1e-5)
        plain_loss(learner, params, data, m).backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in params.values()))
        assert (norm > max_grad_norm) == (max_grad_norm == 0.1)
        for p in params.values():
            p.grad *= min(1.0, max_grad_norm / float(norm))
        optimizer.step()
        for name, p in params.items():
            assert not torch.equal(p, state["params"][name][m])
            torch.testing.assert_close(after["params"][name][m], p.detach(), rtol=0, atol=1e-10)


def test_bonus_is_added_to_every_reward():
    state = make_state(make_learner())
    batch = make_stream(make_learner(), state)
    shifted = dataclasses.replace(batch, reward=batch.reward + 0.5)
    (bonus, _), (expected, _), (without, _) = (
        update(make_learner(reward_bonus=value), state, data)
        for value, data in ((0.5, batch), (0.0, shifted), (0.0, batch))
    )
    for name, p in bonus["params"].items():
        assert torch.equal(p, expected["params"][name])
        assert not torch.equal(p, without["params"][name])


@pytest.mark.parametrize("discrete", [False, True])
def test_replicas_are_independent(discrete):
    learner = make_learner(discrete, **SEVERAL)
    state = make_state(learner, num_members=3)
    batch = make_stream(learner, state)
    together, _ = update(learner, state, batch)
    for m in range(3):
        own = members(state, slice(m, m + 1), 3)
        alone, _ = update(learner, own, batch.members(m, m + 1))
        for group, entries in members(together, slice(m, m + 1), 3).items():
            for name, p in entries.items():
                torch.testing.assert_close(alone[group][name], p, rtol=1e-9, atol=1e-12)


def test_update_is_a_function():
    """The same twice, bit for bit, with inputs unchanged and every entry but the seed moved."""
    learner = make_learner(**SEVERAL)
    state = make_state(learner)
    batch = make_stream(learner, state)
    before = copied(state), batch.map(torch.clone)
    (first, metrics), (second, again) = (update(learner, state, batch) for _ in range(2))
    assert metrics == again
    for group, entries in first.items():
        assert entries.keys() == state[group].keys()
        for name, p in entries.items():
            assert torch.equal(p, second[group][name])
            assert torch.equal(state[group][name], before[0][group][name])
            assert not p.requires_grad
            assert torch.equal(p, state[group][name]) is (name == "seed")
    for name, tensor in vars(batch).items():
        assert torch.equal(tensor, getattr(before[1], name))


def test_step_size_falls_to_zero():
    learner = make_learner(lr_decay_updates=5)
    state = make_state(learner)
    batch = make_stream(learner, state)
    moved = []
    for count in (0, 4, 5):
        state["counters"]["num_updates"] = torch.full((2,), count)
        after, _ = update(learner, state, batch)
        moved.append(flatten_members(after["params"]) - flatten_members(state["params"]))
    torch.testing.assert_close(moved[1], moved[0] / 5.0, rtol=1e-6, atol=1e-12)
    assert (moved[2] == 0.0).all()


def test_the_chain_is_learned():
    settings = {"num_steps": 16, "num_epochs": 4, "num_minibatches": 2, "entropy_coef": 0.0}
    spec = Spec(3, 2, discrete=True, horizon=100)
    for lr in (0.01, 1e-9):
        learner = Ppo(PpoConfig(**SETTINGS | settings | {"lr": lr}), spec)
        before, after = chain_probabilities(learner, 15 if lr > 1e-3 else 2)
        assert ((before - 0.5).abs() < 0.05).all()
        assert (after > 0.9).all() if lr > 1e-3 else ((after - before).abs() < 1e-3).all()


def test_a_reward_of_nan_is_refused():
    learner = make_learner()
    state = make_state(learner)
    batch = make_stream(learner, state)
    batch.reward[1, 2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="params/"):
        update(learner, state, batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("lr", 0.0),
        ("lr_decay_updates", -1),
        ("max_grad_norm", float("inf")),
        ("init_std", -1.0),
        ("gamma", 1.01),
        ("gae_lambda", -0.01),
        ("value_coef", float("nan")),
        ("entropy_coef", -0.1),
        ("clip_ratio", 0.0),
        ("reward_bonus", 11.0),
        ("num_epochs", 0),
        ("num_minibatches", 2.5),
        ("hidden", (4, 0)),
        ("activation", "gelu"),
    ],
)
def test_unusable_setting_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} "):
        PpoConfig(**{name: value})

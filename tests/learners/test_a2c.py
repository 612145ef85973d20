"""A2C against a plain loss with targets from slow loops, finite differences and a small problem."""

import numpy as np
import pytest
import torch

from learners.a2c import A2c
from learners.config import A2cConfig
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.params import flatten_members, leaves, unflatten_members
from learners.core.trajectory import Spec
from tests.learners.core.test_actor_critic import (
    chain_probabilities,
    copied,
    make_state,
    make_stream,
    members,
    plain_outputs,
)
from tests.learners.core.test_returns import slow_vtrace

SETTINGS = {"hidden": (5, 4), "gamma": 0.9, "entropy_coef": 0.02, "num_steps": 6}


def make_learner(discrete: bool = False, **settings) -> A2c:
    spec = Spec(3, 4 if discrete else 2, discrete, horizon=100)
    return A2c(A2cConfig(**SETTINGS | settings), spec)


def update(learner, state, batch):
    return learner.meta_update(state, [learner.begin(state, 2)[1]], [batch])


def member(params, m: int):
    return {n: p[m] for n, p in params.items()}


def plain_targets(learner, params, batch):
    """Targets and advantages of V-trace by slow loops, [M, N] each; constants of the loss."""

    def of_each(function) -> np.ndarray:
        found = [function(m, member(params, m)).detach() for m in range(len(batch.reward))]
        return torch.stack(found).numpy()

    def value(obs: torch.Tensor) -> np.ndarray:
        def of(m, own):
            return plain_outputs(learner, own, obs[m].flatten(0, -2))[1].view(obs.shape[1:-1])

        return of_each(of)

    def log_prob(m, own):
        dist, _ = plain_outputs(learner, own, batch.obs[m].flatten(0, 1))
        return dist.log_prob(batch.action[m].flatten(0, 1)).view(batch.reward.shape[1:])

    arrays = [batch.reward.numpy(), value(batch.obs), value(batch.last_obs)]
    arrays += [value(batch.final_obs), batch.terminated.numpy(), batch.truncated.numpy()]
    log_ratio = of_each(log_prob) - batch.log_prob.numpy()
    found = slow_vtrace(arrays, log_ratio, 0.9, learner.config.max_rho)
    return [torch.from_numpy(array).flatten(1) for array in found]


def plain_loss(learner, params, batch, targets) -> torch.Tensor:
    """Losses of the members, [M], with the targets held."""
    losses = []
    for m, (target, advantage) in enumerate(zip(*targets, strict=True)):
        dist, value = plain_outputs(learner, member(params, m), batch.obs[m].flatten(0, 1))
        credit = -advantage * dist.log_prob(batch.action[m].flatten(0, 1))
        losses.append((credit + 0.25 * (value - target) ** 2 - 0.02 * dist.entropy()).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("max_rho", [1.0, 1.3])
@pytest.mark.parametrize("discrete", [False, True])
def test_gradient_equals_that_of_the_plain_loss_and_finite_differences(discrete, max_rho):
    learner = make_learner(discrete, max_rho=max_rho)
    state = make_state(learner)
    batch = make_stream(learner, state)
    targets = plain_targets(learner, state["params"], batch)
    like = member(state["params"], 0)
    theta = flatten_members(state["params"]).requires_grad_()
    loss, metrics = learner.loss(unflatten_members(theta, like), batch, {})
    expected = plain_loss(learner, unflatten_members(theta, like), batch, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert float(metrics["meta/loss"].mean()) == pytest.approx(float(expected.detach().mean()))
    (own,) = torch.autograd.grad(loss.sum(), theta)
    (other,) = torch.autograd.grad(expected.sum(), theta)
    torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda moved: plain_loss(learner, unflatten_members(moved, like), batch, targets).sum(),
        theta,
    )


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_update_is_a_step_of_rmsprop_on_the_plain_loss(max_grad_norm):
    learner = make_learner(max_grad_norm=max_grad_norm, lr=0.01)
    state = make_state(learner)
    batch = make_stream(learner, state)
    after, metrics = update(learner, state, batch)
    params = leaves(state["params"])
    targets = plain_targets(learner, params, batch)
    plain_loss(learner, params, batch, targets).sum().backward()
    norms = []
    for m in range(2):
        norms.append(float(sum(p.grad[m].square().sum() for p in params.values())) ** 0.5)
        assert (norms[m] > max_grad_norm) == (max_grad_norm == 0.1)
        for name, p in params.items():
            grad = p.grad[m] * min(1.0, max_grad_norm / norms[m])
            ms = 0.99 * state["optimizer"][f"ms.{name}"][m] + 0.01 * grad**2
            expected = p.detach()[m] - 0.01 * grad / (ms + 1e-5).sqrt()
            assert not torch.equal(expected, p[m])
            torch.testing.assert_close(after["params"][name][m], expected, rtol=0, atol=1e-11)
            torch.testing.assert_close(after["optimizer"][f"ms.{name}"][m], ms)
    assert metrics["meta/grad_norm"] == pytest.approx(sum(norms) / 2)
    assert after["counters"]["num_updates"].tolist() == [1] * len(after["counters"]["num_updates"])


@pytest.mark.parametrize("discrete", [False, True])
def test_replicas_are_independent(discrete):
    learner = make_learner(discrete, normalize_obs=True, normalize_reward=True)
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
    """The same twice, bit for bit, with inputs unchanged and every entry moved."""
    learner = make_learner(normalize_obs=True)
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


def test_the_chain_is_learned():
    settings = {"num_steps": 16, "entropy_coef": 0.0, "hidden": (16,)}
    spec = Spec(3, 2, discrete=True, horizon=100)
    for lr in (0.02, 1e-9):
        learner = A2c(A2cConfig(**SETTINGS | settings | {"lr": lr}), spec)
        before, after = chain_probabilities(learner, 60 if lr > 1e-3 else 2)
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
        ("max_rho", 0.0),
        ("max_rho", float("nan")),
        ("num_steps", 0.5),
        ("lr", -1.0),
        ("gamma", -1),
        ("lookahead", -1),
        ("lookahead", 6),
        ("optimizer", "lion"),
        ("value_gain", -1.0),
    ],
)
def test_unusable_setting_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} "):
        A2cConfig(**{name: value})


@pytest.mark.parametrize("lookahead", [0, 3])
def test_without_bootstrapping_returns_end_with_the_chunk_or_after_n_rewards(lookahead):
    """Against sums of rewards by a slow loop; incomplete sums are left out."""
    learner = make_learner(True, bootstrap=False, lookahead=lookahead, max_rho=100.0)
    state = make_state(learner)
    batch = make_stream(learner, state)
    like = member(state["params"], 0)
    theta = flatten_members(state["params"])
    dist_of = [
        plain_outputs(
            learner, member(unflatten_members(theta, like), m), batch.obs[m].flatten(0, 1)
        )
        for m in range(2)
    ]
    log_prob = torch.stack(
        [d.log_prob(batch.action[m].flatten()) for m, (d, _) in enumerate(dist_of)]
    )
    value = torch.stack([v for _, v in dist_of]).view_as(batch.reward)
    ended = batch.terminated | batch.truncated
    num_steps = batch.reward.shape[1]
    on_policy = batch.map(torch.clone)
    on_policy.log_prob.copy_(log_prob.view_as(batch.reward))
    expected, counted = torch.zeros_like(value), torch.zeros_like(value)
    for m, t, e in np.ndindex(*value.shape):
        limit = t + lookahead if lookahead else num_steps
        for i in range(t, min(limit, num_steps)):
            expected[m, t, e] += 0.9 ** (i - t) * batch.reward[m, i, e]
            if ended[m, i, e]:
                break
        whole = not lookahead or limit <= num_steps
        counted[m, t, e] = float(whole or bool(ended[m, t:num_steps, e].any()))
    _, metrics = learner.loss(state["params"], on_policy, {})
    error = (value - expected).square() * counted
    mean = (error.sum((1, 2)) / counted.sum((1, 2))).mean()
    assert float(metrics["meta/value_loss"].mean()) == pytest.approx(0.5 * float(mean))
    assert bool((counted == 0.0).any()) is (lookahead > 0)


def test_a_lookahead_that_bootstraps_is_refused():
    with pytest.raises(ConfigError, match="set bootstrap to False"):
        A2cConfig(lookahead=2)

"""Advantages, inner losses and the outer surrogate against plain loops, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from learners.core.params import leaves, unflatten
from learners.core.policy_gradient import Batch, advantages, surrogate
from tests.learners import reference
from tests.learners.builders import make_learner, make_state, make_trajectory, make_window

POLICIES = pytest.mark.parametrize("discrete", [False, True], ids=["gaussian", "categorical"])


@POLICIES
def test_advantages_are_standardised_gae_over_the_member_s_own_baseline(discrete):
    learner = make_learner(discrete)
    params = make_state(learner)["meta_params"]
    trajectory = make_trajectory(learner, params, 3, seed=2, num_steps=7)
    gamma, lam = 0.9, 0.7
    batch = advantages(trajectory, gamma, lam)
    assert torch.equal(batch.log_prob, trajectory.log_prob)
    assert torch.equal(batch.obs, trajectory.obs.flatten(1, 2))
    assert torch.equal(batch.action, trajectory.action.flatten(1, 2))
    for m in range(3):
        steps = [(e, t) for e in range(4) for t in range(7) if trajectory.valid[m, t, e] > 0.0]
        ends = {e: max(t for env, t in steps if env == e) for e in range(4)}
        returns, rows = {}, {}
        for e, t in reversed(steps):
            later = returns.get((e, t + 1), 0.0) if t < ends[e] else 0.0
            returns[e, t] = float(trajectory.reward[m, t, e]) + gamma * later
            obs = trajectory.obs[m, t, e].clamp(-10.0, 10.0)
            powers = torch.tensor([t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0]).double()
            rows[e, t] = torch.cat([obs, obs**2, powers])
        phi = torch.stack([rows[step] for step in steps])
        target = torch.tensor([returns[step] for step in steps]).double()
        gram = phi.T @ phi + 1e-5 * torch.eye(8).double()
        fitted = dict(
            zip(steps, (phi @ torch.linalg.solve(gram, phi.T @ target)).tolist(), strict=True)
        )
        found = {}
        for e, t in reversed(steps):
            going = t < ends[e]
            following = fitted[e, t + 1] if going else 0.0
            delta = float(trajectory.reward[m, t, e]) + gamma * following - fitted[e, t]
            found[e, t] = delta + (gamma * lam * found[e, t + 1] if going else 0.0)
        values = torch.tensor([found[step] for step in steps]).double()
        values = (values - values.mean()) / values.std(correction=0)
        expected = torch.zeros(7, 4).double()
        for (e, t), value in zip(steps, values, strict=True):
            expected[t, e] = value
        torch.testing.assert_close(batch.advantage[m], expected, rtol=0, atol=1e-6)


def second_derivatives(learner, meta_params, batch: Batch) -> torch.Tensor:
    """The Hessian of the inner loss of the first member, [P, P]."""
    names = sorted(meta_params)
    flat = torch.cat([meta_params[name].detach().reshape(-1) for name in names])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        params = {n: p.unsqueeze(0) for n, p in unflatten(vector, meta_params).items()}
        return learner.inner_loss(params, batch.members(0, 1)).sum()

    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("discrete", [False, True])
def test_inner_losses_share_the_first_derivative_and_differ_in_the_second(discrete):
    learners = {
        kind: make_learner(discrete, inner_loss=kind)
        for kind in ("log_prob", "likelihood_ratio", "dice")
    }
    meta_params = make_state(learners["dice"])["meta_params"]
    window = make_window(learners["dice"], {"meta_params": meta_params})[1]
    batch = learners["dice"].blocks(window)[0].support[0]
    gradients, hessians = {}, {}
    for kind, learner in learners.items():
        params = leaves({n: p.expand(3, *p.shape) for n, p in meta_params.items()})
        total = learner.inner_loss(params, batch).sum()
        gradients[kind] = torch.autograd.grad(total, list(params.values()))
        hessians[kind] = second_derivatives(learner, meta_params, batch)
    for kind in ("likelihood_ratio", "dice"):
        for one, other in zip(gradients["log_prob"], gradients[kind], strict=True):
            assert one.abs().max() > 1e-3
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for one, other in itertools.combinations(hessians.values(), 2):
        assert (one - other).norm() > 0.05 * one.norm()


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
@pytest.mark.parametrize("discrete", [False, True])
def test_second_derivative_of_the_inner_losses(discrete, kind):
    """From per-step gradients and Hessians of log π: the formulas of each estimator, step by step.

    log_prob: Â ∇²log π. likelihood_ratio: Â (∇²log π + ∇log π ∇log πᵀ). dice: the same, and the
    products of ∇log π_t with those of all earlier steps of the episode, both ways round.
    """
    learner = make_learner(discrete, inner_loss=kind)
    meta_params = make_state(learner)["meta_params"]
    support = learner.blocks(make_window(learner, {"meta_params": meta_params})[1])[0].support[0]
    batch = reference.one_member(support, 0)
    flat = torch.cat([meta_params[name].reshape(-1) for name in sorted(meta_params)])

    def log_prob(vector: torch.Tensor) -> torch.Tensor:
        return reference.log_probs(learner, unflatten(vector, meta_params), batch)

    slope = torch.autograd.functional.jacobian(log_prob, flat)
    expected = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for env in range(batch.valid.shape[1]):
        earlier = torch.zeros_like(flat)
        for t in range(batch.valid.shape[0]):
            if batch.valid[t, env] == 0.0:
                continue
            curve = torch.autograd.functional.hessian(
                lambda vector, t=t, env=env: log_prob(vector)[t, env], flat
            )
            own = slope[t, env]
            if kind != "log_prob":
                curve = curve + own.outer(own)
            if kind == "dice":
                curve = curve + own.outer(earlier) + earlier.outer(own)
            earlier = earlier + own
            expected -= batch.advantage[t, env] * curve / batch.valid.sum()
    computed = second_derivatives(learner, meta_params, support)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(computed, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
def test_value_of_the_inner_losses(kind):
    learner = make_learner(inner_loss=kind)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    support = learner.blocks(batches)[0].support[0]
    computed = learner.inner_loss(agents.params, support)
    for member in range(3):
        batch = reference.one_member(support, member)
        theta = {name: p[member] for name, p in agents.params.items()}
        log_prob = reference.log_probs(learner, theta, batch)
        expected = reference.inner_loss(kind, log_prob, log_prob, batch)
        torch.testing.assert_close(computed[member], expected, rtol=1e-12, atol=1e-13)


@POLICIES
def test_surrogate_equals_a_loop_and_its_gradient_reaches_the_distribution(discrete):
    learner = make_learner(discrete)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    query = learner.blocks(batches)[0].query
    params = leaves(agents.params)
    losses = surrogate(learner.policy.distribution(params, query.obs), query)
    for m in range(3):
        batch = reference.one_member(query, m)
        theta = {name: p[m] for name, p in params.items()}
        ratio = (reference.log_probs(learner, theta, batch) - batch.log_prob).exp()
        assert (ratio - 1.0).abs().max() > 0.05
        expected = -reference.mean(ratio * batch.advantage, batch.valid)
        torch.testing.assert_close(losses[m], expected, rtol=1e-12, atol=1e-13)
        slopes = torch.autograd.grad(losses[m], list(params.values()), retain_graph=True)
        expected_slopes = torch.autograd.grad(expected, list(params.values()))
        for one, other in zip(slopes, expected_slopes, strict=True):
            assert one[m].abs().max() > 1e-4
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@POLICIES
def test_surrogate_at_the_behaviour_policy_is_the_mean_advantage(discrete):
    learner = make_learner(discrete)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    query = learner.blocks(batches)[0].query
    dist = learner.policy.distribution(agents.params, query.obs)
    own = dist.log_prob(query.action).view_as(query.log_prob)
    raised = replace(query, log_prob=own, advantage=query.advantage + 2.0)
    torch.testing.assert_close(surrogate(dist, raised), torch.full((3,), -2.0).double())


def test_members_of_a_batch_are_cut_from_every_field():
    learner = make_learner()
    state = make_state(learner)
    batch = learner.blocks(make_window(learner, state)[1])[0].query
    part = batch.members(1, 3)
    for name in Batch.__dataclass_fields__:
        assert torch.equal(getattr(part, name), getattr(batch, name)[1:3])

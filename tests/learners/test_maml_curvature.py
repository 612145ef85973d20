"""Fisher-vector products of the whole adaptation against two dense oracles, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from learners.core.params import flatten, leaves, unflatten
from learners.core.policy import Gaussian
from tests.learners import reference
from tests.learners.builders import (
    dense_fisher,
    linearise,
    make_learner,
    make_state,
    make_window,
)

VARIANTS = {
    "plain": {},
    "first_order": {"first_order": True},
    "learned_rates": {"learn_inner_lr": True},
}
CASES = list(
    itertools.product(
        (False, True), (1, 2), ("log_prob", "likelihood_ratio", "dice"), sorted(VARIANTS)
    )
)


def name_of(case) -> str:
    discrete, num_inner_updates, kind, variant = case
    return f"{'categorical' if discrete else 'gaussian'}-K{num_inner_updates}-{kind}-{variant}"


def build(case, num_members=2):
    discrete, num_inner_updates, kind, variant = case
    learner = make_learner(
        discrete,
        num_inner_updates=num_inner_updates,
        inner_loss=kind,
        members_per_block=1,
        **VARIANTS[variant],
    )
    meta_params = leaves(make_state(learner)["meta_params"])
    _, batches = make_window(learner, {"meta_params": meta_params}, num_members)
    blocks = learner.blocks(batches)
    assert len({float(block.query.valid.sum()) for block in blocks}) == num_members
    return learner, meta_params, blocks


def reference_jacobian(learner, meta_params, blocks) -> torch.Tensor:
    """J of the distributions' parameters by finite differences, [outputs, P]."""
    held = reference.hold(learner, meta_params, blocks)
    slopes = reference.central_differences(
        lambda moved: reference.outputs(learner, moved, blocks, held), meta_params
    )
    return torch.cat([slopes[name] for name in sorted(slopes)]).T


@pytest.mark.parametrize("case", [c for c in CASES if c[1] == 2 or c[3] == "plain"], ids=name_of)
def test_fisher_product_equals_the_dense_one_by_finite_differences(case):
    learner, meta_params, blocks = build(case)
    computed = dense_fisher(linearise(learner, meta_params, blocks)[1], meta_params)
    jacobian = reference_jacobian(learner, meta_params, blocks)
    fisher = reference.output_fisher(learner, meta_params, blocks)
    expected = jacobian.T @ fisher @ jacobian
    assert expected.diag().min() > 0.0
    torch.testing.assert_close(computed, expected, rtol=1e-6, atol=1e-7 * float(expected.norm()))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_fisher_product_equals_the_hessian_of_the_mean_kl(case):
    learner, meta_params, blocks = build(case)
    _, graphs = linearise(learner, meta_params, blocks)
    computed = dense_fisher(graphs, meta_params)

    def as_torch(dist):
        if isinstance(dist, Gaussian):
            normal = torch.distributions.Normal(dist.mean, dist.log_std.exp().expand_as(dist.mean))
            return torch.distributions.Independent(normal, 1)
        return torch.distributions.Categorical(logits=dist.logits)

    def mean_kl(vector: torch.Tensor) -> torch.Tensor:
        moved = unflatten(vector, meta_params)
        per_member = []
        for block, graph in zip(blocks, graphs, strict=True):
            adapted = learner.adapt(moved, block, create_graph=True)[-1]
            new = as_torch(learner.policy.distribution(adapted, block.query.obs))
            kl = torch.distributions.kl_divergence(as_torch(graph.dist), new)
            per_member.append(kl[block.query.valid.flatten(1) > 0.0].mean())
        return torch.stack(per_member).mean()

    hessian = torch.autograd.functional.hessian(mean_kl, flatten(meta_params).detach())
    torch.testing.assert_close(computed, hessian, rtol=1e-9, atol=1e-11 * float(hessian.norm()))


@pytest.mark.parametrize("num_inner_updates", [1, 2])
@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
def test_dropping_the_log_std_block_would_show(num_inner_updates, kind):
    learner, meta_params, blocks = build((False, num_inner_updates, kind, "plain"))
    computed = dense_fisher(linearise(learner, meta_params, blocks)[1], meta_params)
    jacobian = reference_jacobian(learner, meta_params, blocks)
    for wrong_block in (0.0, 1.0):
        fisher = reference.output_fisher(learner, meta_params, blocks, log_std_block=wrong_block)
        wrong = jacobian.T @ fisher @ jacobian
        assert (computed - wrong).norm() > 0.1 * computed.norm()


@pytest.mark.parametrize("discrete", [False, True])
def test_curvature_through_the_adaptation_differs_from_that_of_the_policy_alone(discrete):
    """KL at θ_K, not at η; and second-order differs from first-order curvature."""
    learner, meta_params, blocks = build((discrete, 1, "log_prob", "plain"))
    computed = dense_fisher(linearise(learner, meta_params, blocks)[1], meta_params)
    constant = make_learner(discrete, members_per_block=1, first_order=True)
    of_constant = dense_fisher(linearise(constant, meta_params, blocks)[1], meta_params)
    assert (computed - of_constant).norm() > 0.05 * computed.norm()


@pytest.mark.parametrize("discrete", [False, True])
def test_fisher_matrix_is_symmetric_and_positive(discrete):
    learner, meta_params, blocks = build((discrete, 2, "dice", "plain"), num_members=3)
    matrix = dense_fisher(linearise(learner, meta_params, blocks)[1], meta_params)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12 * float(matrix.norm()))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()
    assert eigenvalues.max() > 1e-2


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_meta_update_takes_the_dense_natural_gradient_step(case):
    """With enough products, conjugate gradient is a dense solve; then the line search shortens."""
    discrete, num_inner_updates, kind, variant = case
    learner = make_learner(
        discrete,
        num_inner_updates=num_inner_updates,
        inner_loss=kind,
        members_per_block=2,
        cg_steps=80,
        cg_damping=0.05,
        max_kl=0.003,
        line_search_ratio=0.6,
        **VARIANTS[variant],
    )
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    new, metrics = learner.meta_update(state, [agents], batches)
    assert metrics["meta/step_accepted"] == 1.0

    meta_params = leaves(state["meta_params"])
    gradient, graphs = linearise(learner, meta_params, learner.blocks(batches))
    matrix = dense_fisher(graphs, meta_params)
    matrix = matrix + 0.05 * torch.eye(len(matrix), dtype=matrix.dtype)
    direction = torch.linalg.solve(matrix, gradient)
    step = direction * (2.0 * 0.003 / (direction @ matrix @ direction)).sqrt()
    shrinkage = 0.6 ** (metrics["meta/line_search_tries"] - 1.0)
    moved = flatten(state["meta_params"]) - flatten(new["meta_params"])
    assert (moved - shrinkage * step).norm() < 1e-3 * step.norm() * shrinkage


@pytest.mark.parametrize("discrete", [False, True])
def test_the_curvature_of_a_share_is_that_of_its_environments_alone(discrete):
    learner, meta_params, blocks = build((discrete, 1, "log_prob", "plain"))
    num_envs = blocks[0].query.valid.shape[2]
    assert num_envs > 1
    part = replace(learner, config=replace(learner.config, curvature_share=0.5))
    few = [block.envs(0.5) for block in blocks]
    for batch in [batch for block in few for batch in (*block.support, block.query)]:
        assert batch.valid.shape[2] == max(1, round(0.5 * num_envs))
        assert batch.obs.shape[1] == batch.valid[0].numel()
    graphs = linearise(part, meta_params, blocks)[1]
    jacobian = reference_jacobian(learner, meta_params, few)
    expected = jacobian.T @ reference.output_fisher(learner, meta_params, few) @ jacobian
    torch.testing.assert_close(
        dense_fisher(graphs, meta_params), expected, rtol=1e-6, atol=1e-7 * float(expected.norm())
    )
    for graph, whole in zip(graphs, linearise(learner, meta_params, blocks)[1], strict=True):
        assert torch.equal(graph.gradient(meta_params), whole.gradient(meta_params))
        assert torch.equal(graph.dist.tensors[0], whole.dist.tensors[0])

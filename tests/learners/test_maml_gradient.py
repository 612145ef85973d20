"""The meta-gradient and the inner update against finite differences, in float64."""

import itertools

import pytest
import torch

from learners.core.bilevel import unroll
from learners.core.params import leaves, unflatten
from learners.maml import INNER_LR
from tests.learners import reference
from tests.learners.builders import linearise, make_learner, make_state, make_window

VARIANTS = {
    "plain": {},
    "first_order": {"first_order": True},
    "learned_rates": {"learn_inner_lr": True},
    "exploration": {"exploration": 0.7},
    "all": {"first_order": True, "learn_inner_lr": True, "exploration": 0.7},
    "relu": {"activation": "relu"},
}
CASES = list(
    itertools.product(
        (False, True), (1, 2), ("log_prob", "likelihood_ratio", "dice"), sorted(VARIANTS)
    )
)


def name_of(case) -> str:
    discrete, num_inner_updates, kind, variant = case
    return f"{'categorical' if discrete else 'gaussian'}-K{num_inner_updates}-{kind}-{variant}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_meta_gradient_equals_finite_differences(case):
    discrete, num_inner_updates, kind, variant = case
    learner = make_learner(
        discrete,
        num_inner_updates=num_inner_updates,
        inner_loss=kind,
        members_per_block=1,
        **VARIANTS[variant],
    )
    meta_params = leaves(make_state(learner)["meta_params"])
    _, batches = make_window(learner, {"meta_params": meta_params}, num_members=2)
    blocks = learner.blocks(batches)
    assert len({float(block.query.valid.sum()) for block in blocks}) == 2
    held = reference.hold(learner, meta_params, blocks)

    gradient, graphs = linearise(learner, meta_params, blocks)
    slopes = reference.central_differences(
        lambda moved: reference.objective(learner, moved, blocks, held), meta_params
    )

    value = reference.objective(learner, meta_params, blocks)
    torch.testing.assert_close(
        sum(graph.loss.detach() for graph in graphs), value, rtol=1e-12, atol=1e-13
    )
    for name, computed in unflatten(gradient, meta_params).items():
        expected = slopes[name].view_as(computed)
        assert expected.abs().max() > 1e-5, f"{name}: nothing to compare"
        torch.testing.assert_close(
            computed, expected, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["likelihood_ratio", "dice"])
def test_stopped_values_matter(kind):
    """Were the held values allowed to move, differences would give the log_prob derivative."""
    learner = make_learner(inner_loss=kind)
    meta_params = leaves(make_state(learner)["meta_params"])
    blocks = learner.blocks(make_window(learner, {"meta_params": meta_params})[1])
    gradient = unflatten(linearise(learner, meta_params, blocks)[0], meta_params)
    plain = make_learner(inner_loss="log_prob")
    biased = unflatten(linearise(plain, meta_params, blocks)[0], meta_params)
    naive = reference.central_differences(
        lambda moved: reference.objective(learner, moved, blocks), meta_params
    )
    for name, slope in naive.items():
        torch.testing.assert_close(slope.view_as(biased[name]), biased[name], rtol=1e-6, atol=1e-8)
    distance = max(float((gradient[n] - biased[n]).abs().max()) for n in gradient)
    assert distance > 1e-2


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_inner_update_equals_finite_differences(discrete, kind, learned):
    learner = make_learner(discrete, inner_loss=kind, learn_inner_lr=learned)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    updated = learner.inner_update(state, agents, batches[0])
    _, rates = reference.split(learner, state["meta_params"])
    support = learner.blocks(batches)[0].support[0]
    for member in range(3):
        batch = reference.one_member(support, member)
        theta = {name: p[member].clone() for name, p in agents.params.items()}
        slopes = reference.central_differences(
            lambda moved, batch=batch: reference.inner_loss(
                "log_prob", reference.log_probs(learner, moved, batch), batch.valid, batch
            ),
            theta,
        )
        for name, p in theta.items():
            assert slopes[name].abs().max() > 1e-4, f"{name}: nothing to compare"
            expected = p - rates[name] * slopes[name].view_as(p)
            torch.testing.assert_close(updated.params[name][member], expected, rtol=0, atol=1e-9)


# --- Which leaves the gradient reaches ---


def gradient_of(learner, meta_params, batches) -> dict[str, torch.Tensor]:
    meta_params = leaves(meta_params)
    gradient, graphs = linearise(learner, meta_params, learner.blocks(batches))
    product = sum(graph.fisher_product(meta_params, meta_params) for graph in graphs)
    assert gradient.isfinite().all()
    assert product.isfinite().all()
    return unflatten(gradient, meta_params)


POLICY = {"layer0.weight", "layer0.bias", "layer1.weight", "layer1.bias"}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_meta_gradient_reaches_every_leaf_and_no_other(discrete, learned, first_order):
    learner = make_learner(discrete, learn_inner_lr=learned, first_order=first_order)
    state = make_state(learner)
    gradient = gradient_of(learner, state["meta_params"], make_window(learner, state)[1])
    expected = POLICY if discrete else POLICY | {"log_std"}
    if learned:
        expected = expected | {INNER_LR + name for name in expected}
    assert set(gradient) == expected
    for name, slope in gradient.items():
        assert (slope != 0.0).all(), name


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
def test_absent_observation_gives_exact_zero_and_nothing_else(activation, kind):
    learner = make_learner(activation=activation, inner_loss=kind, learn_inner_lr=True)
    state = make_state(learner)
    _, batches = make_window(learner, state)
    for batch in batches:
        batch.obs[..., 1] = 0.0
    gradient = gradient_of(learner, state["meta_params"], batches)
    for prefix in ("", INNER_LR):
        weight = gradient.pop(prefix + "layer0.weight")
        assert (weight[1] == 0.0).all()
        assert (weight[0] != 0.0).any()
    for name, slope in gradient.items():
        assert (slope != 0.0).any(), name


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
def test_dead_relu_unit_gets_exact_zero_and_the_others_do_not(kind):
    learner = make_learner(activation="relu", inner_loss=kind)
    state = make_state(learner)
    state["meta_params"]["layer0.bias"] = torch.tensor([-100.0, 3.0], dtype=torch.float64)
    gradient = gradient_of(learner, state["meta_params"], make_window(learner, state)[1])
    dead = [gradient["layer0.weight"][:, 0], gradient["layer0.bias"][0]]
    dead.append(gradient["layer1.weight"][0])
    assert all((slope == 0.0).all() for slope in dead)
    alive = [gradient["layer0.weight"][:, 1:], gradient["layer0.bias"][1:]]
    alive += [gradient["layer1.weight"][1:], gradient["layer1.bias"], gradient["log_std"]]
    assert all((slope != 0.0).all() for slope in alive)


@pytest.mark.parametrize("discrete", [False, True])
def test_blind_policy_at_rest_learns_through_its_output_bias_alone(discrete):
    """Zero observation, relu and zero biases: the network passes nothing on but its last bias."""
    learner = make_learner(discrete, activation="relu", learn_inner_lr=True)
    state = make_state(learner)
    state["meta_params"]["layer0.bias"].zero_()
    _, batches = make_window(learner, state)
    for batch in batches:
        batch.obs.zero_()
    gradient = gradient_of(learner, state["meta_params"], batches)
    reached = {"layer1.bias"} if discrete else {"layer1.bias", "log_std"}
    reached = reached | {INNER_LR + name for name in reached}
    for name, slope in gradient.items():
        assert (slope != 0.0).any() if name in reached else (slope == 0.0).all(), name


def test_clamped_standard_deviation_gets_exact_zero():
    learner = make_learner()
    state = make_state(learner)
    _, batches = make_window(learner, state)
    state["meta_params"]["log_std"][0] = -20.0
    for batch in batches:
        batch.action.zero_()
    blocks = learner.blocks(batches)
    meta_params = leaves(state["meta_params"])
    start = learner.adapt(meta_params, blocks[0], create_graph=True)[0]
    total = learner.inner_loss(start, blocks[0].support[0]).sum()
    (slope,) = torch.autograd.grad(total, [meta_params["log_std"]])
    assert slope[0] == 0.0
    assert slope[1] != 0.0


# --- Unrolling ---


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_unroll_gives_the_same_values_with_and_without_graph(create_graph, first_order):
    params = leaves({"x": torch.tensor([[2.0], [5.0]], dtype=torch.float64)})
    rates = {"x": torch.tensor(0.1, dtype=torch.float64)}
    trace = unroll(
        params,
        rates,
        [2.0, 3.0],
        lambda p, c: 0.5 * c * p["x"].square().sum(1),
        create_graph=create_graph,
        first_order=first_order,
    )
    assert trace[0] is params
    expected = [1.0, 0.8, 0.8 * 0.7]
    for theta, factor in zip(trace, expected, strict=True):
        torch.testing.assert_close(theta["x"], factor * params["x"])


def test_unroll_follows_the_chain_rule():
    """f = c x² / 2 per member: x_K = x_0 Π (1 − α c_k), so dx_K/dα is known too."""
    params = leaves({"x": torch.tensor([[2.0], [5.0]], dtype=torch.float64)})
    rates = {"x": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)}
    trace = unroll(
        params, rates, [2.0, 3.0], lambda p, c: 0.5 * c * p["x"].square().sum(1), create_graph=True
    )
    final = trace[-1]["x"].sum()
    dx, da = torch.autograd.grad(final, [params["x"], rates["x"]], retain_graph=True)
    torch.testing.assert_close(dx, torch.full((2, 1), 0.8 * 0.7, dtype=torch.float64))
    torch.testing.assert_close(da, torch.tensor(7.0 * (-2.0 * 0.7 - 3.0 * 0.8)).double())
    first = unroll(
        params,
        rates,
        [2.0, 3.0],
        lambda p, c: 0.5 * c * p["x"].square().sum(1),
        create_graph=True,
        first_order=True,
    )
    dx, da = torch.autograd.grad(first[-1]["x"].sum(), [params["x"], rates["x"]])
    torch.testing.assert_close(dx, torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close(da, torch.tensor(7.0 * (-2.0 - 3.0 * 0.8)).double())

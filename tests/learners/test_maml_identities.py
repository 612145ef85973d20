"""What must not change the result of MAML: blocks, order of tasks, padding, a second call."""

from dataclasses import replace

import pytest
import torch

from learners.core.contract import Agents
from learners.core.params import flatten, leaves
from learners.core.trajectory import ENV_AXIS, Trajectory, concatenate
from tests.learners.builders import (
    dense_fisher,
    linearise,
    make_learner,
    make_state,
    make_trajectory,
    make_window,
    pad,
)

NUM_MEMBERS = 5
POLICIES = pytest.mark.parametrize("discrete", [False, True], ids=["gaussian", "categorical"])
SETTINGS = {
    "num_inner_updates": 2,
    "inner_loss": "dice",
    "exploration": 0.5,
    "cg_damping": 0.1,  # with few products, so that steps agree to nine digits
    "cg_steps": 4,
}


def build(discrete: bool, dtype: torch.dtype = torch.float64, **settings):
    learner = make_learner(discrete, **SETTINGS | settings)
    state = make_state(learner, dtype=dtype)
    return learner, state, *make_window(learner, state, NUM_MEMBERS)


def derivatives(learner, state, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Meta-gradient and dense curvature."""
    meta_params = leaves(state["meta_params"])
    gradient, graphs = linearise(learner, meta_params, learner.blocks(batches))
    return gradient, dense_fisher(graphs, meta_params)


def updated(learner, state, agents, batches) -> torch.Tensor:
    new, metrics = learner.meta_update(state, [agents], batches)
    assert metrics["meta/step_accepted"] == 1.0
    return flatten(new["meta_params"])


def same_values(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@POLICIES
@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
def test_inner_update_of_all_members_equals_a_loop_over_members(discrete, kind):
    learner, state, agents, batches = build(discrete, inner_loss=kind)
    together = learner.inner_update(state, agents, batches[0])
    together = learner.inner_update(state, together, batches[1])
    assert together.num_updates == 2
    for m in range(NUM_MEMBERS):
        alone = Agents({n: p[m : m + 1] for n, p in agents.params.items()}, {}, 0)
        for batch in batches[:2]:
            alone = learner.inner_update(state, alone, batch.members(m, m + 1))
        for name, p in alone.params.items():
            torch.testing.assert_close(together.params[name][m], p[0], rtol=0, atol=1e-12)
    spread = together.params["layer1.bias"].std(0)
    assert (spread > 1e-3).all()


@POLICIES
def test_meta_derivatives_of_all_members_equal_the_mean_of_single_ones(discrete):
    learner, state, _, batches = build(discrete, exploration=0.0, learn_inner_lr=True)
    gradient, curvature = derivatives(learner, state, batches)
    alone = [
        derivatives(learner, state, [batch.members(m, m + 1) for batch in batches])
        for m in range(NUM_MEMBERS)
    ]
    expected = torch.stack([single[0] for single in alone]).mean(0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    expected = torch.stack([single[1] for single in alone]).mean(0)
    torch.testing.assert_close(curvature, expected, rtol=0, atol=1e-12)


@POLICIES
@pytest.mark.parametrize("members_per_block", [1, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_members_per_block_changes_nothing(discrete, members_per_block, learned):
    learner, state, agents, batches = build(
        discrete, members_per_block=NUM_MEMBERS, learn_inner_lr=learned
    )
    cut = build(discrete, members_per_block=members_per_block, learn_inner_lr=learned)[0]
    assert len(learner.blocks(batches)) == 1
    sizes = [len(block.credit) for block in cut.blocks(batches)]
    assert sizes == {1: [1] * 5, 3: [3, 2]}[members_per_block]
    whole, parts = derivatives(learner, state, batches), derivatives(cut, state, batches)
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        updated(cut, state, agents, batches),
        updated(learner, state, agents, batches),
        rtol=0,
        atol=1e-9,
    )


@POLICIES
def test_order_of_tasks_changes_nothing(discrete):
    learner, state, agents, batches = build(discrete, members_per_block=2)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = [batch.map(lambda tensor: tensor[order]) for batch in batches]
    before, after = derivatives(learner, state, batches), derivatives(learner, state, shuffled)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        updated(learner, state, agents, shuffled),
        updated(learner, state, agents, batches),
        rtol=0,
        atol=1e-9,
    )
    moved = learner.inner_update(state, agents, shuffled[0]).params
    for name, p in learner.inner_update(state, agents, batches[0]).params.items():
        torch.testing.assert_close(moved[name], p[order], rtol=0, atol=1e-12)


@POLICIES
def test_order_of_environments_changes_nothing(discrete):
    learner, state, _, batches = build(discrete)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [
        Trajectory(**{n: getattr(b, n).index_select(ax, order) for n, ax in ENV_AXIS.items()})
        for b in batches
    ]
    before, after = derivatives(learner, state, batches), derivatives(learner, state, shuffled)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-11)


@POLICIES
@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
def test_padding_changes_nothing(discrete, kind):
    learner, state, agents, batches = build(discrete, inner_loss=kind)
    longer = [pad(batch, 3) for batch in batches]
    assert longer[0].obs.shape[1] == batches[0].obs.shape[1] + 3
    before, after = derivatives(learner, state, batches), derivatives(learner, state, longer)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        updated(learner, state, agents, longer),
        updated(learner, state, agents, batches),
        rtol=0,
        atol=1e-9,
    )
    padded = learner.inner_update(state, agents, longer[0]).params
    for name, p in learner.inner_update(state, agents, batches[0]).params.items():
        torch.testing.assert_close(padded[name], p, rtol=0, atol=1e-12)


@POLICIES
def test_what_stands_in_padding_changes_nothing(discrete):
    learner, state, agents, batches = build(discrete)
    zeroed = []
    for batch in batches:
        valid = batch.valid > 0.0
        fields = {
            name: torch.where(valid.view(*valid.shape, *[1] * (tensor.dim() - 3)), tensor, 0)
            for name in ENV_AXIS
            if (tensor := getattr(batch, name)).shape[:3] == valid.shape and name != "last_obs"
        }
        zeroed.append(
            replace(batch, **{n: t.to(getattr(batch, n).dtype) for n, t in fields.items()})
        )
    assert not torch.equal(zeroed[0].reward, batches[0].reward)
    before, after = derivatives(learner, state, batches), derivatives(learner, state, zeroed)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(
        updated(learner, state, agents, zeroed),
        updated(learner, state, agents, batches),
        rtol=0,
        atol=1e-9,
    )


@POLICIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calls_change_no_input_and_repeat_bitwise(discrete, dtype):
    learner, state, agents, batches = build(discrete, dtype, learn_inner_lr=True)
    chunks = [batch.map(torch.clone) for batch in batches]
    params = {name: p.clone() for name, p in state["meta_params"].items()}
    acting = {name: p.clone() for name, p in agents.params.items()}

    adapted = [learner.inner_update(state, agents, batches[0]) for _ in range(2)]
    assert same_values(adapted[0].params, adapted[1].params)
    assert not same_values(adapted[0].params, acting)
    new = [learner.meta_update(state, [agents], batches) for _ in range(2)]
    assert same_values(new[0][0]["meta_params"], new[1][0]["meta_params"])
    assert new[0][1] == new[1][1]
    assert not same_values(new[0][0]["meta_params"], params)

    assert same_values(state["meta_params"], params)
    assert same_values(agents.params, acting)
    for batch, chunk in zip(batches, chunks, strict=True):
        for name in ENV_AXIS:
            assert torch.equal(getattr(batch, name), getattr(chunk, name)), name
    for result in (adapted[0].params, new[0][0]["meta_params"]):
        for name, p in result.items():
            assert not p.requires_grad, name
            assert p.dtype == dtype, name


@POLICIES
def test_order_of_parameters_changes_nothing(discrete):
    learner, state, agents, batches = build(discrete)
    turned = dict(reversed(state["meta_params"].items()))
    torch.testing.assert_close(
        updated(learner, {"meta_params": turned}, agents, batches),
        updated(learner, state, agents, batches),
        rtol=0,
        atol=1e-12,
    )


def test_joined_chunks_equal_the_whole():
    """Chunks of members are joined in order; the learner sees no seam."""
    learner, state, agents, batches = build(False)
    joined = [
        concatenate([b.members(0, 2), b.members(2, 3), b.members(3, 5)], "members") for b in batches
    ]
    assert torch.equal(
        updated(learner, state, agents, joined), updated(learner, state, agents, batches)
    )


@POLICIES
def test_exploration_term_needs_more_than_one_task(discrete):
    """R̄ is standardised over tasks: with a single task the term has no weight."""
    learner, state, _, batches = build(discrete, exploration=0.9)
    plain = build(discrete, exploration=0.0)[0]
    single = [batch.members(0, 1) for batch in batches]
    with_term = derivatives(learner, state, single)[0]
    torch.testing.assert_close(with_term, derivatives(plain, state, single)[0], rtol=0, atol=1e-14)
    distance = derivatives(learner, state, batches)[0] - derivatives(plain, state, batches)[0]
    assert distance.norm() > 1e-2


def test_another_window_gives_another_update():
    """The identities above compare something that the data moves."""
    learner, state, agents, batches = build(False)
    params, _ = learner.split(state["meta_params"])
    for phase in range(3):
        changed = list(batches)
        changed[phase] = make_trajectory(learner, params, NUM_MEMBERS, seed=777)
        distance = updated(learner, state, agents, changed) - updated(
            learner, state, agents, batches
        )
        assert distance.norm() > 1e-4, f"batch {phase} is not used"

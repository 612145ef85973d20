"""MAML-TRPO as the loop sees it: states, agents, updates, metrics and failures."""

import pytest
import torch

from learners.core.contract import Agents
from learners.core.errors import NonFiniteError
from learners.core.params import flatten, flatten_members, leaves
from learners.core.reduce import Alone
from tests.learners import reference
from tests.learners.builders import make_learner, make_state, make_window

POLICIES = pytest.mark.parametrize("discrete", [False, True], ids=["gaussian", "categorical"])


def bits(params: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in sorted(params.items())}


# --- Beginning ---


@POLICIES
@pytest.mark.parametrize("learned", [False, True])
def test_init_follows_the_configuration_and_the_generator(discrete, learned):
    learner = make_learner(discrete, learn_inner_lr=learned, init_std=0.5, inner_lr=0.25)
    state = learner.init([4, 9])
    again = learner.init([4])
    other = learner.init([5, 9])
    assert state.keys() == {"meta_params"}
    params, rates = learner.split(state["meta_params"])
    policy = {"layer0.weight": (2, 2), "layer0.bias": (2,)}
    policy |= {"layer1.weight": (2, 3), "layer1.bias": (3,)}
    if not discrete:
        policy |= {"layer1.weight": (2, 2), "layer1.bias": (2,), "log_std": (2,)}
        torch.testing.assert_close(params["log_std"].exp(), torch.full((2,), 0.5))
    assert {name: tuple(p.shape) for name, p in params.items()} == policy
    assert len(state["meta_params"]) == len(policy) * (1 + learned)
    assert rates.keys() == params.keys()
    for name, rate in rates.items():
        assert (rate == 0.25).all()
        assert rate.shape == (params[name].shape if learned else ())
    assert bits(state["meta_params"]) == bits(again["meta_params"])
    assert bits(state["meta_params"]) != bits(other["meta_params"])


@POLICIES
def test_begin_starts_every_member_anew_from_the_policy(discrete):
    learner = make_learner(discrete, learn_inner_lr=True)
    state = make_state(learner)
    renew, agents = learner.begin(state, 4)
    assert renew == [True] * 4
    assert agents.num_updates == 0
    assert agents.slots == {}
    assert set(agents.params) == {n for n in state["meta_params"] if not n.startswith("inner_lr.")}
    for name, p in agents.params.items():
        for member in p:
            assert torch.equal(member, state["meta_params"][name])


def test_counts_of_inner_updates():
    learner = make_learner(num_inner_updates=2)
    assert learner.num_inner_updates == 2
    assert learner.num_evaluation_updates == 4


# --- Inner updates ---


@pytest.mark.parametrize("learned", [False, True])
def test_evaluation_halves_the_step_after_the_first_update(learned):
    learner = make_learner(learn_inner_lr=learned)
    state = make_state(learner)
    agents, batches = make_window(learner, state)

    def step(num_updates: int, evaluating: bool) -> torch.Tensor:
        start = Agents(agents.params, {}, num_updates)
        new = learner.inner_update(state, start, batches[0], evaluating=evaluating)
        assert new.num_updates == num_updates + 1
        return flatten(new.params) - flatten(agents.params)

    whole = step(0, evaluating=False)
    assert whole.norm() > 1e-2
    assert torch.equal(step(0, evaluating=True), whole)
    assert torch.equal(step(1, evaluating=False), whole)
    for num_updates in (1, 3):
        half = step(num_updates, evaluating=True)
        torch.testing.assert_close(half, 0.5 * whole, rtol=0, atol=1e-15)


def test_fixed_rate_has_the_precision_of_the_parameters():
    learner = make_learner(inner_lr=0.1)
    _, rates = learner.split(make_state(learner)["meta_params"])
    assert float(rates["log_std"]) == 0.1


def test_window_s_first_agents_are_what_the_meta_update_adapts():
    """Recomputed inside meta_update, θ_K equals the one that acted."""
    learner = make_learner(num_inner_updates=2, learn_inner_lr=True)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    acted = agents
    for batch in batches[:-1]:
        acted = learner.inner_update(state, acted, batch)
    (block,) = learner.blocks(batches)
    for create_graph in (False, True):
        trace = learner.adapt(leaves(state["meta_params"]), block, create_graph=create_graph)
        assert len(trace) == 3
        for name, p in acted.params.items():
            torch.testing.assert_close(trace[-1][name].detach(), p, rtol=0, atol=1e-14)


def test_data_that_is_not_finite_is_named():
    learner = make_learner()
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    batches[0].reward[1, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="adapted/"):
        learner.inner_update(state, agents, batches[0])


# --- Meta-updates ---


@POLICIES
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_inner_updates": 2, "inner_loss": "dice"},
        {"learn_inner_lr": True, "inner_loss": "likelihood_ratio"},
        {"exploration": 0.5},
        {"first_order": True},
    ],
    ids=str,
)
def test_meta_update_lowers_the_outer_loss_inside_the_trust_region(discrete, settings):
    learner = make_learner(discrete, members_per_block=2, max_kl=0.02, **settings)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    new, metrics = learner.meta_update(state, [agents], batches)
    blocks = learner.blocks(batches)
    before = reference.objective(learner, state["meta_params"], blocks)
    after = reference.objective(learner, new["meta_params"], blocks)
    kl = mean_kl(learner, state["meta_params"], new["meta_params"], blocks)
    assert metrics["meta/step_accepted"] == 1.0
    assert after < before
    assert 0.2 * 0.02 < kl <= 0.02
    assert metrics["meta/loss_before"] == pytest.approx(float(before), rel=1e-10)
    assert metrics["meta/loss"] == pytest.approx(float(after), rel=1e-10)
    assert metrics["meta/kl"] == pytest.approx(kl, rel=1e-9)
    step = flatten(new["meta_params"]) - flatten(state["meta_params"])
    assert metrics["meta/step_norm"] == pytest.approx(float(step.norm()), rel=1e-9)
    assert 1 <= metrics["meta/line_search_tries"] <= 15
    assert all(isinstance(value, float) for value in metrics.values())


def mean_kl(learner, old, new, blocks) -> float:
    """Mean over members and query steps of KL(π_θK(old) ‖ π_θK(new))."""
    total = []
    for support, query, _ in reference.members_of(blocks):
        dists = [
            reference.distribution(
                learner, reference.adapt(learner, eta, support)[0][-1], query.obs
            )
            for eta in (old, new)
        ]
        kl = torch.distributions.kl_divergence(*dists).view(query.valid.shape)
        total.append(reference.mean(kl, query.valid))
    return float(torch.stack(total).mean())


def test_inner_metrics_describe_the_adaptation():
    learner = make_learner(num_inner_updates=1, members_per_block=3)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    _, metrics = learner.meta_update(state, [agents], batches)
    blocks = learner.blocks(batches)
    adapted = learner.inner_update(state, agents, batches[0])
    step = flatten_members(adapted.params) - flatten_members(agents.params)
    assert metrics["inner/step_norm"] == pytest.approx(float(step.norm(dim=1).mean()), rel=1e-9)
    losses, kls = [], []
    for support, query, _ in reference.members_of(blocks):
        trace, _ = reference.adapt(learner, state["meta_params"], support)
        log_prob = reference.log_probs(learner, trace[0], support[0])
        losses.append(reference.inner_loss("log_prob", log_prob, log_prob, support[0]))
        dists = [reference.distribution(learner, theta, query.obs) for theta in trace]
        kl = torch.distributions.kl_divergence(*dists).view(query.valid.shape)
        kls.append(reference.mean(kl, query.valid))
    assert metrics["inner/loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-9)
    assert metrics["inner/kl"] == pytest.approx(float(torch.stack(kls).mean()), rel=1e-9)


def test_inner_metrics_do_not_depend_on_members_per_block():
    found = []
    for members_per_block in (1, 3):
        learner = make_learner(members_per_block=members_per_block)
        state = make_state(learner)
        _, metrics = learner.meta_update(state, *make_window(learner, state))
        found.append({name: x for name, x in metrics.items() if name.startswith("inner/")})
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_task_without_an_ended_episode_gets_no_credit():
    learner = make_learner(exploration=0.5)
    state = make_state(learner)
    _, batches = make_window(learner, state)
    batches[-1].episode_return.sub_(50.0)
    batches[-1].terminated[1] = False
    batches[-1].truncated[1] = False
    (block,) = learner.blocks(batches)
    assert float(block.credit[1]) == 0.0


@POLICIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [{"max_kl": 5.0, "line_search_tries": 1}, {"max_kl": 5.0, "line_search_tries": 4}],
    ids=["one_try", "four_tries"],
)
def test_failed_line_search_leaves_the_state_bitwise(discrete, dtype, settings):
    """Steps far outside of where the surrogate means anything; shrunk hardly at all."""
    learner = make_learner(
        discrete, line_search_ratio=0.99, learn_inner_lr=True, inner_loss="dice", **settings
    )
    state = make_state(learner, seed=1, dtype=dtype)
    agents, batches = make_window(learner, state)
    new, metrics = learner.meta_update(state, [agents], batches)
    assert metrics["meta/step_accepted"] == 0.0
    assert metrics["meta/line_search_tries"] == settings["line_search_tries"]
    assert metrics["meta/kl"] == 0.0
    assert metrics["meta/step_norm"] == 0.0
    assert metrics["meta/grad_norm"] > 1e-3
    assert metrics["meta/loss"] == metrics["meta/loss_before"]
    assert bits(new["meta_params"]) == bits(state["meta_params"])
    assert {n: p.dtype for n, p in new["meta_params"].items()} == dict.fromkeys(
        state["meta_params"], dtype
    )


@POLICIES
def test_window_without_signal_leaves_the_state_bitwise(discrete):
    """All rewards 0: every advantage is 0, the gradient too, and no step is taken."""
    learner = make_learner(discrete)
    state = make_state(learner, dtype=torch.float32)
    agents, batches = make_window(learner, state)
    for batch in batches:
        batch.reward.zero_()
    new, metrics = learner.meta_update(state, [agents], batches)
    assert bits(new["meta_params"]) == bits(state["meta_params"])
    assert metrics["meta/step_accepted"] == 0.0
    assert metrics["meta/grad_norm"] == 0.0
    adapted = learner.inner_update(state, agents, batches[0])
    for name, p in adapted.params.items():
        torch.testing.assert_close(p, agents.params[name], rtol=0, atol=0)


def test_every_sum_over_members_goes_through_reduce():
    """Doubling every reduced sum doubles loss, gradient and divergence."""

    class Doubling(Alone):
        def sum(self, parts):
            return 2.0 * super().sum(parts)

    learner = make_learner(members_per_block=2)
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    _, plain = learner.meta_update(state, [agents], batches)
    _, doubled = learner.meta_update(state, [agents], batches, Doubling())
    for name in ("meta/loss_before", "meta/grad_norm"):
        assert doubled[name] == pytest.approx(2.0 * plain[name], rel=1e-12)


def test_outer_gradient_that_is_not_finite_is_named():
    """The data is finite, yet its ratio overflows."""
    learner = make_learner()
    state = make_state(learner)
    agents, batches = make_window(learner, state)
    batches[-1].log_prob[0, 0, 0] = -1e6
    with pytest.raises(NonFiniteError):
        learner.meta_update(state, [agents], batches)


# --- CUDA ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@POLICIES
def test_meta_update_on_cuda_equals_the_cpu(discrete):
    learner = make_learner(discrete, num_inner_updates=2, members_per_block=2, learn_inner_lr=True)
    state = make_state(learner, dtype=torch.float32)
    agents, batches = make_window(learner, state)
    new, metrics = learner.meta_update(state, [agents], batches)
    there = {"meta_params": {name: p.cuda() for name, p in state["meta_params"].items()}}
    moved, moved_metrics = learner.meta_update(
        there, learner.begin(there, 3)[1], [batch.to("cuda") for batch in batches]
    )
    assert metrics["meta/step_accepted"] == 1.0
    assert moved_metrics["meta/loss_before"] == pytest.approx(metrics["meta/loss_before"], abs=1e-5)
    for name, p in moved["meta_params"].items():
        assert p.is_cuda
        torch.testing.assert_close(p.cpu(), new["meta_params"][name], rtol=1e-5, atol=1e-5)

"""FRODO: its update direction, its gradients against finite differences, its windows."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from learners.config import FrodoConfig
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.optim import Adam, RMSProp, Sgd
from learners.core.params import detach, gradients, leaves
from learners.core.trajectory import Spec
from learners.frodo import Frodo, joined, saved_starts, saved_window
from tests.learners.core.test_actor_critic import (
    chain_probabilities,
    copied,
    make_state,
    make_stream,
    members,
    plain_outputs,
)

SETTINGS = {
    "hidden": (4, 3),
    "gamma": 0.9,
    "num_steps": 4,
    "lr": 0.3,
    "entropy_coef": 0.1,
    "target_width": 3,
    "num_inner_updates": 3,
    "max_grad_norm": 100.0,
}
TARGET = (0.2, 0.5, 0.3)


@dataclass(frozen=True)
class Whole(Frodo):
    """The same with an Adam that is differentiated whole."""

    @property
    def optimizer(self):
        return {"sgd": Sgd(), "rmsprop": RMSProp(eps=1e-3), "adam": WHOLE_ADAM}[
            self.config.inner_optimizer
        ]


WHOLE_ADAM = Adam(eps=1e-3, stop_second_moment=False)


def make_learner(form: str = "discrete", kind: type[Frodo] = Frodo, **settings) -> Frodo:
    """Forms: discrete or gaussian control, or prediction."""
    spec = Spec(
        3,
        2 if form == "gaussian" else 3,
        form != "gaussian",
        horizon=100,
        target_policy=TARGET if form == "prediction" else None,
    )
    return kind(FrodoConfig(**SETTINGS | settings), spec)


def window_of(learner: Frodo, num_members: int = 1):
    """A state in the middle of its life, a window of K batches, and the query batch."""
    state = make_state(learner, num_members)
    for name in ("critic",):
        if name in state:
            state[name] = {n: p.double() for n, p in state[name].items()}
    batches = [
        learner.prepared(make_stream(learner, state, seed=k), state)
        for k in range(learner.config.num_inner_updates + 1)
    ]
    return state, batches[:-1], batches[-1]


def unrolled(learner, state, meta_params, window):
    """θ_K of a window that begins with the state's own agent."""
    start = (state["params"], state["optimizer"])
    return learner.unroll(state, meta_params, start, window, len(window))


def outer(learner, state, meta_params, window, query, held):
    """The outer loss [M] as a function of η, targets and advantages held."""
    view = learner.view(unrolled(learner, state, meta_params, window), query)
    return learner.outer_loss(view, *held)


def assert_slopes(function, meta_params, grads, tolerance=5e-6, eps=1e-5):
    """Differences of fourth order of `function` along a random direction of each entry of η."""
    for number, (name, p) in enumerate(meta_params.items()):
        generator = torch.Generator().manual_seed(number)
        along = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        near, far = (
            sum(
                sign * float(function(meta_params | {name: p + sign * step * along}).detach().sum())
                for sign in (1.0, -1.0)
            )
            for step in (eps, 2.0 * eps)
        )
        slope = float((grads[name] * along).sum())
        expected = (8.0 * near - far) / (12.0 * eps)
        assert slope == pytest.approx(expected, rel=tolerance, abs=1e-8)
        assert slope != 0.0


@pytest.mark.parametrize("num_inner_updates", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam"])
@pytest.mark.parametrize("form", ["discrete", "gaussian", "prediction"])
def test_meta_gradient_equals_finite_differences(form, optimizer, num_inner_updates):
    settings = {"num_inner_updates": num_inner_updates, "inner_optimizer": optimizer}
    settings["max_grad_norm"] = 0.05 if optimizer == "sgd" else 100.0
    settings["lr"] = 0.03 if form == "gaussian" else 0.3
    learner = make_learner(form, Whole, **settings)
    state, window, query = window_of(learner)
    meta_params = leaves(state["meta_params"])
    adapted = unrolled(learner, state, meta_params, window)
    view = learner.view(adapted, query)
    held = learner.outer_targets(view, state, query)
    grads = gradients(learner.outer_loss(view, *held).sum(), meta_params)
    assert_slopes(
        lambda eta: outer(learner, state, eta, window, query, held), detach(meta_params), grads
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"residual": True},
        {"residual": True, "residual_gain": True},
        {"outer_critic": False},
        {"outer_entropy_coef": 0.2},
    ],
)
def test_meta_gradient_of_the_options_equals_finite_differences(settings):
    learner = make_learner("discrete", Whole, inner_optimizer="rmsprop", **settings)
    state, window, query = window_of(learner)
    meta_params = leaves(state["meta_params"])
    adapted = unrolled(learner, state, meta_params, window)
    view = learner.view(adapted, query)
    held = learner.outer_targets(view, state, query)
    grads = gradients(learner.outer_loss(view, *held).sum(), meta_params)
    assert_slopes(
        lambda eta: outer(learner, state, eta, window, query, held), detach(meta_params), grads
    )


@pytest.mark.parametrize("form", ["discrete", "prediction"])
def test_gradient_of_the_consistency_equals_finite_differences(form):
    learner = make_learner(form)
    state, _, query = window_of(learner)
    meta_params = leaves(state["meta_params"])
    view = learner.view(leaves(state["params"]), query)
    grads = gradients(learner.consistency(meta_params, view, query).sum(), meta_params)
    view = learner.view(state["params"], query)
    held = learner.target(detach(meta_params), view, query)

    def loss(eta):
        target, total, count = learner.target(eta, view, query), 0.0, 0
        for t in range(learner.config.num_steps):
            for e in range(query.reward.shape[2]):
                if query.terminated[0, t, e]:
                    aim = query.reward[0, t, e]
                elif query.truncated[0, t, e] or t == learner.config.num_steps - 1:
                    continue
                else:
                    aim = query.reward[0, t, e] + 0.9 * held[0, t + 1, e]
                total, count = total + (target[0, t, e] - aim) ** 2, count + 1
        assert count > 2
        return total / count

    torch.testing.assert_close(
        learner.consistency(meta_params, view, query).detach()[0], loss(state["meta_params"])
    )
    assert_slopes(loss, detach(meta_params), grads)


@pytest.mark.parametrize("form", ["discrete", "gaussian", "prediction"])
def test_the_update_direction_takes_the_target_as_a_constant(form):
    """Against a plain loss of one member, layer by layer, with the target detached."""
    learner = make_learner(form)
    state, window, _ = window_of(learner)
    batch, params = window[0], leaves(state["params"])
    view = learner.view(params, batch)
    target = learner.target(state["meta_params"], view, batch)
    found = learner.direction(params, view, target, create_graph=False)
    own = {n: p[0].detach().requires_grad_() for n, p in params.items()}
    dist, value = plain_outputs(learner, own, batch.obs[0].flatten(0, 1))
    goal = target.detach().flatten()
    loss = 0.5 * (goal - value).square().mean()
    if form != "prediction":
        credit = (goal - value).detach() * dist.log_prob(batch.action[0].flatten(0, 1))
        loss = 0.5 * loss - (credit + 0.1 * dist.entropy()).mean()
    for name, expected in gradients(loss, own).items():
        torch.testing.assert_close(found[name][0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["discrete", "prediction"])
def test_target_sees_the_values_of_the_agent_and_the_end_of_episodes(form):
    learner = make_learner(form, num_steps=12)
    state, window, _ = window_of(learner)
    batch = window[0]
    assert bool(batch.terminated.any())
    assert bool(batch.truncated.any())
    view = learner.view(state["params"], batch)
    own = {n: p[0] for n, p in state["params"].items()}
    for t in range(12):
        for e in range(2):
            following = batch.last_obs[0, e] if t == 11 else batch.obs[0, t + 1, e]
            if batch.truncated[0, t, e]:
                following = batch.final_obs[0, t, e]
            dist, values = plain_outputs(learner, own, torch.stack([batch.obs[0, t, e], following]))
            expected = 0.0 if batch.terminated[0, t, e] else float(values[1])
            assert float(view.next_value[0, t, e]) == pytest.approx(expected)
            assert float(view.value[0, t, e]) == pytest.approx(float(values[0]))
            action = int(batch.action[0, t, e])
            prob = TARGET[action] if form == "prediction" else float(dist.probs[0, action])
            assert float(view.log_prob[0, t, e].exp()) == pytest.approx(prob)


def live(learner, state, num_batches: int, seed: int = 0):
    """States after each of some batches."""
    states = [state]
    for k in range(num_batches):
        batch = make_stream(learner, states[-1], seed=seed + k)
        num_members = len(batch.reward)
        agents = learner.begin(states[-1], num_members)[1]
        states.append(learner.meta_update(states[-1], agents, [batch])[0])
    return states


@pytest.mark.parametrize("inner_optimizer", ["sgd", "rmsprop", "adam"])
def test_eta_moves_after_k_batches_and_one_and_the_unrolled_agent_is_the_one_that_acted(
    inner_optimizer,
):
    learner = make_learner(inner_optimizer=inner_optimizer, max_grad_norm=0.1)
    states = live(learner, window_of(learner)[0], 8)
    moved = [
        any(not torch.equal(p, old["meta_params"][n]) for n, p in new["meta_params"].items())
        for old, new in pairwise(states)
    ]
    assert moved == [False, False, False, True, False, False, True, False]
    sizes = [len(saved_window(state["window"])) for state in states]
    assert sizes == [0, 1, 2, 3, 1, 2, 3, 1, 2]
    closed, opened = states[3], states[4]
    window, start = saved_window(closed["window"]), saved_starts(closed["starts"])[0]
    adapted = learner.unroll(closed, closed["meta_params"], start, window, len(window))
    for name, p in adapted.items():
        torch.testing.assert_close(p.detach(), closed["params"][name], rtol=1e-12, atol=1e-14)
        assert torch.equal(opened["starts"][f"0.params.{name}"], closed["params"][name])
    for name, p in closed["optimizer"].items():
        assert torch.equal(opened["starts"][f"0.optimizer.{name}"], p)


def test_the_outer_loss_waits_for_later_rewards_and_windows_overlap():
    """K = 2 and Q = 3: windows begin every second batch, η moves four batches after that."""
    learner = make_learner("prediction", num_inner_updates=2, num_outcome_batches=3)
    states = live(learner, window_of(learner)[0], 9)
    moved = [
        any(not torch.equal(p, old["meta_params"][n]) for n, p in new["meta_params"].items())
        for old, new in pairwise(states)
    ]
    assert moved == [False, False, False, False, True, False, True, False, True]
    for later, first in ((4, 0), (6, 2), (8, 4)):
        params, _ = saved_starts(states[later]["starts"])[0]
        for name, p in params.items():
            assert torch.equal(p, states[first]["params"][name])


@pytest.mark.parametrize("form", ["prediction", "discrete"])
def test_later_rewards_change_what_values_are_held_against(form):
    """A given policy is rated on all that is waited for, one that is learned on τ_K alone."""
    learner = make_learner(form, num_outcome_batches=2, outer_critic=False)
    state, _, query = window_of(learner)
    later = learner.prepared(make_stream(learner, state, seed=9), state)
    both = joined([query, later])
    assert both.reward.shape[1] == 2 * query.reward.shape[1]
    view = learner.view(state["params"], both)
    target, advantage = learner.outer_targets(view, state, both)
    loss = learner.outer_loss(view, target, advantage)
    own = query.reward.shape[1]
    expected = 0.5 * (view.value - target).square().mean((1, 2))
    if form == "discrete":
        c = learner.config
        expected = c.outer_value_coef * 0.5 * (view.value - target)[:, :own].square().mean((1, 2))
        expected -= (advantage * view.log_prob)[:, :own].mean((1, 2))
        expected -= c.outer_entropy_coef * view.entropy
    torch.testing.assert_close(loss, expected)
    alone = learner.view(state["params"], query)
    short, _ = learner.outer_targets(alone, state, query)
    assert not torch.allclose(short, target[:, :own])
    richer = type(later)(**vars(later) | {"reward": later.reward + 1.0})
    more, _ = learner.outer_targets(view, state, joined([query, richer]))
    assert not torch.allclose(more[:, :own], target[:, :own])


def test_without_its_own_critic_the_agent_rates_itself():
    learner = make_learner(outer_critic=False)
    state, window, query = window_of(learner)
    assert not any(group.startswith("critic") for group in state)
    adapted = unrolled(learner, state, state["meta_params"], window)
    view = learner.view(adapted, query)
    expected = learner.vtrace(view, query)
    for found, own in zip(learner.outer_targets(view, state, query), expected, strict=True):
        torch.testing.assert_close(found, own.detach())


def test_the_critic_learns_from_its_own_values_alone():
    """The same step whatever the target network says, and towards V-trace's target."""
    learner = make_learner(critic_lr=0.01)
    state = window_of(learner, 2)[0]
    batch = learner.prepared(make_stream(learner, state), state)
    once = learner.critic_update(state, batch)
    other = state | {"meta_params": {n: p + 1.0 for n, p in state["meta_params"].items()}}
    again = learner.critic_update(other, batch)

    def distance(critic):
        with torch.no_grad():
            rated = learner.rated(learner.view(state["params"], batch), state["critic"], batch)
            moved = learner.rated(learner.view(state["params"], batch), critic, batch)
            return (moved.value - learner.vtrace(rated, batch)[0]).square().mean((1, 2))

    for name, p in once["critic"].items():
        assert torch.equal(p, again["critic"][name])
    assert (distance(once["critic"]) < distance(state["critic"])).all()


def test_replicas_are_independent():
    learner = make_learner(normalize_obs=True, max_grad_norm=0.1)
    state = window_of(learner, 3)[0]
    together = live(learner, state, 4)[-1]
    for m in range(3):
        own = members(state, slice(m, m + 1), 3)
        for k in range(4):
            whole = live(learner, state, k + 1)[k]
            batch = make_stream(learner, whole, seed=k).members(m, m + 1)
            own, _ = learner.meta_update(own, [learner.begin(own, 1)[1]], [batch])
        for group in ("params", "meta_params", "critic", "optimizer", "meta_optimizer"):
            for name, p in members(together, slice(m, m + 1), 3)[group].items():
                torch.testing.assert_close(own[group][name], p, rtol=1e-8, atol=1e-11)


def test_update_is_a_function():
    """The same twice, bit for bit, with inputs unchanged."""
    learner = make_learner()
    state = live(learner, window_of(learner, 2)[0], 3)[-1]
    batch = make_stream(learner, state)
    before = copied(state), batch.map(torch.clone)
    agents = learner.begin(state, 2)[1]
    (first, metrics), (second, again) = (
        learner.meta_update(state, [agents], [batch]) for _ in range(2)
    )
    assert metrics == again
    assert {"meta/loss", "frodo/target_minus_vtrace", "frodo/consistency_loss"} <= set(metrics)
    for group, entries in first.items():
        for name, p in entries.items():
            assert torch.equal(p, second[group][name])
            assert not p.requires_grad
    for group, entries in before[0].items():
        for name, p in entries.items():
            assert torch.equal(state[group][name], p)
    for name, tensor in vars(batch).items():
        assert torch.equal(tensor, getattr(before[1], name))


def test_a_learner_that_predicts_never_learns_to_act_and_reports_its_error():
    learner = make_learner("prediction")
    state = learner.init([1, 2])
    acting = learner.begin(state, 2)[1].params
    dist = learner.policy.distribution(acting, torch.randn(2, 5, 3))
    torch.testing.assert_close(dist.logits.exp(), torch.full((2, 5, 3), 1 / 3))
    batch = make_stream(learner, {"params": {n: p.double() for n, p in state["params"].items()}})
    batch = batch.map(lambda x: x.float() if x.is_floating_point() else x)
    known = type(batch)(**vars(batch) | {"true_value": torch.full_like(batch.reward, 2.0)})
    value = learner.view(state["params"], batch).value
    for _ in range(learner.config.num_inner_updates + 1):
        before = state
        state, metrics = learner.meta_update(state, None, [known])
        value = learner.view(before["params"], batch).value
        assert metrics["rollout/value_error"] == pytest.approx(float((value - 2).square().mean()))
        own = float((value[1] - 2).square().mean())
        assert metrics["replica/value_error_1"] == pytest.approx(own)
    for name, p in learner.begin(state, 2)[1].params.items():
        assert torch.equal(p, acting[name])


def test_a_gain_scales_how_far_the_canonical_target_lies_from_the_value():
    learner = make_learner(residual=True, residual_gain=True)
    state, window, _ = window_of(learner)
    view = learner.view(state["params"], window[0])
    canonical, _ = learner.vtrace(view, window[0])
    output = learner.network(state["meta_params"], learner.inputs(view, window[0]), window[0].ended)
    target = learner.target(state["meta_params"], view, window[0])
    gain = (4.0 * (output / 4.0).tanh()).exp()
    torch.testing.assert_close(target - view.value, gain * (canonical - view.value))
    loud = {n: p + 100.0 * ("head.layer0.bias" in n) for n, p in state["meta_params"].items()}
    most = learner.target(loud, view, window[0])
    torch.testing.assert_close(most - view.value, math.exp(4.0) * (canonical - view.value))


def test_a_gain_without_a_canonical_target_is_refused():
    with pytest.raises(ConfigError, match="residual_gain needs residual"):
        FrodoConfig(residual_gain=True)


@pytest.mark.parametrize("residual", [True, False])
def test_the_chain_is_learned(residual):
    settings = {
        "num_steps": 8,
        "hidden": (16,),
        "lr": 0.02,
        "entropy_coef": 0.0,
        "residual": residual,
        "target_width": 16,
        "meta_lr": 3e-3,
        "critic_lr": 1e-2,
        "max_grad_norm": 0.5,
    }
    learner = Frodo(FrodoConfig(**SETTINGS | settings), Spec(3, 2, discrete=True, horizon=100))
    before, after = chain_probabilities(learner, 120 if residual else 400)
    assert ((before - 0.5).abs() < 0.05).all()
    assert (after > 0.9).all()


@pytest.mark.parametrize("residual", [True, False])
def test_description_holds_the_first_replica_s_targets_and_their_slopes(residual):
    learner = make_learner(residual=residual, normalize_obs=True)
    state = live(learner, window_of(learner, 2)[0], 2)[-1]
    raw = make_stream(learner, state)
    found = learner.describe(state, raw)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "target": (8,),
        "vtrace": (8,),
        "sensitivity": (6,),
    }
    batch = learner.prepared(raw, state)
    view = learner.view(state["params"], batch)
    target = learner.target(state["meta_params"], view, batch)
    torch.testing.assert_close(found["target"], target[0].flatten().detach())
    torch.testing.assert_close(
        found["vtrace"], learner.vtrace(view, batch)[0][0].flatten().detach()
    )
    inputs, eps = learner.inputs(view, batch).detach(), 1e-6
    for number in range(6):
        slopes = []
        for t, e in ((t, e) for t in range(4) for e in range(2)):
            sums = []
            for sign in (1.0, -1.0):
                moved = inputs.clone()
                moved[0, t, e, number] += sign * eps
                over = (batch.terminated | batch.truncated).double()
                sums.append(float(learner.network(state["meta_params"], moved, over)[0].sum()))
            slopes.append(abs(sums[0] - sums[1]) / (2 * eps))
        assert float(found["sensitivity"][number]) == pytest.approx(sum(slopes) / 8, rel=1e-4)


def test_a_reward_of_nan_is_refused():
    learner = make_learner()
    state = window_of(learner)[0]
    batch = make_stream(learner, state)
    batch.reward[0, 2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="critic/"):
        learner.meta_update(state, None, [batch])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inner_updates", 0),
        ("target_width", 2.5),
        ("meta_lr", 0.0),
        ("critic_lr", float("nan")),
        ("max_rho", -1.0),
        ("consistency_coef", -0.1),
        ("outer_value_coef", float("inf")),
        ("inner_optimizer", "lion"),
    ],
)
def test_unusable_setting_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} "):
        FrodoConfig(**{name: value})

"""LPG: its update against autograd, its meta-gradient against differences, its critics."""

from dataclasses import replace

import pytest
import torch

from learners.config import LpgConfig
from learners.core import population
from learners.core.errors import ConfigError
from learners.core.lifetime_description import DISCOUNTS, explained
from learners.core.optim import Adam
from learners.core.params import flatten, gradients, leaves, unflatten
from learners.core.population import CriticRates, Rates, Target, experience
from learners.core.trajectory import World
from learners.lpg import smoothly_normalised
from tests.learners.lifetimes import DENSE, TABLE, make_batch, make_learner, make_state, make_window

PIXELS = World("pixels", num_indices=3, num_features=12, tabular=False, grid=(2, 3))
WORLDS = {"table": (TABLE,), "dense": (DENSE,), "conv": (PIXELS,)}


def windows_of(learner, state, trace, batches):
    return learner.windows(state, trace, batches)[1]


def total_loss(learner, meta_params, windows):
    return sum(learner.loss(meta_params, window)[0].sum() for window in windows)


def first_block(learner, state, seed=0):
    """Members of the first world, their parameters, and a batch of theirs."""
    agents = learner.begin(state, 4)[1]
    block = learner.policy.blocks(4, 4)[0]
    batch = make_batch(learner, agents, seed=seed).members(*block.members)
    return block, leaves(block.of(agents.params)), batch


@pytest.mark.parametrize("world", ["table", "dense", "conv"])
def test_the_update_is_the_gradient_of_its_objective(world):
    learner = make_learner(WORLDS[world], channels=2)
    block, params, batch = first_block(learner, make_state(learner))
    shape = batch.reward.shape
    generator = torch.Generator().manual_seed(3)
    pi_hat = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_y_hat = torch.randn(*shape, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    alpha_y = torch.tensor([0.3, 0.7, 1.1, 0.2], dtype=torch.float64)
    rates = Rates(torch.ones(4), alpha_y, 1.0, entropy_coef=0.3)
    heads = block.agent.heads(params, batch.obs.flatten(1, 2))
    found = block.agent.direction(
        params, heads, batch, Target(pi_hat, log_y_hat), rates, create_graph=True
    )
    log_prob = heads.policy.log_prob(batch.action.flatten(1, 2))
    kl = (heads.log_y.exp() * (heads.log_y - log_y_hat.flatten(1, 2))).sum(-1)
    objective = (pi_hat.flatten(1, 2) * log_prob).mean(1) - alpha_y * kl.mean(1)
    objective = objective + 0.3 * heads.policy.entropy().mean(1)
    for name, slope in gradients(-objective.sum(), params).items():
        torch.testing.assert_close(found[name], slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", ["table", "dense", "conv"])
def test_with_advantages_for_pi_hat_and_y_for_y_hat_it_is_plain_actor_critic(world):
    learner = make_learner(WORLDS[world], channels=2)
    state = make_state(learner)
    block, params, batch = first_block(learner, state)
    advantage, _ = block.agent.advantages(block.of(state["critic"]), batch, 0.9, 0.8)
    heads = block.agent.heads(params, batch.obs.flatten(1, 2))
    target = Target(advantage, heads.log_y.detach().view(*batch.reward.shape, -1))
    rates = Rates(torch.ones(4), torch.ones(4), 1.0)
    found = block.agent.direction(params, heads, batch, target, rates, create_graph=True)
    log_prob = heads.policy.log_prob(batch.action.flatten(1, 2))
    loss = -(advantage.flatten(1, 2) * log_prob).mean(1).sum()
    for name, slope in gradients(loss, params).items():
        assert float((found[name] - slope).detach().abs().max()) < 1e-10
        assert float(slope.abs().max()) > 0.0


def test_the_prediction_moves_towards_its_target():
    learner = make_learner(WORLDS["table"])
    block, params, batch = first_block(learner, make_state(learner))
    wanted = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64).log()
    target = Target(torch.zeros_like(batch.reward), wanted.expand(*batch.reward.shape, 4))
    rates = Rates(0.5 * torch.ones(4), torch.ones(4), 100.0)
    for _ in range(2000):
        params, _ = block.agent.step(params, {}, batch, target, rates, create_graph=True)
    y = block.agent.heads(params, batch.obs.flatten(1, 2)).log_y.exp()
    torch.testing.assert_close(y, wanted.exp().expand_as(y), rtol=0.0, atol=1e-3)


BEYOND = {"outer_every_update": True, "imitation_coef": 0.7, "entropy_coef": 0.3}


@pytest.mark.parametrize(
    ("num_updates", "max_grad_norm", "settings"),
    [(k, norm, {}) for k in (1, 2, 5) for norm in (100.0, 0.05)] + [(3, 0.05, BEYOND)],
)
@pytest.mark.parametrize("world", ["table", "dense", "conv"])
def test_the_meta_gradient_is_that_of_finite_differences(
    world, num_updates, max_grad_norm, settings, monkeypatch
):
    """The clip is active at 0.05. Adam is differentiated whole, from a second moment off zero."""
    learner = make_learner(
        WORLDS[world],
        num_inner_updates=num_updates,
        max_grad_norm=max_grad_norm,
        sees_lifetime=True,
        channels=2 if world == "conv" else 0,
        **settings,
    )
    if world != "table":
        monkeypatch.setattr(population, "AGENT_ADAM", Adam(eps=1e-2, stop_second_moment=False))
    state = make_state(learner)
    for name, slot in state["optimizer"].items():
        state["optimizer"][name] = slot + 1 if ".m." not in name else slot
    windows = windows_of(learner, state, *make_window(learner, state))
    meta_params = leaves(state["meta_params"])
    found = flatten(gradients(total_loss(learner, meta_params, windows), meta_params))
    vector, step = flatten(state["meta_params"]), 1e-5
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(vector), generator=generator)[:40]
    for index in chosen.tolist():
        ends = []
        for sign in (1.0, -1.0):
            moved = vector.clone()
            moved[index] += sign * step
            moved = unflatten(moved, state["meta_params"])
            ends.append(float(total_loss(learner, moved, windows).detach()))
        assert found[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)


def test_the_outer_loss_is_of_the_last_batch_or_of_every_one_after_an_update():
    for every, counted in ((False, [2]), (True, [1, 2])):
        learner = make_learner(
            (TABLE,), num_inner_updates=2, members_per_block=4, outer_every_update=every
        )
        state = make_state(learner)
        trace, batches = make_window(learner, state)
        (window,) = windows_of(learner, state, trace, batches)
        block = window.block
        expected = torch.zeros(4, dtype=torch.float64)
        for k in counted:
            data = batches[k].members(*block.members)
            critic = block.of(state["critic"])
            advantage = block.agent.advantages(
                critic, data, learner.config.gamma, learner.config.gae_lambda
            )[0].flatten(1)
            normal = (advantage - advantage.mean(1, keepdim=True)) / advantage.std(
                1, correction=0, keepdim=True
            )
            heads = block.agent.heads(block.of(trace[k].params), data.obs.flatten(1, 2))
            log_prob = heads.policy.log_prob(data.action.flatten(1, 2))
            expected -= (normal * log_prob).mean(1) / len(counted)
        zero = ("policy_entropy_coef", "y_entropy_coef", "pi_hat_coef", "y_hat_coef")
        alone = replace(learner, config=replace(learner.config, **dict.fromkeys(zero, 0.0)))
        found, _ = alone.loss(state["meta_params"], window)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_imitation_adds_what_the_rule_misses_of_the_advantage():
    learner = make_learner((TABLE,), num_inner_updates=1, members_per_block=4)
    state = make_state(learner)
    trace, batches = make_window(learner, state)
    taught = replace(learner, config=replace(learner.config, imitation_coef=2.0))
    (window,) = windows_of(taught, state, trace, batches)
    plain, more = (who.loss(state["meta_params"], window)[0] for who in (learner, taught))
    block, data = window.block, window.batches[0]
    seen = learner.seen(trace[0], block, block.of(trace[0].params), data)
    pi_hat = learner.rule.target(state["meta_params"], seen, data).pi_hat
    advantage = block.agent.advantages(
        block.of(state["critic"]), data, learner.config.gamma, learner.config.gae_lambda
    )[0]
    missed = (pi_hat - advantage).square().mean((1, 2))
    torch.testing.assert_close(more - plain, 2.0 * missed, rtol=1e-9, atol=1e-12)
    assert float(missed.min()) > 0.0


def test_every_part_of_the_rule_has_gradient_through_the_agents_alone():
    """Without the terms that look at π̂, ŷ and y: ŷ matters by what later updates see of y."""
    learner = make_learner(
        (TABLE,), pi_hat_coef=0.0, y_hat_coef=0.0, policy_entropy_coef=0.0, y_entropy_coef=0.0
    )
    state = make_state(learner)
    windows = windows_of(learner, state, *make_window(learner, state))
    meta_params = leaves(state["meta_params"])
    for name, slope in gradients(total_loss(learner, meta_params, windows), meta_params).items():
        assert float(slope.abs().max()) > 1e-12, name


@pytest.mark.parametrize("settings", [{}, {"ema_advantage": True}, BEYOND])
def test_a_window_in_chunks_is_the_window_whole(settings):
    updated = []
    for size in (4, 1):
        learner = make_learner(members_per_block=size, **settings)
        state = make_state(learner)
        updated.append(learner.meta_update(state, *make_window(learner, state))[0])
    whole, chunked = updated
    for group, entries in whole.items():
        for name, p in entries.items():
            torch.testing.assert_close(chunked[group][name], p, rtol=1e-10, atol=1e-12)


def test_the_agents_go_on_as_they_acted_and_the_critics_learn():
    learner = make_learner()
    state = make_state(learner)
    trace, batches = make_window(learner, state)
    updated, metrics = learner.meta_update(state, trace, batches)
    for name, p in trace[-1].params.items():
        torch.testing.assert_close(updated["params"][name], p, rtol=0.0, atol=0.0)
    assert updated["lifetimes"]["age"].tolist() == (state["lifetimes"]["age"] + 3).tolist()
    for name, p in updated["critic"].items():
        assert not torch.equal(p, state["critic"][name]), name
    for name, p in updated["meta_params"].items():
        assert not torch.equal(p, state["meta_params"][name]), name
    assert all(torch.tensor(list(metrics.values())).isfinite())


def test_recomputing_a_window_ends_with_the_agents_that_acted():
    learner = make_learner()
    state = make_state(learner)
    trace, batches = make_window(learner, state)
    for window in windows_of(learner, state, trace, batches):
        agent, params, slots = window.block.agent, leaves(window.params), window.slots
        for k, batch in enumerate(window.batches[:-1]):
            seen = experience(agent, params, batch, window.age + k, window.length)
            target = learner.rule.target(state["meta_params"], seen, batch)
            params, slots = agent.step(
                params, slots, batch, target, window.rates, create_graph=True
            )
        for name, p in window.block.of(trace[-1].params).items():
            torch.testing.assert_close(params[name].detach(), p, rtol=1e-10, atol=1e-12)


def test_a_tabular_critic_moves_a_state_part_of_the_way_however_rare_it_is():
    learner = make_learner(WORLDS["table"], critic_rate=0.25)
    state = make_state(learner)
    block, _, batch = first_block(learner, state)
    obs = torch.ones_like(batch.obs)
    obs[:, 0, 0, 1] = 3
    batch, returns = replace(batch, obs=obs), 2.0 + torch.zeros_like(batch.reward)
    critic = block.of(state["critic"])
    moved, _ = block.agent.critic_step(critic, {}, batch, returns, CriticRates(0.25, 1.0))
    before, after = critic["layer0.weight"][..., 0], moved["layer0.weight"][..., 0]
    for index in (1, 3):
        expected = before[:, index] + 0.25 * (2.0 - before[:, index])
        torch.testing.assert_close(after[:, index], expected)
    torch.testing.assert_close(after[:, [0, 2, 4]], before[:, [0, 2, 4]], rtol=0.0, atol=0.0)


def test_an_absent_action_has_no_probability_and_no_gradient():
    learner = make_learner(WORLDS["table"])
    block, params, batch = first_block(learner, make_state(learner))
    heads = block.agent.heads(params, batch.obs.flatten(1, 2))
    assert float(heads.log_policy.detach().exp()[0, :, 2].max()) == 0.0
    assert bool(heads.policy.entropy().isfinite().all())
    slopes = gradients(heads.policy.entropy().sum(), params)["layer0.weight"]
    assert bool(slopes.isfinite().all())
    assert float(slopes[0, :, 2].abs().max()) == 0.0
    assert float(slopes[1, :, 2].abs().max()) > 0.0


def test_lifetimes_that_are_over_make_way_for_others():
    learner = make_learner(tabular_updates=6, network_updates=9)
    state = make_state(learner)
    state["lifetimes"]["age"] = torch.tensor([0, 3, 0, 6])
    updated, metrics = learner.meta_update(state, *make_window(learner, state))
    assert metrics["lpg/lifetimes_ended"] == 2.0
    renew, agents = learner.begin(updated, 4)
    assert renew == [False, True, False, True]
    assert updated["lifetimes"]["age"].tolist() == [3, 0, 3, 0]
    assert updated["bandit"]["lives"].sum(1).tolist() == [1, 1]
    table = agents.params["world0.layer0.weight"]
    assert float(table[1].abs().max()) < 0.1 < float(table[0].abs().max())
    assert updated["optimizer"]["world1.t"].tolist() == [3, 0]
    assert float(updated["critic"]["world0.layer0.weight"][1].abs().max()) < 0.1


def test_first_lifetimes_end_one_after_the_other():
    state = make_learner((TABLE,), tabular_updates=100).init(range(4))
    assert state["lifetimes"]["age"].tolist() == [0, 25, 50, 75]


def test_the_bandit_prefers_step_sizes_that_ended_well():
    learner = make_learner((TABLE,), alpha_ys=(0.5,))
    state = learner.init(range(400))
    assert 100 < int((state["lifetimes"]["arm"] == 0).sum()) < 300
    bandit = {
        "returns": torch.tensor([[[1.0] + [0.0] * 9, [0.5] + [0.0] * 9]]),
        "lives": torch.tensor([[1, 1]]),
    }
    born = learner.lifetimes.born(state["counters"], bandit)
    assert int((born["lifetimes"]["arm"] == 0).sum()) > 380
    assert set(born["lifetimes"]["lr"][born["lifetimes"]["arm"] == 0].tolist()) == {0.5}


def test_one_adam_for_each_lifetime_takes_steps_of_one_size():
    """After the first step every entry of η has moved by β, whatever the gradients' sizes."""
    learner = make_learner(adam_per_lifetime=True, members_per_block=1, meta_lr=0.01)
    state = make_state(learner)
    state["meta_optimizer"] = {
        n: p.double() if p.is_floating_point() else p for n, p in state["meta_optimizer"].items()
    }
    updated, _ = learner.meta_update(state, *make_window(learner, state))
    assert len(updated["meta_optimizer"]["t"]) == 4
    moved = flatten(updated["meta_params"]) - flatten(state["meta_params"])
    assert float(moved.abs().max()) <= 0.01 + 1e-9
    with pytest.raises(ConfigError, match="members_per_block"):
        LpgConfig(adam_per_lifetime=True)


def test_the_meta_step_size_falls_to_nothing():
    constant = make_learner(meta_lr=0.01)
    falling = make_learner(meta_lr=0.01, meta_lr_decay_updates=2)
    state = make_state(constant)
    trace, batches = make_window(constant, state)

    def moved(learner, num_updates):
        """How far η goes after so many updates, of which only the optimizer knows."""
        slots = state["meta_optimizer"]
        aged = state | {"meta_optimizer": slots | {"t": slots["t"] + num_updates}}
        new = learner.meta_update(aged, trace, batches)[0]["meta_params"]
        return torch.cat([(new[n] - p).flatten() for n, p in state["meta_params"].items()])

    assert torch.equal(moved(falling, 0), moved(constant, 0))
    torch.testing.assert_close(moved(falling, 1), 0.5 * moved(constant, 1), rtol=1e-4, atol=1e-8)
    assert not moved(falling, 2).any()
    with pytest.raises(ConfigError, match="meta_lr_decay_updates"):
        LpgConfig(meta_lr_decay_updates=-1)


def test_moments_over_time_normalise_as_their_batch_does_at_first():
    advantage = torch.randn(3, 2, 5, 4, dtype=torch.float64) * 7.0 + 2.0
    zeros = torch.zeros(3, dtype=torch.float64)
    normal, moments = smoothly_normalised(
        advantage, {"mean": zeros, "square": zeros, "weight": zeros}
    )
    flat = normal.flatten(1)
    torch.testing.assert_close(flat.mean(1), zeros, atol=1e-9, rtol=0.0)
    torch.testing.assert_close(flat.std(1, correction=0), zeros + 1.0, atol=1e-6, rtol=0.0)
    _, later = smoothly_normalised(0.0 * advantage, moments)
    torch.testing.assert_close(later["mean"], 0.99 * moments["mean"])


def test_inputs_stay_as_they_were():
    learner = make_learner()
    state = make_state(learner)
    trace, batches = make_window(learner, state)
    copies = [batch.map(torch.clone) for batch in batches]
    before = {g: {n: p.clone() for n, p in e.items()} for g, e in state.items()}
    learner.meta_update(state, trace, batches)
    for batch, copy in zip(batches, copies, strict=True):
        for name, tensor in vars(batch).items():
            assert torch.equal(tensor, getattr(copy, name)), name
    for group, entries in before.items():
        for name, p in entries.items():
            assert torch.equal(state[group][name], p), name


def test_what_is_described_is_what_the_rule_and_the_agents_say():
    learner = make_learner((TABLE, PIXELS), channels=2)
    state = make_state(learner)
    trace, batches = make_window(learner, state)
    state, _ = learner.meta_update(state, trace, batches)
    shown = learner.describe(state, batches[-1])
    steps = batches[-1].reward.numel()
    assert shown["pi_hat"].shape == shown["advantage"].shape == (steps,)
    assert shown["meaning"].shape == (2, len(DISCOUNTS))
    assert shown["course"].shape == (2, 10)
    assert shown["course"].isnan().any()
    assert torch.equal(shown["cells"], batches[-1].obs[2, ..., 1])
    assert shown["cell_y"].shape == (8, 4)
    block = learner.policy.blocks(4, 4)[0]
    data = batches[-1].members(0, 2)
    own = learner.rule.target(
        state["meta_params"],
        learner.seen(learner.begin(state, 4)[1], block, block.of(state["params"]), data),
        data,
    )
    torch.testing.assert_close(shown["pi_hat"][: steps // 2], own.pi_hat.flatten())


def test_a_prediction_explains_the_returns_that_it_is_made_of_and_no_others():
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(400, 5, generator=generator).double()
    returns = y @ torch.randn(5, generator=generator).double() + 3.0
    noise = torch.randn(400, generator=generator).double()
    assert float(explained(y, returns)) > 0.999
    assert float(explained(y, noise)) < 0.1
    assert float(explained(y, torch.ones(400))) == 0.0


def test_the_course_of_lifetimes_has_each_age_in_its_tenth():
    learner = make_learner((TABLE,), tabular_updates=30)
    state = make_state(learner)
    state["lifetimes"]["age"] = torch.tensor([0, 1, 14, 29])
    seen = torch.tensor([1.0, 3.0, 7.0, torch.nan], dtype=torch.float64)
    course = learner.lifetimes.course(state, seen)
    assert course["seen"][0].nonzero().flatten().tolist() == [0, 4]
    assert course["returns"][0, [0, 4]].tolist() == [2.0, 7.0]
    later = learner.lifetimes.course(state | {"course": course}, seen + 1.0)
    assert later["returns"][0, 4] == pytest.approx(7.0 + 0.05)

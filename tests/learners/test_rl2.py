"""RL² against its equations, written out trial by trial, and against finite differences."""

from dataclasses import replace

import pytest
import torch

from learners.config import Rl2Config
from learners.core.actor_critic import POLICY, VALUE, part
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.params import flatten
from learners.core.trajectory import Spec, Trajectory
from learners.core.trust_region import Curvature
from learners.registry import make_learner
from learners.rl2 import OPTIMIZER, Rl2

SPEC = Spec(obs_size=5, action_size=3, discrete=True, horizon=6, num_episodes=3)
SETTINGS = {"width": 4, "num_minibatches": 2, "num_epochs": 2, "lr": 0.01, "gamma": 0.9}


def make(spec=SPEC, **settings):
    return Rl2(Rl2Config(**SETTINGS | settings), spec)


def double(state):
    return {
        group: {n: p.double() if p.is_floating_point() else p for n, p in entries.items()}
        for group, entries in state.items()
    }


def make_batch(learner, state, num_trials=6, seed=0, ends=None):
    """Trials of T steps, the second of which is over after 4; actions of another policy."""
    generator = torch.Generator().manual_seed(seed)
    spec, dtype = learner.spec, state["params"][POLICY + "head.layer0.bias"].dtype
    shape = (num_trials, spec.horizon, 1)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    length = torch.full((num_trials, 1, 1), spec.horizon)
    if ends is not None:
        length[1] = ends
    step = torch.arange(spec.horizon).view(1, -1, 1)
    valid = (step < length).to(dtype)
    obs = normal(*shape, spec.obs_size) * valid.unsqueeze(-1)
    acting = part(state["params"], POLICY)
    dist = learner.policy.distribution(acting, obs[:, :, 0].transpose(0, 1))
    noise = learner.policy.noise((spec.horizon, num_trials), generator).to(dtype)
    action = dist.sample(noise)
    log_prob = dist.log_prob(action) + 0.1 * normal(spec.horizon, num_trials)
    trajectory = Trajectory(
        obs=obs,
        action=action.transpose(0, 1).unsqueeze(2),
        reward=(normal(*shape) + 1.0) * valid,
        terminated=step == length - 1,
        truncated=torch.zeros(shape, dtype=torch.bool),
        valid=valid,
        log_prob=log_prob.t().unsqueeze(2) * valid,
        last_obs=normal(num_trials, 1, spec.obs_size),
        episode_return=normal(*shape),
        episode_length=torch.zeros(shape, dtype=dtype),
        final_obs=torch.zeros(num_trials, 0, 1, spec.obs_size, dtype=dtype),
        discounted_return=torch.zeros(num_trials, 0, 1, dtype=dtype),
        true_value=torch.zeros(num_trials, 0, 1, dtype=dtype),
    )
    return trajectory.map(torch.Tensor.detach)


def started(learner, seed=0):
    """A state in double precision after one update, so that nothing is at its first value."""
    state = double(learner.init([seed, seed + 1]))
    return learner.meta_update(state, [], [make_batch(learner, state, seed=7)])[0]


def trial_values(learner, state, batch, row):
    """V_old of one trial, a number for each step."""
    own = batch.obs[row, :, 0].unsqueeze(1)
    said = learner.value(part(state["params"], VALUE), own)[:, 0, 0]
    moments = state["returns"]
    return (moments["mean"][:, 0] + moments["square"].sqrt() * said).detach()


def test_advantages_run_through_the_whole_trial():
    """GAE term by term; only the trial's own end cuts it, and steps after it count as nothing."""
    learner = make(standardise_advantages=False)
    state = started(learner)
    batch = make_batch(learner, state, ends=4)
    trials, moments, _ = learner.prepared(state, batch)
    gamma, lam = learner.config.gamma, learner.config.gae_lambda
    for row, length in enumerate([6, 4, 6, 6, 6, 6]):
        value = trial_values(learner, state, batch, row)
        reward = batch.reward[row, :, 0]
        for t in range(length):
            expected = 0.0
            for later in range(t, length):
                following = value[later + 1] if later + 1 < length else 0.0
                delta = reward[later] + gamma * following - value[later]
                expected += (gamma * lam) ** (later - t) * delta
            assert trials.advantage[t, row].item() == pytest.approx(float(expected), rel=1e-9)
        assert not trials.advantage[length:, row].any()
    assert not trials.valid[4:, 1].any()
    assert moments["mean"].shape == (6, 1)


def test_targets_of_the_value_are_returns_in_units_of_their_running_moments():
    learner = make(standardise_advantages=False)
    state = started(learner)
    batch = make_batch(learner, state, ends=4)
    trials, moments, explained = learner.prepared(state, batch)
    value = torch.stack([trial_values(learner, state, batch, row) for row in range(6)], 1)
    returns = (trials.advantage + value) * trials.valid
    here = returns.sum(1, keepdim=True) / trials.valid.sum(1, keepdim=True)
    mean = 0.9 * state["returns"]["mean"] + 0.1 * here
    left = (returns - mean) * trials.valid
    square = 0.9 * state["returns"]["square"] + 0.1 * left.square().sum() / trials.valid.sum()
    torch.testing.assert_close(moments["mean"], mean)
    torch.testing.assert_close(moments["square"], square)
    torch.testing.assert_close(trials.returns, left / square.sqrt())
    errors = ((returns - value) * trials.valid).square().sum() / left.square().sum()
    assert explained == pytest.approx(1.0 - float(errors))


def test_the_first_batch_gives_the_moments_alone():
    learner = make()
    state = double(learner.init([0]))
    trials, moments, _ = learner.prepared(state, make_batch(learner, state))
    torch.testing.assert_close(trials.returns.mean(1), torch.zeros(6, dtype=torch.float64))
    assert trials.returns.square().mean().item() == pytest.approx(1.0)
    assert bool((moments["square"] > 0.0).all())


def test_standardised_advantages_have_mean_0_and_deviation_1_over_the_valid_steps():
    learner = make()
    state = started(learner)
    trials, _, _ = learner.prepared(state, make_batch(learner, state, ends=4))
    valid = trials.valid > 0
    assert trials.advantage[valid].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert trials.advantage[valid].std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert not trials.advantage[~valid].any()


def written_out_loss(learner, params, trials):
    """The loss of the head of the module, step by step."""
    c = learner.config
    policy_loss = value_loss = entropy = 0.0
    outputs = learner.policy.network(part(params, POLICY), trials.obs)
    said = learner.value(part(params, VALUE), trials.obs)[..., 0]
    for t in range(trials.valid.shape[0]):
        for row in range(trials.valid.shape[1]):
            if trials.valid[t, row] == 0:
                continue
            log_probs = outputs[t, row].log_softmax(0)
            ratio = (log_probs[trials.action[t, row]] - trials.log_prob[t, row]).exp()
            advantage = trials.advantage[t, row]
            near = ratio.clamp(1.0 - c.clip_ratio, 1.0 + c.clip_ratio)
            policy_loss = policy_loss - torch.minimum(ratio * advantage, near * advantage)
            error = (said[t, row] - trials.returns[t, row]).abs()
            value_loss = value_loss + (0.5 * error**2 if error < 1.0 else error - 0.5)
            entropy = entropy - (log_probs.exp() * log_probs).sum()
    total = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
    return total / trials.valid.sum()


def test_the_loss_is_the_one_of_the_head_of_the_module():
    learner = make(value_coef=0.7, entropy_coef=0.3)
    state = started(learner)
    trials, _, _ = learner.prepared(state, make_batch(learner, state, ends=4))
    loss, parts = learner.loss(state["params"], trials, 0.3)
    torch.testing.assert_close(loss, written_out_loss(learner, state["params"], trials))
    assert 0.0 < float(parts["rl2/clipped"]) < 1.0


def test_the_gradient_through_the_whole_trial_agrees_with_finite_differences():
    learner = make(clip_ratio=100.0, entropy_coef=0.3)
    state = started(learner)
    trials, _, _ = learner.prepared(state, make_batch(learner, state, ends=4))
    params = {name: p.clone().requires_grad_() for name, p in state["params"].items()}
    loss, _ = learner.loss(params, trials, 0.3)
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    eps = 1e-6
    for name, grad in grads.items():
        for index in range(0, grad.numel(), 3):
            shifted = []
            for sign in (1.0, -1.0):
                moved = {n: p.detach().clone() for n, p in params.items()}
                moved[name].view(-1)[index] += sign * eps
                shifted.append(float(learner.loss(moved, trials, 0.3)[0]))
            slope = (shifted[0] - shifted[1]) / (2.0 * eps)
            assert grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-8), name


def test_one_minibatch_is_one_step_of_adam_with_decay():
    learner = make(num_epochs=1, num_minibatches=1, weight_decay=0.5, max_grad_norm=0.1)
    state = started(learner)
    batch = make_batch(learner, state)
    trials, _, _ = learner.prepared(state, batch)
    leaf = {name: p.clone().requires_grad_() for name, p in state["params"].items()}
    order = torch.randperm(
        6,
        generator=torch.Generator().manual_seed(int(state["counters"]["seed"][0]) * 1_000_003 + 1),
    )
    loss, _ = learner.loss(leaf, trials.take(order), learner.config.entropy_coef)
    grads = dict(zip(leaf, torch.autograd.grad(loss, list(leaf.values())), strict=True))
    for prefix in (POLICY, VALUE):
        names = [name for name in grads if name.startswith(prefix)]
        norm = torch.stack([grads[name].square().sum() for name in names]).sum().sqrt()
        assert norm > 0.1
        grads |= {name: grads[name] * 0.1 / norm for name in names}
    shrunk = {name: p * (1.0 - 0.01 * 0.5) for name, p in state["params"].items()}
    expected, _ = OPTIMIZER.update(shrunk, grads, state["optimizer"], 0.01)
    after, _ = learner.meta_update(state, [], [batch])
    for name, p in after["params"].items():
        torch.testing.assert_close(p, expected[name])


@pytest.mark.parametrize("outer", ["ppo", "trpo"])
def test_the_weight_of_the_entropy_falls_to_nothing(outer):
    """After half the updates it is half, after all of them the update is as without."""

    def updated(done, **settings):
        learner = make(outer=outer, **settings)
        state = started(make())
        batch = make_batch(learner, state)
        state["counters"]["num_updates"] = torch.tensor([done])
        return learner.meta_update(state, [], [batch])[0]["params"]

    for done, weight in ((0, 0.4), (5, 0.2), (10, 0.0), (12, 0.0)):
        found = updated(done, entropy_coef=0.4, entropy_decay_updates=10)
        plain = updated(done, entropy_coef=weight)
        assert all(torch.equal(found[name], p) for name, p in plain.items())
        other = updated(done, entropy_coef=weight + 0.1)
        assert not all(torch.equal(found[name], p) for name, p in other.items())


def test_two_minibatches_see_every_trial_once_an_epoch(monkeypatch):
    learner = make()
    state = started(learner)
    seen = []
    loss = Rl2.loss

    def noted(self, params, trials, entropy_coef):
        seen.append(trials.obs[0, :, 0].tolist())
        return loss(self, params, trials, entropy_coef)

    monkeypatch.setattr(Rl2, "loss", noted)
    batch = make_batch(learner, state)
    learner.meta_update(state, [], [batch])
    assert len(seen) == 4
    for epoch in (seen[:2], seen[2:]):
        assert sorted(epoch[0] + epoch[1]) == sorted(batch.obs[:, 0, 0, 0].tolist())
    assert seen[:2] != seen[2:]


def test_the_same_update_twice_and_another_with_another_seed():
    learner = make()
    state = started(learner)
    batch = make_batch(learner, state)
    once, twice = (learner.meta_update(state, [], [batch])[0]["params"] for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    counters = state["counters"] | {"seed": state["counters"]["seed"] + 1}
    other = learner.meta_update(state | {"counters": counters}, [], [batch])[0]["params"]
    assert any(not torch.equal(once[name], other[name]) for name in once)


def test_all_members_act_with_the_same_parameters_and_none_of_the_value():
    learner = make()
    state = learner.init([3, 4, 5])
    renew, agents = learner.begin(state, 3)
    assert renew == [True] * 3
    assert set(agents.params) == set(learner.policy.template())
    assert all(p.shape[0] == 1 for p in agents.params.values())
    assert learner.num_stream_steps is None
    assert (learner.num_inner_updates, learner.num_evaluation_updates) == (0, 0)


def test_continuous_actions():
    learner = make(replace(SPEC, discrete=False, action_size=2), init_std=0.3)
    state = started(learner)
    after, metrics = learner.meta_update(state, [], [make_batch(learner, state)])
    assert bool((after["params"][POLICY + "log_std"] != state["params"][POLICY + "log_std"]).all())
    assert metrics["meta/grad_norm"] > 0.0


# TRPO


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, discrete=False, action_size=2)])
def test_trpo_improves_the_policy_within_the_trust_region(spec):
    learner = make(spec, outer="trpo", max_kl=0.005)
    state = started(learner)
    after, metrics = learner.meta_update(state, [], [make_batch(learner, state, ends=4)])
    assert metrics["meta/step_accepted"] == 1.0
    assert metrics["meta/loss"] < metrics["meta/loss_before"]
    assert 0.002 < metrics["meta/kl"] <= 0.005
    for name, p in after["params"].items():
        assert not torch.equal(p, state["params"][name]), name
    before, now = state["optimizer"], after["optimizer"]
    for name in before:
        same = torch.equal(before[name], now[name])
        assert same == name.startswith(("m." + POLICY, "v." + POLICY)), name


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, discrete=False, action_size=2)])
def test_the_curvature_is_the_second_derivative_of_the_kl_through_the_whole_trial(spec):
    learner = make(spec)
    state = started(learner)
    trials, _, _ = learner.prepared(state, make_batch(learner, state, ends=4))
    policy = {n: p.clone().requires_grad_() for n, p in part(state["params"], POLICY).items()}
    weight = trials.valid / trials.valid.sum()
    dist = learner.policy.distribution(policy, trials.obs)
    curvature = Curvature.at(dist, policy, weight)
    generator = torch.Generator().manual_seed(0)
    vector = {n: torch.randn(p.shape, generator=generator).double() for n, p in policy.items()}
    found = curvature.product(policy, vector)
    kl = (curvature.dist.kl(learner.policy.distribution(policy, trials.obs)) * weight).sum()
    first = torch.autograd.grad(kl, list(policy.values()), create_graph=True)
    along = sum((g * vector[n]).sum() for n, g in zip(policy, first, strict=True))
    second = torch.autograd.grad(along, list(policy.values()))
    torch.testing.assert_close(found, flatten(dict(zip(policy, second, strict=True))))


def test_what_happens_inside_a_trial():
    learner = make()
    state = started(learner)
    batch = make_batch(learner, state, ends=4)
    described = learner.describe(state, batch)
    reward = batch.reward[:, :, 0]
    running = torch.tensor([0, 2, 3, 4, 5])
    torch.testing.assert_close(described["trial_reward"][3], reward[:, 3].mean())
    torch.testing.assert_close(described["trial_reward"][5], reward[running, 5].mean())
    assert described["trial_entropy"].shape == (6,)
    assert torch.equal(described["trial_action"], batch.action[0, :, 0])
    ends = [*batch.obs[0, 1:, 0, -1].tolist(), 1.0]
    assert described["trial_ended"].tolist() == ends
    assert bool((described["trial_entropy"] > 0.0).all())


def test_a_parameter_that_is_not_finite_is_named():
    learner = make()
    state = started(learner)
    batch = make_batch(learner, state)
    with pytest.raises(NonFiniteError):
        learner.meta_update(state, [], [replace(batch, reward=batch.reward * float("nan"))])


def test_tasks_that_are_no_trials_are_refused():
    with pytest.raises(ConfigError, match="--task trials:"):
        make_learner(Rl2Config(), replace(SPEC, num_episodes=0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("lr", 0.0),
        ("clip_ratio", 0.0),
        ("width", 0),
        ("num_epochs", 0),
        ("num_minibatches", 0),
        ("max_grad_norm", float("nan")),
        ("weight_decay", -1.0),
        ("entropy_coef", -1.0),
        ("lr_decay_updates", -1),
        ("outer", "sgd"),
        ("max_kl", 0.0),
        ("cg_steps", 0),
        ("cg_damping", -1.0),
        ("line_search_ratio", 1.5),
        ("line_search_tries", 0),
    ],
)
def test_values_that_no_run_could_use_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} "):
        Rl2Config(**{name: value})

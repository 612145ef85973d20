"""LIRPG: its meta-gradient against finite differences, and which loss reaches which parameters."""

import dataclasses

import pytest
import torch

from learners.config import LirpgConfig
from learners.core.actor_critic import (
    POLICY,
    VALUE,
    clipped_surrogate,
    clipped_value_loss,
    minibatches,
    rollout,
    values,
)
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.intrinsic import EXTRINSIC, REWARD
from learners.core.params import flatten_members, unflatten_members
from learners.core.returns import stream_gae
from learners.core.trajectory import Spec
from learners.lirpg import Lirpg
from tests.learners.core.test_actor_critic import (
    chain_probabilities,
    copied,
    make_state,
    make_stream,
    members,
)

SETTINGS = {
    "num_epochs": 1,
    "num_minibatches": 1,
    "hidden": (5, 4),
    "entropy_coef": 0.01,
    "extrinsic_coef": 0.3,
    "intrinsic_coef": 0.7,
    "gamma": 0.9,
    "num_steps": 8,
}
LR = 1e-2


def make_learner(form: str = "ppo", discrete: bool = False, **settings) -> Lirpg:
    spec = Spec(3, 4 if discrete else 2, discrete, horizon=100)
    return Lirpg(LirpgConfig(form=form, **SETTINGS | settings), spec)


def moved(matrix: torch.Tensor, seed: int) -> torch.Tensor:
    """Parameters as after some minibatches: off those that the window was made with."""
    generator = torch.Generator().manual_seed(seed)
    return matrix + 0.1 * torch.randn(matrix.shape, generator=generator, dtype=torch.float64)


class Problem:
    """One minibatch of a learner: what `differentiate` sees, and the same written plainly."""

    def __init__(self, learner: Lirpg, num_envs: int = 2) -> None:
        self.learner, self.state = learner, make_state(learner)
        self.batch = make_stream(learner, self.state, num_envs)
        self.window = learner.window(self.state, self.batch)
        c, counters = learner.config, self.state["counters"]
        size = c.num_steps * num_envs
        self.rows = minibatches(
            counters["seed"], counters["num_updates"], size, 1, c.num_minibatches
        )[0]
        self.theta = moved(flatten_members(self.state["params"]), 1)
        self.eta = moved(flatten_members(self.state["meta_params"]), 2)

    def differentiate(self):
        """The step under test."""
        slots, rows = self.state["optimizer"], self.rows
        steps = self.window.steps.rows(rows)
        return self.learner.differentiate(self.theta, self.eta, slots, LR, self.window, rows, steps)

    def rollout(self):
        """Advantages and returns of the extrinsic reward, and values of the mixed one."""
        c, state, batch = self.learner.config, self.state, self.batch
        data = rollout(batch, {})
        lam = c.gae_lambda if c.form == "ppo" else 1.0
        mixed = values(
            lambda obs: self.learner.networks.value(state["params"], obs), data, batch, {}
        )
        own = values(
            lambda obs: self.learner.intrinsic.value(state["meta_params"], obs), data, batch, {}
        )
        advantage = stream_gae(data.reward, *own, data.ended, c.gamma, lam)
        return data, lam, mixed, advantage, own[0]

    def minibatch(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.flatten(0, 1)[r] for x, r in zip(tensor, self.rows, strict=True)])

    def standard(self, advantage: torch.Tensor) -> torch.Tensor:
        if self.learner.config.form == "a2c":
            return advantage
        deviation = advantage.std(1, correction=0, keepdim=True)
        return (advantage - advantage.mean(1, keepdim=True)) / deviation

    def inner_gradient(self, eta: torch.Tensor) -> torch.Tensor:
        """Clipped g of each member, [M, P], without gradient."""
        learner, c, clip = self.learner, self.learner.config, self.learner.clip_ratio
        data, lam, (value, following), *_ = self.rollout()
        meta_params = unflatten_members(eta, self.window.meta_like)
        own = learner.intrinsic.reward(meta_params, self.window.seen, data.action).view_as(value)
        reward = c.extrinsic_coef * data.reward + c.intrinsic_coef * own
        whole = stream_gae(reward, value, following, data.ended, c.gamma, lam)
        advantage, old = self.minibatch(whole).detach(), self.minibatch(value)
        theta = self.theta.clone().requires_grad_()
        dist, now = learner.networks(
            unflatten_members(theta, self.window.like), self.minibatch(self.batch.obs)
        )
        log_ratio = dist.log_prob(self.minibatch(self.batch.action)) - self.minibatch(
            self.batch.log_prob
        )
        loss = clipped_surrogate(log_ratio, self.standard(advantage), clip).mean(1)
        loss = loss + c.value_coef * clipped_value_loss(now, old, advantage + old, clip).mean(1)
        loss = loss - c.entropy_coef * dist.entropy().mean(1)
        (grad,) = torch.autograd.grad(loss.sum(), theta)
        norm = grad.square().sum(1, keepdim=True).sqrt()
        return torch.where(norm > c.max_grad_norm, grad * c.max_grad_norm / norm, grad)

    def stepped(self, grad: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """θ' of a clipped g; Adam's second moment is that of `held`."""
        slots = self.state["optimizer"]
        if self.learner.config.form == "a2c":
            square = 0.99 * slots["ms.flat"] + 0.01 * grad**2
            return self.theta - LR * grad / (square + 1e-5).sqrt()
        m = (0.9 * slots["m.flat"] + 0.1 * grad) / (1.0 - 0.9**4)
        v = (0.999 * slots["v.flat"] + 0.001 * held**2) / (1.0 - 0.999**4)
        return self.theta - LR * m / (v.sqrt() + 1e-5)

    def value_loss(self, eta: torch.Tensor) -> torch.Tensor:
        *_, advantage, own = self.rollout()
        value = self.learner.intrinsic.value(
            unflatten_members(eta, self.window.meta_like), self.minibatch(self.batch.obs)
        )
        old, returns = self.minibatch(own), self.minibatch(advantage + own)
        return clipped_value_loss(value, old, returns, self.learner.clip_ratio).mean(1)

    def outer(self, eta: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """The outer loss of each member after the inner step, [M]."""
        c, learner = self.learner.config, self.learner
        params = unflatten_members(self.stepped(self.inner_gradient(eta), held), self.window.like)
        dist, _ = learner.networks(params, self.minibatch(self.batch.obs))
        log_ratio = dist.log_prob(self.minibatch(self.batch.action)) - self.minibatch(
            self.batch.log_prob
        )
        *_, advantage, _ = self.rollout()
        target = self.standard(self.minibatch(advantage))
        loss = clipped_surrogate(log_ratio, target, learner.clip_ratio).mean(1)
        return loss + c.extrinsic_value_coef * self.value_loss(eta)


# Name: form, discrete actions, environments, and the settings.
CASES = {
    "ppo": ("ppo", False, 1, {"num_minibatches": 2, "num_steps": 16}),
    "ppo-unclipped-norm": ("ppo", False, 1, {"num_minibatches": 2, "max_grad_norm": 100.0}),
    "ppo-discrete": ("ppo", True, 2, {"num_minibatches": 2}),
    "a2c-discrete": ("a2c", True, 2, {}),
    "a2c-discrete-unclipped-norm": ("a2c", True, 2, {"max_grad_norm": 100.0}),
    "a2c": ("a2c", False, 2, {"entropy_coef": 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_finite_differences(case):
    form, discrete, num_envs, settings = CASES[case]
    settings = {"max_grad_norm": 0.05} | settings
    problem = Problem(make_learner(form, discrete, **settings), num_envs)
    step, held = problem.differentiate(), problem.inner_gradient(problem.eta)
    torch.testing.assert_close(step.params, problem.stepped(held, held), rtol=1e-9, atol=1e-12)
    assert (step.norm > problem.learner.config.max_grad_norm).all() == ("norm" not in case)
    outside = (step.moved.exp() - 1.0).abs() > problem.learner.config.clip_ratio
    assert 0.1 < outside.double().mean() < 0.9

    slopes = unflatten_members(step.meta_grad, problem.window.meta_like)
    generator = torch.Generator().manual_seed(3)
    for name, slope in slopes.items():
        zero = {n: torch.zeros_like(p) for n, p in slopes.items()}
        for _ in range(2):
            along = torch.randn(slope.shape, generator=generator, dtype=torch.float64)
            direction = 1e-5 * flatten_members(zero | {name: along})
            ends = [problem.outer(problem.eta + sign * direction, held) for sign in (1.0, -1.0)]
            expected = (ends[0] - ends[1]) / 2e-5
            computed = (slope * along).flatten(1).sum(1)
            assert (computed.abs() > 1e-7).all(), f"{name}: nothing to compare"
            torch.testing.assert_close(
                computed, expected, rtol=1e-4, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_second_moment_is_stopped_in_the_ppo_form_alone(form):
    """Were Adam's v to move, differences would disagree; RMSProp's ms does move."""
    problem = Problem(make_learner(form, max_grad_norm=0.05))
    for name, slot in problem.state["optimizer"].items():
        if name.startswith(("v", "ms")):
            slot.mul_(1e-4)
    step = problem.differentiate()
    direction = torch.zeros_like(problem.eta)
    start = sum(p.numel() for n, p in problem.window.meta_like.items() if n.startswith(EXTRINSIC))
    direction[:, start:] = 1e-5
    ends = []
    for sign in (1.0, -1.0):
        eta = problem.eta + sign * direction
        ends.append(problem.outer(eta, problem.inner_gradient(eta)))
    naive = (ends[0] - ends[1]) / 2e-5
    computed = (step.meta_grad * direction / 1e-5).sum(1)
    assert torch.allclose(computed, naive, rtol=1e-3) is (form == "a2c")


# --- Which loss reaches which parameters ---


def update(learner, state, batch):
    return learner.meta_update(state, [learner.begin(state, 2)[1]], [batch])


@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_the_outer_loss_never_moves_policy_and_mixed_value(form):
    """Where θ learns from intrinsic rewards alone, extrinsic ones are the outer loss's."""
    learner = make_learner(form, extrinsic_coef=0.0)
    state = make_state(learner)
    batch = make_stream(learner, state)
    after, _ = update(learner, state, batch)
    others = [
        (make_learner(form, extrinsic_coef=0.0, meta_lr=0.5), batch),
        (make_learner(form, extrinsic_coef=0.0, extrinsic_value_coef=7.0), batch),
        (learner, dataclasses.replace(batch, reward=batch.reward.flip(1))),
    ]
    for other, other_batch in others:
        result, _ = update(other, state, other_batch)
        for name, p in after["params"].items():
            assert torch.equal(result["params"][name], p)
            assert not torch.equal(state["params"][name], p)
        assert any(
            not torch.equal(result["meta_params"][n], p) for n, p in after["meta_params"].items()
        )


@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_extrinsic_value_learns_from_its_own_loss_alone(form):
    problem = Problem(make_learner(form, extrinsic_value_coef=0.3))
    eta = problem.eta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(0.3 * problem.value_loss(eta).sum(), eta)
    like = problem.window.meta_like
    found = unflatten_members(problem.differentiate().meta_grad, like)
    for name, slope in unflatten_members(expected, like).items():
        if name.startswith(EXTRINSIC):
            assert (slope != 0.0).any()
            torch.testing.assert_close(found[name], slope, rtol=1e-10, atol=1e-12)
        else:
            assert name.startswith(REWARD)
            assert (slope == 0.0).all()
            assert (found[name] != 0.0).any()


@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_a_reward_that_is_not_used_has_no_gradient(form):
    problem = Problem(make_learner(form, intrinsic_coef=0.0, extrinsic_coef=1.0))
    slopes = unflatten_members(problem.differentiate().meta_grad, problem.window.meta_like)
    for name, slope in slopes.items():
        assert bool((slope == 0.0).all()) is name.startswith(REWARD)


@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_mixed_value_learns_from_its_own_loss_alone(form):
    learner = make_learner(form, value_coef=0.0)
    state = make_state(learner)
    if form == "ppo":
        for name, slot in state["optimizer"].items():
            if name.startswith("m"):
                slot.zero_()
    after, _ = update(learner, state, make_stream(learner, state))
    for name, p in state["params"].items():
        assert name.startswith((POLICY, VALUE))
        assert torch.equal(after["params"][name], p) is name.startswith(VALUE)


# --- Whole updates ---

SEVERAL = {"num_epochs": 2, "num_minibatches": 2, "normalize_obs": True}


@pytest.mark.parametrize(("form", "discrete"), [("ppo", False), ("a2c", True)])
def test_replicas_are_independent(form, discrete):
    learner = make_learner(form, discrete, **SEVERAL)
    state = make_state(learner, num_members=3)
    batch = make_stream(learner, state)
    together, _ = update(learner, state, batch)
    for m in range(3):
        own = members(state, slice(m, m + 1), 3)
        alone, _ = update(learner, own, batch.members(m, m + 1))
        for group, entries in members(together, slice(m, m + 1), 3).items():
            for name, p in entries.items():
                torch.testing.assert_close(alone[group][name], p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_update_is_a_function(form):
    """The same twice, bit for bit, with inputs unchanged and every group moved."""
    learner = make_learner(form, **SEVERAL)
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


def test_pixels_move_every_entry():
    spec = Spec(2 * 36 * 36, 3, discrete=True, horizon=100, image=(2, 36, 36))
    settings = SETTINGS | {"num_steps": 3, "extrinsic_coef": 1.0}
    learner = Lirpg(LirpgConfig(form="a2c", **settings), spec)
    state = {
        group: {n: p.double() if p.is_floating_point() else p for n, p in entries.items()}
        for group, entries in learner.init([1]).items()
    }
    batch = make_stream(learner, state, num_envs=1)
    names = ("obs", "last_obs", "final_obs")
    pixels = {n: (100.0 + 50.0 * getattr(batch, n)).clamp(0, 255).to(torch.uint8) for n in names}
    batch = dataclasses.replace(batch, **pixels)
    after, metrics = update(learner, state, batch)
    for group in ("params", "meta_params"):
        for name, p in after[group].items():
            assert p.isfinite().all()
            assert not torch.equal(p, state[group][name]), f"{group}/{name}"
    assert all(value == value for value in metrics.values())


def test_step_sizes_of_both_groups_fall_to_zero():
    learner = make_learner(lr_decay_updates=5)
    state = make_state(learner)
    state["counters"]["num_updates"] += 5
    after, _ = update(learner, state, make_stream(learner, state))
    for group in ("params", "meta_params"):
        for name, p in after[group].items():
            assert torch.equal(p, state[group][name])


def test_policy_learns_from_intrinsic_rewards_alone():
    """With no extrinsic reward in what it learns from, all it learns came by the meta-gradient."""
    settings = {"extrinsic_coef": 0.0, "intrinsic_coef": 1.0, "num_steps": 16, "num_epochs": 2}
    settings |= {"num_minibatches": 2, "lr": 0.02, "hidden": (8,)}
    spec = Spec(3, 2, discrete=True, horizon=100)
    trained, untrained = (
        chain_probabilities(Lirpg(LirpgConfig(**SETTINGS | settings, meta_lr=rate), spec), 30)[1]
        for rate in (0.02, 1e-12)
    )
    assert (trained > 0.9).all()
    assert (untrained < 0.1).any()


@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_a_reward_of_nan_is_refused(form):
    learner = make_learner(form)
    state = make_state(learner)
    batch = make_stream(learner, state)
    batch.reward[1, 2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="params/"):
        update(learner, state, batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("form", "trpo"),
        ("meta_lr", 0.0),
        ("clip_ratio", -0.1),
        ("gae_lambda", 1.1),
        ("extrinsic_coef", -1.0),
        ("intrinsic_coef", float("nan")),
        ("extrinsic_value_coef", float("inf")),
        ("num_epochs", 0),
        ("num_minibatches", 1.5),
    ],
)
def test_unusable_setting_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} "):
        LirpgConfig(**{name: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["ppo", "a2c"])
def test_update_on_cuda_equals_the_cpu(form):
    learner = make_learner(form)
    state = make_state(learner)
    batch = make_stream(learner, state)
    expected, _ = update(learner, state, batch)
    there = {group: {n: p.cuda() for n, p in entries.items()} for group, entries in state.items()}
    found, _ = update(learner, there, batch.to("cuda"))
    for group, entries in found.items():
        for name, p in entries.items():
            assert p.is_cuda
            torch.testing.assert_close(p.cpu(), expected[group][name], rtol=1e-5, atol=1e-5)

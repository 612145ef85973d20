"""Learned intrinsic rewards for policy gradient (Zheng, Oh and Singh 2018, arXiv 1804.06459).

    D = T steps of E environments under π_old;  matrix W: δ ↦ GAE(γ, λ), once per rollout
    for each of `num_epochs` passes over D, minibatch B by minibatch:
        r  = c_ex r_ex + c_in r_in(s, a; η)                      for every step of D
        Â  = W_B (r + γ V_mix(s') − V_mix(s)),   R = Â + V_mix           functions of η
        g  = ∇θ L_in(θ, η),  L_in = surrogate(π_θ, Â) + c_v value loss(v_θ, R) − c_e entropy
        θ' = θ − α step(clip(g))                                 differentiated, slots included
        η  ← η − β step(clip(∇η [ surrogate(π_θ'(η), Â_ex) + c_vex value loss(v_ex, R_ex) ]))
        θ  ← θ'

Two groups of parameters, each with gradient from its own loss alone: π and v_mix (the value of the
mixed return) learn from the inner loss; r_in and v_ex (the value of the extrinsic return, baseline
of the outer surrogate) from the outer loss. The values inside W's argument, Â_ex and log π_old are
constants of the rollout; the same batch serves the outer loss, weighted by π_θ' / π_old.

The meta-gradient needs no second derivative of a network. With u = ∂L_out/∂g, through the step and
the clipping,

    ∂L_out/∂η = ∂/∂η ⟨u, ∇θ L_in(θ, η)⟩ = ∂/∂η Σ_B [ ℓ_π(η) ∂_u log π_θ + ℓ_v(η) ∂_u v_θ ],

where ℓ_π, ℓ_v are the derivatives of L_in by log π_θ(a|s) and v_θ(s) of each step, and ∂_u the
derivative along u in parameter space, which one forward pass gives.

The form "ppo" clips ratios, standardises advantages inside the graph and steps with Adam, whose
second moment is a constant in the graph; "a2c" does neither, and steps with RMSProp, differentiated
whole. Both are the authors' choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from learners.config import LirpgConfig
from learners.core.actor_critic import (
    POLICY,
    clipped_surrogate,
    clipped_value_loss,
    decayed,
    minibatches,
    part,
    rollout,
    stack,
    standardise_rows,
    standardise_with_pullback,
    surrogate_slope,
    take,
    value_loss_slope,
    values,
)
from learners.core.contract import State
from learners.core.intrinsic import IntrinsicReward
from learners.core.optim import Adam, RMSProp, clip_by_norm, clip_pullback
from learners.core.params import (
    first_member,
    flatten_members,
    one_member,
    unflatten_members,
)
from learners.core.replicas import Replicas, each
from learners.core.returns import gae_matrix, stream_gae
from learners.core.reward_description import describe_reward
from learners.core.trajectory import Params, Trajectory

METRICS_EVERY = 20
"""Updates of the a2c form between two looks at the intrinsic reward."""


@dataclass(frozen=True)
class Window:
    """A rollout's constants, all steps: N = T·E."""

    seen: Tensor  # [M, N, O + A], what r_in sees; observations alone where actions are discrete
    action: Tensor  # [M, N, A] or [M, N]
    fixed: Tensor  # [M, N], c_ex r_ex + γ V_mix(s') − V_mix(s)
    matrix: Tensor  # [M, N, N], W
    steps: Steps
    like: Params  # shapes of one replica's θ
    meta_like: Params  # shapes of one replica's η


@dataclass(frozen=True)
class Steps:
    """Constants of some steps of the rollout."""

    obs: Tensor  # [M, B, O], normalized
    action: Tensor  # [M, B, A] or [M, B]
    log_prob: Tensor  # [M, B], of π_old
    mixed_value: Tensor  # [M, B], V_mix
    advantage: Tensor  # [M, B], Â_ex
    returns: Tensor  # [M, B], R_ex
    value: Tensor  # [M, B], V_ex

    def rows(self, rows: Tensor) -> Steps:
        """The steps of each member that `rows` [M, B] names."""
        return Steps(*(take(tensor, rows) for tensor in vars(self).values()))

    def part(self, start: int, size: int) -> Steps:
        """`size` steps from `start` on, as views."""
        return Steps(*(tensor.narrow(1, start, size) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Lirpg(Replicas):
    """The learner; see the head of the module. "params" are π and v_mix."""

    config: LirpgConfig

    @property
    def intrinsic(self) -> IntrinsicReward:
        """r_in and v_ex."""
        return IntrinsicReward(self.networks)

    @property
    def optimizer(self) -> Adam | RMSProp:
        """Of both groups."""
        return Adam(eps=1e-5) if self.config.form == "ppo" else RMSProp(decay=0.99, eps=1e-5)

    @property
    def clip_ratio(self) -> float | None:
        """Half-width of PPO's interval; None in the a2c form."""
        return self.config.clip_ratio if self.config.form == "ppo" else None

    # --- The contract ---

    def init(self, seeds: Sequence[int]) -> State:
        """Each replica's four networks from its own seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        params = stack([self.networks.init(generator) for generator in generators])
        meta_params = stack([self.intrinsic.init(generator) for generator in generators])
        state = {
            "params": params,
            "meta_params": meta_params,
            "optimizer": self.optimizer.init({"flat": flatten_members(params)}),
            "meta_optimizer": self.optimizer.init({"flat": flatten_members(meta_params)}),
            "counters": self.counters(seeds),
        }
        return state | self.first_statistics(len(seeds))

    def update(self, state: State, batch: Trajectory) -> tuple[State, Params]:
        """All epochs of every replica on its own rollout: a step of θ and one of η each."""
        c = self.config
        window = self.window(state, batch)
        counters = state["counters"]
        count = counters["num_updates"]
        lr, meta_lr = (decayed(x, int(count[0]), c.lr_decay_updates) for x in (c.lr, c.meta_lr))
        theta, eta = (flatten_members(state[group]) for group in ("params", "meta_params"))
        slots, meta_slots = state["optimizer"], state["meta_optimizer"]
        shuffled = minibatches(
            counters["seed"], count, window.fixed.shape[1], c.num_epochs, c.num_minibatches
        ).to(theta.device)
        totals: Params = {}
        for epoch in shuffled.view(c.num_epochs, c.num_minibatches, *shuffled.shape[1:]):
            steps = window.steps.rows(epoch.swapaxes(0, 1).flatten(1))
            for number, rows in enumerate(epoch):
                batch_steps = steps.part(number * rows.shape[1], rows.shape[1])
                step = self.differentiate(theta, eta, slots, lr, window, rows, batch_steps)
                with torch.inference_mode():
                    grads, norm = clip_by_norm({"flat": step.meta_grad}, c.max_grad_norm)
                    updated, meta_slots = self.optimizer.update(
                        {"flat": eta}, grads, meta_slots, meta_lr
                    )
                theta, eta, slots = step.params, updated["flat"], step.slots
            for name, value in each(step.metrics() | {"meta/grad_norm": norm}).items():
                totals[name] = totals.get(name, 0.0) + value / c.num_epochs
        groups = {
            "params": unflatten_members(theta.clone(), window.like),
            "meta_params": unflatten_members(eta.clone(), window.meta_like),
            "optimizer": {name: slot.clone() for name, slot in slots.items()},
            "meta_optimizer": {name: slot.clone() for name, slot in meta_slots.items()},
        }
        after = self.updated(state, batch, groups)
        if c.form == "ppo" or int(count[0]) % METRICS_EVERY == 0:
            totals |= self.reward_metrics(after, window, shuffled[0])
        return after, totals

    def describe(self, state: State, batch: Trajectory) -> dict[str, Tensor]:
        """What r_in of the first replica says of its rollout; see `reward_description`."""
        statistics = first_member(self.statistics(state))
        meta_params = first_member(state["meta_params"])

        def reward(obs: Tensor, action: Tensor) -> Tensor:
            seen = self.intrinsic.seen(obs, action).unsqueeze(0)
            return self.intrinsic.reward(meta_params, seen, action.unsqueeze(0)).squeeze(0)

        return describe_reward(self.spec, reward, batch.members(0, 1), statistics)

    # --- One minibatch ---

    def differentiate(
        self,
        theta: Tensor,
        eta: Tensor,
        slots: Params,
        lr: float,
        window: Window,
        rows: Tensor,
        b: Steps,
    ) -> Step:
        """θ' of each replica, and the gradient of its outer loss by η.

        Every derivative is written by hand, and the results are inference tensors of torch's, to be
        cloned before anything is differentiated through them.

        Args:
            theta: [M, P], π and v_mix.
            eta: [M, Q], r_in and v_ex.
            slots: of the optimizer of θ.
            lr: α.
            window: the rollout.
            rows: [M, B], steps of the minibatch.
            b: these steps.
        """
        c, clip, size = self.config, self.clip_ratio, rows.shape[1]
        with torch.inference_mode():
            params = unflatten_members(theta, window.like)
            meta_params = unflatten_members(eta, window.meta_like)
            advantage, returns, mixed_pullback = self.mixed(meta_params, window, rows, b)

            # g = ∇θ L_in, by the derivatives ℓ_π and ℓ_v of L_in at each step.
            acting = self.networks.acting(params, b.obs, b.action)
            valuing = self.networks.valuing(params, acting)
            moved = acting.log_prob - b.log_prob
            slope = surrogate_slope(moved, advantage, clip) / size
            value_slope, by_return = value_loss_slope(
                valuing.outputs, b.mixed_value.unsqueeze(-1), returns.unsqueeze(-1), clip
            )
            scale = c.value_coef / size
            grads, by_trunk = valuing.pullback(value_slope * scale, acting.trunk is not None)
            grads |= acting.gradient(slope * advantage, -c.entropy_coef / size, by_trunk)
            grad = {"flat": flatten_members(grads)}

            # θ', and u = ∂L_out/∂g.
            clipped, norm = clip_by_norm(grad, c.max_grad_norm)
            stepped, new_slots = self.optimizer.update({"flat": theta}, clipped, slots, lr)
            after = self.networks.acting(
                unflatten_members(stepped["flat"], window.like), b.obs, b.action
            )
            moved_after, target = after.log_prob - b.log_prob, self.extrinsic_advantage(b)
            outer_slope = surrogate_slope(moved_after, target, clip) * target / size
            # Entries are in the order of their names: the policy's come first.
            by_policy = flatten_members(after.gradient(outer_slope))
            by_theta = functional.pad(by_policy, (0, theta.shape[1] - by_policy.shape[1]))
            by_clipped = by_theta * self.optimizer.slope(clipped, new_slots, lr)["flat"]
            by_grad = clip_pullback({"flat": by_clipped}, grad, norm, c.max_grad_norm)

            # ∂/∂η ⟨u, g⟩, where ℓ_π is linear in the advantage and ℓ_v in the return.
            along = unflatten_members(by_grad["flat"], window.like)
            log_prob_along, trunk_along = acting.tangent(along)
            value_along = valuing.tangent(along, trunk_along)
            meta_grads = mixed_pullback(
                slope * log_prob_along, (by_return * value_along * scale).squeeze(-1)
            )
            value, value_grads = self.extrinsic_value(meta_params, b)
            meta_grad = flatten_members(added(meta_grads, value_grads))
        return Step(
            stepped["flat"], new_slots, meta_grad, norm, moved, moved_after, target, value, b, clip
        )

    def mixed(
        self, meta_params: Params, window: Window, rows: Tensor, b: Steps
    ) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Params]]:
        """Advantages and returns of the mixed reward, [M, B], and their gradient by r_in's entries.

        The third result makes it of derivatives of a function by the first two.
        """
        c, intrinsic = self.config, self.intrinsic
        rewarding = intrinsic.rewarding(meta_params, window.seen)
        reward = intrinsic.read_out(rewarding.outputs, window.action)
        weights = take(window.matrix, rows)
        advantage = weighted_sums(weights, c.intrinsic_coef * reward + window.fixed)
        returns, standard_pullback = advantage + b.mixed_value, None
        if c.form == "ppo":
            advantage, standard_pullback = standardise_with_pullback(advantage)

        def pullback(by_advantage: Tensor, by_return: Tensor) -> Params:
            if standard_pullback is not None:
                by_advantage = standard_pullback(by_advantage)
            by_delta = torch.bmm((by_advantage + by_return).unsqueeze(1), weights).squeeze(1)
            by_reward = c.intrinsic_coef * by_delta
            by_outputs = intrinsic.read_out_pullback(by_reward, reward, window.action)
            return rewarding.pullback(by_outputs)[0]

        return advantage, returns, pullback

    def extrinsic_value(self, meta_params: Params, b: Steps) -> tuple[Tensor, Params]:
        """v_ex, [M, B], and the gradient of its part of the outer loss by its entries."""
        valuing = self.intrinsic.valuing(meta_params, b.obs)
        value = valuing.outputs.squeeze(-1)
        slope, _ = value_loss_slope(value, b.value, b.returns, self.clip_ratio)
        slope = slope * (self.config.extrinsic_value_coef / slope.shape[1])
        return value, valuing.pullback(slope.unsqueeze(-1))[0]

    def extrinsic_advantage(self, b: Steps) -> Tensor:
        """Â_ex as the outer surrogate has it, [M, B]."""
        return standardise_rows(b.advantage) if self.config.form == "ppo" else b.advantage

    # --- Parts ---

    def window(self, state: State, batch: Trajectory) -> Window:
        """What stays the same for all minibatches of a rollout."""
        c, statistics = self.config, self.statistics(state)
        data = rollout(batch, statistics)
        params, meta_params = state["params"], state["meta_params"]
        mixed, mixed_next = values(
            lambda obs: self.networks.value(params, obs), data, batch, statistics
        )
        own, own_next = values(
            lambda obs: self.intrinsic.value(meta_params, obs), data, batch, statistics
        )
        lam = c.gae_lambda if c.form == "ppo" else 1.0
        advantage = stream_gae(data.reward, own, own_next, data.ended, c.gamma, lam)
        fixed = c.extrinsic_coef * data.reward + c.gamma * mixed_next - mixed
        steps = Steps(
            data.obs,
            data.action,
            data.log_prob,
            mixed.flatten(1),
            advantage.flatten(1),
            (advantage + own).flatten(1),
            own.flatten(1),
        )
        matrix = gae_matrix(data.ended, c.gamma, lam)
        return Window(
            self.intrinsic.seen(data.obs, data.action),
            data.action,
            fixed.flatten(1),
            matrix,
            steps,
            one_member(params),
            one_member(meta_params),
        )

    def reward_metrics(self, state: State, window: Window, rows: Tensor) -> Params:
        """What r_in says, and how its policy gradient lies to the extrinsic one's."""
        params, meta_params = state["params"], state["meta_params"]
        with torch.no_grad():
            reward = self.intrinsic.reward(meta_params, window.seen, window.action)
            own = weighted_sums(take(window.matrix, rows), reward)
        b = window.steps.rows(rows)
        acting = part(params, POLICY)
        leaf = flatten_members(acting).requires_grad_()
        entries = unflatten_members(leaf, one_member(acting))
        log_prob = self.policy.distribution(entries, b.obs).log_prob(b.action)
        grads = [
            torch.autograd.grad(
                (standardise_rows(advantage) * log_prob).sum(), leaf, retain_graph=True
            )[0]
            for advantage in (own, b.advantage)
        ]
        cosine = functional.cosine_similarity(grads[0], grads[1], dim=1)
        return {
            "lirpg/intrinsic_reward_mean": reward.mean(1),
            "lirpg/intrinsic_reward_std": reward.std(1),
            "lirpg/gradient_cosine": cosine,
        }


@dataclass(frozen=True)
class Step:
    """What one minibatch brought."""

    params: Tensor  # [M, P], θ'
    slots: Params
    meta_grad: Tensor  # [M, Q], of the outer loss by η
    norm: Tensor  # [M], of g before clipping
    moved: Tensor  # [M, B], log π_θ − log π_old
    moved_after: Tensor  # [M, B], log π_θ' − log π_old
    advantage: Tensor  # [M, B], of the outer surrogate
    value: Tensor  # [M, B], v_ex
    steps: Steps
    clip: float | None

    def metrics(self) -> dict[str, Tensor]:
        """Losses and sizes, each with members first."""
        b = self.steps
        return {
            "inner/grad_norm": self.norm,
            "inner/kl": -self.moved,
            "meta/loss": clipped_surrogate(self.moved_after, self.advantage, self.clip),
            "meta/value_loss": clipped_value_loss(self.value, b.value, b.returns, self.clip),
        }


def weighted_sums(weights: Tensor, delta: Tensor) -> Tensor:
    """W_B δ, [M, N] → [M, B]: a product with a row, which is faster than one with a column."""
    return torch.bmm(delta.unsqueeze(1), weights.mT).squeeze(1)


def added(grads: Params, others: Params) -> Params:
    """The entries of both, their sum where both have one."""
    shared = {name: grads[name] + others[name] for name in grads.keys() & others.keys()}
    return grads | others | shared

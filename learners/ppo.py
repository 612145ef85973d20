"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347).

    D     = T steps of E environments under π_old;   Â = GAE(γ, λ) over V_old;   R = Â + V_old
    for each of `num_epochs` passes over D, minibatch by minibatch:
        r = π_θ(a|s) / π_old(a|s),  Â standardised over the minibatch
        L = mean[ −min(r Â, clip(r, 1 ± ε) Â) ]                                      (eq. 7)
            + c_v mean[ ½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) ] − c_e mean H(π_θ)
        θ ← θ − α Adam clip ∇θ L

The clipped value loss and the standardised advantages are those of the method's first public
implementation. The M members are replicas: independent runs, each with its own parameters and seed.
`reward_bonus` is added to what is learned from: the constant bonus that is compared with learned
rewards (Zheng, Oh and Singh 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learners.config import PpoConfig
from learners.core.actor_critic import (
    clipped_surrogate,
    clipped_value_loss,
    decayed,
    minibatches,
    rollout,
    stack,
    standardise_rows,
    take,
    values,
)
from learners.core.contract import State
from learners.core.optim import Adam, clip_by_norm
from learners.core.params import flatten_members, leaves, one_member, unflatten_members
from learners.core.replicas import Replicas
from learners.core.returns import stream_gae
from learners.core.trajectory import Params, Trajectory

OPTIMIZER = Adam(eps=1e-5)


@dataclass(frozen=True)
class Minibatch:
    """B steps of each replica."""

    obs: Tensor  # [M, B, O], normalized
    action: Tensor  # [M, B, A] or [M, B]
    log_prob: Tensor  # [M, B], of the policy that acted
    advantage: Tensor  # [M, B], standardised
    returns: Tensor  # [M, B]
    value: Tensor  # [M, B], V_old


@dataclass(frozen=True)
class Ppo(Replicas):
    """The learner; see the head of the module."""

    config: PpoConfig

    def init(self, seeds: Sequence[int]) -> State:
        """Each replica's networks from its own seed."""
        params = stack([self.networks.init(torch.Generator().manual_seed(s)) for s in seeds])
        state = {
            "params": params,
            "optimizer": OPTIMIZER.init({"flat": flatten_members(params)}),
            "counters": self.counters(seeds),
        }
        return state | self.first_statistics(len(seeds))

    def update(self, state: State, batch: Trajectory) -> tuple[State, Params]:
        """All epochs of every replica on its own rollout."""
        c = self.config
        params, statistics, counters = state["params"], self.statistics(state), state["counters"]
        data = rollout(batch, statistics)
        now, following = values(
            lambda obs: self.networks.value(params, obs), data, batch, statistics
        )
        reward = data.reward + c.reward_bonus
        advantage = stream_gae(reward, now, following, data.ended, c.gamma, c.gae_lambda)
        whole = Minibatch(
            data.obs,
            data.action,
            data.log_prob,
            advantage.flatten(1),
            (advantage + now).flatten(1),
            now.flatten(1),
        )
        like = one_member(params)
        theta = {"flat": flatten_members(params)}
        slots, count = state["optimizer"], counters["num_updates"]
        lr = decayed(c.lr, int(count[0]), c.lr_decay_updates)
        totals: Params = {}
        shuffled = minibatches(
            counters["seed"], count, data.obs.shape[1], c.num_epochs, c.num_minibatches
        )
        for rows in shuffled.to(data.obs.device):
            theta = leaves(theta)
            loss, parts = self.loss(unflatten_members(theta["flat"], like), select(whole, rows))
            (grad,) = torch.autograd.grad(loss.sum(), [theta["flat"]])
            grads, norm = clip_by_norm({"flat": grad}, c.max_grad_norm)
            with torch.no_grad():
                theta, slots = OPTIMIZER.update(theta, grads, slots, lr)
            for name, value in (parts | {"meta/grad_norm": norm}).items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        new = unflatten_members(theta["flat"], like)
        after = self.updated(state, batch, {"params": new, "optimizer": slots})
        return after, {name: total / len(shuffled) for name, total in totals.items()}

    def loss(self, params: Params, batch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each replica on its minibatch [M], with gradient to `params`, and its parts."""
        c, b = self.config, batch
        dist, value = self.networks(params, b.obs)
        log_prob = dist.log_prob(b.action)
        policy_loss = clipped_surrogate(log_prob - b.log_prob, b.advantage, c.clip_ratio).mean(1)
        value_loss = clipped_value_loss(value, b.value, b.returns, c.clip_ratio).mean(1)
        loss = policy_loss + c.value_coef * value_loss
        if c.entropy_coef > 0.0:
            loss = loss - c.entropy_coef * dist.entropy().mean(1)
        parts = {
            "meta/loss": loss,
            "meta/policy_loss": policy_loss,
            "meta/value_loss": value_loss,
            "meta/kl": (b.log_prob - log_prob).mean(1),
        }
        return loss, parts


def select(whole: Minibatch, rows: Tensor) -> Minibatch:
    """The minibatch of these rows, its advantages standardised."""
    chosen = Minibatch(*(take(tensor, rows) for tensor in vars(whole).values()))
    return replace(chosen, advantage=standardise_rows(chosen.advantage))

"""Advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783) with V-trace (Espeholt et al. 2018).

    D   = T steps of E environments under μ, the policy that acted
    v_t = V-trace target of D for the newest θ;   Â_t = ρ_t (r_t + γ v_{t+1} − V_θ(s_t))
    θ   ← θ − α step(clip(∇θ mean[ −Â_t log π_θ(a_t|s_t) + c_v ½ (V_θ(s_t) − v_t)² − c_e H(π_θ) ]))

On the policy's own data ρ = 1 and v_t is the bootstrapped T-step return: plain A2C. Two settings
make it short-sighted, for comparison: without `bootstrap` nothing is expected after the chunk;
with `lookahead` = n, v_t is the sum of the next n rewards, and steps of which the chunk does not
hold so many are left out. The M members are replicas: independent runs, each with its own
parameters and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import A2cConfig
from learners.core.actor_critic import decayed, rollout, stack, values
from learners.core.contract import State
from learners.core.optim import OPTIMIZERS, clip_by_norm
from learners.core.params import detach, gradients, leaves
from learners.core.replicas import Replicas, each
from learners.core.returns import lookahead_returns, vtrace
from learners.core.trajectory import Params, Trajectory


@dataclass(frozen=True)
class A2c(Replicas):
    """The learner; see the head of the module."""

    config: A2cConfig

    def init(self, seeds: Sequence[int]) -> State:
        """Each replica's networks from its own seed."""
        params = stack([self.networks.init(torch.Generator().manual_seed(s)) for s in seeds])
        state = {
            "params": params,
            "optimizer": OPTIMIZERS[self.config.optimizer].init(params),
            "counters": self.counters(seeds),
        }
        return state | self.first_statistics(len(seeds))

    def update(self, state: State, batch: Trajectory) -> tuple[State, Params]:
        """One step of every replica on its own chunk."""
        c = self.config
        params = leaves(state["params"])
        loss, metrics = self.loss(params, batch, self.statistics(state))
        grads, norm = clip_by_norm(gradients(loss.sum(), params), c.max_grad_norm)
        num_updates = state["counters"]["num_updates"]
        lr = decayed(c.lr, int(num_updates[0]), c.lr_decay_updates)
        optimizer = OPTIMIZERS[c.optimizer]
        new, slots = optimizer.update(detach(params), grads, state["optimizer"], lr)
        after = self.updated(state, batch, {"params": new, "optimizer": slots})
        return after, metrics | {"meta/grad_norm": norm}

    def loss(self, params: Params, batch: Trajectory, statistics: Params) -> tuple[Tensor, Params]:
        """Loss of each replica [M], with gradient to `params`, and its parts [M]."""
        c, networks = self.config, self.networks
        data = rollout(batch, statistics)
        dist, value = networks(params, data.obs)
        log_prob = dist.log_prob(data.action)
        now, following = values(lambda obs: networks.value(params, obs), data, batch, statistics)
        log_ratio = (log_prob.detach() - data.log_prob).view_as(now)
        counted = torch.ones_like(now)
        if not c.bootstrap:
            following = following * (1.0 - cut(batch))
        if c.lookahead:
            target, counted = lookahead_returns(data.reward, data.ended, c.gamma, c.lookahead)
            advantage = log_ratio.exp().clamp_max(c.max_rho) * (target - now)
        else:
            target, advantage = vtrace(
                data.reward, now, following, data.ended, log_ratio, c.gamma, c.max_rho
            )
        share = (counted / counted.sum((1, 2), keepdim=True).clamp_min(1.0)).flatten(1)
        policy_loss = -(advantage.flatten(1) * log_prob * share).sum(1)
        value_loss = 0.5 * ((value - target.flatten(1)).square() * share).sum(1)
        entropy = dist.entropy().mean(1)
        loss = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        parts = {
            "meta/loss": loss,
            "meta/policy_loss": policy_loss,
            "meta/value_loss": value_loss,
            "meta/entropy": entropy,
            "meta/ratio_mean": log_ratio.exp(),
        }
        return loss, each(parts)


def cut(batch: Trajectory) -> Tensor:
    """1.0 where the episode goes on and the data do not, [M, T, E]."""
    after = batch.truncated.clone()
    after[:, -1] = True
    return after.to(batch.reward.dtype)

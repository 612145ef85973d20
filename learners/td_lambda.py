"""TD(λ) with accumulating traces, linear in the observation (Sutton and Barto 2018, section 12.2).

    for each step t of every environment, ρ = π(a|s) / μ(a|s):
        δ ← r + γ V(s') − V(s)                         V(s) = w · [s, 1]
        e ← ρ (γλ e + [s, 1])                          zero where an episode begins
        w ← w + α mean_E[ δ e ]

It evaluates the specification's target policy and learns nothing to act. What follows a chunk's
last step is known when the next chunk comes; the traces are carried, so that chunks leave no mark
on what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import TdLambdaConfig
from learners.core.actor_critic import VALUE, rollout, stack
from learners.core.contract import State
from learners.core.errors import ConfigError
from learners.core.replicas import Replicas, each, value_errors
from learners.core.trajectory import Params, Trajectory

WEIGHT, BIAS = VALUE + "layer0.weight", VALUE + "layer0.bias"


@dataclass(frozen=True)
class TdLambda(Replicas):
    """The learner; see the head of the module. The group "traces" has e [M, E, O + 1]."""

    config: TdLambdaConfig

    def init(self, seeds: Sequence[int]) -> State:
        """V is 0.

        Raises:
            ConfigError: the task has no policy to evaluate.
        """
        if self.spec.target_policy is None:
            raise ConfigError("td-lambda evaluates a policy, and this task asks to find one")
        params = stack([self.networks.init(torch.Generator()) for _ in seeds])
        return {
            "params": {name: torch.zeros_like(p) for name, p in params.items()},
            "traces": {},
            "counters": self.counters(seeds),
        }

    def update(self, state: State, batch: Trajectory) -> tuple[State, Params]:
        """All steps of a chunk, one after the other."""
        weight, traces, errors = self.steps(state, batch)
        entries = {WEIGHT: weight[:, :-1].unsqueeze(-1), BIAS: weight[:, -1:]}
        groups = {"params": state["params"] | entries, "traces": {"e": traces}}
        metrics = each({"meta/td_error": errors.square()})
        value = self.networks.value(state["params"], rollout(batch, {}).obs).view_as(batch.reward)
        return self.updated(state, batch, groups), metrics | value_errors(value, batch)

    def steps(self, state: State, batch: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [M, O + 1], traces [M, E, O + 1] and errors δ [M, T, E] of one chunk."""
        c = self.config
        assert self.spec.target_policy is not None
        target = batch.reward.new_tensor(self.spec.target_policy).log()[batch.action]
        ratio = (target - batch.log_prob).exp().unsqueeze(-1).unbind(1)
        seen = with_one(torch.cat([batch.obs, batch.last_obs.unsqueeze(1)], 1)).unbind(1)
        weight = whole_weight(state["params"])
        trace = state["traces"].get("e", torch.zeros_like(seen[0]))
        cut = batch.ended.unsqueeze(-1).unbind(1)
        done = batch.terminated.to(weight.dtype).unbind(1)
        errors = []
        for t, reward in enumerate(batch.reward.unbind(1)):
            value, following = ((x * weight.unsqueeze(1)).sum(-1) for x in seen[t : t + 2])
            error = reward + c.gamma * (1.0 - done[t]) * following - value
            trace = ratio[t] * (c.gamma * c.trace_decay * trace + seen[t])
            weight = weight + c.lr * (error.unsqueeze(-1) * trace).mean(1)
            trace = trace * (1.0 - cut[t])
            errors.append(error)
        return weight, trace, torch.stack(errors, 1)


def with_one(obs: Tensor) -> Tensor:
    """[…, O] → […, O + 1], the last entry 1."""
    return torch.cat([obs, torch.ones_like(obs[..., :1])], -1)


def whole_weight(params: Params) -> Tensor:
    """The value's weights and bias, [M, O + 1]."""
    return torch.cat([params[WEIGHT].squeeze(-1), params[BIAS]], 1)

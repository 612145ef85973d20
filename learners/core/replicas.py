"""What learners on streams share: independent replicas that go on for ever and adapt online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import ActorCriticSettings
from learners.core.actor_critic import POLICY, ActorCritic, part
from learners.core.contract import Agents, State
from learners.core.policy import Policy
from learners.core.trajectory import Metrics, Params, Spec, Trajectory


class Online:
    """What a learner without inner updates says of them."""

    @property
    def num_inner_updates(self) -> int:
        """0: the one batch is the update's own."""
        return 0

    @property
    def num_evaluation_updates(self) -> int:
        """0."""
        return 0

    def inner_update(
        self, state: State, agents: Agents, batch: Trajectory, *, evaluating: bool = False
    ) -> Agents:
        """There are none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Replicas(Online):
    """The half of the contract that no method changes: no inner updates, all members go on.

    State groups: "params" (policy and value of every replica), "counters" (each replica's seed and
    number of updates) and, where something is normalized, "statistics". A method adds its own.
    """

    config: ActorCriticSettings
    spec: Spec

    @property
    def networks(self) -> ActorCritic:
        """Policy and value."""
        return ActorCritic.of(self.config, self.spec)

    @property
    def policy(self) -> Policy:
        """What acts."""
        return self.networks.policy

    @property
    def num_stream_steps(self) -> int:
        """T."""
        return self.config.num_steps

    def begin(
        self, state: State, num_members: int, *, evaluating: bool = False
    ) -> tuple[list[bool], Agents]:
        """All replicas go on; where a given policy is to be evaluated nothing learns to act."""
        acting = part(state["params"], POLICY)
        if self.spec.target_policy is not None:
            acting = self.behaviour(acting, state["counters"]["num_updates"])
        return [False] * num_members, Agents(acting | self.statistics(state), {}, 0)

    def behaviour(self, params: Params, num_updates: Tensor) -> Params:
        """Parameters, like `params`, of the policy whose turn it is after these updates [M]."""
        fixed = {name: torch.zeros_like(p) for name, p in params.items()}
        if self.spec.behaviours:
            policies = torch.tensor(self.spec.behaviours).log()
            turn = num_updates.cpu() * self.config.num_steps // self.spec.switch_every
            last = f"layer{len(self.policy.hidden)}.bias"
            fixed[last] = policies[turn % len(policies)].to(fixed[last].device)
        return fixed

    def counters(self, seeds: Sequence[int]) -> Params:
        """Each replica's seed, and how many rollouts it has learned from."""
        return {
            "seed": torch.tensor(seeds, dtype=torch.int64),
            "num_updates": torch.zeros(len(seeds), dtype=torch.int64),
        }

    def first_statistics(self, num_replicas: int) -> State:
        """The group "statistics" before training, where there is one."""
        normalizer = self.policy.normalizer
        if normalizer is None:
            return {}
        return {"statistics": normalizer.init(num_replicas, self.spec.obs_size)}

    def statistics(self, state: State) -> Params:
        """The normalizer's entries of the acting parameters."""
        normalizer = self.policy.normalizer
        return {} if normalizer is None else normalizer.entries(state["statistics"])

    def updated(self, state: State, batch: Trajectory, groups: State) -> State:
        """The state with new groups, one update more, and the rollout in the statistics."""
        count = state["counters"]["num_updates"] + 1
        after = state | groups | {"counters": state["counters"] | {"num_updates": count}}
        if self.policy.normalizer is not None:
            after["statistics"] = self.policy.normalizer.merge(state["statistics"], batch)
        return after


def value_errors(value: Tensor, batch: Trajectory) -> Metrics:
    """Mean squared error of the values [M, T, E] of a batch; nothing where no truth is known."""
    if not batch.true_value.shape[1]:
        return {}
    errors = (value - batch.true_value).square().mean((1, 2)).tolist()
    own = {f"replica/value_error_{m}": error for m, error in enumerate(errors)}
    return {"rollout/value_error": sum(errors) / len(errors)} | own

"""What learners on streams share: independent replicas that go on for ever and adapt online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learners.config import ActorCriticSettings
from learners.core.actor_critic import POLICY, ActorCritic, part
from learners.core.blocks import block_bounds, map_blocks
from learners.core.contract import Agents, State, check_params
from learners.core.policy import Policy
from learners.core.reduce import ALONE, Reduce
from learners.core.trajectory import Metrics, Params, Spec, Trajectory

VALUE_ERROR = "rollout/value_error"

LEARNED = ("meta_params", "critic", "params")
"""Groups that must stay finite."""


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
        self,
        state: State,
        agents: Agents,
        batch: Trajectory,
        reduce: Reduce = ALONE,
        *,
        evaluating: bool = False,
    ) -> Agents:
        """There are none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Replicas(Online):
    """The half of the contract that no method changes: no inner updates, all members go on.

    State groups: "params" (policy and value of every replica), "counters" (each replica's seed and
    number of updates) and, where something is normalized, "statistics". A method adds its own.
    Every entry is stacked on M: a block of replicas knows nothing of the others.
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

    def meta_update(
        self,
        state: State,
        trace: Sequence[Agents],
        batches: Sequence[Trajectory],
        reduce: Reduce = ALONE,
    ) -> tuple[State, Metrics]:
        """Every replica after learning from its own chunk; metrics are means over replicas."""
        (batch,) = batches
        num_replicas = len(batch.reward)
        if not bool(batch.truncated.any()):
            batch = replace(batch, final_obs=batch.final_obs[:, :0])

        def update(bounds: tuple[int, int]) -> State:
            rows = slice(*bounds)
            own = {g: {n: p[rows] for n, p in entries.items()} for g, entries in state.items()}
            new, metrics = self.update(own, batch.members(*bounds))
            return new | {"metrics": metrics}

        size = self.config.members_per_block or num_replicas
        blocks = reduce.own(block_bounds(num_replicas, size))
        new = side_by_side(reduce.gather(map_blocks(update, blocks, batch.obs.device)))
        metrics = new.pop("metrics")
        for group in LEARNED:
            check_params(new.get(group, {}), group)
        shown = {name: float(value.mean()) for name, value in metrics.items()}
        if VALUE_ERROR in metrics:
            errors = metrics[VALUE_ERROR].tolist()
            shown |= {f"replica/value_error_{m}": error for m, error in enumerate(errors)}
        return new, shown

    def update(self, state: State, batch: Trajectory) -> tuple[State, Params]:
        """Some replicas after learning from their own chunks, and metrics of each, [M].

        `final_obs` is of length T = 0 where no time limit ended an episode of any replica.
        """
        raise NotImplementedError

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


def side_by_side(parts: Sequence[State]) -> State:
    """The groups of all replicas, from those of consecutive blocks."""
    if len(parts) == 1:
        return parts[0]
    return {
        group: {name: torch.cat([part[group][name] for part in parts]) for name in entries}
        for group, entries in parts[0].items()
    }


def each(values: Params) -> Params:
    """The mean of each replica's values, [M, …] → [M], without their graph."""
    return {name: value.detach().reshape(len(value), -1).mean(1) for name, value in values.items()}


def value_errors(value: Tensor, batch: Trajectory) -> Params:
    """Mean squared error of each replica's values [M, T, E]; nothing where no truth is known."""
    if not batch.true_value.shape[1]:
        return {}
    return {VALUE_ERROR: (value.detach() - batch.true_value).square().mean((1, 2))}

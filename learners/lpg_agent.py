"""Agents that a rule of LPG teaches, and the hand-written rules that it is compared with.

    for each chunk τ of T steps of E environments:
        π̂, ŷ = U_η(τ)                    rule:      the frozen rule, as in `learners.lpg`
             or  Â, y                     a2c:       GAE around the agent's critic; y stays
             or  Σ γ^i r_t+i, y           reinforce: the rewards that follow within the chunk
             or  0, y                     none: the policy stays as it began
        θ ← θ + α step(clip(mean[π̂ ∇log π] − α_y ∇mean[KL(y ‖ ŷ)] + c ∇H(π)))
        critic ← towards its λ-returns on τ

Every member is a replica: one agent on one task. The a2c and reinforce forms are plain policy
gradients (Mnih et al. 2016; Williams 1992) on the same networks, steps and data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import LpgAgentConfig
from learners.core.blocks import map_blocks
from learners.core.contract import Agents, State, check_params
from learners.core.lifetimes import BY_WORLD, Lifetimes
from learners.core.params import detach, leaves
from learners.core.population import Block, CriticRates, Population, Rates, Target, experience
from learners.core.reduce import ALONE, Reduce
from learners.core.replicas import Online
from learners.core.returns import reverse_scan
from learners.core.trajectory import Metrics, Params, Spec, Trajectory
from learners.core.update_rule import UpdateRule

METRICS = ("lpg/pi_hat_abs", "lpg/pi_hat_against_advantage", "lpg/policy_entropy")


@dataclass(frozen=True)
class LpgAgent(Online):
    """The learner; see the head of the module.

    State groups: by world "params", "optimizer", "critic", "critic_optimizer"; "lifetimes";
    "counters"; and, where there is a rule, its "meta_params".
    """

    config: LpgAgentConfig
    spec: Spec

    @property
    def policy(self) -> Population:
        """What acts."""
        c = self.config
        return Population(self.spec, c.hidden, c.num_predictions, c.channels)

    @property
    def rule(self) -> UpdateRule:
        """U."""
        return UpdateRule.of(self.config)

    @property
    def num_stream_steps(self) -> int:
        """T."""
        return self.config.num_steps

    def init(self, seeds: Sequence[int]) -> State:
        """Agents and critics from each replica's own seed; the rule has yet to be given."""
        c = self.config
        counters = {
            "seed": torch.tensor(seeds, dtype=torch.int64),
            "lives": torch.zeros(len(seeds), dtype=torch.int64),
        }
        lifetimes = Lifetimes(
            self.policy,
            (c.tabular_lr,),
            (c.network_lr,),
            (c.alpha_y,),
            c.lifetime_updates,
            c.lifetime_updates,
        )
        state = {"counters": counters} | lifetimes.born(counters, lifetimes.new_bandit())
        if c.teacher == "rule":
            state["meta_params"] = self.rule.init(torch.Generator().manual_seed(0))
        return state

    def begin(
        self, state: State, num_members: int, *, evaluating: bool = False
    ) -> tuple[list[bool], Agents]:
        """All replicas go on."""
        return [False] * num_members, Agents(state["params"], {}, 0)

    def meta_update(
        self,
        state: State,
        trace: Sequence[Agents],
        batches: Sequence[Trajectory],
        reduce: Reduce = ALONE,
    ) -> tuple[State, Metrics]:
        """One update of every agent; the rule stays as it is."""
        (batch,) = batches
        blocks = self.policy.blocks(len(batch.reward), self.config.members_per_block)
        found = map_blocks(
            lambda block: self.taught(state, block, batch), reduce.own(blocks), batch.obs.device
        )
        parts = reduce.gather([part for part, _ in found])
        sums = reduce.sum([metrics for _, metrics in found]) / len(batch.reward)
        new = {g: self.policy.join(blocks, [part[g] for part in parts]) for g in BY_WORLD}
        check_params(new["params"], "params")
        lifetimes = state["lifetimes"] | {"age": state["lifetimes"]["age"] + 1}
        metrics = dict(zip(METRICS, sums.tolist(), strict=True))
        return state | new | {"lifetimes": lifetimes}, metrics

    def taught(self, state: State, block: Block, batch: Trajectory) -> tuple[State, Tensor]:
        """A block's groups after one update, and sums over its members by `METRICS`, float64."""
        c, agent = self.config, block.agent
        own = {group: block.of(state[group]) for group in BY_WORLD}
        data = batch.members(*block.members)
        advantage, returns = agent.advantages(own["critic"], data, c.gamma, c.gae_lambda)
        with torch.no_grad():
            target = self.target(state, block, own["params"], data, advantage)
            entropy = agent.heads(own["params"], data.obs.flatten(1, 2)).policy.entropy()
        params, slots = leaves(own["params"]), own["optimizer"]
        params, slots = agent.step(
            params, slots, data, target, self.rates(state, block), create_graph=False
        )
        critic, critic_slots = agent.critic_step(
            own["critic"],
            own["critic_optimizer"],
            data,
            returns,
            CriticRates(c.critic_rate, c.critic_lr),
        )
        shown = (
            target.pi_hat.abs().mean((1, 2)),
            correlation(target.pi_hat, advantage),
            entropy.mean(1),
        )
        metrics = torch.stack([value.sum().double() for value in shown])
        groups = [detach(params), detach(slots), critic, critic_slots]
        return dict(zip(BY_WORLD, groups, strict=True)), metrics

    def target(
        self,
        state: State,
        block: Block,
        params: Params,
        batch: Trajectory,
        advantage: Tensor,
    ) -> Target:
        """What the teacher says of a batch."""
        if self.config.teacher == "rule":
            age, length = (block.rows(state["lifetimes"][name]) for name in ("age", "length"))
            seen = experience(block.agent, params, batch, age, length)
            return self.rule.target(state["meta_params"], seen, batch)
        heads = block.agent.heads(params, batch.obs.flatten(1, 2))
        same = heads.log_y.view(*batch.reward.shape, -1)
        if self.config.teacher == "none":
            return Target(torch.zeros_like(advantage), same)
        if self.config.teacher == "a2c":
            return Target(advantage, same)
        return Target(reverse_scan(batch.reward, self.config.gamma * (1.0 - batch.ended)), same)

    def rates(self, state: State, block: Block) -> Rates:
        """Step sizes of a block's members."""
        c = self.config
        lr, alpha_y = (block.rows(state["lifetimes"][name]) for name in ("lr", "alpha_y"))
        return Rates(lr, alpha_y, c.max_grad_norm, c.entropy_coef)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation over the steps of each member, [M, T, E] → [M]; 0 where one is constant."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / ((a.square().sum(1) * b.square().sum(1)).sqrt() + 1e-12)

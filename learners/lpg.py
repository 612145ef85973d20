"""LPG: discovering the update rule (Oh, Hessel, Czarnecki, Xu, van Hasselt, Singh, Silver 2020,
arXiv 2007.08794).

    π̂_t, ŷ_t = U_η(x_t | x_t+1, …): a backward LSTM over x = [r, d, γ, π(a|s), φ(y(s)), φ(y(s'))]

    for each window, M lifetimes side by side, each in an environment of its own:
        for k in 0 … K−1:
            τ_k   = T steps of E environments under θ_k
            Δ     = mean[ π̂ ∇log π(a|s) ] − α_y ∇mean[ KL(y(s) ‖ ŷ) ]        at θ_k
            θ_k+1 = θ_k + α step(clip(Δ))                                       slots included
        τ_K = a fresh rollout under θ_K;  Â = normalised GAE on τ_K around the lifetime's critic
        L   = −mean[Â log π_θK(a|s)] − β₀ H(π) − β₁ H(y) + β₂ mean π̂² + β₃ mean ‖ŷ‖²
        η   ← η − β Adam(mean over lifetimes of ∇η L)
        critics ← towards their λ-returns on τ_0 … τ_K

Gradient flows from L through θ_K back to every π̂ and ŷ, through these to η, and through the y and π
that the rule saw to the updates before: this is how y comes to mean something, since L does not
depend on it otherwise. It stops at θ_0 of the window: windows are K updates of a lifetime of N,
which goes on with θ_K. H(π) and H(y) are those of θ_k+1 on τ_k, averaged over k.

Beyond the paper, each by a setting: `outer_every_update` takes the first term of L from all of
τ_1 … τ_K, each under the θ_k that it was collected with, so that the same steps tell of more pairs
of an update and what came of it; `imitation_coef` adds w mean (π̂ − Â)² over τ_0 … τ_K−1 to L, with
Â as it is, not normalised; `entropy_coef` adds the policy's entropy to what agents ascend, so that
a rule need not discover that.

A lifetime of N updates ends; the member then begins another with a new level of its world, a new
agent and new step sizes. These are drawn by a bandit over (α, α_y) in each world, with
p ∝ exp((mean of the last 10 final returns + 0.2/√n) / 0.1). The first lifetimes are of staggered
lengths, so that all ages are in every window.

Choices made here where the paper leaves them open:
  - φ of what follows an episode's end is 0, be it terminated or cut by a time limit.
  - The first agents are nearly uniform in π and y; a fresh critic is 0 (tables) or nearly so.
  - Agents on tables take plain gradient steps, networks Adam whose second moment is a constant in
    the graph. Critics on tables move each visited state by `critic_rate` of the way to the mean of
    its returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import LpgConfig
from learners.core.actor_critic import decayed, standardise_rows
from learners.core.blocks import map_blocks
from learners.core.contract import Agents, State, check_params
from learners.core.lifetime_description import grid_view, prediction_meaning, thinned
from learners.core.lifetimes import Lifetimes
from learners.core.optim import Adam, clip_by_norm
from learners.core.params import (
    detach,
    expand_members,
    flatten,
    gradients,
    leaves,
    unflatten,
)
from learners.core.population import (
    Block,
    CriticRates,
    Experience,
    Population,
    Rates,
    by_member,
    experience,
)
from learners.core.reduce import ALONE, Reduce
from learners.core.trajectory import Metrics, Params, Spec, Trajectory
from learners.core.update_rule import UpdateRule

META_OPTIMIZER = Adam(eps=1e-5)

SCALE_MEMORY = 0.99
"""What is left after a window of the moments that `ema_advantage` divides by."""


@dataclass(frozen=True)
class Window:
    """A block's share of a window."""

    block: Block
    params: Params  # θ_0
    slots: Params  # of θ_0
    rates: Rates
    age: Tensor  # [M], n at τ_0
    length: Tensor  # [M], N
    batches: list[Trajectory]  # τ_0 … τ_K
    advantage: Tensor  # [M, …, T, E] of the last batches, all K+1 of them for imitation
    rated: Tensor  # [M, J, T, E], normalised, of the last J batches: those of the outer loss


@dataclass(frozen=True)
class Outcome:
    """What a block adds to the sums over all members."""

    gradient: Tensor  # [P]
    metrics: Tensor  # sums over members, by `METRICS`


METRICS = (
    "meta/loss",
    "lpg/pi_hat",
    "lpg/pi_hat_abs",
    "lpg/policy_entropy",
    "lpg/y_entropy",
)


@dataclass(frozen=True)
class Lpg:
    """The learner; see the head of the module.

    State groups beside those of `Lifetimes`: "meta_params" (η), "meta_optimizer" and, where
    `ema_advantage` is on, "advantage".
    """

    config: LpgConfig
    spec: Spec

    @property
    def policy(self) -> Population:
        """What acts."""
        c = self.config
        return Population(self.spec, c.hidden, c.num_predictions, c.channels)

    @property
    def lifetimes(self) -> Lifetimes:
        """Births and deaths."""
        c = self.config
        return Lifetimes(
            self.policy,
            c.tabular_lrs,
            c.network_lrs,
            c.alpha_ys,
            c.tabular_updates,
            c.network_updates,
        )

    @property
    def rule(self) -> UpdateRule:
        """U."""
        return UpdateRule.of(self.config)

    @property
    def num_inner_updates(self) -> int:
        """K."""
        return self.config.num_inner_updates

    @property
    def num_evaluation_updates(self) -> int:
        """A lifetime, bounded."""
        return self.config.evaluation_updates

    @property
    def num_stream_steps(self) -> int:
        """T."""
        return self.config.num_steps

    # --- The contract ---

    def init(self, seeds: Sequence[int]) -> State:
        """η from the first seed; lifetimes from each member's own."""
        meta_params = self.rule.init(torch.Generator().manual_seed(seeds[0]))
        owners = len(seeds) if self.config.adam_per_lifetime else 1
        state = self.lifetimes.init(seeds)
        slots = META_OPTIMIZER.init(expand_members(meta_params, owners))
        state |= {"meta_params": meta_params, "meta_optimizer": slots}
        if self.config.ema_advantage:
            zeros = torch.zeros(len(seeds))
            state["advantage"] = {"mean": zeros, "square": zeros, "weight": zeros}
        return state

    def begin(
        self, state: State, num_members: int, *, evaluating: bool = False
    ) -> tuple[list[bool], Agents]:
        """Who has a new lifetime, and all agents; when evaluating, new ones for everybody.

        Evaluation takes the step sizes of the highest mean return in each world.
        """
        groups, renew = state, state["counters"]["renew"].tolist()
        if evaluating:
            counters = {
                "seed": torch.arange(num_members, device=state["counters"]["seed"].device),
                "lives": torch.zeros(num_members, dtype=torch.int64),
            }
            groups = self.lifetimes.born(counters, state["bandit"], greedy=True)
            renew = [True] * num_members
        slots = groups["optimizer"] | groups["lifetimes"]
        return renew, Agents(groups["params"], slots, 0)

    def inner_update(
        self,
        state: State,
        agents: Agents,
        batch: Trajectory,
        reduce: Reduce = ALONE,
        *,
        evaluating: bool = False,
    ) -> Agents:
        """θ_k+1 of all members, under the rule as it is."""
        blocks = self.blocks(len(batch.reward))

        def update(block: Block) -> State:
            data = batch.members(*block.members)
            params = block.of(agents.params)
            with torch.no_grad():
                seen = self.seen(agents, block, params, data)
                target = self.rule.target(state["meta_params"], seen, data)
            new, slots = block.agent.step(
                leaves(params),
                block.of(agents.slots),
                data,
                target,
                self.rates(agents, block),
                create_graph=False,
            )
            return {"params": detach(new), "optimizer": detach(slots)}

        parts = reduce.gather(map_blocks(update, reduce.own(blocks), batch.obs.device))
        params = self.policy.join(blocks, [part["params"] for part in parts])
        slots = self.policy.join(blocks, [part["optimizer"] for part in parts])
        check_params(params, "params")
        age = agents.slots["age"] + 1
        return Agents(params, agents.slots | slots | {"age": age}, agents.num_updates + 1)

    def meta_update(
        self,
        state: State,
        trace: Sequence[Agents],
        batches: Sequence[Trajectory],
        reduce: Reduce = ALONE,
    ) -> tuple[State, Metrics]:
        """One step of η; then critics learn, and lifetimes that are over make way for others."""
        c = self.config
        blocks = self.blocks(len(batches[-1].reward))
        state, windows, critics = self.windows(state, trace, batches, reduce)
        meta_params = leaves(state["meta_params"])
        parts = map_blocks(
            lambda window: self.block_gradient(meta_params, window),
            windows,
            batches[-1].obs.device,
        )
        num_members = len(batches[-1].reward)
        metrics = reduce.sum([part.metrics for part in parts]) / num_members
        shown = dict(zip(METRICS, metrics.tolist(), strict=True))
        grads = [part.gradient for part in parts]
        if c.adam_per_lifetime:
            stacked = torch.stack(reduce.gather(grads))
        else:
            stacked = reduce.sum(grads).unsqueeze(0) / num_members
        new, slots, norm = self.step(detach(meta_params), stacked, state["meta_optimizer"])
        check_params(new, "meta_params")
        state = state | {"meta_params": new, "meta_optimizer": slots}
        for group in ("critic", "critic_optimizer"):
            state[group] = self.policy.join(blocks, [critic[group] for critic in critics])
        last = trace[-1]
        own = {n: p for n, p in last.slots.items() if n not in state["lifetimes"]}
        state |= {"params": last.params, "optimizer": own}
        lives = state["counters"]["lives"]
        state = self.lifetimes.lived(state, batches)
        shown["meta/grad_norm"] = norm
        for block in self.lifetimes.worlds(num_members):
            recent = block.rows(state["lifetimes"]["recent"])
            shown[f"lpg/return_{block.agent.world.name}"] = float(recent.mean())
        shown["lpg/lifetimes_ended"] = float((state["counters"]["lives"] - lives).sum())
        return state, shown

    def describe(self, state: State, batch: Trajectory) -> dict[str, Tensor]:
        """What the rule makes of a query batch, and what its agents have learned.

        Returns:
            "pi_hat" and "advantage" [N], thinned out; "meaning" [W, G] and "course" [W, 10], see
            `lifetime_description.prediction_meaning` and `Lifetimes`; and, of the first world
            with a grid, what `lifetime_description.grid_view` returns.
        """
        c, worlds = self.config, self.lifetimes.worlds(len(batch.reward))
        agents = self.begin(state, len(batch.reward))[1]
        pi_hat, advantage, meaning = [], [], []
        shown: dict[str, Tensor] = {}
        with torch.no_grad():
            for block in worlds:
                params, critic = block.of(state["params"]), block.of(state["critic"])
                data = batch.members(*block.members)
                seen = self.seen(agents, block, params, data)
                pi_hat.append(self.rule.target(state["meta_params"], seen, data).pi_hat)
                advantage.append(block.agent.advantages(critic, data, c.gamma, c.gae_lambda)[0])
                meaning.append(prediction_meaning(block, params, data))
                if block.agent.world.grid is not None and not shown:
                    shown = grid_view(block, params, critic, data)
        return shown | {
            "pi_hat": thinned(torch.cat(pi_hat)),
            "advantage": thinned(torch.cat(advantage)),
            "meaning": torch.stack(meaning),
            "course": state["course"]["returns"].where(state["course"]["seen"], torch.nan),
        }

    # --- The meta-gradient ---

    def block_gradient(self, meta_params: Params, window: Window) -> Outcome:
        """∇η of the block's sum of losses, and its metrics."""
        loss, metrics = self.loss(meta_params, window)
        grads = gradients(loss.sum(), meta_params)
        return Outcome(flatten(grads), metrics)

    def loss(self, meta_params: Params, window: Window) -> tuple[Tensor, Tensor]:
        """L of each member [M], with gradient to η, and sums of metrics."""
        c, agent, query = self.config, window.block.agent, window.batches[-1]
        support = window.batches[:-1]
        params, slots = leaves(window.params), window.slots
        targets, entropies, y_entropies, log_probs = [], [], [], []
        for k, batch in enumerate(support):
            seen = experience(agent, params, batch, window.age + k, window.length)
            log_probs.append(by_member(seen.prob.log(), batch))
            target = self.rule.target(meta_params, seen, batch)
            targets.append(target)
            params, slots = agent.step(
                params, slots, batch, target, window.rates, create_graph=True
            )
            heads = agent.heads(params, batch.obs.flatten(1, 2))
            entropies.append(heads.policy.entropy().mean(1))
            y_entropies.append(heads.y_entropy.mean(1))
        heads = agent.heads(params, query.obs.flatten(1, 2))
        log_probs.append(heads.policy.log_prob(query.action.flatten(1, 2)).view_as(query.reward))
        outcome = torch.stack(log_probs[-window.rated.shape[1] :], 1)
        entropy, y_entropy = torch.stack(entropies).mean(0), torch.stack(y_entropies).mean(0)
        pi_hat = torch.stack([target.pi_hat for target in targets])
        y_hat = torch.stack([target.log_y_hat for target in targets]).exp()
        loss = (
            -(window.rated * outcome).mean((1, 2, 3))
            - c.policy_entropy_coef * entropy
            - c.y_entropy_coef * y_entropy
            + c.pi_hat_coef * pi_hat.square().mean((0, 2, 3))
            + c.y_hat_coef * y_hat.square().sum(-1).mean((0, 2, 3))
        )
        if c.imitation_coef > 0.0:
            missed = pi_hat.transpose(0, 1) - window.advantage[:, :-1]
            loss = loss + c.imitation_coef * missed.square().mean((1, 2, 3))
        shown = [loss, pi_hat.mean((0, 2, 3)), pi_hat.abs().mean((0, 2, 3)), entropy, y_entropy]
        metrics = torch.stack([value.detach().sum() for value in shown])
        return loss, metrics

    def step(
        self, meta_params: Params, stacked: Tensor, slots: Params
    ) -> tuple[Params, Params, float]:
        """η after one step of Adam along the mean gradient, or along the mean of each one's Adam.

        Args:
            meta_params: η.
            stacked: gradients [1, P], or of each member [M, P].
            slots: of Adam, one set for each gradient.
        """
        rows = [unflatten(row, meta_params) for row in stacked]
        grads = {name: torch.stack([row[name] for row in rows]) for name in meta_params}
        c = self.config
        grads, norm = clip_by_norm(grads, c.meta_max_grad_norm)
        start = expand_members(meta_params, len(stacked))
        lr = decayed(c.meta_lr, int(slots["t"][0]), c.meta_lr_decay_updates)
        moved, slots = META_OPTIMIZER.update(start, grads, slots, lr)
        return {name: p.mean(0) for name, p in moved.items()}, slots, float(norm.mean())

    # --- Parts ---

    def blocks(self, num_members: int) -> list[Block]:
        """Members that are differentiated together."""
        return self.policy.blocks(num_members, self.config.members_per_block)

    def rates(self, agents: Agents, block: Block) -> Rates:
        """Step sizes of a block's members."""
        c = self.config
        lr, alpha_y = block.rows(agents.slots["lr"]), block.rows(agents.slots["alpha_y"])
        return Rates(lr, alpha_y, c.max_grad_norm, c.entropy_coef)

    def seen(self, agents: Agents, block: Block, params: Params, batch: Trajectory) -> Experience:
        """What the rule sees of a block's batch."""
        return experience(
            block.agent,
            params,
            batch,
            block.rows(agents.slots["age"]),
            block.rows(agents.slots["length"]),
        )

    def windows(
        self,
        state: State,
        trace: Sequence[Agents],
        batches: Sequence[Trajectory],
        reduce: Reduce = ALONE,
    ) -> tuple[State, list[Window], list[State]]:
        """The windows of this learner's blocks, and all critics after learning from all batches."""
        c = self.config
        blocks = reduce.own(self.blocks(len(batches[-1].reward)))
        cut = [[batch.members(*block.members) for batch in batches] for block in blocks]
        critics = reduce.gather(
            [self.learned(block, state, data) for block, data in zip(blocks, cut, strict=True)]
        )
        num_rated = c.num_inner_updates if c.outer_every_update else 1
        num_needed = len(batches) if c.imitation_coef > 0.0 else num_rated
        advantages = [
            self.advantages(block, state, data[-num_needed:])
            for block, data in zip(blocks, cut, strict=True)
        ]
        whole = torch.cat(reduce.gather(advantages))
        rated = whole[:, -num_rated:]
        if c.ema_advantage:
            rated, moments = smoothly_normalised(rated, state["advantage"])
            state = state | {"advantage": moments}
        else:
            rated = standardise_rows(rated.flatten(0, 1).flatten(1)).view_as(rated)
        windows = [
            Window(
                block,
                block.of(trace[0].params),
                block.of(trace[0].slots),
                self.rates(trace[0], block),
                block.rows(trace[0].slots["age"]),
                block.rows(trace[0].slots["length"]),
                data,
                whole[slice(*block.members)],
                rated[slice(*block.members)],
            )
            for block, data in zip(blocks, cut, strict=True)
        ]
        return state, windows, critics

    def advantages(self, block: Block, state: State, data: Sequence[Trajectory]) -> Tensor:
        """GAE on each of a block's batches around its critic before the window, [M, …, T, E]."""
        c, critic = self.config, block.of(state["critic"])
        rated = [block.agent.advantages(critic, batch, c.gamma, c.gae_lambda)[0] for batch in data]
        return torch.stack(rated, 1)

    def learned(self, block: Block, state: State, data: Sequence[Trajectory]) -> State:
        """A block's critic after one step on each batch."""
        c = self.config
        critic, slots = block.of(state["critic"]), block.of(state["critic_optimizer"])
        lr = CriticRates(c.critic_rate, c.critic_lr)
        for batch in data:
            _, returns = block.agent.advantages(critic, batch, c.gamma, c.gae_lambda)
            critic, slots = block.agent.critic_step(critic, slots, batch, returns, lr)
        return {"critic": critic, "critic_optimizer": slots}


def smoothly_normalised(advantage: Tensor, moments: Params) -> tuple[Tensor, Params]:
    """Advantages [M, J, T, E] less their mean over time, divided by their deviation over time."""
    new = {
        "mean": torch.lerp(advantage.mean((1, 2, 3)), moments["mean"], SCALE_MEMORY),
        "square": torch.lerp(advantage.square().mean((1, 2, 3)), moments["square"], SCALE_MEMORY),
        "weight": torch.lerp(torch.ones_like(moments["weight"]), moments["weight"], SCALE_MEMORY),
    }
    mean, square = new["mean"] / new["weight"], new["square"] / new["weight"]
    deviation = (square - mean.square()).clamp_min(0.0).sqrt() + 1e-8
    return (advantage - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1), new

"""MAML-TRPO (Finn, Abbeel, Levine 2017, arXiv 1703.03400) and its close relatives.

    for each meta-iteration:
        for each task i of M, starting from the shared policy θ_0 = η:
            for k in 0 … K-1:
                D_k   = whole episodes of task i under θ_k
                Â     = GAE over a linear baseline fitted to D_k, standardised
                θ_k+1 = θ_k − α ∇ mean_D_k[ −log π_θk(a|s) · Â ]              (paper, eq. 4)
            D_K = fresh episodes under θ_K
        L(η)  = mean_i mean_D_K[ −π_θK(η)(a|s) / π_old(a|s) · Â ]            (outer surrogate)
        KL(η) = mean_i mean_D_K[ KL(π_old ‖ π_θK(η)) ]
        x     ≈ (∇²KL + damping)⁻¹ ∇L            by conjugate gradient
        η     ← η − x · √(2δ / xᵀ∇²KL x)          shortened until L falls and KL ≤ δ, else kept

θ_K(η) is recomputed from the stored batches, so that ∇L and KL pass through all K inner updates.
At the expansion point ∇²KL = Jᵀ F J exactly: J is the Jacobian of the distributions' parameters
(mean and log σ) with respect to η through the adaptation, F their Fisher matrix. J v is taken as
the transpose of v ↦ Jᵀ v, whose graph is kept for all products of an iteration.

Variants, one setting each: `first_order` (FOMAML) takes the inner gradients as constants;
`learn_inner_lr` (Meta-SGD, Li et al. 2017) makes α one meta-parameter per parameter;
`inner_loss` "likelihood_ratio" and "dice" have the same inner gradient, and a second derivative
that also holds Â ∇log π ∇log πᵀ (see `core.policy_gradient`); `exploration` adds
−c · mean_i R̄_i · mean_D_k log π_θk(a|s), R̄ the return after adaptation standardised over tasks
(E-MAML, Stadie et al. 2018); `curvature_share` takes Jᵀ F J from the first environments of each
member alone, adaptation included, while ∇L and the line search keep all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import MamlTrpoConfig
from learners.core import trust_region
from learners.core.bilevel import unroll
from learners.core.blocks import block_bounds, map_blocks
from learners.core.contract import Agents, State, check_params
from learners.core.params import (
    detach,
    expand_members,
    flatten,
    gradients,
    leaves,
    unflatten,
)
from learners.core.policy import Distribution, Policy, detached
from learners.core.policy_gradient import Batch, advantages, inner_loss, surrogate
from learners.core.reduce import ALONE, Reduce
from learners.core.trajectory import (
    Metrics,
    Params,
    Spec,
    Trajectory,
    masked_mean,
    mean_episode_return,
)
from learners.core.trust_region import Curvature

INNER_LR = "inner_lr."

LATER_SCALE = 0.5
"""Of the step size of an evaluation's updates after the first, as in the paper's figures."""

INNER_METRICS = ("inner/loss", "inner/step_norm", "inner/kl")


@dataclass(frozen=True)
class Block:
    """Some members' support batches and query batch, and their share of every mean over M."""

    support: list[Batch]
    query: Batch
    credit: Tensor  # [M], return after adaptation standardised over all tasks
    share: float  # 1 / number of all members

    def envs(self, part: float) -> Block:
        """The first environments of each member, at least one of them."""
        stop = max(1, round(part * self.query.valid.shape[2]))
        support = [batch.envs(stop) for batch in self.support]
        return Block(support, self.query.envs(stop), self.credit, self.share)


@dataclass(frozen=True)
class MamlTrpo:
    """The learner; see the head of the module."""

    config: MamlTrpoConfig
    spec: Spec

    @property
    def policy(self) -> Policy:
        """What acts, before and after adaptation."""
        c = self.config
        return Policy(self.spec, c.hidden, c.activation, c.init_std)

    @property
    def num_inner_updates(self) -> int:
        """K."""
        return self.config.num_inner_updates

    @property
    def num_evaluation_updates(self) -> int:
        """K + 2, as in the paper's figures."""
        return self.config.num_inner_updates + 2

    @property
    def num_stream_steps(self) -> None:
        """Whole episodes."""
        return None

    def init(self, seeds: Sequence[int]) -> State:
        """η: the initial policy, and α of each parameter where it is learned. One seed counts."""
        c = self.config
        params = self.policy.init(torch.Generator().manual_seed(seeds[0]))
        rates = {INNER_LR + n: torch.full_like(p, c.inner_lr) for n, p in params.items()}
        return {"meta_params": params | rates if c.learn_inner_lr else params}

    def begin(
        self, state: State, num_members: int, *, evaluating: bool = False
    ) -> tuple[list[bool], Agents]:
        """All members start anew from η."""
        params, _ = self.split(state["meta_params"])
        return [True] * num_members, Agents(expand_members(params, num_members), {}, 0)

    def inner_update(
        self,
        state: State,
        agents: Agents,
        batch: Trajectory,
        reduce: Reduce = ALONE,
        *,
        evaluating: bool = False,
    ) -> Agents:
        """θ_k+1. When evaluating, updates after the first take half the step."""
        _, inner_lr = self.split(state["meta_params"])
        if evaluating and agents.num_updates > 0:
            inner_lr = {name: LATER_SCALE * rate for name, rate in inner_lr.items()}

        def update(bounds: tuple[int, int]) -> Params:
            data = advantages(batch.members(*bounds), self.config.gamma, self.config.gae_lambda)
            params = leaves({name: p[slice(*bounds)] for name, p in agents.params.items()})
            trace = unroll(params, inner_lr, [data], self.inner_loss, create_graph=False)
            return detach(trace[-1])

        blocks = reduce.own(block_bounds(len(batch.valid), self.config.members_per_block))
        parts = reduce.gather(map_blocks(update, blocks, batch.obs.device))
        adapted = {name: torch.cat([part[name] for part in parts]) for name in agents.params}
        check_params(adapted, "adapted")
        return Agents(adapted, {}, agents.num_updates + 1)

    def meta_update(
        self,
        state: State,
        trace: Sequence[Agents],
        batches: Sequence[Trajectory],
        reduce: Reduce = ALONE,
    ) -> tuple[State, Metrics]:
        """One TRPO step on η."""
        c = self.config
        blocks = self.blocks(batches, reduce)
        meta_params = leaves(state["meta_params"])
        start = flatten(detach(meta_params)).double()
        device = start.device
        graphs = map_blocks(lambda block: Linearised.at(self, meta_params, block), blocks, device)
        gradient = reduce.sum(map_blocks(lambda graph: graph.gradient(meta_params), graphs, device))
        start_loss = float(reduce.sum([graph.loss.detach() for graph in graphs]))
        inner = reduce.sum([graph.inner_metrics for graph in graphs])

        def product(vector: Tensor) -> Tensor:
            direction = unflatten(vector, meta_params)
            return reduce.sum(
                map_blocks(
                    lambda graph: graph.fisher_product(meta_params, direction), graphs, device
                )
            )

        old = [graph.dist for graph in graphs]
        evaluate = self.evaluation(meta_params, blocks, old, reduce)
        vector, metrics = trust_region.step(start, start_loss, gradient, product, evaluate, c)
        new = detach(unflatten(vector, meta_params))
        check_params(new, "meta_params")
        shown = dict(zip(INNER_METRICS, inner.tolist(), strict=True))
        return {"meta_params": new}, shown | metrics

    # --- Parts ---

    def split(self, meta_params: Params) -> tuple[Params, Params]:
        """η as (θ, α)."""
        params = {n: p for n, p in meta_params.items() if not n.startswith(INNER_LR)}
        if self.config.learn_inner_lr:
            return params, {name: meta_params[INNER_LR + name] for name in params}
        rate = self.config.inner_lr
        return params, {
            name: torch.full((), rate, dtype=p.dtype, device=p.device) for name, p in params.items()
        }

    def inner_loss(self, params: Params, batch: Batch) -> Tensor:
        """The configured inner loss, [M]."""
        return inner_loss(params, batch, self.config.inner_loss, self.policy)

    def blocks(self, batches: Sequence[Trajectory], reduce: Reduce = ALONE) -> list[Block]:
        """The window's data, cut into blocks of members: those that are this learner's."""
        c = self.config
        score = mean_episode_return(batches[-1])
        centred = (score - score.nanmean()).nan_to_num()
        credit = centred / (centred.square().mean().sqrt() + 1e-8)
        total = len(score)

        def block(bounds: tuple[int, int]) -> Block:
            data = [advantages(b.members(*bounds), c.gamma, c.gae_lambda) for b in batches]
            return Block(data[:-1], data[-1], credit[slice(*bounds)], 1 / total)

        own = reduce.own(block_bounds(total, c.members_per_block))
        return map_blocks(block, own, score.device)

    def adapt(self, meta_params: Params, block: Block, *, create_graph: bool) -> list[Params]:
        """θ_0 … θ_K of a block's members as functions of η."""
        params, inner_lr = self.split(meta_params)
        start = expand_members(params, len(block.credit))
        if not create_graph:
            start = leaves(start)
        return unroll(
            start,
            inner_lr,
            block.support,
            self.inner_loss,
            create_graph=create_graph,
            first_order=self.config.first_order,
        )

    def objective(self, trace: list[Params], dist: Distribution, block: Block) -> Tensor:
        """A block's share of the outer loss: surrogate and, if asked for, exploration term."""
        loss = surrogate(dist, block.query)
        if self.config.exploration > 0.0:
            for params, batch in zip(trace[:-1], block.support, strict=True):
                acting = self.policy.distribution(params, batch.obs)
                log_prob = acting.log_prob(batch.action).view_as(batch.valid) - batch.log_prob
                credit = block.credit * masked_mean(log_prob, batch.valid)
                loss = loss - self.config.exploration * credit
        return loss.sum() * block.share

    def evaluation(
        self,
        like: Params,
        blocks: Sequence[Block],
        old: Sequence[Distribution],
        reduce: Reduce,
    ) -> Callable[[Tensor], tuple[float, float]]:
        """The function of η that a line search looks at: (outer loss, mean KL from `old`)."""

        def of_block(meta_params: Params, block: Block, before: Distribution) -> Tensor:
            trace = self.adapt(meta_params, block, create_graph=False)
            with torch.no_grad():
                dist = self.policy.distribution(trace[-1], block.query.obs)
                loss = self.objective(trace, dist, block)
                kl = before.kl(dist).view_as(block.query.valid)  # type: ignore[arg-type]
                mean_kl = masked_mean(kl, block.query.valid).sum() * block.share
            return torch.stack([loss, mean_kl])

        def evaluate(vector: Tensor) -> tuple[float, float]:
            meta_params = unflatten(vector, like)
            pairs = map_blocks(
                lambda pair: of_block(meta_params, *pair),
                list(zip(blocks, old, strict=True)),
                vector.device,
            )
            loss, kl = reduce.sum(pairs).tolist()
            return loss, kl

        return evaluate


@dataclass(frozen=True)
class Linearised:
    """A block's adaptation around η, with the graphs that all products of an iteration share."""

    loss: Tensor  # [], the block's share of the outer loss
    dist: Distribution  # π_θK at the query observations, detached
    curvature: Curvature  # of π_θK at the query observations, or at some of them, by η
    inner_metrics: Tensor  # by `INNER_METRICS`

    @staticmethod
    def at(learner: MamlTrpo, meta_params: Params, block: Block) -> Linearised:
        """Builds the graphs; `meta_params` must record gradient."""
        trace = learner.adapt(meta_params, block, create_graph=True)
        dist = learner.policy.distribution(trace[-1], block.query.obs)
        before = detached(dist)
        part, acting = block, dist
        if learner.config.curvature_share < 1.0:
            part = block.envs(learner.config.curvature_share)
            adapted = learner.adapt(meta_params, part, create_graph=True)[-1]
            acting = learner.policy.distribution(adapted, part.query.obs)
        valid = part.query.valid.flatten(1)
        weight = valid / valid.sum(1, keepdim=True).clamp_min(1.0) * block.share
        return Linearised(
            loss=learner.objective(trace, dist, block),
            dist=before,
            curvature=Curvature.at(acting, meta_params, weight),
            inner_metrics=inner_metrics(learner, trace, before, block),
        )

    def gradient(self, meta_params: Params) -> Tensor:
        """∇L, [P] float64."""
        return flatten(gradients(self.loss, meta_params, retain_graph=True)).double()

    def fisher_product(self, meta_params: Params, vector: Params) -> Tensor:
        """Jᵀ F J v, [P] float64."""
        return self.curvature.product(meta_params, vector)


def inner_metrics(
    learner: MamlTrpo, trace: list[Params], adapted: Distribution, block: Block
) -> Tensor:
    """A block's share of the means over members, by `INNER_METRICS`, float64.

    The KL is that from θ_0 to θ_K.
    """
    with torch.no_grad():
        batch = block.query
        before = learner.policy.distribution(trace[0], batch.obs)
        kl = before.kl(adapted).view_as(batch.valid)  # type: ignore[arg-type]
        squares = [(trace[1][n] - trace[0][n]).flatten(1).square().sum(1) for n in sorted(trace[0])]
        values = (
            learner.inner_loss(trace[0], block.support[0]),
            torch.stack(squares).sum(0).sqrt(),
            masked_mean(kl, batch.valid),
        )
        return torch.stack([value.sum().double() for value in values]) * block.share

"""MAML of one member at a time, as plainly as it can be written: what the learner must equal.

Shares nothing with `learners` but the data. Values whose gradient the method stops (the detached
log probabilities of the surrogates, the inner gradients of FOMAML) can be given from outside, so
that they stay at their base-point values while η is moved by finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from learners.core.policy_gradient import Batch
from learners.core.trajectory import Params
from learners.maml import Block, MamlTrpo


@dataclass(frozen=True)
class Held:
    """Stopped values of one member, one entry per inner update."""

    log_probs: list[Tensor]
    gradients: list[Params]


def one_member(batch: Batch, member: int) -> Batch:
    """A member's data without axis M."""
    return Batch(*(getattr(batch, name)[member] for name in Batch.__dataclass_fields__))


def distribution(
    learner: MamlTrpo, params: Params, obs: Tensor
) -> torch.distributions.Distribution:
    """The action distribution at `obs` [N, O] under one member's parameters."""
    hidden = obs
    num_layers = len(learner.config.hidden) + 1
    for layer in range(num_layers):
        weight, bias = params[f"layer{layer}.weight"], params[f"layer{layer}.bias"]
        hidden = functional.linear(hidden, weight.mT, bias)
        if layer < num_layers - 1:
            hidden = getattr(torch, learner.config.activation)(hidden)
    if learner.spec.discrete:
        return torch.distributions.Categorical(logits=hidden, validate_args=False)
    deviation = params["log_std"].exp().expand_as(hidden)
    normal = torch.distributions.Normal(hidden, deviation, validate_args=False)
    return torch.distributions.Independent(normal, 1, validate_args=False)


def log_probs(learner: MamlTrpo, params: Params, batch: Batch) -> Tensor:
    """Log probability of a member's actions, [T, E]."""
    dist = distribution(learner, params, batch.obs)
    return dist.log_prob(batch.action).view(batch.valid.shape)


def inner_loss(kind: str, log_prob: Tensor, held: Tensor, batch: Batch) -> Tensor:
    """A member's inner loss; `held` are the stopped log probabilities, [T, E]."""
    gap = torch.where(batch.valid > 0.0, log_prob - held, 0.0)
    if kind == "log_prob":
        credit = log_prob
    elif kind == "likelihood_ratio":
        credit = gap.exp()
    else:
        so_far, rows = torch.zeros_like(gap[0]), []
        for row in gap:
            rows.append((so_far + row).exp() - so_far.exp())
            so_far = so_far + row
        credit = torch.stack(rows)
    return -mean(credit * batch.advantage, batch.valid)


def split(learner: MamlTrpo, meta_params: Params) -> tuple[Params, Params]:
    """η as θ and α."""
    prefix = "inner_lr."
    params = {name: p for name, p in meta_params.items() if not name.startswith(prefix)}
    if learner.config.learn_inner_lr:
        return params, {name: meta_params[prefix + name] for name in params}
    rate = torch.tensor(learner.config.inner_lr, dtype=torch.float64)
    return params, dict.fromkeys(params, rate)


def adapt(
    learner: MamlTrpo, meta_params: Params, support: list[Batch], held: Held | None = None
) -> tuple[list[Params], Held]:
    """θ_0 … θ_K of one member, and the values that are stopped on the way."""
    params, rates = split(learner, meta_params)
    trace = [params]
    used = Held([], [])
    for k, batch in enumerate(support):
        theta = {name: p.detach().clone().requires_grad_() for name, p in trace[-1].items()}
        log_prob = log_probs(learner, theta, batch)
        stopped = log_prob.detach() if held is None else held.log_probs[k]
        loss = inner_loss(learner.config.inner_loss, log_prob, stopped, batch)
        found = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
        grads = dict(zip(theta, found, strict=True))
        if held is not None and learner.config.first_order:
            grads = held.gradients[k]
        used.log_probs.append(stopped)
        used.gradients.append(grads)
        trace.append({name: p - rates[name] * grads[name] for name, p in trace[-1].items()})
    return trace, used


def members_of(blocks: list[Block]) -> list[tuple[list[Batch], Batch, Tensor]]:
    """(support batches, query batch, credit) of every member."""
    return [
        ([one_member(batch, m) for batch in block.support], one_member(block.query, m), credit)
        for block in blocks
        for m, credit in enumerate(block.credit)
    ]


def hold(learner: MamlTrpo, meta_params: Params, blocks: list[Block]) -> list[Held]:
    """The stopped values of every member at η."""
    return [adapt(learner, meta_params, support)[1] for support, _, _ in members_of(blocks)]


def mean(value: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid steps of one member."""
    return value[valid > 0.0].mean()


def objective(
    learner: MamlTrpo, meta_params: Params, blocks: list[Block], held: list[Held] | None = None
) -> Tensor:
    """The outer loss of all members of all blocks."""
    losses = []
    for index, (support, query, credit) in enumerate(members_of(blocks)):
        trace, _ = adapt(learner, meta_params, support, held and held[index])
        ratio = (log_probs(learner, trace[-1], query) - query.log_prob).exp()
        loss = -mean(ratio * query.advantage, query.valid)
        for params, batch in zip(trace[:-1], support, strict=True):
            log_ratio = log_probs(learner, params, batch) - batch.log_prob
            loss = loss - learner.config.exploration * credit * mean(log_ratio, batch.valid)
        losses.append(loss)
    return torch.stack(losses).mean().detach()


def outputs(
    learner: MamlTrpo, meta_params: Params, blocks: list[Block], held: list[Held]
) -> Tensor:
    """The distributions' parameters at the query observations, all members in one vector.

    Per member: mean [N, A] and log σ [A], or normalised logits [N, A].
    """
    parts = []
    for (support, query, _), stopped in zip(members_of(blocks), held, strict=True):
        adapted = adapt(learner, meta_params, support, stopped)[0][-1]
        dist = distribution(learner, adapted, query.obs)
        if learner.spec.discrete:
            parts.append(dist.logits.reshape(-1))
        else:
            parts += [dist.base_dist.mean.reshape(-1), dist.base_dist.stddev[0].log()]
    return torch.cat(parts).detach()


def output_fisher(
    learner: MamlTrpo, meta_params: Params, blocks: list[Block], *, log_std_block: float = 2.0
) -> Tensor:
    """The dense Fisher matrix of `outputs` under the mean over query steps and members."""
    members = members_of(blocks)
    pieces = []
    for support, query, _ in members:
        adapted = adapt(learner, meta_params, support)[0][-1]
        dist = distribution(learner, adapted, query.obs)
        share = query.valid.flatten() / query.valid.sum() / len(members)
        if learner.spec.discrete:
            pieces += [w * (p.diag() - p.outer(p)) for w, p in zip(share, dist.probs, strict=True)]
        else:
            variance = dist.base_dist.variance
            pieces += [w * (1.0 / v).diag() for w, v in zip(share, variance, strict=True)]
            pieces.append(log_std_block * share.sum() * torch.eye(learner.spec.action_size))
    return torch.block_diag(*pieces).double().detach()


def central_differences(
    function: Callable[[Params], Tensor], params: Params, step: float = 1e-5
) -> Params:
    """∂function/∂params by symmetric differences: per entry [its size, size of the result]."""
    slopes = {}
    for name, p in params.items():
        rows = []
        for index in range(p.numel()):
            ends = []
            for sign in (1.0, -1.0):
                moved = p.detach().clone()
                moved.view(-1)[index] += sign * step
                ends.append(function({**params, name: moved}))
            rows.append((ends[0] - ends[1]).reshape(-1) / (2.0 * step))
        slopes[name] = torch.stack(rows)
    return slopes

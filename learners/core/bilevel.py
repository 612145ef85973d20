"""K differentiable inner updates of every member at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from learners.core.params import detach, gradients
from learners.core.trajectory import Params

Batch = TypeVar("Batch")


def sgd_step(params: Params, grads: Params, inner_lr: Params) -> Params:
    """θ' = θ − α ⊙ g. Gradient flows to all three."""
    return {name: p - inner_lr[name] * grads[name] for name, p in params.items()}


def unroll(
    params: Params,
    inner_lr: Params,
    batches: Sequence[Batch],
    loss: Callable[[Params, Batch], object],
    *,
    create_graph: bool,
    first_order: bool = False,
) -> list[Params]:
    """θ_0 … θ_K for K batches.

    Members are independent: the gradient of the sum of their losses is each member's own.

    Args:
        params: θ_0, stacked on M; must record gradient.
        inner_lr: α of every entry, broadcastable to it.
        batches: K batches, one per update.
        loss: per-member losses [M] of parameters and a batch.
        create_graph: whether θ_k keeps its graph back to θ_0 and α.
        first_order: whether the inner gradients are taken as constants in that graph.
    """
    trace = [params]
    for batch in batches:
        total = loss(trace[-1], batch).sum()  # type: ignore[attr-defined]
        grads = gradients(total, trace[-1], create_graph=create_graph and not first_order)
        if first_order or not create_graph:
            grads = detach(grads)
        trace.append(sgd_step(trace[-1], grads, inner_lr))
    return trace

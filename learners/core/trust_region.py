"""A step along the natural gradient inside a trust region (Schulman et al. 2015, TRPO).

Vectors are float64, so that the scalars of the conjugate gradient lose nothing; products may be
computed in single precision behind `product`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""v ↦ A v for a symmetric positive semi-definite A, [P] → [P]."""


@dataclass(frozen=True)
class LineSearch:
    """What the line search found.

    `vector` is the point before the step where `accepted` is False.
    """

    vector: Tensor  # [P]
    accepted: bool
    num_tries: int
    loss: float
    kl: float


def conjugate_gradient(
    product: Product, target: Tensor, num_steps: int, tolerance: float = 1e-10
) -> Tensor:
    """Solves A x = target approximately from x = 0, stopping at ‖residual‖² < tolerance, [P]."""
    solution = torch.zeros_like(target)
    residual = target.clone()
    direction = target.clone()
    squared = residual.dot(residual)
    for _ in range(num_steps):
        if squared < tolerance:
            break
        image = product(direction)
        step = squared / direction.dot(image)
        solution = solution + step * direction
        residual = residual - step * image
        new_squared = residual.dot(residual)
        direction = residual + (new_squared / squared) * direction
        squared = new_squared
    return solution


def scale_to_kl(direction: Tensor, product: Product, max_kl: float) -> Tensor:
    """Scales `direction` so that ½ xᵀ A x = max_kl, [P]; zero where xᵀ A x is not positive."""
    curvature = direction.dot(product(direction))
    if not curvature > 0.0:
        return torch.zeros_like(direction)
    return direction * (2.0 * max_kl / curvature).sqrt()


def line_search(
    evaluate: Callable[[Tensor], tuple[float, float]],
    start: Tensor,
    step: Tensor,
    start_loss: float,
    max_kl: float,
    ratio: float,
    max_tries: int,
) -> LineSearch:
    """Backtracks along start − ratioʲ · step until the loss falls and the KL is within `max_kl`.

    Args:
        evaluate: point [P] ↦ (loss, KL to the policy at `start`).
        start: the point before the step, [P]; returned unchanged if no try is accepted.
        step: the full step, [P].
        start_loss: the loss at `start`.
        max_kl: δ.
        ratio: shrinkage of each further try.
        max_tries: the largest number of tries.
    """
    for attempt in range(max_tries):
        candidate = start - ratio**attempt * step
        loss, kl = evaluate(candidate)
        if loss < start_loss and kl <= max_kl:
            return LineSearch(candidate, True, attempt + 1, loss, kl)
    return LineSearch(start, False, max_tries, start_loss, 0.0)

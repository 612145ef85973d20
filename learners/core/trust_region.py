"""A step along the natural gradient inside a trust region (Schulman et al. 2015, TRPO).

Vectors are float64, so that the scalars of the conjugate gradient lose nothing; products may be
computed in single precision behind `product`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learners.core.contract import check_params
from learners.core.params import flatten, gradients
from learners.core.policy import Distribution, detached
from learners.core.trajectory import Metrics, Params

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


class Settings(Protocol):
    """What a step needs of a configuration."""

    @property
    def max_kl(self) -> float:
        """δ, largest mean KL divergence of a step."""
        ...

    @property
    def cg_steps(self) -> int:
        """Products of the conjugate gradient."""
        ...

    @property
    def cg_damping(self) -> float:
        """Added to the diagonal of the curvature."""
        ...

    @property
    def line_search_ratio(self) -> float:
        """Shrinkage of each further try."""
        ...

    @property
    def line_search_tries(self) -> int:
        """The largest number of tries."""
        ...


def step(
    start: Tensor,
    start_loss: float,
    gradient: Tensor,
    product: Product,
    evaluate: Callable[[Tensor], tuple[float, float]],
    settings: Settings,
) -> tuple[Tensor, Metrics]:
    """One whole step: where it leads, [P], and what there is to say of it.

    Args:
        start: θ, [P] float64.
        start_loss: the loss at θ.
        gradient: of the loss at θ, [P] float64.
        product: with the curvature, without damping.
        evaluate: point [P] ↦ (loss, KL to the policy at θ).
        settings: of the step.

    Raises:
        NonFiniteError: loss, gradient or direction are not finite.
    """
    s = settings

    def damped(vector: Tensor) -> Tensor:
        return product(vector) + s.cg_damping * vector

    direction = conjugate_gradient(damped, gradient, s.cg_steps)
    loss = torch.tensor(start_loss)
    check_params({"loss": loss, "gradient": gradient, "direction": direction}, "meta")
    whole = scale_to_kl(direction, damped, s.max_kl)
    found = line_search(
        evaluate, start, whole, start_loss, s.max_kl, s.line_search_ratio, s.line_search_tries
    )
    return found.vector, {
        "meta/loss": found.loss,
        "meta/loss_before": start_loss,
        "meta/grad_norm": float(gradient.norm()),
        "meta/kl": found.kl,
        "meta/step_norm": float((found.vector - start).norm()),
        "meta/line_search_tries": float(found.num_tries),
        "meta/step_accepted": float(found.accepted),
    }


@dataclass(frozen=True)
class Curvature:
    """The Fisher matrix of a policy's mean distribution, as products that share their graphs."""

    dist: Distribution  # detached
    outputs: tuple[Tensor, ...]  # the parameters of `dist`, with graph to the policy's
    probe: tuple[Tensor, ...]  # u, shaped like `outputs`
    pulled: tuple[Tensor, ...]  # Jᵀ u per parameter, with graph to u
    weight: Tensor  # [M, N], share of each step in the mean

    @staticmethod
    def at(dist: Distribution, params: Params, weight: Tensor) -> Curvature:
        """Builds the graphs; `dist` must have gradient to `params`, twice."""
        probe = tuple(torch.zeros_like(output, requires_grad=True) for output in dist.tensors)
        pulled = gradients(dist.tensors, params, probe, create_graph=True)
        return Curvature(detached(dist), dist.tensors, probe, tuple(pulled.values()), weight)

    def product(self, params: Params, vector: Params) -> Tensor:
        """Jᵀ F J v, [P] float64."""
        along = [vector[name] for name in params]
        tangents = torch.autograd.grad(
            self.pulled, self.probe, along, retain_graph=True, materialize_grads=True
        )
        cotangents = self.dist.fisher(tangents, self.weight)
        return flatten(gradients(self.outputs, params, cotangents, retain_graph=True)).double()

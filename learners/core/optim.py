"""Optimizers as values: `init` makes slots, `update` gives new parameters and new slots.

Nothing is changed in place, so that updates can be differentiated: gradient flows from the new
parameters and slots to `params`, `grads` and the slots before, through every step of the rule.
Entries are stacked on M, and every member counts its own updates. A step size is one number, or a
tensor [M] with each member's own.

Where a gradient is exactly zero the derivative of a root would be infinite. RMSProp therefore has
its ε inside the root (as TensorFlow, and not as torch), and Adam takes its second moment as a
constant by default (`stop_second_moment`), as LIRPG's own implementation does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core.trajectory import Params


def own(lr: float | Tensor, p: Tensor) -> float | Tensor:
    """The step size in a shape that multiplies an entry [M, …]."""
    return lr.view(-1, *[1] * (p.ndim - 1)) if isinstance(lr, Tensor) else lr


@dataclass(frozen=True)
class Sgd:
    """θ ← θ − lr · g."""

    def init(self, params: Params) -> Params:
        """No slots."""
        return {}

    def update(
        self, params: Params, grads: Params, slots: Params, lr: float | Tensor
    ) -> tuple[Params, Params]:
        """One step; gradient flows to `params` and `grads`."""
        return {name: p - own(lr, p) * grads[name] for name, p in params.items()}, slots


@dataclass(frozen=True)
class RMSProp:
    """ms ← ρ ms + (1 − ρ) g²;  θ ← θ − lr · g / √(ms + ε).

    `initial` is ms before the first update: 1 in TensorFlow, which makes the first few hundred
    steps small; 0 in torch.
    """

    decay: float = 0.99
    eps: float = 1e-5
    initial: float = 1.0

    def init(self, params: Params) -> Params:
        """The slot ms of every entry."""
        return {f"ms.{name}": torch.full_like(p, self.initial) for name, p in params.items()}

    def update(
        self, params: Params, grads: Params, slots: Params, lr: float | Tensor
    ) -> tuple[Params, Params]:
        """One step; gradient flows to `params` and `grads`, also through ms."""
        new, kept = {}, {}
        for name, p in params.items():
            grad = grads[name]
            square = torch.lerp(grad.square(), slots[f"ms.{name}"], self.decay)
            new[name] = p - own(lr, p) * grad / (square + self.eps).sqrt()
            kept[f"ms.{name}"] = square
        return new, kept

    def slope(self, grads: Params, slots: Params, lr: float) -> Params:
        """Derivative of each new parameter by its own gradient; `slots` as after the step."""
        slopes = {}
        for name, grad in grads.items():
            inverse = (slots[f"ms.{name}"] + self.eps).rsqrt()
            share = (1.0 - self.decay) * (grad * inverse).square()
            slopes[name] = -lr * (1.0 - share) * inverse
        return slopes


@dataclass(frozen=True)
class Adam:
    """m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  θ ← θ − lr · m̂ / (√v̂ + ε).

    m̂ and v̂ are m / (1 − β₁ᵗ) and v / (1 − β₂ᵗ) after t updates (Kingma and Ba 2015).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    stop_second_moment: bool = True

    def init(self, params: Params) -> Params:
        """M and v of every entry at 0, and t of every member."""
        zeros = {f"{s}.{name}": torch.zeros_like(p) for name, p in params.items() for s in "mv"}
        first = next(iter(params.values()))
        return zeros | {"t": torch.zeros(len(first), dtype=torch.int64, device=first.device)}

    def update(
        self, params: Params, grads: Params, slots: Params, lr: float | Tensor
    ) -> tuple[Params, Params]:
        """One step; gradient flows to `params` and `grads`, to v only if that is not stopped."""
        t = slots["t"] + 1
        new, kept = {}, {"t": t}
        for name, p in params.items():
            grad = grads[name]
            square = (grad.detach() if self.stop_second_moment else grad).square()
            m = torch.lerp(grad, slots[f"m.{name}"], self.beta1)
            v = torch.lerp(square, slots[f"v.{name}"], self.beta2)
            new[name] = p - own(lr, p) * m / self.divisor(v, t)
            kept[f"m.{name}"], kept[f"v.{name}"] = m, v
        return new, kept

    def slope(self, grads: Params, slots: Params, lr: float) -> Params:
        """As `RMSProp.slope`; v has to be stopped."""
        assert self.stop_second_moment
        step = -lr * (1.0 - self.beta1)
        return {name: step / self.divisor(slots[f"v.{name}"], slots["t"]) for name in grads}

    def divisor(self, v: Tensor, t: Tensor) -> Tensor:
        """(1 − β₁ᵗ) (√v̂ + ε)."""
        powers = t.double().view(-1, *[1] * (v.ndim - 1))
        scale1, scale2 = 1.0 - self.beta1**powers, 1.0 - self.beta2**powers
        return v.sqrt() * (scale1 / scale2.sqrt()).to(v.dtype) + (scale1 * self.eps).to(v.dtype)


Optimizer = Sgd | RMSProp | Adam

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Sgd(),
    "rmsprop": RMSProp(decay=0.99, eps=1e-5, initial=0.0),
    "adam": Adam(eps=1e-5),
}
"""By the names of `learners.config.OPTIMIZER_NAMES`."""


def clip_by_norm(grads: Params, max_norm: float) -> tuple[Params, Tensor]:
    """Scales each member's gradients down to a Euclidean norm over all entries, in the graph.

    Returns:
        The clipped gradients, and the norm of each member before, [M]. Gradient flows to `grads`,
        also through the norm; it is finite where a gradient is zero.
    """
    squares = [grads[name].flatten(1).square().sum(1) for name in sorted(grads)]
    norm = (torch.stack(squares).sum(0) if len(squares) > 1 else squares[0]).clamp_min(1e-24).sqrt()
    factor = max_norm / norm.clamp_min(max_norm)
    shaped = {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in grads.items()}
    return shaped, norm.detach()


def clip_pullback(cotangent: Params, grads: Params, norm: Tensor, max_norm: float) -> Params:
    """A cotangent of what `clip_by_norm` gives for `grads`, as one of these."""
    along = torch.stack([(cotangent[n] * g).flatten(1).sum(1) for n, g in grads.items()]).sum(0)
    factor = max_norm / norm.clamp_min(max_norm)
    inward = factor * (norm > max_norm) * along / norm.square()
    pulled = {}
    for name, g in grads.items():
        shape = (-1, *[1] * (g.ndim - 1))
        pulled[name] = cotangent[name] * factor.view(shape) - g * inward.view(shape)
    return pulled

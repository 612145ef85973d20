"""Stochastic policies: a perceptron that gives the parameters of an action distribution.

Actors and learners call the same functions. N stands for any number of observations of one
member; every tensor has a leading axis M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core.networks import init_mlp, mlp
from learners.core.trajectory import Params, Spec

MIN_LOG_STD = math.log(1e-6)
LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions over A action dimensions."""

    mean: Tensor  # [M, N, A]
    log_std: Tensor  # [M, 1, A]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The distribution's parameters."""
        return (self.mean, self.log_std)

    def sample(self, noise: Tensor) -> Tensor:
        """Actions [M, N, A] from standard normal `noise` [M, N, A]."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density summed over action dimensions, [M, N]."""
        scaled = (action - self.mean) * torch.exp(-self.log_std)
        return -0.5 * scaled.square().sum(-1) - (self.log_std + LOG_SQRT_2PI).sum(-1)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self ‖ other), [M, N]."""
        ratio = torch.exp(2.0 * (self.log_std - other.log_std))
        shift = (self.mean - other.mean) * torch.exp(-other.log_std)
        return (other.log_std - self.log_std + 0.5 * (ratio + shift.square() - 1.0)).sum(-1)

    def fisher(self, tangents: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Σ_n weight_n · F_n · tangent, F_n the Fisher matrix of step n in (mean, log_std).

        Args:
            tangents: like `tensors`.
            weight: [M, N].

        Returns:
            Cotangents shaped like `tensors`. F is 1/σ² for the mean and 2 for log σ.
        """
        mean_tangent, log_std_tangent = tangents
        precision = torch.exp(-2.0 * self.log_std)
        total = weight.sum(1)[:, None, None]
        return (mean_tangent * precision * weight.unsqueeze(-1), 2.0 * log_std_tangent * total)


@dataclass(frozen=True)
class Categorical:
    """A distribution over A discrete actions."""

    logits: Tensor  # [M, N, A], normalised

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The distribution's parameters."""
        return (self.logits,)

    def sample(self, noise: Tensor) -> Tensor:
        """Actions [M, N] int64 from Gumbel `noise` [M, N, A]."""
        return (self.logits + noise).argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log probability, [M, N]."""
        return self.logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self ‖ other), [M, N]."""
        return (self.logits.exp() * (self.logits - other.logits)).sum(-1)

    def fisher(self, tangents: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Like `Gaussian.fisher`; F is diag(p) − p pᵀ for the logits of probabilities p."""
        (tangent,) = tangents
        prob = self.logits.exp()
        centred = tangent - (prob * tangent).sum(-1, keepdim=True)
        return (prob * centred * weight.unsqueeze(-1),)


Distribution = Gaussian | Categorical


@dataclass(frozen=True)
class Policy:
    """A perceptron policy: how its parameters begin and what they mean.

    Attributes:
        spec: sizes of observation and action.
        hidden: widths of the hidden layers.
        activation: nonlinearity of the hidden layers, "tanh" or "relu".
        init_std: standard deviation of a new Gaussian policy, in units of the action.
    """

    spec: Spec
    hidden: tuple[int, ...]
    activation: str
    init_std: float

    def init(self, generator: torch.Generator) -> Params:
        """Parameters of one policy, without axis M; log σ does not depend on the observation."""
        params = init_mlp([self.spec.obs_size, *self.hidden, self.spec.action_size], generator)
        if not self.spec.discrete:
            params["log_std"] = torch.full((self.spec.action_size,), math.log(self.init_std))
        return params

    def distribution(self, params: Params, obs: Tensor) -> Distribution:
        """The action distribution at `obs` [M, N, O]. Gradient flows to `params` and `obs`."""
        output = mlp(params, obs, self.activation)
        if self.spec.discrete:
            return Categorical(output.log_softmax(-1))
        return Gaussian(output, params["log_std"].clamp_min(MIN_LOG_STD).unsqueeze(1))

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Noise for `sample`, [*shape, A]: normal, or Gumbel for discrete actions."""
        if self.spec.discrete:
            exponential = torch.empty(*shape, self.spec.action_size)
            return -torch.log(exponential.exponential_(generator=generator))
        return torch.randn(*shape, self.spec.action_size, generator=generator)

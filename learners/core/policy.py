"""Stochastic policies: a network that gives the parameters of an action distribution.

Actors and learners call the same functions. N stands for any number of observations of one
member; every tensor has a leading axis M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core.networks import (
    ACTIVATIONS,
    Init,
    convolve,
    features,
    head,
    init_cnn,
    init_mlp,
    num_layers,
)
from learners.core.normalizer import Normalizer, normalization, normalize_obs
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

    def entropy(self) -> Tensor:
        """Differential entropy, [M, 1]: the same at every observation."""
        return (self.log_std + (LOG_SQRT_2PI + 0.5)).sum(-1)

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
            Cotangents shaped like `tensors`. F is 1/σ² for the mean and 2 for log σ, whose axis M
            may be 1 where all members share it.
        """
        mean_tangent, log_std_tangent = tangents
        precision = torch.exp(-2.0 * self.log_std)
        total = weight.sum(1)[:, None, None]
        by_log_std = (2.0 * log_std_tangent * total).sum_to_size(log_std_tangent.shape)
        return (mean_tangent * precision * weight.unsqueeze(-1), by_log_std)


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

    def entropy(self) -> Tensor:
        """Entropy in nats, [M, N]."""
        return -(self.logits.exp() * self.logits).sum(-1)

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


def detached(dist: Distribution) -> Distribution:
    """The same distributions without their graph."""
    return type(dist)(*(tensor.detach() for tensor in dist.tensors))


@dataclass(frozen=True)
class StochasticPolicy:
    """What any network's outputs mean for actions, and how they are drawn.

    Attributes:
        spec: sizes of observation and action.
    """

    spec: Spec

    def spread(self, std: float) -> Params:
        """The entry log σ of a Gaussian policy without axis M; none where actions are discrete."""
        size = self.spec.action_size
        return {} if self.spec.discrete else {"log_std": torch.full((size,), math.log(std))}

    def from_outputs(self, params: Params, outputs: Tensor) -> Distribution:
        """The action distribution given the network's outputs [M, N, A]."""
        if self.spec.discrete:
            return Categorical(outputs.log_softmax(-1))
        return Gaussian(outputs, params["log_std"].clamp_min(MIN_LOG_STD).unsqueeze(1))

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Noise for `sample`, [*shape, A]: normal, or Gumbel for discrete actions."""
        if self.spec.discrete:
            return gumbel((*shape, self.spec.action_size), generator)
        return torch.randn(*shape, self.spec.action_size, generator=generator)


@dataclass(frozen=True)
class Policy(StochasticPolicy):
    """A perceptron policy, or a convolutional one for pixels: what its parameters mean.

    Attributes:
        hidden: widths of the hidden layers; pixels have the layers of Mnih et al. 2015 instead.
        activation: nonlinearity of the hidden layers, "tanh" or "relu".
        init_std: standard deviation of a new Gaussian policy, in units of the action.
        init_weights: how weights begin.
        head_gain: of the last layer's weights, where these are orthogonal.
        normalizer: what of the observations and rewards is normalized when acting.
    """

    hidden: tuple[int, ...]
    activation: str
    init_std: float
    init_weights: Init = "xavier"
    head_gain: float = 1.0
    normalizer: Normalizer | None = None

    def init(self, generator: torch.Generator) -> Params:
        """Parameters of one policy, without axis M; log σ does not depend on the observation."""
        spec = self.spec
        if spec.image is not None:
            params = init_cnn(spec.image, spec.action_size, generator, self.head_gain)
        else:
            sizes = [spec.obs_size, *self.hidden, spec.action_size]
            params = init_mlp(sizes, generator, self.init_weights, self.head_gain)
        return params | self.spread(self.init_std)

    def template(self) -> Params:
        """Every entry of one member's published parameters, statistics included."""
        params = self.init(torch.Generator())
        if self.normalizer is not None:
            statistics = self.normalizer.init(1, self.spec.obs_size)
            params |= {n: p[0] for n, p in self.normalizer.entries(statistics).items()}
        return params

    def distribution(self, params: Params, obs: Tensor) -> Distribution:
        """The action distribution at raw `obs` [M, N, O]. Gradient flows to `params` and `obs`."""
        return self.read_out(params, self.features(params, normalize_obs(params, obs)))

    def features(self, params: Params, obs: Tensor) -> Tensor:
        """The last hidden layer at normalized `obs`, [M, N, width]."""
        if self.spec.image is not None:
            obs = convolve(params, obs, self.spec.image)
        return features(params, obs, "relu" if self.spec.image else self.activation)

    def read_out(self, params: Params, hidden: Tensor) -> Distribution:
        """The action distribution given the last hidden layer."""
        return self.from_outputs(params, head(params, hidden))

    def acting(self, params: Params) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function of raw `obs` [M, N, O] and `noise` that gives actions and outputs [M, N, A].

        Actions are those of `distribution(params, obs).sample(noise)` to the bit, outputs what
        `from_outputs` takes. What depends on `params` alone is prepared, since with few
        observations it is most of the work. For calls without gradient.
        """
        outputs = self._prepared_network(params)
        if self.spec.discrete:

            def choose(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
                scores = outputs(obs)
                return Categorical(scores.log_softmax(-1)).sample(noise), scores

            return choose
        std = params["log_std"].clamp_min(MIN_LOG_STD).unsqueeze(1).exp()

        def act(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            mean = outputs(obs)
            return mean + std * noise, mean

        return act

    def _prepared_network(self, params: Params) -> Callable[[Tensor], Tensor]:
        """The network's outputs [M, N, A] as a function of raw observations [M, N, O]."""
        if self.spec.image is not None or self.spec.action_size == 1:
            return lambda obs: head(params, self.features(params, normalize_obs(params, obs)))
        normalize, activation = normalization(params), ACTIVATIONS[self.activation]
        *hidden_layers, (last_bias, last_weight) = [
            (params[f"layer{layer}.bias"].unsqueeze(1), params[f"layer{layer}.weight"])
            for layer in range(num_layers(params))
        ]

        def outputs(obs: Tensor) -> Tensor:
            hidden = normalize(obs)
            for bias, weight in hidden_layers:
                hidden = activation(torch.baddbmm(bias, hidden, weight))
            return torch.baddbmm(last_bias, hidden, last_weight)

        return outputs


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gumbel noise: what turns the choice of the largest logit into a draw of a softmax."""
    return -torch.log(torch.empty(*shape).exponential_(generator=generator))

"""Hyper-parameters of the actor-critic methods, and what others share with them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from learners.configs.checks import (
    ACTIVATIONS,
    Activation,
    OptimizerName,
    check_minibatches,
    check_number,
    check_optimizer,
    check_positive,
    check_whole,
)
from learners.core.errors import ConfigError


@dataclass(frozen=True)
class ActorCriticSettings:
    """What the actor-critic methods share."""

    gamma: float = 0.99
    """γ, discount per environment step."""
    num_steps: int = 5
    """T, steps of each environment between two updates."""
    lr: float = 7e-4
    """Step size of policy and value."""
    lr_decay_updates: int = 0
    """Updates after which the step size has fallen linearly to 0; 0 keeps it constant."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this Euclidean norm."""
    normalize_obs: bool = False
    """Observations are shifted and scaled by their running mean and deviation, clipped to ±10."""
    normalize_reward: bool = False
    """Rewards are divided by the running deviation of the discounted return, clipped to ±10."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of policy and value; pixels have a fixed network."""
    activation: Activation = "tanh"
    """Nonlinearity of the hidden layers."""
    init_std: float = 1.0
    """Standard deviation of the untrained Gaussian policy, in units of the action."""
    members_per_block: int = 0
    """Replicas computed together, 0 for all at once. Blocks run side by side on the learner's
    threads, and are what several learners share out."""
    value_gain: float = 1.0
    """Size of the untrained value: scale of its last layer. An agent that bootstraps follows the
    differences of the first values, whatever they are; near 0 there are none."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        check_whole("num_steps", self.num_steps)
        for width in self.hidden:
            check_whole("hidden", width)
        for name in ("lr", "max_grad_norm", "init_std"):
            check_positive(name, getattr(self, name))
        check_number("gamma", self.gamma, 0.0, 1.0)
        for name in ("value_coef", "entropy_coef", "value_gain"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        for name in ("lr_decay_updates", "members_per_block"):
            if getattr(self, name) != 0:
                check_whole(name, getattr(self, name))
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {ACTIVATIONS}, not {self.activation!r}")


@dataclass(frozen=True)
class A2cConfig(ActorCriticSettings):
    """Advantage actor-critic (Mnih et al. 2016) with V-trace (Espeholt et al. 2018)."""

    entropy_coef: float = 0.01
    max_rho: float = 1.0
    """Upper bound of V-trace's importance weight of a step."""
    optimizer: OptimizerName = "rmsprop"
    """What makes steps of gradients."""
    bootstrap: bool = True
    """Whether the value stands for the rewards after the chunk; without it they count as 0."""
    lookahead: int = 0
    """Rewards that a return adds up, without bootstrapping; 0 for all of the chunk."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_positive("max_rho", self.max_rho)
        check_optimizer("optimizer", self.optimizer)
        if self.lookahead != 0:
            check_whole("lookahead", self.lookahead)
        if self.lookahead > self.num_steps:
            raise ConfigError(
                f"lookahead must lie in [0, num_steps = {self.num_steps}], not {self.lookahead}"
            )
        if self.lookahead != 0 and self.bootstrap:
            raise ConfigError("lookahead does not bootstrap: set bootstrap to False")


@dataclass(frozen=True)
class TdLambdaConfig(ActorCriticSettings):
    """Linear TD(λ): the value of a given policy (Sutton and Barto 2018, section 12.2)."""

    num_steps: int = 16
    lr: float = 0.1
    hidden: tuple[int, ...] = ()
    trace_decay: float = 0.9
    """λ, what is left of a trace after a step, beside γ."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_number("trace_decay", self.trace_decay, 0.0, 1.0)
        if self.hidden or self.normalize_obs or self.normalize_reward:
            raise ConfigError(
                "td-lambda is linear in what it sees: hidden must be (), and normalize_obs and "
                "normalize_reward off"
            )


@dataclass(frozen=True)
class PpoConfig(ActorCriticSettings):
    """Proximal policy optimization (Schulman et al. 2017)."""

    num_steps: int = 2048
    lr: float = 3e-4
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    num_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 32
    """Minibatches of a pass."""
    clip_ratio: float = 0.2
    """Half-width of the interval around 1 in which the probability ratio has gradient."""
    reward_bonus: float = 0.0
    """Added to every step's reward: the constant bonus that learned rewards are compared with."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_minibatches(self.num_epochs, self.num_minibatches)
        check_number("gae_lambda", self.gae_lambda, 0.0, 1.0)
        check_positive("clip_ratio", self.clip_ratio)
        check_number("reward_bonus", self.reward_bonus, -10.0, 10.0)

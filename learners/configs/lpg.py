"""Hyper-parameters of LPG and of the agents that its rules teach."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, get_args

from learners.configs.checks import check_number, check_positive, check_whole
from learners.core.errors import ConfigError

Teacher = Literal["rule", "a2c", "reinforce", "none"]
TEACHERS = get_args(Teacher)


@dataclass(frozen=True)
class LifetimeSettings:
    """What agents are, whoever teaches them, and what a rule is."""

    num_steps: int = 20
    """T, steps of each environment between two updates."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the agents' hidden layers, where their world is not tabular."""
    channels: int = 0
    """Channels of a convolution of 3 × 3 below these layers, on pixels; 0 for none."""
    gamma: float = 0.995
    """γ, discount per environment step; the rule sees it."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    max_grad_norm: float = 0.5
    """Agents' gradients are scaled down to this Euclidean norm."""
    critic_rate: float = 0.3
    """Part of the way to the mean return that a tabular critic moves a visited state."""
    critic_lr: float = 1e-3
    """Step size of critics with networks."""
    members_per_block: int = 8
    """Members updated together. Blocks run side by side on the learner's threads."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy in what an agent ascends, beside what its teacher says."""
    rule_width: int = 256
    """Width of the rule's LSTM."""
    num_predictions: int = 30
    """m, outcomes of the prediction y."""
    embedding_width: int = 16
    """Width of φ, which makes a number of a prediction."""
    sees_lifetime: bool = False
    """Whether n/N and log N are inputs of the rule (Jackson et al. 2024)."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        for name in (
            "num_steps",
            "members_per_block",
            "rule_width",
            "num_predictions",
            "embedding_width",
        ):
            check_whole(name, getattr(self, name))
        for width in self.hidden:
            check_whole("hidden", width)
        check_number("channels", self.channels, 0, sys.maxsize)
        for name in ("max_grad_norm", "critic_lr"):
            check_positive(name, getattr(self, name))
        for name in ("gamma", "gae_lambda", "critic_rate"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_number("entropy_coef", self.entropy_coef, 0.0, sys.float_info.max)


@dataclass(frozen=True)
class LpgConfig(LifetimeSettings):
    """A learned update rule (Oh et al. 2020), meta-trained over a population of lifetimes."""

    num_inner_updates: int = 5
    """K, updates of an agent in a window, each on T steps."""
    meta_lr: float = 1e-4
    """β, step size of the rule."""
    meta_lr_decay_updates: int = 0
    """Updates after which that step size has fallen linearly to 0; 0 keeps it constant."""
    meta_max_grad_norm: float = 1.0
    """Meta-gradients are scaled down to this Euclidean norm."""
    policy_entropy_coef: float = 0.01
    """β₀, weight of the policy's entropy in the outer loss."""
    y_entropy_coef: float = 0.001
    """β₁, weight of the prediction's entropy in the outer loss."""
    pi_hat_coef: float = 0.001
    """β₂, weight of mean π̂² in the outer loss."""
    y_hat_coef: float = 0.001
    """β₃, weight of mean ‖ŷ‖² in the outer loss."""
    tabular_lrs: tuple[float, ...] = (20.0, 40.0, 80.0)
    """Step sizes that agents on tables are given."""
    network_lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3)
    """Step sizes that agents with networks are given."""
    alpha_ys: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Weights of the prediction's update that agents are given."""
    tabular_updates: int = 2500
    """N, updates of a lifetime on tables."""
    network_updates: int = 25000
    """N, updates of a lifetime in networks."""
    evaluation_updates: int = 500
    """Updates of a lifetime of an evaluation."""
    adam_per_lifetime: bool = False
    """Each lifetime's meta-gradient passes through an Adam of its own before the average, as in
    DiscoRL; members_per_block must be 1."""
    outer_every_update: bool = False
    """The outer loss is of τ_1 … τ_K, each under the θ_k that it was collected with, and not of τ_K
    alone: the same steps tell of K (K + 1) / 2 pairs of an update and what came of it, not of K."""
    imitation_coef: float = 0.0
    """Weight in the outer loss of mean (π̂ − Â)², Â being the critic's advantage: the rule is shown
    what a hand-written one would say."""
    ema_advantage: bool = False
    """Advantages of the outer loss are normalised by moments over time and not over the batch, as
    in DiscoRL."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        for name in (
            "num_inner_updates",
            "tabular_updates",
            "network_updates",
            "evaluation_updates",
        ):
            check_whole(name, getattr(self, name))
        if self.meta_lr_decay_updates != 0:
            check_whole("meta_lr_decay_updates", self.meta_lr_decay_updates)
        for name in ("meta_lr", "meta_max_grad_norm"):
            check_positive(name, getattr(self, name))
        for name in (
            "policy_entropy_coef",
            "y_entropy_coef",
            "pi_hat_coef",
            "y_hat_coef",
            "imitation_coef",
        ):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        for name in ("tabular_lrs", "network_lrs", "alpha_ys"):
            if not getattr(self, name):
                raise ConfigError(f"{name} needs at least one value")
            for value in getattr(self, name):
                check_positive(name, value)
        if self.adam_per_lifetime and self.members_per_block != 1:
            raise ConfigError(
                "adam_per_lifetime needs every lifetime's own meta-gradient: set members_per_block "
                f"to 1, not {self.members_per_block}"
            )


@dataclass(frozen=True)
class LpgAgentConfig(LifetimeSettings):
    """Agents that a rule of LPG teaches, or a hand-written rule in its place."""

    teacher: Teacher = "rule"
    """rule: a learned one, see `rule`. a2c: the advantage. reinforce: the rewards that follow.
    none: nobody, the policy stays as it begins, but for its entropy."""
    rule: str = ""
    """Folder that `metaloop export` wrote; of no effect with another teacher."""
    tabular_lr: float = 40.0
    """Step size of agents on tables."""
    network_lr: float = 1e-3
    """Step size of agents with networks."""
    alpha_y: float = 0.5
    """Weight of the prediction's update."""
    lifetime_updates: int = 2500
    """N of a rule that sees lifetimes."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_whole("lifetime_updates", self.lifetime_updates)
        for name in ("tabular_lr", "network_lr", "alpha_y"):
            check_positive(name, getattr(self, name))
        if self.teacher not in TEACHERS:
            raise ConfigError(f"teacher must be one of {TEACHERS}, not {self.teacher!r}")

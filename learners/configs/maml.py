"""Hyper-parameters of MAML."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, get_args

from learners.configs.checks import (
    ACTIVATIONS,
    Activation,
    check_number,
    check_positive,
    check_whole,
)
from learners.core.errors import ConfigError

InnerLoss = Literal["log_prob", "likelihood_ratio", "dice"]
INNER_LOSSES = get_args(InnerLoss)


@dataclass(frozen=True)
class MamlTrpoConfig:
    """MAML with TRPO as the outer optimizer (Finn et al. 2017) and its variants."""

    inner_lr: float = 0.1
    """α, step size of an inner update; the starting value where it is learned."""
    num_inner_updates: int = 1
    """K, inner updates before the query batch."""
    inner_loss: InnerLoss = "log_prob"
    """Inner objective. All three have the same gradient; the last two keep the term of the second
    derivative that log_prob drops (Foerster et al. 2018, Rothfuss et al. 2019)."""
    first_order: bool = False
    """FOMAML: inner gradients are constants in the meta-gradient."""
    learn_inner_lr: bool = False
    """Meta-SGD (Li et al. 2017): one learned α per parameter."""
    exploration: float = 0.0
    """Weight of E-MAML's term (Stadie et al. 2018) that credits the data before adaptation."""
    gamma: float = 0.99
    """γ, discount per environment step."""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation."""
    max_kl: float = 0.01
    """δ, largest mean KL divergence of an outer step."""
    cg_steps: int = 10
    """Products of the conjugate gradient."""
    cg_damping: float = 1e-5
    """Added to the diagonal of the curvature."""
    curvature_share: float = 1.0
    """Share of each member's environments whose steps the curvature is taken from. The gradient,
    and what the line search looks at, are those of all."""
    line_search_ratio: float = 0.8
    """Shrinkage of each further try of the line search."""
    line_search_tries: int = 15
    """Largest number of tries."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the policy's hidden layers."""
    activation: Activation = "tanh"
    """Nonlinearity of the hidden layers."""
    init_std: float = 1.0
    """Standard deviation of the untrained Gaussian policy, in units of the action."""
    members_per_block: int = 5
    """Members differentiated together. Blocks run side by side on the learner's threads."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        for name in ("num_inner_updates", "cg_steps", "line_search_tries", "members_per_block"):
            check_whole(name, getattr(self, name))
        for width in self.hidden:
            check_whole("hidden", width)
        for name in ("inner_lr", "max_kl", "init_std"):
            check_positive(name, getattr(self, name))
        check_positive("curvature_share", self.curvature_share)
        for name in ("gamma", "gae_lambda", "line_search_ratio", "curvature_share"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("cg_damping", "exploration"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        for name, allowed in (("inner_loss", INNER_LOSSES), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")

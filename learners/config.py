"""Hyper-parameters of each learner. Free of torch, so that the command line starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from learners.core.errors import ConfigError


@dataclass(frozen=True)
class MamlTrpoConfig:
    """MAML with TRPO as the outer optimizer (Finn et al. 2017) and its variants."""

    inner_lr: float = 0.1
    """α, step size of an inner update; the starting value where it is learned."""
    num_inner_updates: int = 1
    """K, inner updates before the query batch."""
    inner_loss: Literal["log_prob", "likelihood_ratio", "dice"] = "log_prob"
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
    line_search_ratio: float = 0.8
    """Shrinkage of each further try of the line search."""
    line_search_tries: int = 15
    """Largest number of tries."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the policy's hidden layers."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity of the hidden layers."""
    init_std: float = 1.0
    """Standard deviation of the untrained Gaussian policy, in units of the action."""
    members_per_block: int = 5
    """Members differentiated together. Blocks run side by side on the learner's threads."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        positive = ["inner_lr", "num_inner_updates", "max_kl", "cg_steps", "init_std"]
        for name in [*positive, "line_search_tries", "members_per_block"]:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("gamma", "gae_lambda", "line_search_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("cg_damping", "exploration"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")

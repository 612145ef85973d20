"""Hyper-parameters of RL²."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, get_args

from learners.configs.checks import check_minibatches, check_number, check_positive, check_whole
from learners.core.errors import ConfigError

Outer = Literal["ppo", "trpo"]
OUTERS = get_args(Outer)


@dataclass(frozen=True)
class Rl2Config:
    """RL²: a recurrent policy that learns inside a trial (Duan et al. 2016)."""

    outer: Outer = "ppo"
    """How the policy learns: ppo, or trpo as in the paper. The value's epochs are the same."""
    gamma: float = 0.99
    """γ, discount per environment step, the ends of inner episodes notwithstanding."""
    gae_lambda: float = 0.3
    """λ of generalised advantage estimation."""
    num_epochs: int = 8
    """Passes over a batch of trials."""
    num_minibatches: int = 10
    """Minibatches of a pass, each of whole trials."""
    clip_ratio: float = 0.1
    """Half-width of the interval around 1 in which the probability ratio has gradient."""
    lr: float = 2e-4
    """Step size of policy and value."""
    lr_decay_updates: int = 0
    """Updates after which the step size has fallen linearly to 0; 0 keeps it constant."""
    weight_decay: float = 0.0
    """w, share of the parameters, times the step size, that every step takes away."""
    value_coef: float = 1.0
    """Weight of the value loss."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    entropy_decay_updates: int = 0
    """Updates after which that weight has fallen linearly to 0; 0 keeps it constant."""
    standardise_advantages: bool = True
    """Whether a batch's advantages are given mean 0 and deviation 1."""
    max_grad_norm: float = 1.0
    """Gradients of each network are scaled down to this Euclidean norm."""
    width: int = 256
    """Units of the GRU of the policy, and of that of the value."""
    init_std: float = 1.0
    """Standard deviation of the untrained Gaussian policy, in units of the action."""
    max_kl: float = 0.01
    """δ of trpo, largest mean KL divergence of a step."""
    cg_steps: int = 10
    """Products of trpo's conjugate gradient."""
    cg_damping: float = 1e-3
    """Added to the diagonal of trpo's curvature."""
    line_search_ratio: float = 0.8
    """Shrinkage of each further try of trpo's line search."""
    line_search_tries: int = 15
    """Its largest number of tries."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        check_minibatches(self.num_epochs, self.num_minibatches)
        for name in ("width", "cg_steps", "line_search_tries"):
            check_whole(name, getattr(self, name))
        if self.outer not in OUTERS:
            raise ConfigError(f"outer must be one of {OUTERS}, not {self.outer!r}")
        check_number("line_search_ratio", self.line_search_ratio, 0.0, 1.0)
        check_positive("max_kl", self.max_kl)
        check_number("cg_damping", self.cg_damping, 0.0, sys.float_info.max)
        for name in ("gamma", "gae_lambda"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("clip_ratio", "lr", "max_grad_norm", "init_std"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "value_coef", "entropy_coef"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        for name in ("lr_decay_updates", "entropy_decay_updates"):
            if getattr(self, name) != 0:
                check_whole(name, getattr(self, name))

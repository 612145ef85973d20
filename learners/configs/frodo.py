"""Hyper-parameters of FRODO."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from learners.configs.actor_critic import ActorCriticSettings
from learners.configs.checks import (
    OptimizerName,
    check_number,
    check_optimizer,
    check_positive,
    check_whole,
)
from learners.core.errors import ConfigError


@dataclass(frozen=True)
class FrodoConfig(ActorCriticSettings):
    """A target that is discovered online by meta-gradients (Xu et al. 2020)."""

    num_inner_updates: int = 5
    """K, inner updates of a window."""
    num_outcome_batches: int = 1
    """Q, batches from the query batch on whose rewards the outer loss waits for."""
    inner_optimizer: OptimizerName = "rmsprop"
    """What makes inner steps of the update direction; its slots live as long as the agent."""
    meta_lr: float = 1e-3
    """Step size of the target network."""
    consistency_coef: float = 0.1
    """c, weight of the consistency of successive targets in the outer loss."""
    residual: bool = False
    """The network adds to V-trace's target instead of replacing it."""
    residual_gain: bool = False
    """Instead of adding to it, the network scales how far V-trace's target lies from V."""
    outer_critic: bool = True
    """The outer loss has a critic of its own, which never sees a learned target; without it the
    agent's value rates the targets that it was trained on, as in the paper."""
    critic_lr: float = 1e-3
    """Step size of the outer critic."""
    outer_value_coef: float = 0.5
    """Weight of the value's error in the outer loss, where a policy is learned."""
    outer_entropy_coef: float = 0.0
    """Weight of the policy's entropy in the outer loss."""
    max_rho: float = 1.0
    """Upper bound of V-trace's importance weight of a step."""
    target_width: int = 32
    """Width of the target network's layers."""
    sees_policies: bool = True
    """Whether the target network sees π(a|s) and μ(a|s)."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        if self.residual_gain and not self.residual:
            raise ConfigError("residual_gain needs residual: there is nothing to scale without")
        for name in ("num_inner_updates", "num_outcome_batches", "target_width"):
            check_whole(name, getattr(self, name))
        for name in ("meta_lr", "critic_lr", "max_rho"):
            check_positive(name, getattr(self, name))
        for name in ("consistency_coef", "outer_value_coef", "outer_entropy_coef"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        check_optimizer("inner_optimizer", self.inner_optimizer)

"""Hyper-parameters of LIRPG."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, get_args

from learners.configs.actor_critic import ActorCriticSettings
from learners.configs.checks import check_minibatches, check_number, check_positive
from learners.core.errors import ConfigError

LirpgForm = Literal["ppo", "a2c"]
LIRPG_FORMS = get_args(LirpgForm)


@dataclass(frozen=True)
class LirpgConfig(ActorCriticSettings):
    """Learned intrinsic rewards for policy gradient (Zheng, Oh and Singh 2018)."""

    form: LirpgForm = "ppo"
    """ppo: clipped ratios, standardised advantages, Adam; for MuJoCo. a2c: neither, RMSProp."""
    num_steps: int = 2048
    lr: float = 3e-4
    meta_lr: float = 1e-4
    """β, step size of the intrinsic reward and the extrinsic value."""
    extrinsic_coef: float = 0.01
    """c_ex, weight of the extrinsic reward in what the policy learns from."""
    intrinsic_coef: float = 1.0
    """c_in, weight of the intrinsic reward in what the policy learns from."""
    extrinsic_value_coef: float = 0.5
    """Weight of the extrinsic value's loss in the outer loss."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation; 1 in the a2c form."""
    num_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 32
    """Minibatches of a pass."""
    clip_ratio: float = 0.2
    """Half-width of PPO's interval; of no effect in the a2c form."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_minibatches(self.num_epochs, self.num_minibatches)
        check_positive("meta_lr", self.meta_lr)
        check_positive("clip_ratio", self.clip_ratio)
        check_number("gae_lambda", self.gae_lambda, 0.0, 1.0)
        for name in ("extrinsic_coef", "intrinsic_coef", "extrinsic_value_coef"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        if self.form not in LIRPG_FORMS:
            raise ConfigError(f"form must be one of {LIRPG_FORMS}, not {self.form!r}")

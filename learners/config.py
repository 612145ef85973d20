"""Hyper-parameters of each learner. Free of torch, so that the command line starts at once."""

from __future__ import annotations

from learners.configs.actor_critic import A2cConfig, ActorCriticSettings, PpoConfig, TdLambdaConfig
from learners.configs.checks import OPTIMIZER_NAMES
from learners.configs.frodo import FrodoConfig
from learners.configs.lirpg import LirpgConfig
from learners.configs.lpg import LifetimeSettings, LpgAgentConfig, LpgConfig
from learners.configs.maml import MamlTrpoConfig
from learners.configs.rl2 import Rl2Config

__all__ = [
    "METHODS",
    "OPTIMIZER_NAMES",
    "A2cConfig",
    "ActorCriticSettings",
    "FrodoConfig",
    "LearnerConfig",
    "LifetimeSettings",
    "LirpgConfig",
    "LpgAgentConfig",
    "LpgConfig",
    "MamlTrpoConfig",
    "PpoConfig",
    "Rl2Config",
    "TdLambdaConfig",
    "method_of",
]

LearnerConfig = (
    MamlTrpoConfig
    | A2cConfig
    | PpoConfig
    | TdLambdaConfig
    | LirpgConfig
    | FrodoConfig
    | LpgConfig
    | LpgAgentConfig
    | Rl2Config
)

METHODS: dict[str, type[LearnerConfig]] = {
    "maml-trpo": MamlTrpoConfig,
    "a2c": A2cConfig,
    "ppo": PpoConfig,
    "td-lambda": TdLambdaConfig,
    "lirpg": LirpgConfig,
    "frodo": FrodoConfig,
    "lpg": LpgConfig,
    "lpg-agent": LpgAgentConfig,
    "rl2": Rl2Config,
}
"""Configurations by the name of their method."""


def method_of(config: LearnerConfig) -> str:
    """The name of a configuration's method."""
    return next(name for name, kind in METHODS.items() if type(config) is kind)

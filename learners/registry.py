"""Learners by the type of their configuration; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from learners.config import LearnerConfig, method_of
from learners.core.contract import Learner
from learners.core.trajectory import Spec

LEARNERS: dict[str, str] = {
    "maml-trpo": "learners.maml:MamlTrpo",
    "a2c": "learners.a2c:A2c",
    "ppo": "learners.ppo:Ppo",
    "td-lambda": "learners.td_lambda:TdLambda",
    "lirpg": "learners.lirpg:Lirpg",
    "frodo": "learners.frodo:Frodo",
    "lpg": "learners.lpg:Lpg",
    "lpg-agent": "learners.lpg_agent:LpgAgent",
    "rl2": "learners.rl2:Rl2",
}


def make_learner(config: LearnerConfig, spec: Spec) -> Learner:
    """The learner that `config` configures, for environments of `spec`."""
    module, name = LEARNERS[method_of(config)].split(":")
    return cast(Learner, getattr(import_module(module), name)(config, spec))

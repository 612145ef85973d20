"""Learners by the type of their configuration; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from learners.config import MamlTrpoConfig
from learners.core.contract import Learner
from learners.core.trajectory import Spec

LEARNERS: dict[type, str] = {MamlTrpoConfig: "learners.maml:MamlTrpo"}


def make_learner(config: MamlTrpoConfig, spec: Spec) -> Learner:
    """The learner that `config` configures, for environments of `spec`."""
    module, name = LEARNERS[type(config)].split(":")
    return cast(Learner, getattr(import_module(module), name)(config, spec))

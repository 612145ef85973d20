"""Small runs of every method, trained when a test first asks for one and exported as often."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from system import exports, run
from system.config import RunConfig, RuntimeConfig
from system.presets import PRESETS

PENDULUM: dict[str, Any] = {"task": "gym:Pendulum-v1", "task_options": {}}
SHORT = {"num_steps": 16, "num_epochs": 1, "num_minibatches": 2, "hidden": (6,)}
TRIAL = {"num_envs": 1, "task_options": {"arms": 3, "pulls": 1, "episodes": 4}}
WORLDS = {"names": "chain-short,random-small-sparse"}

RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "maml-trpo": ("maml-trpo/navigation-2d", {"hidden": (6, 5)}, {}),
    "meta-sgd": ("maml-trpo/navigation-2d", {"hidden": (6, 5), "learn_inner_lr": True}, {}),
    "a2c": ("a2c/cartpole", {"hidden": (6, 5)}, {}),
    "ppo": ("ppo/half-cheetah", SHORT, PENDULUM),
    "lirpg": ("lirpg/delayed-hopper", SHORT, PENDULUM),
    "lirpg-discrete": ("lirpg/delayed-hopper", SHORT, {"task": "catch", "task_options": {}}),
    "frodo": ("frodo/catch", {"hidden": (6, 5), "target_width": 4}, {}),
    "td-lambda": ("td-lambda/random-walk-flip", {}, {}),
    "rl2": ("rl2/bandit", {"width": 4, "num_epochs": 1, "num_minibatches": 2}, TRIAL),
    "lpg-agent": (
        "lpg-agent/chain-short",
        {"teacher": "a2c", "hidden": (4,), "num_predictions": 3, "num_steps": 5},
        {"task_options": WORLDS},
    ),
}
"""Preset, changed settings of the learner, other changes."""


def config_of(name: str) -> RunConfig:
    """The configuration of one of `RUNS`."""
    preset, settings, changes = RUNS[name]
    config = PRESETS[preset]()
    small = {
        "iterations": 2,
        "num_members": 4,
        "num_envs": 2,
        "members_per_slot": 2,
        "eval_every": 0,
        "eval_tasks": 4,
        "log_every": 1,
        "picture_every": 0,
    }
    return replace(
        config,
        learner=replace(config.learner, **settings),
        runtime=RuntimeConfig(backend="serial", device="cpu", learner_threads=1),
        **(small | changes),
    )


class Runs:
    """Folders of `RUNS` below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained = cache(self._trained)

    def _trained(self, name: str) -> Path:
        run.train(config_of(name), self.folder / name)
        return self.folder / name

    def export(self, name: str, member: int | None = None) -> Path:
        """A new export of a run."""
        out = self.folder / "exports" / name / str(member)
        return exports.export(self.trained(name), out, member)

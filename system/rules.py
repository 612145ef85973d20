"""Learned update rules outside of a run: two files that load with torch and safetensors alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actors.tasks import load_family
from learners.config import LpgAgentConfig, LpgConfig, method_of
from learners.core.errors import ConfigError
from learners.core.trajectory import Params
from learners.core.update_rule import UpdateRule
from learners.lpg import Lpg
from system import described_weights, run_folder
from system.config import RunConfig

WEIGHTS, DESCRIPTION = "rule.safetensors", "rule.json"
FORMAT = 1
SHAPE = ("rule_width", "num_predictions", "embedding_width", "sees_lifetime", "gamma")
"""Settings without which the weights mean nothing."""


def export(folder: Path, out: Path | None) -> Path:
    """Writes the rule of a run's newest checkpoint.

    Args:
        folder: of a run of LPG.
        out: where to; by default `rule` in the run's folder.

    Returns:
        The folder with `rule.safetensors` and `rule.json`.

    Raises:
        ConfigError: the run has no rule, or no checkpoint yet.
    """
    config = run_folder.read_config(folder)
    if not isinstance(config.learner, LpgConfig):
        raise ConfigError(
            f"{folder} is a run of {method_of(config.learner)}; what is exported is the rule of a "
            "run of lpg"
        )
    state, counters, _ = run_folder.restore_newest(folder)
    out = out or folder / "rule"
    out.mkdir(parents=True, exist_ok=True)
    said = {
        "format": FORMAT,
        "method": "lpg",
        **{name: getattr(config.learner, name) for name in SHAPE},
        "sha256": described_weights.save(state["meta_params"], out / WEIGHTS),
        "step_sizes": step_sizes(config, state),
        "trained": described_weights.origin(config, counters),
    }
    run_folder.write_json(out / DESCRIPTION, said)
    return out


def step_sizes(config: RunConfig, state: Any) -> dict[str, dict[str, float]]:
    """The step sizes of the highest mean final return in each world."""
    family = load_family(config.task, config.task_options)
    assert isinstance(config.learner, LpgConfig)
    learner = Lpg(config.learner, family.spec)
    worlds = [agent.world for agent in learner.policy.agents]
    _, agents = learner.begin(state, len(worlds), evaluating=True)
    rates = zip(agents.slots["lr"].tolist(), agents.slots["alpha_y"].tolist(), strict=True)
    return {
        world.name: {"lr": lr, "alpha_y": alpha_y}
        for world, (lr, alpha_y) in zip(worlds, rates, strict=True)
    }


def describe(path: Path) -> dict[str, Any]:
    """What is known of an exported rule.

    Raises:
        ConfigError: there is none, or it is of another format.
    """
    return described_weights.read_description(
        path / DESCRIPTION, "rule", FORMAT, ("sha256", *SHAPE)
    )


def load(path: Path) -> Params:
    """The rule's weights, checked against their description.

    Raises:
        ConfigError: the weights are missing, changed, or of other shapes than described.
    """
    said = describe(path)
    rule = UpdateRule.of(LpgConfig(**{name: said[name] for name in SHAPE}))
    like = rule.init(torch.Generator())
    return described_weights.load(path / WEIGHTS, said["sha256"], like, DESCRIPTION)


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with the shape of the rule that it names.

    Raises:
        ConfigError: a rule is wanted and none is named, or what is named is none.
    """
    learner = config.learner
    if not isinstance(learner, LpgAgentConfig) or learner.teacher != "rule":
        return config
    if not learner.rule:
        raise ConfigError(
            "--rule PATH is missing: the folder that `metaloop export RUN` wrote; or take "
            "--teacher a2c"
        )
    said = describe(Path(learner.rule))
    default = LpgAgentConfig()
    for name in SHAPE:
        given = getattr(learner, name)
        if given not in (getattr(default, name), said[name]):
            flag = name.replace("_", "-")
            print(f"--{flag} {given} has no effect: the rule has {said[name]}", file=sys.stderr)
    return replace(config, learner=replace(learner, **{name: said[name] for name in SHAPE}))

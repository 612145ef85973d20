"""Presets of learned update rules: populations in which rules are found."""

from __future__ import annotations

from learners.config import LpgConfig
from system.config import RunConfig, RuntimeConfig

SMALL_WORLDS = "chain-short,random-small-sparse"


def chain_and_small_grids() -> RunConfig:
    """LPG on short delayed chains and small sparse grids: a rule in half an hour on two cores."""
    return RunConfig(
        preset="lpg/chain-and-small-grids",
        task="worlds",
        task_options={"names": SMALL_WORLDS},
        learner=LpgConfig(
            rule_width=64,
            meta_lr=1e-3,
            policy_entropy_coef=0.05,
            tabular_updates=250,
            network_updates=500,
            evaluation_updates=300,
            members_per_block=8,
        ),
        iterations=4000,
        num_members=16,
        num_envs=16,
        members_per_slot=8,
        eval_every=0,
        eval_tasks=32,
        log_every=10,
        picture_every=0,
        runtime=RuntimeConfig(backend="serial"),
    )


LPG_PRESETS = {"lpg/chain-and-small-grids": chain_and_small_grids}

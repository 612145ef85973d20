"""Presets of learned update rules: populations in which rules are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from learners.config import LpgAgentConfig, LpgConfig
from system.config import RunConfig, RuntimeConfig, TaskOption

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
            meta_lr_decay_updates=2000,
            policy_entropy_coef=0.05,
            entropy_coef=0.01,
            outer_every_update=True,
            imitation_coef=1.0,
            critic_lr=5e-3,
            network_lrs=(5e-3, 1e-2, 2e-2),
            tabular_updates=60,
            network_updates=1000,
            evaluation_updates=300,
            members_per_block=8,
        ),
        iterations=2000,
        num_members=16,
        num_envs=16,
        members_per_slot=8,
        eval_every=0,
        eval_tasks=32,
        log_every=10,
        picture_every=500,
        runtime=RuntimeConfig(backend="serial"),
    )


GRID_WORLDS = ",".join(
    f"tabular-{name}"
    for name in ("dense", "sparse", "long-horizon", "longer-horizon", "long-dense")
)
"""The five tabular grids of LPG."""


def grid_worlds() -> RunConfig:
    """LPG on five tabular grids, 512 lifetimes of 64 environments: for a machine with a GPU."""
    return RunConfig(
        preset="lpg/grid-worlds",
        task="worlds",
        task_options={"names": GRID_WORLDS},
        learner=LpgConfig(policy_entropy_coef=0.05, members_per_block=32),
        iterations=5000,
        num_members=512,
        num_envs=64,
        members_per_slot=32,
        eval_every=0,
        eval_tasks=40,
        log_every=10,
        picture_every=250,
        runtime=RuntimeConfig(backend="serial"),
    )


AGENT_WORLDS = (
    "tabular-dense",
    "tabular-sparse",
    "tabular-long-horizon",
    "tabular-longer-horizon",
    "tabular-long-dense",
    "random-dense",
    "random-long-horizon",
    "random-small",
    "random-small-sparse",
    "random-very-dense",
    "chain-short",
    "chain-short-noisy",
    "chain-long",
    "chain-long-noisy",
    "chain-distractor",
    "sampled",
)
"""Worlds that agents are taught in; those of `actors.tasks.worlds`."""


def agent_presets() -> dict[str, Callable[[], RunConfig]]:
    """Agents under a frozen rule, or with --teacher a2c under their own advantage."""

    def preset(world: str) -> Callable[[], RunConfig]:
        def make() -> RunConfig:
            return taught(world, "worlds", {"names": world})

        make.__doc__ = f"Agents on levels of {world}, taught by --rule PATH or --teacher a2c."
        return make

    return {f"lpg-agent/{world}": preset(world) for world in AGENT_WORLDS}


def taught(name: str, task: str, options: dict[str, TaskOption]) -> RunConfig:
    """A hundred agents, each on a level of its own."""
    return RunConfig(
        preset=f"lpg-agent/{name}",
        task=task,
        task_options=options,
        learner=LpgAgentConfig(),
        iterations=2500 if name.startswith(("tabular", "chain", "sampled")) else 5000,
        num_members=100,
        num_envs=16,
        members_per_slot=50,
        eval_every=0,
        eval_tasks=3200,
        log_every=50,
        picture_every=0,
        runtime=RuntimeConfig(backend="serial"),
    )


def agent_cartpole() -> RunConfig:
    """Agents on CartPole, taught by --rule PATH or --teacher a2c."""
    return replace(
        taught("cartpole", "gym:CartPole-v1", {}), num_members=5, eval_tasks=100, iterations=2500
    )


LPG_PRESETS: dict[str, Callable[[], RunConfig]] = {
    "lpg/chain-and-small-grids": chain_and_small_grids,
    "lpg/grid-worlds": grid_worlds,
    **agent_presets(),
    "lpg-agent/cartpole": agent_cartpole,
}

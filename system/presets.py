"""The presets: complete configurations by name, <learner>/<task>. Free of torch and ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from learners.config import MamlTrpoConfig
from system.config import RunConfig

MAML = MamlTrpoConfig()


def navigation_2d() -> RunConfig:
    """Finn et al. 2017, section 5.3: reach a goal in the plane, one goal a task."""
    return RunConfig(
        preset="maml-trpo/navigation-2d",
        task="navigation-2d",
        learner=replace(MAML, inner_lr=0.1),
        iterations=250,
        num_members=20,
        members_per_slot=10,
    )


def half_cheetah_dir() -> RunConfig:
    """Run forward or backward; 45 million environment steps."""
    return RunConfig(
        preset="maml-trpo/half-cheetah-dir",
        task="half-cheetah-dir",
        iterations=282,
    )


def half_cheetah_dir_quick() -> RunConfig:
    """The same with smaller batches: about ten minutes on two CPU cores."""
    return RunConfig(
        preset="maml-trpo/half-cheetah-dir-quick",
        task="half-cheetah-dir",
        iterations=280,
        num_members=20,
        num_envs=10,
        members_per_slot=2,
        eval_every=20,
    )


def half_cheetah_vel() -> RunConfig:
    """Run at a speed from U[0, 2] m/s."""
    return RunConfig(
        preset="maml-trpo/half-cheetah-vel",
        task="half-cheetah-vel",
        iterations=282,
    )


def ant(task: str) -> Callable[[], RunConfig]:
    """Ant: a direction, a speed or a goal."""

    def preset() -> RunConfig:
        return RunConfig(
            preset=f"maml-trpo/{task}",
            task=task,
            iterations=250,
            num_members=20,
            num_envs=10,
            members_per_slot=2,
        )

    preset.__doc__ = {
        "ant-dir": "Ant: run forward or backward.",
        "ant-vel": "Ant: run at a speed from U[0, 3] m/s.",
        "ant-goal": "Ant: reach a point of the square ±3 m.",
    }[task]
    return preset


def bandit() -> RunConfig:
    """A bandit of 5 arms: 100 pulls to adapt, then 100 pulls that count."""
    return RunConfig(
        preset="maml-trpo/bandit",
        task="bandit",
        learner=replace(MAML, inner_lr=0.5, hidden=(32, 32), learn_inner_lr=True),
        iterations=300,
        num_envs=100,
        members_per_slot=40,
        eval_tasks=1000,
    )


def tabular_mdp() -> RunConfig:
    """Random MDPs of 10 states and 5 actions, 10 steps (Duan et al. 2016)."""
    return RunConfig(
        preset="maml-trpo/tabular-mdp",
        task="tabular-mdp",
        learner=replace(MAML, learn_inner_lr=True),
        iterations=300,
        members_per_slot=20,
        eval_tasks=200,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "maml-trpo/navigation-2d": navigation_2d,
    "maml-trpo/half-cheetah-dir": half_cheetah_dir,
    "maml-trpo/half-cheetah-dir-quick": half_cheetah_dir_quick,
    "maml-trpo/half-cheetah-vel": half_cheetah_vel,
    "maml-trpo/ant-dir": ant("ant-dir"),
    "maml-trpo/ant-vel": ant("ant-vel"),
    "maml-trpo/ant-goal": ant("ant-goal"),
    "maml-trpo/bandit": bandit,
    "maml-trpo/tabular-mdp": tabular_mdp,
}

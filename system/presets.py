"""The presets: complete configurations by name, <learner>/<task>. Free of torch and ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from learners.config import MamlTrpoConfig
from system.config import RunConfig, TaskOption

MAML = MamlTrpoConfig(inner_loss="likelihood_ratio", gae_lambda=0.9, max_kl=0.02)
"""Common to all presets.

Two settings differ from Finn et al. 2017. λ = 0.9 instead of 1: with the linear baseline the inner
gradients of two members with the same HalfCheetah task then agree twice as well. The likelihood
ratio as the inner loss keeps the part of the meta-gradient that credits the data before adaptation.
"""

LOCOMOTION: dict[str, TaskOption] = {"action_scale": 0.3}
"""A new policy's standard deviation is 0.3 of the torque range: with the whole range most actions
are clipped, and the inner gradient of 20 episodes is all noise."""


def navigation_2d() -> RunConfig:
    """Reach a goal in the plane, one goal a task (Finn et al. 2017, section 5.3)."""
    return RunConfig(
        preset="maml-trpo/navigation-2d",
        task="navigation-2d",
        learner=replace(MAML, max_kl=0.01),
        task_options={"action_scale": 0.1},
        iterations=100,
        num_members=20,
        members_per_slot=10,
        eval_every=25,
    )


def half_cheetah_dir() -> RunConfig:
    """Run forward or backward; 20 million environment steps."""
    return RunConfig(
        preset="maml-trpo/half-cheetah-dir",
        task="half-cheetah-dir",
        learner=MAML,
        task_options=LOCOMOTION,
        iterations=250,
        num_members=20,
        members_per_slot=2,
    )


def half_cheetah_dir_quick() -> RunConfig:
    """The same with smaller batches: about ten minutes on two CPU cores."""
    return replace(
        half_cheetah_dir(),
        preset="maml-trpo/half-cheetah-dir-quick",
        iterations=200,
        num_members=10,
        members_per_slot=1,
        eval_every=20,
    )


def half_cheetah_vel() -> RunConfig:
    """Run at a speed from U[0, 2] m/s; 10 million environment steps."""
    return RunConfig(
        preset="maml-trpo/half-cheetah-vel",
        task="half-cheetah-vel",
        learner=MAML,
        task_options=LOCOMOTION,
        iterations=125,
        num_members=20,
        members_per_slot=2,
    )


def ant(task: str, doc: str) -> Callable[[], RunConfig]:
    """A preset of an Ant family; 10 million environment steps.

    The gradient's signal is weak here: the smaller action scale keeps a new policy on its feet, and
    γ = 0.95 and 40 episodes (as in Finn et al. 2017) lower the variance.
    """

    def preset() -> RunConfig:
        return RunConfig(
            preset=f"maml-trpo/{task}",
            task=task,
            learner=replace(MAML, gamma=0.95),
            task_options={"action_scale": 0.15, "horizon": 100},
            iterations=126,
            num_members=10,
            num_envs=40,
            members_per_slot=1,
            eval_every=42,
            eval_tasks=20,
        )

    preset.__doc__ = doc
    return preset


def bandit() -> RunConfig:
    """Bernoulli bandit of 5 arms: 100 pulls to adapt, then 100 that count (Duan et al. 2016)."""
    return RunConfig(
        preset="maml-trpo/bandit",
        task="bandit",
        learner=replace(
            MAML, inner_lr=0.5, hidden=(32, 32), learn_inner_lr=True, gamma=0.0, max_kl=0.01
        ),
        iterations=200,
        num_envs=1,
        members_per_slot=20,
        eval_tasks=1000,
        eval_every=50,
    )


def tabular_mdp() -> RunConfig:
    """Random MDPs of 10 states and 5 actions, 10 steps (Duan et al. 2016)."""
    return RunConfig(
        preset="maml-trpo/tabular-mdp",
        task="tabular-mdp",
        learner=replace(MAML, inner_lr=0.5, learn_inner_lr=True, gae_lambda=1.0, max_kl=0.01),
        iterations=300,
        members_per_slot=20,
        eval_tasks=200,
        eval_every=50,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "maml-trpo/navigation-2d": navigation_2d,
    "maml-trpo/half-cheetah-dir": half_cheetah_dir,
    "maml-trpo/half-cheetah-dir-quick": half_cheetah_dir_quick,
    "maml-trpo/half-cheetah-vel": half_cheetah_vel,
    "maml-trpo/ant-dir": ant("ant-dir", "Ant: run forward or backward."),
    "maml-trpo/ant-vel": ant("ant-vel", "Ant: run at a speed from U[0, 3] m/s."),
    "maml-trpo/ant-goal": ant("ant-goal", "Ant: reach a point of the square of ±3 m."),
    "maml-trpo/bandit": bandit,
    "maml-trpo/tabular-mdp": tabular_mdp,
}

"""The runs whose meta-iterations are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from learners.config import LpgConfig, Rl2Config
from system.arguments import BenchArguments
from system.config import RunConfig, RuntimeConfig
from system.presets import PRESETS


def maml(given: BenchArguments) -> RunConfig:
    """HalfCheetah-Dir, 40 tasks × 20 episodes × 100 steps, before and after adaptation."""
    return of_preset("maml-trpo/half-cheetah-dir", given, num_members=given.num_members or 40)


def navigation(given: BenchArguments) -> RunConfig:
    """Navigation, 20 tasks × 20 episodes × 100 steps, before and after adaptation."""
    return of_preset("maml-trpo/navigation-2d", given, num_members=given.num_members or 20)


def lirpg(given: BenchArguments) -> RunConfig:
    """One replica of LIRPG on delayed Hopper."""
    return of_preset("lirpg/delayed-hopper", given, num_members=given.num_members or 1)


def frodo(given: BenchArguments) -> RunConfig:
    """FRODO's replicas on Catch."""
    return of_preset("frodo/catch", given, num_members=given.num_members or 5)


def rl2(given: BenchArguments) -> RunConfig:
    """RL² at the paper's size: trials of 100 steps of a tabular MDP, 8 epochs of PPO."""
    num_members = given.num_members or 2500
    config = of_preset("rl2/tabular-mdp", given, num_members=num_members)
    assert isinstance(config.learner, Rl2Config)
    return replace(
        config,
        learner=replace(config.learner, width=given.width, num_epochs=8, num_minibatches=10),
        members_per_slot=-(-num_members // 4),
    )


def lpg(given: BenchArguments) -> RunConfig:
    """LPG on small grids: K = 5 windows of T = 20 in each of M × E environments."""
    config = of_preset("lpg/chain-and-small-grids", given, num_members=given.num_members or 16)
    assert isinstance(config.learner, LpgConfig)
    return replace(
        config,
        learner=replace(config.learner, rule_width=given.width),
        num_envs=given.num_envs,
        task_options={"names": "tabular-sparse,random-small-sparse"},
    )


def of_preset(preset: str, given: BenchArguments, num_members: int) -> RunConfig:
    """A preset's run on the machine that was asked for."""
    runtime = RuntimeConfig(
        backend=given.backend,
        num_actors=given.num_actors,
        device=given.device,
        learner_threads=given.learner_threads,
    )
    config = PRESETS[preset]()
    return replace(config, num_members=num_members, runtime=runtime)


RUNS: dict[str, Callable[[BenchArguments], RunConfig]] = {
    "maml": maml,
    "navigation": navigation,
    "lirpg": lirpg,
    "frodo": frodo,
    "lpg": lpg,
    "rl2": rl2,
}

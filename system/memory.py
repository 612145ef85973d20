"""Whether a run's replicas can be, and fit in memory, before anything starts."""

from __future__ import annotations

import psutil

from learners.config import FrodoConfig, LirpgConfig, LpgAgentConfig, LpgConfig, MamlTrpoConfig
from learners.core.errors import ConfigError
from learners.core.trajectory import Spec
from system.config import RunConfig, rollout_size

COPIES = 4
"""Times that a rollout's data are held at once: chunk, batch, flattened and shuffled. FRODO's
window has K more."""

MATRIX_COPIES = 3
"""Times that LIRPG's matrix of steps × steps is held while it is built."""


def replica_bytes(config: RunConfig, spec: Spec) -> int:
    """Memory that one replica's rollout takes in the learner, or in all of them, roughly.

    Every learner holds every replica's data, and works on some of them.
    """
    steps, _ = rollout_size(config.learner, config.num_envs)
    pixel = 1 if spec.image is not None else 4
    numbers = 2 * spec.obs_size * pixel + 4 * (spec.action_size + 12)
    copies = COPIES
    if isinstance(config.learner, FrodoConfig):
        copies += config.learner.num_inner_updates + config.learner.num_outcome_batches - 1
    needed = copies * steps * numbers * config.runtime.num_learners
    if isinstance(config.learner, LirpgConfig):
        needed += MATRIX_COPIES * 4 * steps**2
    return needed


def check_replicas(config: RunConfig, spec: Spec, available: int | None = None) -> None:
    """Refuses replicas that do not fit, or that pixels do not allow.

    Args:
        config: the run.
        spec: of its environments.
        available: bytes of free memory; by default what the machine has.

    Raises:
        ConfigError: they do not, and the message says how many would; or several are to learn from
            pixels.
    """
    if isinstance(config.learner, MamlTrpoConfig | LpgConfig | LpgAgentConfig):
        return
    if spec.image is not None and config.num_members > 1:
        raise ConfigError(
            f"--num-members {config.num_members}: a run on pixels has one replica; start one run "
            "for each, with its own --seed"
        )
    free = psutil.virtual_memory().available if available is None else available
    each = replica_bytes(config, spec)
    if each * config.num_members <= free:
        return
    fitting = free // each
    advice = (
        f"{fitting} would fit: --num-members {fitting}"
        if fitting
        else "not even one fits: take fewer --num-steps or --num-envs"
    )
    raise ConfigError(
        f"{config.num_members} replicas need about {each * config.num_members / 2**30:.1f} GiB of "
        f"memory for their rollouts and {free / 2**30:.1f} GiB are free; {advice}"
    )

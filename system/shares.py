"""Whether there is work for every learner, before anything starts."""

from __future__ import annotations

from learners.config import LifetimeSettings, MamlTrpoConfig, Rl2Config
from learners.core.blocks import block_bounds, group_bounds
from learners.core.errors import ConfigError
from learners.core.trajectory import Spec
from system.config import RunConfig


def num_blocks(config: RunConfig, spec: Spec) -> int:
    """Blocks of members in which a run's updates are computed."""
    learner, num_members = config.learner, config.num_members
    assert not isinstance(learner, Rl2Config)
    if isinstance(learner, LifetimeSettings):
        worlds = group_bounds(num_members, max(1, len(spec.worlds)))
        sizes = [last - first for first, last in worlds]
        return sum(len(block_bounds(size, learner.members_per_block)) for size in sizes)
    if isinstance(learner, MamlTrpoConfig):
        return len(block_bounds(num_members, learner.members_per_block))
    return len(block_bounds(num_members, learner.members_per_block or num_members))


def check_shares(config: RunConfig, spec: Spec) -> None:
    """Refuses more learners than blocks.

    Raises:
        ConfigError: some learners would have nothing to do.
    """
    num_learners, num_members = config.runtime.num_learners, config.num_members
    if num_learners == 1 or (there := num_blocks(config, spec)) >= num_learners:
        return
    size = config.learner.members_per_block  # type: ignore[union-attr]
    fitting = num_members // num_learners
    smaller = f"--members-per-block {fitting}" if fitting else "more --num-members"
    raise ConfigError(
        f"num_learners {num_learners}: the {num_members} members make {there} blocks "
        f"(members_per_block {size}), and every learner needs one. Use --num-learners {there} or "
        f"{smaller}"
    )

"""Does what was recorded again, in environments that are looked at.

They are seeded as those of the recording were, so that they do the same; neither actors nor
learners need to know of pictures.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actors.family import TaskFamily
from actors.rollout import Chunk, Request, spread
from actors.scenes import Drawable, Scene
from learners.core.errors import ConfigError


@dataclass(eq=False)
class Episode:
    """What was seen of an episode; the first scene is its start.

    Attributes:
        scenes: in the order of time.
        steps: before each of them.
        returns: raw return so far at each of them.
    """

    scenes: list[Scene] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


@dataclass
class _Watched:
    """One environment that is looked at every so many steps."""

    env: Drawable
    index: int
    every: int
    episodes: list[Episode] = field(default_factory=list)
    num_steps: int = 0
    total: float = 0.0

    def begin(self) -> None:
        """A new episode."""
        self.episodes.append(Episode())
        self.num_steps, self.total = 0, 0.0
        self.look()

    def note(self, reward: float, over: bool) -> None:
        """A step."""
        self.num_steps += 1
        self.total += reward
        if over or self.num_steps % self.every == 0:
            self.look()

    def look(self) -> None:
        scene = self.env.scene(self.index)
        assert scene is not None
        episode = self.episodes[-1]
        episode.scenes.append(scene)
        episode.steps.append(self.num_steps)
        episode.returns.append(self.total)


def replay(
    family: TaskFamily, request: Request, chunk: Chunk, members: Collection[int], every: int
) -> dict[int, list[Episode]]:
    """The episodes of some members, as far as they were recorded.

    Args:
        family: whose episodes they are; those of a trial, where it was one.
        request: that of the chunk, which had no carry.
        chunk: whole episodes.
        members: which of the slot's are looked at, counted over all slots.
        every: steps between two scenes; the end of an episode is one in any case.

    Returns:
        By member, the episodes of its environments one after the other.

    Raises:
        ConfigError: the environments do something else this time.
    """
    slot = request.slot
    env: Any = family.make(slot.num_members * slot.num_envs)
    env.reset(seed=request.seeds[0], options={"tasks": spread(request.tasks, slot.num_envs)})
    first, last = slot.members
    watched = {
        (m - first) * slot.num_envs + e: _Watched(env, (m - first) * slot.num_envs + e, every)
        for m in members
        if first <= m < last
        for e in range(slot.num_envs)
    }
    _act(family, env, chunk, list(watched.values()))
    env.close()
    found: dict[int, list[Episode]] = {}
    for row, one in watched.items():
        found.setdefault(first + row // slot.num_envs, []).extend(one.episodes)
    return found


def _act(family: TaskFamily, env: Any, chunk: Chunk, watched: Sequence[_Watched]) -> None:
    """Takes the chunk's steps; each environment that is watched notes what comes of it."""
    action, reward, valid = (_by_time(chunk.arrays[n]) for n in ("action", "reward", "valid"))
    for one in watched:
        one.begin()
    for t in range(int(valid.any(1).sum())):
        *stepped, info = env.step(torch.from_numpy(action[t]))
        _, came, terminated, truncated = map(np.asarray, stepped)
        live, over = valid[t] > 0, (terminated | truncated) & (valid[t] > 0)
        if not np.array_equal(came[live], reward[t][live], equal_nan=True):
            raise ConfigError(
                f"{family} cannot be shown: with the same seed and actions its environments do "
                "something else the second time"
            )
        ended = over & info.get("game_over", over)
        raw = info.get("raw_reward", came)
        for one in watched:
            if live[one.index]:
                one.note(float(raw[one.index]), bool(ended[one.index]))
        # What goes on is a trial after one of its episodes, or a game after a lost life.
        again = over & _goes_on(valid, t)
        if again.any():
            env.reset(options={"reset_mask": again})
        for one in watched:
            if (ended & again)[one.index]:
                one.begin()


def _goes_on(valid: np.ndarray, t: int) -> np.ndarray:
    """Which environments have a step after step t, [n] bool."""
    after: np.ndarray = valid[t + 1] > 0 if t + 1 < len(valid) else np.zeros(valid.shape[1], bool)
    return after


def _by_time(array: np.ndarray) -> np.ndarray:
    """[m, T, e, …] → contiguous [T, m·e, …]."""
    m, num_steps, e, *rest = array.shape
    return np.ascontiguousarray(array.swapaxes(0, 1)).reshape(num_steps, m * e, *rest)

"""The contract of a task family: a distribution of tasks, and environments that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from gymnasium.vector import VectorEnv

from learners.core.trajectory import Spec

Task = Mapping[str, float | int | list[float]]
"""One task as plain numbers, picklable and printable: {"direction": -1.0}."""


@runtime_checkable
class TaskFamily(Protocol):
    """A distribution of tasks over one kind of environment.

    A family is a frozen dataclass; its fields are the task options of a run's configuration, so
    each of them has a default and is a plain number, boolean or string.
    """

    @property
    def spec(self) -> Spec:
        """Sizes of observation and action, and the horizon."""
        ...

    @property
    def finite_tasks(self) -> list[Task] | None:
        """All tasks where there are only a few, so that none can be held out; otherwise None."""
        ...

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Draws `num_tasks` tasks. The draw depends on `rng` alone."""
        ...

    def make(self, num_envs: int) -> VectorEnv:
        """Environments that take their tasks at reset.

        `env.reset(seed=int, options={"tasks": [task, ...]})` gives environment i the i-th task;
        the list has `num_envs` entries. Autoreset is disabled: an environment that has ended is
        stepped on, or not, until the next reset, and the caller ignores what it returns.
        `env.reset(options={"reset_mask": mask})`, mask [num_envs] bool, starts a new episode in
        these environments alone; tasks stay, random streams go on, and the observation of the
        others is the one they had.
        `step` takes a torch tensor of actions, [num_envs, A] float32 or [num_envs] int64, and
        returns observations [num_envs, O] and rewards [num_envs], both float32, and boolean
        `terminated` and `truncated` [num_envs], as arrays or tensors.
        The horizon sets `terminated`. The info of a step may hold `raw_reward` [num_envs] float32
        and `game_over` [num_envs] bool where what is reported differs from what is learned from:
        episode returns are then sums of raw rewards between game-overs. Where an episode is a trial
        of several it holds `episode_over` [num_envs] bool, whether this step ended one of these:
        theirs are the returns that are reported. Where the specification
        has a target policy it holds `true_value` [num_envs] float32, the expected undiscounted
        return under that policy from the observation that was acted on.
        """
        ...


@runtime_checkable
class KnowsOptimum(Protocol):
    """A family that can say what knowing its tasks is worth."""

    def optimum(self, tasks: Sequence[Task]) -> np.ndarray:
        """What knowing the task earns in an episode, on average, [M]."""
        ...


@runtime_checkable
class ShowsTrials(Protocol):
    """A family that has something to draw of what was done in a task."""

    def show(self, task: Task, action: np.ndarray, ended: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays for `system.pictures`, by name, of the actions [T] of several episodes.

        `ended` [T] is 1.0 where a step ended an episode.
        """
        ...


class OneTask:
    """The tasks of a family that has a single one, {}: a mixin for families of one environment."""

    @property
    def finite_tasks(self) -> list[Task] | None:
        """The one task, which has nothing to tell."""
        return [{}]

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """The one task, `num_tasks` times; nothing is drawn."""
        return [{} for _ in range(num_tasks)]

"""2D navigation: a point goes to an unseen goal (Finn et al. 2017, section 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from actors.family import Task
from actors.scenes import Plan
from actors.tasks.array_env import ArrayEnv
from actors.tasks.checks import check_number, check_whole, task_array
from learners.core.trajectory import Spec

MAX_MOVE = 0.1
"""Largest displacement of one step, per axis."""

GOAL_REACH = 0.01
"""An episode ends when the goal is nearer than this on both axes."""

GOAL_RANGE = 0.5
"""Goals are uniform in the square [-0.5, 0.5]²."""


@dataclass(frozen=True)
class Navigation2D:
    """A point starts at (0, 0), moves by the action, and is paid minus its distance to the goal.

    Observation: x, y. Move: clip(action · action_scale, ±0.1) per axis. Reward: −‖position − goal‖
    after the move. An episode ends early, which raises its return, as soon as |Δx| < 0.01 and
    |Δy| < 0.01. Tasks: {"goal": [x, y]}, uniform in [−0.5, 0.5]².

    Reference returns at H = 100: staying at the start −38.25 on average, the straight line −0.51.

    Attributes:
        horizon: H, steps of an episode.
        action_scale: what the action is multiplied by before it is clipped.
    """

    horizon: int = 100
    action_scale: float = 1.0

    def __post_init__(self) -> None:
        check_whole(self, "horizon", 1)
        check_number(self, "action_scale", 0.0, exclusive=True)

    @property
    def spec(self) -> Spec:
        """Two coordinates, two displacements."""
        return Spec(obs_size=2, action_size=2, discrete=False, horizon=self.horizon)

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None: goals are continuous."""
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Goals, independent and uniform."""
        goals = rng.uniform(-GOAL_RANGE, GOAL_RANGE, (num_tasks, 2))
        return [{"goal": goal} for goal in goals.tolist()]

    def make(self, num_envs: int) -> Navigation2DEnv:
        """A batch of environments on the CPU."""
        return Navigation2DEnv(self, num_envs)


class Navigation2DEnv(ArrayEnv):
    """The batch of points."""

    steps_per_second = 15.0

    def __init__(
        self, family: Navigation2D, num_envs: int, device: torch.device | str = "cpu"
    ) -> None:
        bound = MAX_MOVE / family.action_scale
        super().__init__(num_envs, family.spec, Box(-bound, bound, (2,), np.float32), device)
        self._action_scale = family.action_scale
        self._goal = torch.zeros(num_envs, 2, device=self.device)
        self._position = torch.zeros(num_envs, 2, device=self.device)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Takes the goals."""
        self._goal.copy_(torch.from_numpy(task_array(tasks, "goal", 2)))

    def start(self) -> Tensor:
        """All points at the origin."""
        return self._position.zero_().clone()

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moves, pays, and ends the episodes whose goal is reached."""
        self._position += (action * self._action_scale).clamp(-MAX_MOVE, MAX_MOVE)
        offset = self._position - self._goal
        reached = (offset.abs() < GOAL_REACH).all(1)
        return self._position.clone(), -offset.square().sum(1).sqrt(), reached

    def scene(self, index: int) -> Plan:
        """The square of the goals, the goal and the point."""
        edge = 1.2 * GOAL_RANGE
        goal = [*self._goal[index].tolist(), 1.0]
        agent = self._position[index].double().numpy(force=True).copy()
        return Plan((-edge, edge, -edge, edge), agent, np.array([goal]))

    def arrays(self) -> dict[str, Tensor]:
        """Goals and positions, both [num_envs, 2]."""
        return {"goal": self._goal, "position": self._position}

"""HalfCheetah tasks of Finn et al. 2017, on Gymnasium's HalfCheetah-v5.

Against the paper's simulator: dt is 0.05 s here and was 0.01 s there, so returns over the same
number of steps are larger; the velocity is that of the root, not of the torso's centre of mass;
the observation has Gymnasium's 17 numbers (the paper's implementation added the torso position);
the start noise is Gymnasium's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.family import Task
from actors.tasks.checks import check_number, check_whole, task_array
from actors.tasks.mujoco_batch import DIRECTIONS, Array, MujocoBatch, sample_directions
from learners.core.trajectory import Spec


@dataclass(frozen=True)
class _HalfCheetah:
    """Options that both tasks share.

    Attributes:
        horizon: H, steps of 0.05 s of an episode. Nothing else ends one.
        action_scale: the executed control is clip(action · action_scale, ±1).
        control_cost: weight of the squared norm of the executed control.
    """

    horizon: int = 100
    action_scale: float = 1.0
    control_cost: float = 0.05

    def __post_init__(self) -> None:
        check_whole(self, "horizon", 1)
        check_number(self, "action_scale", 0.0, exclusive=True)
        check_number(self, "control_cost", 0.0)

    @property
    def spec(self) -> Spec:
        """Positions without x (8) and velocities (9); six torques."""
        return Spec(obs_size=17, action_size=6, discrete=False, horizon=self.horizon)


@dataclass(frozen=True)
class HalfCheetahDir(_HalfCheetah):
    """Run forward or backward: reward d·v_x − control_cost·‖control‖². Task: {"direction": ±1}.

    `sample` gives each direction to half of the tasks, in random order.
    """

    @property
    def finite_tasks(self) -> list[Task] | None:
        """Forward and backward."""
        return list(DIRECTIONS)

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Half forward, half backward, in random order; an odd one out is a coin's throw."""
        return sample_directions(rng, num_tasks)

    def make(self, num_envs: int) -> HalfCheetahDirEnv:
        """A batch of environments."""
        return HalfCheetahDirEnv(self, num_envs)


@dataclass(frozen=True)
class HalfCheetahVel(_HalfCheetah):
    """Run at a given speed: reward −|v_x − v*| − control_cost·‖control‖². Task: {"velocity": v*}.

    Attributes:
        max_velocity: v* is uniform in [0, max_velocity] m/s; 2 in Finn et al. 2017, 3 in many
            later papers.
    """

    max_velocity: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_velocity", 0.0, exclusive=True)

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None: speeds are continuous."""
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Speeds, independent and uniform."""
        speeds = rng.uniform(0.0, self.max_velocity, num_tasks)
        return [{"velocity": speed} for speed in speeds.tolist()]

    def make(self, num_envs: int) -> HalfCheetahVelEnv:
        """A batch of environments."""
        return HalfCheetahVelEnv(self, num_envs)


class _HalfCheetahEnv(MujocoBatch):
    """Observation and velocity of HalfCheetah-v5; the task is one number."""

    task_entry: str

    def __init__(self, family: _HalfCheetah, num_envs: int) -> None:
        super().__init__("half_cheetah.xml", num_envs, family.spec, family.action_scale)
        self._control_cost = family.control_cost
        self._task = np.zeros(num_envs)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Takes the task's number."""
        self._task[:] = task_array(tasks, self.task_entry, 1)[:, 0]

    def observe(self) -> np.ndarray:
        """Positions without x, then velocities."""
        return np.concatenate((self.qpos[:, 1:], self.qvel), 1, dtype=np.float32)

    def position(self) -> Array:
        """The root's x."""
        return self.qpos[:, 0]

    def arrays(self) -> dict[str, np.ndarray]:
        """The tasks, [num_envs]."""
        return {"task": self._task}

    def _effort(self, control: Array) -> Array:
        squared_norm: Array = np.square(control).sum(1)
        return self._control_cost * squared_norm


class HalfCheetahDirEnv(_HalfCheetahEnv):
    """The batch of `HalfCheetahDir`."""

    task_entry = "direction"

    def reward(self, velocity: Array, control: Array) -> Array:
        """Speed in the wanted direction, less the effort."""
        return self._task * velocity - self._effort(control)


class HalfCheetahVelEnv(_HalfCheetahEnv):
    """The batch of `HalfCheetahVel`."""

    task_entry = "velocity"

    def reward(self, velocity: Array, control: Array) -> Array:
        """Minus the distance to the wanted speed, less the effort."""
        return -np.abs(velocity - self._task) - self._effort(control)

"""Ant tasks of Finn et al. 2017, on Gymnasium's Ant-v5.

The reward is the paper's implementation's: its task term, less 0.005·‖control‖² (control in ±1) and
0.0005·Σ clip(contact force, ±1)², plus 0.05. An episode ends when the torso's height leaves
[0.2, 1] m, or the state is not finite.

Against the paper's simulator: dt is 0.05 s here and was 0.02 s there; the velocity is that of the
torso body as Ant-v5 measures it, one simulation step (0.01 s) behind the positions; the
observation is Ant-v5's without x, y and, unless asked for, without contact forces (27 numbers;
the paper's implementation had 125, with contact forces and the torso's rotation matrix); contact
forces are really computed, which old simulators left at zero; the start noise is Gymnasium's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from actors.family import Task
from actors.tasks.checks import check_flag, check_number, check_whole, task_array
from actors.tasks.mujoco_batch import DIRECTIONS, Array, MujocoBatch, sample_directions
from learners.core.trajectory import Spec

TORSO = 1
"""Number of the torso's body; 0 is the world."""

NUM_BODIES = 14
"""Bodies with a contact force and torque of six numbers each, the world among them."""

SURVIVAL_REWARD = 0.05
CONTROL_COST = 0.005
CONTACT_COST = 0.0005
HEALTHY_HEIGHT = (0.2, 1.0)
GOAL_RANGE = 3.0


@dataclass(frozen=True)
class _Ant:
    """Options that the three tasks share.

    Attributes:
        horizon: H, steps of 0.05 s of an episode that does not end early.
        action_scale: the executed control is clip(action · action_scale, ±1).
        contact_obs: whether the observation ends with the 78 contact forces and torques of the 13
            bodies other than the world, clipped to ±1, as Ant-v5's does.
    """

    horizon: int = 200
    action_scale: float = 1.0
    contact_obs: bool = False

    def __post_init__(self) -> None:
        check_whole(self, "horizon", 1)
        check_number(self, "action_scale", 0.0, exclusive=True)
        check_flag(self, "contact_obs")

    @property
    def spec(self) -> Spec:
        """Positions without x and y (13), velocities (14), contact forces (78); eight torques."""
        size = 27 + 6 * (NUM_BODIES - 1) * self.contact_obs
        return Spec(obs_size=size, action_size=8, discrete=False, horizon=self.horizon)


@dataclass(frozen=True)
class AntDir(_Ant):
    """Walk forward or backward: task term d·v_x. Task: {"direction": ±1}.

    `sample` gives each direction to half of the tasks, in random order.
    """

    @property
    def finite_tasks(self) -> list[Task] | None:
        """Forward and backward."""
        return list(DIRECTIONS)

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Half forward, half backward, in random order; an odd one out is a coin's throw."""
        return sample_directions(rng, num_tasks)

    def make(self, num_envs: int) -> AntDirEnv:
        """A batch of environments."""
        return AntDirEnv(self, num_envs)


@dataclass(frozen=True)
class AntVel(_Ant):
    """Walk at a given speed: task term 1 − |v_x − v*|. Task: {"velocity": v*}.

    Attributes:
        max_velocity: v* is uniform in [0, max_velocity] m/s; 3 in Finn et al. 2017.
    """

    max_velocity: float = 3.0

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

    def make(self, num_envs: int) -> AntVelEnv:
        """A batch of environments."""
        return AntVelEnv(self, num_envs)


@dataclass(frozen=True)
class AntGoal(_Ant):
    """Walk to a goal: task term 4 − |x − x*| − |y − y*|. Task: {"goal": [x*, y*]}.

    Goals are uniform in [−3, 3]² metres. x and y are the observed root position; the observation
    begins with them, so that it has 29 numbers, or 107 with contact forces.
    """

    @property
    def spec(self) -> Spec:
        """As the other ants', with x and y before it."""
        size = super().spec.obs_size + 2
        return Spec(obs_size=size, action_size=8, discrete=False, horizon=self.horizon)

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None: goals are continuous."""
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Goals, independent and uniform."""
        goals = rng.uniform(-GOAL_RANGE, GOAL_RANGE, (num_tasks, 2))
        return [{"goal": goal} for goal in goals.tolist()]

    def make(self, num_envs: int) -> AntGoalEnv:
        """A batch of environments."""
        return AntGoalEnv(self, num_envs)


class AntBatch(MujocoBatch):
    """Observation, velocity, contact and early end of Ant-v5; a subclass adds tasks and reward."""

    first_position = 2

    def __init__(self, num_envs: int, spec: Spec, action_scale: float, contact_obs: bool) -> None:
        super().__init__("ant.xml", num_envs, spec, action_scale)
        self._contact_obs = contact_obs
        self._torso_x = np.zeros(num_envs)
        self._contact = np.zeros((num_envs, 6 * NUM_BODIES))
        self._contact_rows = list(self._contact.reshape(num_envs, NUM_BODIES, 6))
        self._torso_position = self.data.xpos[TORSO]
        self._forces = self.data.cfrc_ext

    def read_start(self, index: int) -> None:
        """The torso's position. Contact forces are zero before the first step, as in Ant-v5."""
        self._torso_x[index] = self._torso_position[0]
        self._contact_rows[index][:] = 0.0

    def read_step(self, index: int) -> None:
        """The torso's position, and the contact forces, which MuJoCo computes only when asked."""
        mujoco.mj_rnePostConstraint(self.model, self.data)
        self._torso_x[index] = self._torso_position[0]
        self._contact_rows[index][:] = self._forces

    def clipped_contact(self) -> Array:
        """Contact forces and torques of all bodies in ±1, [num_envs, 84]."""
        return np.clip(self._contact, -1.0, 1.0)

    def observe(self) -> np.ndarray:
        """Positions, velocities and, if asked for, the clipped contact forces."""
        parts = [self.qpos[:, self.first_position :], self.qvel]
        if self._contact_obs:
            parts.append(self.clipped_contact()[:, 6:])
        return np.concatenate(parts, 1, dtype=np.float32)

    def position(self) -> Array:
        """The torso's x."""
        return self._torso_x

    def alive(self) -> np.ndarray:
        """Whether the state is finite and the torso's height healthy."""
        lowest, highest = HEALTHY_HEIGHT
        finite = np.isfinite(self.qpos).all(1) & np.isfinite(self.qvel).all(1)
        height = self.qpos[:, 2]
        return finite & (lowest <= height) & (height <= highest)

    def arrays(self) -> dict[str, np.ndarray]:
        """Torso x [num_envs], contact forces [num_envs, 84]."""
        return {"torso_x": self._torso_x, "contact": self._contact}


class _AntEnv(AntBatch):
    """Costs and survival reward; a subclass adds the task term."""

    task_entry: str
    task_size = 1

    def __init__(self, family: _Ant, num_envs: int) -> None:
        super().__init__(num_envs, family.spec, family.action_scale, family.contact_obs)
        self._task = np.zeros((num_envs, self.task_size))

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Takes the tasks' numbers."""
        self._task[:] = task_array(tasks, self.task_entry, self.task_size)

    def task_term(self, velocity: Array) -> Array:
        """What the task pays, [num_envs], from the forward velocity [num_envs]."""
        raise NotImplementedError

    def reward(self, velocity: Array, control: Array) -> Array:
        """The task term and the survival reward, less the costs of control and contact."""
        effort: Array = np.square(control).sum(1)
        contact: Array = np.square(self.clipped_contact()).sum(1)
        costs = CONTROL_COST * effort + CONTACT_COST * contact
        return self.task_term(velocity) + SURVIVAL_REWARD - costs

    def arrays(self) -> dict[str, np.ndarray]:
        """Tasks [num_envs, ·], then as every ant's."""
        return {"task": self._task, **super().arrays()}


class AntDirEnv(_AntEnv):
    """The batch of `AntDir`."""

    task_entry = "direction"

    def task_term(self, velocity: Array) -> Array:
        """Speed in the wanted direction."""
        return self._task[:, 0] * velocity


class AntVelEnv(_AntEnv):
    """The batch of `AntVel`."""

    task_entry = "velocity"

    def task_term(self, velocity: Array) -> Array:
        """One, less the distance to the wanted speed."""
        return 1.0 - np.abs(velocity - self._task[:, 0])


class AntGoalEnv(_AntEnv):
    """The batch of `AntGoal`."""

    task_entry = "goal"
    task_size = 2
    first_position = 0

    def task_term(self, velocity: Array) -> Array:
        """Four, less the L1 distance to the goal."""
        distance: Array = np.abs(self.qpos[:, :2] - self._task).sum(1)
        return 4.0 - distance

    def goal(self, index: int) -> Array:
        """The task's."""
        goal: Array = self._task[index].copy()
        return goal

"""Gymnasium's v5 walking robots as families of one task, and the same with delayed rewards.

Dynamics, observation, reward, early end and start noise are those of `gymnasium.make("Hopper-v5")`
and its kin with their default arguments, bit for bit in float64 and then rounded to float32
(Gymnasium 1.x, gymnasium/envs/mujoco/*_v5.py). Two differences: actions are clipped to the action
space before anything else, and the horizon sets `terminated`. The robots pay at every step: the
delay is a property of `spec`, and who collects the trajectories adds up the rewards.

The delayed versions are those of Zheng et al. 2018, "On learning intrinsic rewards for policy
gradient methods": the accumulated reward arrives every 20 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mujoco
import numpy as np

from actors.family import OneTask, Task
from actors.tasks.ant import CONTACT_COST, AntBatch
from actors.tasks.checks import check_whole
from actors.tasks.mujoco_batch import Array, MujocoBatch
from learners.core.trajectory import Spec


@dataclass(frozen=True)
class _Locomotion(OneTask):
    """Options that all robots share. The one task has nothing to tell: {}.

    Attributes:
        delay: steps whose rewards the learner gets as one sum, at least 1.
        horizon: H, steps of an episode that does not end early.
    """

    delay: int = 1
    horizon: int = 1000

    obs_size: ClassVar[int]
    action_size: ClassVar[int]
    velocity: ClassVar[int]
    """Index of the root's forward velocity in an observation, just after the positions."""

    def __post_init__(self) -> None:
        check_whole(self, "delay", 1)
        check_whole(self, "horizon", 1)

    @property
    def spec(self) -> Spec:
        """Sizes, horizon, delay, and where the forward velocity is."""
        return Spec(
            self.obs_size,
            self.action_size,
            False,
            self.horizon,
            reward_delay=self.delay,
            velocity=self.velocity,
        )


@dataclass(frozen=True)
class Hopper(_Locomotion):
    """One leg: v_x + 1 − 0.001·‖control‖²; ends when it tips over or drops; steps of 0.008 s."""

    obs_size = 11
    action_size = 3
    velocity = 5

    def make(self, num_envs: int) -> HopperEnv:
        """A batch of environments."""
        return HopperEnv(self.spec, num_envs)


@dataclass(frozen=True)
class HalfCheetah(_Locomotion):
    """Half a cheetah: v_x − 0.1·‖control‖²; never ends early; steps of 0.05 s."""

    obs_size = 17
    action_size = 6
    velocity = 8

    def make(self, num_envs: int) -> HalfCheetahEnv:
        """A batch of environments."""
        return HalfCheetahEnv(self.spec, num_envs)


@dataclass(frozen=True)
class Walker2d(_Locomotion):
    """Two legs: v_x + 1 − 0.001·‖control‖²; ends when it tips over or drops; steps of 0.008 s."""

    obs_size = 17
    action_size = 6
    velocity = 8

    def make(self, num_envs: int) -> Walker2dEnv:
        """A batch of environments."""
        return Walker2dEnv(self.spec, num_envs)


@dataclass(frozen=True)
class Ant(_Locomotion):
    """Four legs: v_x + 1 − 0.5·‖control‖² − 0.0005·Σ clip(contact force, ±1)²; steps of 0.05 s.

    An episode ends when the torso's height leaves [0.2, 1] m. The observation ends with the 78
    clipped contact forces and torques.
    """

    obs_size = 105
    action_size = 8
    velocity = 13

    def make(self, num_envs: int) -> AntEnv:
        """A batch of environments."""
        return AntEnv(self.spec, num_envs)


@dataclass(frozen=True)
class Humanoid(_Locomotion):
    """A person: 1.25·v_x + 5 − 0.1·‖control‖² − min(5e-7·‖contact force‖², 10); steps of 0.015 s.

    An episode ends when the torso's height leaves (1, 2) m. Actions lie in ±0.4.
    """

    obs_size = 348
    action_size = 17
    velocity = 22

    def make(self, num_envs: int) -> HumanoidEnv:
        """A batch of environments."""
        return HumanoidEnv(self.spec, num_envs)


@dataclass(frozen=True)
class DelayedHopper(Hopper):
    """Hopper with a reward every 20 steps."""

    delay: int = 20


@dataclass(frozen=True)
class DelayedHalfCheetah(HalfCheetah):
    """HalfCheetah with a reward every 20 steps."""

    delay: int = 20


@dataclass(frozen=True)
class DelayedWalker2d(Walker2d):
    """Walker2d with a reward every 20 steps."""

    delay: int = 20


@dataclass(frozen=True)
class DelayedAnt(Ant):
    """Ant with a reward every 20 steps."""

    delay: int = 20


@dataclass(frozen=True)
class DelayedHumanoid(Humanoid):
    """Humanoid with a reward every 20 steps."""

    delay: int = 20


def _float32_effort(control: Array) -> np.ndarray:
    """‖control‖² of controls [num_envs, A] in float32, as Gymnasium has it of a float32 action."""
    effort: np.ndarray = np.square(control.astype(np.float32)).sum(1)
    return effort


class _PlanarEnv(MujocoBatch):
    """A robot in the x-z plane: positions without x, clipped velocities, forward speed paid."""

    xml_file: str
    control_cost: float
    velocity_limit: float = np.inf
    can_fall = True

    def __init__(self, spec: Spec, num_envs: int) -> None:
        super().__init__(self.xml_file, num_envs, spec, action_scale=1.0)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Nothing: there is one task."""

    def observe(self) -> np.ndarray:
        """Positions without x, then velocities."""
        obs: np.ndarray = self.coordinates[:, 1:].astype(np.float32)
        velocity = obs[:, self.qpos.shape[1] - 1 :]
        np.minimum(velocity, self.velocity_limit, out=velocity)
        np.maximum(velocity, -self.velocity_limit, out=velocity)
        return obs

    def position(self) -> Array:
        """The root's x."""
        return self.qpos[:, 0]

    def reward(self, velocity: Array, control: Array) -> Array:
        """Forward speed, and 1 where the robot can fall and has not, less the effort."""
        gain = velocity + self.standing if self.can_fall else velocity
        return gain - self.control_cost * _float32_effort(control)

    def arrays(self) -> dict[str, np.ndarray]:
        """None."""
        return {}


class HopperEnv(_PlanarEnv):
    """The batch of `Hopper`."""

    xml_file = "hopper.xml"
    control_cost = 0.001
    velocity_limit = 10.0
    frame_skip = 4
    reset_noise = 0.005
    normal_velocities = False

    def __init__(self, spec: Spec, num_envs: int) -> None:
        super().__init__(spec, num_envs)
        # Bounds of x, height, angle, and then all other numbers of the state.
        others = [100.0] * (self.coordinates.shape[1] - 3)
        self._healthy_high = np.array([np.inf, np.inf, 0.2, *others])
        self._healthy_low = np.array([-np.inf, 0.7, -0.2, *np.negative(others)])

    def alive(self) -> np.ndarray:
        """Whether height, angle and all other numbers of the state are in range."""
        state = self.coordinates
        inside = (self._healthy_low < state) & (state < self._healthy_high)
        alive: np.ndarray = np.logical_and.reduce(inside, 1)
        return alive


class HalfCheetahEnv(_PlanarEnv):
    """The batch of `HalfCheetah`."""

    xml_file = "half_cheetah.xml"
    control_cost = 0.1
    can_fall = False


class Walker2dEnv(_PlanarEnv):
    """The batch of `Walker2d`."""

    xml_file = "walker2d_v5.xml"
    control_cost = 0.001
    velocity_limit = 10.0
    frame_skip = 4
    reset_noise = 0.005
    normal_velocities = False

    def alive(self) -> np.ndarray:
        """Whether height and angle are in range."""
        height, angle = self.qpos[:, 1], self.qpos[:, 2]
        return (height > 0.8) & (height < 2.0) & (np.abs(angle) < 1.0)


class AntEnv(AntBatch):
    """The batch of `Ant`."""

    def __init__(self, spec: Spec, num_envs: int) -> None:
        super().__init__(num_envs, spec, action_scale=1.0, contact_obs=True)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Nothing: there is one task."""

    def reward(self, velocity: Array, control: Array) -> Array:
        """Forward speed and 1 where healthy, less the costs of control and contact."""
        contact: Array = np.square(self.clipped_contact()).sum(1)
        costs = 0.5 * _float32_effort(control) + CONTACT_COST * contact
        reward: Array = velocity + self.standing - costs
        return reward


class HumanoidEnv(MujocoBatch):
    """The batch of `Humanoid`."""

    reset_noise = 0.01
    normal_velocities = False

    def __init__(self, spec: Spec, num_envs: int) -> None:
        super().__init__("humanoid.xml", num_envs, spec, action_scale=1.0)
        data = self.data
        self._mass = self.model.body_mass
        self._total_mass = self._mass.sum()
        self._centre_x = np.zeros(num_envs)
        # What the observation takes from the simulator, in its order. Body 0 is the world.
        self._sources = {
            "inertia": data.cinert[1:],
            "body_velocity": data.cvel[1:],
            "actuator_force": data.qfrc_actuator[6:],
            "contact": data.cfrc_ext,
        }
        self._features = {
            name: np.zeros((num_envs, *source.shape)) for name, source in self._sources.items()
        }

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Nothing: there is one task."""

    def read_start(self, index: int) -> None:
        """The centre of mass, inertias, velocities and forces."""
        centre = np.einsum("b,bj->j", self._mass, self.data.xipos) / self._total_mass
        self._centre_x[index] = centre[0]
        for name, source in self._sources.items():
            self._features[name][index] = source

    def read_step(self, index: int) -> None:
        """The same, with the contact forces, which MuJoCo computes only when asked."""
        mujoco.mj_rnePostConstraint(self.model, self.data)
        self.read_start(index)

    def observe(self) -> np.ndarray:
        """Positions without x and y, velocities, and what was read, the world's forces left out."""
        features = {**self._features, "contact": self._features["contact"][:, 1:]}
        read = (feature.reshape(self.num_envs, -1) for feature in features.values())
        return np.concatenate((self.qpos[:, 2:], self.qvel, *read), 1, dtype=np.float32)

    def position(self) -> Array:
        """The x of the centre of mass."""
        return self._centre_x

    def reward(self, velocity: Array, control: Array) -> Array:
        """Forward speed and 5 where healthy, less the costs of control and contact."""
        forces = self._features["contact"].reshape(self.num_envs, -1)
        contact: Array = np.square(forces).sum(1)
        costs = 0.1 * np.square(control).sum(1) + np.minimum(5e-7 * contact, 10.0)
        reward: Array = 1.25 * velocity + 5.0 * self.standing - costs
        return reward

    def alive(self) -> np.ndarray:
        """Whether the torso's height is in range."""
        height = self.qpos[:, 2]
        return (height > 1.0) & (height < 2.0)

    def arrays(self) -> dict[str, np.ndarray]:
        """Centre x [num_envs], and what the observation takes from the simulator."""
        return {"centre_x": self._centre_x, **self._features}

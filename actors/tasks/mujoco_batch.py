"""Base of the MuJoCo families: one model, a batch of states, Gymnasium v5's dynamics bit for bit.

All environments share one compiled model and one scratch simulator: an environment is a row of
the array `physics` (MuJoCo's integration state: time, positions, velocities, warm start, control),
copied in before `mj_step` and out after it. That costs less than keeping a simulator per
environment, whose memory no cache holds, and makes saving an environment a copy of its row.
Observations, rewards and resets are computed for the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import expand_model_path
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from actors.family import Task
from actors.scenes import Pose
from actors.tasks.checks import mask_at_reset, matching_shape, tasks_at_reset
from actors.tasks.random_state import generator_bytes, generator_from_bytes
from learners.core.trajectory import Spec

_SAVED = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_BAD_STATES = tuple(
    int(warning)
    for warning in (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
        mujoco.mjtWarning.mjWARN_BADCTRL,
    )
)

Array = NDArray[np.float64]


class _NoLogFile:
    """Keeps MuJoCo's warnings from standard error and from a log file in the working folder.

    Bad states are counted by the environment instead.
    """

    def __enter__(self) -> None:
        self._previous = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(_ignore)

    def __exit__(self, *error: object) -> None:
        mujoco.set_mju_user_warning(self._previous)


def _ignore(message: str) -> None:
    del message


@functools.cache
def load_model(xml_file: str) -> mujoco.MjModel:
    """Gymnasium's own robot of that name, compiled once per process."""
    with _NoLogFile():
        return mujoco.MjModel.from_xml_path(expand_model_path(xml_file))


class MujocoBatch(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` robots, float64 inside, float32 out.

    The control is action · action_scale, clipped to the model's control range (±1 in most), and
    held for `frame_skip` simulation steps. An environment that has ended is not simulated further;
    it keeps its last observation, with reward 0, until the next reset. A subclass defines
    `set_tasks`, `observe`, `position`, `reward` and `arrays`, and where it needs them `alive`,
    `read_start`, `read_step` and other values of the first three attributes, whose defaults are
    those of HalfCheetah-v5 and Ant-v5.

    Attributes:
        frame_skip: simulation steps per environment step.
        reset_noise: half-width of the start positions' uniform noise, and scale of the velocities'.
        normal_velocities: whether the start velocities' noise is normal rather than uniform.
        num_bad_states: how often MuJoCo found a state or control not finite or huge, and put that
            robot back to its rest pose. The reward of such a step is NaN.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own field)
    frame_skip: int = 5
    reset_noise: float = 0.1
    normal_velocities: bool = True

    def __init__(self, xml_file: str, num_envs: int, spec: Spec, action_scale: float) -> None:
        self.xml_file = xml_file
        self.num_envs = num_envs
        self.single_observation_space = Box(-np.inf, np.inf, (spec.obs_size,), np.float32)
        self.model = load_model(xml_file)
        # Gymnasium's bounds, which are rounded to float32: 0.4 becomes 0.4000000059604645.
        bounds = self.model.actuator_ctrlrange.astype(np.float32).astype(np.float64)
        self._lowest, self._highest = bounds.T
        low, high = (bounds.T / action_scale).astype(np.float32)
        self.single_action_space = Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.horizon = spec.horizon
        self.action_scale = action_scale
        self.data = mujoco.MjData(self.model)
        self.dt = self.model.opt.timestep * self.frame_skip
        self.num_bad_states = 0
        self._rng = np.random.default_rng()
        self._has_tasks = False
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.ones(num_envs, bool)
        self._bad = np.zeros(num_envs, bool)
        self.standing = np.ones(num_envs, bool)
        self._allocate()

    def _allocate(self) -> None:
        """Makes `physics` [num_envs, state size] and the views of its columns."""
        model = self.model

        def columns(part: mujoco.mjtState, width: int) -> Array:
            # MuJoCo stores the parts in the order of their bits: all lower bits come before.
            start = mujoco.mj_stateSize(model, _SAVED & (int(part) - 1))
            return self.physics[:, start : start + width]

        self.physics = np.zeros((self.num_envs, mujoco.mj_stateSize(model, _SAVED)))
        self.coordinates = columns(mujoco.mjtState.mjSTATE_QPOS, model.nq + model.nv)
        self.qpos, self.qvel = self.coordinates[:, : model.nq], self.coordinates[:, model.nq :]
        self._control = columns(mujoco.mjtState.mjSTATE_CTRL, model.nu)
        self._rows = list(self.physics)
        self._warnings = memoryview(self.data.warning.number)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Copies the numbers of the tasks into this environment's arrays."""
        raise NotImplementedError

    def observe(self) -> np.ndarray:
        """Observations, [num_envs, O] float32, a new array."""
        raise NotImplementedError

    def position(self) -> Array:
        """The coordinate whose change is the forward velocity, [num_envs], metres."""
        raise NotImplementedError

    def reward(self, velocity: Array, control: Array) -> Array:
        """Rewards [num_envs] from velocities [num_envs] in m/s and controls [num_envs, A].

        What `alive` says of this step is in `standing`; all True where no robot can fall.
        """
        raise NotImplementedError

    def alive(self) -> np.ndarray | None:
        """Which robots have not fallen, [num_envs]; None where none can."""
        return None

    def read_start(self, index: int) -> None:
        """Copies what environment `index` needs beside its state out of `data`, at its start."""

    def read_step(self, index: int) -> None:
        """Copies what environment `index` needs beside its state out of `data`, after a step."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays, by name, that hold tasks and what `read_start` and `read_step` copied."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts episodes at the rest pose plus noise, `reset_noise` times U(±1) or N(0, 1).

        Args:
            seed: of every draw from now on; without it the random stream goes on.
            options: {"tasks": [task, ...]}, one per environment; without it the tasks stay.
                {"reset_mask": mask}, [num_envs] bool, starts these environments alone.

        Returns:
            Observation [num_envs, O] float32, and an empty dict.

        Raises:
            ValueError: there are no tasks yet, or tasks or mask do not fit.
        """
        mask = mask_at_reset(options, self.num_envs)
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        tasks = tasks_at_reset(options, self.num_envs)
        if tasks is not None:
            self.set_tasks(tasks)
            self._has_tasks = True
        elif not self._has_tasks:
            raise ValueError('the first reset needs options={"tasks": [...]}')
        started = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        self._place(started)
        self._steps[started] = 0
        self._ended[started] = False
        return self.observe(), {}

    def _place(self, started: NDArray[np.int64]) -> None:
        """Puts the robots of these indices at a noisy rest pose, warm start 0."""
        model, data, noise = self.model, self.data, self.reset_noise
        qpos = model.qpos0 + self._rng.uniform(-noise, noise, (len(started), model.nq))
        shape = (len(started), model.nv)
        if self.normal_velocities:
            qvel = noise * self._rng.standard_normal(shape)
        else:
            qvel = self._rng.uniform(-noise, noise, shape)
        for place, index in enumerate(started.tolist()):
            mujoco.mj_resetData(model, data)
            data.qpos[:] = qpos[place]
            data.qvel[:] = qvel[place]
            mujoco.mj_forward(model, data)
            mujoco.mj_getState(model, data, self._rows[index], _SAVED)
            self.read_start(index)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step: observation, reward, terminated, truncated (always False), empty dict.

        Args:
            actions: [num_envs, A], an array or a CPU tensor.
        """
        action = np.asarray(actions, np.float64)
        if action.shape != self._control.shape:
            raise ValueError(f"actions have shape {action.shape}, expected {self._control.shape}")
        # Twice as fast as numpy.clip for a few numbers.
        control = np.minimum(np.maximum(action * self.action_scale, self._lowest), self._highest)
        ended_before = self._ended.copy()
        before = self.position().copy()
        self._control[:] = control
        self._simulate()
        alive = self.alive()
        if alive is not None:
            self.standing = alive
        reward = self.reward((self.position() - before) / self.dt, control).astype(np.float32)
        np.putmask(reward, self._bad, np.nan)
        np.putmask(reward, ended_before, 0.0)
        self._steps += ~ended_before
        self._ended |= self._steps >= self.horizon
        if alive is not None:
            self._ended |= ~alive | self._bad
        return self.observe(), reward, self._ended.copy(), np.zeros(self.num_envs, bool), {}

    def _simulate(self) -> None:
        """Advances every environment that has not ended, and marks those in a bad state."""
        model, data, rows, warnings = self.model, self.data, self._rows, self._warnings
        set_state, get_state = mujoco.mj_setState, mujoco.mj_getState
        advance, read, frame_skip = mujoco.mj_step, self.read_step, self.frame_skip
        bad_qpos, bad_qvel, bad_qacc, bad_ctrl = _BAD_STATES
        self._bad[:] = False
        with _NoLogFile():
            for index, ended in enumerate(self._ended.tolist()):
                if ended:
                    continue
                row = rows[index]
                set_state(model, data, row, _SAVED)
                advance(model, data, frame_skip)
                get_state(model, data, row, _SAVED)
                read(index)
                if (
                    warnings[bad_qacc]
                    or warnings[bad_qvel]
                    or warnings[bad_qpos]
                    or warnings[bad_ctrl]
                ):
                    self._note_bad_state(index)

    def _note_bad_state(self, index: int) -> None:
        self._bad[index] = True
        self.num_bad_states += 1
        for warning in _BAD_STATES:
            self._warnings[warning] = 0

    @property
    def steps_per_second(self) -> float:
        """That of the world."""
        return float(1.0 / self.dt)

    def goal(self, index: int) -> Array | None:
        """Where environment `index` is to go, x and y in metres; None where that is open."""
        return None

    def scene(self, index: int) -> Pose:
        """The robot's pose."""
        return Pose(self.xml_file, self.qpos[index].copy(), self.goal(index))

    def _saved(self) -> dict[str, np.ndarray]:
        own = {"physics": self.physics, "steps": self._steps, "ended": self._ended}
        return {**own, **self.arrays()}

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next steps depend on: tasks, state, counters, random state."""
        saved = {name: array.copy() for name, array in self._saved().items()}
        counter = np.array([self.num_bad_states], np.int64)
        return {**saved, "num_bad_states": counter, "rng": generator_bytes(self._rng)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on bit for bit where `state` was taken, be it by another object.

        Raises:
            ValueError: `state` belongs to another kind or number of environments.
        """
        shapes = {name: array.shape for name, array in self.state().items()}
        fitting = {name: matching_shape(state, name, shapes[name]) for name in shapes}
        for name, array in self._saved().items():
            array[:] = fitting[name]
        self.num_bad_states = int(fitting["num_bad_states"][0])
        self._rng = generator_from_bytes(fitting["rng"])
        self._has_tasks = True


DIRECTIONS: tuple[Task, Task] = ({"direction": 1.0}, {"direction": -1.0})
"""The two tasks of the direction families: forward and backward."""


def sample_directions(rng: np.random.Generator, num_tasks: int) -> list[Task]:
    """As many forward as backward, in random order; where `num_tasks` is odd, the last is a coin.

    Balanced rather than independent draws: the meta-gradient then has no noise from the number of
    forward tasks, and each task still has probability 1/2.
    """
    signs = np.resize([1.0, -1.0], num_tasks)
    if num_tasks % 2:
        signs[-1] = rng.choice([1.0, -1.0])
    return [{"direction": sign} for sign in rng.permutation(signs).tolist()]

"""Families made of ordinary Gymnasium environments, one object per environment."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, flatten, flatten_space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from actors.family import OneTask, Task
from actors.scenes import Frame
from actors.tasks import closest
from actors.tasks.checks import check_whole, mask_at_reset, tasks_at_reset
from learners.core.trajectory import Spec

NUMBERS = (float, int, np.number, np.ndarray)
"""Types of a reward; an array must have no dimension."""

FLAGS = (bool, np.bool_)
"""Types of `terminated` and of `truncated`."""


@dataclass(frozen=True)
class SingleEnvFamily:
    """Base of a family whose tasks a single Gymnasium environment takes at reset.

    A subclass is a frozen dataclass with a field `horizon`, and defines `make_single` and
    `sample`; the environment finds its task in the options of its reset. A whole family:

        class Pole(gymnasium.envs.classic_control.PendulumEnv):
            def reset(self, *, seed=None, options=None):
                self.m = options["task"]["mass"]
                return super().reset(seed=seed)

        @dataclass(frozen=True)
        class PoleMass(SingleEnvFamily):
            horizon: int = 200
            heaviest: float = 2.0

            def make_single(self):
                return Pole()

            def sample(self, rng, num_tasks):
                return [{"mass": m} for m in rng.uniform(0.5, self.heaviest, num_tasks).tolist()]

    Saved as `poles.py` in the working folder, it is the task `poles:PoleMass`. Box, Discrete and
    other observations of fixed size are flattened (Discrete becomes one-hot); actions are Box,
    clipped to its bounds, or Discrete. The state of such environments is not saved: they have no
    `state` and `restore`.

    Attributes:
        horizon: H, steps after which an episode is `terminated`, at least 1.
    """

    horizon: int = 100

    def __post_init__(self) -> None:
        check_whole(self, "horizon", 1)

    def make_single(self) -> gymnasium.Env[Any, Any]:
        """One environment."""
        raise NotImplementedError

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Draws `num_tasks` tasks from `rng` alone."""
        raise NotImplementedError

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None, unless a subclass says otherwise: tasks are drawn from a continuum."""
        return None

    @property
    def max_steps(self) -> int:
        """H as the policy and the collector need it."""
        return self.horizon

    @functools.cached_property
    def spec(self) -> Spec:
        """Sizes of the flattened spaces, from an environment that is made for this and closed.

        Raises:
            ValueError: a space is of a kind that cannot be handled.
        """
        env = self.make_single()
        try:
            obs_space, action_space = env.observation_space, env.action_space
        finally:
            env.close()
        flat = flatten_space(obs_space) if obs_space.is_np_flattenable else None
        if not isinstance(flat, Box):
            raise ValueError(f"{self}: observations of fixed size are needed, not {obs_space}")
        if isinstance(action_space, Discrete):
            return Spec(flat.shape[0], int(action_space.n), True, self.max_steps)
        if isinstance(action_space, Box):
            return Spec(flat.shape[0], int(np.prod(action_space.shape)), False, self.max_steps)
        raise ValueError(f"{self}: actions must be Box or Discrete, not {action_space}")

    def make(self, num_envs: int) -> SingleEnvBatch:
        """A batch of environments."""
        return SingleEnvBatch(self, num_envs, self.horizon)


@dataclass(frozen=True)
class GymFamily(OneTask, SingleEnvFamily):
    """One task: a Gymnasium environment as it is, `gym:<id>`.

    Attributes:
        env_id: Gymnasium's id, such as "CartPole-v1" or "module:Name-v0".
        horizon: 0 leaves the id's own time limit, which sets `truncated`. Any other number takes
            its place and makes a finite-horizon problem of it: the horizon sets `terminated`.
    """

    horizon: int = 0
    env_id: str = "CartPole-v1"

    def __post_init__(self) -> None:
        check_whole(self, "horizon", 0)
        if self.horizon == 0 and self._registered().max_episode_steps is None:
            raise ValueError(f"{self.env_id} has no time limit of its own: give option horizon")

    def _registered(self) -> gymnasium.envs.registration.EnvSpec:
        """Gymnasium's entry.

        Raises:
            ValueError: there is none, or the module that should make it cannot be imported.
        """
        module, _, name = self.env_id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            return gymnasium.spec(name)
        except ImportError as error:
            raise ValueError(
                f"gym:{self.env_id}: the module {module!r} cannot be imported ({error})"
            ) from error
        except gymnasium.error.Error as error:
            known = closest(name, gymnasium.registry)
            raise ValueError(
                f"Gymnasium has no environment {name!r}; closest: {known} ({error})"
            ) from error

    def make_single(self) -> gymnasium.Env[Any, Any]:
        """The environment, without its time limit where the horizon replaces it."""
        spec = self._registered()
        limit = -1 if self.horizon else spec.max_episode_steps
        try:
            return gymnasium.make(spec, max_episode_steps=limit, disable_env_checker=True)
        except gymnasium.error.Error as error:
            raise ValueError(f"gym:{self.env_id} cannot be made: {error}") from error

    @property
    def max_steps(self) -> int:
        """The horizon, or the id's own time limit."""
        return self.horizon or int(self._registered().max_episode_steps or 0)


class SingleEnvBatch(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Single environments one after the other, each with its own task and seed.

    Gymnasium's SyncVectorEnv does not serve: it gives all environments the same reset options, and
    refuses to step while one of them has ended. Here an environment that has ended is left alone;
    it keeps its last observation, with reward 0, until the next reset.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own field)

    def __init__(self, family: SingleEnvFamily, num_envs: int, horizon: int) -> None:
        self.num_envs = num_envs
        self.horizon = horizon
        self.envs = [family.make_single() for _ in range(num_envs)]
        self._obs_space = self.envs[0].observation_space
        self.single_observation_space = Box(-np.inf, np.inf, (family.spec.obs_size,), np.float32)
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._tasks: list[Task] | None = None
        self._obs = np.zeros((num_envs, family.spec.obs_size), np.float32)
        self._steps = np.zeros(num_envs, np.int64)
        self._terminated = np.ones(num_envs, bool)
        self._truncated = np.zeros(num_envs, bool)

    def _flat(self, obs: Any, index: int, method: str) -> np.ndarray:
        flat = np.asarray(flatten(self._obs_space, obs), np.float32)
        if flat.shape != self._obs.shape[1:]:
            expected = getattr(self._obs_space, "shape", None) or self._obs_space
            raise self._wrong(index, method, "observation", obs, f"shape {expected}")
        return flat

    def _wrong(self, index: int, method: str, what: str, came: Any, expected: str) -> ValueError:
        """What is raised where an environment returns something else than it should."""
        shape = f" of shape {np.shape(came)}" if np.ndim(came) else f" {came!r}"
        return ValueError(
            f"{type(self.envs[index].unwrapped).__name__}.{method} returned as {what} "
            f"{type(came).__name__}{shape}, expected {expected} (environment {index}, task "
            f"{dict((self._tasks or [{}])[index])})"
        )

    def _step_one(self, index: int, action: Any) -> tuple[np.ndarray, float, bool, bool]:
        """A step of one environment: flat observation, reward, terminated, truncated."""
        obs, reward, terminated, truncated, _ = self.envs[index].step(action)
        if not isinstance(reward, NUMBERS) or np.ndim(reward):
            raise self._wrong(index, "step", "reward", reward, "a number")
        for what, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, FLAGS):
                raise self._wrong(index, "step", what, flag, "True or False")
        return self._flat(obs, index, "step"), float(reward), terminated, truncated

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts episodes.

        Args:
            seed: of every draw from now on, an independent stream per environment; without it the
                streams go on.
            options: {"tasks": [task, ...]}, one per environment; without it the tasks stay. An
                environment gets {"task": task}, or no options where the task is empty.
                {"reset_mask": mask}, [num_envs] bool, starts these environments alone.

        Raises:
            ValueError: there are no tasks yet, or tasks or mask do not fit.
        """
        mask = mask_at_reset(options, self.num_envs)
        self._tasks = tasks_at_reset(options, self.num_envs) or self._tasks
        if self._tasks is None:
            raise ValueError('the first reset needs options={"tasks": [...]}')
        seeds: Sequence[int | None] = [None] * self.num_envs
        if seed is not None:
            seeds = np.random.SeedSequence(seed).generate_state(self.num_envs).tolist()
        started = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        for index in started.tolist():
            task = self._tasks[index]
            own_options = {"task": dict(task)} if task else None
            obs, _ = self.envs[index].reset(seed=seeds[index], options=own_options)
            self._obs[index] = self._flat(obs, index, "reset")
        self._steps[started] = 0
        self._terminated[started] = False
        self._truncated[started] = False
        return self._obs.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step: observation, reward, terminated, truncated, empty dict.

        Args:
            actions: [num_envs, A] float32 or [num_envs] integers, an array or a CPU tensor.
        """
        executed = self._executed(np.asarray(actions))
        reward = np.zeros(self.num_envs, np.float32)
        for index in np.flatnonzero(~(self._terminated | self._truncated)).tolist():
            self._obs[index], reward[index], terminated, truncated = self._step_one(
                index, executed[index]
            )
            self._steps[index] += 1
            at_horizon = self.horizon > 0 and self._steps[index] >= self.horizon
            self._terminated[index] = terminated or at_horizon
            self._truncated[index] = truncated and not self._terminated[index]
        return self._obs.copy(), reward, self._terminated.copy(), self._truncated.copy(), {}

    def _executed(self, actions: np.ndarray) -> np.ndarray:
        """Actions as the environments expect them: in bounds, in their shape and type."""
        space = self.single_action_space
        executed: np.ndarray
        if isinstance(space, Discrete):
            executed = actions + space.start
        else:
            assert isinstance(space, Box)
            shaped = actions.reshape(self.num_envs, *space.shape).astype(space.dtype)
            executed = np.clip(shaped, space.low, space.high)
        return executed

    @property
    def steps_per_second(self) -> float:
        """What the environment itself says, else 30."""
        return float(self.envs[0].metadata.get("render_fps", 30))

    def scene(self, index: int) -> Frame | None:
        """What Gymnasium's own `render` shows; None where the environment has no "rgb_array".

        Raises:
            ValueError: it cannot be rendered here.
        """
        env: Any = self.envs[index].unwrapped
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            return None
        env.render_mode = "rgb_array"
        try:
            frame = np.asarray(env.render())
        except Exception as error:
            raise ValueError(f"{type(env).__name__}.render failed: {error}") from error
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(
                f"{type(env).__name__}.render returned {frame.dtype} of shape {frame.shape}, "
                "expected uint8 of shape (H, W, 3)"
            )
        return frame

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the environments."""
        for env in self.envs:
            env.close()

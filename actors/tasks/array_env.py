"""Base of the toy domains: all environments of a batch are rows of torch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from actors.family import Task
from actors.tasks.checks import mask_at_reset, matching_shape, tasks_at_reset
from learners.core.trajectory import Spec


def unbounded_box(size: int, dtype: torch.dtype) -> Box:
    """The space of vectors of any float32, or of any int64."""
    if dtype == torch.int64:
        bounds = np.iinfo(np.int64)
        return Box(bounds.min, bounds.max, (size,), np.int64)
    return Box(-np.inf, np.inf, (size,), np.float32)


class ArrayEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """`num_envs` environments of one toy family, advanced together on `device`.

    All tensors lie on `device`, and so does the generator that every random draw comes from.
    An environment that has ended stays so, `terminated` or `truncated`, with reward 0, until the
    next reset. A subclass keeps its state in tensors of fixed shapes [num_envs, ...], names them
    in `arrays`, and defines `set_tasks`, `start` and `advance`.

    Attributes:
        horizon_truncates: whether the horizon is a time limit, which sets `truncated`; otherwise
            it is part of the task and sets `terminated`.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own field)
    horizon_truncates = False

    def __init__(
        self,
        num_envs: int,
        spec: Spec,
        action_space: Space[Any],
        device: torch.device | str = "cpu",
        obs_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_envs = num_envs
        self.horizon = spec.horizon
        self.device = torch.device(device)
        self.single_observation_space = unbounded_box(spec.obs_size, obs_dtype)
        self.single_action_space = action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.generator.seed()
        self._action_dtype = torch.int64 if isinstance(action_space, Discrete) else torch.float32
        self._action_shape = (num_envs, *action_space.shape)  # type: ignore[misc]
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._limit: int | Tensor = spec.horizon
        self._ended = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self._truncated = torch.zeros_like(self._ended)
        self._obs = torch.zeros(num_envs, spec.obs_size, dtype=obs_dtype, device=self.device)
        self._has_tasks = False

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Copies the numbers of the tasks into this environment's tensors."""
        raise NotImplementedError

    def start(self) -> Tensor:
        """Puts every environment at its start; returns the observation, [num_envs, O]."""
        raise NotImplementedError

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step of all: observation [num_envs, O], reward [num_envs], early end [num_envs]."""
        raise NotImplementedError

    def arrays(self) -> dict[str, Tensor]:
        """The tensors, by name, that hold tasks and state."""
        raise NotImplementedError

    def episode_arrays(self) -> dict[str, Tensor]:
        """Those of the arrays that `start` may write; the others hold tasks."""
        return self.arrays()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Starts episodes.

        Args:
            seed: of every draw from now on; without it the random stream goes on.
            options: {"tasks": [task, ...]}, one per environment; without it the tasks stay.
                {"reset_mask": mask}, [num_envs] bool, starts these environments alone. With both,
                these alone take their tasks too; the tasks given for the others are not used.

        Returns:
            Observation [num_envs, O], and an empty dict.

        Raises:
            ValueError: there are no tasks yet, or tasks or mask do not fit.
        """
        mask = mask_at_reset(options, self.num_envs, with_tasks=True)
        tasks = tasks_at_reset(options, self.num_envs)
        if not self._has_tasks and (tasks is None or mask is not None):
            raise ValueError('the first reset needs options={"tasks": [...]} and no reset_mask')
        if seed is not None:
            self.generator.manual_seed(seed)
        if mask is None or mask.all():
            obs = self._start_all(tasks)
            for counter in (self._steps, self._ended, self._truncated):
                counter.zero_()
        else:
            obs = self._start_some(torch.from_numpy(mask).to(self.device), tasks)
        self._obs.copy_(obs)
        return obs, {}

    def _start_all(self, tasks: Sequence[Task] | None) -> Tensor:
        """Starts every environment but for its counters; returns the observation."""
        if tasks is not None:
            self.set_tasks(tasks)
            self._has_tasks = True
        return self.start()

    def _start_some(self, mask: Tensor, tasks: Sequence[Task] | None) -> Tensor:
        """Starts those of the mask; what that writes of the others is put back."""
        others = ~mask
        written = self.episode_arrays() if tasks is None else self.arrays()
        kept = {name: tensor[others] for name, tensor in written.items()}
        obs = torch.where(others[:, None], self._obs, self._start_all(tasks))
        for name, tensor in written.items():
            tensor[others] = kept[name]
        self._steps *= others
        self._ended &= others
        self._truncated &= others
        return obs

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step: observation, reward, terminated, truncated, empty dict.

        Args:
            actions: [num_envs, A] float32, or [num_envs] int64 where they are discrete.
        """
        action = torch.as_tensor(actions, dtype=self._action_dtype, device=self.device)
        if action.shape != self._action_shape:
            raise ValueError(
                f"actions have shape {tuple(action.shape)}, expected {self._action_shape}"
            )
        obs, reward, early_end = self.advance(action)
        self._obs.copy_(obs)
        reward = reward.masked_fill(self._ended, 0.0)
        self._steps += ~self._ended
        if early_end is not None:
            self._ended |= early_end
        at_limit = self._steps >= self._limit
        if self.horizon_truncates:
            self._truncated |= at_limit & ~self._ended
        self._ended |= at_limit
        return obs, reward, self._ended & ~self._truncated, self._truncated.clone(), {}

    def _saved(self) -> dict[str, Tensor]:
        own = {"steps": self._steps, "ended": self._ended, "obs": self._obs}
        if self.horizon_truncates:
            own["truncated"] = self._truncated
        return {**own, **self.arrays()}

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next steps depend on: tasks, state, counters, random state."""
        saved = {name: tensor.cpu().numpy().copy() for name, tensor in self._saved().items()}
        return saved | {"rng": self.generator.get_state().numpy().copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on bit for bit where `state` was taken, be it by another object.

        Raises:
            ValueError: `state` belongs to another kind or number of environments.
        """
        shapes = {name: array.shape for name, array in self.state().items()}
        fitting = {name: matching_shape(state, name, shapes[name]) for name in shapes}
        for name, tensor in self._saved().items():
            tensor.copy_(torch.from_numpy(fitting[name].copy()))
        self.generator.set_state(torch.from_numpy(fitting["rng"].copy()))
        self._has_tasks = True

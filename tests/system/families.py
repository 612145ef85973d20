"""Families for the tests of the system: environments that fail on demand."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from actors.family import Task
from actors.tasks.navigation_2d import Navigation2D, Navigation2DEnv
from learners.core.trajectory import Spec

ORDER_STEP = 2
"""The step at which `Obedient` follows its orders."""

LONGEST_WAIT_S = 200.0
"""After so long, an environment that was told to wait raises an error."""

EVERY_TASK = "every task"

SLOW_S = 0.5
LEAK_MB = 60
LEAKED: list[np.ndarray] = []

WRONG = {
    "wrong_obs_type": lambda obs, reward, ended, *rest: (obs.double(), reward, ended, *rest),
    "wrong_obs_shape": lambda obs, reward, ended, *rest: (obs[:, :1], reward, ended, *rest),
    "wrong_reward": lambda obs, reward, ended, *rest: (obs, reward[:, None], ended, *rest),
    "wrong_ends": lambda obs, reward, ended, *rest: (obs, reward, ended.long(), *rest),
    "wrong_number": lambda obs, reward, ended, *rest: (obs, reward, ended, {}),
}
"""What a step returns instead, by the order."""


@dataclass(frozen=True)
class Obedient(Navigation2D):
    """2D navigation that at step 2 of an episode follows the orders that lie in a folder.

    An order is a file whose content says whom it is for: the x of a goal, or "every task".

        nan_reward, nan_obs    that number is NaN in the environments concerned
        raise                  an error, with the process id
        wait                   waits until the file is gone, and leaves `waiting-<process id>`
        wrong_…                observations, rewards or ends of another type or shape: see `WRONG`
        leak                   LEAK_MB of memory are never given back

    The order `slow` holds process ids instead: in these the step takes SLOW_S longer.
    Without orders it is navigation-2d bit for bit.

    Attributes:
        orders: the folder; none are given where it is empty.
    """

    orders: str = ""

    def make(self, num_envs: int) -> ObedientEnv:
        return ObedientEnv(self, num_envs)


class ObedientEnv(Navigation2DEnv):
    """The batch of `Obedient`."""

    def __init__(self, family: Obedient, num_envs: int) -> None:
        super().__init__(family, num_envs)
        self._orders = Path(family.orders) if family.orders else None

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        obs, reward, reached = super().advance(action)
        if self._orders is None or int(self._steps.max()) != ORDER_STEP:
            return obs, reward, reached
        if self._concerned("wait").any():
            self._wait()
        if self._concerned("raise").any():
            raise RuntimeError(f"the simulator broke in process {os.getpid()}")
        if self._concerned("leak").any():
            LEAKED.append(np.ones(LEAK_MB * 2**20 // 8))
        if str(os.getpid()) in self._order("slow").split():
            time.sleep(SLOW_S)
        reward = reward.masked_fill(self._concerned("nan_reward"), math.nan)
        obs = obs.masked_fill(self._concerned("nan_obs").unsqueeze(1), math.nan)
        return obs, reward, reached

    def step(self, actions: Tensor) -> Any:
        stepped = super().step(actions)
        if self._orders is not None and int(self._steps.max()) == ORDER_STEP:
            for order, spoil in WRONG.items():
                if self._concerned(order).any():
                    return spoil(*stepped)
        return stepped

    def reset(self, **given: Any) -> Any:
        obs, info = super().reset(**given)
        if self._orders is not None and self._concerned("wrong_reset").any():
            return obs[:-1], info
        return obs, info

    def _order(self, order: str) -> str:
        """What an order says; empty where it was not given."""
        try:
            return (self._orders / order).read_text()
        except FileNotFoundError:
            return ""

    def _concerned(self, order: str) -> Tensor:
        """Environments that the order is for, [num_envs] bool."""
        content = self._order(order)
        if not content:
            return torch.zeros(self.num_envs, dtype=torch.bool)
        if content == EVERY_TASK:
            return torch.ones(self.num_envs, dtype=torch.bool)
        return (self._goal[:, 0] - float(content)).abs() < 1e-6

    def _wait(self) -> None:
        (self._orders / f"waiting-{os.getpid()}").touch()
        until = time.monotonic() + LONGEST_WAIT_S
        while (self._orders / "wait").exists():
            if time.monotonic() > until:
                raise TimeoutError("told to wait for too long")
            time.sleep(0.01)


@dataclass(frozen=True)
class Odometer(Navigation2D):
    """2D navigation whose environments count all steps that they ever took, over all episodes.

    Attributes:
        pause_s: seconds that a step of a batch takes at least.
    """

    pause_s: float = 0.0

    def make(self, num_envs: int) -> OdometerEnv:
        return OdometerEnv(self, num_envs)


class OdometerEnv(Navigation2DEnv):
    """The batch of `Odometer`; the count is part of what a checkpoint holds."""

    def __init__(self, family: Odometer, num_envs: int) -> None:
        super().__init__(family, num_envs)
        self._pause_s = family.pause_s
        self._odometer = torch.zeros(num_envs, dtype=torch.int64)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._odometer += 1
        time.sleep(self._pause_s)
        return super().advance(action)

    def episode_arrays(self) -> dict[str, Tensor]:
        return super().arrays()

    def arrays(self) -> dict[str, Tensor]:
        return super().arrays() | {"odometer": self._odometer}


@dataclass(frozen=True)
class Countdown:
    """Episodes of given lengths; the reward of step t is t + 1.

    Task: {"length": steps until the end, "truncate": 1 where the end is a time limit}.

    Attributes:
        horizon: the longest episode.
        garbage: whether an environment that has ended returns NaN, as the contract allows.
        reward_delay: as in `Spec`.
        lives: episodes that one game has.
    """

    horizon: int = 6
    garbage: bool = True
    reward_delay: int = 1
    lives: int = 1

    @property
    def spec(self) -> Spec:
        return Spec(2, 1, False, self.horizon, reward_delay=self.reward_delay)

    @property
    def finite_tasks(self) -> list[Task] | None:
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        lengths = rng.integers(1, self.horizon + 1, num_tasks)
        return [{"length": length, "truncate": length % 2} for length in lengths.tolist()]

    def make(self, num_envs: int) -> CountdownEnv:
        return CountdownEnv(self, num_envs)


class CountdownEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """The batch of `Countdown`."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own field)

    def __init__(self, family: Countdown, num_envs: int) -> None:
        self.num_envs = num_envs
        self.single_observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._garbage = np.nan if family.garbage else 0.0
        self._all_lives = family.lives
        self._steps = np.zeros(num_envs)
        self._lives = np.full(num_envs, family.lives)
        self._tasks: Sequence[Task] = ()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        options = options or {}
        self._tasks = list(options.get("tasks", self._tasks))
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        dead = mask & (self._lives == 0)
        if "tasks" in options:
            dead = mask
        self._lives[dead] = self._all_lives
        self._steps[mask] = 0
        return self._observe(), {}

    def step(self, actions: np.ndarray):
        lengths = np.array([task["length"] for task in self._tasks])
        limits = np.array([bool(task["truncate"]) for task in self._tasks])
        ended_before = self._steps >= lengths
        self._steps += 1
        over = self._steps >= lengths
        self._lives -= over & ~ended_before
        obs = self._observe()
        obs[ended_before] = self._garbage
        reward = self._steps.astype(np.float32)
        reward[ended_before] = self._garbage
        info = {"game_over": over & (self._lives == 0)} if self._all_lives > 1 else {}
        return obs, reward, over & ~limits, over & limits, info

    def _observe(self) -> np.ndarray:
        rows = np.arange(self.num_envs)
        return np.stack([self._steps, rows], 1).astype(np.float32)

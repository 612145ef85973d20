"""The delayed chains of LPG (Oh et al. 2020, appendix A).

Open implementations differ in which first action is rewarded. Here it is fixed for a lifetime, as
otherwise it could not be learned from the state alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from actors.family import Task
from actors.tasks.array_env import ArrayEnv
from actors.tasks.checks import task_array
from learners.core.trajectory import Spec, World

NUM_ACTIONS = 2
SHORTEST = 5
NUM_DISTRACTORS = 20


@dataclass(frozen=True)
class Chain:
    """Only the first of two actions matters, and only the last step tells.

    A lifetime has a length L, uniform in 5 … `longest`, and a rewarded action, 0 or 1. An episode
    terminates after L steps, with reward 1 if its first action was the rewarded one, else −1. The
    index of an observation is the state: 0 at the start, and 1 + a · longest + t − 1 after t
    steps, the first of which was action a. With distractors it is instead those of 22 bits that
    are 1: bit 0 if the first action was the rewarded one, bit 1 at the start, where it has yet to
    be chosen, and 20 random ones, new at every observation.

    Attributes:
        longest: length of the longest chain.
        noisy: whether steps other than the first and the last have a random reward, −1 or 1.
        distractors: whether bits are shown.
    """

    longest: int
    noisy: bool = False
    distractors: bool = False

    @property
    def num_actions(self) -> tuple[int, ...]:
        """Two."""
        return (NUM_ACTIONS,)

    @property
    def max_steps(self) -> int:
        """The longest length."""
        return self.longest

    def world(self, name: str) -> World:
        """What a policy must know of it."""
        if self.distractors:
            bits = 2 + NUM_DISTRACTORS
            return World(name, bits, bits, tabular=False)
        return World(name, 1, 1 + NUM_ACTIONS * self.longest, tabular=True)

    def level(self, seed: int) -> tuple[int, int]:
        """Length and rewarded action of that seed."""
        rng = np.random.default_rng(seed)
        return int(rng.integers(SHORTEST, self.longest + 1)), int(rng.integers(NUM_ACTIONS))

    def make(self, num_envs: int, spec: Spec, device: torch.device | str) -> ChainEnv:
        """A batch of environments with the observation and action sizes of `spec`."""
        return ChainEnv(self, num_envs, spec, device)


CHAINS: dict[str, Chain] = {
    "chain-short": Chain(30),
    "chain-short-noisy": Chain(30, noisy=True),
    "chain-long": Chain(50),
    "chain-long-noisy": Chain(50, noisy=True),
    "chain-distractor": Chain(30, distractors=True),
}
"""The five of LPG."""


class ChainEnv(ArrayEnv):
    """The batch of chains. The number of steps of the episode is how far it has come."""

    def __init__(
        self, chain: Chain, num_envs: int, spec: Spec, device: torch.device | str = "cpu"
    ) -> None:
        own = Spec(spec.obs_size, spec.action_size, discrete=True, horizon=chain.longest)
        super().__init__(num_envs, own, Discrete(spec.action_size), device, torch.int64)
        self._chain = chain
        num_indices = chain.world("").num_indices
        self._padding = torch.full((num_envs, spec.obs_size - 1 - num_indices), -1).to(self.device)
        self._num_actions = torch.full((num_envs, 1), NUM_ACTIONS, device=self.device)
        self._bit = torch.arange(num_indices, device=self.device)
        self._length = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._rewarded = torch.zeros_like(self._length)
        self._first = torch.zeros_like(self._length)
        # The horizon ends an episode as well: it is each chain's own.
        self._limit = self._length

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Draws length and rewarded action of each seed."""
        levels = [self._chain.level(int(seed)) for seed in task_array(tasks, "level", 1)[:, 0]]
        length, rewarded = torch.tensor(levels).unbind(1)
        self._length.copy_(length)
        self._rewarded.copy_(rewarded)

    def start(self) -> Tensor:
        """The start; the first action is yet to come."""
        return self._observed(torch.zeros_like(self._first))

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, None]:
        """One step; action a + 2 is a."""
        before = self._steps
        step = before + ~self._ended
        self._first.copy_(torch.where(before == 0, action % NUM_ACTIONS, self._first))
        sign = 1.0 - 2.0 * (self._first != self._rewarded)
        reward = sign * (step == self._length)
        if self._chain.noisy:
            middle = (step > 1) & (step < self._length)
            reward = torch.where(middle, self._coins(self.num_envs) * 2.0 - 1.0, reward)
        return self._observed(step), reward, None

    def _coins(self, *shape: int) -> Tensor:
        """True or false, each as likely."""
        return torch.rand(shape, device=self.device, generator=self.generator) < 0.5

    def _observed(self, step: Tensor) -> Tensor:
        """The observation after that many steps, [num_envs] → [num_envs, O]."""
        if self._chain.distractors:
            chosen = torch.stack([(self._first == self._rewarded) & (step > 0), step == 0], 1)
            bits = torch.cat([chosen, self._coins(self.num_envs, NUM_DISTRACTORS)], 1)
            indices = torch.where(bits, self._bit, -1)
        else:
            indices = ((self._first * self._chain.longest + step) * (step > 0))[:, None]
        return torch.cat([self._num_actions, indices, self._padding], 1)

    def episode_arrays(self) -> dict[str, Tensor]:
        """First actions, [num_envs]."""
        return {"first": self._first}

    def arrays(self) -> dict[str, Tensor]:
        """Lengths, rewarded actions and first actions, [num_envs]."""
        return self.episode_arrays() | {"length": self._length, "rewarded": self._rewarded}

"""Random tabular MDPs (Duan et al. 2016, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from actors.family import Task
from actors.opponents.mdps import mdp_optimum
from actors.tasks.array_env import ArrayEnv
from actors.tasks.checks import check_whole, task_array
from learners.core.trajectory import Spec


@dataclass(frozen=True)
class TabularMDP:
    """An MDP with S states and A actions whose tables are drawn at random.

    Mean rewards are N(1, 1) per state and action, and the observed reward is N(mean, 1).
    Transitions are Dirichlet(1, …, 1). Episodes start in state 0; the observation is the state,
    one-hot. Task, as flat lists in row-major order: {"mean_reward": [S·A], "transition": [S·A·S]}.

    Attributes:
        states: S, number of states.
        actions: A, number of actions.
        horizon: H, steps of an episode.
    """

    states: int = 10
    actions: int = 5
    horizon: int = 10

    def __post_init__(self) -> None:
        check_whole(self, "states", 2)
        check_whole(self, "actions", 2)
        check_whole(self, "horizon", 1)

    @property
    def spec(self) -> Spec:
        """A one-hot state and a choice."""
        return Spec(self.states, self.actions, discrete=True, horizon=self.horizon)

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None: tables are continuous."""
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Tables, independent."""
        pairs = self.states * self.actions
        return [
            {
                "mean_reward": rng.normal(1.0, 1.0, pairs).tolist(),
                "transition": rng.dirichlet(np.ones(self.states), pairs).reshape(-1).tolist(),
            }
            for _ in range(num_tasks)
        ]

    def tables(self, tasks: Sequence[Task]) -> tuple[np.ndarray, np.ndarray]:
        """Mean rewards [M, S, A] and transition probabilities [M, S, A, S] of M tasks."""
        shape, pairs = (len(tasks), self.states, self.actions), self.states * self.actions
        reward = task_array(tasks, "mean_reward", pairs)
        transition = task_array(tasks, "transition", pairs * self.states)
        return reward.reshape(shape), transition.reshape(*shape, self.states)

    def optimum(self, tasks: Sequence[Task]) -> np.ndarray:
        """What knowing the task earns in an episode, on average, [M]."""
        return mdp_optimum(*self.tables(tasks), 1, self.horizon)

    def make(self, num_envs: int) -> TabularMDPEnv:
        """A batch of environments on the CPU."""
        return TabularMDPEnv(self, num_envs)


class TabularMDPEnv(ArrayEnv):
    """The batch of MDPs. A pair of state s and action a is row s·A + a of both tables."""

    def __init__(
        self, family: TabularMDP, num_envs: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(num_envs, family.spec, Discrete(family.actions), device)
        self._family = family
        states, actions = family.states, family.actions
        self._mean_reward = self._zeros(num_envs, states * actions)
        self._cumulative = self._zeros(num_envs, states * actions, states)
        self._now = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._row = torch.arange(num_envs, device=self.device)
        self._one_hot = torch.eye(states, device=self.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Takes the tables; transitions are kept as cumulative probabilities."""
        reward, transition = self._family.tables(tasks)
        self._mean_reward.copy_(torch.from_numpy(reward).flatten(1))
        if (transition < 0.0).any() or not np.allclose(transition.sum(3), 1.0):
            raise ValueError("transition probabilities must be at least 0 and add up to 1")
        self._cumulative.copy_(torch.from_numpy(transition).flatten(1, 2).cumsum(2))

    def start(self) -> Tensor:
        """State 0."""
        return self._one_hot[self._now.zero_()]

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, None]:
        """Draws the reward's noise, then the next state by inversion."""
        pair = self._now * self._family.actions + action
        noise = torch.randn(
            self.num_envs, dtype=torch.float64, device=self.device, generator=self.generator
        )
        draw = torch.rand(
            self.num_envs, 1, dtype=torch.float64, device=self.device, generator=self.generator
        )
        # The last cumulative probability may be rounded to less than 1: it is not compared.
        passed = draw >= self._cumulative[self._row, pair, :-1]
        self._now.copy_(passed.sum(1))
        reward = self._mean_reward[self._row, pair] + noise
        return self._one_hot[self._now], reward.float(), None

    def arrays(self) -> dict[str, Tensor]:
        """Both tables and the states, [num_envs]."""
        return {
            "mean_reward": self._mean_reward,
            "cumulative": self._cumulative,
            "now": self._now,
        }

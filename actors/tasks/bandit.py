"""Bernoulli bandits (Duan et al. 2016, section 3.1), all pulls of a member as one episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from actors.family import Task
from actors.tasks.array_env import ArrayEnv
from actors.tasks.checks import check_whole, task_array
from learners.core.trajectory import Spec


@dataclass(frozen=True)
class Bandit:
    """Arms that pay 1 with their own probability, else 0. Task: {"means": [...]}, U[0, 1] each.

    An episode is `pulls` pulls, so that its return is what papers report; pulls are independent, so
    a learner should not discount into the next one (γ = 0). The observation is the constant 1, and
    not 0, because a network of zero biases and ReLU units that sees 0 has zero
    hidden activity and zero gradient everywhere but in its last bias: gradient-based adaptation
    could then learn no more than one step of fixed length on the action probabilities.

    Knowing the arms pays arms / (arms + 1) per pull on average, chance 1/2.

    Attributes:
        arms: A, number of arms.
        pulls: H, pulls of an episode.
    """

    arms: int = 5
    pulls: int = 100

    def __post_init__(self) -> None:
        check_whole(self, "arms", 2)
        check_whole(self, "pulls", 1)

    @property
    def spec(self) -> Spec:
        """One constant, one choice."""
        return Spec(obs_size=1, action_size=self.arms, discrete=True, horizon=self.pulls)

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None: means are continuous."""
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Means, independent and uniform."""
        return [{"means": means} for means in rng.uniform(size=(num_tasks, self.arms)).tolist()]

    def means(self, tasks: Sequence[Task]) -> np.ndarray:
        """The arms' probabilities of paying, [M, A]."""
        return task_array(tasks, "means", self.arms)

    def optimum(self, tasks: Sequence[Task]) -> np.ndarray:
        """What knowing the task earns in an episode, on average, [M]."""
        best: np.ndarray = self.pulls * self.means(tasks).max(1)
        return best

    def make(self, num_envs: int) -> BanditEnv:
        """A batch of environments on the CPU."""
        return BanditEnv(self, num_envs)


class BanditEnv(ArrayEnv):
    """The batch of bandits."""

    def __init__(self, family: Bandit, num_envs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_envs, family.spec, Discrete(family.arms), device)
        self._family = family
        self._means = torch.zeros(num_envs, family.arms, dtype=torch.float64, device=self.device)
        self._obs = torch.ones(num_envs, 1, device=self.device)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Takes the means."""
        means = self._family.means(tasks)
        if (means < 0.0).any() or (means > 1.0).any():
            raise ValueError("the means of Bernoulli arms must lie in [0, 1]")
        self._means.copy_(torch.from_numpy(means))

    def start(self) -> Tensor:
        """The constant 1."""
        return self._obs.clone()

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, None]:
        """Pulls."""
        mean = self._means.gather(1, action[:, None])[:, 0]
        draw = torch.rand(
            self.num_envs, dtype=torch.float64, device=self.device, generator=self.generator
        )
        return self._obs.clone(), (draw < mean).float(), None

    def arrays(self) -> dict[str, Tensor]:
        """Means, [num_envs, arms]."""
        return {"means": self._means}

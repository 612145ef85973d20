"""Random walks on a line (Sutton and Barto 2018, example 6.2), whose values are to be predicted.

The environments know the true value of every state under the target policy, which is the same
at every state and may differ from the policy that acts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from actors.family import OneTask, Task
from actors.tasks.array_env import ArrayEnv
from actors.tasks.checks import check_number, check_whole
from learners.core.trajectory import Spec

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class _RandomWalk(OneTask):
    """Options that both walks share.

    Episodes start in the centre of n states; action 0 is a step to the left, 1 to the right.
    A step off either end terminates the episode. The observation is the state, one-hot, and all
    zeros beyond the ends.

    Attributes:
        states: n; odd, so that there is a centre.
        horizon: H, steps after which an episode ends all the same. True values do not know of
            it: it should be so large that it is practically never reached, as the default is.
    """

    states: int = 5
    horizon: int = 1000

    def __post_init__(self) -> None:
        check_whole(self, "states", 3)
        check_whole(self, "horizon", 1)
        if self.states % 2 == 0:
            raise ValueError(
                f"{type(self).__name__}: states must be odd, so that there is a centre, "
                f"not {self.states}"
            )

    def _spec(self, right: float, swing: float = 0.0, switch_every: int = 1) -> Spec:
        leanings = (0.5 - swing, 0.5 + swing) if swing > 0.0 else ()
        return Spec(
            obs_size=self.states,
            action_size=2,
            discrete=True,
            horizon=self.horizon,
            target_policy=(1.0 - right, right),
            behaviours=tuple((1.0 - leaning, leaning) for leaning in leanings),
            switch_every=switch_every,
        )


@dataclass(frozen=True)
class RandomWalkFlip(_RandomWalk):
    """The symmetric walk, whose only reward, ±1 on leaving at the right end, changes its sign.

    The sign is 1 in the first `flip_every` steps of an environment's life, −1 in the next, and so
    on. A life is all steps since tasks were given, whatever the episode; steps after an episode's
    end are none. The true value of a step is that under the sign which holds at this step, as if
    it never flipped.

    Attributes:
        flip_every: environment steps between two flips.
    """

    flip_every: int = 960

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "flip_every", 1)

    @property
    def spec(self) -> Spec:
        """A one-hot state; left and right, equally likely under the target policy."""
        return self._spec(0.5)

    def make(self, num_envs: int) -> RandomWalkEnv:
        """A batch of environments on the CPU."""
        return RandomWalkEnv(self, num_envs)

    def reward(self, life: Tensor) -> Tensor:
        """What leaving at the right end earns after that many steps of a life."""
        return (1 - 2 * (life // self.flip_every % 2)).float()


@dataclass(frozen=True)
class RandomWalkOffPolicy(_RandomWalk):
    """The walk under a policy that leans to the right, and that is not the one that acts.

    The one that acts goes to the right with probability 0.5 − `swing` in the first `switch_every`
    steps of a life, with 0.5 + `swing` in the next, and so on; and each time the reward on leaving
    at the right end is another one in [−1, 1]. Were the behaviour always the same, importance
    ratios would not be needed: V(s') against V(s) tells which way a step went, and a fixed factor
    for either way can be learned. Were the reward always the same, a rule could learn the five
    values by heart.

    The reward of turn k is 2 frac((k + 1) φ) − 1, φ the golden ratio: it comes near every number
    and near none too often. It is the same in all environments.

    Attributes:
        right: probability of a step to the right under the target policy.
        swing: how far the policy that acts leans to the left, then to the right; 0 for not at all.
        switch_every: environment steps of a turn.
    """

    right: float = 0.8
    swing: float = 0.2
    switch_every: int = 4800

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "right", 0.0, exclusive=True)
        if self.right >= 1.0:
            raise ValueError(f"RandomWalkOffPolicy: right must be below 1, not {self.right}")
        check_number(self, "swing", 0.0)
        if self.swing >= 0.5:
            raise ValueError(f"RandomWalkOffPolicy: swing must be below 0.5, not {self.swing}")
        check_whole(self, "switch_every", 1)

    @property
    def spec(self) -> Spec:
        """A one-hot state; left and right."""
        return self._spec(self.right, self.swing, self.switch_every)

    def make(self, num_envs: int) -> RandomWalkEnv:
        """A batch of environments on the CPU."""
        return RandomWalkEnv(self, num_envs)

    def reward(self, life: Tensor) -> Tensor:
        """What leaving at the right end earns after that many steps of a life."""
        turn = (life // self.switch_every + 1).double()
        return (2.0 * (turn * GOLDEN).frac() - 1.0).float()


def chance_of_right_end(states: int, target_policy: tuple[float, ...]) -> Tensor:
    """Probability of leaving at the right end from each position, [states + 2] float32.

    With r = q/p, the odds of a step to the left, gambler's ruin gives at position i

        (1 − r^i) / (1 − r^(n+1)) = Σ_{j<i} r^j / Σ_{j≤n} r^j,

    whose right side also holds for r = 1 and neither cancels nor overflows as a softmax of
    j·log r. Positions 1 … n are the states, 0 and n + 1 lie beyond the ends.

    Args:
        states: n.
        target_policy: q and p, probabilities of a step to the left and to the right.
    """
    left, right = target_policy
    log_ratio = math.log(left) - math.log(right)
    weights = torch.softmax(torch.arange(states + 1, dtype=torch.float64) * log_ratio, 0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)]).float()


class RandomWalkEnv(ArrayEnv):
    """The batch of walks. Positions 1 … n are the states, 0 and n + 1 lie beyond the ends.

    Each counts the steps of its own life.
    """

    def __init__(
        self,
        family: RandomWalkFlip | RandomWalkOffPolicy,
        num_envs: int,
        device: torch.device | str = "cpu",
    ) -> None:
        spec = family.spec
        super().__init__(num_envs, spec, Discrete(2), device)
        assert spec.target_policy is not None
        self._family = family
        self._life = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._position = torch.zeros_like(self._life)
        self._one_hot = torch.eye(family.states + 2, device=self.device)[:, 1:-1]
        chances = chance_of_right_end(family.states, spec.target_policy)
        self._chance_of_right_end = chances.to(self.device)

    def reward_at_right_end(self) -> Tensor:
        """What a step off the right end would earn now, [num_envs]."""
        return self._family.reward(self._life)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Begins new lives."""
        self._life.zero_()

    def start(self) -> Tensor:
        """The centre."""
        return self._one_hot[self._position.fill_((self._family.states + 1) // 2)]

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step to the left or to the right, under the reward that held before it.

        Who has left stays where it is.
        """
        going = ~self._ended
        self._position += (2 * action - 1) * going
        left, right = self._position == 0, self._position == self._family.states + 1
        reward = self.reward_at_right_end().masked_fill(~right, 0.0)
        self._life += going
        return self._one_hot[self._position], reward, left | right

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step, as in `ArrayEnv`; the info holds `true_value` [num_envs] float32.

        It is the expected undiscounted return under the target policy from the state that was
        acted on, if the reward stayed as it is, and 0 in an episode that has ended.
        """
        value = self._chance_of_right_end[self._position] * self.reward_at_right_end()
        true_value = value.masked_fill(self._ended, 0.0)
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward, terminated, truncated, info | {"true_value": true_value}

    def arrays(self) -> dict[str, Tensor]:
        """Positions and steps of the lives, [num_envs]."""
        return {"position": self._position, "life": self._life}

    def episode_arrays(self) -> dict[str, Tensor]:
        """Positions: lives go on."""
        return {"position": self._position}

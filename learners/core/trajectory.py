"""The vocabulary: what is collected, by what kind of agent, and in which shapes.

Letters used everywhere:

    M  members (tasks, lifetimes or replicas)    O  observation size
    K  inner updates                             A  action size
    T  time steps of one chunk                   P  number of parameters
    E  parallel environments of one member
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Named parameters. A member's own parameters carry a leading axis M."""

Metrics = dict[str, float]
"""Scalars by TensorBoard tag."""


@dataclass(frozen=True)
class World:
    """One kind of environment among several that lifetimes are spent in.

    An observation is a few indices into S binary features: those that are 1.

    Attributes:
        name: of the kind.
        num_indices: F, the largest number of indices of an observation; 0 where an observation is
            the values of the features themselves.
        num_features: S.
        tabular: whether the one index is the state itself.
        grid: (height, width) where there is an agent in a cell. On a table the state's number is a
            multiple of its cell's, row·width + column; else features are planes of pixels, that of
            the agent first.
    """

    name: str
    num_indices: int
    num_features: int
    tabular: bool
    grid: tuple[int, int] | None = None

    def cell(self, obs: Tensor) -> Tensor:
        """The agent's cell in observations [..., O], where there is a grid."""
        assert self.grid is not None
        height, width = self.grid
        return obs[..., 1] // (self.num_features // (height * width) if self.tabular else 1)


@dataclass(frozen=True)
class Spec:
    """What a policy must know of its environments.

    Attributes:
        obs_size: O, length of one flat observation.
        action_size: A, action dimensions (continuous) or number of actions (discrete).
        discrete: whether actions are integers in [0, A).
        horizon: H, the largest number of steps of an episode.
        reward_delay: steps whose rewards reach the agent as one sum; 1 for each at its own step.
        image: (channels, height, width) where observations are pixels: O bytes, flat, uint8.
        velocity: index of the forward velocity in an observation, where there is one.
        target_policy: probability of each action under the policy whose value is asked for, at
            every observation; None where a policy is to be found.
        behaviours: the policies that act in turn where there is a target policy, each as the
            probability of each action; () for all actions being as likely.
        switch_every: environment steps between two of them.
        num_episodes: n, episodes of a trial, where an environment's life is one trial of one task
            and its observations hold the last action, reward and end; 0 where there is no trial.
        worlds: kinds of environment, where lifetimes differ in kind. Members 0 … M−1 are dealt out
            over the W kinds in order, member m has kind ⌊m W / M⌋. Observations are then int64
            [num_actions, index, …, index]: the number of actions that this lifetime has, at most
            `action_size`, and the indices, −1 where there are fewer than O − 1.
    """

    obs_size: int
    action_size: int
    discrete: bool
    horizon: int
    reward_delay: int = 1
    image: tuple[int, int, int] | None = None
    velocity: int | None = None
    target_policy: tuple[float, ...] | None = None
    behaviours: tuple[tuple[float, ...], ...] = ()
    switch_every: int = 1
    num_episodes: int = 0
    worlds: tuple[World, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """T steps of M members in E environments each, time-major within a member.

    `valid` is 0 after an episode that ended early and in padding: every mean over steps is a sum
    over valid steps divided by their number. Only `terminated` zeroes a bootstrap; in
    finite-horizon families the horizon sets it. `episode_return` and `episode_length` hold the
    raw return and the number of steps of an episode at the step where it ends, and 0 elsewhere.

    A chunk of whole episodes has the steps of one episode in each environment. In a chunk of a
    stream a new episode follows at once where one ends (autoreset SAME_STEP): every step is valid,
    `obs` after an end is the first of the next episode, and `final_obs` has the last of the old
    one where `truncated`. `final_obs` and `discounted_return` are of length T = 0 in chunks of
    whole episodes, `true_value` where the environment does not know it.
    """

    obs: Tensor  # [M, T, E, O], raw
    action: Tensor  # [M, T, E, A], or [M, T, E] int64 where actions are discrete
    reward: Tensor  # [M, T, E], what is learned from: normalized and delayed where asked for
    terminated: Tensor  # [M, T, E] bool
    truncated: Tensor  # [M, T, E] bool
    valid: Tensor  # [M, T, E], 1.0 or 0.0
    log_prob: Tensor  # [M, T, E], of the behaviour policy
    last_obs: Tensor  # [M, E, O], the observation after the last step
    episode_return: Tensor  # [M, T, E]
    episode_length: Tensor  # [M, T, E]
    final_obs: Tensor  # [M, T, E, O], the observation at which a time limit ended an episode
    discounted_return: Tensor  # [M, T, E], Σ γ^i r_{t−i} of raw rewards, for the normalizer
    true_value: Tensor  # [M, T, E], value of `obs` under the target policy

    def map(self, function: Callable[[Tensor], Tensor]) -> Trajectory:
        """Applies `function` to every tensor."""
        return Trajectory(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def members(self, start: int, stop: int) -> Trajectory:
        """Members start ≤ m < stop, as views."""
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> Trajectory:
        """The same trajectory on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def ended(self) -> Tensor:
        """1.0 where an episode ends, [M, T, E]."""
        return (self.terminated | self.truncated).to(self.reward.dtype)

    @property
    def num_steps(self) -> int:
        """Valid environment steps."""
        return int(self.valid.sum().item())


ENV_AXIS = {f.name: 2 for f in fields(Trajectory)} | {"last_obs": 1}
"""Where axis E stands in each field of a `Trajectory`."""


def concatenate(parts: Sequence[Trajectory], axis: str) -> Trajectory:
    """Joins trajectories along axis "members" or "envs", in the order given."""

    def join(name: str) -> Tensor:
        dim = 0 if axis == "members" else ENV_AXIS[name]
        return torch.cat([getattr(part, name) for part in parts], dim)

    return Trajectory(**{f.name: join(f.name) for f in fields(Trajectory)})


def masked_mean(value: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid steps of each member, [M, T, E] → [M]."""
    return (value * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1.0)


def mean_episode_return(trajectory: Trajectory) -> Tensor:
    """Mean raw return of the episodes that ended in the trajectory, per member, [M].

    A member in which no episode ended has NaN.
    """
    ended = ((trajectory.terminated | trajectory.truncated) & (trajectory.valid > 0)).float()
    return (trajectory.episode_return * ended).sum((1, 2)) / ended.sum((1, 2))

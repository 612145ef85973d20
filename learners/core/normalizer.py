"""Running normalization of observations and rewards, one per member.

Statistics are frozen while a chunk is collected, and merged by the learner afterwards, in slot
order; they travel to the actors as untrained entries of the parameters. Gymnasium's and
Stable-Baselines' VecNormalize update theirs at every step, before the step is used: here the first
chunk acts on raw observations and rewards, and each later one on statistics that are a chunk old.
What is reported is never normalized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core.trajectory import Params, Trajectory

EPS = 1e-8
CLIP = 10.0
"""Largest size of a normalized value."""
OBS_MEAN, OBS_STD, REWARD_STD = "norm.obs_mean", "norm.obs_std", "norm.reward_std"


@dataclass(frozen=True)
class Normalizer:
    """What is normalized, and how.

    Attributes:
        obs: whether observations are shifted and scaled to mean 0 and deviation 1.
        reward: whether rewards are divided by the deviation of the running discounted return.
        gamma: γ of that return.
        clip: normalized values are clipped to ±clip.
    """

    obs: bool
    reward: bool
    gamma: float
    clip: float = CLIP

    def init(self, num_members: int, obs_size: int) -> Params:
        """Statistics of nothing yet: counts 0, means 0, variances 1, float64."""
        state: Params = {}
        if self.obs:
            state["obs_mean"] = torch.zeros(num_members, obs_size, dtype=torch.float64)
            state["obs_var"] = torch.ones(num_members, obs_size, dtype=torch.float64)
            state["obs_count"] = torch.zeros(num_members, 1, dtype=torch.float64)
        if self.reward:
            state["return_mean"] = torch.zeros(num_members, 1, dtype=torch.float64)
            state["return_var"] = torch.ones(num_members, 1, dtype=torch.float64)
            state["return_count"] = torch.zeros(num_members, 1, dtype=torch.float64)
        return state

    def entries(self, state: Params) -> Params:
        """The untrained entries of the members' parameters, float32."""
        out: Params = {}
        if self.obs:
            out[OBS_MEAN] = state["obs_mean"].float()
            out[OBS_STD] = (state["obs_var"] + EPS).sqrt().float()
        if self.reward:
            out[REWARD_STD] = (state["return_var"] + EPS).sqrt().float()
        return out

    def merge(self, state: Params, trajectory: Trajectory) -> Params:
        """The statistics with a trajectory's valid steps added (Chan et al. 1979)."""
        new = dict(state)
        valid = trajectory.valid.flatten(1)
        if self.obs:
            new |= merged(state, "obs", trajectory.obs.flatten(1, 2), valid)
        if self.reward:
            new |= merged(
                state, "return", trajectory.discounted_return.flatten(1)[..., None], valid
            )
        return new


def normalize_obs(params: Params, obs: Tensor, clip: float = CLIP) -> Tensor:
    """Normalized observations [M, N, O] where `params` has statistics, else `obs` itself."""
    return normalization(params, clip)(obs)


def normalization(params: Params, clip: float = CLIP) -> Callable[[Tensor], Tensor]:
    """`normalize_obs` with these `params`, prepared for many calls."""
    if OBS_MEAN not in params:
        return lambda obs: obs
    mean, std = params[OBS_MEAN].unsqueeze(1), params[OBS_STD].unsqueeze(1)
    return lambda obs: ((obs - mean) / std).clamp(-clip, clip)


def merged(state: Params, name: str, value: Tensor, valid: Tensor) -> Params:
    """Mean, variance and count of `name` with [M, N, size] values added, [M, N] of them valid."""
    mean, var, count = (state[f"{name}_{part}"] for part in ("mean", "var", "count"))
    value, weight = value.double(), valid.double().unsqueeze(-1)
    added = weight.sum(1)
    own_mean = (value * weight).sum(1) / added.clamp_min(1.0)
    own_squares = ((value - own_mean.unsqueeze(1)).square() * weight).sum(1)
    total = (count + added).clamp_min(1.0)
    shift = own_mean - mean
    squares = var * count + own_squares + shift.square() * count * added / total
    return {
        f"{name}_mean": mean + shift * added / total,
        f"{name}_var": torch.where(count + added > 0, squares / total, var),
        f"{name}_count": count + added,
    }

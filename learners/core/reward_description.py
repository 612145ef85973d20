"""What a person may want to see of a reward that is learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learners.core.actor_critic import rollout
from learners.core.trajectory import Params, Spec, Trajectory

Reward = Callable[[Tensor, Tensor], Tensor]
"""Normalized observations [N, O] and actions [N, A] or [N] → rewards [N], with gradient to both."""

NUM_FRAMES = 8
NUM_SLICES = 6
NUM_POINTS = 41
"""Points of a slice along each axis."""

VELOCITY_LIMIT, ACTION_LIMIT = 3.0, 1.0
"""Half-widths of a slice, in standard deviations and in units of the action."""


def describe_reward(
    spec: Spec, reward: Reward, batch: Trajectory, statistics: Params
) -> dict[str, Tensor]:
    """A reward's values over one member's rollout, and what they depend on.

    Args:
        spec: of the environments.
        reward: r_in.
        batch: of one member, M = 1.
        statistics: the normalizer's entries, or nothing.

    Returns:
        Without gradient,
        "intrinsic_reward" [T·E]: r_in of every step;
        "episode_intrinsic", "episode_extrinsic" [T']: r_in, and the reward as it is learned from
        (delayed, normalized), along the first environment's `first_episode`;
        where the forward velocity is known, the entries of `slices`;
        where observations are pixels, those of `saliency`.
    """
    data = rollout(batch, statistics)
    obs, action = data.obs[0], data.action[0]
    with torch.no_grad():
        value = reward(obs, action)
    steps = first_episode(batch)
    described = {
        "intrinsic_reward": value,
        "episode_intrinsic": value.view_as(batch.reward[0])[steps, 0],
        "episode_extrinsic": batch.reward[0, steps, 0],
    }
    if spec.image is not None:
        described |= saliency(spec.image, reward, obs.to(value.dtype), action)
    elif spec.velocity is not None and not spec.discrete:
        described |= slices(spec, spec.velocity, reward, obs)
    return described


def first_episode(batch: Trajectory) -> slice:
    """Steps of the first episode that is complete in environment 0, or all where none is."""
    start = 0
    ended = (batch.terminated | batch.truncated)[0, :, 0]
    for end in ended.nonzero().flatten().tolist():
        if start > 0 or int(batch.episode_length[0, end, 0]) == end + 1:
            return slice(start, end + 1)
        start = end + 1
    return slice(0, batch.reward.shape[1])


def slices(spec: Spec, velocity: int, reward: Reward, like: Tensor) -> dict[str, Tensor]:
    """The reward over forward velocity × one action dimension, all other inputs 0.

    Args:
        spec: of the environments; actions are continuous.
        velocity: index of the forward velocity in an observation.
        reward: r_in.
        like: a tensor of the device and number type to use.

    Returns:
        "slices" [A', G, G]: of the first A' action dimensions; rows go along the action, columns
        along the velocity. "slice_velocity" and "slice_action" [G]: the points of the axes.
    """
    num_slices = min(spec.action_size, NUM_SLICES)
    speeds = torch.linspace(-VELOCITY_LIMIT, VELOCITY_LIMIT, NUM_POINTS).to(like)
    efforts = torch.linspace(-ACTION_LIMIT, ACTION_LIMIT, NUM_POINTS).to(like)
    grid = (num_slices, NUM_POINTS, NUM_POINTS)
    obs, action = like.new_zeros(*grid, spec.obs_size), like.new_zeros(*grid, spec.action_size)
    obs[..., velocity] = speeds
    for dimension in range(num_slices):
        action[dimension, ..., dimension] = efforts.unsqueeze(1)
    with torch.no_grad():
        value = reward(obs.flatten(0, 2), action.flatten(0, 2))
    return {
        "slices": value.view(grid),
        "slice_velocity": speeds,
        "slice_action": efforts,
    }


def saliency(
    image: tuple[int, int, int], reward: Reward, obs: Tensor, action: Tensor
) -> dict[str, Tensor]:
    """Which pixels the reward of the action taken depends on, at steps all over the rollout.

    Args:
        image: (channels, height, width).
        reward: r_in.
        obs: [N, O], brightness 0 … 255 as floating-point numbers.
        action: [N].

    Returns:
        "frames" [8, H, W] uint8: the newest channel; fewer where N < 8.
        "saliency" [8, H, W]: |∂r_in/∂pixel|, added up over the channels.
        "frame_reward" [8]: r_in.
    """
    rows = torch.linspace(0, len(obs) - 1, min(NUM_FRAMES, len(obs)), device=obs.device).long()
    pixels = obs[rows].requires_grad_()
    value = reward(pixels, action[rows])
    (grad,) = torch.autograd.grad(value.sum(), pixels)
    return {
        "frames": obs[rows].view(-1, *image)[:, -1].to(torch.uint8),
        "saliency": grad.view(-1, *image).abs().sum(1),
        "frame_reward": value.detach(),
    }

"""Discounted sums along time, as batched scans over [M, T, E].

A step after which an episode does not go on (`terminated` or padding) cuts the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reverse_scan(increment: Tensor, decay: Tensor) -> Tensor:
    """y_t = increment_t + decay_t · y_{t+1} with y_T = 0, along axis 1 of [M, T, E]."""
    total = torch.zeros_like(increment[:, 0])
    sums = []
    for t in range(increment.shape[1] - 1, -1, -1):
        total = increment[:, t] + decay[:, t] * total
        sums.append(total)
    return torch.stack(sums[::-1], 1)


def discounted_returns(reward: Tensor, terminated: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + γ G_{t+1}, zero in padding, [M, T, E].

    Gradient flows to `reward`.
    """
    return reverse_scan(reward * valid, gamma * continues(terminated, valid))


def gae(
    reward: Tensor, value: Tensor, terminated: Tensor, valid: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), [M, T, E].

    δ_t = r_t + γ V_{t+1} − V_t and Â_t = δ_t + γλ Â_{t+1}. The value after the last step, after
    `terminated` and in padding is 0. Gradient flows to `reward` and `value`.
    """
    going = continues(terminated, valid)
    value = value * valid
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    delta = (reward + gamma * going * next_value - value) * valid
    return reverse_scan(delta, gamma * lam * going)


def continues(terminated: Tensor, valid: Tensor) -> Tensor:
    """1 where a step is valid and its episode goes on, else 0, [M, T, E]."""
    return valid * (~terminated).to(valid.dtype)


def standardise(value: Tensor, valid: Tensor, eps: float = 1e-8) -> Tensor:
    """Shifts and scales each member's valid entries to mean 0 and deviation 1, [M, T, E]."""
    count = valid.sum((1, 2), keepdim=True).clamp_min(1.0)
    mean = (value * valid).sum((1, 2), keepdim=True) / count
    centred = (value - mean) * valid
    deviation = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    return centred / (deviation + eps)

"""Discounted sums along time, as batched scans over [M, T, E].

A step after which an episode does not go on (`terminated` or padding) cuts the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""Added to a deviation before it divides."""


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


def bootstraps(
    value: Tensor, last_value: Tensor, final_value: Tensor, terminated: Tensor, truncated: Tensor
) -> Tensor:
    """The value of what follows each step of a stream of episodes, [M, T, E].

    It is that of the next observation; of the final one (`final_value`, [M, T, E]) where a time
    limit ended the episode; of `last_value` [M, E] after the chunk; and 0 after `terminated`.
    """
    following = torch.cat([value[:, 1:], last_value.unsqueeze(1)], 1)
    return torch.where(truncated, final_value, following) * (~terminated).to(value.dtype)


def stream_gae(
    reward: Tensor, value: Tensor, next_value: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """`gae` over a stream of episodes, with `next_value` from `bootstraps`, [M, T, E].

    `ended` is 1.0 where an episode ends, be it terminated or truncated.
    """
    delta = reward + gamma * next_value - value
    return reverse_scan(delta, gamma * lam * (1.0 - ended))


def gae_matrix(ended: Tensor, gamma: float, lam: float) -> Tensor:
    """The linear map from δ to `stream_gae`, [M, T, E] → [M, T·E, T·E].

    Entry (i, j) is (γλ)^(j − i) where both steps belong to the same environment and episode and
    j ≥ i, else 0; steps are ordered as in `flatten(1, 2)`. A few rows of it give a minibatch's
    advantages, and with them gradient to the rewards of all later steps.
    """
    num_members, num_steps, num_envs = ended.shape
    episode = ended.cumsum(1) - ended
    decay = torch.full((num_steps,), gamma * lam, dtype=ended.dtype, device=ended.device)
    decay[0] = 1.0
    # Row i of the powers is this vector from T − 1 − i on: i zeros, then 1, γλ, (γλ)², …
    shifted = torch.cat([decay.new_zeros(num_steps - 1), decay.cumprod(0)])
    powers = shifted.unfold(0, num_steps, 1).flip(0)
    of_env = episode.permute(0, 2, 1)
    same = of_env.unsqueeze(-1) == of_env.unsqueeze(-2)
    blocks = powers * same  # [M, E, T, T]
    if num_envs == 1:
        return blocks[:, 0]
    whole = ended.new_zeros(num_members, num_steps, num_envs, num_steps, num_envs)
    index = torch.arange(num_envs, device=ended.device)
    whole[:, :, index, :, index] = blocks.permute(1, 0, 2, 3)
    return whole.view(num_members, num_steps * num_envs, -1)


def vtrace(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    ended: Tensor,
    log_ratio: Tensor,
    gamma: float,
    max_rho: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace (Espeholt et al. 2018, eq. 1 and section 4.2), all [M, T, E].

    δ_t = ρ_t (r_t + γ V_{t+1} − V_t) and v_t = V_t + δ_t + γ c_t (v_{t+1} − V_{t+1}) with
    ρ_t = min(max_rho, π/μ) and c_t = min(1, π/μ). On the policy's own data v_t is the return up to
    the end of the chunk, bootstrapped there.

    Args:
        reward: r_t.
        value: V_t of the observations.
        next_value: V_{t+1} from `bootstraps`.
        ended: 1.0 where an episode ends.
        log_ratio: log π(a|s) − log μ(a|s), π learned and μ acting.
        gamma: γ.
        max_rho: upper bound of ρ.

    Returns:
        The targets v_t, and the advantages ρ_t (r_t + γ v_{t+1} − V_t).
    """
    ratio = log_ratio.exp()
    rho = ratio.clamp_max(max_rho)
    going = 1.0 - ended
    delta = rho * (reward + gamma * next_value - value)
    excess = reverse_scan(delta, gamma * ratio.clamp_max(1.0) * going)
    later = torch.cat([excess[:, 1:], torch.zeros_like(excess[:, :1])], 1) * going
    return value + excess, rho * (reward + gamma * (next_value + later) - value)


def lookahead_returns(
    reward: Tensor, ended: Tensor, gamma: float, lookahead: int
) -> tuple[Tensor, Tensor]:
    """Σ_{i<n} γ^i r_{t+i} within an episode, and 1.0 where the chunk holds them all, [M, T, E].

    Args:
        reward: r_t.
        ended: 1.0 where an episode ends.
        gamma: γ.
        lookahead: n.
    """
    total, whole = torch.zeros_like(reward), ended
    none = torch.zeros_like(reward[:, :1])
    for number in range(lookahead):
        # A sum of one reward more: this one, and what the next step sees of the rest.
        later = torch.cat([total[:, 1:], none], 1)
        known = torch.cat([whole[:, 1:], none], 1) if number else torch.ones_like(ended)
        total = reward + gamma * (1.0 - ended) * later
        whole = torch.maximum(ended, known)
    return total, whole


def continues(terminated: Tensor, valid: Tensor) -> Tensor:
    """1 where a step is valid and its episode goes on, else 0, [M, T, E]."""
    return valid * (~terminated).to(valid.dtype)


def standardise(value: Tensor, valid: Tensor, eps: float = EPS) -> Tensor:
    """Shifts and scales each member's valid entries to mean 0 and deviation 1, [M, T, E]."""
    count = valid.sum((1, 2), keepdim=True).clamp_min(1.0)
    mean = (value * valid).sum((1, 2), keepdim=True) / count
    centred = (value - mean) * valid
    deviation = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    return centred / (deviation + eps)

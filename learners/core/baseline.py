"""A linear value baseline on polynomial features, fitted anew to each member's own data.

Features of step t (Duan et al. 2016, "Benchmarking deep reinforcement learning"): obs clipped to
±10, its square, t/100, (t/100)², (t/100)³ and 1, so 2·O + 4 of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 10.0

RIDGE = 1e-5
"""Added to the diagonal of the normal equations."""


def features(obs: Tensor) -> Tensor:
    """[M, T, E, O] → [M, T, E, 2·O + 4]. The step t counts from the start of the chunk."""
    clipped = obs.clamp(-CLIP, CLIP)
    num_steps = obs.shape[1]
    time = torch.arange(num_steps, dtype=obs.dtype, device=obs.device) / 100.0
    time = time.view(1, num_steps, 1, 1).expand(*obs.shape[:3], 1)
    return torch.cat([clipped, clipped.square(), time, time**2, time**3, torch.ones_like(time)], -1)


def fit_predict(
    obs: Tensor, returns: Tensor, valid: Tensor, ridge: float = RIDGE, tries: int = 5
) -> Tensor:
    """Least-squares prediction of `returns` by each member's own baseline, [M, T, E].

    The normal equations are solved in float64. Where they cannot be, the ridge term of that
    member is raised tenfold, up to `tries` times; after that its baseline is 0.
    """
    phi = features(obs).flatten(1, 2)
    weighted = phi * valid.flatten(1).unsqueeze(-1)
    gram = torch.bmm(weighted.mT, phi).double()
    target = torch.bmm(weighted.mT, returns.flatten(1).unsqueeze(-1)).double()
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weights = torch.zeros_like(target)
    unsolved = torch.ones(len(gram), 1, 1, dtype=torch.bool, device=gram.device)
    for attempt in range(tries):
        solution, info = torch.linalg.solve_ex(gram + ridge * 10.0**attempt * eye, target)
        usable = (info == 0)[:, None, None] & solution.isfinite().all(1, keepdim=True)
        weights = torch.where(unsolved & usable, solution, weights)
        unsolved = unsolved & ~usable
        if not unsolved.any():
            break
    value = torch.bmm(phi, weights.to(phi.dtype)).view_as(returns)
    return value * valid

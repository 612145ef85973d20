"""What a person may want to see of a population under a learned rule."""

from __future__ import annotations

import torch
from torch import Tensor

from learners.core.population import Block
from learners.core.returns import reverse_scan
from learners.core.trajectory import Params, Trajectory

DISCOUNTS = (0.0, 0.8, 0.9, 0.95, 0.99, 0.995)
"""γ of the returns that predictions are held against."""

MAX_POINTS = 2000
"""Of a scatter plot."""


def thinned(tensor: Tensor) -> Tensor:
    """About `MAX_POINTS` of all entries, evenly spaced."""
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // MAX_POINTS)]


def explained(y: Tensor, returns: Tensor) -> Tensor:
    """Share of the variance of returns [N] that a linear function of y [N, m] explains, [].

    0 where the returns are all alike.
    """
    y, returns = y.double(), returns.double()
    centred = returns - returns.mean()
    features = y - y.mean(0)
    size = features.shape[1]
    gram = features.T @ features + 1e-6 * len(features) * torch.eye(size, device=y.device).double()
    weights = torch.linalg.solve(gram, features.T @ centred)
    left, total = (part.square().sum() for part in (centred - features @ weights, centred))
    return torch.where(total > 1e-12, 1.0 - left / total, 0.0)


def prediction_meaning(block: Block, params: Params, batch: Trajectory) -> Tensor:
    """How well y(s) tells the return of the rest of the chunk, by `DISCOUNTS`, [G].

    Args:
        block: members of one world.
        params: θ of the members.
        batch: of the members.
    """
    y = block.agent.heads(params, batch.obs.flatten(1, 2)).log_y.exp().flatten(0, 1)
    return torch.stack(
        [
            explained(y, reverse_scan(batch.reward, gamma * (1.0 - batch.ended)).flatten())
            for gamma in DISCOUNTS
        ]
    )


def grid_view(block: Block, params: Params, critic: Params, batch: Trajectory) -> dict[str, Tensor]:
    """Where the first member of a world with a grid went, and what it thinks there.

    Returns:
        "grid": [2], height and width; "cells": the agent's cell at each step, [T, E];
        "cell_value": V(s) of each step, [T·E]; "cell_y": y(s), [T·E, m]; "cell_end": [T, E],
        whether the episode ends with the step.
    """
    world = block.agent.world
    assert world.grid is not None
    obs = batch.obs[:1].flatten(1, 2)
    first = {name: p[:1] for name, p in params.items()}
    own = {name: p[:1] for name, p in critic.items()}
    return {
        "grid": torch.tensor(world.grid),
        "cells": world.cell(batch.obs[0]),
        "cell_value": block.agent.critic(own, obs).flatten(),
        "cell_y": block.agent.heads(first, obs).log_y.exp()[0],
        "cell_end": batch.ended[0],
    }

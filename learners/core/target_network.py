"""The network whose output replaces the return: the meta-network of FRODO.

It never sees an observation, so that what it learns is a rule and not a policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core import networks
from learners.core.actor_critic import part, prefixed
from learners.core.recurrent import init_lstm, lstm_backward
from learners.core.trajectory import Params

BELOW, CELL, HEAD = "below.", "cell.", "head."

INPUTS = ("reward", "discount", "value", "next_value", "policy", "behaviour")
"""r_t; γ, or 0 where `terminated`; V(s_t); V(s_{t+1}), or 0 likewise; π(a_t|s_t); μ(a_t|s_t)."""

MAX_DENSITY = 10.0
"""Upper bound of π and μ as inputs: densities of continuous actions have none."""


@dataclass(frozen=True)
class TargetNetwork:
    """g_η: a layer with tanh, an LSTM from the last step to the first, and a linear head.

    Attributes:
        width: of the layer and of the LSTM.
        sees_policies: whether π and μ are among the inputs.
    """

    width: int
    sees_policies: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return INPUTS if self.sees_policies else INPUTS[:-2]

    def init(self, generator: torch.Generator) -> Params:
        """Parameters of one member; the small head makes the first targets nearly 0."""
        sizes = [len(self.inputs), self.width]
        below = networks.init_mlp(sizes, generator, "orthogonal", head_gain=1.0)
        cell = init_lstm(self.width, self.width, generator)
        head = networks.init_mlp([self.width, 1], generator, "orthogonal", head_gain=0.01)
        return prefixed(below, BELOW) | prefixed(cell, CELL) | prefixed(head, HEAD)

    def gather(
        self,
        reward: Tensor,
        discount: Tensor,
        value: Tensor,
        next_value: Tensor,
        log_prob: Tensor,
        behaviour_log_prob: Tensor,
    ) -> Tensor:
        """The inputs of every step, [M, T, E] each → [M, T, E, I]; gradient flows to all."""
        given = [reward, discount, value, next_value]
        if self.sees_policies:
            given += [p.exp().clamp_max(MAX_DENSITY) for p in (log_prob, behaviour_log_prob)]
        return torch.stack(given, -1)

    def __call__(self, meta_params: Params, inputs: Tensor, ended: Tensor) -> Tensor:
        """The target of every step, [M, T, E].

        Args:
            meta_params: η, with a leading axis M.
            inputs: [M, T, E, I] from `gather`.
            ended: [M, T, E], 1.0 where an episode ends.
        """
        flat = inputs.flatten(1, 2)
        below = torch.tanh(networks.head(part(meta_params, BELOW), flat))
        hidden = lstm_backward(
            part(meta_params, CELL), below.view(*inputs.shape[:3], self.width), ended
        )
        target = networks.head(part(meta_params, HEAD), hidden.flatten(1, 2))
        return target.view(inputs.shape[:3])

"""Networks whose observations are a few indices into binary features, one network per member.

The first layer adds up rows of a table instead of multiplying with vectors of zeros and ones. Where
an observation is one index, the state, and there is no other layer, that is a tabular agent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core.params import gradients
from learners.core.trajectory import Params, World


@dataclass(frozen=True)
class IndexNetwork:
    """A table, and perceptron layers with ReLU above it where the world is not tabular.

    Entries: `layer0.weight` [S, width], then `layer0.bias`, `layer1.weight`, `layer1.bias`, ….

    Attributes:
        world: what the indices of an observation are.
        hidden: widths of the hidden layers; of no effect on a tabular world.
        num_outputs: width of the last layer.
    """

    world: World
    hidden: tuple[int, ...]
    num_outputs: int

    @property
    def widths(self) -> list[int]:
        """Of every layer's output."""
        return [*(() if self.world.tabular else self.hidden), self.num_outputs]

    def init(self, generator: torch.Generator) -> Params:
        """Parameters of one member: tables near zero, other weights normal of variance 1 / inputs.

        The last layer's weights are a hundredth of that, so that policies begin nearly uniform.
        """
        widths = self.widths
        inputs = [self.world.num_features, *widths[:-1]]
        active = [self.world.num_indices or self.world.num_features, *widths[:-1]]
        params: Params = {}
        for layer, (rows, columns) in enumerate(zip(inputs, widths, strict=True)):
            gain = 0.01 if layer == len(widths) - 1 else 1.0
            scale = gain / math.sqrt(active[layer])
            params[f"layer{layer}.weight"] = scale * torch.randn(rows, columns, generator=generator)
            if not self.world.tabular:
                params[f"layer{layer}.bias"] = torch.zeros(columns)
        return params

    def __call__(self, params: Params, obs: Tensor) -> Tensor:
        """Outputs at observations [M, N, O], [M, N, num_outputs]. Gradient flows to `params`."""
        outputs = self.rows(params["layer0.weight"], obs)
        if self.world.tabular:
            return outputs
        outputs = outputs + params["layer0.bias"].unsqueeze(1)
        for layer in range(1, len(self.widths)):
            weight, bias = params[f"layer{layer}.weight"], params[f"layer{layer}.bias"]
            outputs = torch.baddbmm(bias.unsqueeze(1), torch.relu(outputs), weight)
        return outputs

    def rows(self, table: Tensor, obs: Tensor) -> Tensor:
        """Sum of the rows that each observation names, or weights, [M, N, width]."""
        num_members, num_obs, _ = obs.shape
        if not self.world.num_indices:
            return torch.bmm(obs, table)
        index = self.index(obs)
        taken = table.flatten(0, 1).index_select(0, index.flatten())
        taken = taken.view(num_members, num_obs, -1, table.shape[-1])
        if self.world.num_indices == 1:
            return taken.squeeze(2)
        present = (obs[..., 1 : 1 + self.world.num_indices] >= 0).to(table.dtype)
        return (taken * present.unsqueeze(-1)).sum(2)

    def index(self, obs: Tensor) -> Tensor:
        """Rows of all members' tables as one, [M, N, F]; 0 for what is absent."""
        own = obs[..., 1 : 1 + self.world.num_indices].clamp_min(0).long()
        first = torch.arange(len(obs), device=obs.device) * self.world.num_features
        return own + first.view(-1, 1, 1)

    def pullback(
        self, params: Params, obs: Tensor, outputs: Tensor, cotangent: Tensor, *, create_graph: bool
    ) -> Params:
        """Gradient by `params` of Σ outputs · cotangent, both [M, N, num_outputs].

        For a table it is a sum of the cotangent's rows; gradient flows to the cotangent in any
        case, and to `params` where `create_graph` says so.
        """
        if not self.world.tabular:
            return gradients(outputs, params, [cotangent], create_graph=create_graph)
        table = params["layer0.weight"]
        flat = cotangent.new_zeros(table.flatten(0, 1).shape)
        summed = flat.index_add(0, self.index(obs).flatten(), cotangent.flatten(0, 1))
        return {"layer0.weight": summed.view(table.shape)}

"""Networks whose observations are a few indices into binary features, one network per member.

Where features are pixels, a convolution of 3 × 3 may come first.

The first layer adds up rows of a table instead of multiplying with vectors of zeros and ones. Where
an observation is one index, the state, and there is no other layer, that is a tabular agent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

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
        channels: of a convolution below the first layer, where features are pixels; 0 for none.
            Entries `conv.weight` [channels, planes, 3, 3] and `conv.bias`.
    """

    world: World
    hidden: tuple[int, ...]
    num_outputs: int
    channels: int = 0

    @property
    def widths(self) -> list[int]:
        """Of every layer's output."""
        return [*(() if self.world.tabular else self.hidden), self.num_outputs]

    @property
    def convolves(self) -> bool:
        """Whether there is a convolution."""
        return self.channels > 0 and self.world.grid is not None and not self.world.tabular

    @property
    def planes(self) -> int:
        """Of an observation's image."""
        assert self.world.grid is not None
        height, width = self.world.grid
        return self.world.num_features // (height * width)

    def init(self, generator: torch.Generator) -> Params:
        """Parameters of one member: tables near zero, other weights normal of variance 1 / inputs.

        The last layer's weights are a hundredth of that, so that policies begin nearly uniform.
        """
        widths = self.widths
        inputs = [self.world.num_features, *widths[:-1]]
        active = [self.world.num_indices or self.world.num_features, *widths[:-1]]
        params: Params = {}
        if self.convolves:
            assert self.world.grid is not None
            shape = (self.channels, self.planes, 3, 3)
            params["conv.weight"] = torch.randn(shape, generator=generator)
            params["conv.bias"] = torch.zeros(self.channels)
            height, width = self.world.grid
            inputs[0] = active[0] = self.channels * height * width
        for layer, (rows, columns) in enumerate(zip(inputs, widths, strict=True)):
            gain = 0.01 if layer == len(widths) - 1 else 1.0
            scale = gain / math.sqrt(active[layer])
            params[f"layer{layer}.weight"] = scale * torch.randn(rows, columns, generator=generator)
            if not self.world.tabular:
                params[f"layer{layer}.bias"] = torch.zeros(columns)
        return params

    def __call__(self, params: Params, obs: Tensor) -> Tensor:
        """Outputs at observations [M, N, O], [M, N, num_outputs]. Gradient flows to `params`."""
        table = params["layer0.weight"]
        if self.convolves:
            outputs = torch.bmm(self.convolved(params, obs), table)
        else:
            outputs = self.rows(table, obs)
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

    def convolved(self, params: Params, obs: Tensor) -> Tensor:
        """What each member's convolution makes of images, [M, N, channels · height · width]."""
        assert self.world.grid is not None
        num_members, num_obs, _ = obs.shape
        weight, bias = params["conv.weight"], params["conv.bias"]
        own = obs[..., 1 : 1 + self.world.num_indices].long()
        # What is absent is written behind the last pixel, and cut off.
        place = torch.where(own < 0, self.world.num_features, own)
        pixels = weight.new_zeros(num_members, num_obs, self.world.num_features + 1)
        pixels = pixels.scatter_(2, place, 1.0)[..., :-1]
        images = pixels.view(num_members, num_obs, self.planes, *self.world.grid)
        seen = functional.conv2d(
            images.transpose(0, 1).flatten(1, 2),
            weight.flatten(0, 1),
            bias.flatten(),
            padding=1,
            groups=num_members,
        )
        by_member = torch.relu(seen).view(num_obs, num_members, -1)
        return by_member.transpose(0, 1)

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

"""Networks as functions over named parameters, one set of parameters per member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from learners.core.trajectory import Params

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def init_mlp(sizes: Sequence[int], generator: torch.Generator) -> Params:
    """Parameters of a multilayer perceptron: Xavier-uniform weights [in, out], zero biases [out].

    Args:
        sizes: layer widths from input to output.
        generator: source of randomness.
    """
    params: Params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        bound = (6.0 / (fan_in + fan_out)) ** 0.5
        uniform = torch.rand(fan_in, fan_out, generator=generator)
        params[f"layer{layer}.weight"] = (2.0 * uniform - 1.0) * bound
        params[f"layer{layer}.bias"] = torch.zeros(fan_out)
    return params


def mlp(params: Params, inputs: Tensor, activation: str) -> Tensor:
    """Applies each member's own perceptron, [M, N, in] → [M, N, out].

    One batched product per layer, so that a member's result does not depend on how many members
    share the call. Gradient flows to `params` and `inputs`.
    """
    num_layers = sum(name.endswith(".weight") for name in params)
    hidden = inputs
    for layer in range(num_layers):
        weight, bias = params[f"layer{layer}.weight"], params[f"layer{layer}.bias"]
        hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight)
        if layer < num_layers - 1:
            hidden = ACTIVATIONS[activation](hidden)
    return hidden

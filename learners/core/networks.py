"""Networks as functions over named parameters, one set of parameters per member.

A perceptron has entries `layer0.weight`, `layer0.bias`, …; in front of it pixels pass through
`conv0`, `conv1`, `conv2`, the convolutions of Mnih et al. 2015. A convolutional network has one
member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from learners.core.trajectory import Params


class Tanh(torch.autograd.Function):
    """tanh x = 2 σ(2x) − 1, to within 1e-7: torch computes σ several times faster on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The value; gradient flows to `x`, as often as wanted."""
        y = torch.sigmoid(x + x).mul_(2.0).sub_(1.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Grad · (1 − y²)."""
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, y)  # type: ignore[no-any-return]


FAST_TANH_SIZE = 2**15
"""Entries of one member from which `Tanh` is faster in spite of what a call costs."""


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent of [M, …], as `Tanh` where each member has many entries.

    torch's own in float64 and on other devices than a CPU.
    """
    small = x.numel() < FAST_TANH_SIZE * len(x)
    if small or x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.tanh(x)
    result: Tensor = Tanh.apply(x)  # type: ignore[no-untyped-call]
    return result


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": tanh, "relu": torch.relu}

Init = Literal["xavier", "orthogonal"]

CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
"""Channels, kernel and stride of each convolution."""

CNN_WIDTH = 512
"""Width of the layer after the convolutions."""


def init_mlp(
    sizes: Sequence[int],
    generator: torch.Generator,
    init: Init = "xavier",
    head_gain: float = 1.0,
) -> Params:
    """Parameters of a multilayer perceptron: weights [in, out] and zero biases [out].

    Args:
        sizes: layer widths from input to output.
        generator: source of randomness.
        init: "xavier" draws uniformly; "orthogonal" has gain √2, and `head_gain` in the last layer.
        head_gain: of the last layer, where the weights are orthogonal.
    """
    params: Params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        if init == "xavier":
            bound = (6.0 / (fan_in + fan_out)) ** 0.5
            uniform = torch.rand(fan_in, fan_out, generator=generator)
            weight = (2.0 * uniform - 1.0) * bound
        else:
            gain = head_gain if layer == len(sizes) - 2 else 2.0**0.5
            weight = orthogonal((fan_in, fan_out), gain, generator)
        params[f"layer{layer}.weight"] = weight
        params[f"layer{layer}.bias"] = torch.zeros(fan_out)
    return params


def orthogonal(shape: tuple[int, ...], gain: float, generator: torch.Generator) -> Tensor:
    """A matrix with orthogonal rows or columns, times `gain` (Saxe et al. 2014)."""
    weight = torch.empty(shape)
    torch.nn.init.orthogonal_(weight, gain, generator)
    return weight


def init_cnn(
    image: tuple[int, int, int],
    num_outputs: int,
    generator: torch.Generator,
    head_gain: float,
) -> Params:
    """Three convolutions, a layer of 512 and a head; orthogonal, gain √2 but for the head."""
    params: Params = {}
    channels, *size = image
    for layer, (width, kernel, stride) in enumerate(CONVOLUTIONS):
        shape = (width, channels, kernel, kernel)
        params[f"conv{layer}.weight"] = orthogonal(shape, 2.0**0.5, generator)
        params[f"conv{layer}.bias"] = torch.zeros(width)
        channels, size = width, [(s - kernel) // stride + 1 for s in size]
    flat = channels * size[0] * size[1]
    return params | init_mlp([flat, CNN_WIDTH, num_outputs], generator, "orthogonal", head_gain)


def mlp(params: Params, inputs: Tensor, activation: str) -> Tensor:
    """Applies each member's own perceptron, [M, N, in] → [M, N, out].

    One batched product per layer, so that a member's result does not depend on how many members
    share the call. Gradient flows to `params` and `inputs`.
    """
    return head(params, features(params, inputs, activation))


def features(params: Params, inputs: Tensor, activation: str) -> Tensor:
    """The last hidden layer, [M, N, in] → [M, N, width]."""
    hidden = inputs
    for layer in range(num_layers(params) - 1):
        weight, bias = params[f"layer{layer}.weight"], params[f"layer{layer}.bias"]
        hidden = ACTIVATIONS[activation](torch.baddbmm(bias.unsqueeze(1), hidden, weight))
    return hidden


def head(params: Params, hidden: Tensor) -> Tensor:
    """The last layer, [M, N, width] → [M, N, out]."""
    last = f"layer{num_layers(params) - 1}"
    weight, bias = params[f"{last}.weight"], params[f"{last}.bias"]
    if weight.shape[-1] == 1:
        # Several times faster than a product with a column.
        return (hidden * weight.mT).sum(-1, keepdim=True) + bias.unsqueeze(1)
    return torch.baddbmm(bias.unsqueeze(1), hidden, weight)


def num_layers(params: Params) -> int:
    """Layers of the perceptron."""
    number = 0
    while f"layer{number}.weight" in params:
        number += 1
    return number


def convolve(params: Params, obs: Tensor, image: tuple[int, int, int]) -> Tensor:
    """The convolutions of the one member, bytes [1, N, O] → [1, N, features], ReLU between."""
    hidden = obs[0].view(-1, *image).to(params["conv0.weight"].dtype) / 255.0
    for layer, (_, _, stride) in enumerate(CONVOLUTIONS):
        weight, bias = params[f"conv{layer}.weight"][0], params[f"conv{layer}.bias"][0]
        hidden = torch.relu(functional.conv2d(hidden, weight, bias, stride))
    return hidden.flatten(1).unsqueeze(0)


def mlp_tangent(
    params: Params, tangents: Params, inputs: Tensor, activation: str, input_tangent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A perceptron and its derivative along a direction of its parameters and inputs.

    Args:
        params: as for `mlp`.
        tangents: the direction, with the entries of `params`.
        inputs: [M, N, in].
        activation: "tanh" or "relu".
        input_tangent: direction of the inputs, or None where they are constant.

    Returns:
        The last hidden layer and its derivative, the output and its derivative.
    """
    hidden, tangent = inputs, input_tangent
    last = num_layers(params) - 1
    for layer in range(last + 1):
        weight, bias = params[f"layer{layer}.weight"], params[f"layer{layer}.bias"]
        below = hidden if layer == last else None
        linear = torch.baddbmm(bias.unsqueeze(1), hidden, weight)
        bias_tangent = tangents[f"layer{layer}.bias"].unsqueeze(1)
        moved = torch.baddbmm(bias_tangent, hidden, tangents[f"layer{layer}.weight"])
        if tangent is not None:
            moved = torch.baddbmm(moved, tangent, weight)
        if below is not None:
            below_tangent = tangent if tangent is not None else torch.zeros_like(below)
            return below, below_tangent, linear, moved
        hidden = ACTIVATIONS[activation](linear)
        slope = 1.0 - hidden.square() if activation == "tanh" else (linear > 0).to(linear.dtype)
        tangent = slope * moved
    raise AssertionError("a perceptron has a layer")


def convolve_tangent(
    params: Params, tangents: Params, obs: Tensor, image: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """`convolve` and its derivative along a direction of its parameters."""
    hidden = obs[0].view(-1, *image).to(params["conv0.weight"].dtype) / 255.0
    tangent = None
    for layer, (_, _, stride) in enumerate(CONVOLUTIONS):
        weight, bias = params[f"conv{layer}.weight"][0], params[f"conv{layer}.bias"][0]
        along, bias_along = tangents[f"conv{layer}.weight"][0], tangents[f"conv{layer}.bias"][0]
        linear = functional.conv2d(hidden, weight, bias, stride)
        moved = functional.conv2d(hidden, along, bias_along, stride)
        if tangent is not None:
            moved = moved + functional.conv2d(tangent, weight, None, stride)
        hidden, tangent = torch.relu(linear), moved * (linear > 0)
    assert tangent is not None
    return hidden.flatten(1).unsqueeze(0), tangent.flatten(1).unsqueeze(0)

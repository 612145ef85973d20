"""Networks as functions over named parameters, one set of parameters per member.

A perceptron has entries `layer0.weight`, `layer0.bias`, …; in front of it pixels pass through
`conv0`, `conv1`, `conv2`, the convolutions of Mnih et al. 2015. A convolutional network has one
member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

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
        return tanh_pullback(grad, y)


def tanh_pullback(cotangent: Tensor, y: Tensor) -> Tensor:
    """A cotangent of y = tanh x as one of x: cotangent · (1 − y²)."""
    return torch.ops.aten.tanh_backward(cotangent, y)  # type: ignore[no-any-return]


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


def tanh_(x: Tensor) -> Tensor:
    """The hyperbolic tangent in place, as `Tanh` where `tanh` may use that; without gradient."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.tanh_()
    x.add_(x).sigmoid_()
    return x.add_(x).sub_(1.0)


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
    return affine(hidden, params[f"{last}.weight"], params[f"{last}.bias"])


def num_layers(params: Params) -> int:
    """Layers of the perceptron."""
    number = 0
    while f"layer{number}.weight" in params:
        number += 1
    return number


def convolve(params: Params, obs: Tensor, image: tuple[int, int, int]) -> Tensor:
    """The convolutions of the one member, bytes [1, N, O] → [1, N, features], ReLU between."""
    hidden = frames(obs, image, params["conv0.weight"].dtype)
    for layer, (_, _, stride) in enumerate(CONVOLUTIONS):
        weight, bias = params[f"conv{layer}.weight"][0], params[f"conv{layer}.bias"][0]
        hidden = torch.relu(functional.conv2d(hidden, weight, bias, stride))
    return hidden.flatten(1).unsqueeze(0)


def frames(obs: Tensor, image: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Bytes [1, N, O] as images in [0, 1], [N, C, H, W]."""
    return obs[0].view(-1, *image).to(dtype) / 255.0


@dataclass(frozen=True)
class Layer:
    """A linear map and what follows it, with derivatives by hand.

    A convolution is of one member and maps [N, C, H, W]; any other layer maps [M, N, in], each
    member by its own weights.
    """

    name: str  # of its entries, the network's prefix included
    activation: str | None = None  # "tanh", "relu" or none
    stride: int | None = None  # of a convolution

    def outputs(self, params: Params, inputs: Tensor) -> Tensor:
        """The layer at `inputs`."""
        linear = self.linear(params[f"{self.name}.weight"], inputs, params[f"{self.name}.bias"])
        if self.activation == "relu":
            return linear.relu_()
        return tanh_(linear) if self.activation == "tanh" else linear

    def linear(self, weight: Tensor, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear map alone; without `bias` it has none."""
        if self.stride is not None:
            return functional.conv2d(
                inputs, weight[0], None if bias is None else bias[0], self.stride
            )
        return affine(rows(inputs), weight, bias)

    def before_activation(self, change: Tensor, outputs: Tensor) -> Tensor:
        """A cotangent of `outputs` as one of the linear map, or a tangent the other way."""
        if self.activation == "relu":
            return change * (outputs > 0)
        if self.activation == "tanh":
            return tanh_pullback(change, outputs)
        return change

    def to_inputs(self, weight: Tensor, inputs: Tensor, cotangent: Tensor) -> Tensor:
        """A cotangent of the linear map as one of its inputs."""
        if self.stride is not None:
            by_inputs: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
                inputs.shape, weight[0], cotangent, self.stride
            )
            return by_inputs
        if weight.shape[-1] == 1:
            return (cotangent * weight.mT).view(inputs.shape)
        return torch.bmm(cotangent, weight.mT).view(inputs.shape)

    def to_params(self, weight: Tensor, inputs: Tensor, cotangent: Tensor) -> Params:
        """A cotangent of the linear map as the entries' gradient."""
        if self.stride is not None:
            slope = conv2d_weight(  # type: ignore[no-untyped-call]
                inputs, weight[0].shape, cotangent, self.stride
            ).unsqueeze(0)
            bias = cotangent.sum((0, 2, 3)).unsqueeze(0)
        elif weight.shape[-1] == 1:
            slope, bias = torch.bmm(cotangent.mT, rows(inputs)).mT, cotangent.sum(1)
        else:
            slope, bias = torch.bmm(rows(inputs).mT, cotangent), cotangent.sum(1)
        return {f"{self.name}.weight": slope, f"{self.name}.bias": bias}


@dataclass(frozen=True)
class Pass:
    """One pass through layers, kept for its derivatives.

    For use where no gradient is recorded: activations are computed in place.
    """

    layers: tuple[Layer, ...]
    params: Params
    values: tuple[Tensor, ...]  # the inputs, and what each layer gives

    @staticmethod
    def through(layers: tuple[Layer, ...], params: Params, inputs: Tensor) -> Pass:
        """Applies the layers one after the other."""
        values = [inputs]
        for layer in layers:
            values.append(layer.outputs(params, values[-1]))
        return Pass(layers, params, tuple(values))

    @property
    def inputs(self) -> Tensor:
        """What the first layer sees."""
        return self.values[0]

    @property
    def outputs(self) -> Tensor:
        """What the last layer gives."""
        return self.values[-1]

    def pullback(self, cotangent: Tensor, to_inputs: bool = False) -> tuple[Params, Tensor]:
        """Gradient of ⟨cotangent, outputs⟩ by the layers' entries, and by the inputs if asked for.

        Without `to_inputs` the second result is of no meaning.
        """
        grads: Params = {}
        for number in reversed(range(len(self.layers))):
            layer, below, above = self.layers[number], self.values[number], self.values[number + 1]
            weight = self.params[f"{layer.name}.weight"]
            cotangent = layer.before_activation(cotangent.view(above.shape), above)
            grads |= layer.to_params(weight, below, cotangent)
            if number > 0 or to_inputs:
                cotangent = layer.to_inputs(weight, below, cotangent)
        return grads, cotangent

    def tangent(self, along: Params, inputs_along: Tensor | None = None) -> Tensor:
        """Derivative of the outputs along a direction of the entries and inputs.

        Args:
            along: the direction, with the layers' entries.
            inputs_along: of the inputs, or None where they are constant.
        """
        moved = inputs_along
        for layer, (below, above) in zip(self.layers, pairwise(self.values), strict=True):
            linear = layer.linear(along[f"{layer.name}.weight"], below, along[f"{layer.name}.bias"])
            if moved is not None:
                linear += layer.linear(self.params[f"{layer.name}.weight"], moved)
            moved = layer.before_activation(linear, above)
        assert moved is not None, "a pass goes through a layer"
        return moved


def perceptron(prefix: str, num_layers: int, activation: str) -> tuple[Layer, ...]:
    """The layers of a perceptron; the last has no nonlinearity."""
    hidden = [Layer(f"{prefix}layer{number}", activation) for number in range(num_layers - 1)]
    return (*hidden, Layer(f"{prefix}layer{num_layers - 1}"))


def pixel_trunk(prefix: str) -> tuple[Layer, ...]:
    """The convolutions and the layer of 512 after them."""
    strides = enumerate(stride for _, _, stride in CONVOLUTIONS)
    convolutions = [Layer(f"{prefix}conv{number}", "relu", stride) for number, stride in strides]
    return (*convolutions, Layer(f"{prefix}layer0", "relu"))


def affine(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The inputs times W plus b, of each member, [M, N, in] → [M, N, out]."""
    if weight.shape[-1] == 1:
        # Several times faster than a product with a column.
        product = (inputs * weight.mT).sum(-1, keepdim=True)
        return product if bias is None else product + bias.unsqueeze(1)
    if bias is None:
        return torch.bmm(inputs, weight)
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight)


def rows(inputs: Tensor) -> Tensor:
    """What a perceptron sees of images, [N, C, H, W] → [1, N, C·H·W]; anything else as it is."""
    return inputs.flatten(1).unsqueeze(0) if inputs.ndim == 4 else inputs

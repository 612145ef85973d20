"""An LSTM with one set of parameters per member, written out: library kernels share their weights.

A cell has entries `input.weight` [I, 4H], `hidden.weight` [H, 4H] and `bias` [4H]; the four blocks
are the input gate, the forget gate, the candidate and the output gate (Hochreiter and Schmidhuber
1997; Gers et al. 2000).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learners.core.networks import orthogonal, tanh_, tanh_pullback
from learners.core.trajectory import Params


def init_lstm(num_inputs: int, width: int, generator: torch.Generator) -> Params:
    """Parameters of one cell: orthogonal weights, and a forget gate that begins open (bias 1)."""
    bias = torch.zeros(4 * width)
    bias[width : 2 * width] = 1.0
    return {
        "input.weight": orthogonal((num_inputs, 4 * width), 1.0, generator),
        "hidden.weight": orthogonal((width, 4 * width), 1.0, generator),
        "bias": bias,
    }


def lstm_backward(params: Params, inputs: Tensor, ended: Tensor) -> Tensor:
    """Runs every member's cell from the last step to the first.

    The state is zero after the chunk and where an episode ends: what is said of a step depends on
    this step and on the later ones of its episode alone.

    Args:
        params: of the cell, with a leading axis M.
        inputs: [M, T, E, I].
        ended: [M, T, E], 1.0 where an episode ends.

    Returns:
        The hidden states, [M, T, E, H]. Gradient flows to `params` and `inputs`, once: there is no
        second derivative.
    """
    weights = (params["input.weight"], params["hidden.weight"], params["bias"])
    hidden: Tensor = BackwardLstm.apply(*weights, inputs, 1.0 - ended)  # type: ignore[no-untyped-call]
    return hidden


class BackwardLstm(torch.autograd.Function):
    """`lstm_backward`, with its derivative by hand: the weights' gradient is one product."""

    @staticmethod
    def forward(
        ctx: Any, below: Tensor, across: Tensor, bias: Tensor, inputs: Tensor, going: Tensor
    ) -> Tensor:
        """Hidden states [M, T, E, H]; `going` [M, T, E] is 0 where an episode ends."""
        width = across.shape[1]
        # tanh x = 2 σ(2x) − 1: with twice its weights the candidate is a gate like the others.
        double = torch.ones_like(bias[0])
        double[2 * width : 3 * width] = 2.0
        shape = (*inputs.shape[:3], 4 * width)
        summed = torch.baddbmm((bias * double).unsqueeze(1), inputs.flatten(1, 2), below * double)
        gates, goes_on, across_doubled = summed.view(shape), going.unsqueeze(-1), across * double
        cells, shown, hidden = (inputs.new_empty(*shape[:3], width) for _ in range(3))
        for t in reversed(range(shape[1])):
            gate, later = gates[:, t], t + 1 < shape[1]
            if later:
                gate.baddbmm_(hidden[:, t + 1] * goes_on[:, t], across_doubled)
            admit, keep, candidate, show = gate.sigmoid_().chunk(4, -1)
            torch.mul(admit, candidate.mul_(2.0).sub_(1.0), out=cells[:, t])
            if later:
                cells[:, t].addcmul_(keep, cells[:, t + 1] * goes_on[:, t])
            tanh_(shown[:, t].copy_(cells[:, t]))
            torch.mul(show, shown[:, t], out=hidden[:, t])
        ctx.save_for_backward(below, across, inputs, goes_on, gates, cells, shown, hidden)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by the weights and, where they are wanted, by the inputs."""
        below, across, inputs, goes_on, gates, cells, shown, hidden = ctx.saved_tensors
        num_steps, by_gates = inputs.shape[1], torch.empty_like(gates)
        backwards, by_next, by_cell = across.transpose(1, 2), None, None
        for t in range(num_steps):
            admit, keep, candidate, show = gates[:, t].chunk(4, -1)
            by_admit, by_keep, by_candidate, by_show = by_gates[:, t].chunk(4, -1)
            slope = by_hidden[:, t] if by_next is None else by_hidden[:, t] + by_next
            sigmoid_slope(slope * shown[:, t], show, grad_input=by_show)
            own = tanh_pullback(slope * show, shown[:, t])
            own = own if by_cell is None else own + by_cell
            sigmoid_slope(own * candidate, admit, grad_input=by_admit)
            tanh_slope(own * admit, candidate, grad_input=by_candidate)
            if t + 1 == num_steps:
                by_keep.zero_()
                break
            sigmoid_slope(own * (cells[:, t + 1] * goes_on[:, t]), keep, grad_input=by_keep)
            by_cell = own * keep * goes_on[:, t]
            by_next = torch.bmm(by_gates[:, t], backwards) * goes_on[:, t]
        flat = by_gates.flatten(1, 2)
        before = torch.zeros_like(hidden)
        torch.mul(hidden[:, 1:], goes_on[:, :-1], out=before[:, :-1])
        by_below = torch.bmm(inputs.flatten(1, 2).transpose(1, 2), flat)
        by_across = torch.bmm(before.flatten(1, 2).transpose(1, 2), flat)
        by_inputs = None
        if ctx.needs_input_grad[3]:
            by_inputs = torch.bmm(flat, below.transpose(1, 2)).view_as(inputs)
        return by_below, by_across, flat.sum(1), by_inputs, None


sigmoid_slope = torch.ops.aten.sigmoid_backward.grad_input
tanh_slope = torch.ops.aten.tanh_backward.grad_input

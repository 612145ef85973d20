"""An LSTM with one set of parameters per member, written out: library kernels share their weights.

A cell has entries `input.weight` [I, 4H], `hidden.weight` [H, 4H] and `bias` [4H]; the four blocks
are the input gate, the forget gate, the candidate and the output gate (Hochreiter and Schmidhuber
1997; Gers et al. 2000).
"""

from __future__ import annotations

import torch
from torch import Tensor

from learners.core.networks import orthogonal
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
        The hidden states, [M, T, E, H]. Gradient flows to `params` and `inputs`.
    """
    num_members, num_steps, num_envs, _ = inputs.shape
    weight = params["hidden.weight"]
    width = weight.shape[1]
    bias = params["bias"].unsqueeze(1)
    gates = torch.baddbmm(bias, inputs.flatten(1, 2), params["input.weight"])
    of_step = gates.view(num_members, num_steps, num_envs, 4 * width).unbind(1)
    going = (1.0 - ended).unsqueeze(-1).unbind(1)
    hidden = cell = inputs.new_zeros(num_members, num_envs, width)
    states = []
    for step, goes_on in zip(reversed(of_step), reversed(going), strict=True):
        summed = torch.baddbmm(step, hidden * goes_on, weight)
        admit, keep, _, show = torch.sigmoid(summed).chunk(4, -1)
        candidate = torch.tanh(summed[..., 2 * width : 3 * width])
        cell = keep * cell * goes_on + admit * candidate
        hidden = show * torch.tanh(cell)
        states.append(hidden)
    return torch.stack(states[::-1], 1)

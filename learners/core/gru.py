"""Networks of one gated recurrent unit, which all members share: they act and they learn.

The cell is the library's (Cho et al. 2014, with the reset gate after the product):

    r = σ(W_r x + U_r h),  z = σ(W_z x + U_z h),  n = tanh(W_n x + r ⊙ (U_n h)),
    h ← (1 − z) ⊙ n + z ⊙ h                                            each with both biases

Entries carry an axis 1 where others have M, since the parameters are everyone's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core import networks
from learners.core.actor_critic import part, prefixed
from learners.core.policy import Distribution, StochasticPolicy
from learners.core.trajectory import Params

CELL, HEAD = "cell.", "head."
WEIGHTS = ("input.weight", "hidden.weight", "input.bias", "hidden.bias")


@dataclass(frozen=True)
class GruNetwork:
    """A GRU and a linear head.

    Attributes:
        num_inputs: I.
        width: H.
        num_outputs: of the head.
        head_gain: scale of the head's first weights.
    """

    num_inputs: int
    width: int
    num_outputs: int
    head_gain: float = 1.0

    def init(self, generator: torch.Generator) -> Params:
        """Parameters without axis: orthogonal weights for each gate, biases 0."""
        gates = [
            networks.orthogonal((self.width, size), 1.0, generator)
            for size in (self.num_inputs, self.width)
            for _ in range(3)
        ]
        bias = torch.zeros(3 * self.width)
        cell = {
            "input.weight": torch.cat(gates[:3]),
            "hidden.weight": torch.cat(gates[3:]),
            "input.bias": bias,
            "hidden.bias": bias.clone(),
        }
        sizes = [self.width, self.num_outputs]
        head = networks.init_mlp(sizes, generator, "orthogonal", self.head_gain)
        return prefixed(cell, CELL) | prefixed(head, HEAD)

    def __call__(self, params: Params, inputs: Tensor) -> Tensor:
        """Outputs [T, R, out] of R sequences [T, R, I], which begin at hidden state 0.

        Gradient flows to `params`, whose entries have a leading axis 1, and to `inputs`.
        """
        start = inputs.new_zeros(1, inputs.shape[1], self.width)
        hidden, _ = torch.gru(inputs, start, weights(params), True, 1, 0.0, False, False, False)
        return networks.head(part(params, HEAD), hidden.flatten(0, 1).unsqueeze(0)).view(
            *inputs.shape[:2], self.num_outputs
        )

    def stepping(self, params: Params) -> Callable[[Tensor], Tensor]:
        """A function of the R inputs [R, I] of a step, from the first on, to outputs [R, out]."""
        cell, head = weights(params), part(params, HEAD)
        weight, bias = head["layer0.weight"][0], head["layer0.bias"][0]
        hidden: Tensor | None = None

        def step(inputs: Tensor) -> Tensor:
            nonlocal hidden
            if hidden is None:
                hidden = inputs.new_zeros(len(inputs), self.width)
            hidden = torch.gru_cell(inputs, hidden, *cell)
            return torch.addmm(bias, hidden, weight)

        return step


def weights(params: Params) -> list[Tensor]:
    """The cell's entries as the library takes them."""
    return [params[CELL + name][0] for name in WEIGHTS]


@dataclass(frozen=True)
class GruPolicy(StochasticPolicy):
    """A policy that remembers: what its parameters mean.

    Attributes:
        width: of the GRU.
        init_std: standard deviation of a new Gaussian policy, in units of the action.
    """

    width: int
    init_std: float = 1.0
    normalizer: None = None

    @property
    def network(self) -> GruNetwork:
        """From observations to the distribution's parameters; the first policy is uniform."""
        return GruNetwork(self.spec.obs_size, self.width, self.spec.action_size, head_gain=0.01)

    def init(self, generator: torch.Generator) -> Params:
        """Parameters without axis; log σ does not depend on the observation."""
        return self.network.init(generator) | self.spread(self.init_std)

    def template(self) -> Params:
        """Every entry of the published parameters."""
        return self.init(torch.Generator())

    def distribution(self, params: Params, obs: Tensor) -> Distribution:
        """The action distributions of R sequences of raw `obs` [T, R, O], as [T, R] of them."""
        return self.from_outputs(params, self.network(params, obs))

    def acting(self, params: Params) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function of raw `obs` [M, E, O] and `noise` of one step after the other.

        It gives actions and outputs [M, E, A], and remembers what it has seen: it begins at hidden
        state 0, and every sequence has one of its own. For calls without gradient.
        """
        step = self.network.stepping(params)

        def act(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            outputs = step(obs.flatten(0, 1)).view(*obs.shape[:2], -1)
            return self.from_outputs(params, outputs).sample(noise), outputs

        return act

"""The network that says how an agent is to be updated: the meta-network of LPG.

It never sees an observation, and of a policy only the probability of the action that was taken, so
that it serves any agent on any task.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import LpgAgentConfig, LpgConfig
from learners.core import networks
from learners.core.actor_critic import part, prefixed
from learners.core.population import Experience, Target, by_member
from learners.core.recurrent import init_lstm, lstm_backward
from learners.core.trajectory import Params, Trajectory

EMBEDDING, CELL, POLICY_HEAD, PREDICTION_HEAD = "embedding.", "cell.", "pi_hat.", "y_hat."

NUM_INPUTS = 6
"""r_t; 1 where an episode ends; γ; π(a_t|s_t); φ(y(s_t)); φ(y(s_{t+1})), 0 where it ends."""

NUM_LIFETIME_INPUTS = 2
"""n/N and log N: the updates so far n out of the N of a lifetime (Jackson et al. 2024)."""


@dataclass(frozen=True)
class UpdateRule:
    """A backward LSTM over experience (Oh et al. 2020, figure 1), with two heads.

    Attributes:
        width: H, of the LSTM.
        num_predictions: m, of the categorical prediction y.
        embedding: width of φ, which makes one number of a prediction.
        gamma: γ, an input.
        sees_lifetime: whether n/N and log N are inputs.
    """

    width: int
    num_predictions: int
    embedding: int
    gamma: float
    sees_lifetime: bool = False

    @staticmethod
    def of(config: LpgConfig | LpgAgentConfig) -> UpdateRule:
        """The rule that a configuration describes."""
        c = config
        return UpdateRule(
            c.rule_width, c.num_predictions, c.embedding_width, c.gamma, c.sees_lifetime
        )

    def init(self, generator: torch.Generator) -> Params:
        """Parameters, without any axis of members.

        π̂ begins near zero, so that a new rule leaves policies alone. ŷ does not: where both y and ŷ
        were uniform, y would learn nothing for the rule to see.
        """
        sizes = [self.num_predictions, self.embedding, 1]
        num_inputs = NUM_INPUTS + (NUM_LIFETIME_INPUTS if self.sees_lifetime else 0)
        heads = [(POLICY_HEAD, 1, 0.01), (PREDICTION_HEAD, self.num_predictions, 1.0)]
        params = prefixed(networks.init_mlp(sizes, generator, "orthogonal"), EMBEDDING)
        params |= prefixed(init_lstm(num_inputs, self.width, generator), CELL)
        for name, size, gain in heads:
            head = networks.init_mlp([self.width, size], generator, "orthogonal", head_gain=gain)
            params |= prefixed(head, name)
        return params

    def __call__(self, meta_params: Params, seen: Experience) -> tuple[Tensor, Tensor]:
        """π̂ [T, B] and log ŷ [T, B, m]. Gradient flows to `meta_params` and to what is seen."""
        shared = {name: p.unsqueeze(0) for name, p in meta_params.items()}
        inputs = self.inputs(part(shared, EMBEDDING), seen).unsqueeze(0)
        hidden = lstm_backward(part(shared, CELL), inputs, seen.ended.unsqueeze(0))
        hidden = torch.relu(hidden).flatten(1, 2)
        pi_hat = networks.head(part(shared, POLICY_HEAD), hidden)
        y_hat = networks.head(part(shared, PREDICTION_HEAD), hidden)
        shape = seen.reward.shape
        return pi_hat.view(shape), y_hat.view(*shape, -1).log_softmax(-1)

    def target(self, meta_params: Params, seen: Experience, like: Trajectory) -> Target:
        """What the rule says of a batch of M·E streams, as [M, T, E]; gradient to η and `seen`."""
        pi_hat, log_y_hat = self(meta_params, seen)
        return Target(by_member(pi_hat, like), by_member(log_y_hat, like))

    def inputs(self, embedding: Params, seen: Experience) -> Tensor:
        """The LSTM's inputs, [T, B, I]; φ takes y as m y − 1, which is 0 where y is uniform."""
        both = torch.stack([seen.prediction, seen.next_prediction])
        both = both * self.num_predictions - 1.0
        embedded = networks.mlp(embedding, both.flatten(0, 2).unsqueeze(0), "relu")
        now, following = embedded.view(both.shape[:3])
        columns = [
            seen.reward,
            seen.ended,
            torch.full_like(seen.reward, self.gamma),
            seen.prob,
            now,
            following * (1.0 - seen.ended),
        ]
        if self.sees_lifetime:
            columns += [c.expand_as(seen.reward) for c in seen.lifetime.unbind(-1)]
        return torch.stack(columns, -1)

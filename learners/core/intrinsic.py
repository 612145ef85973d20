"""The networks of a learned reward: r_in, and v_ex, the value of the extrinsic return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core import networks
from learners.core.actor_critic import ActorCritic, part, prefixed
from learners.core.trajectory import Params

REWARD, EXTRINSIC = "reward.", "extrinsic."


@dataclass(frozen=True)
class IntrinsicReward:
    """r_in in [−1, 1] and v_ex, with the hidden layers of an agent's networks but apart from them.

    Where actions are discrete r_in has one output per action, and the taken one counts; pixels pass
    through one trunk, of which v_ex is a second head (Zheng, Oh and Singh 2018).
    """

    agent: ActorCritic

    def init(self, generator: torch.Generator) -> Params:
        """η of one replica."""
        spec, hidden = self.agent.policy.spec, self.agent.policy.hidden
        outputs = spec.action_size if spec.discrete else 1
        if spec.image is not None:
            reward = networks.init_cnn(spec.image, outputs, generator, 1.0)
            value = networks.init_mlp([networks.CNN_WIDTH, 1], generator, "orthogonal")
        else:
            seen = spec.obs_size + (0 if spec.discrete else spec.action_size)
            reward = networks.init_mlp([seen, *hidden, outputs], generator, "orthogonal")
            value = networks.init_mlp([spec.obs_size, *hidden, 1], generator, "orthogonal")
        return prefixed(reward, REWARD) | prefixed(value, EXTRINSIC)

    def seen(self, obs: Tensor, action: Tensor) -> Tensor:
        """What r_in sees: observation and action, or the observation where actions are discrete."""
        return obs if self.agent.policy.spec.discrete else torch.cat([obs, action], -1)

    def reward(self, meta_params: Params, seen: Tensor, action: Tensor) -> Tensor:
        """r_in of every step, [M, N]; gradient flows to `meta_params` and `seen`."""
        params = part(meta_params, REWARD)
        outputs = networks.head(params, self.agent.policy.features(params, seen))
        if self.agent.policy.spec.discrete:
            outputs = outputs.gather(-1, action.unsqueeze(-1))
        return networks.tanh(outputs.squeeze(-1))

    def value(self, meta_params: Params, obs: Tensor) -> Tensor:
        """v_ex of normalized observations, [M, N]."""
        if self.agent.policy.spec.image is not None:
            obs = self.agent.policy.features(part(meta_params, REWARD), obs)
        params = part(meta_params, EXTRINSIC)
        return networks.mlp(params, obs, self.agent.trunk).squeeze(-1)

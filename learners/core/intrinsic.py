"""The networks of a learned reward: r_in, and v_ex, the value of the extrinsic return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core import networks
from learners.core.actor_critic import ActorCritic, part, prefixed
from learners.core.networks import Layer, Pass
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
        return self.read_out(outputs, action)

    def read_out(self, outputs: Tensor, action: Tensor) -> Tensor:
        """r_in of every step, [M, N], given the network's outputs [M, N, ·]; gradient to these."""
        if self.agent.policy.spec.discrete:
            outputs = outputs.gather(-1, action.unsqueeze(-1))
        return networks.tanh(outputs.squeeze(-1))

    def read_out_pullback(self, cotangent: Tensor, reward: Tensor, action: Tensor) -> Tensor:
        """A cotangent of `reward`, which is `read_out`'s, [M, N], as one of the outputs."""
        slope = networks.tanh_pullback(cotangent, reward).unsqueeze(-1)
        if not self.agent.policy.spec.discrete:
            return slope
        none = slope.new_zeros(*action.shape, self.agent.policy.spec.action_size)
        return none.scatter_(-1, action.unsqueeze(-1), slope)

    def value(self, meta_params: Params, obs: Tensor) -> Tensor:
        """v_ex of normalized observations, [M, N]."""
        if self.agent.policy.spec.image is not None:
            obs = self.agent.policy.features(part(meta_params, REWARD), obs)
        params = part(meta_params, EXTRINSIC)
        return networks.mlp(params, obs, self.agent.trunk).squeeze(-1)

    def rewarding(self, meta_params: Params, seen: Tensor) -> Pass:
        """The network of r_in, its derivatives by hand."""
        if self.agent.policy.spec.image is None:
            return Pass.through(self.perceptron(REWARD), meta_params, seen)
        layers = (*networks.pixel_trunk(REWARD), Layer(f"{REWARD}layer1"))
        return Pass.through(layers, meta_params, self.frames(meta_params, seen))

    def valuing(self, meta_params: Params, obs: Tensor) -> Pass:
        """The network of v_ex, its derivatives by hand; outputs [M, N, 1]."""
        if self.agent.policy.spec.image is None:
            return Pass.through(self.perceptron(EXTRINSIC), meta_params, obs)
        layers = (*networks.pixel_trunk(REWARD), Layer(f"{EXTRINSIC}layer0"))
        return Pass.through(layers, meta_params, self.frames(meta_params, obs))

    def perceptron(self, prefix: str) -> tuple[Layer, ...]:
        """The layers of one network, where observations are no pixels."""
        policy = self.agent.policy
        return networks.perceptron(prefix, len(policy.hidden) + 1, policy.activation)

    def frames(self, meta_params: Params, obs: Tensor) -> Tensor:
        """Pixels as the convolutions see them."""
        image = self.agent.policy.spec.image
        assert image is not None
        return networks.frames(obs, image, meta_params[f"{REWARD}conv0.weight"].dtype)

"""What the actor-critic methods share: networks, a stream's data, minibatches.

Parameters of one network carry the prefix of its name: "policy.layer0.weight". Pixels pass through
one trunk, which the policy owns; the value is then a head on it, "value.layer0.weight".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import ActorCriticSettings
from learners.core import networks
from learners.core.errors import ConfigError
from learners.core.normalizer import Normalizer, normalize_obs
from learners.core.policy import Distribution, Policy
from learners.core.returns import bootstraps
from learners.core.trajectory import Params, Spec, Trajectory

POLICY, VALUE = "policy.", "value."


def part(params: Params, prefix: str) -> Params:
    """The entries of one network, without its prefix."""
    return {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}


def prefixed(params: Params, prefix: str) -> Params:
    """The inverse of `part`."""
    return {prefix + name: p for name, p in params.items()}


def stack(members: Sequence[Params]) -> Params:
    """Members' own parameters along axis M.

    Raises:
        ConfigError: there are several members with convolutional networks.
    """
    if len(members) > 1 and any("conv0" in name for name in members[0]):
        raise ConfigError(f"a run on pixels has one replica: num_members is {len(members)}, not 1")
    return {name: torch.stack([p[name] for p in members]) for name in members[0]}


@dataclass(frozen=True)
class ActorCritic:
    """A policy and the value of its observations."""

    policy: Policy

    @staticmethod
    def of(config: ActorCriticSettings, spec: Spec) -> ActorCritic:
        """The networks that `config` describes, with orthogonal weights.

        Raises:
            ConfigError: pixels are to be normalized, or come with continuous actions.
        """
        if spec.image is not None and (config.normalize_obs or not spec.discrete):
            raise ConfigError("pixels go with discrete actions, and normalize_obs must be off")
        normalizer = Normalizer(config.normalize_obs, config.normalize_reward, config.gamma)
        used = normalizer.obs or normalizer.reward
        return ActorCritic(
            Policy(
                spec,
                config.hidden,
                config.activation,
                config.init_std,
                init_weights="orthogonal",
                head_gain=0.01,
                normalizer=normalizer if used else None,
            )
        )

    @property
    def trunk(self) -> str:
        """Nonlinearity of the hidden layers."""
        return "relu" if self.policy.spec.image is not None else self.policy.activation

    def init(self, generator: torch.Generator) -> Params:
        """Parameters of one member."""
        policy = self.policy
        params = prefixed(policy.init(generator), POLICY)
        sizes = [networks.CNN_WIDTH, 1]
        if policy.spec.image is None:
            sizes = [policy.spec.obs_size, *policy.hidden, 1]
        return params | prefixed(networks.init_mlp(sizes, generator, "orthogonal"), VALUE)

    def __call__(self, params: Params, obs: Tensor) -> tuple[Distribution, Tensor]:
        """Distribution and value [M, N] at normalized `obs` [M, N, O]; gradient to `params`."""
        acting = part(params, POLICY)
        hidden = self.policy.features(acting, obs)
        below = obs if self.policy.spec.image is None else hidden
        value = networks.mlp(part(params, VALUE), below, self.trunk)
        return self.policy.read_out(acting, hidden), value.squeeze(-1)

    def tangents(
        self, params: Params, along: Params, obs: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Derivatives of log π(action|obs) and of the value along a direction of θ, both [M, N]."""
        policy, image = self.policy, self.policy.spec.image
        acting, acting_along = part(params, POLICY), part(along, POLICY)
        below, below_along = obs, None
        if image is not None:
            below, below_along = networks.convolve_tangent(acting, acting_along, obs, image)
        hidden, hidden_along, outputs, outputs_along = networks.mlp_tangent(
            acting, acting_along, below, self.trunk, below_along
        )
        dist = policy.from_outputs(acting, outputs)
        log_prob = dist.log_prob_tangent(action, outputs_along, acting_along)
        if image is None:
            hidden, hidden_along = obs, None  # type: ignore[assignment]
        *_, value = networks.mlp_tangent(
            part(params, VALUE), part(along, VALUE), hidden, self.trunk, hidden_along
        )
        return log_prob, value.squeeze(-1)

    def value(self, params: Params, obs: Tensor) -> Tensor:
        """The value alone, [M, N]."""
        if self.policy.spec.image is not None:
            obs = self.policy.features(part(params, POLICY), obs)
        return networks.mlp(part(params, VALUE), obs, self.trunk).squeeze(-1)


@dataclass(frozen=True)
class Rollout:
    """A chunk of a stream as the losses need it; nothing in it carries gradient.

    N = T·E steps, time first, as in `flatten(1, 2)`.
    """

    obs: Tensor  # [M, N, O], normalized
    action: Tensor  # [M, N, A] or [M, N]
    log_prob: Tensor  # [M, N], of the policy that acted
    reward: Tensor  # [M, T, E]
    ended: Tensor  # [M, T, E], 1.0 where an episode ends


def rollout(trajectory: Trajectory, statistics: Params) -> Rollout:
    """Flattens a trajectory and normalizes its observations as they were when acting."""
    t = trajectory
    return Rollout(
        obs=normalize_obs(statistics, t.obs.flatten(1, 2)),
        action=t.action.flatten(1, 2),
        log_prob=t.log_prob.flatten(1, 2),
        reward=t.reward,
        ended=(t.terminated | t.truncated).to(t.reward.dtype),
    )


def values(
    value: Callable[[Tensor], Tensor], data: Rollout, trajectory: Trajectory, statistics: Params
) -> tuple[Tensor, Tensor]:
    """Value of every observation and of what follows it, both [M, T, E], without gradient.

    `value` maps normalized observations [M, N, O] to values [M, N].
    """
    t = trajectory
    with torch.no_grad():
        now = value(data.obs).view_as(t.reward)
        last = value(normalize_obs(statistics, t.last_obs))
        final = torch.zeros_like(now)
        if bool(t.truncated.any()):
            final = value(normalize_obs(statistics, t.final_obs.flatten(1, 2))).view_as(now)
        return now, bootstraps(now, last, final, t.terminated, t.truncated)


def minibatches(
    seeds: Tensor, num_updates: Tensor, size: int, num_epochs: int, num_minibatches: int
) -> Tensor:
    """Which of N steps each minibatch has, [epochs · minibatches, M, N / minibatches].

    Every member's steps are shuffled by its own seed and number of updates, each epoch anew.
    """
    rows = []
    for seed, count in zip(seeds.tolist(), num_updates.tolist(), strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + count)
        orders = [torch.randperm(size, generator=generator) for _ in range(num_epochs)]
        rows.append(torch.stack(orders).view(num_epochs * num_minibatches, -1))
    return torch.stack(rows, 1)


def take(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of each member: [M, N, …] and [M, B] → [M, B, …]."""
    members = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    return tensor[members, rows]


def standardise_rows(value: Tensor, eps: float = 1e-8) -> Tensor:
    """Each member's minibatch [M, B] with mean 0 and deviation 1; gradient flows through both."""
    centred = value - value.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + eps)


def decayed(lr: float, num_updates: int, decay_updates: int) -> float:
    """A step size that falls linearly to 0 over `decay_updates` updates; constant at 0 of them."""
    if decay_updates == 0:
        return lr
    return lr * max(0.0, 1.0 - num_updates / decay_updates)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """−min(r Â, clip(r, 1 ± clip) Â), r = exp(log_ratio), at each step; −r Â without `clip`."""
    ratio = log_ratio.exp()
    if clip is None:
        return -ratio * advantage
    return torch.maximum(-ratio * advantage, -ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def surrogate_slope(log_ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """Derivative of `clipped_surrogate` by log_ratio, divided by Â: −r, or 0 where clipped."""
    ratio = log_ratio.exp()
    if clip is None:
        return -ratio
    free = torch.where(advantage > 0, ratio <= 1.0 + clip, ratio >= 1.0 - clip)
    return -ratio * free


def clipped_value_loss(value: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """½ max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²); ½ (V − R)² where `clip` is None."""
    plain = (value - returns).square()
    if clip is None:
        return 0.5 * plain
    near = old + (value - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (near - returns).square())


def value_loss_slope(
    value: Tensor, old: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Derivative of `clipped_value_loss` by V, and of that derivative by R: −1, or 0 where clipped.

    The first is linear in R, but for the choice of the larger of two squares.
    """
    plain = value - returns
    if clip is None:
        return plain, -torch.ones_like(plain)
    moved = value - old
    near = moved.clamp(-clip, clip) - moved + plain
    # Where the clipped square is the larger one the loss does not depend on V, unless they agree.
    free = plain.abs() >= near.abs()
    return plain * free, -free.to(plain.dtype)

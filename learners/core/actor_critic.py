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
from learners.core.networks import Layer, Pass
from learners.core.normalizer import Normalizer, normalize_obs
from learners.core.policy import MIN_LOG_STD, Categorical, Distribution, Policy
from learners.core.returns import bootstraps
from learners.core.trajectory import Params, Spec, Trajectory

POLICY, VALUE = "policy.", "value."
LOG_STD = POLICY + "log_std"


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
    value_gain: float = 1.0

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
            ),
            config.value_gain,
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
        value = networks.init_mlp(sizes, generator, "orthogonal", self.value_gain)
        return params | prefixed(value, VALUE)

    def __call__(self, params: Params, obs: Tensor) -> tuple[Distribution, Tensor]:
        """Distribution and value [M, N] at normalized `obs` [M, N, O]; gradient to `params`."""
        acting = part(params, POLICY)
        hidden = self.policy.features(acting, obs)
        below = obs if self.policy.spec.image is None else hidden
        value = networks.mlp(part(params, VALUE), below, self.trunk)
        return self.policy.read_out(acting, hidden), value.squeeze(-1)

    def acting(self, params: Params, obs: Tensor, action: Tensor) -> Acting:
        """The policy's log π(action) at normalized `obs`, with derivatives by hand."""
        policy, image, trunk = self.policy, self.policy.spec.image, None
        if image is None:
            layers = networks.perceptron(POLICY, len(policy.hidden) + 1, policy.activation)
        else:
            layers = (Layer(f"{POLICY}layer1"),)
            images = networks.frames(obs, image, params[f"{POLICY}conv0.weight"].dtype)
            trunk = Pass.through(networks.pixel_trunk(POLICY), params, images)
        head = Pass.through(layers, params, obs if trunk is None else trunk.outputs)
        free = {} if policy.spec.discrete else {"log_std": params[LOG_STD]}
        dist = policy.from_outputs(free, head.outputs)
        return Acting(trunk, head, dist, dist.log_prob(action), score(dist, action))

    def valuing(self, params: Params, acting: Acting) -> Pass:
        """The value of what `acting` has seen, [M, N, 1]: for pixels on the trunk of that."""
        num_layers = len(self.policy.hidden) + 1 if acting.trunk is None else 1
        layers = networks.perceptron(VALUE, num_layers, self.trunk)
        return Pass.through(layers, params, acting.head.inputs)

    def value(self, params: Params, obs: Tensor) -> Tensor:
        """The value alone, [M, N]."""
        if self.policy.spec.image is not None:
            obs = self.policy.features(part(params, POLICY), obs)
        return networks.mlp(part(params, VALUE), obs, self.trunk).squeeze(-1)


@dataclass(frozen=True)
class Acting:
    """Log-probabilities of some actions, kept for their derivatives; see `networks.Pass`."""

    trunk: Pass | None  # of pixels
    head: Pass
    dist: Distribution
    log_prob: Tensor  # [M, N]
    score: Params  # derivatives of log_prob, as the function `score` has them

    def gradient(
        self, by_log_prob: Tensor, by_entropy: float = 0.0, by_trunk: Tensor | None = None
    ) -> Params:
        """Gradient by the policy's entries of a function of log π, the entropy and the trunk.

        Args:
            by_log_prob: derivative of the function by log π of each step, [M, N].
            by_entropy: by the entropy at each step.
            by_trunk: by the trunk's outputs.
        """
        slopes = {name: p * by_log_prob.unsqueeze(-1) for name, p in self.score.items()}
        if by_entropy:
            for name, slope in entropy_slopes(self.dist).items():
                slopes[name] += by_entropy * slope
        grads, cotangent = self.head.pullback(slopes["outputs"], self.trunk is not None)
        if self.trunk is not None:
            cotangent = cotangent if by_trunk is None else cotangent + by_trunk
            grads |= self.trunk.pullback(cotangent)[0]
        if "log_std" in slopes:
            grads[LOG_STD] = slopes["log_std"].sum(1)
        return grads

    def tangent(self, along: Params) -> tuple[Tensor, Tensor | None]:
        """Derivative of log π along a direction, [M, N], and that of the trunk's outputs."""
        trunk = None if self.trunk is None else self.trunk.tangent(along)
        moved = self.score["outputs"] * self.head.tangent(along, trunk)
        if "log_std" in self.score:
            moved += self.score["log_std"] * along[LOG_STD].unsqueeze(1)
        return moved.sum(-1), trunk


def score(dist: Distribution, action: Tensor) -> Params:
    """Derivatives of log π(action) by the network's "outputs" and by "log_std", [M, N, A]."""
    if isinstance(dist, Categorical):
        chosen = torch.zeros_like(dist.logits).scatter_(-1, action.unsqueeze(-1), 1.0)
        return {"outputs": chosen - dist.logits.exp()}
    inverse = torch.exp(-dist.log_std)
    scaled = (action - dist.mean) * inverse
    moving = dist.log_std > MIN_LOG_STD
    return {"outputs": scaled * inverse, "log_std": (scaled.square() - 1.0) * moving}


def entropy_slopes(dist: Distribution) -> Params:
    """Derivatives of the entropy at each step by what it depends on, named as in `score`."""
    if isinstance(dist, Categorical):
        return {"outputs": -dist.logits.exp() * (dist.logits + dist.entropy().unsqueeze(-1))}
    return {"log_std": (dist.log_std > MIN_LOG_STD).to(dist.mean.dtype)}


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
        ended=t.ended,
    )


def values(
    value: Callable[[Tensor], Tensor], data: Rollout, trajectory: Trajectory, statistics: Params
) -> tuple[Tensor, Tensor]:
    """Value of every observation and of what follows it, both [M, T, E], without gradient.

    `value` maps normalized observations [M, N, O] to values [M, N].
    """
    with torch.no_grad():
        now = value(data.obs).view_as(trajectory.reward)
        return now, next_values(value, now, trajectory, statistics)


def next_values(
    value: Callable[[Tensor], Tensor], now: Tensor, trajectory: Trajectory, statistics: Params
) -> Tensor:
    """Value of what follows each observation, given those of the observations, [M, T, E].

    Gradient flows to `now` and to what `value` depends on.
    """
    t = trajectory
    last = value(normalize_obs(statistics, t.last_obs))
    final = torch.zeros_like(now)
    if bool(t.truncated.any()):
        final = value(normalize_obs(statistics, t.final_obs.flatten(1, 2))).view_as(now)
    return bootstraps(now, last, final, t.terminated, t.truncated)


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
    members = torch.arange(len(rows), device=rows.device).unsqueeze(1) * tensor.shape[1]
    taken = tensor.flatten(0, 1).index_select(0, (rows + members).view(-1))
    return taken.view(*rows.shape, *tensor.shape[2:])


def standardise_rows(value: Tensor, eps: float = 1e-8) -> Tensor:
    """Each member's minibatch [M, B] with mean 0 and deviation 1; gradient flows through both."""
    return standardise_with_pullback(value, eps)[0]


def standardise_with_pullback(
    value: Tensor, eps: float = 1e-8
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`standardise_rows`, and what makes a cotangent of the result one of `value`."""
    centred = value - value.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    standard = centred / (deviation + eps)

    def pullback(cotangent: Tensor) -> Tensor:
        along = (cotangent * standard).mean(1, keepdim=True) / deviation
        return (cotangent - cotangent.mean(1, keepdim=True)) / (deviation + eps) - along * standard

    return standard, pullback


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

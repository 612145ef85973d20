"""Lifetimes side by side: agents of several worlds, how they act, and how a target updates them.

    Δθ ∝ mean[ π̂ ∇log π(a|s) ] − α_y ∇mean[ KL(y(s) ‖ ŷ) ]          (Oh et al. 2020, eq. 2)

π is a softmax over the actions that a lifetime has, y a softmax over m predictions that have no
meaning but what the rule gives them. Entries of parameters carry the number of their world,
"world0.layer0.weight" [M_0, …]: agents of different worlds have different sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core.actor_critic import next_values, part
from learners.core.blocks import block_bounds, group_bounds
from learners.core.errors import ConfigError
from learners.core.index_network import IndexNetwork
from learners.core.optim import Adam, Optimizer, Sgd, clip_by_norm
from learners.core.params import detach, leaves
from learners.core.policy import Categorical, gumbel
from learners.core.returns import stream_gae
from learners.core.trajectory import Params, Spec, Trajectory, World

ABSENT = -1e9
"""Logit of an action that a lifetime does not have; finite, so that p · log p is 0."""

AGENT_ADAM = Adam(eps=1e-5)
CRITIC_ADAM = Adam(eps=1e-5)


@dataclass(frozen=True)
class Target:
    """What an agent is moved towards."""

    pi_hat: Tensor  # [M, T, E], π̂
    log_y_hat: Tensor  # [M, T, E, m], log ŷ


@dataclass(frozen=True)
class Experience:
    """What the rule sees of B streams of T steps."""

    reward: Tensor  # [T, B]
    ended: Tensor  # [T, B], 1.0 where an episode ends
    prob: Tensor  # [T, B], π(a_t|s_t)
    prediction: Tensor  # [T, B, m], y(s_t), probabilities
    next_prediction: Tensor  # [T, B, m], y(s_{t+1})
    lifetime: Tensor  # [B, 2], n/N and log N


@dataclass(frozen=True)
class Rates:
    """What scales an agent's update.

    Attributes:
        lr: α of each member, [M].
        alpha_y: α_y of each member, [M].
        max_grad_norm: largest norm of the gradient.
        entropy_coef: weight of the policy's entropy.
    """

    lr: Tensor
    alpha_y: Tensor
    max_grad_norm: float
    entropy_coef: float = 0.0


@dataclass(frozen=True)
class CriticRates:
    """Step sizes of critics: part of the way to the mean return in a table, or Adam's."""

    table: float
    network: float


@dataclass(frozen=True)
class Heads:
    """What agents say of N observations; gradient to their parameters."""

    outputs: Tensor  # [M, N, A + m], before either softmax
    log_policy: Tensor  # [M, N, A]
    log_y: Tensor  # [M, N, m]

    @property
    def policy(self) -> Categorical:
        """π."""
        return Categorical(self.log_policy)

    @property
    def y_entropy(self) -> Tensor:
        """H(y), [M, N]."""
        return -(self.log_y.exp() * self.log_y).sum(-1)


@dataclass(frozen=True)
class Agent:
    """The agents of one world.

    Attributes:
        world: what they observe.
        hidden: widths of their hidden layers; none on a tabular world.
        num_actions: A, padded.
        num_predictions: m.
        channels: of a convolution below the hidden layers, where there are pixels; 0 for none.
    """

    world: World
    hidden: tuple[int, ...]
    num_actions: int
    num_predictions: int
    channels: int = 0

    @property
    def network(self) -> IndexNetwork:
        """Logits of π and of y."""
        num_outputs = self.num_actions + self.num_predictions
        return IndexNetwork(self.world, self.hidden, num_outputs, self.channels)

    @property
    def critic(self) -> IndexNetwork:
        """V, of the same make."""
        return IndexNetwork(self.world, self.hidden, 1, self.channels)

    @property
    def optimizer(self) -> Optimizer:
        """Plain gradients for tables, Adam for networks."""
        return Sgd() if self.world.tabular else AGENT_ADAM

    @property
    def critic_optimizer(self) -> Optimizer:
        """Tables have none: see `critic_step`."""
        return Sgd() if self.world.tabular else CRITIC_ADAM

    def heads(self, params: Params, obs: Tensor) -> Heads:
        """Both softmaxes at observations [M, N, O]."""
        outputs = self.network(params, obs)
        logits, y = outputs[..., : self.num_actions], outputs[..., self.num_actions :]
        return Heads(outputs, self.masked(logits, obs).log_softmax(-1), y.log_softmax(-1))

    def masked(self, logits: Tensor, obs: Tensor) -> Tensor:
        """Logits [M, N, A] with those of actions that a lifetime does not have out of the way."""
        if not self.world.num_indices:
            return logits
        number = torch.arange(self.num_actions, device=logits.device)
        return logits.masked_fill(number >= obs[..., :1], ABSENT)

    def direction(
        self,
        params: Params,
        heads: Heads,
        batch: Trajectory,
        target: Target,
        rates: Rates,
        *,
        create_graph: bool,
    ) -> Params:
        """−Δθ before clipping and step size; gradient to the target, and to θ if asked for.

        Args:
            params: θ.
            heads: what θ says of the batch's observations.
            batch: T steps of E environments.
            target: π̂ and ŷ.
            rates: α_y, and the weight of the policy's entropy.
            create_graph: whether gradient is to flow to θ.
        """
        prob, y = heads.log_policy.exp(), heads.log_y.exp()
        chosen = torch.zeros_like(prob).scatter_(-1, batch.action.flatten(1, 2).unsqueeze(-1), 1.0)
        by_policy = target.pi_hat.flatten(1, 2).unsqueeze(-1) * (chosen - prob)
        if rates.entropy_coef > 0.0:
            surprise = heads.log_policy + heads.policy.entropy().unsqueeze(-1)
            by_policy = by_policy - rates.entropy_coef * prob * surprise
        ratio = heads.log_y - target.log_y_hat.flatten(1, 2)
        by_y = y * (ratio - (y * ratio).sum(-1, keepdim=True)) * rates.alpha_y.view(-1, 1, 1)
        cotangent = torch.cat([-by_policy, by_y], -1) / y.shape[1]
        return self.network.pullback(
            params, batch.obs.flatten(1, 2), heads.outputs, cotangent, create_graph=create_graph
        )

    def step(
        self,
        params: Params,
        slots: Params,
        batch: Trajectory,
        target: Target,
        rates: Rates,
        *,
        create_graph: bool,
    ) -> tuple[Params, Params]:
        """θ after one update, and its slots; gradient to the target, and to θ if asked for."""
        heads = self.heads(params, batch.obs.flatten(1, 2))
        grads = self.direction(params, heads, batch, target, rates, create_graph=create_graph)
        clipped, _ = clip_by_norm(grads, rates.max_grad_norm)
        return self.optimizer.update(params, clipped, slots, rates.lr)

    # --- The critic ---

    def values(self, critic: Params, batch: Trajectory) -> tuple[Tensor, Tensor]:
        """V(s_t) and V(s_{t+1}), bootstrapped over time limits, [M, T, E] without gradient."""

        def value(obs: Tensor) -> Tensor:
            return self.critic(critic, obs).squeeze(-1)

        with torch.no_grad():
            now = value(batch.obs.flatten(1, 2)).view_as(batch.reward)
            return now, next_values(value, now, batch, {})

    def advantages(
        self, critic: Params, batch: Trajectory, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """GAE around the critic, and λ-returns, [M, T, E] without gradient."""
        now, following = self.values(critic, batch)
        advantage = stream_gae(batch.reward, now, following, batch.ended, gamma, lam)
        return advantage, advantage + now

    def critic_step(
        self, critic: Params, slots: Params, batch: Trajectory, returns: Tensor, lr: CriticRates
    ) -> tuple[Params, Params]:
        """The critic after one step towards returns [M, T, E].

        A table moves each visited state part of the way to the mean of its returns, whatever the
        share of the visits that it had; a network takes a step of Adam on the squared error.
        """
        obs = batch.obs.flatten(1, 2)
        network = self.critic
        leaf = leaves(critic)
        outputs = network(leaf, obs)
        error = outputs - returns.flatten(1, 2).unsqueeze(-1)
        if not self.world.tabular:
            grads = network.pullback(leaf, obs, outputs, error / error.shape[1], create_graph=False)
            return CRITIC_ADAM.update(detach(leaf), grads, slots, lr.network)
        total = network.pullback(critic, obs, outputs, error.detach(), create_graph=False)
        visits = network.pullback(critic, obs, outputs, torch.ones_like(error), create_graph=False)
        moved = {n: p - lr.table * total[n] / visits[n].clamp_min(1.0) for n, p in critic.items()}
        return moved, slots


def experience(
    agent: Agent, params: Params, batch: Trajectory, age: Tensor, length: Tensor
) -> Experience:
    """What a rule sees of a batch of M members, as T steps of M·E streams.

    Args:
        agent: of the members' world.
        params: θ that acted; gradient flows to it.
        batch: T steps of E environments.
        age: n, updates of each member so far, [M].
        length: N, updates of its lifetime, [M].
    """
    num_members, num_steps, num_envs = batch.reward.shape
    obs = torch.cat([batch.obs, batch.last_obs.unsqueeze(1)], 1)
    heads = agent.heads(params, obs.flatten(1, 2))
    acted = torch.cat([batch.action, batch.action[:, -1:]], 1).flatten(1, 2)
    prob = heads.policy.log_prob(acted).exp().view(num_members, num_steps + 1, num_envs)
    y = (
        heads.log_y.exp()
        .view(num_members, num_steps + 1, num_envs, -1)
        .transpose(0, 1)
        .flatten(1, 2)
    )

    def by_step(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).flatten(1)

    whole = length.to(batch.reward.dtype)
    lifetime = torch.stack([age / whole, whole.log()], -1)
    return Experience(
        reward=by_step(batch.reward),
        ended=by_step(batch.ended),
        prob=by_step(prob[:, :-1]),
        prediction=y[:-1],
        next_prediction=y[1:],
        lifetime=lifetime.repeat_interleave(num_envs, 0),
    )


def by_member(streams: Tensor, like: Trajectory) -> Tensor:
    """Values [T, M·E, …] of streams as [M, T, E, …]."""
    num_members, num_steps, num_envs = like.reward.shape
    shape = (num_steps, num_members, num_envs, *streams.shape[2:])
    return streams.view(shape).transpose(0, 1)


@dataclass(frozen=True)
class LifetimePolicy:
    """What acts in one world; used as `policy.Policy` is."""

    spec: Spec
    agent: Agent

    @property
    def normalizer(self) -> None:
        """Nothing is normalized."""
        return None

    def template(self) -> Params:
        """The entries of one agent."""
        return self.agent.network.init(torch.Generator())

    def acting(self, params: Params) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function of observations [M, N, O] and noise that gives actions and masked logits."""
        agent, network = self.agent, self.agent.network

        def choose(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            logits = agent.masked(network(params, obs)[..., : agent.num_actions], obs)
            return Categorical(logits.log_softmax(-1)).sample(noise), logits

        return choose

    def from_outputs(self, params: Params, outputs: Tensor) -> Categorical:
        """The action distribution given masked logits [M, N, A]."""
        return Categorical(outputs.log_softmax(-1))

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Gumbel noise, [*shape, A]."""
        return gumbel((*shape, self.agent.num_actions), generator)


@dataclass(frozen=True)
class Block:
    """Members that are worked on together: all of one world."""

    world: int
    agent: Agent
    members: tuple[int, int]  # first and one past the last of all M
    own: tuple[int, int]  # the same among the members of the world

    def rows(self, entry: Tensor) -> Tensor:
        """The block's part of an entry [M, …] that all members have."""
        return entry[slice(*self.members)]

    def of(self, params: Params) -> Params:
        """The block's entries of parameters that carry the numbers of their worlds."""
        own = part(params, f"world{self.world}.")
        return {name: p[slice(*self.own)] for name, p in own.items()}


@dataclass(frozen=True)
class Population:
    """All agents of a specification's worlds.

    Members 0 … M−1 are dealt out over the worlds in order, as `Spec.worlds` says.
    """

    spec: Spec
    hidden: tuple[int, ...]
    num_predictions: int
    channels: int = 0

    def __post_init__(self) -> None:
        """Refuses environments that its agents cannot act in."""
        if not self.spec.discrete or self.spec.image is not None:
            raise ConfigError(
                "lpg and lpg-agent need discrete actions, and observations that are no pixels"
            )

    @property
    def agents(self) -> list[Agent]:
        """Those of each world."""
        spec, m = self.spec, self.num_predictions
        worlds = spec.worlds or (World("observations", 0, spec.obs_size, tabular=False),)
        return [Agent(world, self.hidden, spec.action_size, m, self.channels) for world in worlds]

    def policy_of(self, world: int) -> LifetimePolicy:
        """What acts in a world."""
        return LifetimePolicy(self.spec, self.agents[world])

    def blocks(self, num_members: int, members_per_block: int) -> list[Block]:
        """All members in blocks, in order."""
        groups = group_bounds(num_members, len(self.agents))
        return [
            Block(w, agent, (first + a, first + b), (a, b))
            for w, (agent, (first, last)) in enumerate(zip(self.agents, groups, strict=True))
            for a, b in block_bounds(last - first, members_per_block)
        ]

    def block(self, num_members: int, members: tuple[int, int]) -> Block:
        """Some members, all of one world."""
        for block in self.blocks(num_members, num_members):
            first, last = block.members
            if first <= members[0] and members[1] <= last:
                own = (members[0] - first, members[1] - first)
                return Block(block.world, block.agent, members, own)
        raise AssertionError(f"members {members} are of several worlds")

    def join(self, blocks: Sequence[Block], parts: Sequence[Params]) -> Params:
        """The inverse of `Block.of` for all blocks."""
        joined: dict[str, list[Tensor]] = {}
        for block, own in zip(blocks, parts, strict=True):
            for name, p in own.items():
                joined.setdefault(f"world{block.world}.{name}", []).append(p)
        return {name: torch.cat(pieces) for name, pieces in joined.items()}

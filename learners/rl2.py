"""RL²: fast reinforcement learning inside a recurrent policy (Duan et al. 2016, arXiv 1611.02779).

    for each meta-iteration:
        D    = one trial of each of M tasks under π_old: n episodes of one MDP, through which the
               hidden state lives; π sees (s_t, a_t−1, r_t−1, d_t−1)
        Â    = GAE(γ, λ) over V_old, along the whole trial: the ends of its inner episodes are
               observations and cut neither a return nor an advantage;   R = Â + V_old
        for each of `num_epochs` passes over D, some whole trials at a time:
            r = π(a|…) / π_old(a|…),  by back-propagation through the whole trial
            L = mean[ −min(r Â, clip(r, 1 ± ε) Â) ] + c_v mean[ huber(V − R) ] − c_e mean H(π)
            θ ← (1 − α w) θ − α Adam clip ∇θ L                           policy and value apart

With `outer` trpo, as in the paper, the policy makes one step of TRPO on all of D instead, whose
curvature is that of the first minibatch of it.

There is no other adaptation: what a trial has taught lies in the hidden state. Policy and value are
a GRU each. The trial's own end is known, so that nothing is bootstrapped.

What is left to the value: R less its mean over trials at each step t, in units of its deviation
over all steps. Both are running means over batches. The mean takes out what is the same in all
trials, how much of the trial is left; Huber's loss changes from a square to a line at 1 deviation.
The defaults are those of the re-implementation that matched the paper's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from learners.config import Rl2Config
from learners.core import trust_region
from learners.core.actor_critic import (
    POLICY,
    VALUE,
    clipped_surrogate,
    decayed,
    minibatches,
    part,
    prefixed,
)
from learners.core.blocks import block_bounds
from learners.core.contract import Agents, State, check_params
from learners.core.errors import ConfigError
from learners.core.gru import GruNetwork, GruPolicy
from learners.core.optim import Adam, clip_by_norm
from learners.core.params import (
    detach,
    expand_members,
    flatten,
    gradients,
    leaves,
    unflatten,
)
from learners.core.policy import Distribution, detached
from learners.core.reduce import ALONE, Reduce, sum_in_order
from learners.core.replicas import Online
from learners.core.returns import gae
from learners.core.trajectory import Metrics, Params, Spec, Trajectory
from learners.core.trust_region import Curvature

OPTIMIZER = Adam(eps=1e-5)
MEMORY = 0.9
"""What a running mean keeps of its past at each batch."""
EPS = 1e-8


@dataclass(frozen=True)
class Trials:
    """R trials as the losses need them, time first; nothing in it carries gradient."""

    obs: Tensor  # [T, R, O]
    action: Tensor  # [T, R, A] or [T, R]
    log_prob: Tensor  # [T, R], of the policy that acted
    valid: Tensor  # [T, R]
    advantage: Tensor  # [T, R]
    returns: Tensor  # [T, R], what the value network is to give

    def take(self, rows: Tensor) -> Trials:
        """Some of the trials."""
        return Trials(*(tensor.index_select(1, rows) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Rl2(Online):
    """The learner; see the head of the module.

    State groups: "params" (policy and value, entries with an axis 1), "optimizer", "returns" (the
    running moments of R) and "counters" (seed and number of updates).
    """

    config: Rl2Config
    spec: Spec

    def __post_init__(self) -> None:
        """Refuses tasks that are not trials."""
        if self.spec.num_episodes == 0:
            raise ConfigError("rl2 learns from trials of several episodes: --task trials:<task>")

    # --- The contract ---

    @property
    def policy(self) -> GruPolicy:
        """What acts."""
        return GruPolicy(self.spec, self.config.width, self.config.init_std)

    @property
    def value(self) -> GruNetwork:
        """The value of what has been seen so far, in units of the group "returns"."""
        return GruNetwork(self.spec.obs_size, self.config.width, 1)

    @property
    def num_stream_steps(self) -> None:
        """Whole trials."""
        return None

    def init(self, seeds: Sequence[int]) -> State:
        """Both networks, from the first seed: all members share them."""
        generator = torch.Generator().manual_seed(seeds[0])
        networks = prefixed(self.policy.init(generator), POLICY)
        networks |= prefixed(self.value.init(generator), VALUE)
        params = expand_members(networks, 1)
        horizon = self.spec.horizon
        return {
            "params": {name: p.clone() for name, p in params.items()},
            "optimizer": OPTIMIZER.init(params),
            "returns": {"mean": torch.zeros(horizon, 1), "square": torch.zeros(1)},
            "counters": {
                "seed": torch.tensor(seeds[:1], dtype=torch.int64),
                "num_updates": torch.zeros(1, dtype=torch.int64),
            },
        }

    def begin(
        self, state: State, num_members: int, *, evaluating: bool = False
    ) -> tuple[list[bool], Agents]:
        """Every member draws a task; all act with the same parameters."""
        return [True] * num_members, Agents(part(state["params"], POLICY), {}, 0)

    def meta_update(
        self,
        state: State,
        trace: Sequence[Agents],
        batches: Sequence[Trajectory],
        reduce: Reduce = ALONE,
    ) -> tuple[State, Metrics]:
        """All epochs on the batch of trials; they are shuffled whole, so only by one learner."""
        c, (batch,) = self.config, batches
        trials, moments, explained = self.prepared(state, batch)
        params, slots, count = state["params"], state["optimizer"], state["counters"]["num_updates"]
        lr = decayed(c.lr, int(count[0]), c.lr_decay_updates)
        entropy_coef = decayed(c.entropy_coef, int(count[0]), c.entropy_decay_updates)
        order = minibatches(
            state["counters"]["seed"],
            count,
            trials.valid.shape[1],
            c.num_epochs,
            c.num_minibatches,
        )
        natural: Metrics = {}
        names = list(params)
        if c.outer == "trpo":
            params, natural = self.natural_step(params, trials, entropy_coef)
            names = [name for name in names if name.startswith(VALUE)]
        totals: dict[str, Tensor] = {}
        for (rows,) in order.to(trials.valid.device):
            trained = {name: params[name] for name in names}
            leaf = leaves(trained)
            loss, parts = self.loss(params | leaf, trials.take(rows), entropy_coef)
            grads, norms = self.clipped(gradients(loss, leaf))
            shrunk = {name: p * (1.0 - lr * c.weight_decay) for name, p in trained.items()}
            new, kept = OPTIMIZER.update(shrunk, grads, slots, lr)
            params, slots = params | new, slots | kept
            for name, value in (parts | norms).items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().cpu()
        check_params(params, "params")
        metrics = {name: float(total) / len(order) for name, total in totals.items()} | natural
        counters = state["counters"] | {"num_updates": count + 1}
        groups = {"params": params, "optimizer": slots, "returns": moments, "counters": counters}
        return state | groups, metrics | {"rl2/explained_variance": explained}

    def describe(self, state: State, batch: Trajectory) -> dict[str, Tensor]:
        """What happens inside a trial.

        Returns:
            "trial_reward", "trial_entropy" [T]: mean reward and mean entropy of the policy at each
            step, over the trials that are still running; T the longest trial's length;
            "trial_action" [T', …], "trial_ended" [T']: of the first member's trial, its actions,
            and 1.0 where they ended an episode.
        """
        obs, reward, valid = (by_time(tensor) for tensor in (batch.obs, batch.reward, batch.valid))
        policy = part(state["params"], POLICY)

        def entropy_of(some: Tensor) -> Tensor:
            return self.policy.distribution(policy, some).entropy().expand(some.shape[:2])

        entropy = self.in_parts(entropy_of, obs)
        count = valid.sum(1)
        running = count > 0
        means = {"trial_reward": reward * valid, "trial_entropy": entropy * valid}
        length = int(batch.valid[0, :, 0].sum())
        ended = torch.ones_like(batch.reward[0, :length, 0])
        ended[:-1] = batch.obs[0, 1:length, 0, -1]
        return {name: x.sum(1)[running] / count[running] for name, x in means.items()} | {
            "trial_action": batch.action[0, :length, 0],
            "trial_ended": ended,
        }

    # --- Parts ---

    def prepared(self, state: State, batch: Trajectory) -> tuple[Trials, Params, float]:
        """The batch with advantages and targets, the new moments of R, and what V explains of R."""
        c, old = self.config, state["returns"]
        obs, reward, terminated, valid = (
            by_time(tensor) for tensor in (batch.obs, batch.reward, batch.terminated, batch.valid)
        )
        known = int(state["counters"]["num_updates"][0]) > 0
        critic = part(state["params"], VALUE)
        said = self.in_parts(lambda some: self.value(critic, some).squeeze(-1), obs)
        value = old["mean"] + old["square"].sqrt() * said
        (advantage,) = gae(
            reward[None], value[None], terminated[None], valid[None], c.gamma, c.gae_lambda
        )
        returns = advantage + value
        memory = MEMORY if known else 0.0
        here = (returns * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1.0)
        mean = torch.lerp(here, old["mean"], memory)
        left = (returns - mean) * valid
        square = torch.lerp(left.square().sum() / valid.sum(), old["square"], memory).clamp_min(EPS)
        errors = ((returns - value) * valid).square().sum() / left.square().sum().clamp_min(EPS)
        trials = Trials(
            obs,
            by_time(batch.action),
            by_time(batch.log_prob),
            valid,
            self.scaled(advantage, valid),
            left / square.sqrt(),
        )
        return trials, {"mean": mean, "square": square}, 1.0 - float(errors)

    def scaled(self, advantage: Tensor, valid: Tensor) -> Tensor:
        """The advantages [T, R]; with mean 0 and deviation 1 over the batch where asked for."""
        if not self.config.standardise_advantages:
            return advantage
        count = valid.sum()
        centred = (advantage - (advantage * valid).sum() / count) * valid
        return centred / (centred.square().sum() / count + EPS).sqrt()

    def in_parts(self, function: Callable[[Tensor], Tensor], obs: Tensor) -> Tensor:
        """What a function of trials [T, R, O] says of them, [T, R]: of some at a time, no graph."""
        size = -(-obs.shape[1] // self.config.num_minibatches)
        with torch.no_grad():
            return torch.cat([function(some) for some in torch.split(obs, size, 1)], 1)

    def loss(
        self, params: Params, trials: Trials, entropy_coef: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on some trials, with gradient to `params`, and its parts."""
        c, t = self.config, trials
        dist = self.policy.distribution(part(params, POLICY), t.obs)
        log_ratio = dist.log_prob(t.action) - t.log_prob
        value = self.value(part(params, VALUE), t.obs).squeeze(-1)

        def mean(x: Tensor) -> Tensor:
            return (x * t.valid).sum() / t.valid.sum()

        policy_loss = mean(clipped_surrogate(log_ratio, t.advantage, c.clip_ratio))
        value_loss = mean(huber_loss(value, t.returns, reduction="none"))
        entropy = mean(dist.entropy().expand_as(t.valid))
        loss = policy_loss + c.value_coef * value_loss - entropy_coef * entropy
        parts = {
            "meta/loss": loss,
            "meta/policy_loss": policy_loss,
            "meta/value_loss": value_loss,
            "meta/kl": -mean(log_ratio),
            "rl2/entropy": entropy,
            "rl2/clipped": mean(((log_ratio.exp() - 1.0).abs() > c.clip_ratio).float()),
        }
        return loss, parts

    def natural_step(
        self, params: Params, trials: Trials, entropy_coef: float
    ) -> tuple[Params, Metrics]:
        """The policy after a step of TRPO on all trials; its curvature is that of some of them."""
        c, num_trials = self.config, trials.valid.shape[1]
        blocks = block_bounds(num_trials, num_trials // c.num_minibatches)
        rows = [torch.arange(*bounds, device=trials.valid.device) for bounds in blocks]
        shares = [trials.valid[:, own].sum() / trials.valid.sum() for own in rows]
        leaf = leaves(part(params, POLICY))
        start = flatten(detach(leaf)).double()

        def objective(policy: Params, own: Tensor) -> tuple[Tensor, Distribution]:
            some = trials.take(own)
            dist = self.policy.distribution(policy, some.obs)
            log_ratio = dist.log_prob(some.action) - some.log_prob
            gain = (clipped_surrogate(log_ratio, some.advantage, None) * some.valid).sum()
            entropy = (dist.entropy().expand_as(some.valid) * some.valid).sum()
            return (gain - entropy_coef * entropy) / some.valid.sum(), dist

        losses, slopes, before = [], [], []
        for own, share in zip(rows, shares, strict=True):
            loss, dist = objective(leaf, own)
            slopes.append(flatten(gradients(share * loss, leaf)).double())
            losses.append(share * loss.detach())
            before.append(detached(dist))
        gradient = sum_in_order(slopes)
        weight = trials.valid[:, rows[0]]
        # The library's second derivative of a GRU is written in steps; its fast one has none.
        with torch.backends.cudnn.flags(enabled=False):
            dist = self.policy.distribution(leaf, trials.obs[:, rows[0]])
            curvature = Curvature.at(dist, leaf, weight / weight.sum())

        def product(vector: Tensor) -> Tensor:
            return curvature.product(leaf, unflatten(vector, leaf))

        def evaluate(vector: Tensor) -> tuple[float, float]:
            with torch.no_grad():
                policy, loss, kl = unflatten(vector, leaf), 0.0, 0.0
                for own, share, old in zip(rows, shares, before, strict=True):
                    found, dist = objective(policy, own)
                    valid = trials.valid[:, own]
                    moved = (old.kl(dist) * valid).sum() / valid.sum()  # type: ignore[arg-type]
                    loss, kl = loss + float(share * found), kl + float(share * moved)
            return loss, kl

        vector, metrics = trust_region.step(
            start, float(sum_in_order(losses)), gradient, product, evaluate, c
        )
        new = prefixed(detach(unflatten(vector, leaf)), POLICY)
        return params | new, metrics

    def clipped(self, grads: Params) -> tuple[Params, dict[str, Tensor]]:
        """Gradients of each network scaled down to the largest norm, and both norms before."""
        clipped: Params = {}
        norms: dict[str, Tensor] = {}
        for prefix, name in ((POLICY, "meta/grad_norm"), (VALUE, "rl2/value_grad_norm")):
            own = {n: g for n, g in grads.items() if n.startswith(prefix)}
            if not own:
                continue
            own, norm = clip_by_norm(own, self.config.max_grad_norm)
            clipped |= own
            norms[name] = norm[0]
        return clipped, norms


def by_time(tensor: Tensor) -> Tensor:
    """[M, T, E, …] → [T, M·E, …], one column for each trial."""
    return tensor.transpose(0, 1).flatten(1, 2).contiguous()

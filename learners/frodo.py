"""FRODO: discovering the target online (Xu, van Hasselt, Hessel, Oh, Silver, Singh 2020,
arXiv 2007.08433).

    g_η(τ_t) = a backward LSTM over [r, γ·(not terminated), V(s_t), V(s_{t+1}), π(a|s), μ(a|s)]

    for each window:                                 one lifetime: θ and η are never reset
        for k in 0 … K−1, η fixed:
            τ_k   = T steps of E environments under θ_k (or, asynchronously, an older μ)
            g     = g_η(τ_k), through V and π also a function of θ_k
            d     = mean[ (g − V) ∇log π(a|s) + c₁ (g − V) ∇V(s) + c₂ ∇H ]      at θ_k
            θ_k+1 = θ_k + α step(clip(d))                                       slots included
        τ_K = the next batch, which is also the τ_0 of the next window
        η   ← η − β Adam clip ∇η [ L_out(θ_K(η), τ_K) + c mean (g_η(τ_t) − sg(r + γ g_η(τ_t+1)))² ]

g stands for the return in d and is not differentiated there; but d depends on η and on θ_k through
g and V, and the gradient by η runs through all K steps, their clipping and their optimizer, back
to the θ_0 of the window, which is a constant. L_out is the loss of a V-trace actor-critic on τ_K.
Where the specification has a target policy there is nothing to control: then d = mean (g − V) ∇V,
π is that policy, and L_out the squared error of V to V-trace's target, which is the observed return
where the data see the episode's end. Chunks should be short, since θ moves once in each, and
returns long: so L_out may wait for the rewards of Q chunks (`num_outcome_batches`), τ_K … τ_K+Q−1,
before it rates a policy on τ_K, or the values of a given one on all of them. Windows then overlap:
each still begins K batches after the last.

The paper's code is not public. Choices made here where it leaves them open:
  - Advantages and targets of L_out come from a critic of its own, V_out, which learns V-trace's
    targets on every batch (`outer_critic`; off, as in the paper, the agent's V serves, and then
    rates the targets that it was trained on).
  - L_out also holds the error of the agent's V (`outer_value_coef`), so that V is driven to be a
    value and g can bootstrap from it.
  - The consistency loss is taken on τ_K, with θ_K a constant; steps at the chunk's end have no
    successor and are left out; where an episode terminates the target is to equal r.
  - g starts near 0 (a small head): until η has moved, the agent stays as it is. `residual` starts
    from V-trace's target instead. The network's output o is added to it or, with `residual_gain`,
    scales how far it lies from V: g = V + e^o (v − V), o bent to ±4. An outer loss that looks a
    few updates ahead hardly sees what a lasting bias of the target does to V in the long run. What
    is added can be one; what scales an error that is 0 on average cannot.
  - Inner steps are RMSProp with ε inside the root, Adam with a second moment that is a constant in
    the graph, or SGD. η moves by Adam.

The M members are replicas: each has a θ, an η and a critic of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.config import FrodoConfig
from learners.core.actor_critic import VALUE, decayed, next_values, part, prefixed, rollout, stack
from learners.core.contract import State
from learners.core.normalizer import normalize_obs
from learners.core.optim import OPTIMIZERS, Adam, Optimizer, clip_by_norm
from learners.core.params import detach, first_member, gradients, leaves
from learners.core.replicas import Replicas, each, value_errors
from learners.core.returns import vtrace
from learners.core.target_network import TargetNetwork
from learners.core.trajectory import Params, Trajectory

META_OPTIMIZER = Adam(eps=1e-5)
CRITIC_OPTIMIZER = Adam(eps=1e-5)
MAX_LOG_GAIN = 4.0


@dataclass(frozen=True)
class View:
    """What an agent makes of a batch; everything has gradient to its parameters."""

    log_prob: Tensor  # [M, T, E], log π(a|s); of the target policy where there is one
    entropy: Tensor  # [M]
    value: Tensor  # [M, T, E], V(s_t)
    next_value: Tensor  # [M, T, E], V(s_{t+1}); 0 where terminated


@dataclass(frozen=True)
class Frodo(Replicas):
    """The learner; see the head of the module.

    State groups beside those of all replicas: "meta_params" (η), "critic" (V_out), an optimizer's
    slots for each; "window" (the batches since the oldest window that is open began, by number and
    field) and "starts" (θ_0 and its slots of each open window, by its number), so that windows go
    on after a restart.
    """

    config: FrodoConfig

    @property
    def network(self) -> TargetNetwork:
        """The target g."""
        return TargetNetwork(self.config.target_width, self.config.sees_policies)

    @property
    def optimizer(self) -> Optimizer:
        """Of the inner steps."""
        return OPTIMIZERS[self.config.inner_optimizer]

    # --- The contract ---

    def init(self, seeds: Sequence[int]) -> State:
        """Each replica's three networks from its own seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        params = stack([self.networks.init(generator) for generator in generators])
        meta_params = stack([self.network.init(generator) for generator in generators])
        state = {
            "params": params,
            "optimizer": self.optimizer.init(params),
            "meta_params": meta_params,
            "meta_optimizer": META_OPTIMIZER.init(meta_params),
            "window": {},
            "starts": {},
            "counters": self.counters(seeds),
        }
        if self.config.outer_critic:
            critic = stack([self.new_critic(generator) for generator in generators])
            state |= {"critic": critic, "critic_optimizer": CRITIC_OPTIMIZER.init(critic)}
        return state | self.first_statistics(len(seeds))

    def update(self, state: State, batch: Trajectory) -> tuple[State, Params]:
        """One inner update on the newest batch; where it closes a window, the outer one before."""
        raw, batch = batch, self.prepared(batch, state)
        window, starts = saved_window(state["window"]), saved_starts(state["starts"])
        num_inner_updates = self.config.num_inner_updates
        groups: State = {}
        metrics: Params = {}
        if len(window) == num_inner_updates + self.config.num_outcome_batches - 1:
            groups, metrics = self.outer_update(state, window, batch)
            window, starts = window[num_inner_updates:], starts[1:]
        if self.config.outer_critic:
            groups |= self.critic_update(state, batch)
        meta_params = groups.get("meta_params", state["meta_params"])
        params, slots = state["params"], state["optimizer"]
        if len(window) % num_inner_updates == 0:
            starts = [*starts, (params, slots)]
        lr = self.inner_lr(state, 0)
        params, slots, inner = self.inner_step(params, slots, meta_params, batch, lr)
        groups |= {"params": params, "optimizer": slots}
        groups["window"] = numbered([vars(kept) for kept in [*window, batch]])
        groups["starts"] = numbered(
            [prefixed(p, "params.") | prefixed(s, "optimizer.") for p, s in starts]
        )
        return self.updated(state, raw, groups), inner | metrics

    def describe(self, state: State, batch: Trajectory) -> dict[str, Tensor]:
        """What the first replica's target says of a batch, and what it depends on.

        Returns:
            "target", "vtrace" [T·E]: g and V-trace's target of every step;
            "sensitivity" [I]: mean |∂(Σ g)/∂input| over steps, by `target_network.INPUTS`.
        """
        first = {group: first_member(entries) for group, entries in state.items()}
        batch = self.prepared(batch.members(0, 1), first)
        view = self.view(first["params"], batch)
        inputs = self.inputs(view, batch).requires_grad_()
        learned = self.network(first["meta_params"], inputs, batch.ended)
        (slopes,) = torch.autograd.grad(learned.sum(), inputs)
        canonical, _ = self.vtrace(view, batch)
        target = self.target(first["meta_params"], view, batch)
        return {
            "target": target.detach().flatten(),
            "vtrace": canonical.flatten(),
            "sensitivity": slopes.abs().mean((0, 1, 2)),
        }

    # --- The inner update ---

    def view(self, params: Params, batch: Trajectory) -> View:
        """Policy and value at every step; gradient flows to `params`."""
        data = rollout(batch, {})
        dist, value = self.networks(params, data.obs)
        log_prob = dist.log_prob(data.action).view_as(batch.reward)
        if self.spec.target_policy is not None:
            log_prob = batch.reward.new_tensor(self.spec.target_policy).log()[batch.action]
        value = value.view_as(batch.reward)
        following = self.next_values(params, value, batch)
        return View(log_prob, dist.entropy().mean(1), value, following)

    def next_values(self, params: Params, value: Tensor, batch: Trajectory) -> Tensor:
        """V(s_{t+1}) of the networks of `params`, given their V(s_t), [M, T, E]."""
        return next_values(lambda obs: self.networks.value(params, obs), value, batch, {})

    def target(self, meta_params: Params, view: View, batch: Trajectory) -> Tensor:
        """The learned target g of every step, [M, T, E]; gradient flows to η and to the view."""
        learned = self.network(meta_params, self.inputs(view, batch), batch.ended)
        if not self.config.residual:
            return learned
        canonical, _ = self.vtrace(view, batch)
        if self.config.residual_gain:
            gain = (MAX_LOG_GAIN * torch.tanh(learned / MAX_LOG_GAIN)).exp()
            return view.value + gain * (canonical - view.value)
        return learned + canonical

    def inputs(self, view: View, batch: Trajectory) -> Tensor:
        """What the target network sees, [M, T, E, I]; gradient flows to the view."""
        discount = self.config.gamma * (~batch.terminated).to(batch.reward.dtype)
        return self.network.gather(
            batch.reward, discount, view.value, view.next_value, view.log_prob, batch.log_prob
        )

    def direction(
        self, params: Params, view: View, target: Tensor, *, create_graph: bool
    ) -> Params:
        """−d at θ, with gradient to θ, and to η through the target, if a graph is wanted."""
        c = self.config
        error = (target - view.value) / target[0].numel()
        if self.spec.target_policy is not None:
            return gradients(view.value, params, [-error], create_graph=create_graph)
        outputs, seeds = [view.log_prob, view.value], [-error, -c.value_coef * error]
        if c.entropy_coef > 0.0:
            outputs.append(view.entropy)
            seeds.append(torch.full_like(view.entropy, -c.entropy_coef))
        return gradients(outputs, params, seeds, create_graph=create_graph)

    def inner_update_of(
        self,
        params: Params,
        slots: Params,
        meta_params: Params,
        batch: Trajectory,
        lr: float,
        *,
        create_graph: bool,
    ) -> tuple[Params, Params, View, Tensor, Tensor]:
        """θ_k+1 and its slots; what θ_k made of the batch, the targets, and the norm of d [M]."""
        view = self.view(params, batch)
        target = self.target(meta_params, view, batch)
        grads = self.direction(params, view, target, create_graph=create_graph)
        clipped, norm = clip_by_norm(grads, self.config.max_grad_norm)
        new, slots = self.optimizer.update(params, clipped, slots, lr)
        return new, slots, view, target, norm

    def inner_step(
        self, params: Params, slots: Params, meta_params: Params, batch: Trajectory, lr: float
    ) -> tuple[Params, Params, Params]:
        """An inner update without a graph, and what there is to say of it."""
        leaf = leaves(params)
        new, slots, view, target, norm = self.inner_update_of(
            leaf, slots, meta_params, batch, lr, create_graph=False
        )
        with torch.no_grad():
            canonical, _ = self.vtrace(view, batch)
            difference = target - canonical
            metrics = {
                "inner/grad_norm": norm,
                "inner/entropy": view.entropy,
                "frodo/target_mean": target,
                "frodo/target_minus_vtrace": difference,
                "frodo/target_distance": difference.abs(),
            }
            errors = value_errors(view.value, batch)
        return detach(new), detach(slots), each(metrics) | errors

    # --- The outer update ---

    def outer_update(
        self, state: State, window: Sequence[Trajectory], query: Trajectory
    ) -> tuple[State, Params]:
        """η after K batches, those after the next, and the newest."""
        c = self.config
        meta_params = leaves(state["meta_params"])
        support = window[: c.num_inner_updates]
        outcome = joined([*window[c.num_inner_updates :], query])
        start = saved_starts(state["starts"])[0]
        adapted = self.unroll(state, meta_params, start, support, len(window))
        view = self.view(adapted, outcome)
        target, advantage = self.outer_targets(view, state, outcome)
        loss = self.outer_loss(view, target, advantage)
        consistency = self.consistency(meta_params, view, outcome)
        total = loss + c.consistency_coef * consistency
        grads = gradients(total.sum(), meta_params)
        grads, norm = clip_by_norm(grads, c.max_grad_norm)
        new, slots = META_OPTIMIZER.update(
            detach(meta_params), grads, state["meta_optimizer"], c.meta_lr
        )
        parts = {"meta/loss": loss, "meta/grad_norm": norm, "frodo/consistency_loss": consistency}
        return {"meta_params": new, "meta_optimizer": slots}, each(parts)

    def unroll(
        self,
        state: State,
        meta_params: Params,
        start: tuple[Params, Params],
        support: Sequence[Trajectory],
        age: int,
    ) -> Params:
        """θ_K as a function of η.

        Args:
            state: the present one.
            meta_params: η.
            start: θ_0 and its slots.
            support: τ_0 … τ_K−1.
            age: updates from θ_0 to the present.
        """
        params, slots = leaves(start[0]), start[1]
        for k, batch in enumerate(support):
            lr = self.inner_lr(state, k - age)
            params, slots, *_ = self.inner_update_of(
                params, slots, meta_params, batch, lr, create_graph=True
            )
        return params

    def outer_targets(self, view: View, state: State, batch: Trajectory) -> tuple[Tensor, Tensor]:
        """V-trace's targets and advantages for the outer loss, [M, T, E], without gradient."""
        with torch.no_grad():
            if self.config.outer_critic:
                view = self.rated(view, state["critic"], batch)
            return self.vtrace(view, batch)

    def outer_loss(self, view: View, target: Tensor, advantage: Tensor) -> Tensor:
        """Loss of each replica [M] at θ_K, on τ_K; targets and advantages are constants."""
        c = self.config
        error = view.value - target
        if self.spec.target_policy is not None:
            return 0.5 * error.square().mean((1, 2))
        value_loss = 0.5 * error[:, : c.num_steps].square().mean((1, 2))
        policy_loss = -(advantage * view.log_prob)[:, : c.num_steps].mean((1, 2))
        return policy_loss + c.outer_value_coef * value_loss - c.outer_entropy_coef * view.entropy

    def consistency(self, meta_params: Params, view: View, batch: Trajectory) -> Tensor:
        """Mean of (g_t − sg(r_t + γ g_t+1))² over steps with a successor, [M]; gradient to η."""
        view = View(*(tensor.detach() for tensor in vars(view).values()))
        target = self.target(meta_params, view, batch)
        successor = torch.cat([target.detach()[:, 1:], target.new_zeros(target[:, :1].shape)], 1)
        over = batch.ended
        aim = batch.reward + self.config.gamma * successor * (1.0 - over)
        known = torch.ones_like(over)
        known[:, -1] = 0.0
        # A time limit cuts a chunk as its end does; after a termination the return is known.
        known = torch.where(batch.truncated, 0.0, known).where(~batch.terminated, 1.0)
        error = (target - aim).square() * known
        return error.sum((1, 2)) / known.sum((1, 2)).clamp_min(1.0)

    # --- The outer critic ---

    def new_critic(self, generator: torch.Generator) -> Params:
        """V_out of one replica: a value like the agent's; on pixels with a trunk of its own."""
        params = self.networks.init(generator)
        return params if self.spec.image is not None else prefixed(part(params, VALUE), VALUE)

    def rated(self, view: View, critic: Params, batch: Trajectory) -> View:
        """The same policy with the critic's values."""
        value = self.networks.value(critic, batch.obs.flatten(1, 2)).view_as(view.value)
        following = self.next_values(critic, value, batch)
        return View(view.log_prob, view.entropy, value, following)

    def critic_update(self, state: State, batch: Trajectory) -> State:
        """V_out after a step towards V-trace's targets, which its own values bootstrap."""
        c = self.config
        with torch.no_grad():
            view = self.view(state["params"], batch)
        critic = leaves(state["critic"])
        rated = self.rated(view, critic, batch)
        with torch.no_grad():
            target, _ = self.vtrace(rated, batch)
        loss = 0.5 * (rated.value - target).square().mean((1, 2))
        grads, _ = clip_by_norm(gradients(loss.sum(), critic), c.max_grad_norm)
        new, slots = CRITIC_OPTIMIZER.update(
            detach(critic), grads, state["critic_optimizer"], c.critic_lr
        )
        return {"critic": new, "critic_optimizer": slots}

    # --- Parts ---

    def inner_lr(self, state: State, offset: int) -> float:
        """α of the update that is `offset` updates after the present one."""
        c = self.config
        count = int(state["counters"]["num_updates"][0])
        return decayed(c.lr, count + offset, c.lr_decay_updates)

    def vtrace(self, view: View, batch: Trajectory) -> tuple[Tensor, Tensor]:
        """V-trace's targets and advantages of a view, [M, T, E]."""
        c = self.config
        return vtrace(
            batch.reward,
            view.value,
            view.next_value,
            batch.ended,
            view.log_prob - batch.log_prob,
            c.gamma,
            c.max_rho,
        )

    def prepared(self, batch: Trajectory, state: State) -> Trajectory:
        """The batch with observations as the policy that acted saw them, and nothing needless."""
        statistics = self.statistics(state)

        def seen(obs: Tensor) -> Tensor:
            return normalize_obs(statistics, obs.flatten(1, -2)).view(obs.shape)

        fields = dict(vars(batch))
        fields |= {name: seen(fields[name]) for name in ("obs", "last_obs")}
        if batch.final_obs.shape[1]:
            fields["final_obs"] = seen(batch.final_obs)
        return Trajectory(**fields)


def numbered(several: Sequence[Params]) -> Params:
    """Named tensors of several moments, each under its number."""
    return {f"{k}.{name}": t for k, entries in enumerate(several) for name, t in entries.items()}


def listed(entries: Params) -> list[Params]:
    """The inverse of `numbered`."""
    numbers = sorted({int(name.split(".")[0]) for name in entries})
    return [part(entries, f"{number}.") for number in numbers]


def saved_window(entries: Params) -> list[Trajectory]:
    """The batches of the group "window"."""
    return [Trajectory(**fields) for fields in listed(entries)]


def saved_starts(entries: Params) -> list[tuple[Params, Params]]:
    """Parameters and slots of the group "starts"."""
    return [(part(own, "params."), part(own, "optimizer.")) for own in listed(entries)]


def joined(batches: Sequence[Trajectory]) -> Trajectory:
    """Consecutive chunks of a stream as one."""
    if len(batches) == 1:
        return batches[0]
    cut = any(bool(batch.truncated.any()) for batch in batches)

    def final_obs(batch: Trajectory) -> Tensor:
        return batch.final_obs if batch.final_obs.shape[1] == batch.obs.shape[1] else batch.obs

    fields = {
        name: torch.cat([getattr(batch, name) for batch in batches], 1)
        for name in vars(batches[0])
        if name not in ("last_obs", "final_obs")
    }
    fields["last_obs"] = batches[-1].last_obs
    fields["final_obs"] = batches[-1].final_obs
    if cut:
        # Where a chunk has none, what stands in is never looked at: no time limit ended there.
        fields["final_obs"] = torch.cat([final_obs(batch) for batch in batches], 1)
    return Trajectory(**fields)

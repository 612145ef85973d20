"""Collection: one request for one slot gives one chunk, of whole episodes or of a stream.

A slot is a block of members × a block of environments; its size is part of the experiment and not
of the machine, so that the data do not depend on how many workers there are. All randomness of a
chunk comes from its two seeds, so that any worker can collect it, and collect it again.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from gymnasium.vector import VectorEnv

from actors.family import Task, TaskFamily
from actors.tasks.checks import check_returned, step_fields
from learners.core.blocks import block_bounds, group_bounds
from learners.core.normalizer import REWARD_STD
from learners.core.params import unflatten_members
from learners.core.policy import Policy
from learners.core.population import LifetimePolicy, Population
from learners.core.trajectory import Params, Spec

Arrays = dict[str, np.ndarray]

NOISE_STEPS = 64
"""Steps whose noise is drawn ahead."""


@dataclass(frozen=True)
class Slot:
    """Members `members[0]` ≤ m < `members[1]` in environments `envs[0]` ≤ e < `envs[1]`."""

    id: int
    members: tuple[int, int]
    envs: tuple[int, int]

    @property
    def num_members(self) -> int:
        """Members of this slot."""
        return self.members[1] - self.members[0]

    @property
    def num_envs(self) -> int:
        """Environments of each of its members."""
        return self.envs[1] - self.envs[0]


def make_slots(
    num_members: int,
    num_envs: int,
    members_per_slot: int,
    envs_per_slot: int,
    num_worlds: int = 1,
) -> list[Slot]:
    """Cuts M members × E environments into slots, environments fastest; none has two worlds."""
    bounds = [
        ((first + a, first + b), envs)
        for first, last in group_bounds(num_members, num_worlds)
        for a, b in block_bounds(last - first, members_per_slot)
        for envs in block_bounds(num_envs, envs_per_slot)
    ]
    return [Slot(i, members, envs) for i, (members, envs) in enumerate(bounds)]


@dataclass(frozen=True)
class Carry:
    """Where a chunk stopped: with it any worker continues as if it had not.

    Attributes:
        env: state of the environments, from their `state()`; empty where they have none.
        noise: state of the generator of action noise, uint8.
        obs: the observation to act on next, [n, O].
        ended: environments whose episode is over, [n] bool.
        episode_return: raw return of the running episodes, [n].
        num_steps: steps since the start of the episodes, [n].
        discounted_return: Σ γ^i r_{t−i} of the running episodes, [n].
        pending_reward: rewards that were earned and not yet paid out, [n].
        ticket: which live environments stopped here: process and number of the chunk.
    """

    env: Arrays
    noise: np.ndarray
    obs: np.ndarray
    ended: np.ndarray
    episode_return: np.ndarray
    num_steps: np.ndarray
    discounted_return: np.ndarray
    pending_reward: np.ndarray
    ticket: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Request:
    """What a worker is asked for.

    Attributes:
        slot: which members and environments.
        tasks: one task per member of the slot.
        seeds: of the environments and of the action noise.
        version: of the parameters that must act, or None for the newest.
        num_steps: T; the horizon for whole episodes.
        stream: whether new episodes follow where one ends; otherwise the chunk is whole episodes.
        keep_data: whether the chunk is wanted, and not its receipt alone.
        stagger: whether a new stream begins in the middle of episodes.
        renew: members, counted within the slot, whose stream begins anew with their task.
    """

    slot: Slot
    tasks: tuple[Task, ...]
    seeds: tuple[int, int]
    version: int | None
    num_steps: int
    stream: bool = False
    keep_data: bool = True
    stagger: bool = False
    renew: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A slot's part of a trajectory, as contiguous arrays named like `Trajectory`'s fields."""

    slot: Slot
    version: int
    tasks: tuple[Task, ...]
    arrays: Arrays


@dataclass(frozen=True)
class Receipt:
    """What the driver learns of a chunk without touching it.

    Attributes:
        slot_id: which slot.
        version: of the parameters that acted.
        num_steps: valid environment steps.
        returns: raw returns of the episodes that ended, in the order of time, per member.
        lengths: their lengths in steps, likewise.
        seconds: time that the worker spent.
        worker: process id of the worker.
        num_bytes: size of the chunk.
        host: name of the worker's machine.
        own_mb: resident memory of the worker, without what it shares, in MiB.
    """

    slot_id: int
    version: int
    num_steps: int
    returns: list[list[float]]
    lengths: list[list[float]]
    seconds: float
    worker: int
    num_bytes: int
    host: str
    own_mb: float


class RolloutWorker:
    """Collects chunks; keeps environments for the next request.

    A stream keeps the environments of its slot, and goes on with them where the carry is the one
    that they stopped at; other carries restore them, or, where their state cannot be saved, start
    new episodes.
    """

    def __init__(self, family: TaskFamily, policy: Policy | Population) -> None:
        self.family = family
        self.policies: Callable[[int], Policy | LifetimePolicy] = (
            policy.policy_of if isinstance(policy, Population) else lambda world: policy
        )
        self.templates: dict[int, Params] = {}
        self.envs: dict[tuple[str, int], VectorEnv] = {}
        self.tickets: dict[int, tuple[int, int]] = {}
        self.num_chunks = 0

    def collect(
        self, request: Request, flat_params: np.ndarray, version: int, carry: Carry | None = None
    ) -> tuple[Chunk, Receipt, Carry | None]:
        """Runs the slot's members for T steps on one thread.

        Args:
            request: what to collect.
            flat_params: the slot's members' parameters, [m, P].
            version: of these parameters.
            carry: where to continue a stream; without it episodes start.
        """
        begin = time.perf_counter()
        torch.set_num_threads(1)
        slot = request.slot
        num_envs = slot.num_members * slot.num_envs
        key = ("slot", slot.id) if request.stream else ("size", num_envs)
        env = self.envs.get(key)
        if env is None or env.num_envs != num_envs:
            env = self.envs[key] = self.family.make(num_envs)
        # An array from the object store is read-only; these parameters are never written to.
        matrix = torch.tensor(flat_params)
        world = int(request.tasks[0].get("world", 0))  # type: ignore[arg-type]
        policy = self.policies(world)
        if world not in self.templates:
            self.templates[world] = policy.template()
        params = unflatten_members(matrix, self.templates[world])
        live = carry is not None and self.tickets.get(slot.id) == carry.ticket
        with torch.inference_mode():
            carry = begin_chunk(env, policy.spec, request, carry, live)
            chunk, carry_out = roll_out(env, policy, params, request, carry, version)
        if request.stream:
            self.num_chunks += 1
            ticket = self.tickets[slot.id] = (os.getpid(), self.num_chunks)
            carry_out = replace(carry_out, ticket=ticket)
        said = receipt(chunk, time.perf_counter() - begin)
        if not request.keep_data:
            chunk = replace(chunk, arrays={})
        return chunk, said, carry_out if request.stream else None


def begin_chunk(
    env: VectorEnv, spec: Spec, request: Request, carry: Carry | None, live: bool
) -> Carry:
    """Puts the environments where the chunk begins, and says where that is."""
    if carry is not None and (live or carry.env):
        if not live:
            env.restore(carry.env)  # type: ignore[attr-defined]
        return renew(env, spec, request, carry) if request.renew else carry
    tasks = spread(request.tasks, request.slot.num_envs)
    obs = reset(env, spec, seed=request.seeds[0], options={"tasks": tasks})
    zeros = np.zeros(env.num_envs, np.float32)
    carry = Carry(
        env={},
        noise=torch.Generator().manual_seed(request.seeds[1]).get_state().numpy(),
        obs=obs,
        ended=np.zeros(env.num_envs, bool),
        episode_return=zeros,
        num_steps=np.zeros(env.num_envs, np.int64),
        discounted_return=zeros,
        pending_reward=zeros,
    )
    return stagger(env, spec, carry, request.seeds[1]) if request.stagger else carry


def reset(env: VectorEnv, spec: Spec, **options: Any) -> np.ndarray:
    """The observations of a reset, [n, O], once they are found to be such."""
    obs = np.asarray(env.reset(**options)[0])
    check_returned(env, "reset", step_fields(spec, env.num_envs)[:1], (obs,))
    return obs


def renew(env: VectorEnv, spec: Spec, request: Request, carry: Carry) -> Carry:
    """Begins the streams of some members anew, with their tasks; the others go on."""
    members = np.zeros(request.slot.num_members, bool)
    members[list(request.renew)] = True
    mask = members.repeat(request.slot.num_envs)
    tasks = spread(request.tasks, request.slot.num_envs)
    obs = reset(env, spec, options={"tasks": tasks, "reset_mask": mask})
    kept = ("ended", "episode_return", "num_steps", "discounted_return", "pending_reward")
    blank = {name: np.where(mask, 0, getattr(carry, name)) for name in kept}
    blank = {name: array.astype(getattr(carry, name).dtype) for name, array in blank.items()}
    return replace(carry, obs=obs.copy(), **blank)  # type: ignore[arg-type]


def stagger(env: VectorEnv, spec: Spec, carry: Carry, seed: int) -> Carry:
    """Takes every environment some random steps into an episode, at most to the horizon.

    Where episodes have one length, environments that begin together end together for ever, and a
    chunk holds the same part of every episode.
    """
    rng, shape = np.random.default_rng(seed), (env.num_envs,)
    begins = rng.integers(spec.horizon, size=shape)
    fields = step_fields(spec, env.num_envs)
    obs, total, lengths = carry.obs, carry.episode_return.copy(), carry.num_steps.copy()
    for t in range(1, spec.horizon):
        action = (
            rng.integers(spec.action_size, size=shape)
            if spec.discrete
            else rng.uniform(-1.0, 1.0, (*shape, spec.action_size)).astype(np.float32)
        )
        *stepped, info = env.step(torch.from_numpy(action))
        came = tuple(map(np.asarray, stepped))
        check_returned(env, "step", fields, came)
        obs, reward, terminated, truncated = came
        total, lengths = total + reward, lengths + 1
        again = terminated | truncated | (begins == t)
        if again.any():
            obs = reset(env, spec, options={"reset_mask": again})
        over = again | info.get("episode_over", again)
        total[over], lengths[over] = 0.0, 0
    return replace(carry, obs=obs.copy(), episode_return=total, num_steps=lengths)


def roll_out(
    env: VectorEnv,
    policy: Policy | LifetimePolicy,
    params: Params,
    request: Request,
    carry: Carry,
    version: int,
) -> tuple[Chunk, Carry]:
    """T steps of every environment, from where `carry` stands.

    In a stream an environment whose episode ends is reset at once. Otherwise the steps after an
    episode's end are zeros and not valid.
    """
    slot, num_steps = request.slot, request.num_steps
    m, e = slot.num_members, slot.num_envs
    generator = torch.Generator()
    generator.set_state(torch.tensor(carry.noise))
    obs, live = carry.obs, ~carry.ended
    running_return, lengths = carry.episode_return.copy(), carry.num_steps.copy()
    out, fields = allocate(policy, request, obs), step_fields(policy.spec, env.num_envs)
    act = policy.acting(params)
    outputs: list[torch.Tensor] = []
    for t, noise in enumerate(step_noise(policy, (m, e), generator, num_steps)):
        action, output = act(torch.from_numpy(obs).view(m, e, -1), noise)
        action = action.flatten(0, 1)
        *stepped, info = env.step(action)
        came = tuple(map(np.asarray, stepped))
        check_returned(env, "step", fields, came)
        next_obs, reward, terminated, truncated = came
        # Both also count, to no effect, where an episode is over.
        running_return += info.get("raw_reward", reward)
        lengths += 1
        out["valid"][t] = live
        out["reward"][t], out["terminated"][t], out["truncated"][t] = reward, terminated, truncated
        if request.keep_data:
            out["obs"][t], out["action"][t] = obs, action.numpy()
            outputs.append(output)
        if len(out["true_value"]):
            out["true_value"][t] = info["true_value"]
        if not request.stream and not live.all():
            blank(out, t, ~live)
            next_obs = np.where(live[:, None], next_obs, obs)
        over, obs = (terminated | truncated) & live, next_obs
        game_over = over & info.get("game_over", over)
        # In a trial, episodes end that are reported and the trial goes on.
        reported = live & info.get("episode_over", game_over)
        if not np.count_nonzero(over | reported):
            continue
        note_ends(out, t, reported, running_return, lengths)
        if len(out["final_obs"]):
            out["final_obs"][t][truncated] = obs[truncated]
        # Whole episodes: a life lost is not the end of what is reported, and the game goes on.
        again = over if request.stream else over & ~game_over
        if again.any():
            obs = reset(env, policy.spec, options={"reset_mask": again})
        live &= ~game_over | request.stream
        if not live.any():
            break
    discounted, pending = shape_rewards(out, policy, params, request, carry)
    stop = Carry(
        env=env.state() if request.stream and hasattr(env, "state") else {},
        noise=generator.get_state().numpy(),
        obs=obs.copy(),
        ended=~live,
        episode_return=running_return,
        num_steps=lengths,
        discounted_return=discounted,
        pending_reward=pending,
    )
    arrays = {name: by_member(array, m, e) for name, array in out.items()}
    if request.keep_data:
        arrays["last_obs"] = obs.reshape(m, e, -1).copy()
        arrays["log_prob"] = log_probs(policy, params, outputs, arrays)
    return Chunk(slot, version, request.tasks, arrays), stop


def step_noise(
    policy: Policy | LifetimePolicy,
    shape: tuple[int, int],
    generator: torch.Generator,
    num_steps: int,
) -> Iterator[torch.Tensor]:
    """The noise of each step, drawn for some steps ahead: that is faster than between others' work.

    Still one draw for each step: what a generator gives depends on how much is asked for at once.
    """
    for begin, end in block_bounds(num_steps, NOISE_STEPS):
        yield from [policy.noise(shape, generator) for _ in range(begin, end)]


def spread(tasks: Sequence[Task], num_envs: int) -> list[Task]:
    """One task per environment: each member's own, `num_envs` times."""
    return [task for task in tasks for _ in range(num_envs)]


def allocate(policy: Policy | LifetimePolicy, request: Request, obs: np.ndarray) -> Arrays:
    """Zeroed storage for a chunk, time-major, [T, n, …]; only small fields where that is enough."""
    spec = policy.spec
    shape = (request.num_steps, len(obs))
    kept = shape if request.keep_data else (0, len(obs))
    streamed = kept if request.stream else (0, len(obs))
    action_size = () if spec.discrete else (spec.action_size,)
    floats = ("reward", "valid", "episode_return", "episode_length")
    return (
        {name: np.zeros(shape, np.float32) for name in floats}
        | {name: np.zeros(shape, bool) for name in ("terminated", "truncated", "episode_end")}
        | {
            "obs": np.zeros((*kept, spec.obs_size), obs.dtype),
            "action": np.zeros((*kept, *action_size), np.int64 if spec.discrete else np.float32),
            "final_obs": np.zeros((*streamed, spec.obs_size), obs.dtype),
            "discounted_return": np.zeros(streamed, np.float32),
            "true_value": np.zeros(kept if spec.target_policy else (0, len(obs)), np.float32),
        }
    )


def note_ends(
    out: Arrays, t: int, over: np.ndarray, running_return: np.ndarray, lengths: np.ndarray
) -> None:
    """Writes return and length of the episodes that step t ended, and begins to count anew."""
    out["episode_end"][t] = over
    out["episode_return"][t] = np.where(over, running_return, 0.0)
    out["episode_length"][t] = lengths * over
    running_return[over] = 0.0
    lengths[over] = 0


def blank(out: Arrays, t: int, ended: np.ndarray) -> None:
    """Makes step t of the environments that had ended before it zeros."""
    for name in ("obs", "action", "reward", "terminated", "truncated"):
        if len(out[name]) > t:
            out[name][t][ended] = 0


def shape_rewards(
    out: Arrays, policy: Policy | LifetimePolicy, params: Params, request: Request, carry: Carry
) -> tuple[np.ndarray, np.ndarray]:
    """Makes of raw rewards what is learned from: normalized first, then delayed.

    Each reward is divided by the frozen deviation of the running discounted return, clipped, and
    added to what is pending; the sum is paid out every `reward_delay` steps of an episode and at
    its end (Zheng, Oh and Singh 2018, the authors' implementation).

    Returns:
        The running discounted returns and the pending rewards after the chunk, [n].
    """
    normalizer, delay = policy.normalizer, policy.spec.reward_delay
    discounted, pending = carry.discounted_return.copy(), carry.pending_reward.copy()
    scaled = normalizer is not None and normalizer.reward
    if not request.stream or not request.keep_data or not (scaled or delay > 1):
        return discounted, pending
    reward, over = out["reward"], out["terminated"] | out["truncated"]
    if normalizer is not None and scaled:
        for t, ends in enumerate(np.logical_or.reduce(over, 1).tolist()):
            discounted *= normalizer.gamma
            discounted += reward[t]
            out["discounted_return"][t] = discounted
            if ends:
                discounted[over[t]] = 0.0
        std = params[REWARD_STD].repeat(1, request.slot.num_envs).view(-1).numpy()
        np.clip(reward / std, -normalizer.clip, normalizer.clip, out=reward)
    if delay > 1:
        paid = over | (steps_of_episodes(over, carry.num_steps) % delay == 0)
        for t, pays in enumerate(np.logical_or.reduce(paid, 1).tolist()):
            pending += reward[t]
            np.multiply(pending, paid[t], out=reward[t])
            if pays:
                pending[paid[t]] = 0.0
    return discounted, pending


def steps_of_episodes(over: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Steps since the start of the episode, step t counted, [T, n].

    Args:
        over: whether an episode ends with step t, [T, n].
        before: steps before the first, [n].
    """
    time = np.arange(1, len(over) + 1)[:, None]
    starts = np.concatenate((-before[None], np.where(over, time, -before)[:-1]))
    return time - np.maximum.accumulate(starts)


def by_member(array: np.ndarray, m: int, e: int) -> np.ndarray:
    """[T, m·e, …] → contiguous [m, T, e, …]."""
    num_steps, _, *rest = array.shape
    return np.ascontiguousarray(array.reshape(num_steps, m, e, *rest).swapaxes(0, 1))


def log_probs(
    policy: Policy | LifetimePolicy, params: Params, outputs: list[torch.Tensor], arrays: Arrays
) -> np.ndarray:
    """Log-probability of every valid action, [m, T, e], 0 in padding.

    Args:
        policy: what acted.
        params: with which parameters.
        outputs: of its network, [m, e, A] at each step until all episodes were over.
        arrays: the chunk.
    """
    action, valid = torch.from_numpy(arrays["action"]), torch.from_numpy(arrays["valid"])
    padding = [torch.zeros_like(outputs[0])] * (valid.shape[1] - len(outputs))
    dist = policy.from_outputs(params, torch.stack(outputs + padding, 1).flatten(1, 2))
    log_prob = dist.log_prob(action.flatten(1, 2)).view_as(valid)
    array: np.ndarray = log_prob.where(valid > 0, 0.0).numpy()
    return array


def receipt(chunk: Chunk, seconds: float) -> Receipt:
    """Summarises a chunk, whose `episode_end` it takes out."""
    a = chunk.arrays
    over = a.pop("episode_end")
    return Receipt(
        slot_id=chunk.slot.id,
        version=chunk.version,
        num_steps=int(a["valid"].sum()),
        returns=[r[end].tolist() for r, end in zip(a["episode_return"], over, strict=True)],
        lengths=[n[end].tolist() for n, end in zip(a["episode_length"], over, strict=True)],
        seconds=seconds,
        worker=os.getpid(),
        num_bytes=sum(array.nbytes for array in a.values()),
        host=platform.node(),
        own_mb=own_memory_mb(),
    )


def own_memory_mb() -> float:
    """Resident memory of this process in MiB, without pages that it shares, as of a Ray store."""
    found = psutil.Process().memory_info()
    return float(found.rss - getattr(found, "shared", 0)) / 2**20

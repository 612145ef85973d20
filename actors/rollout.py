"""Collection: one request for one slot gives one chunk.

A slot is a block of members × a block of environments; its size is part of the experiment and not
of the machine, so that the data do not depend on how many workers there are. All randomness of a
chunk comes from its two seeds, so that any worker can collect it, and collect it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from actors.family import Task, TaskFamily
from learners.core.blocks import block_bounds
from learners.core.params import unflatten_members
from learners.core.policy import Policy

Arrays = dict[str, np.ndarray]


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
    num_members: int, num_envs: int, members_per_slot: int, envs_per_slot: int
) -> list[Slot]:
    """Cuts M members × E environments into slots, environments fastest."""
    bounds = [
        (members, envs)
        for members in block_bounds(num_members, members_per_slot)
        for envs in block_bounds(num_envs, envs_per_slot)
    ]
    return [Slot(i, members, envs) for i, (members, envs) in enumerate(bounds)]


@dataclass(frozen=True)
class Carry:
    """Where a chunk stopped: with it any worker continues as if it had not.

    Attributes:
        env: state of the environments, from their `state()`.
        noise: state of the generator of action noise, uint8.
        obs: the observation to act on next, [n, O].
        ended: environments whose episode is over, [n] bool.
        episode_return: raw return of the running episodes, [n].
        num_steps: steps since the start of the episodes.
    """

    env: Arrays
    noise: np.ndarray
    obs: np.ndarray
    ended: np.ndarray
    episode_return: np.ndarray
    num_steps: int


@dataclass(frozen=True)
class Request:
    """What a worker is asked for.

    Attributes:
        slot: which members and environments.
        tasks: one task per member of the slot.
        seeds: of the environments and of the action noise.
        version: of the parameters that must act.
        num_steps: T; the horizon for whole episodes.
        carry: where to continue, or None to start episodes.
        keep_carry: whether the chunk shall bring its own.
    """

    slot: Slot
    tasks: tuple[Task, ...]
    seeds: tuple[int, int]
    version: int
    num_steps: int
    carry: Carry | None = None
    keep_carry: bool = False


@dataclass(frozen=True)
class Chunk:
    """A slot's part of a trajectory, as contiguous arrays named like `Trajectory`'s fields."""

    slot: Slot
    version: int
    tasks: tuple[Task, ...]
    arrays: Arrays
    carry: Carry | None


@dataclass(frozen=True)
class Receipt:
    """What the driver learns of a chunk without touching it.

    Attributes:
        slot_id: which slot.
        num_steps: valid environment steps.
        return_sum: sum of the raw returns of ended episodes, per member.
        length_sum: sum of their lengths in steps, per member.
        num_episodes: their number, per member.
        seconds: time that the worker spent.
        worker: process id of the worker.
        num_bytes: size of the chunk.
    """

    slot_id: int
    num_steps: int
    return_sum: list[float]
    length_sum: list[float]
    num_episodes: list[int]
    seconds: float
    worker: int
    num_bytes: int


class RolloutWorker:
    """Collects chunks; keeps environments of each size for the next request."""

    def __init__(self, family: TaskFamily, policy: Policy) -> None:
        self.family = family
        self.policy = policy
        self.template = policy.init(torch.Generator())
        self.envs: dict[int, VectorEnv] = {}

    def collect(self, request: Request, flat_params: np.ndarray) -> tuple[Chunk, Receipt]:
        """Runs the slot's members for T steps on one thread.

        Args:
            request: what to collect.
            flat_params: the slot's members' parameters, [m, P].
        """
        begin = time.perf_counter()
        torch.set_num_threads(1)
        slot = request.slot
        num_envs = slot.num_members * slot.num_envs
        if num_envs not in self.envs:
            self.envs[num_envs] = self.family.make(num_envs)
        # An array from the object store is read-only; these parameters are never written to.
        matrix = torch.tensor(flat_params)
        params = unflatten_members(matrix, self.template)
        with torch.inference_mode():
            chunk = roll_out(self.envs[num_envs], self.policy, params, request)
        return chunk, receipt(chunk, time.perf_counter() - begin)


def roll_out(
    env: VectorEnv, policy: Policy, params: Mapping[str, Tensor], request: Request
) -> Chunk:
    """T steps of every environment; steps after an episode's end are zeros and not valid."""
    slot, num_steps = request.slot, request.num_steps
    m, e = slot.num_members, slot.num_envs
    generator = torch.Generator().manual_seed(request.seeds[1])
    carry = request.carry or start(env, request, m * e)
    if request.carry is not None:
        env.reset(seed=request.seeds[0], options={"tasks": spread(request.tasks, e)})
        env.restore(carry.env)  # type: ignore[attr-defined]
    if carry.noise.size:
        generator.set_state(torch.tensor(carry.noise))
    obs = torch.as_tensor(carry.obs)
    ended, running_return = carry.ended.copy(), carry.episode_return.copy()
    out = allocate(policy, num_steps, m * e)
    for t in range(num_steps):
        dist = policy.distribution(dict(params), obs.view(m, e, -1))
        # Drawn step by step: what a generator gives depends on how much is asked for at once.
        action = dist.sample(policy.noise((m, e), generator))
        out["log_prob"][t] = dist.log_prob(action).view(-1)
        out["obs"][t] = obs
        out["action"][t] = action = action.flatten(0, 1)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        obs = torch.where(torch.as_tensor(ended)[:, None], obs, torch.as_tensor(next_obs))
        running_return += np.asarray(reward) * ~ended
        record(out, t, reward, terminated, truncated, ended, running_return, carry.num_steps)
        ended = ended | np.asarray(terminated) | np.asarray(truncated)
        if ended.all():
            break
    carry_out = None
    if request.keep_carry:
        carry_out = Carry(
            env.state(),  # type: ignore[attr-defined]
            generator.get_state().numpy().copy(),
            obs.numpy().copy(),
            ended,
            running_return,
            carry.num_steps + num_steps,
        )
    arrays = {name: by_member(tensor, m, e) for name, tensor in out.items()}
    arrays["last_obs"] = obs.view(m, e, -1).numpy().copy()
    return Chunk(slot, request.version, request.tasks, arrays, carry_out)


def start(env: VectorEnv, request: Request, num_envs: int) -> Carry:
    """Resets the environments to the request's tasks."""
    tasks = spread(request.tasks, request.slot.num_envs)
    obs, _ = env.reset(seed=request.seeds[0], options={"tasks": tasks})
    return Carry(
        env={},
        noise=np.zeros(0, np.uint8),
        obs=np.asarray(obs),
        ended=np.zeros(num_envs, bool),
        episode_return=np.zeros(num_envs, np.float32),
        num_steps=0,
    )


def spread(tasks: Sequence[Task], num_envs: int) -> list[Task]:
    """One task per environment: each member's own, `num_envs` times."""
    return [task for task in tasks for _ in range(num_envs)]


def allocate(policy: Policy, num_steps: int, num_envs: int) -> dict[str, Tensor]:
    """Zeroed storage for a chunk, time-major, [T, n, …]."""
    spec = policy.spec
    shape = (num_steps, num_envs)
    action = (
        torch.zeros(*shape, dtype=torch.int64)
        if spec.discrete
        else torch.zeros(*shape, spec.action_size)
    )
    floats = ("reward", "valid", "log_prob", "episode_return", "episode_length")
    flags = ("terminated", "truncated")
    return (
        {"obs": torch.zeros(*shape, spec.obs_size), "action": action}
        | {name: torch.zeros(shape) for name in floats}
        | {name: torch.zeros(shape, dtype=torch.bool) for name in flags}
    )


def record(
    out: dict[str, Tensor],
    t: int,
    reward: Any,
    terminated: Any,
    truncated: Any,
    ended: np.ndarray,
    running_return: np.ndarray,
    steps_before: int,
) -> None:
    """Writes what step t brought, for the environments that had not ended before it."""
    going = torch.as_tensor(~ended)
    out["valid"][t] = going.float()
    out["reward"][t] = torch.as_tensor(reward).where(going, 0.0)
    out["terminated"][t] = torch.as_tensor(terminated) & going
    out["truncated"][t] = torch.as_tensor(truncated) & going
    if ended.any():
        for name in ("obs", "action", "log_prob"):
            out[name][t][ended] = 0
    over = out["terminated"][t] | out["truncated"][t]
    out["episode_return"][t] = torch.as_tensor(running_return).where(over, 0.0)
    out["episode_length"][t] = over * float(steps_before + t + 1)


def by_member(tensor: Tensor, m: int, e: int) -> np.ndarray:
    """[T, m·e, …] → contiguous [m, T, e, …]."""
    num_steps, _, *rest = tensor.shape
    members_first = tensor.view(num_steps, m, e, *rest).transpose(0, 1)
    array: np.ndarray = members_first.contiguous().numpy()
    return array


def receipt(chunk: Chunk, seconds: float) -> Receipt:
    """Summarises a chunk."""
    a = chunk.arrays
    over = a["terminated"] | a["truncated"]
    return Receipt(
        slot_id=chunk.slot.id,
        num_steps=int(a["valid"].sum()),
        return_sum=a["episode_return"].sum((1, 2), dtype=np.float64).tolist(),
        length_sum=a["episode_length"].sum((1, 2), dtype=np.float64).tolist(),
        num_episodes=over.sum((1, 2)).tolist(),
        seconds=seconds,
        worker=os.getpid(),
        num_bytes=sum(array.nbytes for array in a.values()),
    )

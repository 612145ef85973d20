"""The learner's process: its state, the window that is being collected, and what it publishes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from actors.rollout import Arrays, Chunk
from learners.config import LearnerConfig
from learners.core.contract import Agents, Describes, State, check_finite
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.params import flatten_members
from learners.core.population import Population
from learners.core.reduce import ALONE, Reduce
from learners.core.trajectory import ENV_AXIS, Metrics, Params, Spec, Trajectory
from learners.registry import make_learner
from system.parameter_server import Blocks

Publish = Callable[[int, Blocks], None]


@dataclass(frozen=True)
class Failure:
    """Why an update was skipped: a tensor that is not finite.

    Attributes:
        tensor: its name.
        member: the first member concerned, or None.
        arrays: that member's data of the batch at hand, enough to replay it.
    """

    tensor: str
    member: int | None
    arrays: Arrays


@dataclass(frozen=True)
class Outcome:
    """What an update brought: the version that acts next, metrics, or a failure.

    `seconds` is how long the learner worked.
    """

    version: int | None = None
    metrics: Metrics | None = None
    failure: Failure | None = None
    seconds: float = 0.0


def timed(method: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Notes in the outcome how long a method took."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Outcome:
        begun = time.perf_counter()
        outcome = method(*args, **kwargs)
        return replace(outcome, seconds=time.perf_counter() - begun)

    return wrapped


@dataclass(frozen=True)
class Plan:
    """What the loop must know of a learner.

    Attributes:
        num_inner_updates: K of a training window.
        num_evaluation_updates: of an evaluation.
        num_stream_steps: T of a chunk of a stream, or None for whole episodes.
    """

    num_inner_updates: int
    num_evaluation_updates: int
    num_stream_steps: int | None


def choose_device(device: str) -> torch.device:
    """CUDA for "cuda", and for "auto" where there is one.

    Raises:
        ConfigError: "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here; use --device cpu or auto"
        )
    return torch.device("cuda" if device != "cpu" and available else "cpu")


def join(chunks: Sequence[Chunk]) -> Trajectory:
    """One trajectory [M, T, E, …] from chunks of slots that together cover it."""
    num_members = max(chunk.slot.members[1] for chunk in chunks)
    num_envs = max(chunk.slot.envs[1] for chunk in chunks)
    joined: dict[str, torch.Tensor] = {}
    for name, axis in ENV_AXIS.items():
        sample = chunks[0].arrays[name]
        shape = [num_members, *sample.shape[1:]]
        shape[axis] = num_envs
        whole = np.empty(shape, sample.dtype)
        for chunk in chunks:
            place: list[slice] = [slice(*chunk.slot.members)] + [slice(None)] * (axis - 1)
            whole[(*place, slice(*chunk.slot.envs))] = chunk.arrays[name]
        joined[name] = torch.from_numpy(whole)
    return Trajectory(**joined)


class LearnerHost:
    """Runs a learner's functions on chunks and publishes who acts next.

    Every method leaves the state either as it was or after a complete update. Where several
    learners share the work out, each has a host, and all hosts get the same calls; one publishes.
    """

    def __init__(
        self,
        config: LearnerConfig,
        spec: Spec,
        seeds: Sequence[int],
        device: str,
        num_threads: int,
    ) -> None:
        self.learner = make_learner(config, spec)
        self.device = choose_device(device)
        self.num_threads = num_threads
        torch.set_num_threads(num_threads)  # the first parameters depend on it
        self.version = 0
        self.state = self.on_device(self.learner.init(seeds))
        self.trace: list[Agents] = []
        self.batches: list[Trajectory] = []
        self.last_query: Trajectory | None = None
        self.num_members = 0
        self.member_ranges: list[tuple[int, int]] = []
        self.reduce: Reduce = ALONE
        self.publish: Publish | None = None
        self.store: Callable[[np.ndarray], Any] = lambda array: array

    # --- The window ---

    def begin(
        self,
        num_members: int,
        member_ranges: Sequence[tuple[int, int]],
        evaluating: bool = False,
    ) -> Any:
        """Starts a window; returns which members start anew, and the version that acts first."""
        torch.set_num_threads(self.num_threads)
        renew, agents = self.learner.begin(self.state, num_members, evaluating=evaluating)
        self.trace, self.batches = [], []
        self.num_members, self.member_ranges = num_members, list(member_ranges)
        return renew, self.act(agents)

    @timed
    def advance(
        self, num_members: int, member_ranges: Sequence[tuple[int, int]], *chunks: Chunk
    ) -> Outcome:
        """`meta_update` of a window without inner updates, and `begin` of the next."""
        outcome = self.meta_update(*chunks)
        _, version = self.begin(num_members, member_ranges)
        return replace(outcome, version=version)

    @timed
    def inner_update(self, evaluating: bool, *chunks: Chunk) -> Outcome:
        """One inner update of all members on the chunks of one phase."""
        torch.set_num_threads(self.num_threads)
        batch = join(chunks)
        try:
            check_finite(batch)
            batch = batch.to(self.device)
            agents = self.learner.inner_update(
                self.state, self.trace[-1], batch, self.reduce, evaluating=evaluating
            )
        except NonFiniteError as error:
            return Outcome(failure=failure(error, batch))
        if evaluating:
            self.trace = []
        else:
            self.batches.append(batch)
        return Outcome(version=self.act(agents))

    @timed
    def meta_update(self, *chunks: Chunk) -> Outcome:
        """One outer update on the window's batches and the query chunks."""
        torch.set_num_threads(self.num_threads)
        batch = join(chunks)
        try:
            check_finite(batch)
            batches = [*self.batches, batch.to(self.device)]
            state, metrics = self.learner.meta_update(self.state, self.trace, batches, self.reduce)
        except NonFiniteError as error:
            return Outcome(failure=failure(error, batch))
        self.state, self.batches = state, []
        if isinstance(self.learner, Describes):
            self.last_query = batches[-1]
        return Outcome(metrics=metrics)

    def describe(self) -> dict[str, np.ndarray]:
        """What the learner has to show of the last update; empty where there is nothing."""
        if self.last_query is None or not isinstance(self.learner, Describes):
            return {}
        torch.set_num_threads(self.num_threads)
        described = self.learner.describe(self.state, self.last_query)
        return {name: tensor.detach().cpu().numpy() for name, tensor in described.items()}

    def act(self, agents: Agents) -> int:
        """Publishes the members' parameters as flat arrays, one per range of members or for all."""
        self.trace.append(agents)
        self.version += 1
        if self.publish is None:
            return self.version
        blocks: Blocks = {}
        for ranges, flat in self.flat(agents.params):
            stored = self.store(np.ascontiguousarray(flat))
            blocks |= {bounds: [stored] for bounds in ranges}
        self.publish(self.version, blocks)
        return self.version

    def flat(self, params: Params) -> Iterator[tuple[Sequence[tuple[int, int]], np.ndarray]]:
        """Ranges of members with the parameters that they act with, [m, P]; [1, P] for all."""
        policy = self.learner.policy
        if isinstance(policy, Population):
            for bounds in self.member_ranges:
                own = policy.block(self.num_members, bounds).of(params)
                yield [bounds], flatten_members(own).detach().cpu().numpy()
            return
        whole = flatten_members(params).detach().cpu().numpy()
        if len(whole) < self.num_members:
            yield self.member_ranges, whole
            return
        yield from (([bounds], whole[slice(*bounds)]) for bounds in self.member_ranges)

    def plan(self) -> Plan:
        """What the loop must know of the learner."""
        learner = self.learner
        return Plan(
            learner.num_inner_updates, learner.num_evaluation_updates, learner.num_stream_steps
        )

    # --- The state ---

    def get_state(self) -> State:
        """The state on the CPU."""
        return {
            group: {name: p.detach().cpu() for name, p in params.items()}
            for group, params in self.state.items()
        }

    def set_state(self, state: State) -> None:
        """Takes a state over.

        Raises:
            ConfigError: its entries or shapes are not this learner's.
        """
        for group, params in self.state.items():
            if not params:  # what such a group holds depends on the data
                continue
            theirs = {name: p.shape for name, p in state.get(group, {}).items()}
            if theirs != {name: p.shape for name, p in params.items()}:
                raise ConfigError(f"the checkpoint's {group} do not fit this learner")
        # A checkpoint has no groups without entries, such as the slots of plain gradient steps.
        self.state = self.on_device({group: {} for group in self.state} | state)

    def adopt(self, group: str, params: Params) -> None:
        """Takes one group over from elsewhere."""
        self.set_state(self.get_state() | {group: params})

    def on_device(self, state: State) -> State:
        """The state where the learner computes."""
        return {
            group: {name: p.to(self.device) for name, p in params.items()}
            for group, params in state.items()
        }


def failure(error: NonFiniteError, batch: Trajectory) -> Failure:
    """The error with the data of the member concerned, or of the first one."""
    member = error.member or 0
    one = batch.members(member, member + 1).to("cpu")
    arrays = {name: getattr(one, name).numpy() for name in ENV_AXIS}
    return Failure(error.tensor, error.member, arrays)

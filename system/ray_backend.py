"""The Ray backend: rollout actors, a learner actor and the parameter server.

Chunks and parameters travel by reference: an actor returns a chunk, which the driver then owns and
hands to the learner unread; the learner puts parameters once and publishes references to them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.family import TaskFamily
from actors.rollout import Carry, Chunk, Receipt, Request, RolloutWorker
from learners.core.errors import LearnersParted
from learners.core.policy import Policy
from learners.core.population import Population
from learners.core.together import find_store, join, open_store
from system.backend import AGENTS, Arrival, RolloutError, describe
from system.cluster import resources, start_ray
from system.config import RunConfig
from system.learner_group import LearnerGroup, speak_on
from system.learner_host import LearnerHost
from system.parameter_server import ParameterServer, Published

IN_FLIGHT = 2
"""Requests that an actor has at a time: one being collected, one waiting."""

LEARNER_PLACE: dict[str, Any] = {
    "label_selector": {"metaloop.role": "learner"},
    "fallback_strategy": [{"label_selector": {}}],
}
"""A node with this label where there is one (`ray start --labels metaloop.role=learner`)."""


class UnknownVersion(LookupError):
    """The parameter server does not know a version, as after its restart."""


class LearnerDied(RuntimeError):
    """The process of the learner, or of one of several, ended."""


@dataclass(frozen=True)
class Place:
    """A process in the cluster."""

    pid: int
    node: str
    """Ray's name of the node; two of them may share an address."""
    address: str


def this_place() -> Place:
    """The process that asks."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), address)


# --- The actors ---


@ray.remote
class RolloutActor:
    """A worker in a process of its own."""

    def __init__(
        self, family: TaskFamily, policy: Policy | Population, server: str, timeout_s: float
    ) -> None:
        self.worker = RolloutWorker(family, policy)
        # By name: a handle among the arguments could be lost before this actor restarts.
        self.server = ray.get_actor(server)
        self.timeout_s = timeout_s
        self.published: Published | None = None

    @ray.method(num_returns=3)
    def collect(self, request: Request, carry: Carry | None) -> tuple[Chunk, Receipt, Carry | None]:
        """A chunk, its receipt and its carry, under exactly the version asked for."""
        published = self.pull(request.version)
        # Read without a copy from the node's store.
        flat = ray.get(published.blocks[request.slot.members][0], timeout=self.timeout_s)
        return self.worker.collect(request, cast(np.ndarray, flat), published.version, carry)

    def pull(self, version: int | None) -> Published:
        """Where that version lies, or the newest."""
        known = self.published
        if known is None or known.version != version:
            answer: Any
            if version is None:
                than = None if known is None else known.version
                answer = self.server.pull_if_newer.remote(AGENTS, than)
            else:
                answer = self.server.get.remote(AGENTS, version)
            found = ray.get(answer, timeout=self.timeout_s)
            self.published = found or (known if version is None else None)
        if self.published is None:
            raise UnknownVersion(f"version {version}")
        return self.published

    def where(self) -> Place:
        """Where it runs; answers once the actor is ready."""
        return this_place()


@ray.remote
class LearnerActor:
    """The learner's host in a process of its own."""

    def __init__(
        self, config: RunConfig, family: TaskFamily, seeds: Sequence[int], server: Any
    ) -> None:
        runtime = config.runtime
        self.server = server
        self.timeout_s = runtime.timeout_s
        self.last: Published | None = None
        self.store: Any = None  # where several learners find one another
        self.host = LearnerHost(
            config.learner, family.spec, seeds, runtime.device, runtime.learner_threads
        )
        self.host.store = ray.put
        self.host.publish = self.publish

    def publish(self, version: int, blocks: Any) -> None:
        """Tells the parameter server of a new version."""
        self.last = Published(version, blocks)
        ray.get(self.server.publish.remote(AGENTS, version, blocks), timeout=self.timeout_s)

    def publish_again(self) -> None:
        """Fills a parameter server that has lost its memory."""
        if self.last is not None:
            self.publish(self.last.version, self.last.blocks)

    def meet(self, address: str) -> int:
        """Opens a store at which several learners find one another; returns its port."""
        self.store = open_store(address, self.timeout_s)
        return int(self.store.port)

    def join(self, store: tuple[str, int], address: str, rank: int, size: int) -> None:
        """Makes this learner, which is at `address`, one of several; the first one publishes."""
        speak_on(address)
        if rank > 0:
            self.host.publish = None
            self.store = find_store(*store, self.timeout_s)
        self.host.reduce = join(self.store, rank, size, self.host.device, self.timeout_s)

    def call(self, method: str, *args: Any) -> Any:
        """Calls the host."""
        return getattr(self.host, method)(*args)

    def info(self) -> tuple[Place, Policy | Population, str]:
        """Where it runs, what acts, and the device."""
        return this_place(), self.host.learner.policy, str(self.host.device)


def advise_on_threads(config: RunConfig) -> None:
    """Says once where a learner that works beside its actors has more threads than cores."""
    runtime, cores = config.runtime, os.cpu_count() or 1
    crowded = runtime.num_actors + runtime.num_learners * runtime.learner_threads > cores + 1
    if config.max_lag > 0 and runtime.address is None and runtime.learner_threads > 1 and crowded:
        logging.getLogger("metaloop").warning(
            "with --max-lag the learner works beside %d actors on %d CPU cores: "
            "--learner-threads 1 is faster",
            runtime.num_actors,
            cores,
        )


def describe_places(learners: Sequence[Place], device: str, actors: Sequence[Place]) -> str:
    """Which node does what, in one line."""
    where = ", ".join(f"{place.address} ({place.node[:6]}, {device})" for place in learners)
    counts = Counter((place.address, place.node[:6]) for place in actors)
    spread = ", ".join(f"{count} on {ip} ({node})" for (ip, node), count in sorted(counts.items()))
    return f"nodes        learner on {where}; actors on {len(counts)} nodes: {spread}"


# --- The backend ---


@dataclass
class Lane:
    """An actor, where it began, what it is working on, and the process that last answered."""

    actor: Any
    place: Place
    pid: int
    in_flight: list[Any] = field(default_factory=list)


class RayBackend:
    """Actors, learner and parameter server on Ray. See `system.backend.Backend`."""

    def __init__(self, config: RunConfig, family: TaskFamily, seeds: Sequence[int]) -> None:
        self.config = config
        self.timeout_s = config.runtime.timeout_s
        self.actor_restarts = 0
        start_ray(config.runtime)
        advise_on_threads(config)
        server = f"parameter-server-{uuid.uuid4().hex}"
        options = {"name": server, "num_cpus": 0, "max_restarts": -1, "max_task_retries": 3}
        self.server = ray.remote(ParameterServer).options(**options).remote()
        self.learners = self.start_learners(family, seeds)
        _, policy, self.device = self.learners.infos[0]
        spread = RolloutActor.options(num_cpus=1, max_restarts=-1, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
        actors = [
            spread.remote(family, policy, server, self.timeout_s)
            for _ in range(config.runtime.num_actors)
        ]
        places = self.get([actor.where.remote() for actor in actors])
        self.lanes = [
            Lane(actor, place, place.pid) for actor, place in zip(actors, places, strict=True)
        ]
        if config.runtime.address is not None:
            print(describe_places(self.learners.places, self.device, places), file=sys.stderr)
        self.waiting: deque[tuple[Request, Any]] = deque()
        self.running: dict[Any, tuple[Lane, Request, Any, Any, Any]] = {}
        self.unclaimed: list[Arrival] = []
        self.last_arrival = time.monotonic()

    @property
    def pids(self) -> list[int]:
        """Driver, learners and actors of the driver's node, as far as they last answered."""
        here = ray.get_runtime_context().get_node_id()
        learners = [place.pid for place in self.learners.places if place.node == here]
        actors = [lane.pid for lane in self.lanes if lane.place.node == here]
        return [os.getpid(), *learners, *actors]

    def start_learners(self, family: TaskFamily, seeds: Sequence[int]) -> LearnerGroup:
        """The learners in processes of their own, each with a GPU if they have some."""
        config, runtime = self.config, self.config.runtime
        num_gpus = runtime.num_gpus(resources().get("GPU", 0))
        if runtime.num_learners > 1:
            # A card that Ray does not know of would be taken by all of them.
            runtime = replace(runtime, device="cuda" if num_gpus else "cpu")
            config = replace(config, runtime=runtime)
        gpus = 1 if num_gpus else 0
        placed = LearnerActor.options(num_cpus=0, num_gpus=gpus, **LEARNER_PLACE)  # type: ignore[attr-defined]
        actors = [
            placed.remote(config, family, seeds, self.server) for _ in range(runtime.num_learners)
        ]
        group: LearnerGroup = self.in_time(lambda: LearnerGroup(actors, self.timeout_s))
        return group

    def get(self, reference: Any) -> Any:
        """`ray.get` that never waits for ever."""
        return self.in_time(lambda: ray.get(reference, timeout=self.timeout_s))

    def in_time(self, wait: Callable[[], Any]) -> Any:
        """What a limited wait brings; says how to wait longer where it ends in vain."""
        try:
            return wait()
        except GetTimeoutError:
            raise TimeoutError(
                f"no answer within {self.timeout_s:g} s; --timeout-s allows for more"
            ) from None

    def learner(self, method: str, *args: Any) -> Any:
        """Calls the host; references among `args` arrive as chunks."""
        return self.from_learner(self.learners.start(method, *args), method)

    def from_learner(self, reference: Any, method: str) -> Any:
        """`get` of an answer of the learner."""
        try:
            return self.in_time(lambda: self.learners.finish(reference))
        except (RayActorError, LearnersParted) as error:
            self.learners.end()
            number = len(self.learners.actors)
            whose = "the learner's" if number == 1 else f"one of {number} learners'"
            raise LearnerDied(
                f"{whose} process ended in {method}: {getattr(error, 'cause', None) or error}. "
                f"The same command goes on from the newest checkpoint."
            ) from error

    def collect(
        self, requests: Sequence[Request], carries: Sequence[Any] | None = None
    ) -> list[Arrival]:
        """Collects all requests; those of an actor that died are asked for again."""
        for request, carry in zip(requests, carries or [None] * len(requests), strict=True):
            self.submit(request, carry)
        done: dict[int, Arrival] = {}
        wanted = {id(request) for request in requests}
        others: list[Arrival] = []
        while len(done) < len(requests):
            for arrival in self.poll():
                if id(arrival.request) in wanted:
                    done[id(arrival.request)] = arrival
                else:
                    others.append(arrival)
        self.unclaimed += others
        return [done[id(request)] for request in requests]

    def abandon(self) -> None:
        """Forgets all that was asked for and has not come."""
        self.waiting.clear()
        self.running.clear()
        self.unclaimed.clear()
        for lane in self.lanes:
            lane.in_flight.clear()

    def submit(self, request: Request, carry: Any) -> None:
        """Asks for a chunk; `poll` brings it."""
        self.waiting.append((request, carry))
        self.hand_out()

    def poll(self, also: Any = None) -> list[Arrival]:
        """The chunks that have arrived; waits a second at most for the first of them.

        Args:
            also: a reference whose readiness ends the waiting as well.

        Raises:
            RolloutError: an environment failed, or no chunk came for as long as a wait may take.
        """
        if self.unclaimed:
            arrivals, self.unclaimed = self.unclaimed, []
            return arrivals
        self.hand_out()
        if not self.running:
            self.last_arrival = time.monotonic()
        watched = [*self.running] if also is None else [*self.running, also]
        ready, _ = ray.wait(watched, num_returns=1, timeout=1.0)
        if self.running:
            ready, _ = ray.wait([*self.running], num_returns=len(self.running), timeout=0)
        arrivals = []
        for reference in ready:
            if reference not in self.running:
                continue
            lane, request, carry, chunk, stop = self.running.pop(reference)
            lane.in_flight.remove(reference)
            received = self.receive(reference, lane, request)
            if received is None:
                self.waiting.appendleft((request, carry))
            else:
                arrivals.append(Arrival(request, chunk, received, stop))
        if arrivals:
            self.last_arrival = time.monotonic()
        elif self.running and time.monotonic() - self.last_arrival > self.timeout_s:
            slots = sorted(entry[1].slot.id for entry in self.running.values())
            raise RolloutError(
                f"no chunk for {self.timeout_s:g} s; still waiting for slots {slots[:10]} "
                f"from processes {[lane.pid for lane in self.lanes]}"
            )
        self.hand_out()
        return arrivals

    def hand_out(self) -> None:
        """Gives waiting requests to the actors with the least to do.

        A stream stays with one actor, which keeps its environments.
        """
        held: list[tuple[Request, Any]] = []
        while self.waiting:
            request, carry = self.waiting.popleft()
            if request.stream:
                lane = self.lanes[request.slot.id % len(self.lanes)]
            else:
                lane = min(self.lanes, key=lambda lane: len(lane.in_flight))
            if len(lane.in_flight) >= IN_FLIGHT:
                held.append((request, carry))
                if not request.stream:
                    break
                continue
            chunk, reference, stop = lane.actor.collect.remote(request, carry)
            lane.in_flight.append(reference)
            self.running[reference] = (lane, request, carry, chunk, stop)
        self.waiting.extendleft(reversed(held))

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """What the references stand for."""
        return cast(list[Any], self.get(list(handles)))

    def start(self, method: str, *args: Any) -> Any:
        """Calls the host without waiting; `finish` brings the answer."""
        return self.learners.start(method, *args)

    def finish(self, reference: Any, method: str) -> Any:
        """The answer to `start`."""
        return self.from_learner(reference, method)

    def finished(self, reference: Any) -> bool:
        """Whether the answer to `start` is there."""
        return self.learners.finished(reference)

    def receive(self, reference: Any, lane: Lane, request: Request) -> Receipt | None:
        """The receipt, or None where the request must be asked for again.

        Raises:
            RolloutError: the environment or the policy raised an error.
        """
        try:
            received: Receipt = self.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, UnknownVersion | ObjectLostError):
                # Parameters are lost with the server's memory, or with the learner that owns them.
                self.from_learner(self.learners.publish_again(), "publish_again")
                return None
            raise RolloutError(
                describe(request, error.cause, f"actor process {lane.pid}")
            ) from error
        except RayError:
            time.sleep(0.1)
            return None
        if received.worker != lane.pid:
            self.actor_restarts += 1
            lane.pid = received.worker
        return received

    def close(self) -> None:
        """Ends the actors, and the cluster if it is ours."""
        ray.shutdown()

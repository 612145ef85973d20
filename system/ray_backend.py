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
    ActorDiedError,
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
from system.ahead import DEPTH
from system.backend import AGENTS, Arrival, LearnerDied, RolloutError, describe
from system.cluster import resources, start_ray
from system.config import RunConfig
from system.learner_group import LearnerGroup, speak_on
from system.learner_host import LearnerHost
from system.parameter_server import ParameterServer, Published

IN_FLIGHT = 2
"""Requests that an actor has at a time: one being collected, one waiting."""

MAX_LOSSES = 10
"""Times that chunks of one call may be lost with their nodes."""

LEARNER_PLACE: dict[str, Any] = {
    "label_selector": {"metaloop.role": "learner"},
    "fallback_strategy": [{"label_selector": {}}],
}
"""A node with this label where there is one (`ray start --labels metaloop.role=learner`)."""


class UnknownVersion(LookupError):
    """The parameter server does not know a version, as after its restart."""


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
        self.last: deque[Published] = deque(maxlen=versions_in_use(config.max_lag))
        self.store: Any = None  # where several learners find one another
        self.host = LearnerHost(
            config.learner, family.spec, seeds, runtime.device, runtime.learner_threads
        )
        self.host.store = ray.put
        self.host.publish = self.publish

    def publish(self, version: int, blocks: Any) -> None:
        """Tells the parameter server of a new version."""
        self.last.append(Published(version, blocks))
        self.tell(self.last[-1])

    def publish_again(self) -> None:
        """Fills a parameter server that has lost its memory."""
        for published in self.last:
            self.tell(published)

    def tell(self, published: Published) -> None:
        """Waits until the parameter server knows a version."""
        known = self.server.publish.remote(AGENTS, published.version, published.blocks)
        ray.get(known, timeout=self.timeout_s)

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


def log() -> logging.Logger:
    """Where it is said what failed and what was done."""
    return logging.getLogger("metaloop")


def versions_in_use(max_lag: int) -> int:
    """Versions that a chunk may have been collected under and may have to be collected again."""
    return max_lag + DEPTH + 1


def advise_on_threads(config: RunConfig) -> None:
    """Says once where a learner that works beside its actors has more threads than cores."""
    runtime, cores = config.runtime, os.cpu_count() or 1
    crowded = runtime.num_actors + runtime.num_learners * runtime.learner_threads > cores + 1
    if config.max_lag > 0 and runtime.address is None and runtime.learner_threads > 1 and crowded:
        log().warning(
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


@dataclass(frozen=True)
class Collected:
    """A chunk in the node's store of whoever collected it, and what would bring it again."""

    reference: Any
    request: Request  # under the version that acted
    carry: Held | Carry | None


@dataclass(frozen=True)
class Held:
    """Where a stream stopped. The value keeps a copy on the driver's node: the actor's may die."""

    reference: Any
    value: Carry


@dataclass(eq=False)
class Lane:
    """An actor, the process that last answered, and what it is working on.

    While it does not answer, `back` is the reference that becomes ready when it does again.
    """

    actor: Any
    place: Place
    in_flight: list[Any] = field(default_factory=list)
    slots: set[int] = field(default_factory=set)
    """What this process has collected."""
    leaving: bool = False
    """Whether it gets no more work, because its memory grows."""
    back: Any = None

    @property
    def pid(self) -> int:
        """Of the process that last answered."""
        return self.place.pid

    def __str__(self) -> str:
        """Process and node."""
        return f"actor process {self.pid} on {self.place.address} ({self.place.node[:6]})"


@dataclass(frozen=True)
class Flight:
    """A request on its way: who has it, and references to chunk and carry that it will bring."""

    lane: Lane
    request: Request
    carry: Held | Carry | None
    chunk: Any
    stop: Any


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
        keep_versions = versions_in_use(config.max_lag)
        self.server = ray.remote(ParameterServer).options(**options).remote(keep_versions)
        self.learners = self.start_learners(family, seeds)
        _, policy, self.device = self.learners.infos[0]
        spread = RolloutActor.options(num_cpus=1, max_restarts=-1, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
        self.new_actor: Callable[[], Any] = lambda: spread.remote(
            family, policy, server, self.timeout_s
        )
        actors = [self.new_actor() for _ in range(config.runtime.num_actors)]
        asked = [actor.where.remote() for actor in actors]
        places = [self.first_place(*pair) for pair in zip(actors, asked, strict=True)]
        self.lanes = [Lane(actor, place) for actor, place in zip(actors, places, strict=True)]
        if config.runtime.address is not None:
            print(describe_places(self.learners.places, self.device, places), file=sys.stderr)
        self.waiting: deque[tuple[Request, Held | Carry | None]] = deque()
        self.running: dict[Any, Flight] = {}
        self.calls: dict[Any, tuple[Any, ...]] = {}
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
        try:
            group: LearnerGroup = self.in_time(lambda: LearnerGroup(actors, self.timeout_s))
        except RayActorError as error:
            raise LearnerDied(f"a learner's process ended before it began: {error}.") from error
        return group

    def first_place(self, actor: Any, asked: Any) -> Place:
        """Where an actor is, once it is anywhere: its first node may die as it starts.

        Raises:
            TimeoutError: it does not answer.
            RayActorError: it has died again and again for as long as a wait may take.
        """
        until = time.monotonic() + self.timeout_s
        while True:
            try:
                place: Place = self.get(asked)
                return place
            except RayActorError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
                asked = actor.where.remote()

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
        """Calls the host; what was collected arrives as chunks."""
        return self.finish(self.start(method, *args), method)

    def from_learner(self, reference: Any, method: str) -> Any:
        """`get` of an answer of the learner."""
        try:
            return self.in_time(lambda: self.learners.finish(reference))
        except (RayActorError, LearnersParted) as error:
            raise self.learner_died(error, method) from error

    def learner_died(self, error: Exception, method: str) -> LearnerDied:
        """What is raised where a learner is lost; those that are left are ended."""
        self.learners.end()
        number = len(self.learners.actors)
        whose = "the learner's" if number == 1 else f"one of {number} learners'"
        return LearnerDied(
            f"{whose} process ended in {method}: {getattr(error, 'cause', None) or error}. "
            f"The same command goes on from the newest checkpoint."
        )

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
        self.calls.clear()
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
        if not self.running and not self.waiting:
            self.last_arrival = time.monotonic()
        backs = [lane.back for lane in self.lanes if lane.back is not None]
        watched = [*self.running, *backs] + ([] if also is None else [also])
        ray.wait(watched, num_returns=1, timeout=1.0)
        self.take_back()
        received = [self.received(reference) for reference in self.ready()]
        arrivals = [arrival for arrival in received if arrival is not None]
        if arrivals:
            self.last_arrival = time.monotonic()
        elif time.monotonic() - self.last_arrival > self.timeout_s:
            raise RolloutError(self.describe_waiting())
        self.hand_out()
        return arrivals

    def ready(self) -> list[Any]:
        """The references of running requests that have an answer, or an error."""
        if not self.running:
            return []
        return ray.wait([*self.running], num_returns=len(self.running), timeout=0)[0]

    def describe_waiting(self) -> str:
        """What there is to say where nothing comes."""
        slots = sorted(flight.request.slot.id for flight in self.running.values())
        slots += sorted(request.slot.id for request, _ in self.waiting)
        gone = "; ".join(str(lane) for lane in self.lanes if lane.back is not None)
        return (
            f"no chunk for {self.timeout_s:g} s; still waiting for slots {slots[:10]} from "
            f"processes {[lane.pid for lane in self.lanes]}"
            + (f". Did not come back: {gone}; is there a CPU for each?" if gone else "")
        )

    def hand_out(self) -> None:
        """Gives waiting requests to the actors that answer, first those with the least to do.

        A stream stays with one actor, which keeps its environments, for as long as that answers.
        """
        self.replace_leaving()
        answering = [lane for lane in self.lanes if lane.back is None and not lane.leaving]
        held: list[tuple[Request, Any]] = []
        while self.waiting and answering:
            request, carry = self.waiting.popleft()
            if request.stream:
                own = self.lanes[request.slot.id % len(self.lanes)]
                lane = own if own in answering else answering[request.slot.id % len(answering)]
            else:
                lane = min(answering, key=lambda lane: len(lane.in_flight))
            if len(lane.in_flight) >= IN_FLIGHT:
                held.append((request, carry))
                if not request.stream:
                    break
                continue
            given = carry.reference if isinstance(carry, Held) else carry
            chunk, reference, stop = lane.actor.collect.remote(request, given)
            lane.in_flight.append(reference)
            self.running[reference] = Flight(lane, request, carry, chunk, stop)
        self.waiting.extendleft(reversed(held))

    def received(self, reference: Any) -> Arrival | None:
        """What a running request brought; None where it has to be asked for again."""
        flight = self.running.pop(reference)
        lane, request, carry = flight.lane, flight.request, flight.carry
        lane.in_flight.remove(reference)
        said = self.receive(reference, lane, request)
        stop = None
        if said is not None and request.stream:
            try:
                stop = Held(flight.stop, self.get(flight.stop))
            except ObjectLostError:
                said = None
        if said is None:
            self.waiting.appendleft((request, carry))
            return None
        again = replace(request, version=said.version)
        return Arrival(request, Collected(flight.chunk, again, carry), said, stop)

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
        except RayError as error:
            self.miss(lane, error)
            return None
        if received.worker != lane.pid:
            self.miss(lane, None)
        else:
            self.weigh(received, lane, request)
        return received

    # --- Actors that die ---

    def miss(self, lane: Lane, error: RayError | None) -> None:
        """Gives an actor no work until it answers; without an error it is another process now."""
        if lane.back is not None:
            return
        if error is not None:
            log().warning(
                "%s does not answer (%s); its chunks are collected by others until it is back",
                *(lane, type(error).__name__),
            )
        lane.back = lane.actor.where.remote()

    def take_back(self) -> None:
        """Gives work to the actors that answer again."""
        for lane in self.lanes:
            if lane.back is None or not ray.wait([lane.back], timeout=0)[0]:
                continue
            try:
                place: Place = ray.get(lane.back)
            except RayError as error:
                if isinstance(error, ActorDiedError):  # for good: Ray restarts it no more
                    lane.actor = self.new_actor()
                time.sleep(0.1)
                lane.back = lane.actor.where.remote()
                continue
            lane.back = None
            if place.pid != lane.pid or place.node != lane.place.node:
                self.actor_restarts += 1
                before, lane.place, lane.slots = str(lane), place, set()
                log().warning("%s is back as %s", before, lane)

    # --- Actors whose memory grows ---

    def weigh(self, received: Receipt, lane: Lane, request: Request) -> None:
        """Lets an actor go that holds more memory than it may.

        Raises:
            RolloutError: it does with environments that it has just made; so would the next one.
        """
        limit = self.config.runtime.actor_memory_mb
        new = not lane.slots or (request.stream and request.slot.id not in lane.slots)
        lane.slots.add(request.slot.id)
        if not limit or received.own_mb <= limit:
            return
        found = (
            f"actor process {lane.pid} on {received.host} holds {received.own_mb:.0f} MB, "
            f"--actor-memory-mb allows {limit}"
        )
        if new:
            raise RolloutError(f"{found}: its environments alone take as much. Allow more")
        if not lane.leaving:
            lane.leaving = True
            log().warning(
                "%s: another process takes its place once it has collected what it was asked for",
                found,
            )

    def replace_leaving(self) -> None:
        """Ends the actors that leave and have nothing to do; Ray starts them anew."""
        for lane in self.lanes:
            if lane.leaving and not lane.in_flight:
                ray.kill(lane.actor, no_restart=False)
                lane.leaving = False
                self.miss(lane, None)

    # --- The learner ---

    def start(self, method: str, *args: Any) -> Any:
        """Calls the host without waiting; `finish` brings the answer."""
        given = [arg.reference if isinstance(arg, Collected) else arg for arg in args]
        reference = self.learners.start(method, *given)
        self.calls[reference] = args
        return reference

    def finish(self, reference: Any, method: str) -> Any:
        """The answer to `start`. Chunks that were lost with their node are collected again.

        The learner has then not begun: it needs all of its arguments. Of several learners some may
        have: they are given up.
        """
        args = self.calls.pop(reference)
        for _ in range(MAX_LOSSES):
            try:
                return self.from_learner(reference, method)
            except ObjectLostError as error:
                if len(self.learners.actors) > 1:
                    raise self.learner_died(error, method) from error
                args = self.complete(args)
                reference = self.start(method, *args)
                self.calls.pop(reference)
        raise RolloutError(f"chunks were lost {MAX_LOSSES} times on their way to the learner")

    def complete(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments of a call with new chunks in place of those that are lost."""
        lost = [i for i, arg in enumerate(args) if isinstance(arg, Collected) and self.lost(arg)]
        slots = [args[i].request.slot.id for i in lost]
        log().warning("the chunks of slots %s were lost with their node; collected again", slots)
        again = self.collect([args[i].request for i in lost], [args[i].carry for i in lost])
        found = {i: arrival.chunk for i, arrival in zip(lost, again, strict=True)}
        return tuple(found.get(i, arg) for i, arg in enumerate(args))

    def lost(self, chunk: Collected) -> bool:
        """Whether no node has a chunk any more."""
        try:
            self.get(chunk.reference)
        except ObjectLostError:
            return True
        return False

    def finished(self, reference: Any) -> bool:
        """Whether the answer to `start` is there."""
        return self.learners.finished(reference)

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """Where streams stand."""
        return [handle.value if isinstance(handle, Held) else handle for handle in handles]

    def close(self) -> None:
        """Ends the actors, and the cluster if it is ours."""
        ray.shutdown()

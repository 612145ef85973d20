"""Rollout actors on Ray: who gets which request, and what happens where one dies or grows.

A request is in one of three places: waiting, with an actor, or answered. An actor that fails gets
no work until it answers again; what it had goes back to those that wait, so that every request is
answered once, by whoever is there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.rollout import Carry, Receipt, Request
from system.backend import Arrival, RolloutError, describe
from system.last_words import told
from system.ray_actors import Place, UnknownVersion, in_time, log

IN_FLIGHT = 2
"""Requests that an actor has at a time: one being collected, one waiting."""


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
    memory_mb: float = 0.0
    """What it held beside what it shares, when it last answered."""
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


class ActorPool:
    """The actors of a run, and all requests that are under way."""

    def __init__(
        self,
        new_actor: Callable[[], Any],
        num_actors: int,
        publish_again: Callable[[], None],
        timeout_s: float,
        memory_mb: int,
    ) -> None:
        """Starts the actors, and waits until they are there.

        Args:
            new_actor: starts one.
            num_actors: how many there are.
            publish_again: fills a parameter server that has lost its memory.
            timeout_s: longest wait for a chunk, in seconds.
            memory_mb: what an actor may hold, in MB; 0 for no limit.
        """
        self.new_actor = new_actor
        self.publish_again = publish_again
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.restarts = 0
        actors = [new_actor() for _ in range(num_actors)]
        asked = [actor.where.remote() for actor in actors]
        self.lanes = [
            Lane(actor, self.first_place(actor, place))
            for actor, place in zip(actors, asked, strict=True)
        ]
        self.waiting: deque[tuple[Request, Held | Carry | None]] = deque()
        self.running: dict[Any, Flight] = {}
        self.unclaimed: list[Arrival] = []
        self.last_arrival = time.monotonic()

    @property
    def places(self) -> list[Place]:
        """Where the actors were when they last answered."""
        return [lane.place for lane in self.lanes]

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
        return in_time(lambda: ray.get(reference, timeout=self.timeout_s), self.timeout_s)

    def lost(self, chunk: Collected) -> bool:
        """Whether no node has a chunk any more."""
        try:
            self.get(chunk.reference)
        except ObjectLostError:
            return True
        return False

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
            if isinstance(error.cause, UnknownVersion | ObjectLostError | RayActorError):
                # Parameters are lost with the server or its memory, or with who owns them.
                self.publish_again()
                return None
            raise RolloutError(
                describe(request, error.cause, f"actor process {lane.pid}")
            ) from error
        except RayError as error:
            self.miss(lane, error, request)
            return None
        if received.worker != lane.pid:
            self.miss(lane, None)
        else:
            self.weigh(received, lane, request)
        return received

    # --- Actors that die ---

    def miss(self, lane: Lane, error: RayError | None, request: Request | None = None) -> None:
        """Gives an actor no work until it answers; without an error it is another process now."""
        if lane.back is not None:
            return
        if error is not None and request is not None:
            died = describe(request, error, str(lane))
            log().warning(
                "%s; its chunks are collected by others until it is back; %s",
                *(died, told(lane.pid, lane.memory_mb)),
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
                self.restarts += 1
                before, lane.place, lane.slots = str(lane), place, set()
                lane.memory_mb = 0.0
                log().warning("%s is back as %s", before, lane)

    # --- Actors whose memory grows ---

    def weigh(self, received: Receipt, lane: Lane, request: Request) -> None:
        """Lets an actor go that holds more memory than it may.

        Raises:
            RolloutError: it does with environments that it has just made; so would the next one.
        """
        limit, lane.memory_mb = self.memory_mb, received.own_mb
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

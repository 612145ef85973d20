"""Asynchronous collection: actors go on with the newest parameters while the learner works.

    actors     chunk 1 ── chunk 2 ── chunk 3 ── …      of every slot, each with the newest version
    learner            └─ update 1 ── update 2 ── …    on one chunk of every slot

A slot is at most `DEPTH` chunks ahead of the learner. The lag of a chunk is the newest version less
its own, at the moment when it would be used; a chunk that lags more than `max_lag` is dropped and
counted, and the slot's next one takes its place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from actors.rollout import Receipt, Request, Slot
from learners.core.trajectory import Metrics
from system.backend import Arrival
from system.learner_host import Outcome

DEPTH = 2
"""Chunks of a slot that are in flight or wait for the learner."""


class ConcurrentBackend(Protocol):
    """A backend that collects and learns at the same time."""

    def submit(self, request: Request, carry: Any) -> None:
        """Asks for a chunk; `poll` brings it."""
        ...

    def poll(self, also: Any = None) -> list[Arrival]:
        """The chunks that have arrived; waits a little for the first, or until `also` is ready."""
        ...

    def start(self, method: str, *args: Any) -> Any:
        """Calls the learner's host without waiting."""
        ...

    def finished(self, reference: Any) -> bool:
        """Whether the answer to `start` is there."""
        ...

    def finish(self, reference: Any, method: str) -> Any:
        """The answer to `start`."""
        ...


class Ahead:
    """Collects for the next updates while one is computed."""

    def __init__(
        self,
        backend: ConcurrentBackend,
        slots: Sequence[Slot],
        make_request: Callable[[Slot, int], Request],
        max_lag: int,
        newest: int,
        carries: Mapping[int, Any],
    ) -> None:
        """Begins.

        Args:
            backend: must be able to collect and learn at the same time.
            slots: all of them make one batch.
            make_request: the request of a slot's n-th chunk.
            max_lag: the largest lag at which a chunk is used.
            newest: version of the newest parameters.
            carries: where streams go on, by slot.
        """
        self.backend = backend
        self.slots = list(slots)
        self.make_request = make_request
        self.max_lag = max_lag
        self.newest = newest
        self.consumed = dict(carries)
        self.latest = dict(carries)
        self.numbers = {slot.id: 0 for slot in slots}
        self.flying = {slot.id: False for slot in slots}
        self.ready: dict[int, deque[Arrival]] = {slot.id: deque() for slot in slots}
        self.dropped = 0
        self.dropped_now: list[Receipt] = []
        self.lags: list[int] = []

    def refill(self) -> None:
        """Asks for the next chunk of every slot that is not far enough ahead."""
        for slot in self.slots:
            if not self.flying[slot.id] and len(self.ready[slot.id]) < DEPTH:
                request = self.make_request(slot, self.numbers[slot.id])
                self.backend.submit(request, self.latest.get(slot.id))
                self.numbers[slot.id] += 1
                self.flying[slot.id] = True

    def gather(self, also: Any = None) -> None:
        """Waits for chunks, a second at most, and asks for more."""
        self.refill()
        for arrival in self.backend.poll(also):
            slot = arrival.receipt.slot_id
            self.flying[slot] = False
            self.latest[slot] = arrival.carry
            self.ready[slot].append(arrival)
        self.drop_stale()
        self.refill()

    def drop_stale(self) -> None:
        """Throws chunks away that are too old by now."""
        for waiting in self.ready.values():
            while waiting and self.newest - waiting[0].receipt.version > self.max_lag:
                old = waiting.popleft()
                self.consumed[old.receipt.slot_id] = old.carry
                self.dropped += 1
                self.dropped_now.append(old.receipt)

    def next_batch(self) -> tuple[list[Any], list[Receipt], float]:
        """One chunk of every slot: handles, receipts (also of dropped chunks), seconds waited."""
        begun = time.perf_counter()
        self.drop_stale()
        while not all(self.ready.values()):
            self.gather()
        batch = [self.ready[slot.id].popleft() for slot in self.slots]
        self.lags = [self.newest - arrival.receipt.version for arrival in batch]
        self.consumed |= {a.receipt.slot_id: a.carry for a in batch}
        receipts = [arrival.receipt for arrival in batch] + self.dropped_now
        self.dropped_now = []
        return [arrival.chunk for arrival in batch], receipts, time.perf_counter() - begun

    def while_collecting(self, method: str, *args: Any) -> Outcome:
        """Lets the learner work, and gathers chunks until it is done."""
        reference = self.backend.start(method, *args)
        while not self.backend.finished(reference):
            self.gather(also=reference)
        outcome: Outcome = self.backend.finish(reference, method)
        assert outcome.version is not None
        self.newest = outcome.version
        return outcome

    def metrics(self) -> Metrics:
        """Lag of the last batch, and chunks dropped so far."""
        return {
            "perf/policy_lag_mean": sum(self.lags) / len(self.lags),
            "perf/policy_lag_max": float(max(self.lags)),
            "perf/chunks_dropped": float(self.dropped),
        }

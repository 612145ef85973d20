"""Actors that are much slower than the others, as the receipts of their chunks tell."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from actors.rollout import Receipt
from learners.core.trajectory import Metrics

SLOW = 4.0
"""How many times slower than the others an actor is that is told of."""

IN_A_ROW = 3
"""Iterations in which it has to be: the first chunk of a process makes its environments."""

Actor = tuple[int, str]
"""Process and machine."""


class Stragglers:
    """Watches how fast each actor collects, and says once of each that it is slow."""

    def __init__(self) -> None:
        self.in_a_row: Counter[Actor] = Counter()
        self.told: set[Actor] = set()

    def note(self, receipts: Sequence[Receipt]) -> Metrics:
        """Takes the receipts of one iteration; nothing can be said of a single actor."""
        ratios = slowness(paces(receipts))
        if not ratios:
            return {}
        for actor, ratio in ratios.items():
            self.in_a_row[actor] = self.in_a_row[actor] + 1 if ratio >= SLOW else 0
            if self.in_a_row[actor] >= IN_A_ROW and actor not in self.told:
                self.told.add(actor)
                logging.getLogger("metaloop").warning(
                    "actor process %d on %s takes %.1f times as long for a step as the others: is "
                    "something else running there? Slots of whole episodes go to the others as "
                    "far as they are free, streams stay",
                    *(*actor, ratio),
                )
        return {"perf/slowest_actor_ratio": max(ratios.values())}


def paces(receipts: Sequence[Receipt]) -> dict[Actor, float]:
    """Seconds per environment step of each actor."""
    seconds: dict[Actor, float] = {}
    steps: Counter[Actor] = Counter()
    for receipt in receipts:
        actor = (receipt.worker, receipt.host)
        seconds[actor] = seconds.get(actor, 0.0) + receipt.seconds
        steps[actor] += receipt.num_steps
    return {actor: total / steps[actor] for actor, total in seconds.items() if steps[actor]}


def slowness(pace: Mapping[Actor, float]) -> dict[Actor, float]:
    """How many times as long as the median of the others each takes; of two actors at least."""
    if len(pace) < 2:
        return {}
    return {
        actor: own / statistics.median(other for name, other in pace.items() if name != actor)
        for actor, own in pace.items()
    }

"""Where the time of a meta-iteration goes, as the loop sees it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from actors.rollout import Request
from actors.tasks import load_family
from system import run_folder
from system.backend import Arrival
from system.bench.spread import spread
from system.config import RunConfig
from system.learner_host import Outcome
from system.loop import Counters, Loop
from system.run import make_backend

METHODS = {
    "collect": "environments and acting",
    "begin": "publishing",
    "inner_update": "inner updates",
    "meta_update": "outer update",
}
"""What a backend is asked for, and what a person calls it."""

WHOLE, TRANSFER = "one meta-iteration", "transfer"
PARTS = (*METHODS.values(), TRANSFER)


@dataclass
class TimedBackend:
    """A backend that notes how long each kind of request took.

    What a learner's answer took beyond the learner's own work is transfer.
    """

    backend: Any
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def learner(self, method: str, *args: Any) -> Any:
        """Calls the host."""
        result, passed = timed(lambda: self.backend.learner(method, *args))
        if isinstance(result, Outcome):
            self.seconds[TRANSFER] += passed - result.seconds
            passed = result.seconds
        if method in METHODS:
            self.seconds[METHODS[method]] += passed
        return result

    def collect(
        self, requests: Sequence[Request], carries: Sequence[Any] | None = None
    ) -> list[Arrival]:
        """Collects all requests."""
        arrivals: list[Arrival]
        arrivals, passed = timed(lambda: self.backend.collect(requests, carries))
        self.seconds[METHODS["collect"]] += passed
        return arrivals


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work brings, and the seconds that it took."""
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def measure(name: str, config: RunConfig, iterations: int, warm_up: int) -> dict[str, Any]:
    """Meta-iterations of a run, without records or checkpoints.

    Args:
        name: what is measured, for people.
        config: of the run.
        iterations: that are measured.
        warm_up: iterations before them.

    Returns:
        "seconds": of an iteration and of its parts, as minimum, median and maximum over
        `iterations`; environment steps of one, and per second at the median; this process's
        largest resident memory in MiB; and the machine.
    """
    family = load_family(config.task, config.task_options)
    backend = TimedBackend(make_backend(config, family))
    rows: list[dict[str, float]] = []
    try:
        loop = Loop(config, family, backend)
        counters, steps = Counters(), 0
        for number in range(warm_up + iterations):
            before = dict(backend.seconds)
            (done, _, _), seconds = timed(partial(loop.iterate, counters))
            steps, counters = done.env_steps - counters.env_steps, done
            parts = {part: backend.seconds[part] - before[part] for part in PARTS}
            if number >= warm_up:
                rows.append({WHOLE: seconds, **parts})
    finally:
        backend.close()
    seconds_of = {part: spread([row[part] for row in rows]) for part in (WHOLE, *PARTS)}
    return {
        "name": name,
        "seconds": seconds_of,
        "env_steps": steps,
        "env_steps_per_s": steps / seconds_of[WHOLE]["median"],
        "iterations": iterations,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0,
        **run_folder.describe_process(config, config.runtime.device),
    }

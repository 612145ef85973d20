"""What Ray takes for moving chunks and parameters between processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from system import run_folder
from system.bench.spread import spread
from system.cluster import start_ray
from system.config import RunConfig, RuntimeConfig
from system.presets import PRESETS

SIZES = {"10 KB": 10_000, "100 KB": 100_000, "1 MB": 1_000_000, "10 MB": 10_000_000}
IN_FLIGHT = (1, 2, 4)
CALLS = 20
"""Chunks or parameters of one measurement."""
TIMEOUT_S = 60.0


@ray.remote
class Source:
    """An actor that answers at once, and one that reads parameters."""

    def chunk(self, size: int) -> np.ndarray:
        """An array of so many bytes."""
        return np.zeros(size, np.uint8)

    def read(self, params: list[Any]) -> int:
        """Gets parameters by reference, as an actor does before it collects."""
        return int(ray.get(params[0], timeout=TIMEOUT_S).nbytes)


@ray.remote
class Sink:
    """A learner that looks at what it is given."""

    def size(self, *chunks: np.ndarray) -> int:
        """Bytes of all of them."""
        return sum(chunk.nbytes for chunk in chunks)


def measure(rounds: int, num_actors: int) -> dict[str, Any]:
    """Seconds of a chunk and of a pull of parameters by their size, and by chunks in flight.

    Args:
        rounds: measurements of each, of `CALLS` chunks.
        num_actors: that answer.
    """
    runtime = RuntimeConfig(num_actors=num_actors, device="cpu")
    start_ray(runtime)
    try:
        sources = [Source.options(num_cpus=1).remote() for _ in range(num_actors)]  # type: ignore[attr-defined]
        sink = Sink.options(num_cpus=0).remote()  # type: ignore[attr-defined]
        works: dict[str, Callable[[], Any]] = {}
        for label, size in SIZES.items():
            works[f"chunk of {label}, actor to learner"] = lambda size=size: passed_on(  # type: ignore[misc]
                sources, sink, size, CALLS
            )
            works[f"parameters of {label}, learner to actor"] = lambda size=size: pulled(  # type: ignore[misc]
                sources, size
            )
        for number in IN_FLIGHT:
            works[f"chunk of 100 KB, {number} in flight"] = lambda number=number: passed_on(  # type: ignore[misc]
                sources, sink, SIZES["100 KB"], number
            )
        found: dict[str, list[float]] = {label: [] for label in works}
        for count in range(rounds + 1):
            for label, work in works.items():
                begun = time.perf_counter()
                work()
                if count:  # the first one warms up
                    found[label].append((time.perf_counter() - begun) / CALLS)
    finally:
        ray.shutdown()
    config: RunConfig = replace(PRESETS["a2c/half-cheetah"](), runtime=runtime)
    return {
        "name": f"transport, {num_actors} actors",
        "seconds": {label: spread(values) for label, values in found.items()},
        **run_folder.describe_process(config, "cpu"),
    }


def passed_on(sources: list[Any], sink: Any, size: int, in_flight: int) -> None:
    """Chunks that actors return and the learner gets by reference, so many at a time."""
    done = 0
    while done < CALLS:
        number = min(in_flight, CALLS - done)
        chunks = [sources[i % len(sources)].chunk.remote(size) for i in range(number)]
        ray.get(sink.size.remote(*chunks), timeout=TIMEOUT_S)
        done += number


def pulled(sources: list[Any], size: int) -> None:
    """Parameters that are put once each and read by one actor."""
    for number in range(CALLS):
        reference = ray.put(np.full(size, number % 256, np.uint8))
        ray.get(sources[number % len(sources)].read.remote([reference]), timeout=TIMEOUT_S)

"""The parts of MAML-TRPO's outer update, each by itself on the data of one real iteration."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from actors.tasks import load_family
from learners.core.blocks import map_blocks
from learners.core.contract import Agents
from learners.core.params import detach, flatten, leaves
from learners.core.reduce import ALONE
from learners.core.trajectory import Trajectory
from learners.maml import Linearised, MamlTrpo
from system.bench.spread import spread
from system.config import RunConfig
from system.loop import Loop
from system.seeds import Stream, make_seeds
from system.serial_backend import SerialBackend


def window(config: RunConfig) -> tuple[SerialBackend, Sequence[Agents], Sequence[Trajectory]]:
    """A backend that holds the batches of one iteration, up to the outer update."""
    family = load_family(config.task, config.task_options)
    seeds = make_seeds(config.seed, Stream.INIT, count=config.num_members)
    backend = SerialBackend(config, family, seeds)
    kept: dict[str, Any] = {}
    update = backend.host.learner.meta_update

    class Keeping:
        """The learner, which shows what it is given."""

        def __getattr__(self, name: str) -> Any:
            return getattr(learner, name)

        def meta_update(self, state: Any, trace: Any, batches: Any, reduce: Any = ALONE) -> Any:
            kept.update(trace=list(trace), batches=list(batches))
            return update(state, trace, batches, reduce)

    learner = backend.host.learner
    before = backend.host.state
    backend.host.learner = Keeping()
    Loop(config, family, backend).step(0)
    backend.host.learner, backend.host.state = learner, before
    return backend, kept["trace"], kept["batches"]


def measure(config: RunConfig, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each part: minimum, median and maximum of the repeats, after one more."""
    backend, trace, batches = window(config)
    learner, state = backend.host.learner, backend.host.state
    assert isinstance(learner, MamlTrpo)
    torch.set_num_threads(config.runtime.learner_threads)
    device = backend.host.device
    blocks = learner.blocks(batches)
    meta_params = leaves(state["meta_params"])
    graphs = [Linearised.at(learner, meta_params, block) for block in blocks]
    start, direction = flatten(detach(meta_params)).double(), detach(meta_params)
    search = learner.evaluation(meta_params, blocks, [graph.dist for graph in graphs], ALONE)

    def of_graphs(work: Callable[[Linearised], Any]) -> Callable[[], Any]:
        return lambda: map_blocks(work, graphs, device)

    parts: dict[str, Callable[[], Any]] = {
        "inner update": lambda: learner.inner_update(state, trace[0], batches[0]),
        "baseline and advantages": lambda: learner.blocks(batches),
        "graphs of the adaptation": lambda: map_blocks(
            lambda block: Linearised.at(learner, meta_params, block), blocks, device
        ),
        "surrogate gradient": of_graphs(lambda graph: graph.gradient(meta_params)),
        "one Fisher-vector product": of_graphs(
            lambda graph: graph.fisher_product(meta_params, direction)
        ),
        "one try of the line search": lambda: search(start),
        "whole outer update": lambda: learner.meta_update(state, trace, batches),
    }
    return {name: spread(durations(part, repeats)) for name, part in parts.items()}


def durations(part: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of the repeats, after one that is not counted."""
    part()
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        part()
        found.append(time.perf_counter() - begun)
    return found

"""Where one MAML-TRPO iteration on HalfCheetah-Dir spends its time: medians of five, in seconds.

40 tasks × 20 episodes × 100 steps, before and after adaptation; policy 2×64. On an idle machine:

    python docs/results/iteration_parts.py
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import gymnasium
import mujoco
import numpy as np
import torch

from actors.tasks import load_family
from learners.core.blocks import map_blocks
from learners.core.contract import Agents
from learners.core.params import detach, flatten, leaves
from learners.core.reduce import ALONE
from learners.core.trajectory import Trajectory
from learners.maml import Linearised, MamlTrpo
from system.config import RunConfig
from system.learner_host import join
from system.loop import Loop, member_ranges
from system.presets import half_cheetah_dir
from system.seeds import Stream
from system.serial_backend import SerialBackend

NUM_STEPS = 40 * 20 * 100 * 2


def median_seconds(part: Callable[[], object], repeats: int = 5) -> float:
    """Median duration after one run that is not counted."""
    part()
    durations = []
    for _ in range(repeats):
        begun = time.perf_counter()
        part()
        durations.append(time.perf_counter() - begun)
    return statistics.median(durations)


def step_raw(seconds: float) -> float:
    """Environment steps per second of bare `mj_step` × 5 with random controls, in one process."""
    env = gymnasium.make("HalfCheetah-v5").unwrapped
    model, data, rng = env.model, env.data, np.random.default_rng(0)
    controls = rng.uniform(-1.0, 1.0, (1000, model.nu))
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        for control in controls:
            data.ctrl[:] = control
            mujoco.mj_step(model, data, 5)
        count += len(controls)
    return count / (time.perf_counter() - begun)


def real_window(config: RunConfig) -> tuple[MamlTrpo, Agents, list[Trajectory], SerialBackend]:
    """A learner and the two batches of one iteration."""
    family = load_family(config.task, config.task_options)
    backend = SerialBackend(config, family, seed=0)
    loop = Loop(config, family, backend)
    slots = loop.slots(config.num_members)
    _, version = backend.learner("begin", config.num_members, member_ranges(slots))
    first = backend.host.agents
    loop.resample([True] * config.num_members, 0)
    batches = []
    for k in (0, 1):
        chunks, _ = loop.collect(slots, loop.members, version, (Stream.TRAIN, 0, k))
        batches.append(join(chunks))
        version = backend.learner("inner_update", False, *chunks).version
    return backend.host.learner, first, batches, backend


def main() -> None:
    """Prints the table."""
    cores = multiprocessing.cpu_count()
    with multiprocessing.Pool(cores) as pool:
        raw = sum(pool.map(step_raw, [5.0] * cores))
    print(f"raw mj_step on {cores} cores at once: {raw:.0f} steps/s, {NUM_STEPS / raw:.2f} s")
    config = replace(half_cheetah_dir(), num_members=40, members_per_slot=4)
    learner, first, batches, backend = real_window(config)
    state = backend.host.state
    torch.set_num_threads(config.runtime.learner_threads)
    blocks = learner.blocks(batches)
    meta_params = leaves(state["meta_params"])
    graphs = [Linearised.at(learner, meta_params, block) for block in blocks]
    start = flatten(detach(meta_params)).double()
    direction = detach(meta_params)
    search = learner.evaluation(meta_params, blocks, [graph.dist for graph in graphs], ALONE)
    parts: dict[str, Callable[[], object]] = {
        "inner update": lambda: learner.inner_update(state, first, batches[0]),
        "baseline and advantages, both batches": lambda: learner.blocks(batches),
        "graphs of the adaptation": lambda: map_blocks(
            lambda block: Linearised.at(learner, meta_params, block), blocks, start.device
        ),
        "surrogate gradient": lambda: map_blocks(
            lambda graph: graph.gradient(meta_params), graphs, start.device
        ),
        "one Fisher-vector product": lambda: map_blocks(
            lambda graph: graph.fisher_product(meta_params, direction), graphs, start.device
        ),
        "one try of the line search": lambda: search(start),
        "whole outer update": lambda: learner.meta_update(state, first, batches),
    }
    for name, part in parts.items():
        print(f"{name}: {median_seconds(part):.3f} s")


if __name__ == "__main__":
    main()

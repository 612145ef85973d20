"""The one place where seeds are made.

Every seed is a hash of the run's seed and of where it is used, so that a chunk's data depend on
neither the worker that collects it nor on what was collected before it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Uses that must never share random numbers."""

    INIT = 0
    TRAIN_TASKS = 1
    TRAIN = 2
    EVALUATION_TASKS = 3
    EVALUATION = 4
    EPISODES = 5


def make_seeds(run_seed: int, stream: Stream, *place: int, count: int = 2) -> tuple[int, ...]:
    """`count` seeds in [0, 2³¹) for one place, e.g. (iteration, phase, slot)."""
    sequence = np.random.SeedSequence(run_seed, spawn_key=(int(stream), *place))
    return tuple(int(word) >> 1 for word in sequence.generate_state(count, np.uint32))


def make_rng(run_seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """A NumPy generator for one place."""
    return np.random.default_rng(np.random.SeedSequence(run_seed, spawn_key=(int(stream), *place)))

"""Point estimates and bootstrap intervals for few runs and many tasks.

Every function is deterministic: equal data and equal seed give equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

Estimate: TypeAlias = tuple[Any, tuple[Any, Any]]
"""An estimate and the ends (low, high) of its interval, each a number or an array."""


def mean_ci(
    x: ArrayLike, seed: int = 0, confidence: float = 0.95, resamples: int = 2000
) -> Estimate:
    """Mean over the first axis and its percentile bootstrap interval, (mean, (low, high)).

    The rows of x [n, …] are drawn with replacement, n at a time, `resamples` times; rows stay
    whole, so that all columns of an adaptation curve come from the same draws. The results have
    the shape […]: numbers for x [n]. A single row says nothing of the spread: its interval has
    no width.

    Raises:
        ValueError: x is empty or holds NaN or infinity, or an argument is out of range.
    """
    values = _checked(x, confidence, resamples)
    n = len(values)
    # How often each row is drawn is all that a mean depends on.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples)
    means = np.tensordot(counts / n, values, axes=1)
    return values.mean(0), _percentiles(means, confidence)


def iqm(x: ArrayLike) -> float:
    """Interquartile mean: the mean of what is left without the lowest and the highest quarter.

    Of n values ⌊n/4⌋ are cut at either end, whatever the shape of x. Agarwal et al. (2021), "Deep
    Reinforcement Learning at the Edge of the Statistical Precipice", section 4.3.

    Raises:
        ValueError: x is empty or holds NaN or infinity.
    """
    values = np.sort(_finite(x), axis=None)
    cut = values.size // 4
    return float(values[cut : values.size - cut].mean())


def iqm_ci(
    x: ArrayLike, seed: int = 0, confidence: float = 0.95, resamples: int = 2000
) -> Estimate:
    """`iqm` over the first axis and its percentile bootstrap interval; else as `mean_ci`."""
    values = _checked(x, confidence, resamples)
    n = len(values)
    cut = n // 4
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))

    def middle(rows: Floats) -> Floats:
        mean: Floats = np.sort(rows, axis=-1)[..., cut : n - cut].mean(-1)
        return mean

    columns = np.moveaxis(values, 0, -1).reshape(-1, n)
    # One column at a time: all resamples of all columns would not fit memory.
    means = np.stack([middle(column[drawn]) for column in columns], axis=-1)
    low, high = _percentiles(means.reshape(resamples, *values.shape[1:]), confidence)
    return middle(np.moveaxis(values, 0, -1)), (low, high)


def probability_of_improvement(
    x: ArrayLike,
    y: ArrayLike,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, tuple[float, float]]:
    """Probability that a run of x [n] is above one of y [m], and its bootstrap interval.

    Of all n·m pairs the share in which x is larger, equal ones counting half; the runs of x and of
    y are drawn with replacement, independently. Agarwal et al. (2021), section 4.3.

    Raises:
        ValueError: x or y is not one-dimensional, is empty or holds NaN or infinity, or an
            argument is out of range.
    """
    ours, theirs = (_checked(side, confidence, resamples) for side in (x, y))
    if ours.ndim != 1 or theirs.ndim != 1:
        raise ValueError(f"runs must be [n] and [m] but have shapes {ours.shape}, {theirs.shape}")
    gap = ours[:, None] - theirs
    above = (gap > 0) + 0.5 * (gap == 0)
    rng = np.random.default_rng(seed)
    n, m = above.shape
    # How often each run is drawn is all that the share depends on.
    our_counts = rng.multinomial(n, np.full(n, 1.0 / n), size=resamples)
    their_counts = rng.multinomial(m, np.full(m, 1.0 / m), size=resamples)
    drawn = ((our_counts @ above) * their_counts).sum(1) / (n * m)
    low, high = _percentiles(drawn, confidence)
    return float(above.mean()), (float(low), float(high))


def stratified_bootstrap(
    scores: ArrayLike,
    statistic: Callable[[Floats], float] = iqm,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, tuple[float, float]]:
    """A statistic of scores [runs, tasks] and its interval, (estimate, (low, high)).

    Runs are drawn with replacement within each task, independently between tasks, which keeps
    every task in every resample. Agarwal et al. (2021), section 4.2.

    Args:
        scores: one row per run.
        statistic: maps an array [runs, tasks] to a number.
        seed: of the resampling.
        confidence: the interval's nominal coverage, in (0, 1).
        resamples: how many.

    Raises:
        ValueError: scores is not two-dimensional, is empty or holds NaN or infinity, or an
            argument is out of range.
    """
    values = _checked(scores, confidence, resamples)
    if values.ndim != 2:
        raise ValueError(f"scores must be [runs, tasks] but have shape {values.shape}")
    runs, tasks = values.shape
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [
            statistic(values[rng.integers(runs, size=(runs, tasks)), np.arange(tasks)])
            for _ in range(resamples)
        ]
    )
    low, high = _percentiles(drawn, confidence)
    return float(statistic(values)), (float(low), float(high))


def _percentiles(samples: Floats, confidence: float) -> tuple[Any, Any]:
    """The ends of the central interval that holds the share `confidence` of axis 0."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(samples, [tail, 1.0 - tail], axis=0)
    return low, high


def _checked(x: ArrayLike, confidence: float, resamples: int) -> Floats:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} must lie between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples {resamples} must be at least 1")
    values = _finite(x)
    if values.ndim == 0:
        raise ValueError("an interval needs a sequence of values but got a single number")
    return values


def _finite(x: ArrayLike) -> Floats:
    values = np.asarray(x, np.float64)
    if values.size == 0:
        raise ValueError(f"no values: the array is empty, of shape {values.shape}")
    nans, infinities = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if nans or infinities:
        raise ValueError(f"of {values.size} values {nans} are NaN and {infinities} are infinite")
    return values


def landmarks(num: int) -> list[int]:
    """Which of `num` rows are shown: all up to 20 of them, else 0, 1, 2, 4, 8, … and the last."""
    if num <= 20:
        return list(range(num))
    return [0, *(2**i for i in range(num.bit_length()) if 2**i < num - 1), num - 1]

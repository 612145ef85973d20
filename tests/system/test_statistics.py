import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from system.statistics import (
    iqm,
    iqm_ci,
    mean_ci,
    probability_of_improvement,
    stratified_bootstrap,
)

ARRAYS = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6))


def slow_iqm(values):
    rest = sorted(values)
    for _ in range(math.floor(0.25 * len(values))):
        rest = rest[1:-1]
    return sum(rest) / len(rest)


def slow_quantile(values, q):
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@given(ARRAYS)
def test_iqm_equals_a_slow_loop(x):
    assert iqm(x) == pytest.approx(slow_iqm(x.tolist()), rel=1e-9, abs=1e-6)


def test_iqm_by_hand():
    assert iqm([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert iqm([3.0]) == 3.0
    assert iqm([1.0, 2.0, 6.0]) == 3.0
    assert iqm(np.arange(8.0).reshape(2, 4)) == 3.5


@given(ARRAYS, st.randoms(use_true_random=False))
def test_iqm_ignores_order_and_stays_within_the_values(x, random):
    shuffled = x.tolist()
    random.shuffle(shuffled)
    assert iqm(shuffled) == iqm(x)
    assert x.min() - 1e-6 <= iqm(x) <= x.max() + 1e-6


@given(hnp.arrays(np.float64, st.integers(4, 30), elements=st.floats(-1e3, 1e3)))
def test_iqm_ignores_how_far_out_the_extremes_are(x):
    stretched = x.copy()
    stretched[np.argmax(x)] += 1e6
    assert iqm(stretched) == iqm(x)


def test_mean_ci_equals_a_slow_loop():
    x = np.random.default_rng(5).normal(size=(6, 2))
    counts = np.random.default_rng(11).multinomial(6, [1 / 6] * 6, size=40)
    means = [
        [sum(c * row[j] for c, row in zip(draw, x, strict=True)) / 6 for j in range(2)]
        for draw in counts
    ]
    mean, (low, high) = mean_ci(x, seed=11, confidence=0.8, resamples=40)
    for j in range(2):
        column = [row[j] for row in means]
        assert mean[j] == pytest.approx(x[:, j].mean())
        assert low[j] == pytest.approx(slow_quantile(column, 0.1))
        assert high[j] == pytest.approx(slow_quantile(column, 0.9))


@settings(deadline=None)
@given(ARRAYS, st.integers(0, 100))
def test_mean_ci_lies_within_the_values_and_repeats(x, seed):
    mean, (low, high) = mean_ci(x, seed, resamples=50)
    assert x.min() - 1e-6 <= low <= high <= x.max() + 1e-6
    assert mean == x.mean()
    assert mean_ci(x, seed, resamples=50) == (mean, (low, high))


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-100, 100)),
    st.floats(0.1, 10),
    st.floats(-10, 10),
)
def test_mean_ci_moves_and_stretches_with_the_data(x, scale, shift):
    _, (low, high) = mean_ci(x, resamples=50)
    _, (moved_low, moved_high) = mean_ci(scale * x + shift, resamples=50)
    assert moved_low == pytest.approx(scale * low + shift, abs=1e-8)
    assert moved_high == pytest.approx(scale * high + shift, abs=1e-8)


def test_mean_ci_shapes_and_plain_numbers():
    mean, (low, high) = mean_ci([1.0, 2.0, 3.0])
    assert all(isinstance(value, float) for value in (mean, low, high))
    assert low < mean < high
    mean, (low, high) = mean_ci(np.ones((4, 3, 2)))
    assert mean.shape == low.shape == high.shape == (3, 2)
    assert mean_ci([7.0]) == (7.0, (7.0, 7.0))


def test_iqm_ci_equals_a_slow_loop():
    x = np.random.default_rng(4).normal(size=(6, 2))
    drawn = np.random.default_rng(9).integers(6, size=(40, 6))
    middle, (low, high) = iqm_ci(x, seed=9, confidence=0.8, resamples=40)
    for j in range(2):
        column = [slow_iqm([x[i, j] for i in draw]) for draw in drawn]
        assert middle[j] == pytest.approx(slow_iqm(x[:, j].tolist()))
        assert low[j] == pytest.approx(slow_quantile(column, 0.1))
        assert high[j] == pytest.approx(slow_quantile(column, 0.9))


def test_iqm_ci_shapes():
    assert iqm_ci([7.0]) == (7.0, (7.0, 7.0))
    middle, (low, high) = iqm_ci(np.ones((5, 3, 2)), resamples=20)
    assert middle.shape == low.shape == high.shape == (3, 2)


def slow_improvement(x, y):
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]
    return sum(wins) / len(wins)


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 8), elements=st.integers(-3, 3)),
    hnp.arrays(np.float64, st.integers(1, 8), elements=st.integers(-3, 3)),
)
def test_probability_of_improvement_equals_a_slow_loop(x, y):
    probability, (low, high) = probability_of_improvement(x, y, seed=3, resamples=20)
    assert probability == pytest.approx(slow_improvement(x, y))
    rng = np.random.default_rng(3)
    counts = [rng.multinomial(len(side), [1 / len(side)] * len(side), size=20) for side in (x, y)]
    drawn = [
        slow_improvement(np.repeat(x, ours), np.repeat(y, theirs))
        for ours, theirs in zip(*counts, strict=True)
    ]
    assert low == pytest.approx(slow_quantile(drawn, 0.025))
    assert high == pytest.approx(slow_quantile(drawn, 0.975))


def test_probability_of_improvement_by_hand():
    assert probability_of_improvement([2.0, 3.0], [0.0, 1.0]) == (1.0, (1.0, 1.0))
    assert probability_of_improvement([0.0], [1.0]) == (0.0, (0.0, 0.0))
    assert probability_of_improvement([1.0, 1.0], [1.0]) == (0.5, (0.5, 0.5))
    assert probability_of_improvement([0.0, 2.0], [1.0, -1.0])[0] == 0.75
    with pytest.raises(ValueError, match=r"\[n\] and \[m\] but have shapes \(1, 2\), \(1,\)"):
        probability_of_improvement([[1.0, 2.0]], [1.0])


def test_the_interval_of_a_probability_covers_it():
    def interval(pair, seed):
        return probability_of_improvement(*pair, seed, resamples=200)[1]

    # Two normal samples whose means are as far apart as makes the probability 0.76.
    truth = 0.5 * (1.0 + math.erf(0.5))
    share = coverage(
        lambda rng: (rng.normal(1.0, 1.0, 20), rng.normal(0.0, 1.0, 20)), interval, truth
    )
    assert 0.88 <= share <= 0.99


def test_columns_share_their_draws():
    x = np.random.default_rng(0).normal(size=10)
    _, (low, high) = mean_ci(np.stack([x, 2 * x], axis=1))
    assert low[1] == pytest.approx(2 * low[0])
    assert high[1] == pytest.approx(2 * high[0])


def test_more_confidence_is_a_wider_interval():
    x = np.random.default_rng(1).normal(size=20)
    _, (low, high) = mean_ci(x, confidence=0.5)
    _, (lower, higher) = mean_ci(x, confidence=0.99)
    assert lower < low < high < higher


def coverage(draw, interval, truth, repetitions=400):
    rng = np.random.default_rng(2021)
    hits = 0
    for seed in range(repetitions):
        low, high = interval(draw(rng), seed)
        hits += low <= truth <= high
    return hits / repetitions


@pytest.mark.parametrize(("confidence", "least", "most"), [(0.95, 0.90, 0.98), (0.8, 0.73, 0.86)])
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(confidence, least, most):
    share = coverage(
        lambda rng: rng.normal(3.0, 2.0, size=40),
        lambda x, seed: mean_ci(x, seed, confidence, resamples=400)[1],
        truth=3.0,
    )
    assert least <= share <= most


def test_the_stratified_interval_covers_the_mean_over_tasks():
    offsets = np.array([-100.0, 0.0, 50.0])
    share = coverage(
        lambda rng: rng.normal(size=(20, 3)) + offsets,
        lambda x, seed: stratified_bootstrap(x, lambda s: float(s.mean()), seed, resamples=100)[1],
        truth=float(offsets.mean()),
        repetitions=200,
    )
    assert 0.88 <= share <= 0.99


def test_stratified_resamples_within_each_task():
    seen = []

    def record(scores):
        seen.append(scores.copy())
        return float(scores.mean())

    scores = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    estimate, (low, high) = stratified_bootstrap(scores, record, resamples=200)
    assert estimate == 11.0
    assert low < estimate < high
    assert all(set(s[:, 0]) <= {1, 2, 3} and set(s[:, 1]) <= {10, 20, 30} for s in seen)
    # Tasks are drawn independently: the rows that they come from differ.
    assert any(not np.array_equal(s[:, 0] * 10, s[:, 1]) for s in seen)


def test_stratified_equals_a_slow_loop():
    scores = np.random.default_rng(3).normal(size=(4, 5))
    rng = np.random.default_rng(8)
    drawn = []
    for _ in range(30):
        index = rng.integers(4, size=(4, 5))
        drawn.append(slow_iqm([scores[index[r, t], t] for r in range(4) for t in range(5)]))
    estimate, (low, high) = stratified_bootstrap(scores, seed=8, confidence=0.9, resamples=30)
    assert estimate == pytest.approx(slow_iqm(scores.ravel().tolist()))
    assert low == pytest.approx(slow_quantile(drawn, 0.05))
    assert high == pytest.approx(slow_quantile(drawn, 0.95))


def test_a_task_without_spread_adds_none():
    scores = np.stack([np.full(5, 7.0), np.full(5, 9.0)], axis=1)
    assert stratified_bootstrap(scores, resamples=20) == (8.0, (8.0, 8.0))


def test_inputs_are_not_changed():
    x = np.array([[3.0, 1.0], [2.0, 5.0]])
    before = x.copy()
    iqm(x)
    mean_ci(x, resamples=5)
    iqm_ci(x, resamples=5)
    stratified_bootstrap(x, resamples=5)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("function", [iqm, iqm_ci, mean_ci, stratified_bootstrap])
def test_bad_values_are_counted(function):
    with pytest.raises(ValueError, match="2 are NaN and 1 are infinite"):
        function([[1.0, np.nan], [np.nan, np.inf]])
    with pytest.raises(ValueError, match=r"no values.*\(0, 3\)"):
        function(np.zeros((0, 3)))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"confidence 95"):
        mean_ci([1.0], confidence=95)
    with pytest.raises(ValueError, match="resamples 0"):
        mean_ci([1.0], resamples=0)
    with pytest.raises(ValueError, match="single number"):
        mean_ci(3.0)
    with pytest.raises(ValueError, match=r"\[runs, tasks\] but have shape \(2,\)"):
        stratified_bootstrap([1.0, 2.0])

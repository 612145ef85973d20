"""The classical opponents of RL² at Bernoulli bandits (Duan et al. 2016, arXiv 1611.02779).

Every opponent plays all N trials at once, in numpy. Rewards are totals of a trial. Where the paper
leaves something open (ties, constants), the choice here is the one that earns the paper's own
figures, `actors.opponents.PAPER`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from actors.opponents import BANDIT_OPPONENTS, check_names, check_whole

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

UCB1_SCALE = 0.2
"""Best of 0.05 … 0.25 for 100 and 500 pulls; for 10 pulls all of them earn the same."""

BANDIT_EPSILON = 0.05
"""Best of 0.02, 0.05, 0.1 for 500 pulls; for fewer, all are within sampling error."""

OPTIMISTIC_SAMPLES = 20
"""Of 5, 10, 20, the one that earns the paper's figures (67.7 of 100 pulls of 50 arms)."""

GITTINS_GRID = 64
"""Retirement rewards at which the values are exact; indices between are interpolated."""

MAX_STATES = 2_000_000
"""States that `bayes_optimum` solves: half a gigabyte and two to three minutes."""


def play_bandits(
    means: Floats, num_pulls: int, seed: int, names: Sequence[str] = BANDIT_OPPONENTS
) -> dict[str, Ints]:
    """Total reward of every trial, by opponent.

    All believe Beta(1, 1) of each arm before they pull it. Equal scores go to the first arm: greedy
    then earns 77.8 of 100 pulls of 10 arms, near the paper's 77.1; with ties broken at random it
    earns two more. An opponent's play depends on the seed and its name alone, and all of them meet
    the same luck: pull t of trial i pays if the same draw is below the mean of the arm pulled.

    For 1,000 trials of 500 pulls, "gittins" first needs half a minute for its indices, and
    "optimistic-thompson" of 50 arms a minute and a half.

    Args:
        means: the arms' probabilities of paying 1, [N, k].
        num_pulls: pulls of a trial.
        seed: decides the luck and the opponents' own draws.
        names: which opponents play, of `BANDIT_OPPONENTS`.

    Returns:
        Totals, [N] each.

    Raises:
        ValueError: unknown name, wrong shape, a mean outside [0, 1], or no pull.
    """
    means = np.asarray(means, dtype=np.float64)
    check_names(names, BANDIT_OPPONENTS)
    check_whole("num_pulls", num_pulls)
    if means.ndim != 2 or 0 in means.shape:
        raise ValueError(f"means must be [trials, arms], not of shape {list(means.shape)}")
    if not ((means >= 0.0) & (means <= 1.0)).all():
        raise ValueError("the means of Bernoulli arms must lie in [0, 1]")
    return {name: _play_bandit(means, num_pulls, seed, name) for name in names}


def _play_bandit(means: Floats, num_pulls: int, seed: int, name: str) -> Ints:
    score = _BANDIT_SCORES[name]
    luck = np.random.default_rng([seed, 0])
    own = np.random.default_rng([seed, 1 + BANDIT_OPPONENTS.index(name)])
    trial = np.arange(len(means))
    wins = np.zeros(means.shape, dtype=np.int64)
    losses = np.zeros_like(wins)
    for _ in range(num_pulls):
        arm = score(wins, losses, num_pulls, own).argmax(1)
        paid = luck.random(len(means)) < means[trial, arm]
        wins[trial, arm] += paid
        losses[trial, arm] += ~paid
    total: Ints = wins.sum(1)
    return total


def _posterior_mean(wins: Ints, losses: Ints) -> Floats:
    mean: Floats = (wins + 1) / (wins + losses + 2)
    return mean


def _random(wins: Ints, losses: Ints, num_pulls: int, rng: np.random.Generator) -> Floats:
    return rng.random(wins.shape)


def _gittins(wins: Ints, losses: Ints, num_pulls: int, rng: np.random.Generator) -> Floats:
    """The index for the pulls that are left."""
    left = num_pulls - int(wins[0].sum() + losses[0].sum())
    return gittins_indices(num_pulls)[left - 1][wins, losses].astype(np.float64)


def _thompson(wins: Ints, losses: Ints, num_pulls: int, rng: np.random.Generator) -> Floats:
    """A sample of the posterior (Thompson 1933)."""
    return rng.beta(wins + 1, losses + 1)


def _optimistic_thompson(
    wins: Ints, losses: Ints, num_pulls: int, rng: np.random.Generator
) -> Floats:
    """Of several samples of all arms' means, the one of highest posterior density.

    Of several readings of "optimistic", the one that earns the paper's figures. The larger of
    sample and posterior mean (May et al. 2012) earns far less: 78.0, not 81.4, of 100 pulls of 10
    arms.
    """
    shape = (OPTIMISTIC_SAMPLES, *wins.shape)
    sample = rng.beta(np.broadcast_to(wins + 1, shape), np.broadcast_to(losses + 1, shape))
    inside = np.clip(sample, 1e-12, 1.0 - 1e-12)
    log_density = (wins * np.log(inside) + losses * np.log1p(-inside)).sum(2)
    likeliest: Floats = sample[log_density.argmax(0), np.arange(len(wins))]
    return likeliest


def _ucb1(wins: Ints, losses: Ints, num_pulls: int, rng: np.random.Generator) -> Floats:
    """μ̂ + c √(2 log t / T) (Auer et al. 2002), t and T counting two pulls more, as the prior."""
    pulls = wins + losses + 2
    clock = (wins + losses).sum(1, keepdims=True) + 2
    bonus: Floats = UCB1_SCALE * np.sqrt(2.0 * np.log(clock) / pulls)
    return _posterior_mean(wins, losses) + bonus


def _epsilon_greedy(wins: Ints, losses: Ints, num_pulls: int, rng: np.random.Generator) -> Floats:
    explores = rng.random((len(wins), 1)) < BANDIT_EPSILON
    return np.where(explores, rng.random(wins.shape), _posterior_mean(wins, losses))


def _greedy(wins: Ints, losses: Ints, num_pulls: int, rng: np.random.Generator) -> Floats:
    return _posterior_mean(wins, losses)


_BANDIT_SCORES: dict[str, Callable[[Ints, Ints, int, np.random.Generator], Floats]] = {
    "random": _random,
    "gittins": _gittins,
    "thompson": _thompson,
    "optimistic-thompson": _optimistic_thompson,
    "ucb1": _ucb1,
    "epsilon-greedy": _epsilon_greedy,
    "greedy": _greedy,
}


@cache
def gittins_indices(num_pulls: int) -> tuple[NDArray[np.float32], ...]:
    """Finite-horizon, undiscounted Gittins indices of a Bernoulli arm with prior Beta(1, 1).

    The index with m pulls left is the reward λ per pull for which retiring at once, to earn m λ,
    is worth as much as pulling at least once and retiring when one likes:
        D_m(λ) = μ − λ + E max(0, D_{m−1}(λ)),  D_0 = 0,  index = the λ at which D_m(λ) = 0,
    with μ = (wins + 1) / (wins + losses + 2). D is computed exactly at `GITTINS_GRID` values of λ;
    it is convex and falls in λ, and its zero is interpolated. For 500 pulls this takes about half a
    minute and keeps 170 MB.

    Args:
        num_pulls: pulls of a trial.

    Returns:
        For m = 1 … num_pulls, at m − 1: indices by wins and losses, [n + 1 − m, n + 1 − m], right
        where wins + losses ≤ n − m. Kept for the process, and not to be written to.

    Source: Kaufmann 2018, "On Bayesian index policies for sequential resource allocation";
    Lattimore 2016, "Regret analysis of the finite-horizon Gittins index strategy for multi-armed
    bandits".
    """
    grid = np.linspace(0.0, 1.0, GITTINS_GRID, dtype=np.float32)
    seen = np.arange(num_pulls + 1)
    mean = _posterior_mean(seen[:, None], seen[None, :]).astype(np.float32)
    value = np.zeros((len(grid), num_pulls + 1, num_pulls + 1), dtype=np.float32)
    tables = []
    for left in range(1, num_pulls + 1):
        size = num_pulls + 1 - left
        paid = mean[:size, :size]
        gain = np.empty((len(grid), size, size), dtype=np.float32)
        for row, retired in enumerate(grid):
            lost = value[row, :size, 1 : size + 1]
            gain[row] = paid * (value[row, 1 : size + 1, :size] - lost) + lost + paid - retired
        tables.append(_zero_crossing(grid, gain))
        value = np.maximum(gain, 0.0, out=gain)
    return tuple(tables)


def _zero_crossing(grid: NDArray[np.float32], falling: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where each column of `falling`, [grid, …], passes from above 0 to 0 or less."""
    below = ((falling > 0.0).sum(0) - 1).clip(0, len(grid) - 2)[None]
    high = np.take_along_axis(falling, below, 0)[0]
    low = np.take_along_axis(falling, below + 1, 0)[0]
    crossing: NDArray[np.float32] = grid[below[0]] + (grid[1] - grid[0]) * (
        high / (high - low)
    ).clip(0.0, 1.0)
    crossing.setflags(write=False)
    return crossing


def bayes_optimum(num_arms: int, num_pulls: int) -> float:
    """The most that any player can earn on average from Bernoulli arms with means U[0, 1].

    Backward induction over the multisets of pulled arms' (wins, losses), unpulled arms being alike.

    Raises:
        ValueError: fewer than two arms, no pull, or more than `MAX_STATES` states.
    """
    check_whole("num_arms", num_arms, lowest=2)
    check_whole("num_pulls", num_pulls)
    count = _count_states(num_arms, num_pulls)
    if count > MAX_STATES:
        raise ValueError(
            f"{num_pulls} pulls of {num_arms} arms lead through at least {count:.2g} states, and "
            f"bayes_optimum solves at most {MAX_STATES:,}; ask for fewer pulls or arms, or play "
            '"gittins", which is close to the optimum'
        )
    layers: list[set[_Arms]] = [{()}]
    for _ in range(num_pulls - 1):
        layers.append(
            {s for arms in layers[-1] for _, *after in _pulls(arms, num_arms) for s in after}
        )
    value: dict[_Arms, float] = {}
    for layer in reversed(layers):
        value = {
            arms: max(
                mean * (1.0 + value.get(won, 0.0)) + (1.0 - mean) * value.get(lost, 0.0)
                for mean, won, lost in _pulls(arms, num_arms)
            )
            for arms in layer
        }
    return value[()]


_Arms = tuple[tuple[int, int], ...]


def _pulls(arms: _Arms, num_arms: int) -> list[tuple[float, _Arms, _Arms]]:
    """Each different pull: its chance to pay, and the sorted arms after it paid or did not."""
    options = [
        (arm, arms[:i] + arms[i + 1 :])
        for i, arm in enumerate(arms)
        if i == 0 or arm != arms[i - 1]
    ]
    if len(arms) < num_arms:
        options.append(((0, 0), arms))
    return [
        (
            (wins + 1) / (wins + losses + 2),
            tuple(sorted((*others, (wins + 1, losses)))),
            tuple(sorted((*others, (wins, losses + 1)))),
        )
        for (wins, losses), others in options
    ]


def _count_states(num_arms: int, num_pulls: int) -> float:
    """How many multisets of pulled arms are met before the last pull.

    Beyond 200 pulls even two arms have too many, so that no more are counted. Of arms pulled p
    times there are p + 1 kinds, and c of those make C(p + c, c) multisets.
    """
    pulls = min(num_pulls, 200)
    by_arms_and_pulls = np.zeros((num_arms + 1, pulls))
    by_arms_and_pulls[0, 0] = 1.0
    for p in range(1, pulls):
        longer = np.zeros_like(by_arms_and_pulls)
        for c in range(min(num_arms, (pulls - 1) // p) + 1):
            fewer = by_arms_and_pulls[: num_arms + 1 - c, : pulls - c * p]
            longer[c:, c * p :] += math.comb(p + c, c) * fewer
        by_arms_and_pulls = longer
    return float(by_arms_and_pulls.sum())

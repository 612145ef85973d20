"""Curves of several runs: which belong together, on which grid, and how they compare.

Runs whose settings differ in nothing but the seed are one group. Each of them is an independent
run, and so is each replica of a run that has several. Groups on one task share a panel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from learners.core.errors import ConfigError
from system.config import MAY_CHANGE, flat, from_dict, to_dict
from system.records import Records, Sample, numbers
from system.statistics import Estimate, iqm_ci, mean_ci, probability_of_improvement

RETURN = "return of an episode"
ONLINE = {"rollout/ep_rew_mean": RETURN, "rollout/value_error": "mean squared error of the values"}
"""What is drawn of a method that does not adapt, by preference, and what it is called."""

ADAPT, EVAL = "adapt/ep_rew_mean_", "eval/ep_rew_mean_"
MAX_POINTS = 500
"""Of a curve."""

MAX_SETTINGS, MAX_LABEL = 2, 30
"""Settings, and characters of them, that a label may tell groups of one preset apart by."""

MAX_PAIRS = 6
"""Pairs of groups that are compared; where there are more, each is compared with the first."""

NEARLY = 0.95
"""Share of a group's longest run below which a shorter one is named."""


def estimate(values: np.ndarray, statistic: str) -> Estimate:
    """The "mean" or "iqm" over runs of values [n, …] and its 95 % bootstrap interval."""
    return {"mean": mean_ci, "iqm": iqm_ci}[statistic](values)


@dataclass(frozen=True)
class Curve:
    """A metric of n independent runs over environment steps."""

    steps: np.ndarray
    """[T], ascending."""
    values: np.ndarray
    """[n, T]"""

    def at(self, step: float) -> np.ndarray:
        """The values [n] after so many steps, of which the curve must have heard."""
        return np.array([np.interp(step, self.steps, row) for row in self.values])


@dataclass(frozen=True)
class Adaptation:
    """What the last evaluation found after k updates, episodes or tenths of a lifetime."""

    unit: str
    """Of k; empty where it is unknown."""
    k: np.ndarray
    """[K]"""
    middle: np.ndarray
    """[K]"""
    interval: tuple[np.ndarray, np.ndarray] | None
    """Ends [K]: over runs, or over the tasks of a single one."""
    over: str
    """What the interval is over."""


@dataclass(frozen=True)
class Series:
    """What is drawn of one group."""

    label: str
    after: Curve
    before: Curve | None = None
    """Without adaptation, where `after` is with it."""
    k: int | None = None
    """How often `after` has adapted."""
    adaptation: Adaptation | None = None
    replicas: bool = False
    """Whether the steps are those of one replica."""


@dataclass(frozen=True)
class Improvement:
    """Probability that a run of one group ends above a run of another."""

    label: str
    other: str
    step: float
    """Where they are compared: the last step that both have."""
    probability: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """The groups of one task."""

    task: str
    quantity: str
    """What the curves show."""
    series: tuple[Series, ...]
    improvements: tuple[Improvement, ...]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: tuple[Records, ...]


# --- Which runs belong together ---


def settings(run: Records) -> dict[str, Any]:
    """What decides what a run learns, its seed aside; empty where the configuration is unknown."""
    values: Mapping[str, Any] = run.config
    # What another version of metaloop wrote may lack fields, or have others.
    with suppress(ConfigError, KeyError, TypeError):
        values = to_dict(from_dict(run.config))
    apart = (*MAY_CHANGE, "seed")
    return {n: value for n, value in flat(values).items() if n.split(".")[0] not in apart}


def grouped(runs: Sequence[Records]) -> list[Group]:
    """Runs by preset and settings, in the order of their first."""
    found: dict[str, list[Records]] = {}
    for run in runs:
        found.setdefault(json.dumps([run.method, settings(run)], sort_keys=True), []).append(run)
    groups = list(found.values())
    return [Group(label(own, groups), tuple(own)) for own in groups]


def label(own: Sequence[Records], groups: Sequence[Sequence[Records]]) -> str:
    """The preset, and what tells a group from others of it: settings, a folder, or its path."""
    first = own[0]
    rivals = [other[0] for other in groups if other[0].method == first.method]
    if len(rivals) == 1:
        return first.method
    all_settings = [settings(rival) for rival in rivals]
    names = dict.fromkeys(name for values in all_settings for name in values)
    differing = [n for n in names if len({str(values.get(n)) for values in all_settings}) > 1]
    texts = [
        ", ".join(f"{n.rpartition('.')[2]} {values.get(n)}" for n in differing)
        for values in all_settings
    ]
    if differing and len(differing) <= MAX_SETTINGS and max(map(len, texts)) <= MAX_LABEL:
        return f"{first.method}, {texts[rivals.index(first)]}"
    folders = [rival.name_without_seed for rival in rivals]
    return first.name_without_seed if len(set(folders)) == len(folders) else first.place


def task_of(run: Records) -> tuple[str, str]:
    """The task family, and its options as text."""
    options = run.config.get("task_options") or {}
    return str(run.config.get("task", "")), ", ".join(f"{n} {v}" for n, v in options.items())


# --- Which metrics are drawn ---


@dataclass(frozen=True)
class Choice:
    """Metrics of a group."""

    quantity: str
    tag: str
    before: str | None = None
    k: int | None = None


def choose(runs: Sequence[Records], tag: str | None) -> Choice:
    """What is drawn of runs: `tag`, or else returns, with and without adaptation if there is any.

    Raises:
        ConfigError: a run lacks it; the message has the closest.
    """
    if tag is not None:
        for run in runs:
            run.check_tag(tag)
        return Choice(tag, tag)
    common = [t for t in runs[0].tags if all(t in run.tags for run in runs)]
    ks = numbers(common, ADAPT)
    if len(ks) > 1:
        return Choice(RETURN, f"{ADAPT}{ks[-1]}", f"{ADAPT}{ks[0]}", ks[-1])
    for online, quantity in ONLINE.items():
        if online in common:
            return Choice(quantity, online)
    ks = numbers(common, EVAL)
    if ks:
        return Choice(RETURN, f"{EVAL}{ks[-1]}", f"{EVAL}{ks[0]}" if len(ks) > 1 else None, ks[-1])
    for run in runs:
        run.check_tag(next(iter(ONLINE)))
    raise ConfigError(f"{', '.join(run.place for run in runs)} have no metric in common")


# --- What they show ---


def on_common_grid(samples: Sequence[Sample]) -> Curve:
    """Interpolates runs on the steps that all of them have.

    Raises:
        ConfigError: there are no such steps.
    """
    low = max(steps[0] for steps, _ in samples)
    high = min(steps[-1] for steps, _ in samples)
    if low > high:
        raise ConfigError(
            f"runs of one curve share no environment steps: one begins at {low:,.0f}, another "
            f"ends at {high:,.0f}"
        )
    longest = max(len(steps) for steps, _ in samples)
    grid = np.linspace(low, high, min(longest, MAX_POINTS) if high > low else 1)
    return Curve(grid, np.array([np.interp(grid, *sample) for sample in samples]))


def curve(runs: Sequence[Records], tag: str) -> Curve:
    """A metric of all runs, or of all their replicas."""
    return on_common_grid([sample for run in runs for sample in run.samples(tag)])


def evaluated(run: Records) -> list[dict[str, Any]]:
    """Rows with "k" and "mean" of a run's last evaluation, of its file or of the metrics."""
    rows: list[dict[str, Any]] = run.evaluation.get("adapt", [])
    last = {k: run.series(f"{EVAL}{k}")[1][-1] for k in numbers(run.tags, EVAL)}
    return rows or [{"k": k, "mean": mean} for k, mean in last.items()]


def adaptation(runs: Sequence[Records], statistic: str) -> Adaptation | None:
    """The adaptation curve of a group; None where a run has none, or of no more than one point."""
    found = [{row["k"]: row for row in evaluated(run)} for run in runs]
    ks = sorted(set.intersection(*map(set, found)))
    if len(ks) < 2:
        return None
    unit = runs[0].evaluation.get("unit", "inner updates") if runs[0].evaluation else ""
    if len(runs) > 1:
        means = np.array([[rows[k]["mean"] for k in ks] for rows in found])
        middle, interval = estimate(means, statistic)
        return Adaptation(unit, np.array(ks), middle, interval, f"{len(runs)} runs")
    rows = [found[0][k] for k in ks]
    middle = np.array([row.get(statistic, row["mean"]) for row in rows])
    ends = None
    if statistic == "mean" and all("ci95" in row for row in rows):
        low, high = np.array([row["ci95"] for row in rows]).T
        ends = (low, high)
    return Adaptation(unit, np.array(ks), middle, ends, "tasks")


def improvements(series: Sequence[Series]) -> tuple[Improvement, ...]:
    """Pairs of groups of more than one run each, compared where the shorter one ends."""
    pairs = list(combinations([each for each in series if len(each.after.values) > 1], 2))
    if len(pairs) > MAX_PAIRS:
        pairs = [pair for pair in pairs if pair[0] is pairs[0][0]]
    found = []
    for one, other in pairs:
        step = min(one.after.steps[-1], other.after.steps[-1])
        if step >= max(one.after.steps[0], other.after.steps[0]):
            ends = one.after.at(step), other.after.at(step)
            chance, interval = probability_of_improvement(*ends)
            found.append(Improvement(one.label, other.label, float(step), chance, interval))
    return tuple(found)


def panels(
    groups: Sequence[Group], tag: str | None = None, statistic: str = "mean"
) -> tuple[Panel, ...]:
    """One panel for each task and what is drawn of its runs, in the order of the groups.

    Args:
        groups: of which to draw.
        tag: the metric; by default returns, for methods that adapt without and with it.
        statistic: "mean" or "iqm".

    Raises:
        ConfigError: a run lacks what is to be drawn.
    """
    rows: dict[tuple[tuple[str, str], str], list[Series]] = {}
    for group in groups:
        runs, choice = group.runs, choose(group.runs, tag)
        drawn = Series(
            group.label,
            curve(runs, choice.tag),
            curve(runs, choice.before) if choice.before else None,
            choice.k,
            adaptation(runs, statistic) if tag is None else None,
            any(run.replica_tags(choice.tag) for run in runs),
        )
        rows.setdefault((task_of(runs[0]), choice.quantity), []).append(drawn)
    names = [name for (name, _), _ in rows]
    return tuple(
        Panel(
            f"{name} ({options})" if options and names.count(name) > 1 else name,
            quantity,
            tuple(series),
            improvements(series),
        )
        for ((name, options), quantity), series in rows.items()
    )


def remarks(groups: Sequence[Group], tag: str | None = None) -> list[str]:
    """What a reader of the curves should know of the runs behind them."""
    said = []
    for group in groups:
        choice = choose(group.runs, tag)
        ends = {run.place: run.series(choice.tag)[0][-1] for run in group.runs}
        shortest = min(ends, key=lambda place: ends[place])
        if ends[shortest] < NEARLY * max(ends.values()):
            said.append(
                f"{group.label}: the curve ends after {ends[shortest]:,.0f} steps, where "
                f"{shortest} does"
            )
        seeds = [run.config.get("seed") for run in group.runs if run.config]
        if len(set(seeds)) < len(seeds):
            said.append(f"{group.label}: runs of one seed count as independent runs")
    return said

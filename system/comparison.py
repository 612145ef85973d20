"""What others earn on the trials of an evaluation: classical methods, and the paper's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.family import Task, TaskFamily
from actors.opponents import PAPER
from actors.opponents.bandits import bayes_optimum, play_bandits
from actors.opponents.mdps import mdp_optimum, play_mdps
from actors.tasks.bandit import Bandit
from actors.tasks.tabular_mdp import TabularMDP
from actors.tasks.trials import Trials
from system.evaluation import interval


def compare(family: TaskFamily, tasks: Sequence[Task], seed: int) -> dict[str, Any]:
    """Opponents and bounds on these very tasks, where there are any for the family.

    Returns:
        {} where none are known; else "opponents" and "bounds", each name → {"mean", "ci95"} of the
        total reward of a trial, and "paper", name → the mean that Duan et al. 2016 report. "rl2" is
        among the last. The bound "known task" is what the best player earns who knows the task,
        "bayes optimum", where it can be computed, the most that anyone can earn who does not.
    """
    if not isinstance(family, Trials):
        return {}
    inner, num_episodes = family.family, family.episodes
    if isinstance(inner, Bandit) and inner.pulls == 1:
        means = inner.means(tasks)
        bounds: dict[str, Any] = {"known task": interval(num_episodes * means.max(1))}
        try:
            optimum = bayes_optimum(inner.arms, num_episodes)
            bounds["bayes optimum"] = {"mean": optimum, "ci95": [optimum, optimum]}
        except ValueError:
            pass  # too many states
        earned: Mapping[str, np.ndarray] = play_bandits(means, num_episodes, seed)
        paper = PAPER["bandit"].get((num_episodes, inner.arms), {})
    elif isinstance(inner, TabularMDP):
        reward, transition = inner.tables(tasks)
        best = mdp_optimum(reward, transition, num_episodes, inner.horizon)
        bounds = {"known task": interval(best)}
        earned = play_mdps(reward, transition, num_episodes, inner.horizon, seed)
        paper = PAPER["tabular-mdp"].get(num_episodes, {}) if inner == TabularMDP() else {}
    else:
        return {}
    return {
        "opponents": {name: interval(totals) for name, totals in earned.items()},
        "bounds": bounds,
        "paper": paper,
    }


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The run beside its opponents; nothing where the result has none."""
    if "opponents" not in result:
        return
    title = f"{result['preset']}: total reward of {result['tasks']} trials"
    table = Table(title=title)
    for name in ("method", "mean", "95 % interval", "paper, 1,000 trials"):
        table.add_column(name, justify="left" if name == "method" else "right")
    rows = {"rl2": result["trial_return"], **result["opponents"], **result["bounds"]}
    for name, row in rows.items():
        low, high = row["ci95"]
        said = result["paper"].get(name)
        shown = f"[{low:.3f}, {high:.3f}]" if high > low else "exact"
        table.add_row(name, f"{row['mean']:.3f}", shown, "" if said is None else f"{said:.1f}")
    (console or Console()).print(table)

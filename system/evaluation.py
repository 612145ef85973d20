"""What an evaluation found: the adaptation curve, as numbers, as JSON and as a table.

A lifetime in a part of which no episode ended has NaN there. It is left out of what is said of that
part, and a part in which nobody's episode ended is left out itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.family import Task
from learners.core.trajectory import Metrics
from system.statistics import iqm, landmarks, mean_ci


def summarise(
    preset: str,
    tasks: Sequence[Task],
    curve: np.ndarray,
    held_out: bool,
    replicas: bool = False,
    worlds: Sequence[str] = (),
    trials: bool = False,
) -> dict[str, Any]:
    """The object that `evaluate --json` prints.

    Args:
        preset: the run's preset.
        tasks: M tasks.
        curve: mean raw return of each task after 0 … K inner updates, [M, K+1]; NaN where none.
        held_out: whether training could not have drawn these tasks; where it could, there are
            only a few, and each is reported apart under "groups".
        replicas: whether the members are independent runs of one method on their own tasks.
        worlds: names of the kinds of environment of lifetimes, each of which is reported apart;
            the curve is then over tenths of a lifetime.
        trials: whether the curve is over the episodes of a trial.
    """
    if worlds and not replicas:
        return summarise_lifetimes(preset, tasks, curve, worlds)
    result: dict[str, Any] = {
        "preset": preset,
        "tasks": len(tasks),
        "held_out": held_out,
        "adapt": adaptation(curve),
        "gain": gain(curve[:, [0, -1]] if trials else curve),
    }
    if trials:
        return result | {"unit": "episodes before", "trial_return": interval(curve.sum(1))}
    if replicas:
        return result | {"replicas": len(tasks), "held_out": False}
    if not held_out:
        result["groups"] = [group(tasks, curve, key) for key in sorted(set(map(task_key, tasks)))]
    else:
        result["per_task"] = [
            {"task": dict(task), "returns": [None if np.isnan(x) else x for x in row.tolist()]}
            for task, row in zip(tasks, curve, strict=True)
            if len(json.dumps(dict(task))) < 200
        ]
    return result


def summarise_lifetimes(
    preset: str, tasks: Sequence[Task], curve: np.ndarray, worlds: Sequence[str]
) -> dict[str, Any]:
    """`summarise` of lifetimes: what a tenth is to them, an inner update is to others."""

    def of(rows: np.ndarray) -> dict[str, Any]:
        return {"adapt": adaptation(rows), "gain": gain(rows[:, [0, -1]])}

    groups = []
    for number, name in enumerate(worlds):
        rows = curve[[task["world"] == number for task in tasks]]
        groups.append({"task": {"world": name}, "members": len(rows), **of(rows)})
    whole = {"preset": preset, "tasks": len(tasks), "held_out": True, "unit": "tenths of a life"}
    return whole | of(curve) | {"groups": groups}


def group(tasks: Sequence[Task], curve: np.ndarray, key: str) -> dict[str, Any]:
    """One of a few tasks, over the members that had it."""
    rows = curve[[task_key(task) == key for task in tasks]]
    adapt = adaptation(rows)
    return {"task": json.loads(key), "members": len(rows), "adapt": adapt, "gain": gain(rows)}


def task_key(task: Task) -> str:
    """A task as text."""
    return json.dumps(dict(task), sort_keys=True)


def adaptation(curve: np.ndarray) -> list[dict[str, Any]]:
    """Mean, interquartile mean and 95 % interval after each number of inner updates."""
    columns = [(k, known(column)) for k, column in enumerate(curve.T)]
    return [{"k": k, **interval(own), "iqm": iqm(own)} for k, own in columns if own.size]


def gain(curve: np.ndarray) -> dict[str, Any] | None:
    """What the first update brings those tasks that have a return on both sides of it."""
    gains = known(curve[:, 1] - curve[:, 0]) if curve.shape[1] > 1 else curve[:0, 0]
    return interval(gains) if gains.size else None


def known(values: np.ndarray) -> np.ndarray:
    """Those that are not NaN; an infinite one stays, and is refused."""
    there: np.ndarray = values[~np.isnan(values)]
    return there


def interval(values: np.ndarray) -> dict[str, Any]:
    """Mean over tasks and its 95 % bootstrap interval."""
    mean, (low, high) = mean_ci(values)
    return {"mean": float(mean), "ci95": [float(low), float(high)]}


def as_metrics(result: dict[str, Any]) -> Metrics:
    """The scalars of an evaluation."""
    rows = [result["adapt"][k] for k in landmarks(len(result["adapt"]))]
    metrics = {f"eval/ep_rew_mean_{row['k']}": row["mean"] for row in rows}
    if "trial_return" in result:
        low, high = result["trial_return"]["ci95"]
        metrics |= {
            "eval/trial_return": result["trial_return"]["mean"],
            "eval/trial_return_ci95_low": low,
            "eval/trial_return_ci95_high": high,
        }
    if result["gain"]:
        low, high = result["gain"]["ci95"]
        metrics |= {
            "eval/gain": result["gain"]["mean"],
            "eval/gain_ci95_low": low,
            "eval/gain_ci95_high": high,
        }
    return metrics


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Returns before and after adaptation, for people."""
    console = console or Console()
    what = "held-out tasks" if result["held_out"] else "members, tasks that training knows too"
    if "replicas" in result:
        what = "replicas, each on episodes of its own"
    title = f"{result['preset']}: return of {result['tasks']} {what}"
    if "trial_return" in result:
        whole, (low, high) = result["trial_return"]["mean"], result["trial_return"]["ci95"]
        title += f"; whole trials {whole:.3f} [{low:.3f}, {high:.3f}]"
    table = Table(title=title)
    unit = result.get("unit", "inner updates")
    for name in ("task", unit, "mean", "95 % interval", "IQM"):
        table.add_column(name, justify="left" if name == "task" else "right")
    groups = result.get("groups", [])
    for label, rows in [("all", result), *((str(g["task"]), g) for g in groups)]:
        for row in (rows["adapt"][k] for k in landmarks(len(rows["adapt"]))):
            low, high = row["ci95"]
            table.add_row(
                label if row is rows["adapt"][0] else "",
                str(row["k"]),
                f"{row['mean']:.2f}",
                f"[{low:.2f}, {high:.2f}]",
                f"{row['iqm']:.2f}",
            )
        if rows["gain"]:
            low, high = rows["gain"]["ci95"]
            name = "last less first" if "unit" in result else "gain of 1"
            table.add_row("", name, f"{rows['gain']['mean']:.2f}", f"[{low:.2f}, {high:.2f}]", "")
        table.add_section()
    console.print(table)

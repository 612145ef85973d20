"""FRODO and actor-critics on Catch: one table and one plot from finished runs.

    python docs/results/catch.py [--out PLOT.png]

Reads docs/results/frodo/<run>/metrics.jsonl. Left: methods; middle: FRODO with other weights c of
the consistency and other K; right: how far FRODO's target is from V-trace's. Bands are 95 %
bootstrap intervals over the replicas of a run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "frodo"
METHODS = {
    "frodo, from scratch": "frodo-catch-c0-seed1",
    "frodo, residual start": "frodo-catch-residual-seed1",
    "a2c, full horizon": "a2c-catch-full-seed1",
    "a2c, 3 steps and bootstrap": "a2c-catch-seed1",
    "a2c, returns of 3 rewards": "a2c-catch-lookahead-seed1",
    "a2c, 3 steps, no bootstrap": "a2c-catch-no-bootstrap-seed1",
}
ABLATIONS = {
    "c = 0, K = 5": "frodo-catch-c0-seed1",
    "c = 0.01, K = 5": "frodo-catch-c0.01-seed1",
    "c = 0.1, K = 5": "frodo-catch-seed1",
    "c = 1, K = 5": "frodo-catch-c1-seed1",
    "c = 0.1, K = 1": "frodo-catch-k1-seed1",
}
RETURN = "rollout/ep_rew_mean"
ENDS = ("rollout/ep_rew_ci95_low", "rollout/ep_rew_ci95_high")


def rows(folder: str) -> list[dict[str, Any]]:
    """The records of a run, or none."""
    path = HERE / folder / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def draw(axes: Any, runs: dict[str, str], name: str, ends: tuple[str, str] | None) -> None:
    """One curve for each run that is there."""
    for label, folder in runs.items():
        records = [row for row in rows(folder) if row.get(name) is not None]
        if not records:
            continue
        steps = [row["env_steps"] / 1e3 for row in records]
        (line,) = axes.plot(steps, [row[name] for row in records], label=label)
        if ends is not None:
            low, high = ([row.get(end) for row in records] for end in ends)
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
    axes.set_xlabel("environment steps of a replica, thousands")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main() -> None:
    """Prints the table and writes the plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "catch.png")
    arguments = parser.parse_args()
    print("| run | steps | return | evaluation |\n| --- | --- | --- | --- |")
    for label, folder in {**METHODS, **ABLATIONS}.items():
        if records := rows(folder):
            last = records[-1]
            shown = f"{last[RETURN]:.3f} [{last[ENDS[0]]:.3f}, {last[ENDS[1]]:.3f}]"
            evaluation = json.loads((HERE / folder / "evaluation.json").read_text())["adapt"][0]
            print(f"| {label} | {last['env_steps']:,} | {shown} | {evaluation['mean']:.3f} |")
    figure = Figure(figsize=(14.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    draw(left, METHODS, RETURN, ENDS)
    left.set_ylabel("return of the last 100 episodes")
    draw(middle, ABLATIONS, RETURN, ENDS)
    middle.set_ylabel("return of the last 100 episodes")
    draw(right, ABLATIONS, "frodo/target_distance", None)
    right.set_ylabel("mean |learned target − V-trace's|")
    right.set_yscale("log")
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()

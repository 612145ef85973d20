"""Learned against given rewards on delayed MuJoCo: one table and one plot from finished runs.

    python docs/results/delayed_rewards.py [--robots hopper half-cheetah …] [--out PLOT.png]

Reads docs/results/lirpg/<preset>-seed<n>/metrics.jsonl. Each replica of a run is one sample: its
curve is the mean raw return of its last 100 episodes over environment steps. The area is the mean
of that curve over the steps. The probability of improvement is the chance that a replica of the one
method ends above one of the other (ties count half; Agarwal et al. 2021, section 4.3), with its
95 % bootstrap interval over replicas.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from system.statistics import mean_ci

HERE = Path(__file__).parent / "lirpg"
METHODS = {
    "ppo": "ppo-delayed-{}",
    "ppo + bonus": "ppo-delayed-{}-bonus",
    "lirpg (0.01, 1)": "lirpg-delayed-{}",
    "lirpg (0, 1)": "lirpg-delayed-{}-intrinsic",
}
BASE = "ppo"


def curves(robot: str, pattern: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps [T] and the curves of all replicas of all seeds [replicas, T]; None without runs."""
    found = []
    for folder in sorted(HERE.glob(pattern.format(robot) + "-seed*")):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        names = sorted(n for n in rows[-1] if n.startswith("replica/ep_rew_mean_"))
        values = np.array([[row.get(n) for row in rows] for n in names], float)
        found.append((np.array([row["env_steps"] for row in rows]), values))
    if not found:
        return None
    length = min(len(steps) for steps, _ in found)
    values = np.concatenate([v[:, :length] for _, v in found])
    first = np.array([row[np.isfinite(row)][0] for row in values])
    return found[0][0][:length], np.where(np.isfinite(values), values, first[:, None])


def improvement(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Probability that one of `ours` is above one of `theirs`, and its 95 % interval."""

    def probability(a: np.ndarray, b: np.ndarray) -> float:
        gap = a[:, None] - b[None, :]
        return float(((gap > 0) + 0.5 * (gap == 0)).mean())

    rng = np.random.default_rng(0)
    drawn = [
        probability(rng.choice(ours, len(ours)), rng.choice(theirs, len(theirs)))
        for _ in range(5000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return probability(ours, theirs), float(low), float(high)


def shown(values: np.ndarray) -> str:
    """Mean and 95 % interval over replicas."""
    mean, (low, high) = mean_ci(values)
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def table(data: dict[str, dict[str, Any]]) -> None:
    """Prints the comparison, as Markdown."""
    heads = ["robot", "method", "replicas", "steps", "last 100 episodes", "area"]
    heads += ["P(above PPO), end", "P(above PPO), area"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for robot, methods in data.items():
        for name, (steps, values) in methods.items():
            area, end = values.mean(1), values[:, -1]
            chances = ["", ""]
            if name != BASE and BASE in methods:
                base_steps, base = methods[BASE]
                if base_steps[-1] == steps[-1]:
                    pairs = [(end, base[:, -1]), (area, base.mean(1))]
                    chances = [
                        "{:.2f} [{:.2f}, {:.2f}]".format(*improvement(*pair)) for pair in pairs
                    ]
            print(
                f"| {robot} | {name} | {len(values)} | {steps[-1]:,} | {shown(end)} "
                f"| {shown(area)} | {chances[0]} | {chances[1]} |"
            )


def plot(data: dict[str, dict[str, Any]], out: Path) -> None:
    """Draws mean and 95 % interval of every method, one panel per robot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(data), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, len(data)))
    colours = dict(zip(METHODS, ("tab:grey", "tab:olive", "tab:blue", "tab:red"), strict=True))
    for axis, (robot, methods) in zip(axes, data.items(), strict=True):
        for name, (steps, values) in methods.items():
            mean, (low, high) = mean_ci(values)
            axis.plot(steps / 1e6, mean, label=f"{name}, {len(values)}", color=colours[name])
            axis.fill_between(steps / 1e6, low, high, alpha=0.2, color=colours[name])
        axis.set_title(f"delayed-{robot}")
        axis.set_xlabel("environment steps of a replica, millions")
        axis.set_ylabel("return of the last 100 episodes")
        axis.legend(title="method, replicas", fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Prints the table and writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--robots", nargs="+")
    parser.add_argument("--out", type=Path, default=HERE / "delayed-rewards.png")
    arguments = parser.parse_args()
    robots = arguments.robots or ["hopper", "half-cheetah", "walker2d", "ant", "humanoid"]
    data: dict[str, dict[str, Any]] = {}
    for robot in robots:
        found = {name: curves(robot, pattern) for name, pattern in METHODS.items()}
        methods = {name: pair for name, pair in found.items() if pair is not None}
        if methods:
            data[robot] = methods
    table(data)
    plot(data, arguments.out)


if __name__ == "__main__":
    main()

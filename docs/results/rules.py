"""Learned rules beside A2C and REINFORCE: one table and one plot from finished runs.

    python docs/results/rules.py [--out PLOT.png]

Reads docs/results/lpg/<world>-<teacher>/: 50 agents each, on levels that are the same for every
teacher. Bands are 95 % bootstrap intervals over the agents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "lpg"
WORLDS = {"chain": "chain-short, 200 updates", "sparse": "random-small-sparse, 1,000 updates"}
TEACHERS = {
    "rule1": "rule of seed 1",
    "rule2": "rule of seed 2",
    "rule3": "rule of seed 3",
    "a2c": "A2C",
    "reinforce": "REINFORCE within a chunk",
    "none": "untaught",
}
RETURN = "rollout/ep_rew_mean"
ENDS = ("rollout/ep_rew_ci95_low", "rollout/ep_rew_ci95_high")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def main() -> None:
    """Prints the table and writes the plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "rules.png")
    arguments = parser.parse_args()
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    print("| teacher | " + " | ".join(WORLDS.values()) + " |\n| --- | --- | --- |")
    cells: dict[str, list[str]] = {teacher: [] for teacher in TEACHERS}
    for axes, (world, title) in zip(figure.subplots(1, 2), WORLDS.items(), strict=True):
        for teacher, label in TEACHERS.items():
            folder = HERE / f"{world}-{teacher}"
            records = rows(folder)
            steps = [row["env_steps"] / 1e3 for row in records]
            (line,) = axes.plot(steps, [row[RETURN] for row in records], label=label)
            low, high = ([row[end] for row in records] for end in ENDS)
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
            found = json.loads((folder / "evaluation.json").read_text())["adapt"][0]
            low, high = found["ci95"]
            cells[teacher].append(f"{found['mean']:.3f} [{low:.3f}, {high:.3f}]")
        axes.set_title(title)
        axes.set_xlabel("environment steps of an agent, thousands")
        axes.set_ylabel("return of the last 100 episodes")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for teacher, label in TEACHERS.items():
        print(f"| {label} | " + " | ".join(cells[teacher]) + " |")
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()

"""Mean squared value error over the later half of random walks, with intervals over replicas.

    python docs/results/walks.py RUN [RUN …]

Of two runs also the difference: that of independent replicas.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from system.statistics import mean_ci


def errors(run: Path) -> np.ndarray:
    """Mean of each replica's error over the later half of its records, [M]."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "replica/value_error_0" in row]
    names = [name for name in rows[0] if name.startswith("replica/value_error_")]
    later = rows[len(rows) // 2 :]
    return np.array([[row[name] for name in names] for row in later]).mean(0)


def main() -> None:
    """Prints a line for each run."""
    found = {run: errors(Path(run)) for run in sys.argv[1:]}
    for run, own in found.items():
        mean, (low, high) = mean_ci(own)
        print(
            f"{float(mean):.5f} [{float(low):.5f}, {float(high):.5f}]  {len(own)} replicas  {run}"
        )
    if len(found) == 2:
        first, second = found.values()
        gap = second.mean() - first.mean()
        error = np.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
        print(f"second less first {gap:.5f}, standard error {error:.5f}")


if __name__ == "__main__":
    main()

"""The classical opponents of RL²: their names, and what they and RL² earned in the paper.

They play in `actors.opponents.bandits` and `actors.opponents.mdps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.tasks import closest

BANDIT_OPPONENTS = (
    "random",
    "gittins",
    "thompson",
    "optimistic-thompson",
    "ucb1",
    "epsilon-greedy",
    "greedy",
)
MDP_OPPONENTS = ("random", "psrl", "opsrl", "ucrl2", "beb", "epsilon-greedy", "greedy")


def _table(columns: Sequence[str], rows: dict[Any, Sequence[float]]) -> dict[Any, dict[str, float]]:
    """Rows as dicts by column."""
    return {key: dict(zip(columns, row, strict=True)) for key, row in rows.items()}


PAPER: dict[str, dict[Any, dict[str, float]]] = {
    "bandit": _table(
        (*BANDIT_OPPONENTS, "rl2"),
        {
            (10, 5): (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6, 6.7),
            (10, 10): (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6, 6.7),
            (10, 50): (5.1, 6.5, 5.2, 5.5, 6.6, 6.5, 6.5, 6.8),
            (100, 5): (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8, 78.7),
            (100, 10): (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1, 83.5),
            (100, 50): (49.8, 85.2, 64.5, 67.7, 84.3, 78.3, 78.0, 84.9),
            (500, 5): (249.8, 405.8, 402.0, 406.7, 405.8, 388.2, 380.6, 401.6),
            (500, 10): (249.0, 437.8, 429.5, 438.9, 437.1, 408.0, 395.0, 432.5),
            (500, 50): (249.6, 463.7, 427.2, 437.6, 457.6, 413.6, 402.8, 438.9),
        },
    ),
    "tabular-mdp": _table(
        (*MDP_OPPONENTS, "rl2"),
        {
            10: (100.1, 138.1, 144.1, 146.6, 150.2, 132.8, 134.8, 156.2),
            25: (250.2, 408.8, 425.2, 424.1, 427.8, 377.3, 368.8, 445.7),
            50: (499.7, 904.4, 930.7, 918.9, 917.8, 823.3, 769.3, 936.1),
            75: (749.9, 1417.1, 1449.2, 1427.6, 1422.6, 1293.9, 1172.9, 1428.8),
            100: (999.4, 1939.5, 1973.9, 1942.1, 1935.1, 1778.2, 1578.5, 1913.7),
        },
    ),
}
"""Mean total reward of 1,000 trials in Duan et al. 2016, tables 1 and 2. By task family, then by
(pulls, arms) of a bandit or episodes of an MDP of 10 states, 5 actions and 10 steps an episode,
then by opponent or "rl2"."""


def check_names(names: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises ValueError for a name that is not among the allowed."""
    for name in names:
        if name not in allowed:
            raise ValueError(
                f"there is no opponent {name!r}; closest: {closest(name, allowed)}. "
                f"All: {', '.join(allowed)}"
            )


def check_whole(what: str, value: int, lowest: int = 1) -> None:
    """Raises ValueError unless `value` is a whole number ≥ `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{what} must be a whole number of at least {lowest}, not {value!r}")

"""The classical opponents beside the paper's table (Duan et al. 2016), on trials of one seed.

    python docs/results/opponents.py bandit --trials 10000
    python docs/results/opponents.py tabular-mdp --trials 1000 --longest 25

Printed is each mean, the paper's, and z: the difference in standard errors of the difference, where
the paper's own is that of 1,000 trials with our deviation.
"""

from __future__ import annotations

import argparse

import numpy as np

from actors.opponents import PAPER
from actors.opponents.bandits import play_bandits
from actors.opponents.mdps import play_mdps
from actors.tasks.bandit import Bandit
from actors.tasks.tabular_mdp import TabularMDP


def main() -> None:
    """Prints a line for each column of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=list(PAPER))
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for key, said in PAPER[arguments.task].items():
        rng = np.random.default_rng(arguments.seed)
        if arguments.task == "bandit":
            pulls, arms = key
            if pulls > arguments.longest:
                continue
            bandit = Bandit(arms=arms, pulls=1)
            means = bandit.means(bandit.sample(rng, arguments.trials))
            earned = play_bandits(means, pulls, arguments.seed)
        else:
            if key > arguments.longest:
                continue
            family = TabularMDP()
            tables = family.tables(family.sample(rng, arguments.trials))
            earned = play_mdps(*tables, key, family.horizon, arguments.seed)
        for name, totals in earned.items():
            mean, deviation = float(np.mean(totals)), float(np.std(totals, ddof=1))
            error = deviation * (1.0 / arguments.trials + 1.0 / 1000.0) ** 0.5
            z = (mean - said[name]) / error
            print(f"{key!s:>10} {name:<20} {mean:9.2f}  paper {said[name]:7.1f}  z {z:5.1f}")


if __name__ == "__main__":
    main()

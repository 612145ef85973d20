import numpy as np
import pytest

from actors.opponents import BANDIT_OPPONENTS, MDP_OPPONENTS, PAPER
from actors.opponents.bandits import play_bandits
from actors.opponents.mdps import play_mdps


def test_paper_has_every_opponent_and_column():
    bandits = {(pulls, arms) for pulls in (10, 100, 500) for arms in (5, 10, 50)}
    assert set(PAPER["bandit"]) == bandits
    assert set(PAPER["tabular-mdp"]) == {10, 25, 50, 75, 100}
    for names, task in ((BANDIT_OPPONENTS, "bandit"), (MDP_OPPONENTS, "tabular-mdp")):
        for row in PAPER[task].values():
            assert set(row) == {*names, "rl2"}


def assert_agrees(totals, papers):
    """Within three standard errors of the difference: the paper's are means of 1,000 trials too."""
    for name, total in totals.items():
        error = np.hypot(1, 1) * total.std() / np.sqrt(len(total))
        assert abs(total.mean() - papers[name]) < 3 * error + 0.05, name


@pytest.mark.parametrize(("pulls", "arms"), [(10, 5), (10, 10), (100, 5)])
def test_bandit_opponents_earn_the_papers_figures(pulls, arms):
    means = np.random.default_rng(11).uniform(size=(1000, arms))
    assert_agrees(play_bandits(means, pulls, seed=12), PAPER["bandit"][pulls, arms])


def test_mdp_opponents_earn_the_papers_figures():
    rng = np.random.default_rng(13)
    reward = rng.normal(1, 1, (1000, 10, 5))
    transition = rng.dirichlet(np.ones(10), (1000, 10, 5))
    assert_agrees(play_mdps(reward, transition, 10, 10, seed=14), PAPER["tabular-mdp"][10])

import numpy as np
import pytest

from actors.opponents import BANDIT_OPPONENTS
from actors.opponents.bandits import bayes_optimum, gittins_indices, play_bandits


def best_value(counts, left):
    """The Bayes optimum by plain recursion over ordered arms."""
    if left == 0:
        return 0.0
    values = []
    for arm, (wins, losses) in enumerate(counts):
        mean = (wins + 1) / (wins + losses + 2)
        won, lost = list(counts), list(counts)
        won[arm], lost[arm] = (wins + 1, losses), (wins, losses + 1)
        values.append(
            mean * (1 + best_value(won, left - 1)) + (1 - mean) * best_value(lost, left - 1)
        )
    return max(values)


@pytest.mark.parametrize(("arms", "pulls"), [(2, 1), (2, 3), (2, 6), (3, 4)])
def test_optimum_equals_plain_recursion(arms, pulls):
    assert bayes_optimum(arms, pulls) == pytest.approx(best_value([(0, 0)] * arms, pulls))


@pytest.mark.parametrize(("arms", "optimum"), [(5, 6.660), (10, 6.714)])
def test_optimum_of_ten_pulls(arms, optimum):
    assert bayes_optimum(arms, 10) == pytest.approx(optimum, abs=5e-4)


@pytest.mark.parametrize(("arms", "pulls"), [(5, 100), (50, 500), (2, 10**6)])
def test_too_many_states_are_refused(arms, pulls):
    with pytest.raises(ValueError, match=r"2,000,000; ask for fewer pulls or arms"):
        bayes_optimum(arms, pulls)


def index_by_bisection(wins, losses, left):
    """Smallest retirement reward per pull for which pulling once more gains nothing."""

    def gain(retired, wins, losses, left):
        if left == 0:
            return 0.0
        mean = (wins + 1) / (wins + losses + 2)
        won = max(0.0, gain(retired, wins + 1, losses, left - 1))
        lost = max(0.0, gain(retired, wins, losses + 1, left - 1))
        return mean - retired + mean * won + (1 - mean) * lost

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle, wins, losses, left) > 0 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("wins", "losses", "left"), [(0, 0, 1), (0, 0, 2), (0, 0, 8), (3, 1, 4), (0, 2, 6), (4, 0, 4)]
)
def test_gittins_index_equals_bisection(wins, losses, left):
    index = gittins_indices(8)[left - 1][wins, losses]
    assert index == pytest.approx(index_by_bisection(wins, losses, left), abs=1e-3)


def test_gittins_index_of_a_fresh_arm_with_two_pulls_left():
    # D(λ) = 1/2 − λ + 1/2 (2/3 − λ) is 0 at λ = 5/9.
    assert gittins_indices(2)[1][0, 0] == pytest.approx(5 / 9, abs=1e-3)


def test_gittins_index_is_the_mean_at_the_last_pull_and_above_it_before():
    tables = gittins_indices(20)
    counts = np.arange(20)
    mean = (counts[:, None] + 1) / (counts[:, None] + counts + 2)
    np.testing.assert_allclose(tables[0], mean, atol=1e-5)
    assert (tables[9][:5, :5] > mean[:5, :5] + 0.01).all()


def test_gittins_indices_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        gittins_indices(3)[0][0, 0] = 1.0


def test_every_opponent_beats_random_and_none_the_best_arm():
    means = np.random.default_rng(0).uniform(size=(400, 5))
    totals = play_bandits(means, 60, seed=1)
    assert tuple(totals) == BANDIT_OPPONENTS
    for name, total in totals.items():
        assert total.shape == (400,)
        assert total.mean() < 60 * means.max(1).mean()
        if name != "random":
            assert total.mean() > totals["random"].mean() + 5.0


def test_gittins_earns_the_optimum_of_ten_pulls():
    means = np.random.default_rng(2).uniform(size=(40_000, 5))
    total = play_bandits(means, 10, seed=3, names=["gittins"])["gittins"]
    error = total.std() / 200
    assert total.mean() == pytest.approx(bayes_optimum(5, 10), abs=3 * error + 0.01)


def test_play_depends_on_seed_and_name_alone():
    means = np.random.default_rng(4).uniform(size=(30, 4))
    kept = means.copy()
    first = play_bandits(means, 12, seed=5)
    again = play_bandits(means, 12, seed=5, names=BANDIT_OPPONENTS[::-1])
    other = play_bandits(means, 12, seed=6)
    for name in BANDIT_OPPONENTS:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()
    np.testing.assert_array_equal(means, kept)


def test_certain_arms_pay_what_they_must():
    for name, total in play_bandits(np.array([[1.0, 1.0]]), 7, seed=0).items():
        assert total.tolist() == [7], name
    for name, total in play_bandits(np.array([[0.0, 0.0]]), 7, seed=0).items():
        assert total.tolist() == [0], name


def test_greedy_stays_with_the_first_arm_that_pays():
    assert play_bandits(np.array([[1.0, 1.0, 0.0]]), 9, 0, ["greedy"])["greedy"].tolist() == [9]
    # One loss, then arms 1 and 2 are untried and better: the first of them pays for good.
    assert play_bandits(np.array([[0.0, 1.0, 1.0]]), 9, 0, ["greedy"])["greedy"].tolist() == [8]


@pytest.mark.parametrize(
    ("means", "pulls", "message"),
    [
        ([0.5, 0.5], 3, r"means must be \[trials, arms\], not of shape \[2\]"),
        (np.zeros((0, 3)), 3, r"shape \[0, 3\]"),
        ([[0.5, 1.5]], 3, r"\[0, 1\]"),
        ([[0.5, np.nan]], 3, r"\[0, 1\]"),
        ([[0.5, 0.5]], 0, "num_pulls must be a whole number of at least 1, not 0"),
        ([[0.5, 0.5]], 2.5, "not 2.5"),
    ],
)
def test_bad_input_is_refused(means, pulls, message):
    with pytest.raises(ValueError, match=message):
        play_bandits(np.asarray(means), pulls, seed=0)


def test_unknown_names_list_the_closest():
    with pytest.raises(ValueError, match="no opponent 'gitins'; closest: gittins"):
        play_bandits(np.full((1, 2), 0.5), 3, 0, ["gitins"])
    with pytest.raises(ValueError, match="num_arms must be a whole number of at least 2, not 1"):
        bayes_optimum(1, 5)

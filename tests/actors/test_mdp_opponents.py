import itertools

import numpy as np
import pytest

from actors.opponents import MDP_OPPONENTS
from actors.opponents.mdps import _optimistic, mdp_optimum, play_mdps


def random_mdps(seed, trials, states=10, actions=5):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states), (trials, states, actions))
    return rng.normal(1.0, 1.0, (trials, states, actions)), transition


def test_optimum_equals_the_best_of_all_policies():
    reward, transition = random_mdps(0, trials=3, states=2, actions=2)
    for trial, optimum in enumerate(mdp_optimum(reward, transition, 5, 3)):
        values = []
        for choices in itertools.product(range(2), repeat=6):
            policy = np.reshape(choices, (3, 2))
            state, value = np.array([1.0, 0.0]), 0.0
            for actions in policy:
                value += state @ reward[trial, [0, 1], actions]
                state = state @ transition[trial, [0, 1], actions]
            values.append(value)
        assert optimum == pytest.approx(5 * max(values))


def test_every_opponent_beats_random_and_none_the_optimum():
    reward, transition = random_mdps(1, trials=200)
    totals = play_mdps(reward, transition, 12, 10, seed=2)
    optimum = mdp_optimum(reward, transition, 12, 10)
    assert tuple(totals) == MDP_OPPONENTS
    for name, total in totals.items():
        assert total.shape == (200,)
        assert total.mean() < optimum.mean()
        if name != "random":
            assert total.mean() > totals["random"].mean() + 20.0


def test_random_earns_the_value_of_the_uniform_policy():
    reward, transition = random_mdps(3, trials=300, states=3, actions=2)
    value = np.zeros((300, 3))
    for _ in range(4):
        value = (reward + np.einsum("nsat,nt->nsa", transition, value)).mean(2)
    total = play_mdps(reward, transition, 50, 4, seed=4, names=["random"])["random"]
    gap = total - 50 * value[:, 0]
    assert abs(gap.mean()) < 3 * gap.std() / np.sqrt(300)


def test_greedy_keeps_the_optimal_action_of_a_known_bandit():
    # One step, rewards far apart: whatever is tried first, 40 episodes find the action that pays.
    reward = np.tile([-20.0, 20.0], (5, 2, 1))
    transition = np.full((5, 2, 2, 2), 0.5)
    total = play_mdps(reward, transition, 40, 1, seed=5, names=["greedy"])["greedy"]
    assert (total > 38 * 20 - 60).all()


def test_play_depends_on_seed_and_name_alone():
    reward, transition = random_mdps(6, trials=4)
    kept = reward.copy(), transition.copy()
    first = play_mdps(reward, transition, 3, 5, seed=7)
    again = play_mdps(reward, transition, 3, 5, seed=7, names=MDP_OPPONENTS[::-1])
    other = play_mdps(reward, transition, 3, 5, seed=8)
    for name in MDP_OPPONENTS:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).all()
    np.testing.assert_array_equal(reward, kept[0])
    np.testing.assert_array_equal(transition, kept[1])


def test_one_trial():
    reward, transition = random_mdps(9, trials=1)
    for total in play_mdps(reward, transition, 2, 3, seed=10).values():
        assert total.shape == (1,)
        assert np.isfinite(total).all()


def test_a_hopeful_prior_makes_greedy_explore():
    reward, transition = random_mdps(11, trials=300)
    pale, told = (
        play_mdps(reward, transition, 10, 10, 12, ["greedy"], prior_mean=mean)["greedy"].mean()
        for mean in (0.0, 1.0)
    )
    assert told > pale + 5.0


def test_optimistic_expectation_equals_plain_inner_maximisation():
    """Figure 2 of Jaksch et al. 2010, one pair at a time."""
    rng = np.random.default_rng(13)
    transition = rng.dirichlet(np.ones(4), (3, 4, 2))
    radius = rng.uniform(0.0, 2.5, (3, 4, 2))
    value = rng.normal(size=(3, 4))
    optimistic = _optimistic(transition, radius)(value)
    for trial, state, action in np.ndindex(3, 4, 2):
        order = np.argsort(-value[trial])
        p = transition[trial, state, action].copy()
        p[order[0]] = min(1.0, p[order[0]] + radius[trial, state, action] / 2)
        for worst in order[::-1]:
            if p.sum() > 1.0:
                p[worst] = max(0.0, 1.0 - (p.sum() - p[worst]))
        assert optimistic[trial, state, action] == pytest.approx(p @ value[trial])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_reward": np.zeros((3, 2))}, r"mean_reward must be .* shape \[3, 2\]"),
        ({"mean_reward": np.zeros((2, 4, 2))}, r"transition must be \[2, 4, 2, 4\]"),
        ({"mean_reward": np.full((2, 3, 2), np.nan)}, "mean rewards must be finite"),
        ({"transition": np.full((2, 3, 2, 3), 0.5)}, "add up to 1"),
        ({"num_episodes": 0}, "num_episodes must be a whole number of at least 1, not 0"),
        ({"horizon": -1}, "horizon must be a whole number"),
        ({"prior_mean": float("nan")}, "prior_mean must be finite"),
        ({"names": ["pslr"]}, "no opponent 'pslr'; closest: psrl"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {
        "mean_reward": np.zeros((2, 3, 2)),
        "transition": np.full((2, 3, 2, 3), 1 / 3),
        "num_episodes": 2,
        "horizon": 2,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        play_mdps(**{**given, **change})

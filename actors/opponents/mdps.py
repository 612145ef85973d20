"""The classical opponents of RL² at random tabular MDPs (Duan et al. 2016, arXiv 1611.02779).

Every opponent plays all N trials at once, in numpy. Rewards are totals of a trial. Where the paper
leaves something open (priors, ties, constants), the choice here is the one that earns the paper's
own figures, `actors.opponents.PAPER`.

Legend: N trials, S states, A actions, H steps of an episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.opponents import MDP_OPPONENTS, check_names, check_whole

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REWARD_PRIOR_MEAN = 0.0
"""Prior mean of a pair's mean reward. The tasks' is 1, but only with 0 do opponents earn the
paper's figures: of 100 episodes, greedy earns 1,565 with 0 and 1,882 with 1 (the paper's: 1,578.5);
of 10, PSRL 137.1 and 134.1 (138.1)."""

MDP_EPSILON = 0.15
"""Of 0.05, 0.1, 0.15, 0.2, the best for 25 episodes and more, 0.1 within sampling error of it."""

OPSRL_SAMPLES = 10
"""More samples, more reward: 5, 7 and 10 differ by less than sampling error."""

BEB_BONUS = 1.15
"""Of 0.9 … 3, the nearest to all of the paper's figures; 2 earns more (2,014 of 100 episodes)."""

UCRL2_SCALES = (0.35, 0.2)
"""Factors on the radii of rewards and transitions: those that earn the paper's figures."""

UCRL2_DELTA = 0.1
"""Probability with which the unscaled radii may fail."""

_TIE = 1e-9
"""Values closer than this are equal: sums in another order round differently."""


@dataclass(frozen=True)
class _Belief:
    """What N trials have shown, in place: visits and reward sums [N, S, A], moves [N, S, A, S].

    The mean reward of a pair has prior N(prior_mean, 1) under noise N(0, 1), its transitions
    Dirichlet(1, …, 1).
    """

    visits: Floats
    reward_sum: Floats
    moves: Floats
    prior_mean: float

    def reward(self) -> Floats:
        """Posterior mean, [N, S, A]."""
        return (self.prior_mean + self.reward_sum) / (1.0 + self.visits)

    def transition(self) -> Floats:
        """Posterior mode: observed frequencies, uniform where there are none, [N, S, A, S]."""
        visits = self.visits[..., None]
        uniform = 1.0 / self.moves.shape[-1]
        return np.where(visits > 0, self.moves / np.maximum(visits, 1), uniform)

    def sample(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Mean rewards and transitions drawn from the posterior."""
        noise = rng.standard_normal(self.visits.shape) / np.sqrt(1.0 + self.visits)
        weights = rng.standard_gamma(1.0 + self.moves)
        return self.reward() + noise, weights / weights.sum(-1, keepdims=True)


def play_mdps(
    mean_reward: Floats,
    transition: Floats,
    num_episodes: int,
    horizon: int,
    seed: int,
    names: Sequence[str] = MDP_OPPONENTS,
    prior_mean: float = REWARD_PRIOR_MEAN,
) -> dict[str, Floats]:
    """Total reward of every trial, by opponent.

    An episode begins in state 0; an observed reward is N(mean, 1). Opponents plan once before each
    episode, by value iteration over its steps, and break ties at random. An opponent's play
    depends on the seed and its name alone, and all of them meet the same luck.

    Args:
        mean_reward: [N, S, A].
        transition: probabilities of the next state, [N, S, A, S].
        num_episodes: episodes of a trial.
        horizon: steps of an episode.
        seed: decides the luck and the opponents' own draws.
        names: which opponents play, of `MDP_OPPONENTS`.
        prior_mean: what opponents expect of an unvisited pair's reward. The tasks' true mean is 1;
            told so, greedy earns 149 of 10 episodes, not the paper's 135.

    Returns:
        Totals, [N] each.

    Raises:
        ValueError: unknown name, wrong shape, rows that are no probabilities, a `prior_mean` that
            is not finite, or no episode or step.
    """
    check_names(names, MDP_OPPONENTS)
    mean_reward, transition = _checked_mdps(mean_reward, transition, num_episodes, horizon)
    if not math.isfinite(prior_mean):
        raise ValueError(f"prior_mean must be finite, not {prior_mean!r}")
    return {
        name: _play_mdp(mean_reward, transition, num_episodes, horizon, seed, name, prior_mean)
        for name in names
    }


def mdp_optimum(mean_reward: Floats, transition: Floats, num_episodes: int, horizon: int) -> Floats:
    """What a player who knows the MDPs earns on average in a trial, [N].

    Arguments and errors are those of `play_mdps`.
    """
    mean_reward, transition = _checked_mdps(mean_reward, transition, num_episodes, horizon)
    _, value = _plan(mean_reward, _expectation(transition), horizon, np.random.default_rng(0))
    return num_episodes * value[:, 0]


def _play_mdp(
    mean_reward: Floats,
    transition: Floats,
    num_episodes: int,
    horizon: int,
    seed: int,
    name: str,
    prior_mean: float,
) -> Floats:
    plan = _MDP_PLANS[name]
    luck = np.random.default_rng([seed, 0])
    own = np.random.default_rng([seed, 1 + MDP_OPPONENTS.index(name)])
    trial = np.arange(len(mean_reward))
    cumulative = transition.cumsum(-1)[..., :-1]
    belief = _Belief(
        np.zeros_like(mean_reward),
        np.zeros_like(mean_reward),
        np.zeros_like(transition),
        prior_mean,
    )
    for _ in range(num_episodes):
        policy = plan(belief, horizon, own)
        state = np.zeros_like(trial)
        for step in range(horizon):
            action = policy[step, trial, state]
            at = (trial, state, action)
            state = (luck.random((len(trial), 1)) >= cumulative[at]).sum(1)
            belief.visits[at] += 1.0
            belief.reward_sum[at] += mean_reward[at] + luck.standard_normal(len(trial))
            belief.moves[(*at, state)] += 1.0
    total: Floats = belief.reward_sum.sum((1, 2))
    return total


_Planner = Callable[[_Belief, int, np.random.Generator], Ints]
"""(belief, horizon, rng) → actions by step, trial and state, [H, N, S]."""

_Expectation = Callable[[Floats], Floats]
"""Values of states, [N, S] → expected value of the next state, [N, S, A]."""


def _expectation(transition: Floats) -> _Expectation:
    """The expectation under known transitions, [N, S, A, S]."""
    trials, states, actions, _ = transition.shape
    rows = transition.reshape(trials, states * actions, states)
    return lambda value: (rows @ value[:, :, None]).reshape(trials, states, actions)


def _plan(
    reward: Floats, expectation: _Expectation, horizon: int, rng: np.random.Generator
) -> tuple[Ints, Floats]:
    """Finite-horizon value iteration: policy [H, N, S] and the values of its first step [N, S]."""
    value = np.zeros(reward.shape[:2])
    policy = np.empty((horizon, *value.shape), dtype=np.int64)
    for step in reversed(range(horizon)):
        action_value = reward + expectation(value)
        value = action_value.max(2)
        ties = action_value >= value[..., None] - _TIE
        policy[step] = np.where(ties, rng.random(ties.shape), -1.0).argmax(2)
    return policy, value


def _plan_random(belief: _Belief, horizon: int, rng: np.random.Generator) -> Ints:
    trials, states, actions = belief.visits.shape
    return rng.integers(actions, size=(horizon, trials, states))


def _plan_greedy(belief: _Belief, horizon: int, rng: np.random.Generator) -> Ints:
    """Optimal for the most likely MDP."""
    return _plan(belief.reward(), _expectation(belief.transition()), horizon, rng)[0]


def _plan_epsilon_greedy(belief: _Belief, horizon: int, rng: np.random.Generator) -> Ints:
    """Greedy, with each action replaced by a random one with probability ε."""
    greedy = _plan_greedy(belief, horizon, rng)
    explores = rng.random(greedy.shape) < MDP_EPSILON
    return np.where(explores, _plan_random(belief, horizon, rng), greedy)


def _plan_psrl(belief: _Belief, horizon: int, rng: np.random.Generator) -> Ints:
    """Optimal for a sample of the posterior (Strens 2000; Osband et al. 2013)."""
    reward, transition = belief.sample(rng)
    return _plan(reward, _expectation(transition), horizon, rng)[0]


def _plan_opsrl(belief: _Belief, horizon: int, rng: np.random.Generator) -> Ints:
    """At every step, each action under the sample that suits it best.

    The optimism of Osband & Van Roy 2016, by the merged samples of Asmuth et al. 2009.
    """
    samples = [belief.sample(rng) for _ in range(OPSRL_SAMPLES)]
    worlds = [(reward, _expectation(transition)) for reward, transition in samples]

    def best(value: Floats) -> Floats:
        action_values = [reward + expectation(value) for reward, expectation in worlds]
        largest: Floats = np.max(action_values, axis=0)
        return largest

    return _plan(np.zeros_like(belief.visits), best, horizon, rng)[0]


def _plan_beb(belief: _Belief, horizon: int, rng: np.random.Generator) -> Ints:
    """Greedy with the bonus β / (1 + visits) (Kolter & Ng 2009)."""
    reward = belief.reward() + BEB_BONUS / (1.0 + belief.visits)
    return _plan(reward, _expectation(belief.transition()), horizon, rng)[0]


def _plan_ucrl2(belief: _Belief, horizon: int, rng: np.random.Generator) -> Ints:
    """Optimal for the best MDP within the radii (Jaksch et al. 2010, equations 3 and 4), scaled.

    Reward: √(7 log(2 S A t / δ) / (2 max(1, visits))). Transitions, in the L1 norm:
    √(14 S log(2 A t / δ) / max(1, visits)).
    """
    _, states, actions = belief.visits.shape
    visits = np.maximum(1.0, belief.visits)
    clock = 1.0 + belief.visits[0].sum()
    scale_reward, scale_transition = UCRL2_SCALES
    log_pairs = math.log(2 * states * actions * clock / UCRL2_DELTA)
    log_actions = math.log(2 * actions * clock / UCRL2_DELTA)
    reward = belief.reward() + scale_reward * np.sqrt(3.5 * log_pairs / visits)
    radius = scale_transition * np.sqrt(14.0 * states * log_actions / visits)
    return _plan(reward, _optimistic(belief.transition(), radius), horizon, rng)[0]


def _optimistic(transition: Floats, radius: Floats) -> _Expectation:
    """The largest expectation over transitions within an L1 ball (Jaksch et al. 2010, figure 2).

    Half the radius, [N, S, A], is added to the best next state and taken from the worst ones: with
    states in falling order of value, cumulative probabilities are stopped at 1.
    """
    trials, states, actions, _ = transition.shape
    rows = transition.reshape(trials, states * actions, states)

    def largest(value: Floats) -> Floats:
        order = np.argsort(-value, axis=1)
        falling = np.take_along_axis(value, order, 1)
        ranked = np.take_along_axis(rows, order[:, None, :], 2).cumsum(2)
        within = np.minimum(ranked[..., :-1] + radius.reshape(trials, -1, 1) / 2.0, 1.0)
        # Σ p_i v_i by parts, over cumulative probabilities and drops of value.
        drops = falling[:, :-1] - falling[:, 1:]
        best = falling[:, -1:] + (within @ drops[:, :, None])[..., 0]
        return best.reshape(trials, states, actions)

    return largest


_MDP_PLANS: dict[str, _Planner] = {
    "random": _plan_random,
    "psrl": _plan_psrl,
    "opsrl": _plan_opsrl,
    "ucrl2": _plan_ucrl2,
    "beb": _plan_beb,
    "epsilon-greedy": _plan_epsilon_greedy,
    "greedy": _plan_greedy,
}


def _checked_mdps(
    mean_reward: Floats, transition: Floats, num_episodes: int, horizon: int
) -> tuple[Floats, Floats]:
    """Both tables in double precision."""
    check_whole("num_episodes", num_episodes)
    check_whole("horizon", horizon)
    mean_reward = np.asarray(mean_reward, dtype=np.float64)
    transition = np.asarray(transition, dtype=np.float64)
    if mean_reward.ndim != 3 or 0 in mean_reward.shape:
        shape = list(mean_reward.shape)
        raise ValueError(f"mean_reward must be [trials, states, actions], not of shape {shape}")
    expected = (*mean_reward.shape, mean_reward.shape[1])
    if transition.shape != expected:
        raise ValueError(
            f"transition must be {list(expected)} as [trials, states, actions, states], "
            f"not of shape {list(transition.shape)}"
        )
    if not np.isfinite(mean_reward).all():
        raise ValueError("mean rewards must be finite")
    if not (transition >= 0.0).all() or not np.allclose(transition.sum(-1), 1.0):
        raise ValueError("transition probabilities must be at least 0 and add up to 1")
    return mean_reward, transition

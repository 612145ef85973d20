"""Trials of other families, against lists and loops."""

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from actors.family import TaskFamily
from actors.tasks import load_family, option_values
from actors.tasks.bandit import Bandit
from actors.tasks.gym_env import GymFamily
from actors.tasks.half_cheetah import HalfCheetahDir
from actors.tasks.locomotion import DelayedHopper, Hopper
from actors.tasks.navigation_2d import Navigation2D
from actors.tasks.random_walk import RandomWalkOffPolicy
from actors.tasks.tabular_mdp import TabularMDP
from actors.tasks.trials import Trials
from actors.tasks.worlds import Worlds
from tests.system.families import Countdown, CountdownEnv

NUM_ENVS = 6

TRIALS = {
    "one pull": Trials(Bandit(arms=3, pulls=1), 5),
    "three pulls": Trials(Bandit(arms=2, pulls=3), 2),
    "tabular": Trials(TabularMDP(states=4, actions=3, horizon=4), 3),
    "continuous": Trials(Navigation2D(horizon=4), 2),
    "one episode": Trials(TabularMDP(horizon=4), 1),
    "robot": Trials(HalfCheetahDir(horizon=5), 2),
    "early ends": Trials(Countdown(), 3),
}
SAVED = [name for name in TRIALS if name != "early ends"]

every_kind = pytest.mark.parametrize("name", TRIALS)
every_saved_kind = pytest.mark.parametrize("name", SAVED)


class SlowTrials:
    """Trials one environment after the other, as lists; it has a batch of the family of its own."""

    def __init__(self, trials, num_envs):
        self.env = trials.family.make(num_envs)
        self.spec = trials.family.spec
        self.left = [trials.episodes] * num_envs
        self.rows = []

    def reset(self, seed, tasks):
        obs, _ = self.env.reset(seed=seed, options={"tasks": tasks})
        self.rows = [row + [0.0] * self.spec.action_size + [0.0, 1.0] for row in obs.tolist()]
        return self.rows

    def step(self, actions):
        obs, reward, terminated, truncated, _ = self.env.step(actions)
        rewards, ends = [], []
        for i in range(len(self.left)):
            running = self.left[i] > 0
            ends.append(running and (bool(terminated[i]) or bool(truncated[i])))
            rewards.append(float(reward[i]) if running else 0.0)
        before = list(self.left)
        self.left = [left - end for left, end in zip(self.left, ends, strict=True)]
        again = [end and left > 0 for end, left in zip(ends, self.left, strict=True)]
        if any(again):
            obs, _ = self.env.reset(options={"reset_mask": np.array(again)})
        for i, row in enumerate(obs.tolist()):
            if before[i] > 0:
                self.rows[i] = row + self.action(actions[i]) + [rewards[i], float(ends[i])]
        return self.rows, rewards, [left == 0 for left in self.left], ends

    def action(self, action):
        if self.spec.discrete:
            return [float(a == int(action)) for a in range(self.spec.action_size)]
        return action.tolist()


def actions_of(family, num_steps, seed=0, num_envs=NUM_ENVS):
    generator = torch.Generator().manual_seed(seed)
    size = family.spec.action_size
    if family.spec.discrete:
        return torch.randint(size, (num_steps, num_envs), generator=generator)
    return torch.randn(num_steps, num_envs, size, generator=generator)


def started(family, seed=3, num_envs=NUM_ENVS):
    env = family.make(num_envs)
    tasks = family.sample(np.random.default_rng(5), num_envs)
    obs, info = env.reset(seed=seed, options={"tasks": tasks})
    assert info == {}
    return env, obs


def roll(env, actions):
    """Observations, rewards, both ends and inner ends of all steps."""
    steps = [env.step(action) for action in actions]
    steps = [[np.array(part) for part in (*s[:4], s[4]["episode_over"])] for s in steps]
    return [np.stack(part) for part in zip(*steps, strict=True)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


# What is observed


@every_kind
def test_every_step_is_that_of_lists_and_loops(name):
    family = TRIALS[name]
    env, slow = family.make(NUM_ENVS), SlowTrials(family, NUM_ENVS)
    for trial, seed in enumerate((3, 4)):
        tasks = family.sample(np.random.default_rng(trial), NUM_ENVS)
        slow.left = [family.episodes] * NUM_ENVS
        obs, _ = env.reset(seed=seed, options={"tasks": tasks})
        assert obs.tolist() == slow.reset(seed, tasks)
        # Some steps more than a trial has: they change nothing.
        for action in actions_of(family, family.spec.horizon + 3, seed):
            obs, reward, terminated, truncated, info = env.step(action)
            rows, rewards, over, ends = slow.step(action)
            assert obs.tolist() == rows
            assert reward.tolist() == rewards
            assert terminated.tolist() == over
            assert not truncated.any()
            assert info.keys() == {"episode_over"}
            assert info["episode_over"].tolist() == ends
        assert terminated.all()


def test_order_and_content_of_the_observation():
    """Of `Countdown`: steps and row; then action, reward, end. The second ends by time limits."""
    env = Trials(Countdown(), 2).make(2)
    tasks = [{"length": 2, "truncate": 0}, {"length": 3, "truncate": 1}]
    obs, _ = env.reset(options={"tasks": tasks})
    assert obs.tolist() == [[0, 0, 0, 0, 1], [0, 1, 0, 0, 1]]
    expected = [
        ([[1, 0, 0.5, 1, 0], [1, 1, -0.5, 1, 0]], [1, 1], [False, False], [False, False]),
        # The first of the next episode, with what ended the one before.
        ([[0, 0, 1.5, 2, 1], [2, 1, -1.5, 2, 0]], [2, 2], [False, False], [True, False]),
        ([[1, 0, 2.5, 1, 0], [0, 1, -2.5, 3, 1]], [1, 3], [False, False], [False, True]),
        ([[2, 0, 3.5, 2, 1], [1, 1, -3.5, 1, 0]], [2, 1], [True, False], [True, False]),
        ([[2, 0, 3.5, 2, 1], [2, 1, -4.5, 2, 0]], [0, 2], [True, False], [False, False]),
        ([[2, 0, 3.5, 2, 1], [3, 1, -5.5, 3, 1]], [0, 3], [True, True], [False, True]),
        ([[2, 0, 3.5, 2, 1], [3, 1, -5.5, 3, 1]], [0, 0], [True, True], [False, False]),
    ]
    for t, (rows, rewards, terminated, episode_over) in enumerate(expected):
        action = np.array([[t + 0.5], [-t - 0.5]], np.float32)
        step = env.step(action)
        assert step[0].tolist() == rows
        assert step[1].tolist() == rewards
        assert step[2].tolist() == terminated
        assert step[3].tolist() == [False, False]
        assert step[4]["episode_over"].tolist() == episode_over


def test_discrete_actions_are_one_hot():
    env = Trials(Bandit(arms=3, pulls=1), 3).make(2)
    means = [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    obs, _ = env.reset(options={"tasks": [{"means": m} for m in means]})
    assert obs.tolist() == [[1, 0, 0, 0, 0, 1]] * 2
    assert env.step(torch.tensor([1, 1]))[0].tolist() == [[1, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0, 1]]
    assert env.step(torch.tensor([2, 2]))[0].tolist() == [[1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1]]
    obs, _, terminated, _, _ = env.step(torch.tensor([0, 0]))
    assert obs.tolist() == [[1, 1, 0, 0, 0, 1], [1, 1, 0, 0, 1, 1]]
    assert terminated.all()
    obs, _ = env.reset()
    assert obs.tolist() == [[1, 0, 0, 0, 0, 1]] * 2


def test_inner_episodes_begin_where_that_of_a_robot_does():
    env, start = started(TRIALS["robot"])
    obs = roll(env, actions_of(TRIALS["robot"], 10))[0][..., :17]
    noise = [np.abs(rows[:, :8]).max() for rows in (start, obs[4])]
    assert max(noise) <= 0.1
    assert np.abs(obs[3][:, :8]).max() > 0.1
    assert (obs[4] != start[:, :17]).any(1).all()  # another draw of the start's noise


def test_resets_are_asked_for_where_an_episode_ends_and_the_trial_does_not(monkeypatch):
    family = TRIALS["early ends"]
    env = family.make(2)
    env.reset(options={"tasks": [{"length": n, "truncate": 0} for n in (2, 3)]})
    masks, inner_reset = [], env.env.reset

    def counted(**arguments):
        masks.append(arguments["options"]["reset_mask"].tolist())
        return inner_reset(**arguments)

    monkeypatch.setattr(env.env, "reset", counted)
    roll(env, actions_of(family, 15, num_envs=2))
    # At steps 2, 3, 4 and 6; neither at the last ends, 6 and 9, nor later.
    assert masks == [[True, False], [False, True], [True, False], [False, True]]


@dataclass(frozen=True)
class RawCountdown(Countdown):
    """`Countdown` that reports ten times its rewards."""

    def make(self, num_envs):
        return RawCountdownEnv(self, num_envs)


class RawCountdownEnv(CountdownEnv):
    def step(self, actions):
        obs, reward, terminated, truncated, _ = super().step(actions)
        return obs, reward, terminated, truncated, {"raw_reward": 10 * reward}


def test_raw_rewards_are_passed_on():
    env = Trials(RawCountdown(), 2).make(2)
    env.reset(options={"tasks": [{"length": n, "truncate": 0} for n in (1, 2)]})
    steps = [env.step(np.zeros((2, 1), np.float32)) for _ in range(5)]
    raw = [step[4]["raw_reward"] for step in steps]
    assert {array.dtype for array in raw} == {np.dtype(np.float32)}
    assert np.stack(raw, 1).tolist() == [[10, 10, 0, 0, 0], [10, 20, 10, 20, 0]]
    assert np.stack([s[1] for s in steps], 1).tolist() == [[1, 1, 0, 0, 0], [1, 2, 1, 2, 0]]


# The contract of a family


@every_kind
def test_sizes_types_and_spec(name):
    family = TRIALS[name]
    inner, spec = family.family.spec, family.spec
    assert isinstance(family, TaskFamily)
    assert pickle.loads(pickle.dumps(family)) == family
    assert spec.obs_size == inner.obs_size + inner.action_size + 2
    assert spec.horizon == family.episodes * inner.horizon
    assert (spec.num_episodes, inner.num_episodes) == (family.episodes, 0)
    assert (spec.action_size, spec.discrete) == (inner.action_size, inner.discrete)
    env, start = started(family)
    assert env.observation_space.contains(start)
    assert env.single_action_space == env.env.single_action_space
    actions = actions_of(family, spec.horizon)
    kept, before = start.copy(), actions.clone()
    first = env.step(actions[0])[:4]
    copies = [part.copy() for part in first]
    obs, reward, terminated, truncated, episode_over = roll(env, actions[1:])
    assert obs.shape == (spec.horizon - 1, NUM_ENVS, spec.obs_size)
    assert {part.dtype for part in (start, obs, reward)} == {np.dtype(np.float32)}
    assert {part.dtype for part in (terminated, truncated, episode_over)} == {np.dtype(bool)}
    # What was returned does not change later, nor what was given.
    assert_same([start, *first], [kept, *copies])
    assert torch.equal(actions, before)


def test_tasks_are_those_of_the_family():
    for inner in (HalfCheetahDir(), TabularMDP()):
        family = Trials(inner, 4)
        assert family.finite_tasks == inner.finite_tasks
        rngs = [np.random.default_rng(7) for _ in range(2)]
        assert family.sample(rngs[0], 3) == inner.sample(rngs[1], 3)


def test_the_forward_velocity_is_where_it_was():
    assert Trials(Hopper()).spec.velocity == Hopper().spec.velocity is not None


@every_kind
def test_a_partial_reset_starts_the_masked_trials_alone(name):
    family = TRIALS[name]
    env, _ = started(family)
    actions = actions_of(family, family.spec.horizon + 1)
    obs = roll(env, actions[:3])[0][-1]
    mask = np.array([False, True, False, True, True, False])
    start, info = env.reset(options={"reset_mask": mask})
    assert info == {}
    np.testing.assert_array_equal(start[~mask], obs[~mask])
    width = family.family.spec.obs_size
    assert not start[mask, width:-1].any()
    assert (start[mask, -1] == 1).all()
    _, _, terminated, _, episode_over = roll(env, actions)
    # A trial that began anew has all its episodes before it again.
    assert (episode_over[:, mask].sum(0) == family.episodes).all()
    assert (episode_over[:, ~mask].sum(0) <= family.episodes).all()
    assert terminated[-1].all()


def test_a_partial_reset_gives_new_tasks_to_the_masked_alone():
    env = Trials(Bandit(arms=2, pulls=1), 2).make(2)
    env.reset(options={"tasks": [{"means": [0.0, 0.0]}] * 2})
    options = {"tasks": [{"means": [1.0, 1.0]}] * 2, "reset_mask": np.array([True, False])}
    env.reset(options=options)
    rewards = roll(env, torch.zeros(2, 2, dtype=torch.int64))[1]
    assert rewards.tolist() == [[1.0, 0.0]] * 2


@every_saved_kind
def test_resets_that_the_family_refuses_change_nothing(name):
    family = TRIALS[name]
    env = family.make(NUM_ENVS)
    with pytest.raises(ValueError, match="first reset needs"):
        env.reset(seed=0)
    env, _ = started(family)
    roll(env, actions_of(family, 2))
    before = env.state()
    with pytest.raises(ValueError, match="reset_mask must be bool"):
        env.reset(seed=1, options={"reset_mask": np.ones(2, bool)})
    with pytest.raises(ValueError, match="6 environments, 2 tasks"):
        env.reset(options={"tasks": family.sample(np.random.default_rng(0), 2)})
    with pytest.raises(ValueError, match="expected"):
        env.step(actions_of(family, 1)[0][:1])
    after = env.state()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["one pull", "tabular", "robot"])
def test_seed_decides_everything(name):
    family = TRIALS[name]
    actions = actions_of(family, family.spec.horizon)
    runs = []
    for seed in (3, 3, 4):
        env, obs = started(family, seed)
        runs.append([obs, *roll(env, actions)])
    assert_same(runs[0], runs[1])
    assert (runs[0][1] != runs[2][1]).any()


# Saved states


@every_saved_kind
@pytest.mark.parametrize("taken_after", [0, 3])
def test_restored_in_another_object_it_goes_on_bit_for_bit(name, taken_after):
    family = TRIALS[name]
    actions = actions_of(family, family.spec.horizon)
    env, _ = started(family)
    roll(env, actions[:taken_after])
    state = env.state()
    kept = {key: array.copy() for key, array in state.items()}
    assert all(array.dtype != object for array in state.values())

    def finish(env):
        rest = roll(env, actions[taken_after:])
        mask = np.arange(NUM_ENVS) % 2 == 0
        obs, _ = env.reset(options={"reset_mask": mask})  # the others' is part of the state
        return [*rest, obs, *roll(env, actions)]

    uninterrupted = finish(env)
    other, _ = started(family, 99)
    roll(other, actions[:2])
    other.restore(state)
    fresh = family.make(NUM_ENVS)
    fresh.restore(state)
    assert_same(finish(other), uninterrupted)
    assert_same(finish(fresh), uninterrupted)
    assert all(np.array_equal(state[key], kept[key]) for key in kept)


@every_saved_kind
def test_state_of_another_batch_is_refused_and_changes_nothing(name):
    family = TRIALS[name]
    env, _ = started(family)
    before = env.state()
    other, _ = started(family, num_envs=NUM_ENVS + 1)
    with pytest.raises(ValueError, match="another environment"):
        env.restore(other.state())
    zeros = {key: np.zeros_like(array) for key, array in before.items()}
    for missing in before:
        partial = {key: array for key, array in zeros.items() if key != missing}
        with pytest.raises(ValueError, match=f"no '{missing.removeprefix('family.')}'"):
            env.restore(partial)
    after = env.state()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_what_cannot_be_saved_says_so():
    for inner, saved in ((Countdown(), False), (GymFamily(), False), (Bandit(), True)):
        env = Trials(inner).make(2)
        assert hasattr(env, "state") is hasattr(env, "restore") is saved
        env.close()


# By name


def test_episodes_is_an_option_of_trials_and_the_others_are_the_familys():
    family = load_family("trials:bandit", {"episodes": 10, "arms": 4, "pulls": 1})
    assert family == Trials(Bandit(arms=4, pulls=1), episodes=10)
    assert option_values(family) == {"arms": 4, "pulls": 1, "episodes": 10}
    assert load_family("trials:bandit") == Trials(Bandit(), episodes=2)
    assert option_values(Bandit()) == {"arms": 5, "pulls": 100}


@pytest.mark.parametrize(
    "name", ["tabular-mdp", "navigation-2d", "half-cheetah-dir", "gym:CartPole-v1"]
)
def test_trials_of_a_family_of_that_name(name):
    family = load_family(f"trials:{name}", {"horizon": 7, "episodes": 3})
    assert family == Trials(load_family(name, {"horizon": 7}), 3)
    assert family.spec.horizon == 21


def test_trials_of_a_users_own_family():
    name = f"{Countdown.__module__}:Countdown"
    assert load_family(f"trials:{name}", {"lives": 2}) == Trials(Countdown(lives=2))


@pytest.mark.parametrize(
    ("name", "option", "named"),
    [
        ("bandit", "episode", "episodes, "),
        ("bandit", "pull", "pulls, "),
        ("half-cheetah-vel", "maximum_velocity", "max_velocity, "),
        ("gym:CartPole-v1", "env_id", "episodes, horizon"),
    ],
)
def test_unknown_options_are_answered_with_the_closest_of_both(name, option, named):
    with pytest.raises(ValueError, match=f"no option '{option}'") as caught:
        load_family(f"trials:{name}", {option: 3})
    assert f"task family 'trials:{name}'" in str(caught.value)
    assert f"closest: {named}" in str(caught.value)
    assert len(str(caught.value).split("closest: ")[1].split(", ")) == min(
        3, 1 + len(option_values(load_family(name))) - name.startswith("gym")
    )


def test_episodes_is_an_option_of_trials_alone():
    with pytest.raises(ValueError, match="task family 'bandit' has no option 'episodes'"):
        load_family("bandit", {"episodes": 3})


def test_unknown_families_are_answered_with_the_closest():
    with pytest.raises(ValueError, match="no task family 'bandti'; closest: bandit"):
        load_family("trials:bandti")
    with pytest.raises(ValueError, match="the module 'no_such_module' cannot be imported"):
        load_family("trials:no_such_module:Tasks")


@pytest.mark.parametrize("episodes", [0, -1, 1.5, True, "two"])
def test_numbers_of_episodes_that_there_cannot_be(episodes):
    with pytest.raises(ValueError, match="Trials: episodes must be a whole number of at least 1"):
        load_family("trials:bandit", {"episodes": episodes})


@dataclass(frozen=True)
class Pixels(Countdown):
    """Claims to show pictures."""

    @property
    def spec(self):
        return replace(super().spec, image=(1, 1, 2))


@dataclass(frozen=True)
class Seasons(Countdown):
    """Has an option of the name that trials use."""

    episodes: int = 3


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (Pixels(), "its observations are pixels"),
        (Worlds(names="chain-short,random-small-sparse"), "its lifetimes differ in kind"),
        (RandomWalkOffPolicy(), "it asks for a value"),
        (DelayedHopper(), "its rewards are delayed"),
        (Seasons(), "its own option episodes would be hidden"),
        (Trials(Bandit()), "its own option episodes would be hidden"),
    ],
)
def test_families_that_have_no_trials(family, reason):
    given = f"there are no trials of {type(family).__name__}"
    with pytest.raises(ValueError, match=f"{given}.*{reason}"):
        Trials(family)


def test_delay_can_be_taken_away():
    assert load_family("trials:delayed-hopper", {"delay": 1}).spec.reward_delay == 1

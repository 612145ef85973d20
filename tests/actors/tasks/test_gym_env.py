from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.utils.env_checker import check_env

from actors.family import TaskFamily
from actors.tasks import load_family
from actors.tasks.gym_env import SingleEnvFamily


class Pole(PendulumEnv):
    def __init__(self):
        super().__init__()
        self.m = 1.0

    def reset(self, *, seed=None, options=None):
        if options:
            self.m = options["task"]["mass"]
        return super().reset(seed=seed)


@dataclass(frozen=True)
class PoleMass(SingleEnvFamily):
    horizon: int = 20

    def make_single(self):
        return Pole()

    def sample(self, rng, num_tasks):
        return [{"mass": mass} for mass in rng.uniform(0.5, 2.0, num_tasks).tolist()]


def test_cart_pole_equals_gymnasium_until_the_end_and_is_harmless_after_it():
    family = load_family("gym:CartPole-v1")
    assert isinstance(family, TaskFamily)
    assert (family.spec.obs_size, family.spec.action_size) == (4, 2)
    assert family.spec.discrete
    assert family.spec.horizon == 500
    assert family.finite_tasks == [{}]
    env = family.make(3)
    obs, _ = env.reset(seed=0, options={"tasks": family.sample(np.random.default_rng(0), 3)})
    assert obs.dtype == np.float32
    assert len(np.unique(obs, axis=0)) == 3
    singles = [gymnasium.make("CartPole-v1") for _ in range(3)]
    for i, single in enumerate(singles):
        single.reset(seed=0)
        single.unwrapped.state = env.envs[i].unwrapped.state
    ended = [False] * 3
    for t in range(60):
        action = torch.tensor([1, 0, t % 2])
        last = obs
        obs, reward, terminated, truncated, _ = env.step(action)
        for i, single in enumerate(singles):
            if ended[i]:
                np.testing.assert_array_equal(obs[i], last[i])
                assert reward[i] == 0
                assert terminated[i]
                continue
            expected, paid, ended[i], _, _ = single.step(int(action[i]))
            np.testing.assert_array_equal(obs[i], expected)
            assert reward[i] == paid
            assert terminated[i] == ended[i]
        assert not truncated.any()
    assert sum(ended) >= 2
    env.reset()
    assert not env.step(torch.zeros(3, dtype=torch.int64))[2].any()
    env.close()


@pytest.mark.parametrize("horizon", [0, 250])
def test_a_time_limit_truncates_and_a_horizon_terminates(horizon):
    family = load_family("gym:Pendulum-v1", {"horizon": horizon} if horizon else None)
    env = family.make(2)
    env.reset(seed=0, options={"tasks": [{}, {}]})
    limit = horizon or 200
    assert family.spec.horizon == limit
    for _ in range(limit - 1):
        _, _, terminated, truncated, _ = env.step(np.zeros((2, 1)))
        assert not (terminated | truncated).any()
    _, _, terminated, truncated, _ = env.step(np.zeros((2, 1)))
    assert terminated.all() == bool(horizon)
    assert truncated.all() == (not horizon)


def test_box_actions_are_clipped():
    family = load_family("gym:Pendulum-v1")
    runs = []
    for size in (2.0, 50.0):
        env = family.make(1)
        env.reset(seed=0, options={"tasks": [{}]})
        runs.append(env.step(np.full((1, 1), size, np.float32)))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_discrete_observations_become_one_hot():
    family = load_family("gym:FrozenLake-v1")
    assert family.spec.obs_size == 16
    env = family.make(2)
    obs, _ = env.reset(seed=0, options={"tasks": [{}, {}]})
    np.testing.assert_array_equal(obs, np.eye(16, dtype=np.float32)[[0, 0]])


def test_an_id_without_time_limit_needs_a_horizon():
    gymnasium.register("metaloop-test/Endless-v0", entry_point=Pole)
    try:
        with pytest.raises(ValueError, match="give option horizon"):
            load_family("gym:metaloop-test/Endless-v0")
        assert load_family("gym:metaloop-test/Endless-v0", {"horizon": 9}).spec.horizon == 9
    finally:
        del gymnasium.registry["metaloop-test/Endless-v0"]


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized")
def test_a_users_family_gives_each_environment_its_task():
    check_env(Pole(), skip_render_check=True)
    family = PoleMass()
    assert isinstance(family, TaskFamily)
    tasks = family.sample(np.random.default_rng(0), 3)
    env = family.make(3)
    start, _ = env.reset(seed=4, options={"tasks": tasks})
    again, _ = family.make(3).reset(seed=4, options={"tasks": tasks})
    np.testing.assert_array_equal(start, again)
    assert [single.m for single in env.envs] == [task["mass"] for task in tasks]
    singles = []
    for i, task in enumerate(tasks):
        single = Pole()
        single.reset(seed=0, options={"task": task})
        single.state = env.envs[i].state.copy()
        singles.append(single)
    action = np.array([[0.5], [-9.0], [2.0]], np.float32)
    for t in range(20):
        obs, reward, terminated, _, _ = env.step(action)
        for i, single in enumerate(singles):
            expected, paid, *_ = single.step(np.clip(action[i], -2, 2))
            np.testing.assert_array_equal(obs[i], expected)
            assert reward[i] == pytest.approx(paid, rel=1e-6)
        assert terminated.all() == (t == 19)
    env.reset()  # the tasks stay
    assert [single.m for single in env.envs] == [task["mass"] for task in tasks]


def test_a_partial_reset_starts_the_masked_environments_alone():
    family = PoleMass()
    tasks = family.sample(np.random.default_rng(0), 3)
    env, same = family.make(3), family.make(3)
    for batch in (env, same):
        batch.reset(seed=4, options={"tasks": tasks})
    action = np.array([[0.5], [-1.0], [2.0]], np.float32)
    for _ in range(6):
        obs, *_ = env.step(action)
        same.step(action)
    start, info = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert info == {}
    np.testing.assert_array_equal(start[1:], obs[1:])
    assert (start[0] != obs[0]).any()
    expected, _ = same.reset()  # the masked one's own stream goes on as in a full reset
    np.testing.assert_array_equal(start[0], expected[0])
    assert [single.m for single in env.envs] == [task["mass"] for task in tasks]
    for t in range(14):
        last, reward, terminated, truncated, _ = env.step(action)
        expected, paid, *_ = same.step(action)
        np.testing.assert_array_equal(last[0], expected[0])
        assert reward[0] == paid[0]
        assert terminated.tolist() == [False, t == 13, t == 13]
        assert not truncated.any()
    env.reset(options={"reset_mask": torch.tensor([False, True, False])})
    obs, reward, terminated, _, _ = env.step(action)
    assert terminated.tolist() == [False, False, True]
    np.testing.assert_array_equal(obs[2], last[2])
    assert reward[2] == 0


def test_bad_masks_are_named():
    env = PoleMass().make(2)
    with pytest.raises(ValueError, match="first reset needs"):
        env.reset(options={"reset_mask": np.ones(2, bool)})
    env.reset(seed=0, options={"tasks": [{"mass": 1.0}] * 2})
    for bad in ([True], [1, 0], np.ones((2, 1), bool)):
        with pytest.raises(ValueError, match="reset_mask must be bool of shape"):
            env.reset(options={"reset_mask": bad})


def test_resets_without_fitting_tasks_are_named():
    env = PoleMass().make(2)
    with pytest.raises(ValueError, match="first reset needs"):
        env.reset(seed=0)
    with pytest.raises(ValueError, match="2 environments, 1 tasks"):
        env.reset(seed=0, options={"tasks": [{"mass": 1.0}]})


def test_spaces_that_cannot_be_handled_are_named():
    class Odd(Pole):
        def __init__(self):
            super().__init__()
            self.action_space = gymnasium.spaces.MultiBinary(2)

    class Text(Pole):
        def __init__(self):
            super().__init__()
            self.observation_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(2))

    @dataclass(frozen=True)
    class OddFamily(PoleMass):
        def make_single(self):
            return Odd()

    @dataclass(frozen=True)
    class TextFamily(PoleMass):
        def make_single(self):
            return Text()

    with pytest.raises(ValueError, match="actions must be Box or Discrete, not MultiBinary"):
        _ = OddFamily().spec
    with pytest.raises(ValueError, match="observations of fixed size are needed, not Sequence"):
        _ = TextFamily().spec


class Odd(Pole):
    """A pole whose second step returns what its class attributes say instead."""

    changes = {}  # noqa: RUF012 (set by the test)
    at_reset = False

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.num_steps = 0
        return (obs[:1], info) if self.at_reset else (obs, info)

    def step(self, action):
        names = ("obs", "reward", "terminated", "truncated", "info")
        returned = dict(zip(names, super().step(action), strict=True))
        self.num_steps += 1
        return tuple((returned | (self.changes if self.num_steps == 2 else {})).values())


@dataclass(frozen=True)
class Odds(PoleMass):
    def make_single(self):
        return Odd()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # A single number would fill the whole row.
        (
            {"obs": np.zeros(1, np.float32)},
            "observation ndarray of shape (1,), expected shape (3,)",
        ),
        (
            {"obs": np.zeros(4, np.float32)},
            "observation ndarray of shape (4,), expected shape (3,)",
        ),
        ({"reward": None}, "reward NoneType None, expected a number"),
        ({"reward": np.ones(1)}, "reward ndarray of shape (1,), expected a number"),
        ({"terminated": None}, "terminated NoneType None, expected True or False"),
        ({"truncated": 0}, "truncated int 0, expected True or False"),
    ],
)
def test_what_an_environment_should_not_return_is_named(monkeypatch, changes, said):
    monkeypatch.setattr(Odd, "changes", changes)
    family = Odds()
    tasks = family.sample(np.random.default_rng(0), 2)
    env = family.make(2)
    env.reset(seed=0, options={"tasks": tasks})
    env.step(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"Odd\.step returned as ") as caught:
        env.step(torch.zeros(2, 1))
    assert f"{said} (environment 0, task {tasks[0]})" in str(caught.value)


def test_what_a_reset_should_not_return_is_named(monkeypatch):
    monkeypatch.setattr(Odd, "at_reset", True)
    family = Odds()
    tasks = family.sample(np.random.default_rng(0), 1)
    with pytest.raises(ValueError, match=r"Odd\.reset returned as observation ndarray of shape"):
        family.make(1).reset(seed=0, options={"tasks": tasks})

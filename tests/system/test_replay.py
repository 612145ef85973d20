"""What was recorded is done again, and looked at."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from actors.rollout import Request, RolloutWorker, Slot
from actors.tasks import load_family
from actors.tasks.navigation_2d import Navigation2D, Navigation2DEnv
from actors.tasks.trials import Trials
from learners.core.errors import ConfigError
from learners.core.params import flatten_members
from learners.core.policy import Policy
from system.replay import replay

pytestmark = pytest.mark.usefixtures("torch_threads")


def recorded(family, num_members=3, num_envs=2, num_steps=None, first=4):
    """A chunk of whole episodes of members `first` …, and its request."""
    policy = Policy(family.spec, (8,), "tanh", 1.0)
    each = [policy.init(torch.Generator().manual_seed(m)) for m in range(num_members)]
    params = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    request = Request(
        slot=Slot(2, (first, first + num_members), (0, num_envs)),
        tasks=tuple(family.sample(np.random.default_rng(0), num_members)),
        seeds=(5, 6),
        version=1,
        num_steps=num_steps or family.spec.horizon,
    )
    worker = RolloutWorker(family, policy)
    chunk, receipt, _ = worker.collect(request, flatten_members(params).numpy(), 1)
    return request, chunk, receipt


@pytest.mark.parametrize("name", ["navigation-2d", "half-cheetah-dir", "ant-dir", "catch"])
def test_the_same_returns_and_lengths(name):
    family = load_family(name)
    request, chunk, receipt = recorded(family)
    seen = replay(family, request, chunk, [4, 6, 99], every=1000)
    assert sorted(seen) == [4, 6]
    for member, episodes in seen.items():
        found = sorted((e.steps[-1], e.returns[-1]) for e in episodes)
        known = sorted(zip(receipt.lengths[member - 4], receipt.returns[member - 4], strict=True))
        np.testing.assert_allclose(found, known, rtol=1e-5)
        assert all(e.steps == [0, e.steps[-1]] for e in episodes)
        assert all(len(e.scenes) == len(e.returns) == 2 for e in episodes)


def test_what_is_seen_is_what_was_observed():
    family = Navigation2D(horizon=12)
    request, chunk, _ = recorded(family)
    (first, second) = replay(family, request, chunk, [5], every=1)[5]
    for e, episode in enumerate((first, second)):
        path = np.stack([plan.agent for plan in episode.scenes])
        assert episode.steps == list(range(13))
        np.testing.assert_array_equal(path[:-1].astype(np.float32), chunk.arrays["obs"][1, :, e])
        reward = chunk.arrays["reward"][1, :, e]
        np.testing.assert_allclose(np.diff(episode.returns), reward, rtol=1e-5)


def test_scenes_at_intervals_and_at_the_end():
    family = Navigation2D(horizon=10)
    (episode, _) = replay(family, *recorded(family)[:2], [4], every=4)[4]
    assert episode.steps == [0, 4, 8, 10]


def test_the_episodes_of_a_trial_follow_one_another():
    trials = Trials(load_family("maze", {"horizon": 15}), episodes=3)
    request, chunk, receipt = recorded(trials, num_envs=1)
    seen = replay(trials.family, request, chunk, [4, 5, 6], every=1)
    for member, episodes in seen.items():
        assert len(episodes) == 3
        found = [episode.returns[-1] for episode in episodes]
        np.testing.assert_allclose(found, receipt.returns[member - 4], rtol=1e-5)
        start = episodes[0].scenes[0].agent
        for episode in episodes:
            assert episode.scenes[0].agent.tolist() == start.tolist()
            assert episode.steps[-1] <= 15


def test_a_game_goes_on_after_a_lost_life():
    family = load_family("atari-breakout", {"horizon": 250})
    request, chunk, receipt = recorded(family, num_members=1, num_envs=1)
    assert chunk.arrays["terminated"].sum() > 1  # more than one life
    ((episode,),) = replay(family, request, chunk, [4], every=100).values()
    assert [episode.returns[-1]] == receipt.returns[0]
    assert episode.steps[-1] == receipt.lengths[0][0]
    assert episode.scenes[0].shape == (210, 160, 3)
    assert not np.array_equal(episode.scenes[0], episode.scenes[1])


def test_a_beginning_only():
    family = Navigation2D(horizon=30)
    request, chunk, _ = recorded(family, num_steps=7)
    (episode, _) = replay(family, request, chunk, [4], every=2)[4]
    assert episode.steps == [0, 2, 4, 6]


@dataclass(frozen=True)
class Moody(Navigation2D):
    """Pays as it likes."""

    def make(self, num_envs):
        return MoodyEnv(self, num_envs)


class MoodyEnv(Navigation2DEnv):
    def advance(self, action):
        obs, reward, reached = super().advance(action)
        return obs, reward + float(np.random.default_rng().random()), reached


def test_environments_that_do_something_else_are_named():
    family = Moody(horizon=5)
    with pytest.raises(ConfigError, match=r"Moody\(.*something else the second time"):
        replay(family, *recorded(family)[:2], [4], every=1)


def test_nothing_is_asked_for_beyond_the_recording():
    family = Navigation2D(horizon=5)
    request, chunk, _ = recorded(family)
    chunk = replace(chunk, arrays={n: a.copy() for n, a in chunk.arrays.items()})
    before = {n: a.copy() for n, a in chunk.arrays.items()}
    replay(family, request, chunk, [4], every=1)
    for name, array in before.items():
        np.testing.assert_array_equal(chunk.arrays[name], array)

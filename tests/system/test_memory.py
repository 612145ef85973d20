"""Replicas that do not fit are refused, with the number that would."""

from dataclasses import replace

import pytest

from learners.config import FrodoConfig, LirpgConfig, PpoConfig
from learners.core.errors import ConfigError
from learners.core.trajectory import Spec
from system.memory import check_replicas, replica_bytes

SPEC = Spec(11, 3, discrete=False, horizon=1000)


@pytest.fixture
def run_of(tiny_run):
    def make(learner, num_members):
        return replace(tiny_run(), learner=learner, num_members=num_members, num_envs=1)

    return make


def test_the_matrix_of_steps_counts(run_of):
    lirpg, ppo = run_of(LirpgConfig(), 1), run_of(PpoConfig(), 1)
    assert replica_bytes(lirpg, SPEC) - replica_bytes(ppo, SPEC) == 3 * 4 * 2048**2


def test_the_batches_of_a_window_count(run_of):
    """PPO's four copies of a rollout, and one for each inner update."""
    ppo = replica_bytes(run_of(PpoConfig(num_steps=32), 1), SPEC)
    frodo = FrodoConfig(num_steps=32, num_inner_updates=4)
    assert replica_bytes(run_of(frodo, 1), SPEC) == 2 * ppo


def test_what_fits_is_accepted_and_what_does_not_is_refused_with_what_would(run_of):
    config = run_of(LirpgConfig(), 5)
    each = replica_bytes(config, SPEC)
    check_replicas(config, SPEC, 5 * each)
    with pytest.raises(ConfigError, match=r"5 replicas need .* GiB.*3 would fit: --num-members 3"):
        check_replicas(config, SPEC, 5 * each - each - 1)
    with pytest.raises(ConfigError, match="not even one fits"):
        check_replicas(config, SPEC, each - 1)


def test_methods_that_adapt_on_whole_episodes_are_not_asked(tiny_run):
    check_replicas(tiny_run(), SPEC, 0)


def test_this_machines_memory_is_what_counts_by_default(run_of):
    with pytest.raises(ConfigError, match="would fit"):
        check_replicas(run_of(LirpgConfig(), 10**7), SPEC)


def test_several_replicas_on_pixels_are_refused(run_of):
    pixels = Spec(4 * 84 * 84, 4, discrete=True, horizon=1000, image=(4, 84, 84))
    check_replicas(run_of(PpoConfig(), 1), pixels)
    with pytest.raises(ConfigError, match="--num-members 2: a run on pixels has one replica"):
        check_replicas(run_of(PpoConfig(), 2), pixels)

"""Runs on streams: replicas, backends, resuming, evaluation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.tasks import load_family
from learners.config import A2cConfig, LirpgConfig, PpoConfig
from system import run_folder
from system.loop import Counters, Loop
from system.run import average, train
from system.serial_backend import SerialBackend

pytestmark = pytest.mark.usefixtures("torch_threads")

LEARNERS = {
    "a2c": A2cConfig(num_steps=8, hidden=(8,), normalize_obs=True, normalize_reward=True),
    "ppo": PpoConfig(num_steps=16, num_epochs=2, num_minibatches=2, hidden=(8,)),
    "lirpg": LirpgConfig(
        num_steps=16, num_epochs=2, num_minibatches=2, hidden=(8,), normalize_obs=True
    ),
}
MEASURED = ("perf/", "sys/", "time/iteration")


@pytest.fixture
def stream_run(tiny_run):
    """(method, task) → a run of three replicas with two environments each."""

    def make(method="a2c", task="delayed-hopper", **changes):
        defaults = {
            "learner": LEARNERS[method],
            "task": task,
            "num_members": 3,
            "num_envs": 2,
            "members_per_slot": 2,
            "picture_every": 0,
        }
        config = replace(tiny_run(), **(defaults | {"task_options": {}} | changes))
        options = {} if task.startswith("gym:") else {"horizon": 12}
        return replace(config, task_options=options)

    return make


def serial_loop(config):
    family = load_family(config.task, config.task_options)
    return Loop(config, family, SerialBackend(config, family, range(1, 1 + config.num_members)))


def learned(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(MEASURED)}


def iterations(loop, number, counters=None):
    counters, rows = counters or Counters(), []
    for _ in range(number):
        counters, metrics, skipped = loop.iterate(counters)
        assert skipped is None
        rows.append(learned(metrics))
    return counters, rows


@pytest.mark.parametrize("method", LEARNERS)
def test_every_replica_learns_and_steps_are_counted(stream_run, method):
    config = stream_run(method)
    loop = serial_loop(config)
    before = {n: p.clone() for n, p in loop.backend.learner("get_state")["params"].items()}
    counters, rows = iterations(loop, 2)
    after = loop.backend.learner("get_state")["params"]
    for name, p in after.items():
        assert (p != before[name]).flatten(1).any(1).all(), name
    assert counters.env_steps == 2 * 3 * 2 * config.learner.num_steps
    assert loop.num_replicas == 3
    assert all(isinstance(v, float) for v in rows[-1].values())


def test_recent_returns_are_raw_and_averaged_over_replicas(stream_run):
    loop = serial_loop(stream_run("a2c"))
    _, rows = iterations(loop, 4)
    assert all(len(recent) > 0 for recent in loop.recent)
    means = [np.mean(recent) for recent in loop.recent]
    assert rows[-1]["rollout/ep_rew_mean"] == pytest.approx(np.mean(means))
    low, high = (rows[-1][f"rollout/ep_rew_ci95_{end}"] for end in ("low", "high"))
    assert low <= np.mean(means) <= high
    assert [rows[-1][f"replica/ep_rew_mean_{m}"] for m in range(3)] == pytest.approx(means)
    # Twelve steps of a hopper that is upright are worth about 1 each: nothing is normalized.
    assert np.mean(means) > 8.0


def test_members_keep_their_tasks(stream_run):
    loop = serial_loop(stream_run("a2c", task="half-cheetah-vel"))
    iterations(loop, 1)
    tasks = [dict(task) for task in loop.members]
    iterations(loop, 2)
    assert [dict(task) for task in loop.members] == tasks
    assert len({task["velocity"] for task in tasks}) == 3


def test_an_evaluation_is_episodes_of_each_replica_and_leaves_the_stream_alone(stream_run):
    loop, undisturbed = serial_loop(stream_run("a2c")), serial_loop(stream_run("a2c"))
    counters, _ = iterations(loop, 2)
    tasks, curve = loop.evaluate(7)
    assert (len(tasks), curve.shape) == (3, (3, 1))
    _, rows = iterations(loop, 1, counters)
    _, expected = iterations(undisturbed, 3)
    np.testing.assert_equal(rows, expected[2:])


@pytest.mark.ray
@pytest.mark.parametrize("num_actors", [3, 1])
@pytest.mark.parametrize("task", ["delayed-hopper", "gym:CartPole-v1"])
def test_ray_learns_on_streams_bitwise_what_the_serial_backend_learns(
    stream_run, task, num_actors, assert_same_state
):
    from system.ray_backend import RayBackend

    config = stream_run("ppo" if num_actors == 1 else "a2c", task)
    serial = serial_loop(config)
    counters, rows = iterations(serial, 3)
    on_ray = replace(config, runtime=replace(config.runtime, backend="ray", num_actors=num_actors))
    family = load_family(config.task, config.task_options)
    backend = RayBackend(on_ray, family, [1, 2, 3])
    try:
        loop = Loop(on_ray, family, backend)
        found_counters, found = iterations(loop, 3)
        assert_same_state(backend.learner("get_state"), serial.backend.learner("get_state"))
    finally:
        backend.close()
    assert found_counters == counters
    np.testing.assert_equal(found, rows)


@pytest.mark.ray
def test_streams_go_on_bit_for_bit_where_their_actor_is_replaced(stream_run, assert_same_state):
    from system.ray_backend import RayBackend

    config = stream_run("a2c")
    serial = serial_loop(config)
    counters, rows = iterations(serial, 3)
    on_ray = replace(config, runtime=replace(config.runtime, backend="ray", num_actors=1))
    family = load_family(config.task, config.task_options)
    backend = RayBackend(on_ray, family, [1, 2, 3])
    try:
        loop = Loop(on_ray, family, backend)
        found_counters, found = iterations(loop, 1)
        (lane,) = backend.pool.lanes
        before, lane.leaving = lane.pid, True
        found_counters, more = iterations(loop, 2, found_counters)
        assert_same_state(backend.learner("get_state"), serial.backend.learner("get_state"))
        assert lane.pid != before
        assert backend.actor_restarts == 1
    finally:
        backend.close()
    assert found_counters == counters
    np.testing.assert_equal(found + more, rows)


@pytest.mark.parametrize("method", LEARNERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    stream_run, method, tmp_path, assert_same_state
):
    whole = replace(stream_run(method), iterations=4)
    train(whole, tmp_path / "whole")
    half = replace(whole, iterations=2)
    train(half, tmp_path / "halves")
    train(whole, tmp_path / "halves")
    expected, counters, _ = run_folder.restore(tmp_path / "whole")
    found, again, _ = run_folder.restore(tmp_path / "halves")
    assert again == counters
    assert_same_state(found, expected)
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "halves")
    ]
    assert len(lines[0]) == len(lines[1]) == 4


def test_streams_that_cannot_be_saved_begin_anew_at_every_checkpoint(stream_run):
    loop = serial_loop(stream_run("a2c", "gym:CartPole-v1"))
    iterations(loop, 2)
    assert set(loop.carries) == {0, 1}
    snapshot = loop.snapshot()
    assert not any(name.startswith("carry") for name in snapshot)
    assert loop.carries == {}


def test_a_non_finite_reward_skips_the_update_and_names_it(stream_run, monkeypatch):
    loop = serial_loop(stream_run("ppo"))
    counters, _ = iterations(loop, 1)
    before = loop.backend.learner("get_state")
    collect = loop.backend.collect

    def spoil(requests, carries):
        monkeypatch.undo()
        arrivals = collect(requests, carries)
        arrivals[1].chunk.arrays["reward"][0, 3] = math.nan
        return arrivals

    monkeypatch.setattr(loop.backend, "collect", spoil)
    counters, metrics, skipped = loop.iterate(counters)
    assert (skipped.failure.tensor, skipped.failure.member) == ("reward", 2)
    assert metrics["meta/skipped_updates"] == 1.0
    after = loop.backend.learner("get_state")
    for group in before:
        for name, tensor in before[group].items():
            assert torch.equal(tensor, after[group][name]), (group, name)


def test_records_average_what_is_finite_and_keep_the_last_count():
    rows = [
        {"a": 1.0, "b": math.nan, "time/env_steps": 10.0},
        {"a": 3.0, "b": 4.0, "time/env_steps": 20.0, "seldom": 5.0},
    ]
    assert average(rows) == {"a": 2.0, "b": 4.0, "time/env_steps": 20.0, "seldom": 5.0}
    assert math.isnan(average(rows[:1])["b"])

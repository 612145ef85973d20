"""Asynchronous collection: lag, drops and what is counted."""

from dataclasses import replace
from typing import Any

import pytest

from actors.rollout import Receipt, Request, make_slots
from actors.tasks import load_family
from learners.config import A2cConfig
from system import run_folder
from system.ahead import DEPTH, Ahead
from system.backend import Arrival
from system.config import RunConfig, RuntimeConfig
from system.learner_host import Outcome
from system.loop import Counters, Loop
from system.run import train


class Scripted:
    """A backend in which a chunk arrives when it is polled for, under the version of that time."""

    def __init__(self):
        self.version = 1
        self.waiting: list[tuple[Request, Any]] = []
        self.busy = 0

    def submit(self, request, carry):
        self.waiting.append((request, carry))

    def poll(self, also=None):
        arrivals = []
        for request, carry in self.waiting:
            m = request.slot.num_members
            receipt = Receipt(
                request.slot.id,
                self.version,
                10,
                [[1.0]] * m,
                [[5.0]] * m,
                0.1,
                1,
                100,
                "here",
                50.0,
            )
            number = 0 if carry is None else carry[1] + 1
            name = (request.slot.id, number)
            arrivals.append(Arrival(request, name, receipt, name))
        self.waiting = []
        self.busy = max(0, self.busy - 1)
        return arrivals

    def start(self, method, *args):
        self.busy = 3
        return method

    def finished(self, reference):
        return self.busy == 0

    def finish(self, reference, method):
        self.version += 1
        return Outcome(version=self.version, metrics={})


def ahead_of(backend, max_lag, carries=None):
    slots = make_slots(2, 2, 1, 2)

    def request(slot, number):
        return Request(slot, ({},), (number, 0), None, 5, stream=True)

    return Ahead(backend, slots, request, max_lag, backend.version, carries or {})


def test_a_batch_is_one_chunk_of_every_slot_in_order():
    ahead = ahead_of(Scripted(), max_lag=3)
    for number in range(3):
        handles, receipts, _ = ahead.next_batch()
        assert handles == [(0, number), (1, number)]
        assert [receipt.slot_id for receipt in receipts] == [0, 1]
        ahead.while_collecting("advance", *handles)


def test_a_slot_is_never_more_than_its_depth_ahead():
    backend = Scripted()
    ahead = ahead_of(backend, max_lag=100)
    ahead.next_batch()
    for _ in range(10):
        ahead.gather()
        assert all(len(ready) + ahead.flying[slot] <= DEPTH for slot, ready in ahead.ready.items())
    assert all(len(ready) == DEPTH for ready in ahead.ready.values())


def test_lag_is_the_newest_version_less_the_chunks():
    backend = Scripted()
    ahead = ahead_of(backend, max_lag=5)
    lags = []
    for _ in range(4):
        handles, _, _ = ahead.next_batch()
        lags.append(ahead.metrics()["perf/policy_lag_max"])
        ahead.while_collecting("advance", *handles)
    # Two chunks wait while an update runs: the first of them lags one version, the second two.
    assert lags == [0.0, 1.0, 2.0, 2.0]
    assert ahead.metrics()["perf/chunks_dropped"] == 0.0


def test_chunks_that_lag_too_much_are_dropped_counted_and_followed_by_the_next():
    backend = Scripted()
    ahead = ahead_of(backend, max_lag=1)
    used, seen = [], 0
    for _ in range(6):
        handles, receipts, _ = ahead.next_batch()
        used += handles
        seen += len(receipts)
        assert ahead.metrics()["perf/policy_lag_max"] <= 1.0
        ahead.while_collecting("advance", *handles)
    ahead.next_batch()
    assert ahead.dropped > 0
    numbers = [number for slot, number in used if slot == 0]
    assert numbers == sorted(set(numbers))  # in the stream's order, none twice
    # Every chunk up to the newest used one was either used or dropped, and reported once.
    assert seen >= len(used)
    assert ahead.consumed[0] == (0, ahead.consumed[0][1])


def test_the_carry_of_a_checkpoint_follows_what_was_learned_from():
    backend = Scripted()
    ahead = ahead_of(backend, max_lag=9, carries={0: (0, 40), 1: (1, 50)})
    handles, _, _ = ahead.next_batch()
    assert handles == [(0, 41), (1, 51)]
    ahead.while_collecting("advance", *handles)
    assert ahead.consumed == {0: (0, 41), 1: (1, 51)}
    assert ahead.latest[0][1] > 41  # collection is further on


# On Ray


@pytest.fixture
def lagging_run():
    return RunConfig(
        preset="a2c/half-cheetah",
        task="half-cheetah",
        learner=A2cConfig(num_steps=8, hidden=(8,), normalize_obs=True),
        task_options={"horizon": 12},
        iterations=12,
        num_members=2,
        num_envs=2,
        members_per_slot=1,
        eval_every=5,
        eval_tasks=4,
        picture_every=0,
        max_lag=2,
        runtime=RuntimeConfig(
            device="cpu", learner_threads=1, timeout_s=120.0, object_store_mb=100
        ),
    )


@pytest.mark.ray
def test_an_asynchronous_run_trains_evaluates_and_resumes(lagging_run, tmp_path, torch_threads):
    half = replace(lagging_run, iterations=6)
    assert train(half, tmp_path) is not None
    state, counters, _ = run_folder.restore(tmp_path)
    assert counters.iteration == 6
    assert counters.env_steps >= 6 * 2 * 2 * 8
    loop_state = run_folder.pop_loop_state(state)
    assert {"carry0", "carry1", "recent"} <= set(loop_state)
    assert int(state["counters"]["num_updates"][0]) == 6
    result = train(lagging_run, tmp_path)
    assert result["adapt"][0]["k"] == 0
    state, counters, _ = run_folder.restore(tmp_path)
    assert (counters.iteration, int(state["counters"]["num_updates"][0])) == (12, 12)


@pytest.mark.ray
def test_steps_of_used_and_dropped_chunks_are_counted_once(lagging_run, torch_threads):
    from system.ray_backend import RayBackend

    config = lagging_run
    family = load_family(config.task, config.task_options)
    backend = RayBackend(config, family, [1, 2])
    try:
        loop = Loop(config, family, backend)
        counters = Counters()
        for _ in range(10):
            counters, metrics, skipped = loop.iterate(counters)
            assert skipped is None
            assert metrics["perf/policy_lag_max"] <= config.max_lag
        used = 10 * len(loop.ahead.slots)
        waiting = len(loop.ahead.dropped_now)
        assert counters.env_steps == (used + loop.ahead.dropped - waiting) * 2 * 8
    finally:
        backend.close()


@pytest.mark.ray
def test_a_learner_crowded_by_its_actors_is_advised(lagging_run, caplog, monkeypatch):
    from system import ray_backend

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    roomy = replace(lagging_run, runtime=replace(lagging_run.runtime, learner_threads=2))
    ray_backend.advise_on_threads(lagging_run)
    ray_backend.advise_on_threads(replace(roomy, max_lag=0))
    assert caplog.records == []
    ray_backend.advise_on_threads(roomy)
    assert "--learner-threads 1 is faster" in caplog.text

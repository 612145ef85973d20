"""Serial, Ray with one actor and Ray with three actors are bitwise the same."""

import os

import numpy as np
import pytest

from actors.rollout import Request, make_slots
from actors.tasks import load_family
from system.episodes import watch
from system.loop import Counters, Loop
from system.seeds import Stream, make_seeds
from system.serial_backend import SerialBackend
from tests.system.families import Obedient

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("torch_threads")]

MEASURED = ("perf/", "sys/", "time/iteration")
"""Metrics that tell of the machine."""


def family_of(task, clusters):
    """navigation-2d is that of the tests of faults, which use the same cluster after these."""
    if task == "navigation-2d":
        return Obedient(horizon=20, action_scale=0.1, orders=str(clusters.orders))
    return load_family(task, {"horizon": 20, "action_scale": 0.3})


def outcome(config, family, backend, initial, iterations=3):
    """State, learned metrics and an evaluation after some iterations from `initial`."""
    backend.learner("set_state", initial)
    loop = Loop(config, family, backend)
    counters, rows = Counters(), []
    for _ in range(iterations):
        counters, metrics, skipped = loop.iterate(counters)
        assert skipped is None
        rows.append({k: v for k, v in metrics.items() if not k.startswith(MEASURED)})
    _, curve = loop.evaluate(4)
    return backend.learner("get_state"), counters, rows, curve


@pytest.mark.parametrize("num_actors", [3, 1])
@pytest.mark.parametrize("envs_per_slot", [1_000_000, 2])
@pytest.mark.parametrize("task", ["half-cheetah-dir", "navigation-2d"])
def test_ray_learns_bitwise_what_the_serial_backend_learns(
    task, envs_per_slot, num_actors, clusters, tiny_run, monkeypatch, assert_same_state
):
    config = tiny_run(task, envs_per_slot=envs_per_slot)
    family = family_of(task, clusters)
    backend = clusters.get(config, family)
    monkeypatch.setattr(backend.pool, "lanes", backend.pool.lanes[:num_actors])
    serial = SerialBackend(config, family, [1])
    initial = serial.learner("get_state")
    assert_same_state(clusters.initial, initial)
    expected = outcome(config, family, serial, initial)
    found = outcome(config, family, backend, initial)
    with pytest.raises(AssertionError):
        assert_same_state(found[0], initial)
    assert_same_state(found[0], expected[0])
    assert found[1:3] == expected[1:3]
    np.testing.assert_array_equal(found[3], expected[3])
    assert backend.actor_restarts == 0


def requests_of(config, family, version):
    tasks = family.sample(np.random.default_rng(0), config.num_members)
    return [
        Request(
            slot,
            tuple(tasks[slice(*slot.members)]),
            make_seeds(0, Stream.TRAIN, 0, 0, slot.id),
            version,
            family.spec.horizon,
        )
        for slot in make_slots(config.num_members, config.num_envs, 1, 1)
    ]


def test_answers_stand_in_the_order_of_the_requests(clusters, tiny_run):
    """Twelve slots on three actors: more than can be under way at a time."""
    config = tiny_run()
    family = family_of("navigation-2d", clusters)
    backend = clusters.get(config, family)
    _, version = backend.learner("begin", 4, [(m, m + 1) for m in range(4)])
    requests = requests_of(config, family, version)[::-1]
    arrivals = backend.collect(requests)
    assert [arrival.request for arrival in arrivals] == requests
    assert [arrival.receipt.slot_id for arrival in arrivals] == list(range(11, -1, -1))
    assert {arrival.receipt.worker for arrival in arrivals} <= {
        lane.pid for lane in backend.pool.lanes
    }
    assert [lane.in_flight for lane in backend.pool.lanes] == [[], [], []]


def test_what_is_looked_at_is_the_same(clusters, tiny_run):
    config = tiny_run()
    family = family_of("navigation-2d", clusters)
    rows = []
    for backend in (clusters.get(config, family), SerialBackend(config, family, [1])):
        backend.learner("set_state", clusters.initial)
        rows.append(watch(Loop(config, family, backend), 2).rows)
    for found, expected in zip(rows[0], rows[1], strict=True):
        for panel, other in zip(found, expected, strict=True):
            assert panel.lines == other.lines
            paths = [np.stack([s.agent for s in p.episodes[0].scenes]) for p in (panel, other)]
            np.testing.assert_array_equal(*paths)


def test_the_driver_holds_references_and_no_chunks(clusters, tiny_run):
    import ray

    config = tiny_run()
    family = family_of("navigation-2d", clusters)
    backend = clusters.get(config, family)
    _, version = backend.learner("begin", 4, [(m, m + 1) for m in range(4)])
    arrivals = backend.collect(requests_of(config, family, version))
    for arrival in arrivals:
        assert isinstance(arrival.chunk.reference, ray.ObjectRef)
        assert arrival.carry is None


def test_driver_learner_and_actors_are_processes_of_their_own(clusters, tiny_run):
    backend = clusters.get(tiny_run(), family_of("navigation-2d", clusters))
    assert backend.pids[0] == os.getpid()
    assert len(set(backend.pids)) == 5

"""A whole node dies in the middle of a run: bit for bit, nothing is lost."""

import logging
import time

import pytest

from system.loop import Counters, Loop
from system.ray_backend import RayBackend
from system.serial_backend import SerialBackend
from tests.cluster.nodes import ADDRESSES, READY_SECONDS, WORKER
from tests.system.families import EVERY_TASK, Obedient

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("torch_threads")]


@pytest.fixture
def family(tmp_path):
    return Obedient(horizon=20, action_scale=0.1, orders=str(tmp_path))


@pytest.fixture
def episodes(tiny_run):
    """Chunks of some 100 KB and more, which stay in the store of the node that collected them."""
    return tiny_run(members_per_slot=1, num_envs=300)


@pytest.fixture
def streams(tiny_run, episodes):
    """Carries are as large here."""
    from dataclasses import replace

    from system.presets import PRESETS

    learner = replace(PRESETS["a2c/half-cheetah"]().learner, num_steps=8)
    return replace(episodes, learner=learner, num_members=3, num_envs=3000)


@pytest.fixture
def on_nodes(nodes, family):
    """config → a backend with an actor on each node."""
    started = []

    def start(config):
        from dataclasses import replace

        runtime = replace(config.runtime, backend="ray", num_actors=3, address=nodes.gcs)
        started.append(RayBackend(replace(config, runtime=runtime), family, seeds(config)))
        return started[-1]

    yield start
    for backend in started:
        backend.close()


def seeds(config):
    return list(range(1, 1 + config.num_members))


def iterations(loop, number, counters=None):
    counters = counters or Counters()
    for _ in range(number):
        counters, _, skipped = loop.iterate(counters)
        assert skipped is None
    return loop.backend.learner("get_state"), counters


def undisturbed(config, family):
    """State and counters of the serial backend after three iterations."""
    return iterations(Loop(config, family, SerialBackend(config, family, seeds(config))), 3)


def said_and_lost(caplog, begun):
    """What was said, and the seconds since `begun`."""
    print(f"three iterations with a dead node: {time.monotonic() - begun:.1f} s")
    return " ".join(record.getMessage() for record in caplog.records)


def test_a_node_killed_while_it_collects_changes_nothing(
    on_nodes, nodes, episodes, family, tmp_path, meanwhile, wait_until, caplog, assert_same_state
):
    caplog.set_level(logging.WARNING, "metaloop")
    expected = undisturbed(episodes, family)
    loop = Loop(episodes, family, on_nodes(episodes))
    _, counters = iterations(loop, 1)
    (tmp_path / "wait").write_text(EVERY_TASK)

    def kill():
        try:
            wait_until(lambda: len([*tmp_path.glob("waiting-*")]) == 3, "all actors are at work")
            nodes.kill(WORKER)
        finally:
            (tmp_path / "wait").unlink()

    killed, begun = meanwhile(kill), time.monotonic()
    state, counters = iterations(loop, 2, counters)
    killed()
    assert_same_state(state, expected[0])
    assert counters == expected[1]
    said = said_and_lost(caplog, begun)
    assert f"on {ADDRESSES[WORKER]}" in said
    assert "its chunks are collected by others until it is back" in said
    nodes.join_worker()

    def back():
        iterations(loop, 1, counters)
        return loop.backend.actor_restarts == 1

    wait_until(back, "the actor is back", READY_SECONDS)
    assert len({lane.place.node for lane in loop.backend.pool.lanes}) == 3
    assert "is back as actor process" in " ".join(r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("kind", ["episodes", "streams"])
def test_chunks_that_die_with_their_node_are_collected_again(
    kind, request, on_nodes, nodes, family, monkeypatch, caplog, assert_same_state
):
    """The learner has not read them; of streams, where they stopped is lost with them."""
    caplog.set_level(logging.WARNING, "metaloop")
    config = request.getfixturevalue(kind)
    expected = undisturbed(config, family)
    backend = on_nodes(config)
    loop = Loop(config, family, backend)
    _, counters = iterations(loop, 1)
    collect = backend.collect

    def kill_after(requests, carries):
        monkeypatch.undo()
        arrivals = collect(requests, carries)
        nodes.kill(WORKER)
        return arrivals

    monkeypatch.setattr(backend, "collect", kill_after)
    begun = time.monotonic()
    state, counters = iterations(loop, 2, counters)
    assert_same_state(state, expected[0])
    assert counters == expected[1]
    assert "were lost with their node; collected again" in said_and_lost(caplog, begun)

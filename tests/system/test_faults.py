"""What fails, and what becomes of the run: actors, parameter server, learner, environments."""

import json
import logging
import math
import os
import platform
import re
import signal
from collections import Counter

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from actors.rollout import Request, Slot
from actors.tasks import load_family
from system import run, run_folder
from system.backend import RolloutError
from system.checkpoint import load_newest
from system.loop import Counters, Loop
from system.seeds import Stream, make_rng, make_seeds
from system.serial_backend import SerialBackend
from tests.system.families import EVERY_TASK, LEAK_MB, Obedient

pytestmark = pytest.mark.usefixtures("torch_threads")
on_ray = pytest.mark.ray

OBEDIENT = "tests.system.families:Obedient"


def tasks_of(family, iteration, num_members=4, seed=0):
    """The tasks that a run draws for an iteration, counted from 0."""
    return family.sample(make_rng(seed, Stream.TRAIN_TASKS, iteration), num_members)


def first_coordinate(task):
    """How an order names a task."""
    return str(task["goal"][0])


@pytest.fixture
def family(clusters):
    return Obedient(horizon=20, action_scale=0.1, orders=str(clusters.orders))


@pytest.fixture
def config(tiny_run):
    """Twelve slots: more than three actors have under way at a time."""
    return tiny_run(members_per_slot=1, envs_per_slot=1)


@pytest.fixture
def backend(clusters, config, family):
    """Ray with three actors, its learner as it was at the start."""
    found = clusters.get(config, family)
    found.learner("set_state", clusters.initial)
    yield found
    # A collection that was given up leaves requests behind; a run would have ended with it.
    found.pool.abandon()


@pytest.fixture
def undisturbed(config, family, clusters):
    """State and counters of the serial backend after three iterations."""
    serial = SerialBackend(config, family, [1])
    serial.learner("set_state", clusters.initial)
    return iterations(Loop(config, family, serial), 3)


def iterations(loop, number, counters=None):
    counters = counters or Counters()
    metrics = {}
    for _ in range(number):
        counters, metrics, skipped = loop.iterate(counters)
        assert skipped is None
    return loop.backend.learner("get_state"), counters, metrics


def waiting_pids(orders):
    return [int(path.name.removeprefix("waiting-")) for path in orders.glob("waiting-*")]


# Actors and parameter server


@on_ray
@pytest.mark.parametrize(("num_killed", "number"), [(1, signal.SIGKILL), (2, signal.SIGSEGV)])
def test_an_actor_killed_in_mid_iteration_changes_nothing(
    backend, undisturbed, config, family, clusters, meanwhile, wait_until, num_killed, number,
    assert_same_state, caplog,
):  # fmt: skip
    caplog.set_level(logging.WARNING, "metaloop")
    loop = Loop(config, family, backend)
    _, counters, _ = iterations(loop, 1)
    restarts_before = backend.actor_restarts
    orders = clusters.orders
    (orders / "wait").write_text(EVERY_TASK)

    def kill():
        ours = {lane.pid for lane in backend.pool.lanes}
        victims = wait_until(
            lambda: len(waiting_pids(orders)) == 3 and waiting_pids(orders)[:num_killed],
            "all actors are in an episode",
        )
        assert ours >= set(victims)
        for pid in victims:
            os.kill(pid, number)
        (orders / "wait").unlink()

    killed = meanwhile(kill)
    state, counters, _ = iterations(loop, 2, counters)
    killed()
    assert_same_state(state, undisturbed[0])
    assert counters == undisturbed[1]  # environment steps are not counted twice
    said = [r.getMessage() for r in caplog.records if "collected by others" in r.getMessage()]
    assert len(said) == num_killed
    for line in said:
        assert re.search(
            r"slot \d+ \(tasks .*failed in actor process \d+ on .*last held \d+ MB", line
        )
        assert ("Fatal Python error: Segmentation fault" in line) == (number == signal.SIGSEGV)

    # The others had done its work before it was back.
    def all_back():
        metrics = iterations(loop, 1, counters)[2]
        return metrics["sys/actor_restarts"] == restarts_before + num_killed

    wait_until(all_back, "the killed actors are back")
    assert all(lane.back is None for lane in backend.pool.lanes)
    assert len(set(backend.pids)) == 5
    assert all(psutil.pid_exists(pid) for pid in backend.pids)


@on_ray
def test_a_slow_actor_gets_less_to_do_and_is_named_once(
    backend, undisturbed, config, family, clusters, caplog, monkeypatch, assert_same_state
):
    slow = backend.pool.lanes[1].pid
    (clusters.orders / "slow").write_text(str(slow))
    loop, counters, done = Loop(config, family, backend), Counters(), Counter()
    note = loop.stragglers.note

    def count_and_note(receipts):
        done.update(receipt.worker for receipt in receipts)
        return note(receipts)

    monkeypatch.setattr(loop.stragglers, "note", count_and_note)
    for number in range(5):
        counters, metrics, _ = loop.iterate(counters)
        assert metrics["perf/slowest_actor_ratio"] > 1.0
        if number == 2:
            assert_same_state(backend.learner("get_state"), undisturbed[0])
    assert set(done) == {lane.pid for lane in backend.pool.lanes}
    # Of twelve slots it takes the two that it is given at first, the others take the rest.
    assert done[slow] == min(done.values())
    assert done[slow] < sum(done.values()) / 4
    (line,) = [x.getMessage() for x in caplog.records if "times as long" in x.getMessage()]
    assert f"actor process {slow} on {platform.node()} takes" in line


@on_ray
def test_an_actor_whose_memory_grows_is_replaced_and_changes_nothing(
    backend, undisturbed, config, family, clusters, monkeypatch, caplog, assert_same_state
):
    loop = Loop(config, family, backend)
    _, counters, metrics = iterations(loop, 1)
    restarts, pids = backend.actor_restarts, {lane.pid for lane in backend.pool.lanes}
    limit = int(metrics["sys/actor_rss_mb_max"]) + 2 * LEAK_MB
    monkeypatch.setattr(backend.pool, "memory_mb", limit)
    (clusters.orders / "leak").write_text(EVERY_TASK)
    state, counters, metrics = iterations(loop, 2, counters)
    (clusters.orders / "leak").unlink()
    assert_same_state(state, undisturbed[0])
    assert counters == undisturbed[1]
    assert metrics["sys/actor_rss_mb_max"] > limit
    (first, *_) = said = [x.getMessage() for x in caplog.records if "holds" in x.getMessage()]
    assert f"--actor-memory-mb allows {limit}" in first
    assert any(f"actor process {pid} on {platform.node()} holds" in first for pid in pids)
    assert metrics["sys/actor_restarts"] == backend.actor_restarts > restarts
    # An actor that was replaced last may not have answered yet.
    assert restarts + len(said) - 3 <= backend.actor_restarts <= restarts + len(said)
    assert {lane.pid for lane in backend.pool.lanes} != pids


@on_ray
def test_a_limit_that_a_new_actor_is_above_is_refused(
    backend, config, family, clusters, monkeypatch
):
    monkeypatch.setattr(backend.pool, "memory_mb", 1)
    for lane in backend.pool.lanes:
        monkeypatch.setattr(lane, "slots", set())
    with pytest.raises(RolloutError, match=r"--actor-memory-mb allows 1: its environments alone"):
        Loop(config, family, backend).iterate(Counters())


def server_pid(backend):
    import ray

    return ray.get(backend.server.__ray_call__.remote(lambda _: os.getpid()), timeout=60)


@on_ray
@pytest.mark.parametrize("moment", ["between iterations", "after the learner has published"])
def test_a_killed_parameter_server_is_filled_again(
    backend, undisturbed, config, family, moment, monkeypatch, assert_same_state
):
    loop = Loop(config, family, backend)
    _, counters, _ = iterations(loop, 1)
    victim = server_pid(backend)
    if moment == "between iterations":
        os.kill(victim, signal.SIGKILL)
    else:
        collect = backend.collect

        def kill_first(requests, carries):
            monkeypatch.undo()
            os.kill(victim, signal.SIGKILL)
            return collect(requests, carries)

        monkeypatch.setattr(backend, "collect", kill_first)
    state, counters, _ = iterations(loop, 2, counters)
    assert server_pid(backend) != victim
    assert_same_state(state, undisturbed[0])
    assert counters == undisturbed[1]


# Environments, on both backends


@pytest.fixture(params=["serial", pytest.param("ray", marks=on_ray)])
def any_backend(request, config, family, clusters):
    if request.param == "ray":
        return request.getfixturevalue("backend")
    for order in clusters.orders.iterdir():
        order.unlink()
    return SerialBackend(config, family, [1])


def test_an_environment_that_raises_is_reported(any_backend, config, family, clusters):
    tasks = tasks_of(family, 0)
    (clusters.orders / "raise").write_text(first_coordinate(tasks[2]))
    with pytest.raises(RolloutError) as caught:
        Loop(config, family, any_backend).iterate(Counters())
    said = str(caught.value)
    assert str(tasks[2]) in said
    assert "RuntimeError: the simulator broke in process" in said
    # Slots 6, 7 and 8 are those of member 2.
    (slot,) = [slot for slot in (6, 7, 8) if f"slot {slot} " in said]
    assert str(make_seeds(0, Stream.TRAIN, 0, 0, slot)) in said
    culprit = int(said.split("the simulator broke in process ")[1].split()[0].rstrip(".;,)"))
    if isinstance(any_backend, SerialBackend):
        assert culprit == os.getpid()
    else:
        assert culprit in [lane.pid for lane in any_backend.pool.lanes]
        assert f"actor process {culprit}" in said


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("wrong_reset", "reset returned observations of type float32 and shape [0, 2], expected "
         "float32 and [1, 2]"),
        ("wrong_obs_type", "step returned observations of type float64 and shape [1, 2], expected "
         "float32 and [1, 2]"),
        ("wrong_obs_shape", "step returned observations of type float32 and shape [1, 1]"),
        ("wrong_reward", "step returned rewards of type float32 and shape [1, 1], expected float32 "
         "and [1]"),
        ("wrong_ends", "step returned terminated of type int64 and shape [1], expected bool"),
        ("wrong_number", "step returned 4 values, expected are observations, rewards, terminated"),
    ],
)  # fmt: skip
def test_an_environment_that_returns_something_else_is_named(
    any_backend, config, family, clusters, order, said
):
    task = tasks_of(family, 0)[2]
    (clusters.orders / order).write_text(first_coordinate(task))
    with pytest.raises(RolloutError) as caught:
        Loop(config, family, any_backend).iterate(Counters())
    assert f"ValueError: ObedientEnv.{said}" in str(caught.value)
    assert str(task) in str(caught.value)
    assert any(f"slot {slot} " in str(caught.value) for slot in (6, 7, 8))


@pytest.mark.parametrize("order", ["nan_reward", "nan_obs"])
def test_nan_from_an_environment_skips_one_update(
    any_backend, config, family, clusters, order, assert_same_state
):
    loop = Loop(config, family, any_backend)
    tasks = tasks_of(family, 0)
    (clusters.orders / order).write_text(first_coordinate(tasks[1]))
    before = any_backend.learner("get_state")
    counters, metrics, skipped = loop.iterate(Counters())
    assert skipped.failure.tensor == order.removeprefix("nan_")
    assert skipped.task == tasks[1]
    assert np.isnan(skipped.failure.arrays[skipped.failure.tensor]).any()
    assert metrics["meta/skipped_updates"] == counters.skipped == 1
    assert_same_state(any_backend.learner("get_state"), before)
    counters, _, skipped = loop.iterate(counters)
    assert skipped is None
    assert counters.skipped == 1
    with pytest.raises(AssertionError):
        assert_same_state(any_backend.learner("get_state"), before)


@on_ray
def test_an_environment_that_hangs_is_given_up(backend, config, family, clusters, monkeypatch):
    task = tasks_of(family, 0)[3]
    (clusters.orders / "wait").write_text(first_coordinate(task))
    monkeypatch.setattr(backend.pool, "timeout_s", 2.0)
    with pytest.raises(RolloutError, match="no chunk for 2 s") as caught:
        Loop(config, family, backend).iterate(Counters())
    (clusters.orders / "wait").unlink()
    for pid in waiting_pids(clusters.orders):
        assert str(pid) in str(caught.value)
    assert any(str(slot) in str(caught.value) for slot in (9, 10, 11))


# Ten in a row


def test_ten_skipped_updates_in_a_row_stop_the_run(tmp_path, tiny_run, capsys):
    folder, orders = tmp_path / "run", tmp_path / "orders"
    orders.mkdir()
    options = {"orders": str(orders)}
    run.train(tiny_run(OBEDIENT, iterations=2, task_options=options), folder)
    (orders / "nan_reward").write_text(EVERY_TASK)
    with pytest.raises(run.StoppedRun) as caught:
        run.train(tiny_run(OBEDIENT, iterations=50, task_options=options), folder)
    assert "10 updates in a row" in str(caught.value)
    assert "reward is not finite" in str(caught.value)
    assert str(folder / "non_finite") in str(caught.value)
    assert capsys.readouterr().out.count("the update is skipped") == 10
    batch = load_file(folder / "non_finite" / "batch.safetensors")
    assert batch["reward"].shape == (1, 20, 3)
    assert np.isnan(batch["reward"]).any()
    assert not np.isnan(batch["obs"]).any()
    story = json.loads((folder / "non_finite" / "batch.json").read_text())
    family = load_family(OBEDIENT, {"horizon": 20} | options)
    assert story["tensor"] == "reward"
    assert story["task"] == tasks_of(family, 11)[0]
    assert story["seed"] == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    assert rows[-1]["meta/skipped_updates"] == 10.0
    loaded = load_newest(folder / "checkpoints")
    assert all(math.isfinite(t.double().sum()) for t in loaded.tensors.values())


def test_a_stopped_run_keeps_what_it_had_learned(tmp_path, tiny_run):
    """The message says that there is a checkpoint, so there is one: of the last good state."""
    orders = tmp_path / "orders"
    orders.mkdir()
    options = {"orders": str(orders)}
    config = tiny_run(OBEDIENT, iterations=50, task_options=options)
    family = load_family(OBEDIENT, config.task_options)
    good = SerialBackend(config, family, make_seeds(0, Stream.INIT, count=1))
    loop, counters = Loop(config, family, good), Counters()
    for _ in range(2):
        counters, _, _ = loop.iterate(counters)
    expected = good.learner("get_state")

    # From the third iteration on every reward is NaN.
    real_iterate = Loop.iterate

    def iterate(self, counters):
        if counters.iteration == 2:
            (orders / "nan_reward").write_text(EVERY_TASK)
        return real_iterate(self, counters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "iterate", iterate)
        with pytest.raises(run.StoppedRun):
            run.train(config, tmp_path / "run")
    restored = run_folder.restore(tmp_path / "run")
    assert restored is not None, "the run ended without a checkpoint"
    state, _, _ = restored
    for name, tensor in expected["meta_params"].items():
        assert state["meta_params"][name].equal(tensor), name


# The learner: the last of the tests on this cluster


@on_ray
def test_a_learner_killed_during_collection_is_named_with_what_to_do(
    backend, config, family, clusters, meanwhile, wait_until, monkeypatch
):
    import ray
    from ray.exceptions import OwnerDiedError, RayActorError, RayTaskError

    from system.backend import LearnerDied

    (clusters.orders / "wait").write_text(EVERY_TASK)

    def dead():
        try:
            ray.get(backend.learners.first.info.remote(), timeout=10)
        except (RayActorError, ray.exceptions.GetTimeoutError) as error:
            return isinstance(error, RayActorError)
        return False

    def kill():
        try:
            wait_until(
                lambda: len(waiting_pids(clusters.orders)) == 3, "all actors are in an episode"
            )
            os.kill(backend.learners.places[0].pid, signal.SIGKILL)
            wait_until(dead, "Ray knows that the learner is dead")
        finally:
            (clusters.orders / "wait").unlink()

    killed = meanwhile(kill)
    said = r"(?s)learner.*same command.*newest checkpoint"
    try:
        with pytest.raises(LearnerDied, match=said):
            Loop(config, family, backend).iterate(Counters())
        with pytest.raises(LearnerDied, match=r"ended in get_state"):
            backend.learner("get_state")

        # An actor may find out first, as it reads parameters that died with the learner.
        real_get, lost = backend.pool.get, object()

        def get(reference):
            if reference is lost:
                raise RayTaskError("collect", "", OwnerDiedError("00" * 28, b"", ""))
            return real_get(reference)

        monkeypatch.setattr(backend.pool, "get", get)
        request = Request(Slot(0, (0, 1), (0, 1)), ({"goal": [0.0, 0.0]},), (1,), 1, 20)
        with pytest.raises(LearnerDied, match=said):
            backend.pool.receive(lost, backend.pool.lanes[0], request)
    finally:
        try:
            killed()
        finally:
            clusters.close()

"""Several learners on Ray learn bitwise what one learns in this process; one that dies is named."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from actors.tasks import load_family
from learners.config import A2cConfig, LpgConfig, Rl2Config
from learners.core.errors import ConfigError
from system import cluster, memory, run
from system.config import RuntimeConfig
from system.loop import Counters, Loop
from system.serial_backend import SerialBackend
from tests.system.families import Obedient
from tests.system.test_backends import outcome

pytestmark = pytest.mark.usefixtures("torch_threads")
on_ray = pytest.mark.ray

TWO = {"backend": "ray", "num_actors": 1, "num_learners": 2}


@pytest.fixture
def config(tiny_run):
    """Four blocks of one task each."""
    config = tiny_run()
    return replace(config, learner=replace(config.learner, members_per_block=1))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    orders = tmp_path_factory.mktemp("orders")
    return Obedient(horizon=20, action_scale=0.1, orders=str(orders))


class Backends:
    """A backend with two learners, kept from test to test."""

    found = None

    def get(self, config, family, clusters):
        from system.ray_backend import RayBackend

        if self.found is None:
            clusters.close()
            runtime = replace(config.runtime, **TWO)
            self.found = RayBackend(replace(config, runtime=runtime), family, [1])
        return self.found


@pytest.fixture(scope="module")
def backends():
    made = Backends()
    yield made
    if made.found is not None:
        made.found.close()


@on_ray
def test_two_learners_learn_bitwise_what_one_learns(
    config, family, clusters, backends, assert_same_state
):
    """Inner updates, Fisher products, the line search and an evaluation on fewer blocks."""
    backend = backends.get(config, family, clusters)
    serial = SerialBackend(config, family, [1])
    initial = serial.learner("get_state")
    assert_same_state(backend.learner("get_state"), initial)
    expected = outcome(config, family, serial, initial)
    found = outcome(config, family, backend, initial)
    with pytest.raises(AssertionError):
        assert_same_state(found[0], initial)
    assert all(row["meta/step_accepted"] == 1.0 for row in expected[2])
    assert_same_state(found[0], expected[0])
    assert found[1:3] == expected[1:3]
    np.testing.assert_array_equal(found[3], expected[3])


@on_ray
def test_an_evaluation_of_one_task_leaves_a_learner_without_a_block(
    config, family, clusters, backends
):
    backend = backends.get(config, family, clusters)
    serial = SerialBackend(config, family, [1])
    serial.learner("set_state", backend.learner("get_state"))
    curves = [Loop(config, family, one).evaluate(1)[1] for one in (backend, serial)]
    np.testing.assert_array_equal(*curves)


@on_ray
def test_a_call_need_not_be_waited_for(config, family, clusters, backends, wait_until):
    """As with --max-lag."""
    backend = backends.get(config, family, clusters)
    reference = backend.start("begin", 4, [(0, 4)])
    wait_until(lambda: backend.finished(reference), "both learners have answered")
    renew, version = backend.finish(reference, "begin")
    assert renew == [True] * 4
    assert backend.learner("begin", 4, [(0, 4)])[1] == version + 1


@on_ray
def test_both_learners_are_processes_that_are_counted(config, family, clusters, backends):
    backend = backends.get(config, family, clusters)
    assert backend.pids[0] == os.getpid()
    assert len(set(backend.pids)) == 4
    assert all(psutil.pid_exists(pid) for pid in backend.pids)


@on_ray
def test_a_learner_killed_in_mid_update_is_named_with_what_to_do(
    config, family, clusters, backends, meanwhile, wait_until, monkeypatch
):
    """The other one waits for it, and is ended. The last test with both learners."""
    from system.ray_backend import LearnerDied

    backend = backends.get(config, family, clusters)
    first, second = (place.pid for place in backend.learners.places)
    started, start = [], backend.learners.start

    def noted(method, *args):
        if method == "inner_update":
            os.kill(second, signal.SIGSTOP)  # so that the update cannot end
        reference = start(method, *args)
        started.append(method)
        return reference

    monkeypatch.setattr(backend.learners, "start", noted)

    def kill():
        wait_until(lambda: "inner_update" in started, "the learners are in an update")
        os.kill(second, signal.SIGKILL)

    killed = meanwhile(kill)
    said = r"(?s)one of 2 learners' process ended in inner_update.*same command.*newest checkpoint"
    with pytest.raises(LearnerDied, match=said):
        Loop(config, family, backend).iterate(Counters())
    killed()
    wait_until(lambda: not psutil.pid_exists(first), "the learner that was left is ended")
    with pytest.raises(LearnerDied, match="ended in get_state"):
        backend.learner("get_state")


@on_ray
def test_a_call_that_is_not_waited_for_ends_with_a_learner(
    config, family, clusters, backends, wait_until
):
    """As with --max-lag; on what is left of the cluster, one of whose learners has ended."""
    backend = backends.get(config, family, clusters)
    reference = backend.start("begin", 4, [(0, 4)])
    wait_until(lambda: backend.finished(reference), "the call has ended")


# What is refused


def test_one_process_has_one_learner():
    with pytest.raises(ConfigError, match="num_learners 2 needs --backend ray"):
        RuntimeConfig(backend="serial", num_learners=2)


def test_rl2_has_one_learner(tiny_run):
    with pytest.raises(ConfigError, match=r"num_learners 2: rl2 shuffles.*must be 1"):
        tiny_run(learner=Rl2Config(), num_members=10, num_envs=1, runtime=TWO)


@pytest.mark.parametrize(
    ("task", "learner", "blocks"),
    [
        ("navigation-2d", None, r"4 members make 1 blocks \(members_per_block 5\)"),
        ("gym:CartPole-v1", A2cConfig(), r"4 members make 1 blocks \(members_per_block 0\)"),
        ("worlds", LpgConfig(members_per_block=3), "4 members make 2 blocks"),  # of 2 kinds
    ],
)
def test_more_learners_than_blocks_are_refused_before_anything_starts(
    tiny_run, tmp_path, task, learner, blocks
):
    config = tiny_run(task, runtime=TWO | {"num_learners": 3})
    if learner is not None:
        config = replace(config, learner=learner, task_options={})
    with pytest.raises(ConfigError, match=rf"num_learners 3: the {blocks}.*--members-per-block 1"):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cluster_with_fewer_gpus_than_learners_is_refused(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for device in ("cuda", "auto"):
        runtime = RuntimeConfig(address="192.0.2.7:6379", num_learners=2, device=device)
        with pytest.raises(ConfigError, match=r"has 1 GPUs and --num-learners 2 needs 2") as caught:
            cluster.check_size(runtime)
        assert "--num-learners 1 or --device cpu" in str(caught.value)
    cluster.check_size(RuntimeConfig(address="192.0.2.7:6379", num_learners=2, device="cpu"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    cluster.check_size(RuntimeConfig(address="192.0.2.7:6379", num_learners=2, device="auto"))


def test_memory_is_counted_for_every_learner(tiny_run, monkeypatch):
    """Each holds the data of all replicas, and is a process."""
    config = tiny_run("gym:CartPole-v1", runtime=TWO)
    config = replace(config, learner=A2cConfig(), task_options={})
    alone = replace(config, runtime=replace(config.runtime, num_learners=1))
    spec = load_family(config.task, {}).spec
    assert memory.replica_bytes(config, spec) == 2 * memory.replica_bytes(alone, spec)
    needed = 100 + 3 * cluster.PROCESS_MB
    there = SimpleNamespace(available=needed * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    cluster.check_machine(alone.runtime)
    with pytest.raises(ConfigError, match="1 actors and 2 learners needs about 1900 MB"):
        cluster.check_machine(config.runtime)


def test_a_job_counts_the_gpus_of_all_learners():
    from system.presets import PRESETS
    from system.submit import Cluster, check_resources

    config = PRESETS["maml-trpo/navigation-2d"]()
    runtime = replace(config.runtime, num_learners=2, device="cuda")
    config = replace(config, runtime=runtime)

    def there(gpus):
        return Cluster("2.60.0", "3.11", cpus=8, gpus=gpus, num_nodes=2, autoscales=False)

    assert not check_resources(there(2), config)
    with pytest.raises(ConfigError, match=r"1 GPUs on 2 nodes; 2 learners need a GPU each"):
        check_resources(there(1), config)

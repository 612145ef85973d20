"""Jobs on a cluster of three, and who is let in there; beside it a cluster that is open."""

import json
import os
import re
import subprocess
import sys

import pytest

from system import access, submit
from system.checkpoint import load_newest
from tests.cluster.nodes import READY_SECONDS, Nodes, node_environment
from tests.conftest import ROOT

pytestmark = pytest.mark.ray

NAVIGATION = "maml-trpo/navigation-2d"


@pytest.fixture(scope="module")
def open_cluster(wait_until):
    """A head that asks nobody for a token."""
    head = Nodes(node_environment(RAY_AUTH_MODE="disabled"), None)
    try:
        head.head("127.0.0.9", 1)
        wait_until(lambda: head.alive() == 1, "the open head is up", READY_SECONDS)
        # In its first seconds a dashboard does not tell whether there is an autoscaler.
        wait_until(
            lambda: not submit.describe_cluster(head.address, None).autoscales,
            "the open head says that it has no autoscaler",
            READY_SECONDS,
        )
        yield head
    finally:
        head.close()


@pytest.fixture
def small_run(nodes, tiny_flags, tmp_path, monkeypatch):
    """Arguments of a small run that is waited for, of a family in the working folder."""
    (tmp_path / "own.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    where = ("--address", nodes.address, "--wait", "--run-dir", tmp_path / "run")
    return ["submit", NAVIGATION, *where, *tiny_flags, "--num-actors", "2"]


def test_no_door_of_a_cluster_opens_without_the_token(nodes):
    for path in ("/api/version", "/api/jobs/", "/api/cluster_status", "/nodes?view=summary"):
        assert access.http_status(nodes.address + path, None) == 401
        assert access.http_status(nodes.address + path, "wrong") == 403
        assert access.http_status(nodes.address + path, nodes.token) == 200
    assert access.refuses_strangers(nodes.address)
    assert access.gcs_refuses_strangers(nodes.gcs)
    assert access.gcs_answers(nodes.gcs, nodes.token)


@pytest.mark.parametrize(
    "method",
    [
        "RayletDriver/ClusterInfo",  # Ray Client, which has a port of its own
        "JobInfoGcsService/AddJob",
        "ActorInfoGcsService/CreateActor",
        "InternalKVGcsService/InternalKVKeys",
        "NodeInfoGcsService/GetAllNodeInfo",
        "WorkerInfoGcsService/GetAllWorkerInfo",
    ],
)
@pytest.mark.parametrize("shown", [(), (("authorization", "Bearer wrong"),)])
def test_no_service_of_the_head_answers_without_the_token(nodes, method, shown):
    import grpc

    host, _, port = nodes.gcs.partition(":")
    address = f"{host}:{nodes.client if method.startswith('RayletDriver') else port}"
    with grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),)) as channel:
        call = channel.unary_unary(f"/ray.rpc.{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10, metadata=shown)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_wrong_token_is_told_apart_from_none(nodes, metaloop, tiny_flags, tmp_path, monkeypatch):
    run = ["--run-dir", tmp_path / "run", *tiny_flags]
    ways = (
        ["train", NAVIGATION, "--address", nodes.gcs, *run],
        ["submit", NAVIGATION, "--address", nodes.address, *run],
    )
    with monkeypatch.context() as patch:
        patch.setenv(access.TOKEN, "wrong")
        for arguments in ways:
            status, _, err = metaloop(*arguments)
            assert status == 2
            assert "turns our authentication token away" in err
    monkeypatch.delenv(access.TOKEN_PATH)
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in ways:
        status, _, err = metaloop(*arguments)
        assert status == 2
        assert "there is no authentication token" in err


def test_an_open_cluster_is_refused_by_both_doors(
    open_cluster, metaloop, tiny_flags, tmp_path, caplog
):
    run = ["--run-dir", tmp_path / "run", *tiny_flags]
    ways = (
        ["train", NAVIGATION, "--address", open_cluster.gcs, *run],
        ["submit", NAVIGATION, "--address", open_cluster.address, *run],
    )
    for arguments in ways:
        status, _, err = metaloop(*arguments)
        assert status == 2
        assert "answers requests without a token" in err
        assert "--accept-open-cluster" in err
    # Accepted, the next check is that of the CPUs.
    status, _, err = metaloop(*ways[1], "--accept-open-cluster", "--num-actors", "64")
    assert "64 actors need a CPU each" in err
    assert "answers requests without a token" in caplog.text


JOINING = """
import ray
from system.config import RuntimeConfig
from system.cluster import start_ray
start_ray(RuntimeConfig(num_actors=1, address="ADDRESS", accept_open_cluster=True))
print(ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60))
"""


def test_an_open_cluster_that_is_accepted_can_be_worked_with(open_cluster):
    done = subprocess.run(
        [sys.executable, "-c", JOINING.replace("ADDRESS", open_cluster.gcs)],
        cwd=ROOT, env=os.environ | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["42"], done.stderr
    assert "answers requests without a token" in done.stderr


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


OWN_MODULE = """
from dataclasses import dataclass

from actors.tasks.navigation_2d import Navigation2D


@dataclass(frozen=True)
class Own(Navigation2D):
    pass


@dataclass(frozen=True)
class Broken(Navigation2D):
    @property
    def spec(self):
        raise RuntimeError("shipped, found, and broken")
"""


@pytest.mark.slow
def test_a_submitted_run_trains_on_several_nodes_and_goes_on_after_a_stop(
    nodes, small_run, metaloop, command_line, tmp_path, wait_until
):
    folder = tmp_path / "run"
    small_run += ["--task", "own:Own"]
    status, out, err = metaloop(*small_run, "--iterations", "2")
    assert status == 0, out + err
    placed = re.search(r"learner on (\S+) \(\w+, cpu\); actors on (\d) nodes: (.*)", out)
    assert placed, out
    assert placed[1] == "127.0.0.3"  # the one with the label
    assert int(placed[2]) == 2
    assert len(set(re.findall(r"1 on (127\.0\.0\.\d)", placed[3]))) == 2
    assert [row["iteration"] for row in rows_of(folder)] == [1, 2]
    assert list((folder / "tb").glob("events.out.tfevents.*"))
    assert load_newest(folder / "checkpoints") is not None
    assert json.loads((folder / "evaluation.json").read_text())["iteration"] == 2
    assert json.loads((folder / "meta.json").read_text())["command"][1:3] == ["train", NAVIGATION]

    name = "to-be-stopped"
    flags = ("--iterations", "1000000", "--submission-id", name)
    waiting = command_line.start(*small_run, *flags, cwd=tmp_path)
    wait_until(lambda: len(rows_of(folder)) > 3, "the run goes on", 120)
    submit.connect(nodes.address, nodes.token).stop_job(name)
    status, out, err = command_line.result(waiting)
    assert status == 130, out + err
    assert f"going on with {folder} from iteration 2" in out
    assert f"the job {name} was stopped" in err
    rows = rows_of(folder)
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    assert f"stopped at iteration {len(rows)}; the same command goes on from there" in out


@pytest.mark.slow
def test_a_job_that_fails_ends_the_waiting_with_1_and_says_why(small_run, metaloop):
    status, out, err = metaloop(*small_run, "--task", "own:Broken")
    assert status == 1, out + err
    assert "RuntimeError: shipped, found, and broken" in out
    assert "failed: its command ended with 1" in err

"""Submitting a run: what is checked first, what is sent, how it is followed; a cluster of three."""

import asyncio
import os
import shlex
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from learners.config import LpgAgentConfig
from learners.core.errors import ConfigError
from system import access, preflight, submit
from system.presets import PRESETS
from tests.system.dashboards import cluster_of, serving

NAVIGATION = "maml-trpo/navigation-2d"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def token(monkeypatch):
    """The token that `cluster_of` knows."""
    monkeypatch.setenv(access.TOKEN, "ours")
    monkeypatch.setenv(access.AUTH_MODE, "token")


class Jobs:
    """Ray's client, without Ray: what it was given, and the fate of the job."""

    def __init__(self, status="SUCCEEDED", code=0, log=("one\n", "two\n"), failure=None):
        self.status, self.code, self.log, self.failure = status, code, log, failure
        self.given = {}

    def submit_job(self, **given):
        self.given = given
        folder = Path(given["runtime_env"]["working_dir"])
        self.files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        return given["submission_id"] or "made-by-ray"

    async def tail_job_logs(self, name):
        for text in self.log:
            yield text
            await asyncio.sleep(0)
        if self.failure:
            raise self.failure

    def get_job_info(self, name):
        class Status(str):
            def is_terminal(self):
                return self in ("SUCCEEDED", "FAILED", "STOPPED")

        @dataclass
        class Info:
            status = Status(self.status)
            driver_exit_code = self.code
            message = "the reason"

        return Info()


@pytest.fixture
def jobs(monkeypatch):
    """Takes the place of Ray's client; `jobs.connected` is how it was asked for."""
    client = Jobs()

    def connect(address, token):
        client.connected = (address, token)
        return client

    monkeypatch.setattr(submit, "connect", connect)
    return client


# Checks


@pytest.mark.parametrize(
    "address",
    [None, "head:8265", "ray://head:10001", "http://head", "http://head:8265/jobs", "auto"],
)
def test_an_address_that_is_no_dashboard_is_refused(metaloop, address):
    given = [] if address is None else ["--address", address]
    status, _, err = metaloop("submit", NAVIGATION, *given)
    assert status == 2
    assert "http://HEAD:8265" in err
    assert address is None or address in err


def test_nothing_that_listens_is_said_with_the_way_through_ssh(metaloop, token):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        status, _, err = metaloop("submit", NAVIGATION, "--address", f"http://127.0.0.1:{port}")
    assert status == 2
    assert f"nothing answers at http://127.0.0.1:{port}" in err
    assert f"ssh -L {port}:localhost:{port} 127.0.0.1" in err


@pytest.mark.parametrize(
    ("cluster", "flags", "named"),
    [
        ({"token": None}, (), ["answers requests without a token", "--accept-open-cluster"]),
        ({"token": "theirs"}, (), ["turns our authentication token away (403)"]),
        ({"ray": "2.59.0"}, (), ["Ray 2.59.0 there and", "start its nodes with these"]),
        ({"ray": "2.53.0"}, (), ["CVE-2026-27482"]),
        ({"python": "3.9.1"}, (), ["Python 3.9 there and"]),
        ({"cpus": 2.0}, ("--num-actors", "3"), ["has 2 CPUs and 0 GPUs on 1 nodes",
         "--num-actors 2 would fit", "--wait-for-nodes"]),
        ({}, ("--device", "cuda"), ["--device cuda needs a GPU"]),
        ({"version": {"name": "another"}}, (), ["not the dashboard of a Ray cluster"]),
        ({"nodes": "?"}, (), ["to /api/v0/nodes"]),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_named_before_anything_is_sent(
    metaloop, token, jobs, tmp_path, cluster, flags, named
):
    with serving(cluster_of(**cluster)) as address:
        status, _, err = metaloop(
            "submit", NAVIGATION, "--address", address, "--run-dir", tmp_path / "run", *flags
        )
    assert status == 2, err
    for words in named:
        assert words in err
    assert jobs.given == {}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--run-dir", "runs/here"), "--run-dir runs/here would be a folder of one node"),
        (("--run-dir", "file://runs/here"), "or a URL such as s3://bucket/run"),
        (("--run-dir", "memory:///run"), "--run-dir memory:///run would be a folder of one node"),
        (("--run-dir", "s4://bucket/run"), "there is no storage 's4'"),
        (("--backend", "serial"), "pass --backend ray"),
    ],
)
def test_what_only_means_something_here_is_refused(metaloop, token, jobs, flags, named):
    with serving(cluster_of()) as address:
        status, _, err = metaloop("submit", NAVIGATION, "--address", address, *flags)
    assert status == 2
    assert named in err
    assert jobs.given == {}


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "file:///shared/run"])
def test_a_url_goes_to_the_job_as_it_is(metaloop, token, jobs, url):
    """Its driver is the cluster's business, and need not be here."""
    with serving(cluster_of()) as address:
        status, _, err = metaloop("submit", NAVIGATION, "--address", address, "--run-dir", url)
    assert (status, err) == (0, "")
    assert f"--run-dir {url} --address auto" in jobs.given["entrypoint"]


def test_a_relative_rule_is_refused():
    config = PRESETS["lpg-agent/sampled"]()
    assert isinstance(config.learner, LpgAgentConfig)
    learner = replace(config.learner, rule="runs/rule")
    config = replace(config, learner=learner, runtime=replace(config.runtime, backend="ray"))
    with pytest.raises(ConfigError, match="--rule runs/rule would be a folder of one node"):
        submit.check_command(submit.Job(config, "/shared/run", ()))


def test_a_folder_that_is_too_large_is_refused_with_what_is_large(
    metaloop, token, jobs, tmp_path, monkeypatch
):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "__init__.py").touch()
    with (tmp_path / "big" / "table.bin").open("wb") as file:
        file.truncate(submit.UPLOAD_LIMIT + 1)  # takes no space on disk
    (tmp_path / "big" / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "big.family:Family", "--run-dir", tmp_path / "run"]
    with serving(cluster_of()) as address:
        status, _, err = metaloop("submit", NAVIGATION, "--address", address, *flags)
    assert status == 2
    assert "the dashboard accepts 100 MB" in err
    assert "big/table.bin (100.0 MB)" in err
    assert jobs.given == {}


@pytest.mark.parametrize(
    "cluster", [{"autoscales": True}, {"cluster_status": {"data": {"clusterStatus": None}}}]
)
def test_an_autoscaler_may_bring_what_is_missing(metaloop, token, jobs, tmp_path, caplog, cluster):
    flags = ["--num-actors", "9", "--run-dir", tmp_path / "run"]
    with serving(cluster_of(**cluster)) as address:
        status, _, _ = metaloop("submit", NAVIGATION, "--address", address, *flags)
    assert status == 0
    assert "9 actors need a CPU each" in caplog.text
    assert "waits for the autoscaler" in caplog.text
    assert jobs.given["entrypoint"].endswith("--address auto --wait-for-nodes")


def test_an_open_cluster_that_is_accepted_never_sees_the_token(
    metaloop, token, jobs, tmp_path, caplog
):
    seen = []
    rule = cluster_of(token=None)

    def watched(path, shown):
        seen.append(shown)
        return rule(path, shown)

    flags = ["--accept-open-cluster", "--run-dir", tmp_path / "run"]
    with serving(watched) as address:
        status, out, _ = metaloop("submit", NAVIGATION, "--address", address, *flags)
    assert status == 0
    assert "answers requests without a token" in caplog.text
    assert jobs.connected == (address, None)
    assert "Bearer ours" not in seen
    assert "--accept-open-cluster" in jobs.given["entrypoint"]
    assert "RAY_AUTH_MODE" not in out


@pytest.mark.parametrize("host", ["head.example:8265", "192.0.2.7:8265"])
def test_a_token_in_plain_text_is_warned_of(host, caplog):
    submit.warn_of_plain_text("http://localhost:8265")
    submit.warn_of_plain_text(f"https://{host}")
    assert caplog.text == ""
    submit.warn_of_plain_text(f"http://{host}")
    assert "unencrypted" in caplog.text
    assert "ssh -L 8265:localhost:8265" in caplog.text


# What is sent


def test_the_job_is_the_command_that_was_typed(metaloop, token, jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poles.py").write_text("# a family\n")
    (tmp_path / "secret.txt").write_text("stays here\n")
    run_dir = tmp_path / "a run"
    typed = ["--iterations", "7", "--seed", "3", "--task", "poles:PoleMass", "--run-dir", run_dir]
    with serving(cluster_of()) as address:
        where = [f"--address={address}/", "--submission_id", "my-job"]
        status, out, err = metaloop("submit", NAVIGATION, *where, *typed)
    assert status == 0
    assert err == ""
    given = jobs.given
    assert given["submission_id"] == "my-job"
    assert given["metadata"] == {"preset": NAVIGATION, "seed": "3"}
    checked, run = given["entrypoint"].split(" && ")
    assert preflight.main(shlex.split(checked)[3:]) == 0
    words = ["exec", "python", "-m", "system.cli", "train", NAVIGATION, *map(str, typed)]
    assert shlex.split(run) == [*words, "--address", "auto"]
    assert jobs.connected == (address, "ours")
    assert {"system/cli.py", "actors/rollout.py", "pyproject.toml", "poles.py"} <= jobs.files
    assert {name.split("/")[0] for name in jobs.files} == {
        *submit.PACKAGES, "pyproject.toml", "poles.py",
    }  # fmt: skip
    assert not any("__pycache__" in name for name in jobs.files)
    for line in (
        f"RAY_AUTH_MODE=token ray job logs my-job --address {address} --follow",
        f"RAY_AUTH_MODE=token ray job stop my-job --address {address}",
    ):
        assert line in out
    again = shlex.split(next(x for x in out.splitlines() if x.startswith("resume"))[13:])
    assert again == ["metaloop", "submit", NAVIGATION, "--address", address, *map(str, typed)]


def test_a_run_without_a_folder_is_warned_of(metaloop, token, jobs, caplog):
    with serving(cluster_of()) as address:
        status, _, _ = metaloop("submit", NAVIGATION, "--address", address)
    assert status == 0
    assert "no --run-dir" in caplog.text
    assert "storage that all nodes see" in caplog.text


@pytest.mark.parametrize(
    ("task", "sources"),
    [
        ("navigation-2d", []),
        ("trials:bandit", []),
        ("gym:CartPole-v1", []),
        ("poles:PoleMass", ["poles.py"]),
        ("trials:poles:PoleMass", ["poles.py"]),
        ("package.inner:Family", ["package"]),
        ("actors.tasks.bandit:Bandit", []),
    ],
)
def test_a_familys_own_module_goes_along(tmp_path, monkeypatch, task, sources):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poles.py").touch()
    (tmp_path / "package").mkdir()
    assert [path.name for path in submit.task_sources(task)] == sources


def test_a_module_that_is_not_here_must_be_there(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert submit.task_sources("poles:PoleMass") == []
    assert "the cluster must have the module poles" in caplog.text


def test_rays_settings_do_not_replace_the_address_that_was_checked(monkeypatch):
    import ray.job_submission

    asked = []

    def client(address, headers):
        asked.append((address, headers, "RAY_ADDRESS" in os.environ))

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", client)
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    submit.connect("http://head:8265", "ours")
    submit.connect("http://head:8265", None)
    shown = {"Authorization": "Bearer ours"}
    assert asked == [("http://head:8265", shown, False), ("http://head:8265", None, False)]


# The check on the cluster


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, []),
        ({"python": "3.9"}, ["Python 3", "3.9 where the job was submitted", "same versions"]),
        ({"ray": "2.1.0"}, ["ray 2", "2.1.0 where the job was submitted"]),
    ],
)
def test_the_clusters_own_python_complains_of_other_versions(change, named):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    ours = {"python": version, "ray": preflight.installed("ray"), "metaloop": None}
    said = "\n".join(preflight.complaints(**(ours | change)))
    assert bool(said) == bool(named)
    for words in named:
        assert words in said


def test_the_clusters_own_python_names_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "NEEDED", ("json", "no_such_module"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    flags = ["--python", version, "--ray", preflight.installed("ray")]
    assert preflight.main(flags) == 2
    assert "lacks no_such_module: install" in capsys.readouterr().err


# Following


@pytest.mark.parametrize(
    ("status", "code", "expected", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 3, 1, "failed: its command ended with 3"),
        ("FAILED", None, 1, "failed: the reason"),
        ("STOPPED", None, 130, "was stopped"),
        ("FAILED", 130, 130, "ended before its last iteration; submit it again"),
    ],
)
def test_waiting_shows_the_log_and_ends_as_the_job_does(capsys, status, code, expected, said):
    job = submit.Job(PRESETS[NAVIGATION](), None, ())
    assert submit.follow(Jobs(status, code), "my-job", job) == expected
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert said in err


def test_a_log_that_breaks_off_is_not_the_end(capsys):
    job = submit.Job(PRESETS[NAVIGATION](), None, ())
    assert submit.follow(Jobs(failure=RuntimeError("closed")), "my-job", job) == 0
    assert "the log stopped coming (closed)" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(capsys):
    config = PRESETS[NAVIGATION]()
    config = replace(config, runtime=replace(config.runtime, address="http://head:8265"))
    waited_for = Jobs(failure=KeyboardInterrupt())
    assert submit.follow(waited_for, "my-job", submit.Job(config, None, ())) == 130
    assert "ray job stop my-job --address http://head:8265" in capsys.readouterr().err


def test_a_cluster_that_is_gone_is_not_waited_for_for_ever(monkeypatch):
    class Gone(Jobs):
        def get_job_info(self, name):
            raise ConnectionError("refused")

    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    with pytest.raises(ConnectionError, match="does not answer any more: refused"):
        submit.final_info(Gone(), "my-job")

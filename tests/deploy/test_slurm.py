"""metaloop.sbatch on two nodes that are not there: srun, scontrol and ray note what they get."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deployment import DEPLOY, labels_of, parse, ray_start, read

SCRIPT = DEPLOY / "slurm" / "metaloop.sbatch"
CPUS = 4

SCONTROL = """#!/bin/bash
[[ $* == "show hostnames two-nodes" ]] || exit 9
printf 'first\\n127.0.0.1\\n'
"""

SRUN = """#!/bin/bash
echo "$*" >>"$RECORDS/srun"
while [[ $1 == --* ]]; do shift; done
# Both nodes have one /tmp here.
if [[ $1 != bash ]]; then exec "$@"; fi
for node in 0 1; do SLURM_NODEID=$node "$@" || status=$?; done
exit "${status:-0}"
"""

RAY = """#!{python}
import json, os, stat, sys
from pathlib import Path

token, temporary = Path(os.environ["RAY_AUTH_TOKEN_PATH"]), Path(os.environ["RAY_TMPDIR"])
mode = lambda path: stat.S_IMODE(path.stat().st_mode)
record = {{
    "arguments": sys.argv[1:],
    "auth": os.environ.get("RAY_AUTH_MODE"),
    "token": token.read_text(),
    "token_path": str(token),
    "modes": [mode(token), mode(token.parent), mode(temporary)],
    "temporary": str(temporary),
}}
with open(os.environ["RECORDS"] + "/ray", "a") as file:
    file.write(json.dumps(record) + "\\n")
sys.exit(int(os.environ.get("RAY_EXIT", "0")))
"""


@dataclass
class Job:
    """What a run of the script left."""

    status: int
    err: str
    out: str
    nodes: list[dict[str, Any]]
    srun: list[str]


@pytest.fixture
def submit(tmp_path):
    """(flags, **environment) runs the script as Slurm would on the first of two nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("ray", RAY)):
        (tools / name).write_text(text.format(python=sys.executable) if name == "ray" else text)
        (tools / name).chmod(0o755)

    def run(*flags: str, umask: int = 0o022, **changes: str) -> Job:
        known = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
        environment = known | {
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
            "RECORDS": str(tmp_path),
            "SLURM_JOB_ID": f"{os.getpid()}",
            "SLURM_JOB_NODELIST": "two-nodes",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": str(CPUS),
        }
        done = subprocess.run(
            ["bash", SCRIPT, *flags],
            env=environment | changes,
            cwd=tmp_path,
            umask=umask,
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = {
            name: (tmp_path / name).read_text().splitlines() if (tmp_path / name).exists() else []
            for name in ("ray", "srun")
        }
        nodes = [json.loads(line) for line in lines["ray"]]
        return Job(done.returncode, done.stderr, done.stdout, nodes, lines["srun"])

    return run


FLAGS = ("maml-trpo/half-cheetah-dir", "--run-dir", "/shared/x", "--iterations", "3")


def parts(arguments: list[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """(address and number of nodes, options of `ray start`, command) of symmetric-run."""
    assert arguments[0] == "symmetric-run"
    cut = arguments.index("--")
    own = dict(zip(arguments[1:5:2], arguments[2:5:2], strict=True))
    return own, arguments[5:cut], arguments[cut + 1 :]


def test_every_node_runs_the_same_line(submit):
    job = submit(*FLAGS)
    assert job.status == 0, job.err
    first, second = (parts(node["arguments"]) for node in job.nodes)
    assert first[0] == second[0]
    assert first[0].keys() == {"--address", "--min-nodes"}
    assert re.fullmatch(r"127\.0\.0\.1:\d{4,5}", first[0]["--address"])
    assert first[0]["--min-nodes"] == "2"
    assert first[2] == second[2]
    launches = [line for line in job.srun if " bash -c " in line]
    assert len(launches) == 1
    assert launches[0].startswith(
        f"--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task={CPUS} "
    )


def test_roles_and_cpus(submit):
    first, second = (parts(node["arguments"])[1] for node in submit(*FLAGS).nodes)
    assert labels_of(first) == {"metaloop.role": "learner"}
    assert labels_of(second) == {"metaloop.role": "actor"}
    assert (ray_start(first)["num_cpus"], ray_start(second)["num_cpus"]) == (CPUS - 2, CPUS)


def test_training_command(submit):
    program, *words = parts(submit(*FLAGS).nodes[0]["arguments"])[2]
    parsed = parse(words)
    assert program == "metaloop"
    assert str(parsed.run_dir) == "/shared/x"
    assert parsed.config.iterations == 3
    assert parsed.config.runtime.address == "auto"
    assert parsed.config.runtime.num_actors == CPUS + CPUS - 2


def test_flags_of_the_user_win(submit):
    _, *words = parts(submit(*FLAGS, "--num-actors", "3").nodes[0]["arguments"])[2]
    assert parse(words).config.runtime.num_actors == 3


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_token_is_nobody_elses(submit, umask):
    job = submit(*FLAGS, umask=umask)
    assert job.status == 0, job.err
    for node in job.nodes:
        assert node["modes"] == [0o600, 0o700, 0o700]
        assert node["auth"] == "token"
        assert re.fullmatch(r"[0-9a-f]{64}", node["token"])
        assert node["token"] not in job.out + job.err + " ".join(job.srun + node["arguments"])


def test_two_jobs_share_nothing(submit):
    submit(*FLAGS, SLURM_JOB_ID=f"{os.getpid()}a")
    nodes = submit(*FLAGS, SLURM_JOB_ID=f"{os.getpid()}b").nodes
    one, other = nodes[0], nodes[2]
    for name in ("token", "token_path", "temporary"):
        assert one[name] != other[name]


def test_ports_are_free_and_different(submit):
    job = submit(*FLAGS)
    own, options, _ = parts(job.nodes[0]["arguments"])
    options = ray_start(options)
    assert options["dashboard_host"] == "127.0.0.1"
    names = ("dashboard_port", "ray_client_server_port", "dashboard_agent_listen_port")
    ports = [int(own["--address"].split(":")[1]), *(int(options[name]) for name in names)]
    assert len(set(ports)) == 4
    assert not set(ports) & {6379, 8265, 10001, 52365}
    assert f"127.0.0.1:{options['dashboard_port']} first" in job.out


def test_sockets_fit(submit):
    """A socket's path has 107 bytes at most; job numbers have ten digits at most."""
    job = submit(*FLAGS)
    temporary = job.nodes[0]["temporary"].replace(str(os.getpid()), "4294967295")
    session = "ray/session_2026-11-22_04-18-16_384332_4194304/sockets/plasma_store.lock"
    assert len(f"{temporary}/{session}") <= 107


@pytest.mark.parametrize("status", [0, 3])
def test_leaves_nothing_behind(submit, status):
    job = submit(*FLAGS, RAY_EXIT=str(status))
    assert job.status == status
    assert not Path(job.nodes[0]["temporary"]).exists()
    assert not Path(job.nodes[0]["token_path"]).parent.exists()


def test_refuses_a_folder_of_somebody_else(submit, tmp_path):
    number = f"{os.getpid()}c"
    theirs = Path(f"/tmp/metaloop-{number}-0")
    theirs.mkdir()
    try:
        job = submit(*FLAGS, SLURM_JOB_ID=number)
        assert job.status != 0
        assert job.nodes == []
        assert theirs.exists()
        assert list((tmp_path / "home" / ".metaloop").iterdir()) == []
    finally:
        theirs.rmdir()


def test_says_how_it_is_used(submit):
    job = submit()
    assert job.status != 0
    assert "PRESET" in job.err
    assert job.srun == []


def test_stops_only_its_own_processes():
    code = [line for line in read("slurm/metaloop.sbatch").splitlines() if line[:1] != "#"]
    assert not re.search(r"\b(kill|pkill|killall|skill|ray stop)\b", "\n".join(code))
    assert "#SBATCH --exclusive" in read("slurm/metaloop.sbatch").splitlines()
    assert "set -euo pipefail" in code


def test_bash_reads_it():
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stat.S_ISREG(SCRIPT.stat().st_mode)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "--shell=bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

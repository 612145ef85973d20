"""A run as a job of a Ray cluster: what is checked first, what is sent, and how it is followed."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actors.tasks import ATARI_PREFIX, FAMILIES, TRIALS_PREFIX
from learners.core.errors import ConfigError
from system import access, preflight, storage
from system.config import RunConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("learners", "actors", "system", "deploy")
"""What of the project a job needs; runs, results and history stay here."""

LEFT_OUT = ("__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", "runs", "*.pyc")
UPLOAD_LIMIT = 100 * 2**20
"""Bytes that the dashboard accepts in one upload."""

STOP_SECONDS = 120
"""What `ray job stop` leaves a run to finish its iteration and to save."""

POLL_SECONDS = 1.0
PATIENCE = 60
"""Polls in a row that may fail before a job that is waited for counts as lost."""


@dataclass(frozen=True)
class Job:
    """A run that is to be submitted."""

    config: RunConfig
    run_dir: str | None
    flags: tuple[str, ...]
    """As typed, without those that are for `submit` alone."""
    submission_id: str | None = None

    @property
    def address(self) -> str:
        """http(s)://HOST:PORT of the dashboard."""
        return dashboard_address(self.config.runtime.address)


@dataclass(frozen=True)
class Cluster:
    """What a dashboard tells of its cluster."""

    ray: str
    python: str | None
    cpus: float
    gpus: float
    num_nodes: int
    autoscales: bool
    """Whether more nodes may come by themselves."""


# --- Submitting ---


def submit(job: Job) -> tuple[Any, str]:
    """Checks all that can be checked from here, then hands the job to Ray.

    Returns:
        Ray's client, and the job's name.

    Raises:
        ConfigError: something is in the way; the message says what to do about it.
    """
    token = require_access(job.address, job.config.runtime.accept_open_cluster)
    check_command(job)
    cluster = describe_cluster(job.address, token)
    check_versions(cluster)
    waiting = check_resources(cluster, job.config)
    with working_folder(job.config.task) as folder:
        client = connect(job.address, token)
        try:
            name = client.submit_job(
                entrypoint=entrypoint(job, wait_for_nodes=waiting),
                submission_id=job.submission_id,
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
                metadata={"preset": job.config.preset, "seed": str(job.config.seed)},
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"{job.address} did not take the job: {error}") from error
    print_directions(job, name, token is not None)
    return client, name


def connect(address: str, token: str | None) -> Any:
    """Ray's client of the jobs at exactly this address."""
    # Both would take the place of the address that was checked.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    from ray.job_submission import JobSubmissionClient

    headers = None if token is None else {"Authorization": f"Bearer {token}"}
    return JobSubmissionClient(address, headers=headers)


def entrypoint(job: Job, *, wait_for_nodes: bool) -> str:
    """The job's command line: first the check by the cluster's own Python, then the run."""
    checked = ["--python", python_version(), "--ray", metadata.version("ray")]
    if (ours := preflight.installed("metaloop")) is not None:
        checked += ["--metaloop", ours]
    more = ["--wait-for-nodes"] if wait_for_nodes and "--wait-for-nodes" not in job.flags else []
    trained = [job.config.preset, *job.flags, "--address", "auto", *more]
    return (
        f"python -m system.preflight {shlex.join(checked)} && "
        f"exec python -m system.cli train {shlex.join(trained)}"
    )


def print_directions(job: Job, name: str, closed: bool) -> None:
    """How to follow, stop and resume a job."""
    mode = f"{access.AUTH_MODE}=token " if closed else ""
    again = shlex.join([job.config.preset, "--address", job.address, *job.flags])
    print(f"job          {name}")
    print(f"follow       {mode}ray job logs {name} --address {job.address} --follow")
    print(f"stop         {mode}ray job stop {name} --address {job.address}")
    print(f"resume       metaloop submit {again}")


# --- Checks ---


def dashboard_address(given: str | None) -> str:
    """The address without a slash at its end.

    Raises:
        ConfigError: it is none, or that of something else.
    """
    needed = "needed is that of the cluster's dashboard, as in --address http://HEAD:8265"
    if given is None:
        raise ConfigError(f"there is no --address; {needed}")
    try:
        parts = urlsplit(given)
        complete = parts.hostname is not None and parts.port is not None
    except ValueError:
        complete = False
    if not complete or parts.scheme not in ("http", "https") or parts.path.strip("/"):
        raise ConfigError(
            f"--address {given} is not http://HOST:PORT or https://HOST:PORT; {needed} (6379 is "
            "the port for nodes and for `metaloop train --address`)"
        )
    return f"{parts.scheme}://{parts.netloc}"


def require_access(address: str, accept_open: bool) -> str | None:
    """The token with which the dashboard lets us in, after it has turned strangers away.

    Returns:
        The token, or None for a cluster that is open and accepted.

    Raises:
        ConfigError: nothing answers, strangers are let in, or our token is not.
    """
    try:
        closed = access.refuses_strangers(address)
        access.require_closed(address, closed, accept_open)
        if not closed:
            return None  # who does not ask for the token need not see it
        warn_of_plain_text(address)
        token = access.use_token(create=False)
        status = access.http_status(f"{address}/api/version", token)
    except OSError as error:
        host = urlsplit(address)
        raise ConfigError(
            f"nothing answers at {address} ({getattr(error, 'reason', error)}). Is the head up, "
            "with Ray's dashboard (`ray start --head --include-dashboard=true`), and is its port "
            f"open from here? The way through SSH: ssh -L {host.port}:localhost:{host.port} "
            f"{host.hostname}, then --address http://localhost:{host.port}"
        ) from None
    if status in access.TURNED_AWAY:
        raise ConfigError(
            f"{address} turns our authentication token away ({status}): needed is the one that the "
            f"cluster was started with, in {access.TOKEN}, in the file that {access.TOKEN_PATH} "
            f"names, or in {access.default_token_path()}"
        )
    return token


def warn_of_plain_text(address: str) -> None:
    """Says that a token goes over the network unencrypted, where it does."""
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        access.warn(
            "the token goes to %s unencrypted: outside a network of your own use https, or "
            "ssh -L %s:localhost:%s %s and --address http://localhost:%s",
            *(address, parts.port, parts.port, parts.hostname, parts.port),
        )


def check_command(job: Job) -> None:
    """Refuses what could not work on another machine.

    Raises:
        ConfigError: a serial run, or a path that only means something here.
    """
    if job.config.runtime.backend == "serial":
        raise ConfigError(
            "submit runs on Ray, and this run's backend is serial (by a flag, or by its preset): "
            "pass --backend ray, or use metaloop train"
        )
    rule = getattr(job.config.learner, "rule", None)
    for flag, path in (("--run-dir", job.run_dir), ("--rule", rule)):
        if path and is_gone_with_the_job(path):
            raise ConfigError(
                f"{flag} {path} would be a folder of one node, gone with the job: needed is an "
                "absolute path on storage that all nodes see"
                + (", or a URL such as s3://bucket/run" if flag == "--run-dir" else "")
            )
    if job.run_dir is None:
        access.warn(
            "no --run-dir: the run is written into the job's own folder on the head, which Ray "
            "removes. Give an absolute path on storage that all nodes see, or a URL such as "
            "s3://bucket/run, to keep and resume it"
        )


def is_gone_with_the_job(place: str) -> bool:
    """Whether what lies there cannot be reached from another node, or after the job's end.

    Raises:
        ConfigError: it is a URL of an unknown protocol.
    """
    if not storage.is_url(place):
        return not Path(place).is_absolute()
    protocol, path = storage.check_protocol(place), place.partition("://")[2]
    return protocol == "memory" or (protocol in ("file", "local") and not path.startswith("/"))


def describe_cluster(address: str, token: str | None) -> Cluster:
    """Versions, resources and nodes.

    Raises:
        ConfigError: the dashboard is not Ray's, or does not tell.
    """
    version = get_json(address, "/api/version", token)
    if "ray_version" not in version:
        raise ConfigError(f"{address} is not the dashboard of a Ray cluster: it tells no version")
    about = get_json(address, "/api/v0/cluster_metadata", token).get("data") or {}
    listed = get_json(address, "/api/v0/nodes?detail=1", token)
    nodes = [
        node for node in listed["data"]["result"]["result"] if node.get("state", "ALIVE") == "ALIVE"
    ]
    status = get_json(address, "/api/cluster_status", token).get("data") or {}
    return Cluster(
        ray=version["ray_version"],
        python=about.get("pythonVersion"),
        cpus=sum(node["resources_total"].get("CPU", 0) for node in nodes),
        gpus=sum(node["resources_total"].get("GPU", 0) for node in nodes),
        num_nodes=len(nodes),
        autoscales=may_scale(status, {node["node_id"] for node in nodes}),
    )


def may_scale(status: Mapping[str, Any], nodes: set[str]) -> bool:
    """Whether nodes may come by themselves, as far as a dashboard's status tells.

    Without an autoscaler Ray calls each node's type node_<its id>; a real one has types of its own.
    """
    report = (status.get("clusterStatus") or {}).get("autoscalerReport")
    if report is None:
        return True
    types = set((report.get("nodeTypeMapping") or {}).values())
    return not types <= {f"node_{node}" for node in nodes} or bool(report.get("pendingNodes"))


def get_json(address: str, path: str, token: str | None) -> dict[str, Any]:
    """What the dashboard answers.

    Raises:
        ConfigError: nothing that can be used.
    """
    try:
        status, body = access.http_get(address + path, token)
        found = json.loads(body) if status == 200 else None
    except (OSError, ValueError):
        status, found = 0, None
    if not isinstance(found, dict):
        said = f"status {status}" if status else "no JSON"
        raise ConfigError(
            f"{address} answers {said} to {path}: is it the dashboard of a Ray cluster, started "
            "with ray[default]?"
        )
    return found


def check_versions(cluster: Cluster) -> None:
    """Raises ConfigError where the cluster's Python or Ray is not ours, or Ray too old."""
    access.check_ray_version(cluster.ray)
    theirs = None if cluster.python is None else ".".join(cluster.python.split(".")[:2])
    pairs = (("Python", theirs, python_version()), ("Ray", cluster.ray, metadata.version("ray")))
    differing = [f"{name} {there} there and {here} here" for name, there, here in pairs
                 if there is not None and there != here]  # fmt: skip
    if differing:
        raise ConfigError(
            f"versions differ from the cluster's: {', '.join(differing)}. Use the cluster's "
            "versions here, or start its nodes with these"
        )


def python_version() -> str:
    """Major and minor of this Python."""
    return ".".join(platform.python_version_tuple()[:2])


def check_resources(cluster: Cluster, config: RunConfig) -> bool:
    """Whether the job has to wait for nodes that an autoscaler may bring.

    Raises:
        ConfigError: CPUs or GPUs are missing and nobody brings them.
    """
    runtime = config.runtime
    has = f"{cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs on {cluster.num_nodes} nodes"
    found = f"the cluster has {has}"
    missing = []
    if cluster.cpus < runtime.num_actors:
        missing.append(
            f"{runtime.num_actors} actors need a CPU each "
            f"(--num-actors {max(int(cluster.cpus), 1)} would fit)"
        )
    if cluster.gpus < (num_gpus := runtime.num_gpus(cluster.gpus)):
        missing.append(
            f"{num_gpus} learners need a GPU each (--device cpu would fit)"
            if num_gpus > 1
            else "--device cuda needs a GPU (--device auto takes one where there is one)"
        )
    if not missing:
        return False
    if cluster.autoscales or runtime.wait_for_nodes:
        access.warn("%s; %s. The job waits for the autoscaler", found, "; ".join(missing))
        return True
    raise ConfigError(
        f"{found}; {'; '.join(missing)}. Add nodes, or where they come by themselves pass "
        "--wait-for-nodes"
    )


# --- What is sent ---


@contextmanager
def working_folder(task: str) -> Iterator[Path]:
    """A folder with the project's packages and the task's own module, for as long as the block.

    Raises:
        ConfigError: it is larger than the dashboard accepts.
    """
    with tempfile.TemporaryDirectory(prefix="metaloop-") as name:
        folder = Path(name)
        for source in [*(ROOT / package for package in PACKAGES), *task_sources(task)]:
            copy(source, folder / source.name)
        if (ROOT / "pyproject.toml").is_file():
            copy(ROOT / "pyproject.toml", folder / "pyproject.toml")
        check_upload(folder)
        yield folder


def task_sources(task: str) -> list[Path]:
    """The module or package in the current folder that a task's import path names, if any."""
    task = task.removeprefix(TRIALS_PREFIX)
    top = task.partition(":")[0].partition(".")[0]
    if ":" not in task or task in FAMILIES or task.startswith((ATARI_PREFIX, "gym:")):
        return []
    if top in PACKAGES:
        return []
    here = [Path.cwd() / top, Path.cwd() / f"{top}.py"]
    found = [path for path in here if path.exists()]
    if not found:
        access.warn("%s is not in this folder: the cluster must have the module %s", task, top)
    return found[:1]


def copy(source: Path, target: Path) -> None:
    """Copies a file, or a folder without what a job does not need."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    else:
        shutil.copyfile(source, target)


def check_upload(folder: Path, limit: int = UPLOAD_LIMIT) -> None:
    """Raises ConfigError, with the largest files, for a folder that is too large to send."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    if (total := sum(sizes.values())) <= limit:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    listed = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MB)" for name in largest)
    raise ConfigError(
        f"the job's folder has {total / 2**20:.1f} MB and the dashboard accepts "
        f"{limit / 2**20:.0f} MB; the largest files are {listed}. Put data on storage that all "
        "nodes see, and give the task its path"
    )


# --- Following ---


def follow(client: Any, name: str, job: Job) -> int:
    """Shows a job's log until it ends.

    Returns:
        0 where it succeeded, 1 where it failed, 130 where it was stopped, stopped itself after
        `--max-hours`, or is left running.
    """
    try:
        asyncio.run(show_log(client, name))
        info = final_info(client, name)
    except KeyboardInterrupt:
        print(
            f"\nthe job goes on; ray job stop {name} --address {job.address} ends it",
            file=sys.stderr,
        )
        return 130
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        print(f"the job {name} was stopped", file=sys.stderr)
        return 130
    code = info.driver_exit_code
    if code == 130:
        print(f"the job {name} ended before its last iteration; submit it again", file=sys.stderr)
        return 130
    why = info.message if code is None else f"its command ended with {code}; the log says why"
    print(f"the job {name} failed: {why}", file=sys.stderr)
    return 1


async def show_log(client: Any, name: str) -> None:
    """Prints a job's log as it grows; ends with the job, or where the connection breaks."""
    import aiohttp  # a dependency of ray's

    try:
        async for text in client.tail_job_logs(name):
            print(text, end="", flush=True)
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        print(f"the log stopped coming ({error}); still waiting for the job", file=sys.stderr)


def final_info(client: Any, name: str) -> Any:
    """What Ray tells of a job once it has ended.

    Raises:
        ConnectionError: the dashboard has not answered for a minute.
    """
    failures = 0
    while True:
        try:
            info = client.get_job_info(name)
            failures = 0
            if info.status.is_terminal():
                return info
        except (RuntimeError, OSError) as error:
            failures += 1
            if failures >= PATIENCE:
                raise ConnectionError(f"the cluster does not answer any more: {error}") from error
        time.sleep(POLL_SECONDS)

"""Real Ray clusters of several nodes on the loopback interface, for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from learners.core.errors import ConfigError
from system import access, submit
from tests.conftest import until

READY_SECONDS = 120

HEAD, LEARNER, WORKER = range(3)
"""Nodes in the order of their start."""

ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Nodes:
    """A Ray cluster of several `ray start`, each in a session of its own."""

    def __init__(self, environment: dict[str, str], token: str | None) -> None:
        # Short, because the path of a Unix socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ml", dir="/tmp"))
        self.environment, self.token = environment, token
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port, self.dashboard, self.client = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"

    def head(self, ip: str, cpus: int) -> None:
        self.gcs = f"{ip}:{self.port}"
        self.start(
            *("--head", "--node-ip-address", ip, "--port", self.port, "--num-cpus", cpus),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1"),
            *("--dashboard-port", self.dashboard, "--ray-client-server-port", self.client),
            *("--temp-dir", self.folder),
        )

    def join(self, ip: str, cpus: int, *more: str) -> None:
        self.start("--address", self.gcs, "--node-ip-address", ip, "--num-cpus", cpus, *more)

    def start(self, *arguments: object) -> None:
        log = (self.folder / f"node-{len(self.processes)}.log").open("wb")
        common = ["start", "--block", "--disable-usage-stats", "--object-store-memory", "100000000"]
        agent = ["--dashboard-agent-listen-port", str(free_port())]
        with log:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "ray.scripts.scripts", *common, *agent,
                     *map(str, arguments)],
                    env=self.environment, cwd=self.folder, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip

    def join_worker(self) -> None:
        """Brings the node without a role of its own (back)."""
        self.join(ADDRESSES[WORKER], 1)
        until(lambda: self.alive() == len(ADDRESSES), "the worker's node is up", READY_SECONDS)

    def mend(self) -> None:
        """Brings the worker's node again where it did not come up, as on a busy machine."""
        if len(self.processes) > WORKER and self.processes[WORKER].poll() is not None:
            self.kill(WORKER)
            self.join(ADDRESSES[WORKER], 1)

    def alive(self) -> int:
        """Nodes that the dashboard knows."""
        for process in self.processes:
            assert process.poll() is None, self.logs()
        try:
            return submit.describe_cluster(self.address, self.token).num_nodes
        except ConfigError:
            return 0

    def logs(self) -> str:
        names = ("node-*.log", "session_2*/logs/raylet*.err", "session_2*/logs/raylet*.out")
        found = [path for name in names for path in sorted(self.folder.glob(name))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in found)

    def kill(self, place: int) -> None:
        """Ends a node, counted in the order of their start, at once: as if it lost its power."""
        kill_all([self.processes[place]])
        del self.processes[place]

    def close(self) -> None:
        """Ends our processes, each by its id, and nobody else's."""
        kill_all(self.processes)
        shutil.rmtree(self.folder, ignore_errors=True)


def kill_all(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes and all that they started, by SIGKILL."""
    ours = [psutil.Process(process.pid) for process in started if process.poll() is None]
    ours += [child for parent in ours for child in parent.children(recursive=True)]
    for process in ours:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for process in started:
        process.wait(20)
    psutil.wait_procs(ours, timeout=20)


SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",
}
"""A node that refuses connections counts as dead after three seconds, and not after some thirty. On
a busy machine workers at Ray's own 15 would hardly be served."""


def node_environment(**more: str) -> dict[str, str]:
    """That of a node: our Python first, and nothing of this checkout."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("RAY_") and n != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path} | SETTINGS | more


@contextmanager
def three_nodes(token_file: Path) -> Iterator[Nodes]:
    """A head, a node for the learner, and one more; each with a CPU."""
    token = access.find_token() or access.create_token(token_file)
    nodes = Nodes(
        node_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token_file)), token
    )
    try:
        nodes.head(ADDRESSES[HEAD], 1)
        until(lambda: nodes.alive() == 1, "the head is up", READY_SECONDS)
        # One after the other: together they would take the same socket in the session's folder.
        nodes.join(ADDRESSES[LEARNER], 1, "--labels", "metaloop.role=learner")
        until(lambda: nodes.alive() == 2, "the learner's node is up", READY_SECONDS)
        nodes.join_worker()
        yield nodes
    finally:
        nodes.close()

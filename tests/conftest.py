"""Fixtures that the tests of several floors share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from system import cli
from system.config import RunConfig, RuntimeConfig
from system.presets import PRESETS

ROOT = Path(__file__).parents[1]

TINY_FLAGS = (
    *("--num-members", "4", "--num-envs", "3", "--members-per-slot", "2"),
    *("--eval-every", "0", "--eval-tasks", "4", "--task.horizon", "20"),
    *("--learner-threads", "1", "--device", "cpu", "--object-store-mb", "100"),
    *("--timeout-s", "120"),
)
"""The same run as `tiny_run`, as flags."""


@pytest.fixture(scope="session", autouse=True)
def own_token(tmp_path_factory):
    """The file of a token for the clusters of the tests: that of whoever runs them stays out."""
    path = tmp_path_factory.mktemp("access") / "auth_token"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        yield path


@pytest.fixture
def torch_threads():
    """Puts the number of torch threads back, which is global to the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_run():
    """(task, **changes) → the smallest run of MAML-TRPO that has several slots; serial."""

    def make(task: str = "navigation-2d", **changes) -> RunConfig:
        known = f"maml-trpo/{task}"
        config = PRESETS[known if known in PRESETS else "maml-trpo/navigation-2d"]()
        defaults = {
            "task": task,
            "iterations": 3,
            "num_members": 4,
            "num_envs": 3,
            "members_per_slot": 2,
            "eval_every": 0,
            "eval_tasks": 4,
        }
        runtime = RuntimeConfig(
            backend="serial",
            device="cpu",
            learner_threads=1,
            timeout_s=120.0,
            object_store_mb=100,
        )
        own_options = config.task_options if config.task == task else {}
        options = own_options | {"horizon": 20} | changes.pop("task_options", {})
        runtime = replace(runtime, **changes.pop("runtime", {}))
        return replace(config, **(defaults | changes), task_options=options, runtime=runtime)

    return make


class CommandLine:
    """The console command in processes of its own; those still alive at the end are ended."""

    def __init__(self, folder: Path) -> None:
        self.script = folder / "metaloop"
        self.script.write_text(
            "import sys\nfrom system.cli import main\nsys.exit(main())\n", encoding="utf-8"
        )
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, *arguments: object, cwd: Path = ROOT, output: IO[str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts `metaloop ARGUMENTS`, as installed: with its script's folder on the path.

        What it writes goes to `output`, or to pipes where there is none.
        """
        process = subprocess.Popen(
            [sys.executable, str(self.script), *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            stdout=output or subprocess.PIPE,
            stderr=output or subprocess.PIPE,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: object, cwd: Path = ROOT) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of `metaloop ARGUMENTS`."""
        return self.result(self.start(*arguments, cwd=cwd))

    def result(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Waits for the end of `process`."""
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the session that `start` began
                process.communicate(timeout=30)


@pytest.fixture
def command_line(tmp_path_factory):
    """Starts the console command in processes of its own."""
    started = CommandLine(tmp_path_factory.mktemp("bin"))
    yield started
    started.close()


@pytest.fixture
def metaloop(capsys):
    """(arguments) → exit status, standard output and standard error, in this process."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


class Clusters:
    """At most one Ray backend at a time, kept for as long as tests want the same family."""

    def __init__(self, orders: Path) -> None:
        self.orders = orders
        self.family = None
        self.backend = None

    def get(self, config: RunConfig, family):
        """A backend with three actors for `family`; `initial` is what its learner began with."""
        if self.backend is None or family != self.family:
            self.close()
            from system.ray_backend import RayBackend

            config = replace(config, runtime=replace(config.runtime, backend="ray", num_actors=3))
            self.family, self.backend = family, RayBackend(config, family, [1])
            self.initial = self.backend.learner("get_state")
        for order in self.orders.iterdir():
            order.unlink()
        return self.backend

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
        self.backend = None


@pytest.fixture(scope="session")
def clusters(tmp_path_factory):
    """Starts Ray as few times as possible; `clusters.orders` is the folder of `Obedient`."""
    running = Clusters(tmp_path_factory.mktemp("orders"))
    yield running
    running.close()


@pytest.fixture
def no_cluster(clusters):
    """This process is a driver of one cluster at a time."""
    clusters.close()


@pytest.fixture(scope="session")
def tiny_flags():
    """The flags that make of a preset what `tiny_run` makes of it."""
    return TINY_FLAGS


def until(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    """The value of a condition once it is true.

    Raises:
        TimeoutError: it never was.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.02)
    return value


@pytest.fixture(scope="session")
def wait_until():
    """(condition, what) waits until the condition's value is true, and returns it."""
    return until


@pytest.fixture(scope="session")
def meanwhile():
    """(action, *args) runs an action in a thread; calling the result waits for its end."""

    def start(action, *args):
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                action(*args)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()

        def join() -> None:
            thread.join(120)
            assert not thread.is_alive()
            if errors:
                raise errors[0]

        return join

    return start


@pytest.fixture(scope="session")
def assert_same_state():
    """Fails unless two learner states are equal bit for bit."""

    def check(left, right) -> None:
        assert left.keys() == right.keys()
        for group in left:
            assert left[group].keys() == right[group].keys()
            for name in left[group]:
                assert torch.equal(left[group][name], right[group][name]), f"{group}/{name}"

    return check

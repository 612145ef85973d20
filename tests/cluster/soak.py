"""A run that is hit again and again: actors, learner, parameter server, driver and whole nodes.

    python -m tests.cluster.soak [--kills 50] [--seed 0] [--asynchronous]

Three `ray start` nodes on the loopback interface train a small run. At random moments one of its
processes is killed by SIGKILL: which and when follows from the seed. A driver that died is started
again by the same command, a node that died joins again. The run has to end: without lag with
bitwise what a serial run learns, with it with every environment step counted once. Nothing but what
was started here is killed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import torch

from system import run_folder
from tests.cluster.nodes import ADDRESSES, WORKER, Nodes, three_nodes
from tests.conftest import TINY_FLAGS, CommandLine, until

ROLES = {
    "actor": "ray::RolloutActor",
    "learner": "ray::LearnerActor",
    "parameter server": "ray::ParameterServer",
}
KINDS = (*ROLES, "driver", "node")
ITERATIONS_PER_KILL = 5
"""Two are waited for; others pass meanwhile."""

LONGEST_S = 180.0
"""Longest time without progress."""

FAMILY = ("--task", "tests.system.families:Odometer")
PACE = {False: ("--task.pause-s", "0.01"), True: ("--task.pause-s", "0.04")}
"""So that there is an iteration to hit, without lag and with it."""

SYNCHRONOUS = ("maml-trpo/navigation-2d", *FAMILY, *TINY_FLAGS)
ASYNCHRONOUS = (
    *("a2c/half-cheetah", *FAMILY, "--max-lag", "2"),
    *("--num-members", "2", "--num-envs", "4", "--members-per-slot", "1", "--num-steps", "20"),
    *("--eval-every", "0", "--eval-tasks", "4", "--log-every", "1", "--learner-threads", "1"),
    *("--device", "cpu", "--object-store-mb", "100", "--timeout-s", "120"),
)


@dataclass
class Soak:
    """A run, who may be killed of it, and what was."""

    nodes: Nodes
    commands: CommandLine
    arguments: Sequence[object]
    folder: Path
    rng: random.Random
    log: IO[str]
    killed: Counter[str] = field(default_factory=Counter)
    driver: Any = None

    def start(self) -> None:
        """The command, from the start or from the newest checkpoint."""
        self.driver = self.commands.start(*self.arguments, output=self.log)

    def iteration(self) -> int:
        """Iterations of which there is a record."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max(
            (json.loads(line)["iteration"] for line in lines if line.endswith("}")), default=0
        )

    def moved(self, beyond: int) -> bool:
        """Whether the run came further, or to its end."""
        self.nodes.mend()
        status = self.driver.poll()
        assert status in (None, 0), self.said()
        return status == 0 or self.iteration() > beyond

    def said(self) -> str:
        """The end of what the drivers wrote."""
        return Path(self.log.name).read_text()[-4000:]

    def process(self, kind: str) -> psutil.Process:
        """One of the run's processes."""
        ours = [psutil.Process(node.pid) for node in self.nodes.processes]
        found = []
        for child in [child for node in ours for child in node.children(recursive=True)]:
            try:
                if (child.cmdline() or [""])[0].startswith(ROLES[kind]):
                    found.append(child)
            except psutil.Error:
                continue
        return self.rng.choice(sorted(found, key=lambda process: process.pid))

    def kill(self, kind: str) -> None:
        """Ends a process, or a node, and brings back what nobody else does."""
        self.killed[kind] += 1
        if kind == "node":
            self.nodes.kill(WORKER)
            self.nodes.join(ADDRESSES[WORKER], 1)
        elif kind == "driver":
            self.driver.kill()
            self.driver.wait(30)
            self.start()
        else:
            self.process(kind).kill()

    def progress(self, what: str) -> None:
        """Waits until there is a record beyond those that there are."""
        here = self.iteration()
        try:
            until(lambda: self.moved(here), what, LONGEST_S)
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.said()}") from error

    def go(self, kinds: Sequence[str]) -> None:
        """The whole run, with a kill of each kind in turn."""
        self.start()
        for kind in kinds:
            self.progress("an iteration is over")
            assert self.driver.poll() is None, f"the run was over before all kills:\n{self.said()}"
            time.sleep(self.rng.uniform(0.0, 1.0))
            begun = time.monotonic()
            try:
                self.kill(kind)
            except IndexError:  # it is being started anew
                self.killed[kind] -= 1
                continue
            self.progress(f"the run goes on without its {kind}")
            print(
                f"{kind:17} killed; next record after {time.monotonic() - begun:5.1f} s", flush=True
            )
        until(lambda: self.driver.poll() is not None, "the run ends", 10 * LONGEST_S)
        assert self.driver.returncode == 0, self.said()


def learned(folder: Path) -> tuple[dict[str, Any], Any, list[dict[str, Any]]]:
    """The newest checkpoint's groups, its counters, and the records."""
    restored = run_folder.restore(folder)
    assert restored is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return restored[0], restored[1], rows


def check_records(rows: Sequence[dict[str, Any]], iterations: int) -> None:
    """Each iteration is there once, and the count of steps never goes back."""
    assert [row["iteration"] for row in rows] == list(range(1, iterations + 1))
    steps = [row["time/env_steps"] for row in rows]
    assert all(a < b for a, b in pairwise(steps))


def check_same(folder: Path, serial: Path, iterations: int) -> None:
    """Bitwise what a serial run learned."""
    found, counters, rows = learned(folder)
    expected, expected_counters, _ = learned(serial)
    check_records(rows, iterations)
    assert counters == expected_counters
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[group][name], tensor), f"{group}/{name}"


def check_counted(folder: Path, iterations: int) -> None:
    """The environments took as many steps as were counted."""
    found, counters, rows = learned(folder)
    check_records(rows, iterations)
    taken = sum(
        int(tensors["env.odometer"].sum()) for name, tensors in found.items() if "carry" in name
    )
    assert taken == counters.env_steps == rows[-1]["time/env_steps"]


def soak(
    folder: Path, nodes: Nodes, kinds: Sequence[str], seed: int, *, asynchronous: bool
) -> None:
    """A run of some iterations for each kill, and its checks."""
    iterations = ITERATIONS_PER_KILL * (len(kinds) + 1)
    run = ASYNCHRONOUS if asynchronous else SYNCHRONOUS
    length = ("--iterations", iterations, "--checkpoint-minutes", "0")
    hit, serial, log = folder / "hit", folder / "serial", folder / "log"
    commands = CommandLine(folder)
    try:
        if not asynchronous:
            status, _, err = commands.run(
                *("train", *run, *length, "--backend", "serial", "--run-dir", serial)
            )
            assert status == 0, err
        where = ("--address", nodes.gcs, "--num-actors", "3", "--wait-for-nodes")
        arguments = ["train", *run, *PACE[asynchronous], *length, *where]
        arguments += ["--run-dir", hit]
        with log.open("w+") as said:
            soaked = Soak(nodes, commands, arguments, hit, random.Random(seed), said)
            soaked.go(kinds)
    finally:
        commands.close()
    print(f"killed: {dict(soaked.killed)}")
    if asynchronous:
        check_counted(hit, iterations)
    else:
        check_same(hit, serial, iterations)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    kinds = [rng.choice(KINDS) for _ in range(arguments.kills)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        token_file = Path(name) / "auth_token"
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file))
        with three_nodes(token_file) as nodes:
            soak(Path(name), nodes, kinds, arguments.seed, asynchronous=arguments.asynchronous)
    what = "every step counted once" if arguments.asynchronous else "bitwise the serial run"
    print(f"{arguments.kills} kills, {time.monotonic() - begun:.0f} s: {what}")


if __name__ == "__main__":
    sys.exit(main())

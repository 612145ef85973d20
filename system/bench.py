"""The project's own measurements: where the time of a meta-iteration goes."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from actors.rollout import Request
from actors.tasks import load_family
from learners.config import LpgConfig, Rl2Config
from system import run_folder
from system.backend import Arrival
from system.config import RunConfig, RuntimeConfig, TaskOption
from system.loop import Counters, Loop
from system.presets import PRESETS
from system.run import make_backend

PARTS = {
    "collect": "environments and acting",
    "begin": "publishing",
    "inner_update": "inner updates",
    "meta_update": "outer update",
}
"""What a backend is asked for, and what a person calls it."""


@dataclass
class TimedBackend:
    """A backend that notes how long each kind of request took."""

    backend: Any
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def learner(self, method: str, *args: Any) -> Any:
        """Calls the host."""
        return self.timed(method, lambda: self.backend.learner(method, *args))

    def collect(
        self, requests: Sequence[Request], carries: Sequence[Any] | None = None
    ) -> list[Arrival]:
        """Collects all requests."""
        arrivals: list[Arrival] = self.timed(
            "collect", lambda: self.backend.collect(requests, carries)
        )
        return arrivals

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        """Does the work and adds its time to a part."""
        begun = time.perf_counter()
        result = work()
        if part in self.seconds:
            self.seconds[part] += time.perf_counter() - begun
        return result


def measure(config: RunConfig, iterations: int, warm_up: int = 2) -> dict[str, Any]:
    """Meta-iterations of a run, without records or checkpoints.

    Args:
        config: of the run.
        iterations: that are measured.
        warm_up: iterations before them.

    Returns:
        Seconds of an iteration and of its parts, as minimum, median and maximum over
        `iterations`, environment steps per second at the median, this process's largest resident
        memory in MiB, and the machine.
    """
    family = load_family(config.task, config.task_options)
    backend = TimedBackend(make_backend(config, family))
    rows: list[dict[str, float]] = []
    try:
        loop = Loop(config, family, backend)
        counters, steps = Counters(), 0
        for number in range(warm_up + iterations):
            before = dict(backend.seconds)
            begun = time.perf_counter()
            done, _, _ = loop.iterate(counters)
            seconds = time.perf_counter() - begun
            steps, counters = done.env_steps - counters.env_steps, done
            parts = {part: backend.seconds[part] - before[part] for part in PARTS}
            if number >= warm_up:
                rows.append({"iteration": seconds, **parts})
    finally:
        backend.close()
    spread = {
        name: dict(zip(("min", "median", "max"), np.quantile(values, (0, 0.5, 1)), strict=True))
        for name in rows[0]
        if (values := [row[name] for row in rows])
    }
    return {
        "seconds": {n: {k: float(v) for k, v in s.items()} for n, s in spread.items()},
        "env_steps": steps,
        "env_steps_per_s": steps / float(spread["iteration"]["median"]),
        "iterations": iterations,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0,
        **run_folder.describe_process(config, config.runtime.device),
    }


def configured(name: str, width: int, num_members: int | None, num_envs: int) -> RunConfig:
    """What is measured under that name, with recurrent networks of that width."""
    if name == "rl2":
        return rl2(width, num_members or 2500)
    return lpg(width, num_members or 16, num_envs)


def rl2(width: int, num_members: int) -> RunConfig:
    """RL² at the paper's size: trials of 100 steps of a tabular MDP, 8 epochs of PPO."""
    config = PRESETS["rl2/tabular-mdp"]()
    assert isinstance(config.learner, Rl2Config)
    return replace(
        config,
        preset="bench rl2",
        learner=replace(config.learner, width=width, num_epochs=8, num_minibatches=10),
        num_members=num_members,
        members_per_slot=-(-num_members // 4),
        runtime=RuntimeConfig(backend="serial"),
    )


def lpg(rule_width: int, num_members: int, num_envs: int) -> RunConfig:
    """LPG on small grids: K = 5 windows of T = 20 in each of M × E environments."""
    config = PRESETS["lpg/chain-and-small-grids"]()
    assert isinstance(config.learner, LpgConfig)
    learner = replace(config.learner, rule_width=rule_width)
    names: dict[str, TaskOption] = {"names": "tabular-sparse,random-small-sparse"}
    return replace(
        config,
        preset="bench lpg",
        learner=learner,
        num_members=num_members,
        num_envs=num_envs,
        task_options=names,
    )


def print_table(result: dict[str, Any], title: str) -> None:
    """Each part's seconds and share, for people."""
    table = Table(title=title)
    for name in ("part", "min s", "median s", "max s", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    whole = result["seconds"]["iteration"]["median"]
    for part, spread in result["seconds"].items():
        numbers = [f"{spread[key]:.3f}" for key in ("min", "median", "max")]
        share = f"{spread['median'] / whole:.0%}"
        table.add_row(PARTS.get(part, "one meta-iteration"), *numbers, share)
    console = Console()
    console.print(table)
    console.print(
        f"{result['env_steps']:,} environment steps, {result['env_steps_per_s']:,.0f} per second, "
        f"{torch.get_num_threads()} threads, at most {result['peak_rss_mb']:,.0f} MiB"
    )


def compare(result: dict[str, Any], old: Path) -> str:
    """How many times faster than an earlier result, by its median."""
    before = json.loads(old.read_text())["seconds"]["iteration"]["median"]
    return f"{before / result['seconds']['iteration']['median']:.2f} times as fast as {old}"

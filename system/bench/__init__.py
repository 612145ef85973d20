"""The project's own measurements, ratios first: `metaloop bench NAME`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from system.arguments import BenchArguments
from system.bench import iteration, outer_update
from system.bench.runs import RUNS


def measure(given: BenchArguments) -> dict[str, Any]:
    """What is measured under a name.

    Returns:
        "name", one or both of "seconds" and "steps_per_s" (minimum, median and maximum by label),
        perhaps "ratios" by label, and what is known of the machine and the code.
    """
    if given.name == "sampling":
        from system.bench import sampling

        return sampling.measure(given.robot, given.seconds, given.iterations)
    if given.name == "transport":
        from system.bench import transport  # it imports ray

        return transport.measure(given.iterations, given.num_actors)
    config = RUNS[given.name](given)
    title = f"{given.name}: {(RUNS[given.name].__doc__ or '').rstrip('.')}"
    result = iteration.measure(title, config, given.iterations, given.warm_up)
    if given.name in ("maml", "navigation"):
        result["seconds"] |= outer_update.measure(config, given.iterations)
    return result


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Ratios, then seconds and rates, for people."""
    console = console or Console()
    if "ratios" in result:
        table = Table("ratio", title=result["name"])
        table.add_column("median", justify="right")
        for label, ratio in result["ratios"].items():
            table.add_row(label, f"{ratio:.2f}")
        console.print(table)
    for unit, title in (("seconds", "s"), ("steps_per_s", "environment steps/s")):
        if unit not in result:
            continue
        table = Table(title, title=result["name"])
        for name in ("min", "median", "max"):
            table.add_column(name, justify="right")
        for label, spread in result[unit].items():
            numbers = [number(spread[key]) for key in ("min", "median", "max")]
            table.add_row(label, *numbers)
        console.print(table)
    if "env_steps" in result:
        console.print(
            f"{result['env_steps']:,} environment steps, {result['env_steps_per_s']:,.0f} per "
            f"second, at most {result['peak_rss_mb']:,.0f} MiB"
        )


def number(value: float) -> str:
    """Three decimals of what is small, none of what is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def compare(result: dict[str, Any], old: Path) -> list[str]:
    """How many times faster than an earlier result, by the medians of what both have."""
    before = json.loads(old.read_text())
    lines = []
    for unit, faster in (("seconds", -1.0), ("steps_per_s", 1.0)):
        for label, spread in result.get(unit, {}).items():
            if (known := before.get(unit, {}).get(label)) and known["median"] and spread["median"]:
                ratio = (spread["median"] / known["median"]) ** faster
                lines.append(f"{label}: {ratio:.2f} times as fast as {old}")
    return lines

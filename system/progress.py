"""How far a run is: a live bar on a terminal, one plain line per iteration elsewhere."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

if TYPE_CHECKING:
    from learners.core.trajectory import Metrics

ETA_WINDOW = 20
"""Iterations whose mean duration the remaining time is reckoned from."""


class Progress:
    """Shows the progress of a run; a context manager.

    Args:
        total_iterations: N, of the whole run.
        done_iterations: those finished before a resume.
        title: what is being trained.
        stream: where to write, standard output by default.
    """

    def __init__(
        self, total_iterations: int, done_iterations: int, title: str, stream: TextIO | None = None
    ) -> None:
        self._total = total_iterations
        self._title = title
        self._stream = stream or sys.stdout
        self._history = deque([(time.monotonic(), done_iterations)], maxlen=ETA_WINDOW + 1)
        self._evaluation: dict[str, float] = {}
        self._live: Live | None = None
        console = Console(file=self._stream)
        if self._stream.isatty() and not console.is_dumb_terminal:
            self._details = Text("starting")
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                console=console,
            )
            self._task = self._bar.add_task(
                title, total=total_iterations, completed=done_iterations
            )
            self._live = Live(Group(self._bar, self._details), console=console)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, iteration: int, env_steps: int, metrics: Metrics) -> None:
        """Shows that `iteration` iterations and `env_steps` environment steps are done.

        On a terminal the last values of `eval/…` stay until there are new ones.
        """
        self._history.append((time.monotonic(), iteration))
        remaining = duration(seconds_left(self._history, self._total))
        if self._live:
            self._evaluation |= {k: v for k, v in metrics.items() if k.startswith("eval/")}
            self._bar.update(self._task, completed=iteration)
            # A Text is replaced in place, since the live display holds this very object.
            self._details.plain = describe(remaining, env_steps, metrics | self._evaluation)
            self._live.refresh()
        else:
            line = describe(remaining, env_steps, metrics)
            self.say(f"{self._title}  {iteration}/{self._total}  {line}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def describe(remaining: str, env_steps: int, metrics: Metrics) -> str:
    """One line: remaining time, steps, speed, returns before -> after adaptation, lag, restarts."""
    returns = series(metrics, "adapt/ep_rew_mean_")
    if not returns and "rollout/ep_rew_mean" in metrics:
        returns = [metrics["rollout/ep_rew_mean"]]
    parts = [f"eta {remaining}", f"env steps {env_steps:,}"]
    if "perf/env_steps_per_s" in metrics:
        parts.append(f"{number(metrics['perf/env_steps_per_s'], 0)} steps/s")
    if returns:
        parts.append(f"return {before_after(returns)}")
    if "perf/policy_lag_mean" in metrics:
        parts.append(f"lag {number(metrics['perf/policy_lag_mean'])}")
    if "sys/actor_restarts" in metrics:
        parts.append(f"restarts {number(metrics['sys/actor_restarts'], 0)}")
    return "  ".join(parts + evaluation_parts(metrics))


def evaluation_parts(metrics: Metrics) -> list[str]:
    """Every `eval/…` tag with its value; numbered tags as one, from their first to their last."""
    numbered = re.compile(r"(eval/.*_)\d+")
    parts: dict[str, str] = {}
    for tag, value in metrics.items():
        if match := numbered.fullmatch(tag):
            stem = match[1]
            parts[stem] = f"{stem.rstrip('_')} {before_after(series(metrics, stem))}"
        elif tag.startswith("eval/"):
            parts[tag] = f"{tag} {number(value)}"
    return list(parts.values())


def series(metrics: Mapping[str, float], stem: str) -> list[float]:
    """The values of the tags `stem`0, `stem`1, … in the order of their numbers."""
    numbers = {tag[len(stem) :]: value for tag, value in metrics.items() if tag.startswith(stem)}
    return [numbers[k] for k in sorted(filter(str.isdecimal, numbers), key=int)]


def before_after(values: Sequence[float]) -> str:
    """The first value -> the last one; one value alone where there is no other."""
    ends = values[:1] if len(values) == 1 else (values[0], values[-1])
    return " -> ".join(number(value) for value in ends)


def number(value: float, decimals: int = 2) -> str:
    """A number with thousands set apart; "-" for one that is not finite."""
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "-"


def seconds_left(history: Sequence[tuple[float, int]], total: int) -> float:
    """Seconds until `total` iterations, from (seconds, iterations done) of some moments in order.

    NaN where no iteration lies between the first moment and the last.
    """
    (start, first), (now, done) = history[0], history[-1]
    if done <= first:
        return math.nan
    return (now - start) / (done - first) * max(total - done, 0)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss; "-" where they are not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

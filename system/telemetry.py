"""What a run records: TensorBoard in `tb/` and one JSON line per write in `metrics.jsonl`.

Both hold the same tags at the same environment steps, and both go on unbroken after a resume.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from learners.core.trajectory import Metrics
from system import markdown
from system.config import flat
from system.records import EVENTS, METRICS, parse_row

HPARAMS_METRICS = ("rollout/ep_rew_mean", "adapt/gain")
"""Tags that TensorBoard's HPARAMS page shows beside the configuration."""

EVALUATION = {"evaluation after k": ["Multiline", [r"eval/ep_rew_mean_\d+"]]}

RETURNS = {
    "adapting": {"training after k": ["Multiline", [r"adapt/ep_rew_mean_\d+"]], **EVALUATION},
    "lifetimes": {"last lifetimes by world": ["Multiline", [r"lpg/return_.+"]], **EVALUATION},
    "replicas": {
        "mean and 95 % interval": [
            "Margin",
            ["rollout/ep_rew_mean", "rollout/ep_rew_ci95_low", "rollout/ep_rew_ci95_high"],
        ],
        "each replica": ["Multiline", [r"replica/ep_rew_mean_\d+"]],
    },
}
"""Curves of returns that TensorBoard's CUSTOM SCALARS page shows in one chart, by what members are;
tags are regular expressions there. In what adapts, k are inner updates or episodes of a trial."""

TIME = {
    "idle share of actors and learner": [
        "Multiline",
        ["perf/actor_idle_frac", "perf/learner_idle_frac"],
    ],
    "seconds of collection and learning": ["Multiline", ["perf/collect_s", "perf/learner_s"]],
}

NUM_BINS = 50
"""Bins of a histogram."""

LARGEST = torch.finfo(torch.float32).max
"""TensorBoard's scalars are float32; what does not fit would read as infinite."""


class Telemetry:
    """The writer of one run; a context manager.

    Args:
        run_dir: the run's folder; made where missing.
        resume_step: the iteration of the checkpoint that training goes on from. Whatever was
            recorded for later iterations is dropped from `metrics.jsonl` and purged from
            TensorBoard. None starts anew: all that was recorded is dropped.

    Raises:
        OSError: from every method, where the disk refuses.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        rows = _rewind(run_dir / METRICS, resume_step)
        # Events at the purge step and later disappear; the configuration is written at it, so
        # that resuming twice from one checkpoint leaves one copy.
        self._purge_step = max((row["env_steps"] for row in rows), default=-1) + 1
        _wait_for_a_later_second(run_dir / EVENTS)
        self._events = SummaryWriter(str(run_dir / EVENTS), purge_step=self._purge_step)
        self._lines = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, iteration: int, env_steps: int, metrics: Metrics) -> None:
        """Records scalars by tag at `env_steps` environment steps, on disk when it returns.

        NaN and infinity become null in `metrics.jsonl` and a gap in TensorBoard.
        """
        for tag, value in metrics.items():
            if abs(value) <= LARGEST:  # false for NaN
                self._events.add_scalar(tag, value, env_steps)
        # TensorBoard goes first: a write cut short in between is then purged from it on resume.
        self._events.flush()
        row = {"iteration": iteration, "env_steps": env_steps} | {
            tag: float(value) if math.isfinite(value) else None for tag, value in metrics.items()
        }
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
        self._lines.flush()

    def show(
        self, env_steps: int, images: Mapping[str, Any], histograms: Mapping[str, Any]
    ) -> None:
        """Records pictures in TensorBoard alone, at `env_steps` environment steps.

        Args:
            env_steps: as for `write`.
            images: [H, W, 3] uint8 by tag.
            histograms: numbers in any shape by tag; those that are not finite are left out.
        """
        for tag, image in images.items():
            self._events.add_image(tag, image, env_steps, dataformats="HWC")
        for tag, values in histograms.items():
            finite = values[np.isfinite(values)]
            if finite.size:
                self._events.add_histogram(tag, finite, env_steps, bins=NUM_BINS)
        self._events.flush()

    def show_film(self, env_steps: int, tag: str, gif: bytes) -> None:
        """Records a film, a GIF file, as an image that moves, at `env_steps` environment steps."""
        width, height = struct.unpack("<HH", gif[6:10])  # after the six letters of "GIF89a"
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        file_writer: Any = self._events.file_writer
        file_writer.add_summary(summary, env_steps)
        self._events.flush()

    def config_text(self, config: Mapping[str, Any], members: str = "adapting") -> None:
        """Records the configuration as a table and as hparams, and which curves belong together.

        Args:
            config: the resolved configuration.
            members: what members are, a key of `RETURNS`.
        """
        settings = flat_settings(config)
        self._events.add_text(
            "config", markdown.table(("setting", "value"), settings.items()), self._purge_step
        )
        # SummaryWriter.add_hparams would open a second run in a sub-folder.
        summaries = hparams(settings, dict.fromkeys(HPARAMS_METRICS, 0.0))  # type: ignore[no-untyped-call]
        file_writer: Any = self._events.file_writer
        # Of add_custom_scalars' own the step cannot be given.
        charts = {"returns": RETURNS[members], "where the time goes": TIME}
        layout = custom_scalars(charts)  # type: ignore[no-untyped-call]
        for summary in (*summaries, layout):
            file_writer.add_summary(summary, self._purge_step)
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._events.close()
        self._lines.close()


def flat_settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Nested settings as one level with dotted names; what is not a plain scalar becomes text."""
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in flat(config).items()
    }


def _rewind(path: Path, iteration: int | None) -> list[dict[str, Any]]:
    """Drops rows after `iteration` (all, where it is None) and cut lines; returns the others.

    The file is replaced in one step, so that an interruption leaves the old one or the new one.
    """
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    parsed = [(line, parse_row(line)) for line in lines]
    kept = [
        (line, row)
        for line, row in parsed
        if row is not None and iteration is not None and row["iteration"] <= iteration
    ]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line, _ in kept)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    return [row for _, row in kept]


def _wait_for_a_later_second(folder: Path) -> None:
    """Waits at most a second, until the next event file sorts after those already there.

    Readers take the files in the order of their names, which begin with the time in seconds.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    while seconds and max(seconds) == int(time.time()):
        time.sleep(0.02)

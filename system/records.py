"""What a run recorded, read from its folder alone: no checkpoint is needed, and no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from actors.tasks import closest
from learners.core.errors import ConfigError
from system.storage import is_url

CONFIG, META, EVALUATION = "config.json", "meta.json", "evaluation.json"
METRICS = "metrics.jsonl"
EVENTS = "tb"
FILES = (CONFIG, META, EVALUATION, METRICS)

Row: TypeAlias = dict[str, Any]

Sample: TypeAlias = tuple[np.ndarray, np.ndarray]
"""A metric of one independent run: environment steps [T] and finite values [T]."""


@dataclass(frozen=True)
class Records:
    """One run; what its folder lacks is empty."""

    place: str
    """Where the run lies, as the user named it."""
    rows: Sequence[Row] = ()
    """Of metrics.jsonl, in order."""
    config: Row = field(default_factory=dict)
    meta: Row = field(default_factory=dict)
    evaluation: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return Path(self.place.rstrip("/")).absolute().name

    @property
    def method(self) -> str:
        """The preset; where that is unknown, the folder's name without the seed."""
        return str(self.config.get("preset") or self.name_without_seed)

    @property
    def name_without_seed(self) -> str:
        """The folder's name without the seed at its end."""
        return re.sub(r"[-_.]?seed[-_]?\d+$", "", self.name) or self.name

    @cached_property
    def tags(self) -> dict[str, int]:
        """The metrics that are finite at least once, each with how often, in order."""
        counts: dict[str, int] = {}
        for row in self.rows:
            for tag, value in row.items():
                if value is not None and "/" in tag:
                    counts[tag] = counts.get(tag, 0) + 1
        return counts

    def check_tag(self, tag: str) -> None:
        """Raises ConfigError with the closest tags unless the run recorded this one."""
        known = self.tags
        if not known:
            raise ConfigError(f"{self.place} has recorded nothing yet: {METRICS} is empty")
        if tag not in known:
            raise ConfigError(
                f"{self.place} has no metric {tag!r}; closest: {closest(tag, sorted(known))}"
            )

    def series(self, tag: str) -> Sample:
        """Where and what a metric was, as far as it was finite."""
        rows = [row for row in self.rows if row.get(tag) is not None]
        steps = np.array([row["env_steps"] for row in rows], np.float64)
        return steps, np.array([row[tag] for row in rows], np.float64)

    def replica_tags(self, tag: str) -> list[str]:
        """The metrics of single replicas that `tag` is the mean of."""
        stem = tag.replace("rollout/", "replica/")
        return [] if stem == tag else [f"{stem}_{m}" for m in numbers(self.tags, f"{stem}_")]

    def samples(self, tag: str) -> list[Sample]:
        """A metric of each replica, or of the run where it has none."""
        return [self.series(name) for name in self.replica_tags(tag) or [tag]]


def numbers(tags: Sequence[str] | dict[str, Any], stem: str) -> list[int]:
    """The numbers that follow `stem` in tags, ascending."""
    ends = (tag.removeprefix(stem) for tag in tags if tag.startswith(stem))
    return sorted(int(end) for end in ends if end.isdecimal())


def read(folder: Path, place: str | None = None) -> Records:
    """The records that lie in a folder.

    Args:
        folder: with a run's files; any of them may be missing, but not both of metrics.jsonl and
            config.json.
        place: where the run lies, if not there.

    Raises:
        ConfigError: it is no run's folder, or a file of it cannot be read.
    """
    place = place or str(folder)
    if not any((folder / name).is_file() for name in (METRICS, CONFIG)):
        raise ConfigError(
            f"{place} is not a run's folder: it has neither {METRICS} nor {CONFIG}. Runs lie under "
            "runs/ unless --run-dir said otherwise"
        )
    objects = (read_object(folder / name) for name in (CONFIG, META, EVALUATION))
    return Records(place, read_rows(folder / METRICS), *objects)


def read_all(places: Sequence[str]) -> list[Records]:
    """The records of several runs, each in a folder or at a URL.

    Raises:
        ConfigError: there are none, one is named twice, or cannot be read.
    """
    if not places:
        raise ConfigError("name at least one run: its folder, or its URL")
    for number, place in enumerate(places):
        if same_place(place) in map(same_place, places[:number]):
            raise ConfigError(f"{place} is named twice; it would count as two independent runs")
    found = []
    for place in places:
        with at(place, is_record) as folder:
            found.append(read(folder, place))
    return found


def same_place(place: str) -> str:
    """Equal for two names of one folder."""
    return place.rstrip("/") if is_url(place) else str(Path(place).resolve())


@contextmanager
def at(place: str, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """The folder at a place; if that is a URL, a copy of the files wanted, as long as the block.

    Raises:
        ConfigError: the storage is unknown or refuses, or holds no run.
    """
    if not is_url(place):
        yield Path(place)
        return
    from system.mirror import copied  # which needs torch

    with copied(place, wanted=wanted) as folder:
        yield folder


def read_object(path: Path) -> Row:
    """The object in a JSON file; empty where there is no file.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} cannot be read: it holds no object")
    return value


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; none where there is no file, and without lines cut short."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    return [row for row in map(parse_row, lines) if row is not None]


def parse_row(line: str) -> Row | None:
    """The row that a line spells, or None where it was cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and {"iteration", "env_steps"} <= row.keys()
    return row if whole else None


def is_record(name: str) -> bool:
    """Whether a file of a run's folder is one that `read` reads."""
    return name in FILES


def is_record_or_event(name: str) -> bool:
    """Whether it is one of these, or TensorBoard's."""
    return is_record(name) or name.startswith(f"{EVENTS}/")

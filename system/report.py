"""The report of a run: what was run, what it reached, and its pictures, as Markdown.

`report.md` stands beside the folder `report/` of its pictures, which it names by relative paths.
What a report should show and cannot is said in its place.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learners.core.errors import ConfigError
from system import curves, markdown, plots, records
from system.arguments import without_flags
from system.config import flat
from system.records import CONFIG, EVALUATION, EVENTS, META, METRICS, Records
from system.statistics import landmarks
from system.storage import is_url

REPORT, PICTURES = "report.md", "report"

LEADING = ("rollout", "adapt", "eval", "meta", "inner")
"""Groups of metrics that stand first."""

APART = ("replica", "time")
"""Groups of metrics that are left out."""


def write(folder: Path, place: str, out: Path) -> Path:
    """Writes the report of a run and its pictures.

    Args:
        folder: of the run, or a copy of its records and events.
        place: where the run lies, as the user named it.
        out: folder to write to; made where missing.

    Returns:
        The path of report.md.

    Raises:
        ConfigError: the folder is no run's, or a file of it cannot be read.
        OSError: the disk refuses.
    """
    run = records.read(folder, place)
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    here = place if is_url(place) else os.path.relpath(folder, out)
    parts = [
        title(run),
        facts(run),
        "## What it reached",
        learning_curves(run, out),
        *evaluation(run.evaluation),
        "## Last values",
        last_values(run),
        "## Pictures",
        recorded_pictures(folder / EVENTS, out),
        "## How to go on",
        how_to_go_on(run, here),
        "## Configuration",
        configuration(run),
    ]
    path = out / REPORT
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def title(run: Records) -> str:
    """Preset and seed, and how far the run came."""
    seed = f", seed {run.config['seed']}" if "seed" in run.config else ""
    head = f"# {run.method}{seed}"
    if not run.rows:
        return f"{head}\n\nNothing is recorded yet: {METRICS} is missing or empty."
    last = run.rows[-1]
    planned = f" of {run.config['iterations']:,}" if "iterations" in run.config else ""
    return (
        f"{head}\n\n{last['iteration']:,}{planned} iterations, {last['env_steps']:,} {steps(run)}."
    )


def steps(run: Records) -> str:
    """What the x-axis counts."""
    of_replicas = any(tag.startswith("replica/") for tag in run.tags)
    return "environment steps" + " of each replica" * of_replicas


def facts(run: Records) -> str:
    """Command, code, machine and versions."""
    meta = run.meta
    if not meta:
        return f"Command, commit, machine and versions are unknown: there is no {META}."
    git, machine = meta.get("git") or {}, meta.get("machine", {})
    changed = " and changes that were not committed" if git.get("changed") else ""
    versions = {"python": meta.get("python"), **meta.get("versions", {})}
    rows = {
        "task": meta.get("task"),
        "command": f"`{shlex.join(meta.get('command', []))}`",
        "commit": f"{git['commit']}{changed}" if git else "unknown: no git repository",
        "machine": f"{machine.get('processor')}, {machine.get('cores')} cores, "
        f"{machine.get('system')}",
        "learner's device": meta.get("device"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
    }
    return markdown.table(("", ""), rows.items())


# --- What it reached ---


def learning_curves(run: Records, out: Path) -> str:
    """The picture that `metaloop plot` makes of this run alone."""
    try:
        panels = curves.panels(curves.grouped([run]))
    except ConfigError as error:
        return f"There is no learning curve: {error}."
    plots.save(plots.figure(panels), out / PICTURES / "curves.png")
    return f"![learning curve]({PICTURES}/curves.png)"


def evaluation(result: Mapping[str, Any]) -> list[str]:
    """Returns before and after adaptation, of kinds of tasks apart, and beside other methods."""
    if not result:
        return [
            f"There is no table of the evaluation: {EVALUATION} is missing, which the end of the "
            "training writes."
        ]
    what = "held-out tasks" if result.get("held_out") else "tasks that training knows too"
    if "replicas" in result:
        what = "replicas, each on episodes of its own"
    parts = [f"Return of {result['tasks']:,} {what}:", adaptation_table(result)]
    for group in result.get("groups", []):
        name = ", ".join(f"{key} {value}" for key, value in group["task"].items())
        parts += [f"Of these, {group['members']:,} with {name}:", adaptation_table(group)]
    if "trial_return" in result:
        rows = {result["preset"]: result["trial_return"], **result.get("opponents", {})}
        rows |= result.get("bounds", {})
        table = [(name, number(row["mean"]), interval(row)) for name, row in rows.items()]
        parts += ["Total reward of a trial:", markdown.table(("", "mean", "95 %"), table)]
    return parts


def adaptation_table(result: Mapping[str, Any]) -> str:
    """One row for each k, and the gain."""
    adapt = result["adapt"]
    table = [
        (row["k"], number(row["mean"]), interval(row), number(row["iqm"]))
        for row in (adapt[k] for k in landmarks(len(adapt)))
    ]
    if result.get("gain"):
        table.append(("gain", number(result["gain"]["mean"]), interval(result["gain"]), ""))
    unit = result.get("unit", "inner updates")
    return markdown.table((f"k, {unit}", "mean", "95 %", "IQM"), table)


def number(value: float) -> str:
    """Five digits."""
    return f"{value:.5g}"


def interval(row: Mapping[str, Any]) -> str:
    """Of a row with "ci95"."""
    low, high = row["ci95"]
    return f"[{number(low)}, {number(high)}]"


def last_values(run: Records) -> str:
    """The last value of each of the main metrics; of numbered ones some."""
    tags = main_tags(list(run.tags))
    if not tags:
        return f"There are none: {METRICS} is missing or empty."
    found = [(tag, *run.series(tag)) for tag in tags]
    rows = [(tag, number(values[-1]), f"{at[-1]:,.0f}") for tag, at, values in found]
    return markdown.table(("metric", "last value", steps(run)), rows)


def main_tags(tags: Sequence[str]) -> list[str]:
    """Those that a report shows, the leading groups first."""
    groups = dict.fromkeys((*LEADING, *(tag.split("/")[0] for tag in tags)))
    ordered = [t for group in groups for t in tags if t.split("/")[0] == group]
    return [t for t in ordered if t.split("/")[0] not in APART and is_landmark(t, tags)]


def is_landmark(tag: str, tags: Sequence[str]) -> bool:
    """Whether a tag is not numbered, or its number is one of those shown."""
    numbered = re.fullmatch(r"(.*_)(\d+)", tag)
    if numbered is None:
        return True
    found = records.numbers(tags, numbered[1])
    return int(numbered[2]) in [found[place] for place in landmarks(len(found))]


# --- Pictures of TensorBoard ---


def recorded_pictures(events: Path, out: Path) -> str:
    """The newest of each picture that the run recorded."""
    if not events.is_dir():
        return f"There are none: the run has no {EVENTS}/ here."
    newest = newest_images(events)
    if not newest:
        return f"There are none: {EVENTS}/ holds no images."
    parts = []
    for tag, (step, content) in newest.items():
        name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', tag)}.png"
        (out / PICTURES / name).write_bytes(content)
        parts.append(f"`{tag}` after {step:,} environment steps:\n\n![{tag}]({PICTURES}/{name})")
    return "\n\n".join(parts)


def newest_images(events: Path) -> dict[str, tuple[int, bytes]]:
    """Environment steps and PNG of the last image of each tag in TensorBoard's event files."""
    from tensorboard.backend.event_processing import event_accumulator

    kinds = (event_accumulator.SCALARS, event_accumulator.TENSORS, event_accumulator.HISTOGRAMS)
    # One of a kind is the least that is kept; the last one always is.
    sizes = dict.fromkeys((*kinds, event_accumulator.IMAGES), 1)
    found = event_accumulator.EventAccumulator(str(events), size_guidance=sizes).Reload()
    last = {tag: found.Images(tag)[-1] for tag in sorted(found.Tags()[event_accumulator.IMAGES])}
    return {tag: (image.step, image.encoded_image_string) for tag, image in last.items()}


# --- How to go on ---


def how_to_go_on(run: Records, here: str) -> str:
    """Commands that go on from a run.

    Args:
        run: the run.
        here: where the run lies, as seen from the report; or its URL.
    """
    where = "" if is_url(here) else " In this folder:"
    flags = go_on_flags(run)
    commands = [
        ["metaloop", "evaluate", here],
        ["metaloop", "train", run.method, *flags, "--run-dir", here],
    ]
    if not is_url(here):
        commands.append(["tensorboard", "--logdir", here])
    block = "\n".join(["```sh", *map(shlex.join, commands), "```"])
    paths = any("/" in flag for flag in flags)
    note = "\n\nPaths among the flags are as they were where the run was started." if paths else ""
    return (
        f"Adapt to evaluation tasks, go on with the training, look at everything.{where}"
        f"\n\n{block}{note}"
    )


def go_on_flags(run: Records) -> list[str]:
    """The flags of the run's command, with twice as many iterations where it has done them all."""
    command = [str(word) for word in run.meta.get("command", [])]
    flags = without_flags(command[3:], ("--run-dir",), ()) if command[1:2] == ["train"] else []
    planned = run.config.get("iterations")
    if planned is not None and run.rows and run.rows[-1]["iteration"] >= planned:
        return [*without_flags(flags, ("--iterations",), ()), "--iterations", str(2 * planned)]
    return flags


def configuration(run: Records) -> str:
    """Every setting."""
    if not run.config:
        return f"The configuration is unknown: there is no {CONFIG}."
    return markdown.table(("setting", "value"), flat(run.config).items())

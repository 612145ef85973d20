"""The glossary of docs/metrics.md has what runs log, and nothing else: both ways, by method.

Real runs of every method, as small as can be, say what is logged. What only processes side by side
log is looked for in the source.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learners.config import METHODS
from system import pictures
from system.config import RuntimeConfig
from system.episodes import arrange
from system.presets import PRESETS
from system.run import train
from tests.pages import ROOT, read, rows, section

PAGE = read("docs/metrics.md")
SCALARS = ("Every run", "Adaptation", "Updates", "Methods")
"""Sections whose tables list what serial runs log."""

GROUPS = {
    "all": set(METHODS),
    "replicas": {"a2c", "ppo", "td-lambda", "lirpg", "frodo", "lpg-agent"},
}
PAGES = {
    "maml-trpo": {"maml-trpo"},
    "lirpg": {"lirpg"},
    "frodo": {"frodo"},
    "lpg": {"lpg", "lpg-agent"},
    "rl2": {"rl2"},
    "baselines": {"a2c", "ppo", "td-lambda"},
}
"""Pages under docs/learners/ and the methods that they are about."""

NARROW = {"hidden": (8,)}
EPOCH = {"num_steps": 16, "num_epochs": 1, "num_minibatches": 2}
RULE = {"rule_width": 4, "num_predictions": 3, "embedding_width": 2, "hidden": (4,)}
BOTH = {"names": "chain-short,random-small-sparse"}
BANDIT = {"arms": 2, "pulls": 1, "episodes": 3}
GRU = {"width": 4, "num_epochs": 1, "num_minibatches": 2}
LIVES = {"num_inner_updates": 1, "num_steps": 20, "evaluation_updates": 10, "members_per_block": 2}
TRIALS = {"num_members": 4, "num_envs": 1, "eval_tasks": 4}
RUNS = {
    "maml-trpo": ("maml-trpo/navigation-2d", "navigation-2d", {"horizon": 5}, NARROW, {}),
    "a2c": ("a2c/catch", "catch", {}, NARROW | {"num_steps": 6}, {}),
    "ppo": ("ppo/cartpole", "catch", {}, NARROW | EPOCH, {}),
    "td-lambda": ("td-lambda/random-walk-flip", "random-walk-flip", {}, {}, {}),
    "lirpg": ("lirpg/delayed-hopper", "delayed-hopper", {"horizon": 10}, NARROW | EPOCH, {}),
    "lirpg, pixels": (
        "lirpg/atari-breakout",
        "atari-breakout",
        {"horizon": 20},
        {},
        {"num_members": 1, "num_envs": 1, "eval_tasks": 1},
    ),
    "frodo": ("frodo/catch", "catch", {}, NARROW | {"num_inner_updates": 1, "num_steps": 6}, {}),
    "frodo, values": (
        "frodo/random-walk-flip",
        "random-walk-flip",
        {},
        {"num_outcome_batches": 1},
        {},
    ),
    "lpg": (
        "lpg/chain-and-small-grids",
        "worlds",
        BOTH,
        RULE | LIVES,
        {"num_members": 4, "eval_tasks": 4},
    ),
    "lpg-agent": (
        "lpg-agent/chain-short",
        "worlds",
        {"names": "chain-short"},
        RULE | {"teacher": "a2c", "num_steps": 40},
        {},
    ),
    "rl2": ("rl2/bandit", "trials:bandit", BANDIT, GRU | {"outer": "trpo"}, TRIALS),
    "rl2, maze": ("rl2/maze", "trials:maze", {"horizon": 10, "episodes": 2}, GRU, TRIALS),
}
"""Preset, task, its options, settings of the learner and of the run. Together they log all there
is."""


def listed(*headings: str) -> dict[str, set[str]]:
    """Tags of some sections, numbers and names as * in them, and the methods that log each."""
    found: dict[str, set[str]] = {}
    for heading in headings:
        for tag, *_, methods in rows(section(PAGE, heading)):
            name = re.sub(
                r"_[km]$|<\w+>$", lambda end: "_*" if end[0][0] == "_" else "*", tag[1:-1]
            )
            assert name not in found, f"{tag} is listed twice"
            said = [word.strip() for word in methods.split(",")]
            found[name] = set().union(*(GROUPS.get(word, {word}) for word in said))
    return found


def starred(tag: str) -> str:
    """A tag with * in place of what is counted or named in it."""
    if tag.startswith("lpg/return_"):
        return "lpg/return_*"
    return re.sub(r"_\d+$", "_*", tag)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(scalars, pictures): the methods by tag, of one run for each of `RUNS`."""
    scalars: dict[str, set[str]] = {}
    shown: dict[str, set[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        # What is drawn is looked at elsewhere; here it only has to be there.
        patch.setattr(pictures, "to_image", lambda figure: np.zeros((1, 1, 3), np.uint8))
        for name, run in RUNS.items():
            folder = tmp_path_factory.mktemp("logged")
            train(tiny(*run), folder)
            method = name.split(",")[0]
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            for tag in set().union(*map(json.loads, lines)) - {"iteration", "env_steps"}:
                scalars.setdefault(starred(tag), set()).add(method)
            sizes = {"images": 0, "histograms": 0}
            events = EventAccumulator(str(folder / "tb"), size_guidance=sizes).Reload().Tags()
            for tag in events["images"] + events["histograms"]:
                shown.setdefault(tag, set()).add(method)
    return scalars, shown


def tiny(preset, task, options, learner, settings):
    """Two updates, the second with pictures."""
    config = PRESETS[preset]()
    small = {
        "num_members": 2,
        "num_envs": 2,
        "members_per_slot": 2,
        "eval_tasks": 2,
        "iterations": 2,
        "eval_every": 0,
        "picture_every": 2,
        "log_every": 1,
        "max_lag": 0,
    }
    return replace(
        config,
        task=task,
        task_options=options,
        learner=replace(config.learner, **learner),
        runtime=RuntimeConfig(backend="serial", device="cpu", learner_threads=1),
        **small | settings,
    )


@pytest.mark.usefixtures("torch_threads")
def test_glossary_has_the_scalars_that_each_method_logs(logged):
    assert listed(*SCALARS) == logged[0]


@pytest.mark.usefixtures("torch_threads")
def test_glossary_has_the_pictures_that_each_method_logs(logged):
    assert listed("Pictures") == logged[1]


def test_glossary_has_the_films():
    one = {0: {0: [None]}}
    kinds = {
        arrange(seen, {0: "task"}, trials)[0]
        for seen, trials in ((one, True), (one, False), (one | {1: {0: [None]}}, False))
    }
    assert set(listed("Films")) == {f"videos/{kind}" for kind in kinds}


def own_tags(methods: set[str]) -> set[str]:
    """Tags, as the glossary writes them, whose row names one of the methods."""
    sections = (*SCALARS, "Pictures", "Only with Ray")
    whole = [row for heading in sections for row in rows(section(PAGE, heading))]
    return {tag for tag, *_, said in whole if methods & set(re.split(r",\s*", said))}


@pytest.mark.parametrize("page", PAGES)
def test_page_of_a_method_names_its_metrics(page):
    said = set(re.findall(r"`\w+/[\w<>]+`", section(read(f"docs/learners/{page}.md"), "Metrics")))
    allowed = own_tags(PAGES[page] | {"all", "replicas"})
    tables = "Every run", "Adaptation"
    optional = {row[0] for heading in tables for row in rows(section(PAGE, heading))}
    assert own_tags(PAGES[page]) - optional <= said <= allowed


def literals(path) -> set[str]:
    """The strings of a file that could be tags."""
    strings = (
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {text for text in strings if re.fullmatch(r"[a-z0-9]+/[a-z0-9_]*[a-z0-9]", text)}


def test_what_only_processes_side_by_side_log_is_in_the_source():
    for tag, _, _, source, methods in rows(section(PAGE, "Only with Ray")):
        assert tag[1:-1] in literals(ROOT / source[1:-1]), tag
        known = set(METHODS) | set(GROUPS)
        assert {word.strip() for word in methods.split(",")} <= known, tag


def test_no_tag_in_the_source_is_missing():
    known = set(listed(*SCALARS)) | set(listed("Pictures")) | set(listed("Only with Ray"))
    groups = {tag.split("/")[0] for tag in known}
    files = [*(ROOT / "learners").rglob("*.py"), *(ROOT / "system").glob("*.py")]
    found = set().union(*map(literals, files)) - set(PRESETS)
    found = {tag for tag in found if tag.split("/")[0] in groups}
    assert len(found) > 40
    assert found <= known


def test_sections_are_all_that_have_tables():
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    with_rows = {heading for heading in headings if rows(section(PAGE, heading))}
    assert with_rows == {*SCALARS, "Pictures", "Films", "Only with Ray"}

"""The pages under docs/: their commands can be given, their code runs, their files exist.

What takes long, as `train`, is only parsed. A block of Python whose first line is a comment with a
file's name is that file; the others run one after the other, beside these files.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from learners import registry
from learners.config import METHODS
from learners.core.errors import ConfigError
from system import arguments
from system.cli import main
from system.presets import PRESETS
from tests.pages import ROOT, blocks, commands, links, named_files, rows, section

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("docs", "docs/learners")
    for path in sorted((ROOT / folder).glob("*.md"))
}
PARSED = {
    "train": arguments.VisibleTrainArguments,
    "submit": arguments.VisibleSubmitArguments,
    **arguments.WITHOUT_PRESET,
}
"""Verbs that do too much to be run here, with what they take."""

pytestmark = pytest.mark.filterwarnings("ignore:.*ReinforceConfig.* does not match any type")
"""The example of a learner is registered at run time, and the page says so."""

PLACEHOLDER = re.compile(r"\b(PRESET|NAME|RUN|OPTION|VALUE|HEAD|HOST)\b|…|\|")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in whose modules can be imported; what pages register is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    tables: tuple[dict, ...] = (METHODS, registry.LEARNERS, PRESETS)
    before = [dict(table) for table in tables]
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def write_files(text: str, folder: Path) -> tuple[list[str], list[str]]:
    """Writes a page's files and imports them; returns their names, and the other blocks.

    Programs that take arguments are run by `tests/system/test_export_examples.py`.
    """
    names, others = [], []
    for block in blocks(text, "python"):
        found = re.match(r"# (\w+\.py)\n", block)
        if found:
            (folder / found[1]).write_text(block, encoding="utf-8")
            names.append(found[1])
        else:
            others.append(block)
    for name in names:
        if not takes_arguments(folder / name):
            importlib.import_module(Path(name).stem)
    return names, others


def takes_arguments(path: Path) -> bool:
    """Whether a program reads its command line itself."""
    return "sys.argv" in path.read_text(encoding="utf-8")


def faults(line: str, files: list[str]) -> list[str]:
    """Why a reader could not give a command; ConfigError where it names what does not exist."""
    program, *words = shlex.split(line, comments=True)
    if program == "python" and words[0] in files:
        if takes_arguments(Path(words[0])):
            return []
        program, words = "metaloop", words[1:]
    if program == "metaloop":
        return metaloop_faults(words)
    if program == "python":
        return [] if (ROOT / words[0]).exists() else [f"there is no {words[0]}"]
    return [f"{program} is a program that no page has had"]


def metaloop_faults(words: list[str]) -> list[str]:
    """`faults` of the words after metaloop: short ones are run, others parsed."""
    verb, *rest = words
    if verb in PARSED and not rest:
        return []  # only named
    if verb not in PARSED or "--help" in rest:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(words)
            except SystemExit as ended:
                status = ended.code
        return [f"ends with {status}"] if status else []
    if issubclass(PARSED[verb], arguments.TrainArguments):
        arguments.parse_config(rest, verb, PARSED[verb])
    else:
        arguments.parse(PARSED[verb], rest, verb)
    return []


def commands_in_text(text: str) -> list[str]:
    """Commands between backticks, but for those that only show a form."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = [line.replace("\n", " ") for line in re.findall(r"`(metaloop [^`]+)`", outside)]
    return [line for line in found if not PLACEHOLDER.search(line)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_given(page, folder):
    text = PAGES[page]
    files, _ = write_files(text, folder)
    for line in [*commands(text), *commands(text, "bash"), *commands_in_text(text)]:
        assert faults(line, files) == [], line


def refusal(line: str) -> str:
    """What is said of a command that cannot be given; nothing of one that can."""
    try:
        return "; ".join(faults(line, []))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    "line",
    [
        "metaloop train maml-trpo/navigation",
        "metaloop train maml-trpo/navigation-2d --inner-lrs 0.1",
        "metaloop train maml-trpo/navigation-2d --task.horizons 5",
        "metaloop show ppo/cartpole --clip 0.1",
        "metaloop evaluate runs/x --tasks 3",
        "metaloop lists",
        "python docs/results/no.py",
        "wget somewhere",
    ],
)
def test_wrong_command_is_found(line):
    assert refusal(line)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "python")])
def test_code_runs(page, folder):
    _, others = write_files(PAGES[page], folder)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in others:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    for link in links(PAGES[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for name in named_files(PAGES[page]):
        assert (ROOT / name).exists(), name


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page):
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGES[page]):
        target = (ROOT / page).parent / link if link else ROOT / page
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in map(slug, headings), (link, anchor)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known = set().union(*(arguments.flag_names(kind) for kind in PARSED.values()))
    for kind in METHODS.values():
        known |= arguments.flag_names(arguments.TrainArguments, kind)
    known |= {f"--no-{flag[2:]}" for flag in known} | {"--help"}
    spans = re.findall(r"`(--[^`]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    flags = {flag for span in spans for flag in re.findall(r"--[a-z][a-z-]*(?![\w.-])", span)}
    assert flags - {"--measure"} <= known


SHORT = ("--backend", "serial", "--iterations", "2", "--learner-threads", "1", "--eval-tasks", "4")


@pytest.mark.usefixtures("torch_threads")
def test_own_task_is_trained_on(folder, metaloop):
    files, _ = write_files(PAGES["docs/tasks.md"], folder)
    assert files == ["thermostat.py"]
    size = ("--num-members", "4", "--num-envs", "3", "--members-per-slot", "2")
    task = ("--task", "thermostat:Thermostat", "--task.leak", "0.2")
    status, out, err = metaloop("train", "maml-trpo/navigation-2d", *task, *SHORT, *size)
    assert status == 0, err
    assert "4 held-out tasks" in out


@pytest.mark.usefixtures("torch_threads")
def test_own_learner_learns_and_goes_on(folder, metaloop):
    write_files(PAGES["docs/new-learner.md"], folder)
    size = ("--num-members", "1", "--num-envs", "4", "--run-dir", "run")
    run = ("train", "reinforce/cartpole", *SHORT, *size)
    assert metaloop(*run)[0] == 0
    status, out, err = metaloop(*run, "--iterations", "20")
    assert status == 0, err
    assert "going on with run from iteration 2" in out
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    returns = [json.loads(line)["rollout/ep_rew_mean"] for line in lines]
    assert len(returns) == 20
    assert returns[-1] > 2 * returns[0]


def texts() -> list[str]:
    """All strings of the source, … where something is put in."""
    found = []
    for floor in ("learners", "actors", "system"):
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                values = [getattr(part, "value", "…") for part in parts]
                if isinstance(node, ast.JoinedStr | ast.Constant):
                    found.append("".join(v if isinstance(v, str) else "…" for v in values))
    return [re.sub(r"%[sd]|%\.1f", "…", text) for text in found]


def test_messages_are_those_of_the_source():
    page, known = PAGES["docs/troubleshooting.md"], texts()
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    said = [
        message
        for heading in headings
        for first, *_ in rows(section(page, heading))
        for message in re.findall(r"`([^`]+)`", first)
        if message.count(" ") > 2
    ]
    assert len(said) > 40
    for message in said:
        parts = [part for part in message.split("…") if part]
        pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
        assert any(pattern.search(text) for text in known), message

"""Every command and code block of the README, run from a folder of its own.

Training commands get flags that shorten them; nothing else is changed. `make train` and `make test`
are the commands that run these tests and their long form, so only their targets are checked. Blocks
of bash are for a cluster: `tests/cluster/test_jobs.py` runs their like, here their flags are
checked.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from system.cli import main
from tests.pages import ROOT, blocks, commands, links, named_files, program, read

README = read("README.md")
BIN = Path(sys.executable).parent
SHORT = [
    "--iterations",
    "2",
    "--num-members",
    "4",
    "--num-envs",
    "3",
    "--members-per-slot",
    "2",
    "--eval-tasks",
    "4",
]
TRIALS = ["--num-envs", "1", "--num-minibatches", "2"]
"""RL² collects one trial of each task."""
PORT = ["--port", "0", "--host", "127.0.0.1"]


def environment() -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


def run(words: list[str], folder: Path) -> str:
    """What a command prints; those of ours run in this process, which has imported all there is."""
    if words[0] == "metaloop":
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(said):
            assert main(words[1:]) == 0, words
        return said.getvalue()
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_known_commands() -> None:
    assert {line.split()[0] for line in commands(README)} == {"make", "metaloop", "tensorboard"}


@pytest.mark.parametrize("target", ["train", "test", ".venv"])
def test_make_target_exists(target: str) -> None:
    assert f"`make {target}`" in README or f"make {target}\n" in README
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("torch_threads", "no_cluster")
def test_metaloop_commands(tmp_path: Path) -> None:
    outputs = {}
    for line in commands(README):
        words = shlex.split(line)
        if words[0] == "metaloop":
            short = [*SHORT, *(TRIALS if "rl2/" in line else [])]
            outputs[line] = run(words + (short if words[1] == "train" else []), tmp_path)
    assert "maml-trpo/navigation-2d" in outputs["metaloop list"]
    evaluated = next(text for line, text in outputs.items() if line.endswith("--json"))
    assert json.loads(evaluated)["preset"] == "maml-trpo/navigation-2d"
    for name, of_run, said in (
        ("act.py", "ppo-cartpole-seed0", "return "),
        ("navigate.py", "maml-trpo-navigation-2d-seed0", "after 0 updates: return "),
    ):
        (tmp_path / name).write_text(program(README, name))
        words = [name, f"runs/{of_run}/export"]
        assert f"`python {' '.join(words)}`" in README
        assert run([sys.executable, *words], tmp_path).startswith(said)
    check_tensorboard(
        next(line for line in commands(README) if line.startswith("tensorboard")), tmp_path
    )


def check_tensorboard(line: str, folder: Path) -> None:
    words = [sys.executable, "-m", "tensorboard.main", *shlex.split(line)[1:], *PORT]
    log = folder / "tensorboard.log"
    with log.open("w") as out:
        server = subprocess.Popen(words, cwd=folder, env=environment(), stdout=out, stderr=out)
        try:
            address = None
            for _ in range(120):
                found = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
                if found:
                    address = found.group()
                    break
                time.sleep(0.5)
            assert address, log.read_text()
            tags: dict[str, object] = {}
            for _ in range(60):
                url = f"{address}data/plugin/scalars/tags"
                with urllib.request.urlopen(url, timeout=30) as answer:
                    tags = json.load(answer)
                if tags:
                    break
                time.sleep(0.5)
        finally:
            server.terminate()
            server.wait(30)
    of_run = {Path(name).parts[0]: set(found) for name, found in tags.items()}
    adapting = of_run["maml-trpo-navigation-2d-seed0"]
    assert {"adapt/gain", "adapt/ep_rew_mean_0", "eval/gain"} <= adapting
    assert {"rollout/ep_rew_mean", "eval/ep_rew_mean_0"} <= of_run["ppo-cartpole-seed0"]


def cluster_commands(name: str) -> list[list[str]]:
    """The commands of the blocks for a cluster that begin with `name`."""
    lines = [
        shlex.split(line, comments=True) for b in blocks(README, "bash") for line in b.splitlines()
    ]
    assert {words[0] for words in lines if words} == {"ray", "export", "ssh", "metaloop"}
    return [words for words in lines if words and words[0] == name]


def test_cluster_commands_have_the_flags_that_they_name() -> None:
    from ray.scripts.scripts import cli as ray_cli

    from system.arguments import VisibleSubmitArguments, parse_config

    for _, verb, *rest in cluster_commands("ray"):
        known = {option for param in ray_cli.commands[verb].params for option in param.opts}
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        assert flags
        assert set(flags) <= known, (verb, flags)
    ((_, verb, *arguments),) = cluster_commands("metaloop")
    assert verb == "submit"
    parsed = parse_config(arguments, "submit", VisibleSubmitArguments)
    assert isinstance(parsed, VisibleSubmitArguments)
    assert parsed.wait
    assert parsed.run_dir is not None
    assert Path(parsed.run_dir).is_absolute()


@pytest.mark.slow
def test_own_task_family(tmp_path: Path) -> None:
    (tmp_path / "poles.py").write_text(program(README, "poles.py"))
    command = "metaloop train maml-trpo/half-cheetah-dir --task poles:PoleMass"
    assert command in README.replace("\n", " ")
    # A process of its own: in this one other modules may have had that name.
    words = [sys.executable, "-m", "system.cli", *shlex.split(command)[1:]]
    out = run([*words, *SHORT, "--backend", "serial"], tmp_path)
    assert "4 held-out tasks" in out


def test_named_flags_exist() -> None:
    sys.path.insert(0, str(ROOT))
    from learners.config import METHODS
    from system.arguments import TrainArguments, flag_names

    rows = [line for line in README.splitlines() if line.startswith("| `--")]
    flags = {flag for row in rows for flag in re.findall(r"--[a-z-]+", row.split("|")[1])}
    known = set().union(*(flag_names(TrainArguments, kind) for kind in METHODS.values()))
    assert flags - {"--task"} <= known


def test_named_files_exist() -> None:
    for name in [*named_files(README), *links(README)]:
        assert (ROOT / name).exists(), name

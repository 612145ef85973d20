"""The commands of deploy/README.md: files, flags and names in them exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from deployment import (
    DEPLOY,
    ROOT,
    cluster_faults,
    documents,
    locked,
    metaloop_commands,
    parse,
    read,
)

from learners.core.errors import ConfigError

README = read("README.md")
NEEDS_CLUSTER = {"kubectl", "ray", "sbatch", "metaloop"}
"""Programs that do nothing without a cluster."""


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """(paragraph before it, lines) of each block of commands."""
    found = re.findall(r"((?:[^\n]+\n)+)\n```sh\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("```sh")
    return [(before, code.strip().splitlines()) for before, code in found]


def commands(text: str) -> list[list[str]]:
    """The words after `metaloop` of every command that starts a run."""
    lines = [line for _, lines in blocks(text) for line in lines]
    return [words for line in lines for words in metaloop_commands(line)]


def faults(text: str) -> list[str]:
    """Commands that a reader could not give."""
    found = [f"{words}: {fault}" for words in commands(text) for fault in cluster_faults(words)]
    for before, lines in blocks(text):
        used = {shlex.split(line, comments=True)[0] for line in lines}
        piped = {part.split()[0] for line in lines for part in line.split(" | ")[1:]}
        if (used | piped) & NEEDS_CLUSTER and "Needs a cluster" not in before:
            found.append(f"not said to need a cluster: {lines[0]}")
    return found


def test_commands():
    assert faults(README) == []
    verbs = {words[0] for words in commands(README)}
    assert verbs == {"train", "submit"}
    assert len(commands(README)) >= 6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" --address auto", ""),
        ("--run-dir /runs/navigation-2d", ""),
        ("Needs a cluster.", "Go on."),
    ],
)
def test_fault_is_found(old, new):
    assert old in README
    assert faults(README.replace(old, new)) != []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--num-actors 4", "--num-actor 4"),
        ("metaloop train maml-trpo/navigation-2d", "metaloop train maml-trpo/navigation"),
        ("metaloop.sbatch maml-trpo/half-cheetah-dir", "metaloop.sbatch half-cheetah"),
        ("metaloop submit maml-trpo/half-cheetah-dir", "metaloop submit maml-trpo/cheetah"),
    ],
)
def test_wrong_command_is_found(old, new):
    assert old in README
    with pytest.raises(ConfigError, match="closest"):
        faults(README.replace(old, new))


@pytest.mark.skipif(
    '"submit"' not in (ROOT / "system" / "cli.py").read_text(encoding="utf-8"),
    reason="there is no verb submit yet",
)
def test_submit_has_its_flags(command_line):
    status, out, err = command_line.run("submit", "maml-trpo/navigation-2d", "--help")
    assert status == 0, err
    for flag in ("--address", "--run-dir", "--num-actors"):
        assert flag in out


def test_named_files_exist():
    named = set(re.findall(r"(?:-f |patch-file |\| `|in `|see `)?((?:deploy/)[\w./-]+)", README))
    assert named
    for name in named:
        assert (ROOT / name.rstrip(".")).exists(), name
    for name in re.findall(r"\| `([\w./-]+)` \|", README):
        assert (DEPLOY / name).exists(), name
    (braces,) = re.findall(r"deploy/kubernetes/\{([\w,-]+)\}\.yaml", README)
    every = {path.stem for path in (DEPLOY / "kubernetes").iterdir()}
    assert set(braces.split(",")) | {"ray-job", "learner-gpu"} == every


def test_secret_and_services_of_the_cluster():
    (cluster,) = documents(read("kubernetes/ray-cluster.yaml"))
    secret = cluster["spec"]["authOptions"]["secretName"]
    assert f"kubectl create secret generic {secret} --from-file=auth_token=" in README
    assert f"service/{cluster['metadata']['name']}-head-svc 8265:8265" in README
    service = documents(read("kubernetes/tensorboard.yaml"))[1]
    port = service["spec"]["ports"][0]["port"]
    assert f"service/{service['metadata']['name']} {port}:{port}" in README
    (job,) = documents(read("kubernetes/ray-job.yaml"))
    assert f"job-name={job['metadata']['name']}\n" in README


def test_no_secret_is_in_any_file():
    for path in DEPLOY.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"kind: Secret|RAY_AUTH_TOKEN\b|[0-9a-f]{32}", text), path


def actors_of(folder: str) -> int:
    (words,) = [w for w in commands(README) if folder in w and "--num-actors" in w]
    return parse(words).config.runtime.num_actors


def test_no_more_actors_than_cpus():
    assert actors_of("/runs/navigation-2d") == 2 * 2  # compose.yaml: two workers, two CPUs each
    types = documents(read("ray-up/aws.yaml"))[0]["available_node_types"]
    cpus = types["actor"]["min_workers"] * types["actor"]["resources"]["CPU"]
    aws = next(line for line in README.splitlines() if "ray-up/aws.yaml 'RAY" in line)
    (words,) = metaloop_commands(aws)
    assert parse(words).config.runtime.num_actors == cpus


def test_dockerfile_arguments():
    known = set(re.findall(r"^ARG (\w+)", read("Dockerfile"), re.MULTILINE))
    given = set(re.findall(r"--build-arg (\w+)", README))
    assert given == known
    assert set(re.findall(r"TORCH=(\w+)", README)) == {"cpu", "cuda"}
    variables = set(re.findall(r"\$\{(\w+)[:}]", read("compose.yaml")))
    assert all(name in README for name in variables)


def test_ray_is_new_enough_for_the_token():
    assert tuple(map(int, locked("ray").split(".")[:2])) >= (2, 54)
    assert Path(DEPLOY / "README.md").is_file()

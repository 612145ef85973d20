"""The image: read instruction by instruction; it is not built here."""

from __future__ import annotations

import fnmatch
import re

import pytest
from deployment import ROOT, read

DOCKERFILE = read("Dockerfile")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, without comments and with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest) for name, rest in pairs]


def faults(text: str) -> list[str]:
    """What the image must not do, and does."""
    steps = instructions(text)
    found = []
    if steps[0] != ("FROM", "python:3.11-slim"):
        found.append("another base")
    users = [(place, rest) for place, (name, rest) in enumerate(steps) if name == "USER"]
    last_run = max(place for place, (name, _) in enumerate(steps) if name == "RUN")
    if len(users) != 1 or users[0][1] in ("root", "0") or users[0][0] < last_run:
        found.append("the user who runs is root, or was set before the last installation")
    found += [f"ADD {rest}" for name, rest in steps if name == "ADD"]
    found += [
        f"{name} {rest}"
        for name, rest in steps
        if name in ("ENV", "ARG") and re.search(r"TOKEN|SECRET|PASSWORD", rest)
    ]
    environment = " ".join(rest for name, rest in steps if name == "ENV")
    if "RAY_AUTH_MODE=token" not in environment.split():
        found.append("Ray may start without a token")
    runs = " ".join(rest for name, rest in steps if name == "RUN")
    installs = re.findall(r"pip install [^;&|]*", runs)
    found += [f"not locked: {line}" for line in installs if "-c constraints.txt" not in line]
    if not any("'.[atari]'" in line for line in installs):
        found.append("the project is not installed")
    return found + torch_faults(steps, runs)


def torch_faults(steps: list[tuple[str, str]], runs: str) -> list[str]:
    """What is wrong with the two kinds of torch."""
    found = []
    if ("ARG", "TORCH=cpu") not in steps:
        found.append("TORCH is no argument")
    branches = dict(re.findall(r"(\S+)\) (.*?);;", runs))
    if branches.keys() != {"cpu", "cuda", "*"}:
        return [*found, f"TORCH may be {sorted(branches)}"]
    if '--index-url "${TORCH_INDEX:?' not in branches["cpu"]:
        found.append("cpu takes another torch")
    if "index-url" in branches["cuda"] or " torch" not in branches["cuda"]:
        found.append("cuda takes another torch")
    if "exit 1" not in branches["*"]:
        found.append("another TORCH is let through")
    return found


def test_dockerfile():
    assert faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER metaloop", "USER root"),
        ("USER metaloop\n", ""),
        ("WORKDIR /opt", "USER metaloop\nWORKDIR /opt"),
        ("COPY learners", "ADD https://example.com/x.tar /x\nCOPY learners"),
        ("ENV RAY_AUTH_MODE=token", "ENV RAY_AUTH_TOKEN=abc RAY_AUTH_MODE=token"),
        ("ENV RAY_AUTH_MODE=token", "ENV RAY_AUTH_MODE=disabled"),
        ("ARG TORCH=cpu", "ARG TORCH=cpu\nARG RAY_AUTH_TOKEN"),
        ("        cuda) python", "        gpu) python"),
        ('--index-url "${TORCH_INDEX:?give --build-arg TORCH_INDEX}"', ""),
        ("exit 1", "true"),
        ("-c constraints.txt '.[atari]'", "'.[atari]'"),
    ],
)
def test_fault_is_found(old, new):
    assert old in DOCKERFILE
    assert faults(DOCKERFILE.replace(old, new)) != []


def test_copied_files_exist_and_are_not_ignored():
    ignored = [line for line in read("Dockerfile.dockerignore").splitlines() if line[:1] != "#"]
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = [rest.split()[:-1] for name, rest in instructions(DOCKERFILE) if name == "COPY"]
    names = [name for group in copied for name in group]
    assert set(names) == kept
    for name in names:
        assert list(ROOT.glob(name)), name
    for secret in (".git", "runs", ".venv", "auth_token", "deploy/compose.yaml"):
        assert not any(fnmatch.fnmatch(secret, pattern) for pattern in kept), secret


def test_every_package_is_copied():
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert listed
    tops = {name.split(".")[0] for name in re.findall(r'"(.*?)"', listed.group(1))}
    copied = " ".join(rest for name, rest in instructions(DOCKERFILE) if name == "COPY")
    assert all(re.search(rf"\b{top}\b", copied) for top in tops)

"""What the tests of the deployment files share: reading them, and the parsers of their commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from ray.scripts.scripts import start

from system.arguments import TrainArguments, parse_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ROLES = {"head", "learner", "actor"}
"""Values of the label `metaloop.role`."""


def read(name: str) -> str:
    """The text of a file below deploy/."""
    return (DEPLOY / name).read_text(encoding="utf-8")


def documents(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def locked(name: str) -> str:
    """The version of a distribution in constraints.txt."""
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, name
    return found.group(1)


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """The JSON schema of an object with these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | optional,
        "additionalProperties": False,
    }


def listed(items: Any, least: int = 1) -> dict[str, Any]:
    """The JSON schema of a list."""
    return {"type": "array", "items": items, "minItems": least}


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
COUNT = {"type": "integer", "minimum": 1}


def schema_faults(value: Any, schema: Any) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in found]


def ray_start(words: list[str]) -> dict[str, Any]:
    """The options of `ray start WORDS` as Ray reads them; nothing starts.

    Raises:
        click.ClickException: Ray has no such option.
    """
    return dict(start.make_context("start", list(words)).params)


def labels_of(words: list[str]) -> dict[str, str]:
    """The labels of the node that `ray start WORDS` makes."""
    text = ray_start(words)["labels"]
    return dict(pair.split("=") for pair in text.split(",")) if text else {}


def metaloop_commands(line: str) -> Iterator[list[str]]:
    """The words after `metaloop` in a shell line, also where it stands in quotes or in a path.

    What is given to metaloop.sbatch comes back as the training command that this starts.
    """
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        if " " in word and "metaloop" in word:
            yield from metaloop_commands(word)
        elif word.endswith("/metaloop.sbatch"):
            yield ["train", *words[place + 1 :], "--address", "auto"]
            return
        elif Path(word).name == "metaloop" and words[place + 1 :][:1] in (["train"], ["submit"]):
            yield words[place + 1 :]
            return


def parse(words: list[str]) -> TrainArguments:
    """The flags of `metaloop train` or `submit`, by the real parser.

    Raises:
        ConfigError: no such preset or flag.
    """
    verb, *rest = words
    return parse_config([word for word in rest if word != "--wait"], verb)


def cluster_faults(words: list[str]) -> list[str]:
    """What keeps a command from being one for a cluster."""
    parsed = parse(words)
    runtime = parsed.config.runtime
    found = []
    if runtime.address is None:
        found.append("no --address: it would start a cluster of its own")
    if runtime.backend != "ray":
        found.append("not on Ray")
    if parsed.run_dir is None or not str(parsed.run_dir).startswith(("/", "$HOME")):
        found.append("no --run-dir on shared storage")
    return found

"""A file of weights and the JSON that describes it: what everything that leaves a run is made of.

Nothing is unpickled, and nothing is used before the description, the file's hash, its entries and
their shapes are found to agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from learners.core.contract import check_params
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.trajectory import Params
from system.config import RunConfig
from system.loop import Counters


def save(params: Params, path: Path) -> str:
    """Writes weights; returns the file's SHA-256, in hex."""
    own = {n: p.clone(memory_format=torch.contiguous_format) for n, p in params.items()}
    content = safetensors.torch.save(own)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def origin(config: RunConfig, counters: Counters) -> dict[str, Any]:
    """The run that weights come from, and how far it was."""
    return {
        "preset": config.preset,
        "task": config.task,
        "task_options": dict(config.task_options),
        "seed": config.seed,
        "iterations": counters.iteration,
        "env_steps": counters.env_steps,
    }


def read_description(path: Path, kind: str, version: int, fields: Iterable[str]) -> dict[str, Any]:
    """What a JSON file says.

    Args:
        path: the file.
        kind: of thing that it describes.
        version: the format that is understood.
        fields: what it must tell beside its format.

    Raises:
        ConfigError: there is none, it cannot be read, is of another format, or lacks a field.
    """
    try:
        said = json.loads(path.read_text())
    except OSError:
        raise ConfigError(
            f"{path.parent} holds no {kind}: it has no {path.name}. `metaloop export RUN` writes "
            "one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} is not of format {version}: it is no object")
    missing = [name for name in ("format", *fields) if name not in said]
    if missing or said["format"] != version:
        raise ConfigError(
            f"{path} is not of format {version}"
            + (f": it lacks {', '.join(missing)}" if missing else f" but {said['format']!r}")
        )
    return said


def load(path: Path, sha256: object, like: Mapping[str, torch.Tensor], described_by: str) -> Params:
    """The weights of a file.

    Args:
        path: the file.
        sha256: what its hash must be.
        like: entries with the wanted names, shapes and types, on any device.
        described_by: the name of the file that says so.

    Raises:
        ConfigError: they are missing, changed, other than described, or not finite.
    """
    try:
        content = path.read_bytes()
    except OSError:
        raise ConfigError(f"{path.parent} has no {path.name}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{path} is not the file that {described_by} describes: hashes differ")
    try:
        params: Params = safetensors.torch.load(content)
        check_params(params, path.name)
    except (SafetensorError, NonFiniteError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    if kinds(params) != kinds(like):
        raise ConfigError(
            f"{path} has entries or shapes that {described_by} does not describe: "
            + differing(params, like)
        )
    return params


def kinds(params: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type by name."""
    return {name: (p.shape, p.dtype) for name, p in params.items()}


def differing(found: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> str:
    """The first entry that is not as wanted, and how."""

    def told(params: Mapping[str, torch.Tensor], name: str) -> str:
        return f"{list(params[name].shape)} {params[name].dtype}" if name in params else "none"

    name = next(n for n in sorted({*found, *like}) if kinds(found).get(n) != kinds(like).get(n))
    return f"{name} is {told(found, name)}, not {told(like, name)}"

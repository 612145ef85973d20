"""Checkpoints: folders that are complete or refused, and never unpickled.

    <folder>/<step>/state.safetensors   every tensor by name
                    info.json           everything that is not a tensor
                    manifest.json       format version, size and SHA-256 of the other two

A checkpoint is written to `<step>.tmp` beside its place, each file fsynced, the manifest last; then
the folder is renamed and its parent fsynced. A folder of runs has one writer at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT = 1
STATE, INFO, MANIFEST = "state.safetensors", "info.json", "manifest.json"
TEMPORARY, REPLACED = ".tmp", ".replaced"

Info: TypeAlias = dict[str, Any]
"""What JSON can hold, by name."""

Tree: TypeAlias = Mapping[str, "Tensor | Tree"]
"""Tensors in nested dictionaries."""


class CorruptCheckpoint(RuntimeError):
    """A checkpoint that cannot be trusted, or a folder in which none can.

    Attributes:
        path: the folder concerned.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type[CorruptCheckpoint], tuple[Path, str]]:
        return (CorruptCheckpoint, (self.path, self.reason))


@dataclass(frozen=True)
class Loaded:
    """The newest checkpoint that verifies.

    Attributes:
        step: the number it was saved under.
        tensors: every tensor by name, on the CPU.
        info: what was saved beside them.
        refused: newer checkpoints that do not verify, newest first, and why.
    """

    step: int
    tensors: dict[str, Tensor]
    info: Info
    refused: list[tuple[Path, str]]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Info,
    keep: int = 3,
    keep_also: Collection[int] = (),
) -> Path:
    """Writes `folder/<step>` and returns its path.

    At every moment of the call, an interrupted one included, `load_newest` finds either the
    checkpoints of before or the new one. A checkpoint of the same step is replaced.

    Args:
        folder: holds all checkpoints of a run; made where missing.
        step: which iteration the state belongs to, at least 0.
        tensors: the state, on any device.
        info: whatever else must be remembered, as JSON.
        keep: how many checkpoints up to and including `step` stay, at least 1. Later ones, which
            exist where a refused checkpoint was passed over, are left alone.
        keep_also: steps that stay in any case, such as the best.

    Raises:
        ValueError: a tensor holds NaN or infinity, `info` is not JSON, or `keep` or `step` is out
            of range; nothing was written.
        OSError: the disk refused; the earlier checkpoints are untouched.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} must be at least 0 and keep {keep} at least 1")
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    contents = {
        STATE: safetensors.torch.save({k: _own_copy(v) for k, v in tensors.items()}),
        INFO: json.dumps(info, allow_nan=False).encode(),
    }
    contents[MANIFEST] = _manifest(contents)

    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    target = folder / f"{step:08d}"
    temporary = _with(target, TEMPORARY)
    temporary.mkdir()
    for file, content in contents.items():
        _write(temporary / file, content)
    _fsync_folder(temporary)
    _put_in_place(temporary, target)
    for old in _beyond_keep(folder, step, keep, keep_also):
        _remove(old)
    return target


def load(path: Path) -> tuple[dict[str, Tensor], Info]:
    """Reads one checkpoint folder: tensors on the CPU, and the JSON beside them.

    Sizes and hashes are checked first, on the very bytes that are then read.

    Raises:
        CorruptCheckpoint: a file is missing, unreadable, of another size or hash than its manifest
            says, or the format version is unknown.
    """
    expected = _read_manifest(path)
    contents = {file: _read(path / file) for file in (STATE, INFO)}
    for file, content in contents.items():
        size, digest = expected[file]
        if len(content) != size:
            raise CorruptCheckpoint(path, f"{file} has {len(content)} bytes instead of {size}")
        if hashlib.sha256(content).hexdigest() != digest:
            raise CorruptCheckpoint(path, f"the SHA-256 of {file} is not that of its manifest")
    try:
        tensors = safetensors.torch.load(contents[STATE])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptCheckpoint(path, f"{STATE} is not a safetensors file: {error}") from error
    return dict(sorted(tensors.items())), _parse(path / INFO, contents[INFO])


def newest_step(folder: Path) -> int | None:
    """The newest checkpoint's step, whether it verifies or not; None where there is none."""
    return max((step for step, _ in _checkpoints(folder)), default=None)


def load_newest(folder: Path) -> Loaded | None:
    """Reads the newest checkpoint of `folder` that verifies; None where there is none at all.

    Raises:
        CorruptCheckpoint: there are checkpoints, and every one is refused.
    """
    refused: list[tuple[Path, str]] = []
    for step, path in reversed(_checkpoints(folder)):
        try:
            tensors, info = load(path)
        except CorruptCheckpoint as error:
            refused.append((path, error.reason))
        else:
            return Loaded(step, tensors, info, refused)
    if not refused:
        return None
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in refused)
    raise CorruptCheckpoint(
        folder,
        f"no checkpoint of {len(refused)} can be used ({reasons}). "
        "Restore one from a copy, or move the folder away to begin anew",
    )


def flatten(tree: Tree) -> dict[str, Tensor]:
    """Nested dictionaries of tensors as one, names joined by "/"; empty dictionaries vanish.

    Raises:
        ValueError: a name holds "/".
    """
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        if "/" in name:
            raise ValueError(f"the name {name!r} holds '/', which separates levels")
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            flat |= {f"{name}/{inner}": tensor for inner, tensor in flatten(value).items()}
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested dictionaries that `flatten` made `flat` of."""
    tree: dict[str, Any] = {}
    for name, tensor in flat.items():
        *path, leaf = name.split("/")
        level = tree
        for part in path:
            level = level.setdefault(part, {})
        level[leaf] = tensor
    return tree


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError where a floating or complex tensor holds NaN or infinity."""
    if tensor.is_floating_point() or tensor.is_complex():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(
                f"checkpoint not written: {bad} of {tensor.numel()} values of {name!r} "
                "are NaN or infinite"
            )


def _own_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, since safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _manifest(contents: Mapping[str, bytes]) -> bytes:
    files = {
        file: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in contents.items()
    }
    return json.dumps({"format": FORMAT, "files": files}).encode()


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of each file that a checkpoint must have."""
    manifest = _parse(path / MANIFEST, _read(path / MANIFEST))
    version = manifest.get("format")
    if version != FORMAT:
        raise CorruptCheckpoint(path, f"format version {version!r} is unknown, {FORMAT} is read")
    try:
        files = manifest["files"]
        return {file: (files[file]["bytes"], files[file]["sha256"]) for file in (STATE, INFO)}
    except (KeyError, TypeError) as error:
        raise CorruptCheckpoint(path, f"{MANIFEST} does not describe {STATE} and {INFO}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise CorruptCheckpoint(file.parent, f"{file.name} is missing") from error
    except OSError as error:
        raise CorruptCheckpoint(file.parent, f"{file.name} is unreadable: {error}") from error


def _parse(file: Path, content: bytes) -> Info:
    """The JSON object that `content` spells."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(file.parent, f"{file.name} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CorruptCheckpoint(file.parent, f"{file.name} is not a JSON object")
    return parsed


def _write(file: Path, content: bytes) -> None:
    with open(file, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames; a folder already there steps aside under a name that `load_newest` also reads."""
    replaced = _with(target, REPLACED)
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    _fsync_folder(target.parent)
    if replaced.exists():
        _remove(replaced)


def _tidy(folder: Path) -> None:
    """Removes what an interrupted `save` left, and takes back what it had set aside."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        shutil.rmtree(leftover)
    for replaced in folder.glob(f"*{REPLACED}"):
        target = replaced.with_suffix("")
        if target.exists():
            _remove(replaced)
        else:
            os.rename(replaced, target)


def _remove(path: Path) -> None:
    """Deletes a checkpoint; cut short, it leaves a temporary folder rather than half of one."""
    doomed = _with(path, TEMPORARY)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders, oldest first; one set aside comes before the one that replaces it."""
    if not folder.is_dir():
        return []
    name = re.compile(rf"(\d{{8,}})({re.escape(REPLACED)})?")
    matches = [(name.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [(int(match[1]), match[2] is None, path) for match, path in matches if match]
    return [(step, path) for step, _, path in sorted(found)]


def _beyond_keep(folder: Path, step: int, keep: int, keep_also: Collection[int]) -> list[Path]:
    """Checkpoints up to `step` that are neither among the newest `keep` nor in `keep_also`."""
    past = [(at, path) for at, path in _checkpoints(folder) if at <= step]
    return [path for at, path in past[:-keep] if at not in keep_also]

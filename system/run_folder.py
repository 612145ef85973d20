"""A run's folder: what was asked for, by which versions, and how far it came."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learners.core.errors import ConfigError
from system import checkpoint
from system.config import RunConfig, differences, from_dict, to_dict
from system.loop import Counters
from system.records import CONFIG, META

CHECKPOINTS = "checkpoints"
LOCK = "lock"
"""A file that the process which trains in a folder holds locked; that of nobody is left over."""
PACKAGES = ("metaloop", "ray", "torch", "gymnasium", "mujoco", "numpy", "safetensors")


def default_folder(config: RunConfig) -> Path:
    """runs/<preset>-seed<n>, without slashes in the preset's name."""
    return Path("runs") / f"{config.preset.replace('/', '-')}-seed{config.seed}"


@contextmanager
def opened(folder: Path, config: RunConfig, device: str) -> Iterator[None]:
    """Makes the folder of a new run, or checks that it belongs to this one; ours inside the block.

    Raises:
        ConfigError: the folder holds a run with another configuration, is no run's folder, cannot
            be written to, or another process trains in it.
    """
    if (folder / CONFIG).exists():
        changed = differences(read_config(folder), config)
        if changed:
            lines = "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, old, new in changed)
            raise ConfigError(
                f"{folder} holds a run with another configuration:\n{lines}\nNothing was changed. "
                f"Give another --run-dir, or the same settings to go on with that run."
            )
    elif folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; give another --run-dir")
    check_writable(folder)
    with locked(folder):
        write_json(folder / CONFIG, to_dict(config))
        write_json(folder / META, describe_process(config, device))
        yield


def check_writable(folder: Path) -> None:
    """Makes a folder where it is missing.

    Raises:
        ConfigError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).open("a").close()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to ({error.strerror}); give another --run-dir"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder; the lock goes with the process.

    Raises:
        ConfigError: another process has it.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: a run has one "
                "process. Wait for its end, or give another --run-dir"
            ) from None
        except OSError as error:
            logging.getLogger("metaloop").warning(
                "%s cannot be locked (%s): see to it that no other process trains in it",
                *(folder, error),
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    try:
        return from_dict(json.loads((folder / CONFIG).read_text()))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not a run's folder: it has no {CONFIG}. Runs lie under runs/ unless "
            f"--run-dir said otherwise"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read: {error}") from error


def describe_process(config: RunConfig, device: str) -> dict[str, Any]:
    """Versions, command line, code state and machine."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "git": git_state(),
        "seed": config.seed,
        "task": config.task,
        "device": device,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
    }


def version(package: str) -> str | None:
    """A package's installed version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """The commit that the code is at, and whether it was changed since."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is never seen half-written."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


# --- Checkpoints ---


LOOP = "loop."
"""Begins the names of the groups that are the loop's and not the learner's."""


def save(
    folder: Path,
    state: Any,
    loop_state: Mapping[str, Mapping[str, np.ndarray]],
    counters: Counters,
    keep: int,
) -> Path:
    """Writes a checkpoint of a learner's state, of the loop's, and of the counters."""
    groups = dict(state)
    for group, arrays in loop_state.items():
        groups[LOOP + group] = {n: torch.from_numpy(np.array(a)) for n, a in arrays.items()}
    return checkpoint.save(
        folder / CHECKPOINTS,
        counters.iteration,
        checkpoint.flatten(groups),
        {"counters": vars(counters)},
        keep=keep,
    )


def pop_loop_state(state: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Takes the loop's groups out of a restored state."""
    names = [name for name in state if name.startswith(LOOP)]
    return {
        name.removeprefix(LOOP): {n: tensor.numpy() for n, tensor in state.pop(name).items()}
        for name in names
    }


def restore(folder: Path) -> tuple[Any, Counters, list[str]] | None:
    """The newest good checkpoint: state, counters, and what is to be said of refused ones.

    Raises:
        CorruptCheckpoint: there are checkpoints and none can be used.
    """
    loaded = checkpoint.load_newest(folder / CHECKPOINTS)
    if loaded is None:
        return None
    said = [
        f"checkpoint {path.name} is refused ({reason}); going on from {loaded.step:08d}"
        for path, reason in loaded.refused
    ]
    return checkpoint.unflatten(loaded.tensors), Counters(**loaded.info["counters"]), said


def restore_newest(folder: Path) -> tuple[Any, Counters, list[str]]:
    """`restore` where there must be a checkpoint.

    Raises:
        ConfigError: there is none.
        CorruptCheckpoint: there are checkpoints and none can be used.
    """
    restored = restore(folder)
    if restored is None:
        raise ConfigError(f"{folder} has no checkpoint yet")
    return restored

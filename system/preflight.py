"""The last check of a submitted run, made by the cluster's own Python before anything else.

    python -m system.preflight --python 3.11 --ray 2.60.0 --metaloop 0.1.0 && …

Only the standard library, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

NEEDED = (
    *("fsspec", "gymnasium", "imageio", "matplotlib", "mujoco", "numpy", "psutil", "ray", "rich"),
    *("safetensors", "tensorboard", "torch", "tyro"),
)
"""Modules that a run imports."""


def complaints(python: str, ray: str, metaloop: str | None) -> list[str]:
    """What keeps this Python from running what was submitted; each says what to do.

    Args:
        python: major.minor of the machine that submitted.
        ray: its version of Ray.
        metaloop: its version of metaloop, or None where it runs from source.
    """
    found = f"{sys.version_info.major}.{sys.version_info.minor}"
    said = []
    if found != python:
        said.append(f"Python {found} here, {python} where the job was submitted")
    for name, wanted in (("ray", ray), ("metaloop", metaloop)):
        here = installed(name)
        # The code of metaloop comes with the job: a cluster need not have it.
        if here is not None and wanted is not None and here != wanted:
            said.append(f"{name} {here} here, {wanted} where the job was submitted")
    if said:
        said.append("use the same versions on every node and on the machine that submits")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        said.append(
            f"the cluster's Python ({sys.executable}) lacks {', '.join(missing)}: install "
            "metaloop's dependencies on every node"
        )
    return said


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the run can start; otherwise says why not."""
    parser = argparse.ArgumentParser(prog="system.preflight")
    parser.add_argument("--python", required=True)
    parser.add_argument("--ray", required=True)
    parser.add_argument("--metaloop")
    said = complaints(**vars(parser.parse_args(arguments)))
    for line in said:
        print(f"metaloop: {line}", file=sys.stderr)
    return 2 if said else 0


if __name__ == "__main__":
    sys.exit(main())

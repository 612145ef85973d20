"""The state of a NumPy generator as an array, so that it is saved like the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_RNG_FIELDS = (("state", 16), ("inc", 16), ("has_uint32", 1), ("uinteger", 4))
"""The numbers in PCG64's state and their lengths in bytes."""


def generator_bytes(rng: np.random.Generator) -> np.ndarray:
    """The state of a PCG64 generator, uint8."""
    state: Mapping[str, Any] = rng.bit_generator.state
    numbers = {**state, **state["state"]}
    parts = (int(numbers[name]).to_bytes(size, "little") for name, size in _RNG_FIELDS)
    return np.frombuffer(b"".join(parts), np.uint8).copy()


def generator_from_bytes(packed: np.ndarray) -> np.random.Generator:
    """The generator whose state `generator_bytes` packed."""
    ends = np.cumsum([size for _, size in _RNG_FIELDS])[:-1]
    numbers = {
        name: int.from_bytes(part.tobytes(), "little")
        for (name, _), part in zip(_RNG_FIELDS, np.split(packed, ends), strict=True)
    }
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": numbers["state"], "inc": numbers["inc"]},
        "has_uint32": numbers["has_uint32"],
        "uinteger": numbers["uinteger"],
    }
    return np.random.Generator(bits)

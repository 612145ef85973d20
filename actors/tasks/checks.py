"""Checks of what a user gives: option values of a family, tasks at a reset."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.family import Task
from learners.core.trajectory import Spec


def check_whole(family: object, name: str, lowest: int) -> None:
    """Raises ValueError unless option `name` of `family` is a whole number ≥ `lowest`."""
    value = getattr(family, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(
            f"{type(family).__name__}: {name} must be a whole number of at least {lowest}, "
            f"not {value!r}"
        )


def check_number(family: object, name: str, lowest: float, exclusive: bool = False) -> None:
    """Raises ValueError unless option `name` of `family` is finite and ≥ (or >) `lowest`."""
    value = getattr(family, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    in_range = is_number and (value > lowest if exclusive else value >= lowest)
    if not in_range or not math.isfinite(value):
        bound = f"above {lowest}" if exclusive else f"of at least {lowest}"
        raise ValueError(
            f"{type(family).__name__}: {name} must be a finite number {bound}, not {value!r}"
        )


def check_flag(family: object, name: str) -> None:
    """Raises ValueError unless option `name` of `family` is True or False."""
    value = getattr(family, name)
    if not isinstance(value, bool):
        raise ValueError(f"{type(family).__name__}: {name} must be True or False, not {value!r}")


def tasks_at_reset(options: Mapping[str, Any] | None, num_envs: int) -> list[Task] | None:
    """The list of `num_envs` tasks in a reset's options; None where there is none.

    Raises:
        ValueError: the list has another length.
    """
    if options is None or "tasks" not in options:
        return None
    tasks = list(options["tasks"])
    if len(tasks) != num_envs:
        raise ValueError(
            f"reset needs one task per environment: {num_envs} environments, {len(tasks)} tasks"
        )
    return tasks


def mask_at_reset(
    options: Mapping[str, Any] | None, num_envs: int, with_tasks: bool = False
) -> NDArray[np.bool_] | None:
    """The `reset_mask` in a reset's options, [num_envs] bool; None where there is none.

    Args:
        options: of the reset.
        num_envs: number of environments.
        with_tasks: whether a partial reset may change tasks.

    Raises:
        ValueError: it has another shape or type, or comes with tasks where they cannot change.
    """
    if options is None or "reset_mask" not in options:
        return None
    if "tasks" in options and not with_tasks:
        raise ValueError("reset takes reset_mask or tasks, not both: a partial reset keeps tasks")
    mask = np.asarray(options["reset_mask"])
    if mask.shape != (num_envs,) or mask.dtype != np.bool_:
        raise ValueError(
            f"reset_mask must be bool of shape {(num_envs,)}, not {mask.dtype} of {mask.shape}"
        )
    return mask


Field = tuple[str, tuple[int, ...], tuple[np.dtype[Any], ...]]
"""What an environment returns: its name, its shape, and the types that it may have."""


def step_fields(spec: Spec, num_envs: int) -> tuple[Field, Field, Field, Field]:
    """Observation, reward, terminated and truncated as a step must return them."""
    obs = np.uint8 if spec.image is not None else np.int64 if spec.worlds else np.float32
    real, flags = ("f4", "f8", "i8"), (np.dtype(bool),)
    return (
        ("observations", (num_envs, spec.obs_size), (np.dtype(obs),)),
        ("rewards", (num_envs,), tuple(map(np.dtype, real))),
        ("terminated", (num_envs,), flags),
        ("truncated", (num_envs,), flags),
    )


def check_returned(
    env: object, method: str, fields: Sequence[Field], arrays: Sequence[np.ndarray]
) -> None:
    """Raises ValueError unless `arrays` are what `method` of `env` must return.

    Takes a microsecond, so that every step can be checked.
    """
    if len(arrays) != len(fields):
        raise ValueError(
            f"{type(env).__name__}.{method} returned {len(arrays) + 1} values, expected are "
            f"{', '.join(name for name, _, _ in fields)} and a dict"
        )
    for (name, shape, types), array in zip(fields, arrays, strict=True):
        if array.shape != shape or array.dtype not in types:
            raise ValueError(
                f"{type(env).__name__}.{method} returned {name} of type {array.dtype} and shape "
                f"{list(array.shape)}, expected {types[0]} and {list(shape)}"
            )


def task_array(tasks: Sequence[Task], name: str, size: int) -> np.ndarray:
    """Entry `name` of every task, [len(tasks), size] float64.

    Raises:
        ValueError: a task lacks the entry, or it is not `size` finite numbers.
    """
    rows = np.empty((len(tasks), size))
    for index, task in enumerate(tasks):
        if name not in task:
            raise ValueError(f"task {index} has no {name!r}: {dict(task)}")
        value = np.asarray(task[name], dtype=np.float64).reshape(-1)
        if value.shape != (size,) or not np.isfinite(value).all():
            raise ValueError(
                f"task {index}: {name!r} must be {size} finite number(s), not {task[name]!r}"
            )
        rows[index] = value
    return rows


def task_whole(tasks: Sequence[Task], name: str, allowed: Container[int]) -> NDArray[np.int64]:
    """Entry `name` of every task, a whole number among the `allowed` ones, [len(tasks)] int64.

    Raises:
        ValueError: a task lacks the entry, or it is another number.
    """
    values = task_array(tasks, name, 1)[:, 0]
    for index, value in enumerate(values.tolist()):
        if not value.is_integer() or int(value) not in allowed:
            raise ValueError(f"task {index}: {name!r} must be in {allowed}, not {value!r}")
    return values.astype(np.int64)


def matching_shape(state: Mapping[str, np.ndarray], name: str, shape: Sequence[int]) -> np.ndarray:
    """Array `name` of a saved environment state.

    Raises:
        ValueError: it is missing, or has not the `shape` that this environment needs.
    """
    if name not in state:
        raise ValueError(f"the saved environment state has no {name!r}, only {sorted(state)}")
    if state[name].shape != tuple(shape):
        raise ValueError(
            f"the saved environment state was made by another environment: {name!r} has shape "
            f"{state[name].shape}, this one needs {tuple(shape)}"
        )
    return state[name]

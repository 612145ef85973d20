"""What settings of several methods are made of, and how they are checked."""

from __future__ import annotations

import math
from typing import Literal, get_args

from learners.core.errors import ConfigError

Activation = Literal["tanh", "relu"]
OptimizerName = Literal["sgd", "rmsprop", "adam"]
ACTIVATIONS, OPTIMIZER_NAMES = get_args(Activation), get_args(OptimizerName)


def check_optimizer(name: str, value: str) -> None:
    """Raises ConfigError unless `value` names an optimizer."""
    if value not in OPTIMIZER_NAMES:
        raise ConfigError(f"{name} must be one of {OPTIMIZER_NAMES}, not {value!r}")


def check_minibatches(num_epochs: int, num_minibatches: int) -> None:
    """Raises ConfigError unless both are whole numbers above 0."""
    check_whole("num_epochs", num_epochs)
    check_whole("num_minibatches", num_minibatches)


def check_whole(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a whole number above 0."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number above 0, not {value}")


def check_positive(name: str, value: float) -> None:
    """Raises ConfigError unless 0 < value < ∞."""
    if not 0.0 < value < math.inf:
        wanted = "finite" if value > 0.0 else "above 0"
        raise ConfigError(f"{name} must be {wanted}, not {value}")


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low:g}, {high:g}], not {value}")

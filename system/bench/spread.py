"""Minimum, median and maximum of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """The least, the median and the most."""
    quantiles = np.quantile(values, (0.0, 0.5, 1.0)).tolist()
    return dict(zip(("min", "median", "max"), quantiles, strict=True))

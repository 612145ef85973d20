"""What there is to see of an environment: data for a picture, which is drawn elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _none(*shape: int) -> Array:
    return np.zeros((0, *shape))


@dataclass(frozen=True)
class Plan:
    """A world seen from above.

    Attributes:
        bounds: x at the left and at the right edge, y at the lower and at the upper one.
        agent: x and y of the agent, [2].
        marks: x, y and worth of what lies around, [n, 3]; what is worth more than 0 is sought.
        lines: walls as lines between two ends, [n, 2 ends, (x, y)].
        blocks: centres of closed cells, [n, 2].
        cell: side of a cell; 0 where the agent can be anywhere.
    """

    bounds: tuple[float, float, float, float]
    agent: Array
    marks: Array = field(default_factory=lambda: _none(3))
    lines: Array = field(default_factory=lambda: _none(2, 2))
    blocks: Array = field(default_factory=lambda: _none(2))
    cell: float = 0.0


@dataclass(frozen=True)
class Pose:
    """A robot of MuJoCo.

    Attributes:
        xml_file: Gymnasium's name of its model.
        qpos: generalised positions, [nq].
        goal: x and y of a place to reach, in metres, [2]; None where there is none.
    """

    xml_file: str
    qpos: Array
    goal: Array | None = None


Frame = NDArray[np.uint8]
"""A picture, [H, W, 3]."""

Scene = Plan | Pose | Frame


@runtime_checkable
class Drawable(Protocol):
    """Environments of a batch that can be looked at."""

    @property
    def steps_per_second(self) -> float:
        """How fast a film of them runs if nothing is left out."""
        ...

    def scene(self, index: int) -> Scene | None:
        """What environment `index` looks like now; None where it has no picture.

        Looking changes nothing.
        """
        ...

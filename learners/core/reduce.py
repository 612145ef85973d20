"""How work on blocks of members is shared out over learners, and put together again.

    graphs   = map_blocks(linearise, reduce.own(blocks), device)        # this learner's blocks
    gradient = reduce.sum([graph.gradient() for graph in graphs])       # over all blocks

Every learner holds the same state, makes the same calls in the same order, and gets the same
results: those of one learner that works on all blocks, bit for bit. What is not heavy each of them
does for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

Block = TypeVar("Block")
Part = TypeVar("Part")


class Reduce(Protocol):
    """One of the learners that share out a list of blocks."""

    def own(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """The contiguous share of this learner; empty where there are more learners than blocks."""
        ...

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """Adds the partial sums of all blocks in block order.

        Args:
            parts: of this learner's blocks, all of one shape.
        """
        ...

    def gather(self, parts: Sequence[Part]) -> list[Part]:
        """What was found on all blocks, in block order; several learners lose the graph.

        Args:
            parts: of this learner's blocks: tensors, or dictionaries of them, nested if need be.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """The only learner. See `Reduce`."""

    def own(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """All of them."""
        return blocks

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """Adds them from first to last."""
        return sum_in_order(parts)

    def gather(self, parts: Sequence[Part]) -> list[Part]:
        """The same."""
        return list(parts)


ALONE = Alone()


def sum_in_order(partials: Sequence[Tensor]) -> Tensor:
    """Adds partial sums from first to last."""
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total

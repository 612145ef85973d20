"""Work on blocks of members, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def block_bounds(num_members: int, members_per_block: int) -> list[tuple[int, int]]:
    """(first, one past the last) member of each block."""
    starts = range(0, num_members, members_per_block)
    return [(start, min(start + members_per_block, num_members)) for start in starts]


def group_bounds(num_members: int, num_groups: int) -> list[tuple[int, int]]:
    """(first, one past the last) member of each group: member m belongs to ⌊m · groups / M⌋."""
    firsts = [-(-g * num_members // num_groups) for g in range(num_groups + 1)]
    return list(pairwise(firsts))


def map_blocks(
    function: Callable[[Item], Result], blocks: Sequence[Item], device: torch.device
) -> list[Result]:
    """`function` of every block, in block order.

    On a CPU as many blocks run at a time as torch has threads, each on one thread: the results do
    not depend on that number, and no thread ever waits for another in mid-operation. On other
    devices the blocks run one after the other.
    """
    num_threads = min(torch.get_num_threads(), len(blocks))
    if device.type != "cpu" or num_threads <= 1:
        return [function(block) for block in blocks]

    def alone(block: Item) -> Result:
        torch.set_num_threads(1)
        return function(block)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(alone, blocks))
    finally:
        torch.set_num_threads(before)  # what a thread sets holds for those that come after it

"""What several learners exchange arrives exactly; who is left alone gives up in time."""

import os
import signal

import pytest
import torch

from learners.core.errors import LearnersParted
from learners.core.reduce import ALONE
from tests.learners.several import Learners

DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)
BLOCKS = tuple(range(5))


def numbers(block: int, dtype: torch.dtype) -> torch.Tensor:
    """Of a size that differs from block to block; floats with every kind of special value."""
    generator = torch.Generator().manual_seed(block)
    drawn = torch.randn(3, 2 + block, generator=generator, dtype=torch.float64) * 3.0
    if dtype.is_floating_point:
        drawn[0, 0], drawn[1, 0], drawn[2, 0] = torch.nan, -0.0, torch.inf
    return drawn.to(dtype)


def tensors_of(block: int) -> dict:
    """Nested, of all types, a scalar, an empty one, and one that is not laid out in order."""
    by_type = {str(dtype): numbers(block, dtype) for dtype in DTYPES}
    odd = {"scalar": torch.tensor(block / 3.0), "empty": torch.zeros(0, 2)}
    return {
        "by_type": by_type,
        "odd": odd | {"turned": numbers(block, torch.float32).mT},
        "none": {},
    }


def gathered(reduce, blocks):
    return reduce.gather([tensors_of(block) for block in reduce.own(blocks)])


def same_bits(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_bits(left[n], right[n]) for n in left)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes()


@pytest.mark.parametrize("num_blocks", [5, 3, 1])
def test_parts_of_unequal_blocks_and_all_types_arrive_bit_for_bit(several, num_blocks):
    """With fewer blocks than learners too, as evaluations have them."""
    blocks = BLOCKS[:num_blocks]
    expected = gathered(ALONE, blocks)
    for found in several.run(gathered, blocks):
        assert len(found) == num_blocks
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def own(reduce, blocks):
    return reduce.own(blocks)


@pytest.mark.parametrize("num_blocks", [1, 4, 5, 11])
def test_shares_are_contiguous_and_cover_all_blocks_evenly(several, num_blocks):
    shares = several.run(own, list(range(num_blocks)))
    assert [block for share in shares for block in share] == list(range(num_blocks))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def summed(reduce, values, dtype):
    parts = [torch.tensor([value, 1.0], dtype=dtype) for value in reduce.own(values)]
    return reduce.sum(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_taken_in_block_order(several, dtype):
    """No tree of partial sums gives this result."""
    values = (1e17, 1.0, -1e17, 1.0, 3.0)
    expected = summed(ALONE, values, dtype)
    assert float(expected[0]) == 4.0
    for found in several.run(summed, values, dtype):
        assert same_bits(found, expected)


def one_sum(reduce):
    return reduce.sum([torch.ones(1)])


def gathered_on_cards(reduce, blocks):
    found = gathered(reduce, blocks)
    assert all(t.is_cuda for part in found for t in part["by_type"].values())
    return [on_cpu(part) for part in found]


def on_cpu(part):
    if isinstance(part, dict):
        return {name: on_cpu(entry) for name, entry in part.items()}
    return part.cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parts_arrive_bit_for_bit_between_graphics_cards():
    """By NCCL: between two of them, or, where there is one, from it to itself."""
    learners = Learners(min(2, torch.cuda.device_count()), kind="cuda")
    try:
        expected = gathered(ALONE, BLOCKS)
        for found in learners.run(gathered_on_cards, BLOCKS):
            assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        learners.close()


def test_a_learner_that_is_killed_leaves_no_other_waiting():
    learners = Learners(2)
    try:
        assert learners.run(one_sum) == [torch.full((1,), 2.0)] * 2
        learners.start(0, one_sum)
        os.kill(learners.processes[1].pid, signal.SIGKILL)
        with pytest.raises(LearnersParted, match="learner 1 of 2 lost another one"):
            learners.finish(0)
    finally:
        learners.close()


def test_a_learner_that_does_not_come_is_given_up():
    learners = Learners(2, timeout_s=2.0)
    try:
        assert learners.run(one_sum) == [torch.full((1,), 2.0)] * 2
        learners.start(0, one_sum)
        with pytest.raises(LearnersParted, match="learner 1 of 2 lost another one"):
            learners.finish(0)
    finally:
        learners.close()

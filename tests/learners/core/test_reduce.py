"""One learner shares with nobody; sums are taken from first to last."""

import torch

from learners.core.reduce import ALONE, sum_in_order


def test_sum_in_order_adds_from_first_to_last():
    partials = [torch.tensor(x) for x in (1e8, 1.0, -1e8, 1.0)]
    assert float(sum_in_order(partials)) == float(((partials[0] + 1.0) - 1e8) + 1.0)
    before = [p.clone() for p in partials]
    sum_in_order(partials)
    assert all(torch.equal(a, b) for a, b in zip(partials, before, strict=True))


def test_the_only_learner_works_on_all_blocks_and_keeps_the_graph():
    blocks = [(0, 2), (2, 3)]
    assert ALONE.own(blocks) == blocks
    parts = [torch.ones(2, requires_grad=True), torch.ones(2)]
    assert ALONE.gather(parts) == parts
    assert torch.equal(ALONE.sum(parts), torch.full((2,), 2.0))
    assert ALONE.sum(parts).requires_grad

"""Five kills in one run, of each kind one; `make soak` makes fifty."""

import random

import pytest

from tests.cluster.soak import KINDS, soak

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_run_that_is_hit_five_times_loses_nothing(nodes, tmp_path, asynchronous):
    kinds = random.Random(5 + asynchronous).sample(KINDS, len(KINDS))
    soak(tmp_path, nodes, kinds, seed=5, asynchronous=asynchronous)

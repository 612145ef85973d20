"""Settings of the learners' tests."""

import pytest
import torch
from hypothesis import settings

from tests.learners.several import Learners

settings.register_profile("learners", deadline=None, derandomize=True, max_examples=50)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors on one thread; the setting is global, so it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=[2, 4], ids=["2_learners", "4_learners"])
def several(request):
    """Two learners in processes of their own, then four."""
    learners = Learners(request.param)
    yield learners
    learners.close()

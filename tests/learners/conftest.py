"""Settings of the learners' tests."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("learners", deadline=None, derandomize=True, max_examples=50)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors on one thread; the setting is global, so it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

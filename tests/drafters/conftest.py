"""Small models: more threads only get in each other's way."""

import pytest
import torch

from tests.training.conftest import tiny_cache  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)

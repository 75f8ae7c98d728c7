"""What holds for every test."""

from collections.abc import Iterator

import pytest
import torch

# Two threads that wait for each other cost a tiny model more than they bring it.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # Lightning gives a run of several processes as many as fit, and would leave them to the next test.
    torch.set_num_threads(1)

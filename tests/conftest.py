"""What every test starts from: one thread, and one seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The gate draws the same examples every time; every other run draws new ones. A busy machine is no
# failure.
settings.register_profile("gate", deadline=None, derandomize=True)
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """One thread and a known seed, so that a failure can be met again and small tests are fast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

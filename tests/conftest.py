"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch
from support.gloo import Nursery


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gloo() -> Iterator[Nursery]:
    """Runs functions on the ranks of a new gloo world."""
    nursery = Nursery()
    yield nursery
    nursery.close()

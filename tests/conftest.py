"""Set up before any test: one thread (a parent that has used an OpenMP pool must not fork), warm imports, no network."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Import in the parent what every forked rank would otherwise import again (assert_close alone pulls in sympy)."""
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    """What the parent holds each forked rank maps: give back what a module's tests have left."""
    yield
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)

"""Set up before any test: one thread (a parent that has used an OpenMP pool must not fork), warm imports, no network."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

from parallel import peaks  # noqa: E402

# every run ends with a measurement of the machine, of which tests want the form
peaks.READ_BYTES, peaks.SIDE, peaks.WINDOW_S = 1 << 12, {"cpu": 8}, 1e-4


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Import in the parent what every forked rank would otherwise import again (assert_close alone pulls in sympy)."""
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))

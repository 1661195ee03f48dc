"""Set up before any test: one thread (a parent that has used an OpenMP pool must not fork), warm
imports, no network."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.run

sys.path.insert(0, str(Path(__file__).parent.parent))
# looking for GPUs must not begin to use them: ranks are forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; see test_kernels.py
torch.set_num_threads(1)

from warm import Warm  # noqa: E402

from world import peaks  # noqa: E402

# every run ends with a measurement of the machine, of which tests want the form
peaks.COPIED_BYTES, peaks.LEAST_BYTES = 1 << 12, 8
peaks.SIDE, peaks.WINDOW_S = {"cpu": 8}, 1e-4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: two processes then end together. Tests that use a GPU come
    last, and are skipped where there are too few."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.get_closest_marker("gpu") is not None, item.path not in slow))
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is not None and count < marker.args[0]:
            item.add_marker(pytest.mark.skip(reason=f"needs {marker.args[0]} GPU(s)"))


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    """Import in the parent what every forked rank would otherwise import again (assert_close alone
    pulls in sympy). On Linux, programs that tests start are forks, too."""
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    if sys.platform != "linux":  # warm.py needs pidfd_open, prctl and setns
        yield
        return
    programs, python = Warm(), sys.executable
    sys.executable = programs.python
    gc.collect()
    gc.freeze()  # a collection in a forked rank would copy every page that has an object
    yield
    sys.executable = python
    programs.close()
    gc.unfreeze()  # else nanobind reports what is left as leaks

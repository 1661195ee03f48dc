"""The one command that tells what is true on a GPU goes through on a CPU, and its lines become a page."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest

from base.processes import is_running

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_check_goes_through_without_a_gpu(tmp_path: Path) -> None:
    words = ["--device=cpu", "--tiny=1", f"--out={tmp_path}", "--minutes=20", "--patience=10"]
    command = [sys.executable, "tests/gpu.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + (tmp_path / "log.txt").read_text()[-2000:]
    ends = json.loads((tmp_path / "steps.json").read_text())
    assert {made["step"] for made in ends} == {name for stage in gpu.STAGES for name, _ in stage}
    lines = list(map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines()))
    assert [line for line in lines if line.get("ok") is False] == []
    assert {line["step"] for line in lines} == {made["step"] for made in ends}
    shutil.copy(gpu.PAGE, tmp_path / "gpu.md")
    before = (tmp_path / "gpu.md").read_text()
    gpu.write_page(tmp_path, tmp_path / "gpu.md")
    after = (tmp_path / "gpu.md").read_text()
    assert "| eager, bfloat16, 3 rows | ok yes, error " in after
    assert after.startswith(before.partition("<!-- measured -->")[0])
    assert after.endswith(before.partition("<!-- end -->")[2])


def test_a_step_that_hangs_ends_at_its_limit_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path / 'pid'}\nwait\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    asked = argparse.Namespace(out=tmp_path, device="cpu", tiny=1, patience=0.02, text="")
    with open(tmp_path / "log.txt", "w") as log:
        (made,) = gpu.run_stage(asked, [("facts", 45)], time.monotonic() + 60, log)
        (late,) = gpu.run_stage(asked, [("facts", 45)], time.monotonic() + 2, log)
    assert made["end"] == "limit" and late["end"] == "no time left"
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)

"""The quick part of tests/faults.py: real torchrun worlds that lose a rank, and one that goes on by itself afterwards."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
from ranks import run_ranks
from test_entry import free_port

from checkpoints.sources import LATEST
from cli.options import TrainOptions
from train import directory
from world.launch import Launch
from world.mesh import World


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *words]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    faults.prepare(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("phase, name, comm", [("save", "SIGKILL", "gloo"), ("backward", "SIGSTOP", "shm")])
def test_a_lost_rank_takes_all_down_and_is_named(scratch: Path, phase: str, name: str, comm: str) -> None:
    case = faults.strike(scratch, phase, name, comm, 2)
    assert case["gone_s"] < (10 if name == "SIGKILL" else faults.LIMIT_S + 10)
    assert case["names_rank_1"] and case["launcher_status"] == 1, case["said"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase, name", [("forward", "SIGSTOP"), ("backward", "SIGKILL"), ("forward", "late"), ("sampling", "SIGSTOP")]
)
def test_a_lost_stage_takes_all_down_and_is_named(scratch: Path, phase: str, name: str) -> None:
    case = faults.strike(scratch, phase, name, "gloo", 2, "--pp=2")
    assert name != "late" or "rank 1 first: it is in no collective" in case["said"]
    assert case["gone_s"] < (10 if name == "SIGKILL" else faults.LIMIT_S + 10)
    assert case["names_rank_1"] and case["launcher_status"] == 1, case["said"]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("phase", ["sampling", "replay"])
def test_a_rank_that_stops_on_a_gpu_is_named(scratch: Path, phase: str) -> None:
    case = faults.strike(scratch, phase, "SIGSTOP", "nccl", 2)
    assert case["gone_s"] < faults.LIMIT_S + 10 and case["names_rank_1"], case["said"]


def curve(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["iter"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def unbroken(scratch: Path) -> dict[int, float]:
    words = faults.command(scratch, "forward", "shm", scratch / "whole")
    command = torchrun("--standalone", "--nproc_per_node=2", "train_tp.py", *words)
    subprocess.run(command, cwd=faults.ROOT, env=faults.environment(), check=True, capture_output=True, timeout=180)
    return curve(scratch / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("agents", [1, 2])
def test_torchrun_goes_on_from_the_last_whole_checkpoint_by_itself(
    scratch: Path, tmp_path: Path, unbroken: dict[int, float], agents: int
) -> None:
    """A run that began from scratch. Its store has what the first attempt left there, and where there are two agents only one
    of them counts a restart."""
    where = ["--standalone", "--nproc_per_node=2"]
    if agents == 2:
        meeting = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
        where = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", meeting, "--rdzv_id=job"]
    words = faults.command(scratch, "forward", "gloo" if agents == 2 else "shm", tmp_path / "broken")
    command = torchrun(*where, "--max_restarts=1", faults.__file__, "rank", str(tmp_path), "forward", "SIGKILL", *words)
    runs = [
        subprocess.Popen(command, cwd=faults.ROOT, env=faults.environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(agents)
    ]
    said = "".join(run.communicate(timeout=240)[1] for run in runs)
    assert [run.returncode for run in runs] == [0] * agents, said
    assert "lost contact with its peers (rank 1 is gone) in all_reduce" in said
    assert said.count(f"restarted by torchrun: going on from {tmp_path / 'broken' / 'step-000004'}\n") == 1
    broken = curve(tmp_path / "broken")
    assert len(broken) == 12 and broken == (unbroken if agents == 1 else pytest.approx(unbroken, rel=1e-5))


def _after(world: World, launch: Launch, options: TrainOptions) -> str:
    return directory.after_restart(replace(world, launch=launch), options).init_from


def test_only_a_restart_goes_on_and_only_from_its_own_checkpoints(tmp_path: Path) -> None:
    options = TrainOptions(out_dir=str(tmp_path), init_from="gpt2", overwrite=True)

    def after(restarts: int, run: str = "job", **changes: Any) -> str:
        return str(run_ranks(1, _after, Launch(0, 1, 0, 1, restarts, run), replace(options, **changes))[0])

    begun = tmp_path / directory.BEGUN
    begun.write_text("job")
    assert after(1) == "gpt2"  # there is no checkpoint yet
    (tmp_path / LATEST).write_text("step-000004\n")
    (tmp_path / "step-000004").mkdir()
    (tmp_path / "step-000004" / "shards.json").write_text("{}")
    assert after(1) == "resume"
    assert after(1, init_from="scratch") == "resume" and after(1, eval_only=True) == "gpt2"
    assert after(1, run="another") == "gpt2"
    assert after(0) == "gpt2" and not begun.exists()  # a new run: what lies here is not its own, until it has begun
    assert after(1) == "gpt2"

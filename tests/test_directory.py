"""The directory of a run: nothing goes before what replaces it is whole, nothing broken is kept, one run writes at a time."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from ranks import run_ranks
from test_hostile import ALONE
from test_training import curve, letters, options, trained  # noqa: F401

import train_tp
from base.errors import Stopped, UserError
from cli.options import TrainOptions
from tp_model import TensorParallelGPT
from train import directory, gradients, loop, setup
from train.checkpoint import steps
from world.launch import Launch
from world.mesh import World

SHORT: dict[str, Any] = {"max_iters": 4, "eval_interval": 4, "tp": 1}


def names(out: Path) -> list[str]:
    return [path.name for path in steps(out)]


@pytest.fixture
def earlier(letters: Path, tmp_path: Path) -> Path:  # noqa: F811
    """What a run of four iterations has left."""
    run_ranks(1, _train, options(letters, tmp_path / "out", **SHORT))
    return tmp_path / "out"


def _train(world: World, settings: TrainOptions, fault: str = "", at: int = -1) -> str:
    """A run with a fault; what it ends with."""
    rate, norm = loop.learning_rate, gradients.grad_norm

    def failing(*given: Any) -> Any:
        raise RuntimeError(f"no {fault}")

    def struck(given: TrainOptions, iter_num: int) -> float:
        if iter_num == at:
            if fault == "iteration":
                failing()
            if fault == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            if fault == "shorter":
                os.truncate(Path(settings.data_dir) / settings.dataset / "train.bin", 100)
            if fault == "diverges":
                return 1e12
        return rate(given, iter_num)

    def broken(model: TensorParallelGPT, pp: Any = None) -> torch.Tensor:
        return norm(model, pp) * (float("inf") if struck.iter_num in range(at, at + 3) else 1.0)  # type: ignore[attr-defined]

    def noted(given: TrainOptions, iter_num: int) -> float:
        struck.iter_num = iter_num  # type: ignore[attr-defined]
        return struck(given, iter_num)

    loop.learning_rate = noted  # type: ignore[assignment]
    if fault == "norm":
        gradients.grad_norm = broken
    if fault in ("replicate", "Log", "Saver"):
        setattr(setup if fault == "replicate" else loop, fault, failing)
    try:
        train_tp.main(world, settings)
    except (UserError, Stopped, RuntimeError) as error:
        return str(error)
    return ""


# --- starting over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault, changes, said", [
    ("", {"gradient_accumulation_steps": 5, "batch_size": 1}, "dp=2 ranks cannot share them evenly"),
    ("", {"n_head": 3}, "n_embd=16"),
    ("replicate", {}, "no replicate"),  # memory, say
    ("Log", {}, "no Log"),  # wandb, say
    ("iteration", {}, "no iteration"),
])  # fmt: skip
def test_an_earlier_run_is_there_until_there_is_another(
    letters: Path, earlier: Path, fault: str, changes: Any, said: str  # noqa: F811
) -> None:
    """Whatever ends a run that starts over before it has saved: the one before it can go on as if nothing had been."""
    settings = options(letters, earlier, **(SHORT | changes | {"overwrite": True, "n_layer": 1} | changes))
    assert all(said in end for end in run_ranks(2, _train, settings, fault, 2, tp=1))
    assert soak.check_latest(earlier) == 4 and names(earlier) == ["step-000004"]
    run_ranks(1, _train, options(letters, earlier, init_from="resume", **(SHORT | {"max_iters": 6})))
    assert [line["iter"] for line in curve(earlier)] == list(range(6))
    assert not list(earlier.glob(".metrics*"))


def test_an_earlier_run_goes_with_the_first_checkpoint_of_another(letters: Path, earlier: Path) -> None:  # noqa: F811
    (earlier / "step-000999").mkdir()  # of a run that went further
    settings = options(letters, earlier, **(SHORT | {"overwrite": True, "save_interval": 2, "keep_last": 0, "n_layer": 1}))
    run_ranks(1, _train, settings, "iteration", 3)  # it has saved once
    assert names(earlier) == ["step-000002"] and soak.check_latest(earlier) == 2
    assert not list(earlier.glob(".metrics*")) and len(curve(earlier)) == 3


@pytest.mark.parametrize("init_from", ["scratch", "step-000004"])
def test_checkpoints_that_latest_does_not_name_are_seen(letters: Path, earlier: Path, init_from: str) -> None:  # noqa: F811
    (earlier / "latest").unlink()
    source = init_from if init_from == "scratch" else str(earlier / init_from)
    said = run_ranks(2, _train, options(letters, earlier, init_from=source, **SHORT), tp=1)
    assert all("has checkpoints of an earlier run (step-000004). Go on with" in end for end in said)
    assert names(earlier) == ["step-000004"]
    settings = options(letters, earlier, init_from=source, overwrite=True, **(SHORT | {"max_iters": 2}))
    assert run_ranks(2, _train, settings, tp=1) == ["", ""]
    assert names(earlier) == ["step-000002"]


def _attempt(world: World, settings: TrainOptions, restarts: int, *fault: Any) -> str:
    return _train(replace(world, launch=Launch(0, 1, 0, 1, restarts, "job")), settings, *fault)


def test_a_restart_takes_no_earlier_run_for_its_own(letters: Path, earlier: Path) -> None:  # noqa: F811
    """It was starting over, and had saved nothing: so it starts over again. Then it has, and goes on."""
    settings = options(letters, earlier, overwrite=True, **(SHORT | {"n_layer": 1, "save_interval": 2, "max_iters": 6}))
    run_ranks(1, _attempt, settings, 0, "iteration", 1)
    run_ranks(1, _attempt, settings, 1, "iteration", 1)
    assert names(earlier) == ["step-000004"]
    run_ranks(1, _attempt, settings, 1, "iteration", 3)
    assert names(earlier) == ["step-000002"]
    assert run_ranks(1, _attempt, settings, 2) == [""]
    assert [line["iter"] for line in curve(earlier)] == list(range(6))


def test_a_dataset_that_gets_shorter_is_one_line(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    home = tmp_path / "data" / "letters"
    home.mkdir(parents=True)
    for file in (letters / "letters").iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    (said,) = run_ranks(1, _train, options(home.parent, tmp_path / "out", **SHORT), "shorter", 2)
    assert said.startswith(f"{home / 'train.bin'} has become shorter than its 2700 tokens since the run began: ")


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, at", [
    ({"eval_interval": 1}, 5), ({"eval_interval": 100, "save_interval": 1}, 5), ({"dtype": "bfloat16", "save_interval": 1}, 4),
    ({"eval_interval": 1, "always_save_checkpoint": False}, 4), ({"save_interval": 1, "async_save": True}, 4),
])  # fmt: skip
def test_weights_whose_loss_is_no_number_are_not_saved(
    letters: Path, earlier: Path, changes: Any, at: int  # noqa: F811
) -> None:
    """The update of iteration `at` breaks them; its own loss is fine."""
    settings = options(letters, earlier, init_from="resume", **(SHORT | {"max_iters": 9, "keep_last": 1} | changes))
    (said,) = run_ranks(1, _train, replace(settings, grad_clip=0.0), "diverges", at)
    found = re.fullmatch(r"(train |val |)loss is (nan|inf) at iteration (\d); last good checkpoint: (\S+)\. Lower .*", said)
    assert found and int(found[3]) == at + 1, said
    assert soak.check_latest(earlier) <= at and Path(found[4]) == directory.latest_checkpoint(earlier)
    assert names(earlier) == [directory.latest_checkpoint(earlier).name]


def test_no_earlier_run_has_the_good_checkpoint_of_one_that_starts_over(letters: Path, earlier: Path) -> None:  # noqa: F811
    settings = options(letters, earlier, overwrite=True, grad_clip=0.0, **(SHORT | {"save_interval": 1}))
    (said,) = run_ranks(1, _train, settings, "diverges", 0)
    assert "at iteration 1; no checkpoint yet." in said and names(earlier) == ["step-000004"]


def test_a_save_after_a_gradient_that_is_no_number_waits(
    letters: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    """Updates 4 to 6 are left out."""
    settings = options(letters, tmp_path, **(SHORT | {"save_interval": 1, "max_iters": 8, "eval_interval": 9, "keep_last": 0}))
    assert run_ranks(1, _train, settings, "norm", 4) == [""]
    assert names(tmp_path) == [f"step-{i:06d}" for i in (1, 2, 3, 4, 8)]
    assert capfd.readouterr().out.count("not saved at iteration") == 3


# --- one run at a time ----------------------------------------------------------------------------------------------


def test_a_second_run_is_told_of_the_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = TrainOptions(out_dir=str(tmp_path / "out"))
    with directory.writing(ALONE, settings):
        with pytest.raises(UserError) as error, directory.writing(ALONE, settings):
            pass
        with directory.writing(ALONE, replace(settings, eval_only=True)):
            pass  # it writes nothing
    here = rf"host {socket.gethostname()}, process {os.getpid()}, begun \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"another run writes to {tmp_path}/out: {here}\. Wait for it, end it, or .*", str(error.value))
    with directory.writing(ALONE, settings):
        pass
    with directory.writing(ALONE, replace(settings, out_dir=str(tmp_path / "none"), init_from="resume")):
        assert not (tmp_path / "none").exists()
    assert capfd.readouterr().err == ""


def test_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    settings, (ready, told) = TrainOptions(out_dir=str(tmp_path)), os.pipe()
    child = os.fork()
    if child == 0:
        with directory.writing(ALONE, settings):
            os.write(told, b"!")
            signal.pause()
    assert os.read(ready, 1) == b"!"
    with pytest.raises(UserError, match=f"process {child}, begun"), directory.writing(ALONE, settings):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with directory.writing(ALONE, settings):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none(*given: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with directory.writing(ALONE, TrainOptions(out_dir=str(tmp_path))):
        pass
    said = f"nothing keeps a second run out of {tmp_path}: its file system has no locks (Function not implemented)\n"
    assert capfd.readouterr().err == said


def test_a_lock_that_is_no_file_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").symlink_to(tmp_path / "mine")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / ".lock")
    for name in "ab":
        said = pytest.raises(UserError, match=r"/.lock is (a symbolic link|not a file)")
        with said, directory.writing(ALONE, TrainOptions(out_dir=str(tmp_path / name))):
            pass
    assert not (tmp_path / "mine").exists()


def _one_of_two(settings: TrainOptions, said: Any) -> None:
    try:
        said.put(run_ranks(1, _train, settings)[0])
    except AssertionError as error:
        said.put(str(error))


def test_of_two_runs_at_once_one_is_refused_and_the_other_whole(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = options(letters, tmp_path, **(SHORT | {"save_interval": 1, "max_iters": 30, "eval_interval": 30}))
    said: Any = multiprocessing.get_context("fork").Queue()
    pair = [multiprocessing.get_context("fork").Process(target=_one_of_two, args=(settings, said)) for _ in range(2)]
    for run in pair:
        run.start()
    ends = sorted(said.get() for _ in pair)
    for run in pair:
        run.join()
    assert ends[0] == "" and ends[1].startswith(f"another run writes to {tmp_path}: host ")
    assert soak.check_latest(tmp_path) == 30 and len(curve(tmp_path)) == 30


@pytest.mark.parametrize("environment, said", [
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, "srun has started 4 processes"),
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "srun has started 4 processes"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun has started 2 processes"),
    ({"PMI_SIZE": "8", "PMI_RANK": "1"}, "mpirun has started 8 processes"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ""),  # a batch script
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ({"SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, ""),
])  # fmt: skip
def test_a_launcher_that_sets_no_rank(environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not said:
        assert Launch.from_environment().size == 1
        return
    with pytest.raises(UserError, match=rf"^{said} .* Start ranks with torchrun --standalone --nproc_per_node=\d"):
        Launch.from_environment()


def test_what_a_run_says_that_could_not_save(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = options(letters, tmp_path, **(SHORT | {"eval_interval": 100, "max_iters": 100}))
    (said,) = run_ranks(1, _stopped_after_a_bad_norm, settings)
    assert said == "143 SIGTERM: stopped after 3 iterations, not saved; last good checkpoint: none."
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["iter"] == 2


def _stopped_after_a_bad_norm(world: World, settings: TrainOptions) -> str:
    gradients.grad_norm = lambda model, pp=None: torch.tensor(float("nan"))
    rate = loop.learning_rate

    def told(given: TrainOptions, iter_num: int) -> float:
        if iter_num == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(given, iter_num)

    loop.learning_rate = told  # type: ignore[assignment]
    try:
        train_tp.main(world, settings)
    except Stopped as stop:
        return f"{stop.status} {stop}"
    return ""

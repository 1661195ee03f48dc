"""Checkpoints of a run: whole or not there, in the background too, whatever ends the run and whenever."""

import os
import pty
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soak
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_training import curve, figures, letters, options  # noqa: F401

import train_tp
from base.errors import Stopped
from checkpoints.tensor_file import TensorFile
from cli.options import TrainOptions
from train import checkpoint as training
from train import loop
from world import entry
from world.mesh import World


def _train(world: World, settings: TrainOptions) -> None:
    train_tp.main(world, settings)


def files(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(directory)): load_file(path) for path in sorted(directory.rglob("*.safetensors"))}


@pytest.mark.parametrize("dp, tp, shard", [(1, 1, False), (1, 2, False), (2, 1, True), (2, 2, True)])
def test_a_save_in_the_background_writes_what_one_in_front_does(
    letters: Path, tmp_path: Path, dp: int, tp: int, shard: bool  # noqa: F811
) -> None:
    for name, background in (("front", False), ("behind", True)):
        settings = options(letters, tmp_path / name, tp=tp, max_iters=6, save_interval=2, dp_shard=shard, async_save=background)
        run_ranks(dp * tp, _train, settings, tp=tp)
    for step in ("step-000002", "step-000004", "step-000006"):
        front, behind = (files(tmp_path / name / step) for name in ("front", "behind"))
        assert front.keys() == behind.keys() and len(front) == 2 * tp
        for name in front:
            assert all(torch.equal(front[name][key], behind[name][key]) for key in front[name])
    assert not list(tmp_path.glob("*/.step*"))


def _copies(world: World, settings: TrainOptions) -> list[bool]:
    savers = []
    begin = training.Saver.__init__

    def noted(self: training.Saver, *given: Any) -> None:
        begin(self, *given)
        savers.append(self)

    training.Saver.__init__ = noted  # type: ignore[method-assign, assignment]
    train_tp.main(world, settings)
    return [copy.requires_grad for copy in savers[0]._copies.values()]


def test_copies_hold_on_to_nothing(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """A copy that autograd knew of would keep all that came before it."""
    settings = options(letters, tmp_path, tp=1, max_iters=4, save_interval=2, async_save=True)
    copies = run_ranks(1, _copies, settings)[0]
    assert len(copies) > 50 and not any(copies)


def _slowly(world: World, settings: TrainOptions, out: Path) -> list[tuple[int, str, bool]]:
    """What stood in out_dir at each iteration, of a run whose first rank writes slowly."""
    seen = []
    write, rate = TensorFile.write, loop.learning_rate

    def slow(self: TensorFile, name: str, tensor: torch.Tensor) -> None:
        if world.rank == 0 and name.startswith("exp_avg.transformer.wpe"):
            time.sleep(1.0)
        write(self, name, tensor)

    def look(given: TrainOptions, iter_num: int) -> float:
        latest = out / "latest"
        seen.append((iter_num, latest.read_text().strip() if latest.exists() else "", any(out.glob(".step*"))))
        time.sleep(0.01)
        return rate(given, iter_num)

    TensorFile.write, loop.learning_rate = slow, look  # type: ignore[method-assign, assignment]
    train_tp.main(world, settings)
    return seen


def test_the_run_goes_on_while_a_checkpoint_is_written(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """And `latest` names it only when every rank has written."""
    settings = options(letters, tmp_path, tp=2, max_iters=14, save_interval=3, eval_interval=100, async_save=True, keep_last=0)
    seen = run_ranks(2, _slowly, settings, tmp_path)[0]
    assert [(iteration, latest) for iteration, latest, _ in seen if iteration < 6] == [(i, "") for i in range(6)]
    assert [writing for iteration, _, writing in seen if iteration < 6] == [False] * 3 + [True] * 3
    # the next save waits for the one before it
    assert {latest for iteration, latest, _ in seen if 6 <= iteration < 9} == {"step-000003"}
    assert (tmp_path / "latest").read_text() == "step-000014\n"
    assert [path.name for path in training.steps(tmp_path)] == [f"step-{i:06d}" for i in (3, 6, 9, 12, 14)]


def _full(world: World, settings: TrainOptions) -> None:
    write = TensorFile.write

    def fail(self: TensorFile, name: str, tensor: torch.Tensor) -> None:
        if "000006" in str(self.path) and world.rank == 1:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    TensorFile.write = fail  # type: ignore[method-assign]
    train_tp.main(world, settings)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_the_run_and_harms_nothing(letters: Path, tmp_path: Path, background: bool) -> None:  # noqa: F811
    settings = options(letters, tmp_path, tp=2, save_interval=3, eval_interval=100, async_save=background)
    with pytest.raises(AssertionError, match="No space left on device, so the checkpoint was not written"):
        run_ranks(2, _full, settings)
    assert (tmp_path / "latest").read_text() == "step-000003\n"
    assert soak.check_latest(tmp_path) == 3
    run_ranks(2, _train, options(letters, tmp_path, tp=2, max_iters=4, init_from="resume"))
    assert not list(tmp_path.glob(".step*"))  # what was left is gone


# --- asked to stop --------------------------------------------------------------------------------------------------


def _told(world: World, settings: TrainOptions, rank: int, at: int, numbers: list[int]) -> str:
    """A run of which one rank gets signals in iteration `at`."""
    rate = loop.learning_rate

    def tell(given: TrainOptions, iter_num: int) -> float:
        if world.rank == rank and iter_num == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return rate(given, iter_num)

    loop.learning_rate = tell  # type: ignore[assignment]
    try:
        train_tp.main(world, settings)
    except Stopped as stop:
        return f"{stop.status} {stop}"
    return "not stopped"


@pytest.mark.parametrize("size, tp, rank, signals, status, background", [
    (1, 1, 0, [signal.SIGTERM], 143, True), (2, 2, 1, [signal.SIGTERM], 143, False), (2, 2, 1, [signal.SIGTERM], 143, True),
    (1, 1, 0, [signal.SIGUSR1, signal.SIGTERM], 138, False),
    (2, 1, 1, [signal.SIGINT, signal.SIGINT], 130, False), (4, 2, 3, [signal.SIGTERM, signal.SIGINT], 143, True),
])  # fmt: skip
def test_a_run_that_is_told_to_stop_saves_first(
    letters: Path, tmp_path: Path, size: int, tp: int, rank: int, signals: list[int], status: int, background: bool  # noqa: F811
) -> None:
    """One rank is told, all stop after the same iteration; going on gives the curve of a run that never stopped."""
    whole, cut = (options(letters, tmp_path / name, tp=tp, async_save=background) for name in ("whole", "cut"))
    said = run_ranks(size, _told, cut, rank, 7, signals, tp=tp)
    name = signal.Signals(signals[0]).name
    path = tmp_path / "cut" / "step-000008"
    assert said == [f"{status} {name}: stopped after 8 iterations, saved {path}. --init_from=resume goes on from there."] * size
    assert soak.check_latest(tmp_path / "cut") == 8
    run_ranks(size, _train, options(letters, tmp_path / "cut", tp=tp, init_from="resume"), tp=tp)
    run_ranks(size, _train, whole, tp=tp)
    assert np.array_equal(figures(tmp_path / "cut"), figures(tmp_path / "whole"))


def test_a_run_whose_terminal_is_closed_saves(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """SIGHUP comes, and nothing can be printed any more."""
    settings = options(letters, tmp_path, log_interval=1, max_iters=10**6, eval_interval=10**6)
    child, terminal = pty.fork()
    if child == 0:
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        entry.run_parsed(lambda: (train_tp.main, settings), "train_tp.py")
        os._exit(0)
    said = b""
    while b"iter 2:" not in said:
        said += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    assert soak.check_latest(tmp_path) == len(curve(tmp_path)) > 2


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert signals.asked == signal.SIGUSR2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_insists_on_ctrl_c_is_obeyed_at_once() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    with loop.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's, a moment later
        assert signals.asked == signal.SIGINT
        signals._since -= 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with pytest.raises(KeyboardInterrupt):  # and after the loop it is Python's again
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# --- which are kept -------------------------------------------------------------------------------------------------


def test_what_latest_names_is_never_the_one_that_goes(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """A run goes on from an earlier checkpoint than the newest; those of the other future do not count."""
    run_ranks(1, _train, options(letters, tmp_path, tp=1, eval_interval=4, keep_last=0))
    (tmp_path / "latest").write_text("step-000008\n")
    changes: dict[str, Any] = {"tp": 1, "eval_interval": 100, "save_interval": 2, "max_iters": 10, "keep_last": 1}
    run_ranks(1, _train, options(letters, tmp_path, init_from="resume", **changes))
    assert [path.name for path in training.steps(tmp_path)] == ["step-000010", "step-000012", "step-000016", "step-000020"]
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert [line["iter"] for line in curve(tmp_path)] == list(range(10))


def test_steps_are_in_order_beyond_a_million(tmp_path: Path) -> None:
    names = ["step-999999", "step-1000000", "step-000003"]
    for name in (*names, "step-x", "step-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in training.steps(tmp_path)] == ["step-000003", "step-999999", "step-1000000"]


# --- and whatever happens -------------------------------------------------------------------------------------------


def test_nothing_is_lost_when_ranks_are_killed(tmp_path: Path) -> None:
    """The quick part of tests/soak.py, whose whole is a command."""
    made = soak.soak(tmp_path, kills=2, seed=367, launcher="fork", stops=0.0)
    assert [(event["lost"], event["hang"]) for event in made["events"]] == [(False, False)] * 2
    assert made["compared"] > 8 and made["largest_relative_difference"] < 1e-5

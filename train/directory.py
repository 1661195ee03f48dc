"""The directory of a training run: who writes there, when an earlier run's files are deleted, and
metrics.jsonl, which is cut on resume and read for the report.

    latest                  the name of the newest whole checkpoint
    step-000500/            the checkpoints: train/checkpoint.py
    begun                   torchrun's name for the current or last run
    .lock                   locked by the current run, which it names
    .metrics.before.jsonl   the earlier run's curve, until a run that starts over has saved
"""

import contextlib
import fcntl
import json
import mmap
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from base.errors import UserError, print_error, printable
from base.files import inside, new_file, sync_directory
from checkpoints.sources import LATEST, latest_checkpoint
from cli.options import TrainOptions
from world.mesh import World

CURVE_POINTS = 200  # the most iterations of which a report has the loss
METRICS, BEGUN, LOCK, BEFORE = "metrics.jsonl", "begun", ".lock", ".metrics.before.jsonl"


def has_checkpoints(out_dir: Path) -> bool:
    return os.path.lexists(out_dir / LATEST)


def steps(out_dir: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = (path for path in out_dir.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name))
    return sorted(filter(Path.is_dir, found), key=iteration)


def iteration(path: Path) -> int:
    return int(path.name[5:])


def check_free(out_dir: Path) -> None:
    """UserError if there are checkpoints, for a run that does not resume or overwrite them."""
    found = [path.name for path in steps(out_dir)] or [LATEST] * has_checkpoints(out_dir)
    if found:
        over = "--overwrite=True (deletes them when the first new one is whole)"
        raise UserError(
            f"{out_dir} has checkpoints of an earlier run ({found[-1]}). Go on with "
            f"--init_from=resume, choose another --out_dir, or start over with {over}."
        )


def last_good(out_dir: Path) -> Path | None:
    """The newest checkpoint of the current run; none has a loss that is not a number."""
    own = has_checkpoints(out_dir) and not os.path.lexists(out_dir / BEFORE)
    return latest_checkpoint(out_dir) if own else None


@contextlib.contextmanager
def writing(world: World, options: TrainOptions) -> Iterator[None]:
    """Keep other runs from writing to out_dir. UserError names a run that does already. The system
    releases the lock when the process ends, however it ends."""
    out_dir = Path(options.out_dir)
    # a missing directory has nothing to resume, which is reported later: do not make it
    missing = options.init_from == "resume" and not out_dir.is_dir()
    if not world.is_main or options.eval_only or missing:
        yield
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    # through no link, which may lead anywhere; without waiting for the other end of a pipe
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(inside(out_dir / LOCK), flags, 0o666), "r+b", buffering=0) as file:
        if not os.path.isfile(file.fileno()):
            raise UserError(f"{out_dir / LOCK} is not a file.")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = printable(file.read(300).decode(errors="replace").strip(), 300)
            advice = "Wait for it, end it, or choose another --out_dir."
            raise UserError(f"another run writes to {out_dir}: {holder}. {advice}") from None
        except OSError as error:
            why = f"its file system has no locks ({error.strerror})"
            print_error(f"nothing keeps a second run out of {out_dir}: {why}")
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, process {os.getpid()}, begun {begun}\n".encode())
        yield


def after_restart(world: World, options: TrainOptions) -> TrainOptions:
    """Options of a run that torchrun has restarted (--max_restarts): it resumes from its own last
    checkpoint. It may replace those that were in out_dir before it began."""
    mark, own, saved = Path(options.out_dir) / BEGUN, False, None
    again = any(world.gather(world.launch.restarts))  # each node's agent has its own count
    if world.is_main and not options.eval_only:
        own = again and mark.is_file() and mark.read_text() == world.launch.run
        saved = last_good(mark.parent) if own else None
        if not again:
            mark.unlink(missing_ok=True)
    own, saved = world.gather((own, saved))[0]
    if not own or options.init_from == "resume":
        return options
    if saved is None:
        return replace(options, overwrite=True)
    if world.is_main:
        print_error(f"restarted by torchrun: going on from {saved}")
    return replace(options, init_from="resume")


def make_ready(out_dir: Path, iter_num: int, resumed: bool) -> list[Path]:
    """Delete broken saves, and later lines of metrics.jsonl. Returns the earlier run's checkpoints
    if this one starts over: they are deleted after its first save."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for left in out_dir.glob(".step-*.tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    metrics, before = out_dir / METRICS, out_dir / BEFORE
    if before.is_file():
        before.replace(metrics)  # the last run that started over here saved nothing
    old = [] if resumed else steps(out_dir)
    if old or not resumed and has_checkpoints(out_dir):
        metrics.touch()
        metrics.replace(before)
    cut_metrics(metrics, iter_num)
    return old


def point(path: Path, old: list[Path]) -> None:
    """Make `latest` name this whole checkpoint, and delete the earlier run's files."""
    out_dir = path.parent
    with new_file(out_dir / LATEST) as file:
        file.write(f"{path.name}\n".encode())
    (out_dir / BEFORE).unlink(missing_ok=True)
    sync_directory(out_dir)
    for left in {*old} - {path}:
        remove(left)
    old.clear()


def remove(path: Path) -> None:
    """Delete a checkpoint. If killed meanwhile, the rest has a name that the next run deletes."""
    scratch = path.with_name(f".{path.name}.tmp-old")
    shutil.rmtree(scratch, ignore_errors=True)
    path.rename(scratch)
    scratch.unlink() if scratch.is_symlink() else shutil.rmtree(scratch)


# --- metrics.jsonl ------------------------------------------------------------------------------


def cut_metrics(metrics: Path, iter_num: int) -> None:
    """Keep the lines of iterations before iter_num. Reads from the end, as there may be millions of
    lines; also cuts one that a kill left half written."""
    with open(metrics, "a+b" if iter_num else "w+b") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            while end:
                start = text.rfind(b"\n", 0, end - 1) + 1
                if text[end - 1 : end] == b"\n" and 0 <= iteration_of(text[start:end]) < iter_num:
                    break
                end = start
        file.truncate(end)


def iteration_of(line: bytes) -> int:
    """The iteration of a line of metrics.jsonl; -1 if the line is damaged."""
    try:
        number = json.loads(line)["iter"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return number if type(number) is int else -1


def loss_curve(metrics: Path) -> dict[str, list[Any]]:
    """All evaluations, and the loss at CURVE_POINTS iterations or fewer, evenly spread."""
    with open(metrics if metrics.is_file() else os.devnull, "rb") as lines:
        read = [json.loads(line) for line in lines if iteration_of(line) >= 0]
    trained = [line for line in read if "loss" in line]
    trained = trained[:: max(1, -(-len(trained) // CURVE_POINTS))]
    measured = [line for line in read if "val_loss" in line]
    curve = {key: [line[key] for line in trained] for key in ("iter", "loss")}
    curve["val_iter"] = [line["iter"] for line in measured]
    return curve | {"val_loss": [line["val_loss"] for line in measured]}

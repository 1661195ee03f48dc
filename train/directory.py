"""The directory of a training run: who writes there, and when an earlier run's files are deleted.

    latest                  the name of the newest whole checkpoint
    step-000500/            the checkpoints: train/checkpoint.py
    begun                   torchrun's name for the current or last run
    .lock                   locked by the current run, which it names
    .metrics.before.jsonl   the earlier run's curve, until a run that starts over has saved
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from base.errors import UserError, printable
from base.files import inside, new_file, sync_directory
from checkpoints.sources import LATEST, latest_checkpoint
from cli.options import TrainOptions
from train.metrics import cut_metrics
from world.mesh import World

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
        raise UserError(
            f"{out_dir} has checkpoints of an earlier run ({found[-1]}). Go on with "
            "--init_from=resume, choose another --out_dir, or start over with --overwrite=True "
            "(deletes them when the first new one is whole)."
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
    handle = os.open(inside(out_dir / LOCK), flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{out_dir / LOCK} is not a file.")
        _lock(handle, out_dir)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, out_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = printable(os.pread(handle, 300, 0).decode(errors="replace").strip(), 300)
        raise UserError(
            f"another run writes to {out_dir}: {holder}. Wait for it, end it, or choose another "
            "--out_dir."
        ) from None
    except OSError as error:
        why = f"its file system has no locks ({error.strerror})"
        print(f"nothing keeps a second run out of {out_dir}: {why}", file=sys.stderr)
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    mine = f"host {socket.gethostname()}, process {os.getpid()}, begun {begun}\n"
    os.ftruncate(handle, 0)
    os.pwrite(handle, mine.encode(), 0)


def after_restart(world: World, options: TrainOptions) -> TrainOptions:
    """Options of a run that torchrun has restarted (--max_restarts): it resumes from its own last
    checkpoint. It may replace those that were in out_dir before it began."""
    mark, own, saved = Path(options.out_dir) / BEGUN, False, None
    again = any(world.gather(world.launch.restarts))  # each node's agent has its own count
    if world.is_main and not options.eval_only:
        if again:
            own = mark.is_file() and mark.read_text() == world.launch.run
            saved = last_good(mark.parent) if own else None
        else:
            mark.unlink(missing_ok=True)
    own, saved = world.gather((own, saved))[0]
    if not own or options.init_from == "resume":
        return options
    if saved is None:
        return replace(options, overwrite=True)
    if world.is_main:
        print(f"restarted by torchrun: going on from {saved}", file=sys.stderr)
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
    for left in old:
        if left != path:
            remove(left)
    old.clear()


def remove(path: Path) -> None:
    """Delete a checkpoint. If killed meanwhile, the rest has a name that the next run deletes."""
    scratch = path.with_name(f".{path.name}.tmp-old")
    shutil.rmtree(scratch, ignore_errors=True)
    path.rename(scratch)
    scratch.unlink() if scratch.is_symlink() else shutil.rmtree(scratch)

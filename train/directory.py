"""The directory of a training run: who writes there, and when what an earlier run left may go.

    latest                  the name of the newest whole checkpoint
    step-000500/            the checkpoints: train/checkpoint.py
    begun                   torchrun's name for the run that is, or was last, at work here
    .lock                   held by the run that is at work; it says which one that is
    .metrics.before.jsonl   while a run starts over and has saved nothing yet: the curve of the run before it
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
from base.files import inside, sync_directory
from checkpoints.sources import LATEST, latest_checkpoint
from cli.options import TrainOptions
from world.mesh import World

METRICS, BEGUN, LOCK, BEFORE = "metrics.jsonl", "begun", ".lock", ".metrics.before.jsonl"


def has_checkpoints(out_dir: Path) -> bool:
    return os.path.lexists(out_dir / LATEST)


def steps(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in out_dir.glob("step-*") if path.is_dir() and re.fullmatch(r"step-[0-9]+", path.name)]
    return sorted(found, key=iteration)


def iteration(path: Path) -> int:
    return int(path.name[5:])


def check_free(out_dir: Path) -> None:
    """UserError where a run that does not go on from them would find checkpoints, `latest` or not."""
    found = [path.name for path in steps(out_dir)] or [LATEST] * has_checkpoints(out_dir)
    if found:
        raise UserError(
            f"{out_dir} has checkpoints of an earlier run ({found[-1]}). Go on with --init_from=resume, choose another "
            f"--out_dir, or start over with --overwrite=True (deletes them when the first new one is whole)."
        )


def last_good(out_dir: Path) -> Path | None:
    """The newest checkpoint of the run that is at work here: none is written whose loss is not a number."""
    own = has_checkpoints(out_dir) and not os.path.lexists(out_dir / BEFORE)
    return latest_checkpoint(out_dir) if own else None


# --- one run at a time ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(world: World, options: TrainOptions) -> Iterator[None]:
    """Within, no other run writes to out_dir, if this one does. UserError that names the run which does.

    The system lets go of the lock with the process that holds it, however that ends.
    """
    out_dir = Path(options.out_dir)
    # one that is not there has nothing to resume: that is said later, and it is not made
    if not world.is_main or options.eval_only or (options.init_from == "resume" and not out_dir.is_dir()):
        yield
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    handle = _open_lock(out_dir / LOCK)
    try:
        _lock(handle, out_dir)
        yield
    finally:
        os.close(handle)


def _open_lock(path: Path) -> int:
    """Neither through a link, which may lead anywhere, nor waiting for the other end of a pipe."""
    inside(path)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is not a file.")
    return handle


def _lock(handle: int, out_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = printable(os.pread(handle, 300, 0).decode(errors="replace").strip(), 300)
        raise UserError(
            f"another run writes to {out_dir}: {holder}. Wait for it, end it, or choose another --out_dir."
        ) from None
    except OSError as error:
        why = f"its file system has no locks ({error.strerror})"
        print(f"nothing keeps a second run out of {out_dir}: {why}", file=sys.stderr)
    mine = f"host {socket.gethostname()}, process {os.getpid()}, begun {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    os.ftruncate(handle, 0)
    os.pwrite(handle, mine.encode(), 0)


def after_restart(world: World, options: TrainOptions) -> TrainOptions:
    """Where torchrun has started the ranks again (--max_restarts), the run goes on from its last whole checkpoint, whatever
    it began from. Checkpoints that lay in out_dir before it began are not its own; it was allowed to replace them."""
    mark, own, saved = Path(options.out_dir) / BEGUN, False, None
    again = any(world.gather(world.launch.restarts))  # the agents of several nodes count each for itself
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


# --- starting over --------------------------------------------------------------------------------------------------


def make_ready(out_dir: Path, resumed: bool) -> list[Path]:
    """Delete what saves that were broken off have left. Gives the checkpoints that go when this run has one of its own:
    those of an earlier run, where this one starts over."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for left in out_dir.glob(".step-*.tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    metrics, before = out_dir / METRICS, out_dir / BEFORE
    if before.is_file():
        before.replace(metrics)  # whoever started over here has saved nothing
    if resumed:
        return []
    old = steps(out_dir)
    if old or has_checkpoints(out_dir):
        metrics.touch()
        metrics.replace(before)
    return old


def point(path: Path, old: list[Path]) -> None:
    """This checkpoint is whole: `latest` names it, and what an earlier run has left goes."""
    out_dir = path.parent
    scratch = out_dir / f".{LATEST}.tmp"
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(path.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(out_dir / LATEST)
    (out_dir / BEFORE).unlink(missing_ok=True)
    sync_directory(out_dir)
    for left in old:
        if left != path:
            remove(left)
    old.clear()


def remove(path: Path) -> None:
    """Delete a checkpoint; what a kill leaves of it bears no checkpoint's name, and the next run deletes it."""
    scratch = path.with_name(f".{path.name}.tmp-old")
    shutil.rmtree(scratch, ignore_errors=True)
    path.rename(scratch)
    scratch.unlink() if scratch.is_symlink() else shutil.rmtree(scratch)

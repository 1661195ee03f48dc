"""Read files that may come from anywhere; write files and directories whole or not at all."""

import codecs
import contextlib
import ctypes
import json
import math
import os
import re
import select
import shutil
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from base.errors import UserError, as_user_error, printable, shown
from base.processes import is_running

SMALL = 1 << 25  # bytes that are read at once: the manifest of 100 ranks and 100 layers has 10 MB
PIPED = 1 << 28  # bytes of a text that comes through a pipe, such as <(zcat book.gz)
PIPE_S = 30.0  # seconds for which a pipe may give nothing
VALUES = 1 << 21  # in one JSON file: two bytes of it may take a hundred bytes of memory


# --- reading --------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """The file's text, see `decode_text`. UserError if it is unreadable, empty or not UTF-8. A pipe
    or a device may have no end: at most PIPED bytes are read, each within PIPE_S."""
    # O_NONBLOCK: it waits for no writer. Opened a second time, a pipe has lost its beginning
    flags = os.O_RDONLY | os.O_NONBLOCK
    with as_user_error(f"read {path}"), open(os.open(path, flags), "rb", buffering=0) as file:
        is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        raw = file.read() if is_file else b"".join(_piped(file, path))
    fetched(Path(path), raw)
    return decode_text(raw, str(path))


def _piped(file: FileIO, path: str | Path) -> Iterator[bytes]:
    left, instead = PIPED, "write the text into a file."
    while left >= 0:
        if not select.select([file], [], [], PIPE_S)[0]:
            raise UserError(f"nothing came out of {path} for {PIPE_S:g} s: {instead}")
        if not (piece := file.read(1 << 20)):
            return
        left -= len(piece)
        yield piece
    raise UserError(f"{path} is no file and has more than {PIPED:,} bytes: {instead}")


def decode_text(raw: bytes, where: str) -> str:
    """UTF-8 bytes as text, as nanoGPT reads it: every line ends in "\\n", a byte order mark is left
    out. UserError naming `where` if nothing is left or it is not UTF-8."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw:
        raise UserError(f"{where} is empty: it should hold text in UTF-8")
    try:
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        at = f"byte {error.start} cannot be decoded"
        raise UserError(f"{where} is not UTF-8 text ({at}): convert it first") from None


def inside(path: Path) -> Path:
    """The path itself. UserError if it is a link out of its directory: whoever unpacked the
    directory need not know of it. The hub's cache is made of links: from snapshots/COMMIT/ to the
    files in blobs/ beside it."""
    if not path.is_symlink():
        return path
    home = path.parent.resolve()
    homes = (home, home.parent.with_name("blobs")) if home.parent.name == "snapshots" else (home,)
    with contextlib.suppress(OSError, RuntimeError):  # links in a circle
        if any(path.resolve().is_relative_to(place) for place in homes):
            return path
    fault = "is a symbolic link that leads out of its directory"
    raise UserError(f"{path} {fault}: put what it stands for in its place.")


def own_file(path: Path) -> Path:
    """The path itself. UserError unless it is a file of its directory: a pipe would never end."""
    if not inside(path).is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}.")
    return fetched(path)


def fetched(path: Path, raw: bytes | None = None) -> Path:
    """The path itself. UserError if its content, or `raw`, is a pointer that git-lfs leaves."""
    if (beginning(path) if raw is None else raw).startswith(b"version https://git-lfs"):
        what = "a git-lfs pointer, not the file that it stands for"
        raise UserError(f"{path} is {what}: get that with `git lfs pull`.")
    return path


def beginning(path: Path, most: int = 64) -> bytes:
    """The first bytes of a file; b"" if it cannot be read, which reading all of it reports."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(most)
    return b""


def read_small(path: Path, most: int = SMALL) -> bytes:
    """The content of a file of such a directory. UserError if it has more than `most` bytes."""
    with as_user_error(f"read {path}"):
        size = own_file(path).stat().st_size
        if size > most:
            limit = f"more than the {most:,} that such a file may have"
            raise UserError(f"{path} has {size:,} bytes, {limit}.")
        return path.read_bytes()


def read_json(path: Path, most: int = SMALL) -> Any:
    """The value in a JSON file. UserError unless `read_small` and `json_of` take it."""
    try:
        return json_of(read_small(path, most))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({printable(str(error), 80)}).") from None


def json_of(raw: bytes) -> Any:
    """The value of JSON text. ValueError or RecursionError unless it is JSON as the standard has
    it: no key twice in an object, no NaN, no number beyond a float."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return made

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:20]} is no number")
        return value

    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    return json.loads(raw, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)


# --- writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: str | Path, note: str = "") -> Iterator[None]:
    """An OSError in the block names `path` if it names no file, and with a note in any case."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not note:
            raise
        raise OSError(error.errno, f"{error.strerror}{note}", str(path)) from error


@contextlib.contextmanager
def scratch_for(path: Path) -> Iterator[Path]:
    """A free name beside `path` to write to. Whatever has it at the end is deleted."""
    # two containers may share host name and process id
    mark = f"{os.uname().nodename}-{os.getpid()}-{os.urandom(8).hex()}"
    scratch = path.with_name(f".{path.name}.tmp-{mark}")
    try:
        yield scratch
    finally:
        with contextlib.suppress(OSError):
            _remove(scratch)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes of this host left beside `path`."""
    name = re.escape(f".{path.name}.tmp-{os.uname().nodename}-")
    for entry in path.parent.iterdir():
        found = re.fullmatch(name + "([1-9][0-9]{0,9})-[0-9a-f]{16}", entry.name)
        if found and not is_running(int(found[1])):
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes `path`'s place when the block ends well, else `path` stays as it is:
    a reader sees the whole old file or the whole new one."""
    with scratch_for(path) as scratch:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_directory(path.parent)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """`new_file` with UserError for OSError; a device, or where nothing can be made, in place."""
    place = Path(os.path.realpath(path))
    in_place = place.exists() and not (place.is_file() and os.access(place.parent, os.W_OK))
    with as_user_error(f"write {path}"), open(place, "wb") if in_place else new_file(place) as file:
        yield file


@contextlib.contextmanager
def growing(path: str | Path) -> Iterator[TextIO]:
    """A text file that can be read while it grows. If there is one already the new one grows as
    FILE.part, and takes its place when the block ends well."""
    place = Path(os.path.realpath(path))
    beside = place.is_file() and os.access(place.parent, os.W_OK)
    part = place.with_name(place.name + ".part") if beside else place
    with open(part, "w", encoding="utf-8") as file:
        yield file
    if beside:
        os.replace(part, place)


def write_json(path: Path, value: Any) -> None:
    """Write JSON and flush it to the disk, into a directory that nobody reads yet."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_directory(path: Path, force: bool, ours: str) -> Iterator[Path]:
    """A directory to fill that becomes `path` when the block ends well, else vanishes: `path` is
    whole or absent. UserError where `check_target` has one."""
    check_target(path, force, ours)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with naming(path, ", so it was not written"), scratch_for(path) as scratch:
        scratch.mkdir()
        yield scratch
        check_target(path, force, ours)  # it may have come meanwhile
        publish(scratch, path)


def check_target(path: Path, force: bool, ours: str) -> None:
    """UserError if `path` exists, unless `force` and it holds files that match `ours` alone."""
    if not path.exists():
        return
    if not force:
        raise UserError(f"{path} exists. Choose another place, or replace it with --force.")
    fault = "exists and is not a directory"
    if path.is_dir():
        entries = sorted(path.iterdir())
        foreign = [e for e in entries if not (e.is_file() and re.fullmatch(ours, e.name))]
        if not foreign:
            return
        fault = f"holds {shown(foreign[0].name)}, which this command does not write"
    raise UserError(f"{path} {fault}: not replaced, even with --force.")


def publish(scratch: Path, path: Path) -> None:
    """Give a finished directory its name; the one that had it is deleted only then."""
    sync_directory(scratch)
    if not path.exists():
        scratch.rename(path)
    elif not _swap(scratch, path):
        old = scratch.with_name(scratch.name + ".old")
        path.rename(old)
        try:
            scratch.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(scratch)
    sync_directory(path.parent)
    _remove(scratch)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(at_cwd, bytes(a), at_cwd, bytes(b), exchange)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries: without this a rename may be lost with the power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Reading files that may come from anywhere, and writing files that are never seen half done."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import select
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from base.errors import UserError, printable

SMALL = 1 << 25  # bytes of the largest file that is read whole: a manifest of 100 ranks and 100 layers has 10 MB
PIPED = 1 << 28  # bytes of a text that comes through a pipe, such as <(zcat book.gz)
PIPE_S = 30.0  # how long a pipe may give nothing
VALUES = 1 << 21  # in one JSON file: each may take a hundred bytes of memory where it took two of the file


def read_text(path: str | Path) -> str:
    """The file's text, see `decode_text`. UserError if unreadable, empty or not UTF-8.

    A pipe or a device may have no end: of those at most PIPED bytes are read, and waited for PIPE_S.
    """
    try:
        # an open that waits for nobody: a pipe may have no writer yet. And one only: its beginning can be read but once
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            raw = file.read() if is_file else _piped(file, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    check_no_pointer(path, raw)
    return decode_text(raw, str(path))


def _piped(file: FileIO, path: str | Path) -> bytes:
    raw = bytearray()
    while len(raw) <= PIPED:
        if not select.select([file], [], [], PIPE_S)[0]:
            raise UserError(f"nothing came out of {path} for {PIPE_S:g} s: write the text into a file.")
        if not (piece := file.read(1 << 20)):
            return bytes(raw)
        raw += piece
    raise UserError(f"{path} is no file and has more than {PIPED:,} bytes: write the text into a file.")


def decode_text(raw: bytes, where: str) -> str:
    """UTF-8 bytes as text, as nanoGPT reads it: every line ends in "\\n". A byte order mark is no
    text. UserError naming `where` if there is none or it is not UTF-8."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw:
        raise UserError(f"{where} is empty: it should hold text in UTF-8")
    try:
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start} cannot be decoded): convert it first") from None


def inside(path: Path) -> Path:
    """The path itself. UserError where it is a link that leads out of its directory, which who unpacked it need not know.

    The hub's cache is made of links: from snapshots/COMMIT/ to the files in blobs/ beside `snapshots`.
    """
    if not path.is_symlink():
        return path
    home = path.parent.resolve()
    homes = (home, home.parent.with_name("blobs")) if home.parent.name == "snapshots" else (home,)
    with contextlib.suppress(OSError, RuntimeError):  # links that lead in a circle
        if any(path.resolve().is_relative_to(place) for place in homes):
            return path
    raise UserError(f"{path} is a symbolic link that leads out of its directory: put what it stands for in its place.")


def own_file(path: Path) -> Path:
    """The path itself. UserError unless it is a file of its directory; a pipe, for one, would be waited for."""
    if not inside(path).is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}.")
    return fetched(path)


def fetched(path: Path) -> Path:
    """The path of a file. UserError where that is the pointer that git-lfs leaves in its place."""
    check_no_pointer(path, beginning(path))
    return path


def check_no_pointer(path: str | Path, raw: bytes) -> None:
    if raw.startswith(b"version https://git-lfs"):
        what = "a git-lfs pointer, not the file that it stands for"
        raise UserError(f"{path} is {what}: get that with `git lfs pull`.")


def beginning(path: Path, most: int = 64) -> bytes:
    """Of a file; b"" where it cannot be read, which who reads all of it will say."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(most)
    return b""


def read_small(path: Path, most: int = SMALL) -> bytes:
    """The content of a file of a directory that may come from anywhere. UserError names it and the fault, which may be that
    it has more than `most` bytes."""
    try:
        size = own_file(path).stat().st_size
        if size > most:
            raise UserError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path, most: int = SMALL) -> Any:
    """The content of a JSON file. UserError unless `read_small` takes it and it is JSON as the standard has it: no key twice
    in an object, no NaN, no number beyond a float."""
    try:
        return json_of(read_small(path, most))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({printable(str(error), 80)}).") from None


def json_of(raw: bytes) -> Any:
    """The value that JSON stands for. ValueError or RecursionError where it is none, see `read_json`."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    return json.loads(raw, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number")
    return value


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError within names the file where it names none: a full disk is not said to be that of a
    file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new binary file that takes `path`'s place when the block ends well; else `path` stays as it was.

    A reader sees the whole old file or the whole new one. What is no file (a pipe, /dev/stdout), or stands where no other
    may be made, is written to as it is.
    """
    place = Path(os.path.realpath(path))
    in_place = place.exists() and not (place.is_file() and os.access(place.parent, os.W_OK))
    # no process id: two containers may share one
    beside = place.with_name(f".{place.name}.{os.urandom(8).hex()}.tmp")
    temporary = place if in_place else beside
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if place.is_file() or not in_place:
                os.fsync(file.fileno())
        if not in_place:
            os.replace(temporary, place)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if not in_place:
            with contextlib.suppress(OSError):  # already renamed, or never made
                temporary.unlink()


@contextlib.contextmanager
def growing(path: str | Path) -> Iterator[TextIO]:
    """A text file that grows under `path`. Where a file is there already the new one grows as FILE.part, and takes its place
    when the block ends well."""
    place = Path(os.path.realpath(path))
    part = place.with_name(place.name + ".part") if place.is_file() and os.access(place.parent, os.W_OK) else place
    with open(part, "w", encoding="utf-8") as file:
        yield file
    if part != place:
        os.replace(part, place)

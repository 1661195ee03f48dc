"""Reading text a user names, and writing files that are never seen half done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from errors import UserError


def read_text(path: str | Path) -> str:
    """The file's text, exactly as stored (line ends too). UserError if unreadable, empty or not UTF-8."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return decode_text(raw, str(path))


def decode_text(raw: bytes, where: str) -> str:
    """UTF-8 bytes as text; UserError naming `where` if there are none or they are not UTF-8."""
    if not raw:
        raise UserError(f"{where} is empty: it should hold text in UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start} cannot be decoded): convert it first") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new binary file that takes `path`'s place when the block ends well; else `path` stays as it was.

    A reader (a training run that has the old file mapped, say) sees the whole old file or the whole new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never made
            temporary.unlink()

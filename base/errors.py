"""Exceptions that are not bugs of this program, and how a message quotes a wrong value."""

import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# from the messages of torch (for a GPU and for the host), the system, and Python (for a thread)
OUT_OF_MEMORY = re.compile("(?i)out of memory|defaultcpuallocator|cannot allocate memory|"
                           "can't start new thread")  # fmt: skip


class UserError(Exception):
    """A mistake of the user's: one line on standard error, exit status 2, no traceback. The message
    names the mistake and what to do. `--debug=True` adds the traceback."""


class Unavailable(Exception):
    """Something cannot be used on this machine. The message, for the user, says why."""


class Stopped(Exception):
    """A run ended early and in good order, because it was asked to. status: the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class ReaderGone(Exception):
    """Nothing reads standard output any more, as after `| head`."""


@contextmanager
def in_file(path: object) -> Iterator[None]:
    """A UserError from the block begins with the file that has the mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """An OSError from the block is the user's mistake; what: what cannot be done then."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {what}: {error.strerror or error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception class for a GPU's memory; for the host's it has only a message."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def explaining_memory(need: Callable[[], str]) -> Iterator[None]:
    """Add what the run needs, `need()`, to an out-of-memory error raised inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            error.add_note(need())
        raise


def first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def shown(value: Any) -> str:
    """A wrong value as a message quotes it: one line, shortened."""
    return " ".join(reprlib.repr(value).split())


def printable(text: str, most: int = 100) -> str:
    """The first `most` characters of a text from a file, safe to print on a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:most])

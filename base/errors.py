"""The exceptions that are no fault of the program's, and how a message quotes a value that is wrong."""

import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# as torch says it of a GPU and of the host, the system, and Python of a thread
OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "cannot allocate memory", "can't start new thread")


class UserError(Exception):
    """A mistake the user can mend: shown as one line on standard error, exit status 2, no traceback.

    The message names what is wrong and what to do; `--debug=True` shows the traceback as well.
    """


class Unheard(UserError):
    """One that a rank alone can tell, as it reaches no other."""


class Stopped(Exception):
    """A run that ended early because it was told to, in good order; its text is for the terminal. status: the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class ReaderGone(Exception):
    """Whoever read standard output has gone, as `| head` does when it has seen enough."""


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for a GPU's memory, and for the host's a message only."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


@contextmanager
def explaining_memory(need: Callable[[], str]) -> Iterator[None]:
    """Within, an error for want of memory is told with what the run needs."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            error.add_note(need())
        raise


def print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def shown(value: Any) -> str:
    """A wrong value as a message quotes it: on one line, and neither long nor deep."""
    return " ".join(reprlib.repr(value).split())


def printable(text: str, most: int = 100) -> str:
    """The beginning of a text that a file brought, fit for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:most])

"""The exceptions that are no fault of the program's, and how a message quotes a value that is wrong."""

import reprlib
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: shown as one line on standard error, exit status 2, no traceback.

    The message names what is wrong and what to do; `--debug=True` shows the traceback as well.
    """


class Stopped(Exception):
    """A run that ended early because it was told to, in good order; its text is for the terminal. status: the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class ReaderGone(Exception):
    """Whoever read standard output has gone, as `| head` does when it has seen enough."""


def shown(value: Any) -> str:
    """A wrong value as a message quotes it: on one line, and neither long nor deep."""
    return " ".join(reprlib.repr(value).split())


def printable(text: str, most: int = 100) -> str:
    """The beginning of a text that a file brought, fit for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:most])

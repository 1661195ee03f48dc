"""Standard output and standard error as every command has them.

A console that cannot show a character shows its number. On a terminal control characters of the
text are shown too, not obeyed: a vocabulary or a prompt may come from anywhere. A file or a pipe
gets the text as it is. Whoever reads may leave (`| head`): that ends a command quietly.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from base.errors import ReaderGone

CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


class Output(io.TextIOWrapper):
    """Standard output on the bytes of `stream`. ReaderGone where nobody reads any more; OSError
    names it where it cannot be written. After either it takes what is written, and drops it."""

    def __init__(self, stream: Any):
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        super().__init__(stream.buffer, stream.encoding, "backslashreplace", **how)
        self._stream = stream  # that closes the bytes where it is forgotten
        self._shows = self.isatty()

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def write(self, text: str) -> int:
        with self._heard():
            super().write(text.translate(CONTROLS) if self._shows else text)
        return len(text)

    def flush(self) -> None:
        with self._heard():
            super().flush()

    def close(self) -> None:
        """The bytes are another's to close."""
        self.flush()

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _drop(self.fileno())
            if self._shows and error.errno == errno.EIO:  # a terminal that has been closed
                return
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from None
            raise OSError(error.errno, error.strerror, "standard output") from None


class Errors(Output):
    """Standard error: where that cannot be written there is nobody to tell. Bars move the cursor."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._shows = False

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield


def _drop(number: int) -> None:
    """Let the descriptor take what is written to it, and drop it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Within, sys.stdout and sys.stderr are these."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _opened(sys.stdout, 1, Output), _opened(sys.stderr, 2, Errors)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _opened(stream: Any, number: int, kind: type[Output]) -> Any:
    if stream is None:  # it was closed before Python began (`2>&-`)
        with contextlib.suppress(OSError):
            os.fstat(number)  # another file may have its number by now
            return open(os.devnull, "w")
        _drop(number)
        return open(os.devnull, "w")
    return kind(stream) if hasattr(stream, "buffer") else stream

"""Standard output and standard error of every command.

A character that the console cannot show is shown by its number. Texts may come from anywhere, so a
terminal shows their control characters instead of obeying them; files and pipes get the text
unchanged. When nothing reads standard output any more (`| head`) the command ends quietly."""

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from base.errors import ReaderGone, UserError, print_error

CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


class Output(io.TextIOWrapper):
    """Standard output, on the bytes of `stream`. Raises ReaderGone if nothing reads it, OSError
    with the file name "standard output" if writing fails. After either, everything written is
    discarded."""

    def __init__(self, stream: Any):
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        super().__init__(stream.buffer, stream.encoding, "backslashreplace", **how)
        self._stream = stream  # keeps the bytes open: the stream closes them when it is collected
        self._escapes = type(self) is Output and self.isatty()

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def write(self, text: str) -> int:
        with self._translating_errors():
            super().write(text.translate(CONTROLS) if self._escapes else text)
        return len(text)

    def flush(self) -> None:
        with self._translating_errors():
            super().flush()

    def close(self) -> None:
        """Only flush: `stream` owns the bytes."""
        self.flush()

    @contextlib.contextmanager
    def _translating_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _discard(self.fileno())
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from None
            if not (self._escapes and error.errno == errno.EIO):  # EIO: the terminal was closed
                raise OSError(error.errno, error.strerror, "standard output") from None


class Errors(Output):
    """Standard error. Failing to write it raises nothing. Not escaped: bars move the cursor."""

    @contextlib.contextmanager
    def _translating_errors(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield


def _discard(descriptor: int) -> None:
    """Connect the descriptor to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr by an Output and an Errors inside the block. The garbage
    collector runs from now on (see quick_start.py)."""
    gc.enable()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _wrapped(sys.stdout, 1, Output), _wrapped(sys.stderr, 2, Errors)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _wrapped(stream: Any, descriptor: int, kind: type[Output]) -> Any:
    if stream is not None:
        return kind(stream) if hasattr(stream, "buffer") else stream
    try:  # the stream was closed before Python started (`2>&-`)
        os.fstat(descriptor)  # succeeds if another file has this number by now
    except OSError:
        _discard(descriptor)
    return open(os.devnull, "w")


def run(parsed: Callable[[], tuple[Callable[[Any], object], Any]], prog: str = "") -> int:
    """Run a command of one process; parsed: gives its function and its options. Returns the exit
    status (docs/how_it_works.md); if that is not 0 a line of standard error says why."""
    options = None
    with console():
        try:
            main, options = parsed()
            main(options)
            sys.stdout.flush()  # here it is noticed if the reader has gone
            return 0
        except ReaderGone:  # `inspect | head`
            return 128 + signal.SIGPIPE  # as a program that SIGPIPE ends
        except UserError as error:
            if getattr(options, "debug", False):
                raise
            status, message = 2, f"{prog or 'error'}: {error}"
        except OSError as error:
            where = f"{prog or 'error'}: {error.filename or 'output'}"
            status, message = 1, f"{where}: {error.strerror}"
        except KeyboardInterrupt:
            status, message = 130, f"{prog}: stopped by Ctrl-C".removeprefix(": ")
        print_error(message)
        return status

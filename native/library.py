"""A file of C as a library: compiled when first used (a fraction of a second) and kept in the user's cache."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# no -ffast-math: sums keep the order that is written down, and what is not a number stays so
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")


COMPILE_S = 30.0  # a fraction of a second where nothing is wrong


class Unavailable(Exception):
    """Why something native cannot be had on this machine; the message is for the user."""


def load(name: str) -> ctypes.CDLL:
    """native/NAME.c, compiled for this processor. Unavailable without a compiler, or where its work cannot be loaded."""
    source = Path(__file__).with_name(f"{name}.c")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise Unavailable("there is no C compiler (cc, gcc or clang)")
    made_of = source.read_bytes() + "\0".join([_processor(), compiler, *FLAGS]).encode()
    with _cache() as place:
        path = place / f"{name}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
        if not path.exists():
            _compile(compiler, source, path)
        return _open(path)


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded ({error})") from None


def _processor() -> str:
    """What -march=native depends on: a cache may be shared between hosts."""
    found = platform.machine() + platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        found += next((line for line in info if line.startswith(("flags", "Features"))), "")
    return found


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """Where compiled libraries are kept: the user's cache; where there is none, a directory for as long as it takes to
    load one (what is loaded stays, though its file has gone)."""
    place = _users_cache()
    if place is not None:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="nanotp-") as scratch:
        yield Path(scratch)


def _users_cache() -> Path | None:
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanotp"
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        # what others may write to is no place to load code from
        if os.access(place, os.W_OK) and place.stat().st_uid == os.getuid():
            return place
    return None


def _compile(compiler: str, source: Path, path: Path) -> None:
    """Under a name of its own first: ranks may compile at once, and a library that exists is whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    command = [*compiler.split(), *FLAGS, "-o", str(scratch), str(source), "-lm"]
    try:
        status, said = _run(command)
        if status:
            first = next((line for line in said.splitlines() if "error" in line), "no message")
            raise Unavailable(f"{compiler} failed: {first[:120]}")
        scratch.replace(path)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{compiler} did not end within {COMPILE_S:g} s") from None
    except OSError as error:
        raise Unavailable(f"{compiler} could not be run ({error})") from None
    finally:
        scratch.unlink(missing_ok=True)


def _run(command: list[str]) -> tuple[int, str]:
    """(exit status, standard error). One that takes too long is killed with all that it has started, as a compiler does."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            said = run.communicate(timeout=COMPILE_S)[1]
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            raise
        return run.returncode, said

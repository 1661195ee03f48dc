"""Compile a C file on first use (about two seconds) and keep the library in the user's cache.

A library runs with the user's rights. So one from the cache is loaded only if nobody else can have
written it, and only if its SHA-256 is the one in its name."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from base.errors import Unavailable, printable
from base.files import new_file

# no -ffast-math: it would reorder sums and assume that there are no NaNs
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
COMPILE_S = 20.0  # a compiler that takes longer hangs


def load(source: Path, *included: Path) -> ctypes.CDLL:
    """The C file as a library for this processor. Unavailable without a working compiler."""
    found = filter(None, map(shutil.which, ("cc", "gcc", "clang")))
    if not (compiler := os.environ.get("CC") or next(found, None)):
        raise Unavailable("there is no C compiler (cc, gcc or clang)")
    texts = b"".join(path.read_bytes() for path in (source, *included))
    made_of = texts + "\0".join([_processor(), compiler, *FLAGS]).encode()
    stem = f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}"
    cache = _users_cache()
    try:
        kept = cache and _load_kept(cache[1], stem)
        return kept or _load_new(compiler, source, stem, cache and cache[1])
    except OSError as error:
        raise Unavailable(f"{source.name} cannot be compiled and loaded ({error})") from None
    finally:
        if cache:
            os.close(cache[0])


def _load_new(compiler: str, source: Path, stem: str, cache: str | None) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="nanotp-") as scratch:
        made = Path(scratch) / f"{stem}.so"
        _compile(compiler, source, made)
        content = made.read_bytes()
        kept = f"{cache}/{stem}-{hashlib.sha256(content).hexdigest()}.so"
        if cache:
            with contextlib.suppress(OSError):  # the cache is full, or mounted noexec
                with new_file(Path(kept)) as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.write(content)
                return ctypes.CDLL(kept)
        return ctypes.CDLL(str(made))  # stays loaded when the file is deleted


def _compile(compiler: str, source: Path, made: Path) -> None:
    command = [*compiler.split(), *FLAGS, "-o", str(made), str(source), "-lm"]
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True, errors="replace",
                                 start_new_session=True)  # fmt: skip
    except OSError as error:
        raise Unavailable(f"{compiler} could not be run ({error})") from None
    try:
        messages = child.communicate(timeout=COMPILE_S)[1]
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{compiler} did not come to an end within {COMPILE_S:g} s") from None
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)  # the compiler and its child processes
            child.communicate()
    if child.returncode:
        faults = [line for line in messages.splitlines() if "error" in line] or ["no message"]
        raise Unavailable(f"{compiler} failed: {printable(faults[0], 120)}")


def _processor() -> str:
    """The processor that -march=native compiles for: hosts may share a cache."""
    found = platform.machine() + platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        found += next((line for line in info if line.startswith(("flags", "Features"))), "")
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found += subprocess.check_output(command, text=True, timeout=COMPILE_S)
    return found


def _users_cache() -> tuple[int, str] | None:
    """The cache directory, open, and a path through it; None if a link, or others can write."""
    handle = -1
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanotp"
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        _check_ours(handle)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        if handle >= 0:
            os.close(handle)
        return None
    # a path through the descriptor leads to the checked directory, whatever gets its name later
    path = f"/proc/self/fd/{handle}"
    return handle, path if os.path.isdir(path) else str(place)


def _check_ours(handle: int) -> None:
    """OSError if anyone but this user can write to the open file or directory."""
    found = os.fstat(handle)
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others may write there")


def _load_kept(cache: str, stem: str) -> ctypes.CDLL | None:
    """The library from the cache. Deletes a damaged one: loading it could crash the process."""
    for path in sorted(Path(cache).glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                _check_ours(handle)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if path.name == f"{stem}-{digest}.so":
                return ctypes.CDLL(str(path))
            path.unlink()
    return None

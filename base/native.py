"""A file of C as a library: compiled when first used (a fraction of a second), and kept in the
user's cache.

What is loaded runs with the user's rights. So a kept library is used only where nobody else can
have written it, and only whole: its name has its digest, made when it was compiled.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from base.errors import printable

# no -ffast-math: sums keep the order that is written down, and what is not a number stays so
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
COMPILE_S = 20.0  # a compiler that takes longer hangs


class Unavailable(Exception):
    """Why something native cannot be had on this machine; the message is for the user."""


class Cache(NamedTuple):
    """A directory of kept libraries: its descriptor, and a path that leads to what that is of."""

    handle: int
    path: str


def load(source: Path) -> ctypes.CDLL:
    """A file of C, compiled for this processor. Unavailable without a compiler, or where its work
    cannot be loaded."""
    compiler = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    if not compiler:
        raise Unavailable("there is no C compiler (cc, gcc or clang)")
    made_of = source.read_bytes() + "\0".join([_processor(), compiler, *FLAGS]).encode()
    stem = f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}"
    cache = _users_cache()
    try:
        return (cache and _load_kept(cache, stem)) or _load_new(compiler, source, stem, cache)
    except OSError as error:
        raise Unavailable(f"{source.name} cannot be compiled and loaded ({error})") from None
    finally:
        if cache is not None:
            os.close(cache.handle)


def _load_new(compiler: str, source: Path, stem: str, cache: Cache | None) -> ctypes.CDLL:
    """Compiled in a temporary directory and kept in the cache; the former serves where the latter
    is full, or runs nothing."""
    with tempfile.TemporaryDirectory(prefix="nanotp-") as scratch:
        made = Path(scratch) / f"{stem}.so"
        _compile(compiler, source, made)
        if cache is not None:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(f"{cache.path}/{_keep(cache, stem, made.read_bytes())}")
        return ctypes.CDLL(str(made))  # what is loaded stays, though its file goes


def _compile(compiler: str, source: Path, made: Path) -> None:
    command = [*compiler.split(), *FLAGS, "-o", str(made), str(source), "-lm"]
    try:
        # a session of its own: what the compiler has started ends with it
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"{compiler} could not be run ({error})") from None
    try:
        said = child.communicate(timeout=COMPILE_S)[1].decode(errors="replace")
    except BaseException as error:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"{compiler} did not come to an end within {COMPILE_S:g} s") from None
        raise
    if child.returncode:
        faults = [line for line in said.splitlines() if "error" in line] or ["no message"]
        raise Unavailable(f"{compiler} failed: {printable(faults[0], 120)}")


def _processor() -> str:
    """What -march=native depends on: a cache may be shared between hosts."""
    found = platform.machine() + platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        found += next((line for line in info if line.startswith(("flags", "Features"))), "")
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found += subprocess.check_output(
                ["sysctl", "-n", "machdep.cpu.brand_string"], text=True, timeout=COMPILE_S
            )
    return found


# --- the cache ------------------------------------------------------------------------------------


def _users_cache() -> Cache | None:
    """Where libraries are kept; None where that cannot be, is a link, or others may write there."""
    handle = -1
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanotp"
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        _check_ours(handle)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        if handle >= 0:
            os.close(handle)
        return None
    # what was checked is what is loaded from: the name may come to stand for another directory
    through = f"/proc/self/fd/{handle}"
    return Cache(handle, through if os.path.isdir(through) else str(place))


def _check_ours(handle: int) -> None:
    """OSError unless nobody but this user can write to what is open there."""
    found = os.fstat(handle)
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others may write there")


def _load_kept(cache: Cache, stem: str) -> ctypes.CDLL | None:
    """The library if it is there, whole and this user's. A damaged one goes: to load it would end
    the process."""
    for name in sorted(os.listdir(cache.handle)):
        found = re.fullmatch(re.escape(stem) + r"-([0-9a-f]{64})\.so", name)
        if not found:
            continue
        with contextlib.suppress(OSError):
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=cache.handle)
            with open(handle, "rb") as file:
                _check_ours(handle)
                whole = hashlib.file_digest(file, "sha256").hexdigest() == found[1]
            if whole:
                return ctypes.CDLL(f"{cache.path}/{name}")
            os.unlink(name, dir_fd=cache.handle)
    return None


def _keep(cache: Cache, stem: str, content: bytes) -> str:
    """The name under which the library is in the cache now. OSError where it cannot be kept."""
    name = f"{stem}-{hashlib.sha256(content).hexdigest()}.so"
    scratch = (
        f".{name}.{os.urandom(8).hex()}"  # no process id: two containers may share the directory
    )
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=cache.handle)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.rename(scratch, name, src_dir_fd=cache.handle, dst_dir_fd=cache.handle)
    except OSError:
        os.unlink(scratch, dir_fd=cache.handle)
        raise
    return name

"""Compiled libraries: whose work is loaded, what a damaged or missing cache costs, and a compiler that hangs."""

import ctypes
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from base import native
from base.errors import Unavailable
from base.processes import is_running
from inference import packed
from parallel.shm import SOURCE


class Compiler:
    """A compiler that copies the real one's work, and counts how often it was asked."""

    def __init__(self, directory: Path, made: Path):
        self.path, self._asked = directory / "cc", directory / "asked"
        lines = [
            "#!/bin/sh",
            f'echo >> "{self._asked}"',
            'while [ "$1" != -o ]; do shift; done',
            f'cp "{made}" "$2"',
        ]
        self.path.write_text("\n".join(lines) + "\n")
        self.path.chmod(0o755)

    @property
    def runs(self) -> int:
        return self._asked.read_text().count("\n") if self._asked.exists() else 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "shm.so"
    native._compile("cc", SOURCE, place)
    return place


@pytest.fixture
def compiler(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """In the environment, with an empty cache at tmp_path / "nanotp"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = Compiler(tmp_path, made)
    monkeypatch.setenv("CC", str(found.path))
    return found


def works() -> bool:
    return bool(native.load(SOURCE).nanotp_move)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "nanotp").iterdir())


def test_a_library_is_compiled_once(compiler: Compiler, tmp_path: Path) -> None:
    assert works() and works() and compiler.runs == 1
    (only,) = kept(tmp_path)
    assert only.name.startswith("shm-") and stat.S_IMODE(only.stat().st_mode) == 0o600


def test_libraries_that_follow_each_other_through_one_descriptor_are_not_taken_for_each_other() -> (
    None
):
    """The C library knows a library by the name that it was loaded by."""
    for name, function, other in [
        (SOURCE, "nanotp_move", "nanotp_product"),
        (packed.SOURCES[0], "nanotp_product", "nanotp_move"),
    ]:
        found = native.load(name)
        assert hasattr(found, function) and not hasattr(found, other)


# --- what others may have written -----------------------------------------------------------------------------------


def _mode(mode: int) -> Callable[[Path, Any], None]:
    return lambda place, monkeypatch: place.chmod(mode)


def _anothers(place: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)


def _a_link(place: Path, monkeypatch: Any) -> None:
    place.rename(place.with_name("elsewhere"))
    place.symlink_to("elsewhere")


def _a_file(place: Path, monkeypatch: Any) -> None:
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    place.write_text("")


@pytest.mark.parametrize(
    "spoil", [_mode(0o777), _mode(0o1777), _mode(0o770), _anothers, _a_link, _a_file]
)
def test_a_cache_that_others_may_have_written_is_not_used(
    spoil: Callable[[Path, Any], None],
    compiler: Compiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert works()
    spoil(tmp_path / "nanotp", monkeypatch)
    assert native._users_cache() is None
    assert works() and compiler.runs == 2


def test_a_directory_that_takes_the_caches_name_meanwhile_is_not_used(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert works()
    place, check = tmp_path / "nanotp", native._check_ours

    def swapped(handle: int) -> None:
        check(handle)
        if place.is_dir():
            place.rename(tmp_path / "moved away")
            (tmp_path / "nanotp").write_text("a stranger's")

    monkeypatch.setattr(native, "_check_ours", swapped)
    assert works() and compiler.runs == 1


# --- what is damaged ------------------------------------------------------------------------------------------------


def _with(content_of: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = path.read_bytes()
        path.unlink()  # this process has it loaded
        path.write_bytes(content_of(content))

    return spoil


def _changed(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def _writable(path: Path) -> None:
    path.chmod(0o666)


def _linked(path: Path) -> None:
    path.rename(path.with_name("other.so"))
    path.symlink_to("other.so")


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        _with(lambda content: content[:5000]),
        _with(lambda _: b""),
        _with(_changed),
        _writable,
        _linked,
        _a_pipe,
    ],
)
def test_a_kept_library_that_is_not_what_was_compiled_is_compiled_again(
    spoil: Callable[[Path], None], compiler: Compiler, tmp_path: Path
) -> None:
    assert works()
    spoil(kept(tmp_path)[0])
    assert works() and compiler.runs == 2
    assert works() and compiler.runs == 2


# --- places that do not serve ---------------------------------------------------------------------------------------


def test_where_the_cache_is_full_the_temporary_directory_serves(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Any, **handles: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert works() and kept(tmp_path) == []


@pytest.mark.parametrize("refused", ["/proc/self/fd/", tempfile.gettempdir()])
def test_where_one_place_runs_nothing_the_other_serves(
    refused: str, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system that is mounted noexec answers."""
    load, loaded = ctypes.CDLL, list[str]()

    def picky(path: str) -> ctypes.CDLL:
        if path.startswith(refused):
            raise OSError(f"{path}: failed to map segment from shared object")
        loaded.append(path)
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", picky)
    assert works() and works() and len(loaded) == 2


def test_where_no_place_serves_it_is_said(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str) -> ctypes.CDLL:
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refused)
    with pytest.raises(
        Unavailable, match=r"^shm\.c cannot be compiled and loaded \(failed to map segment"
    ):
        native.load(SOURCE)


def test_processors_without_a_list_of_their_flags_have_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Apple's: machine and processor are arm64 and arm on all of them."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(
        native.subprocess, "check_output", lambda command, **how: f"{command[-1]} Apple M2\n"
    )
    assert native._processor().endswith("machdep.cpu.brand_string Apple M2\n")


# --- compilers ------------------------------------------------------------------------------------------------------


def test_a_compiler_that_hangs_is_ended_with_what_it_has_started(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "child"
    compiler.path.write_text(
        f"#!/bin/sh\nsleep 300 & echo $! > {mark}.new; mv {mark}.new {mark}; wait\n"
    )
    monkeypatch.setattr(native, "COMPILE_S", 0.01)

    def hung(command: Any, **how: Any) -> Any:
        child = started(command, **how)
        while not mark.exists():
            time.sleep(0.005)
        return child

    started = native.subprocess.Popen
    monkeypatch.setattr(native.subprocess, "Popen", hung)
    with pytest.raises(Unavailable, match="cc did not come to an end within 0.01 s$"):
        native.load(SOURCE)
    end = time.monotonic() + 10
    while is_running(int(mark.read_text())) and time.monotonic() < end:
        time.sleep(0.005)
    assert not is_running(int(mark.read_text()))

"""Texts from pipes and devices, and files that are replaced."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from base import files
from base.errors import UserError
from base.files import naming, read_text, replacing


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom"])
def test_a_text_without_an_end_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIPED", 1 << 21)
    with pytest.raises(UserError) as error:
        read_text(device)
    assert str(error.value) == f"{device} is no file and has more than 2,097,152 bytes: write the text into a file."


@pytest.mark.parametrize("holds", [False, True], ids=["no writer", "a silent writer"])
def test_a_pipe_that_gives_nothing_is_waited_for_no_longer_than_the_limit(
    holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIPE_S", 0.05)
    os.mkfifo(tmp_path / "pipe")
    held = os.open(tmp_path / "pipe", os.O_RDWR) if holds else os.open(os.devnull, os.O_RDONLY)
    try:
        with pytest.raises(UserError) as error:
            read_text(tmp_path / "pipe")
    finally:
        os.close(held)
    said = f"nothing came out of {tmp_path / 'pipe'} for 0.05 s: write the text into a file."
    assert str(error.value) == said


def test_a_pipe_is_read_to_its_end_whoever_comes_first(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        time.sleep(0.05)
        with open(tmp_path / "pipe", "w", encoding="utf-8") as pipe:
            for word in ("One, ", "two, ", "drei é\r\n"):
                pipe.write(word)
                pipe.flush()
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_text(tmp_path / "pipe") == "One, two, drei é\n"
    writer.join()


def test_a_file_may_be_larger_than_what_is_read_from_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIPED", 10)
    (tmp_path / "file").write_text("x" * 1000)
    assert read_text(tmp_path / "file") == "x" * 1000


def _a_directory(place: Path) -> None:
    place.mkdir()


def _an_empty_file(place: Path) -> None:
    place.write_text("")


def _nothing(place: Path) -> None:
    pass


@pytest.mark.parametrize(
    "make, message",
    [
        (_a_directory, "cannot read {}: Is a directory"),
        (_an_empty_file, "{} is empty: it should hold text in UTF-8"),
        (_nothing, "cannot read {}: No such file or directory"),
    ],
)
def test_what_cannot_be_read_is_named(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "text")
    with pytest.raises(UserError) as error:
        read_text(tmp_path / "text")
    assert str(error.value) == message.format(tmp_path / "text")


def test_two_containers_that_share_a_directory_replace_no_scratch_file_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their processes may have one number, and their hosts one name."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        assert first.name != second.name
        first.write(b"first")
        second.write(b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"  # it was ready last


def test_a_full_disk_names_the_file() -> None:
    for path, named in (("/dev/full", "/dev/full"), ("/dev/full/x", "/dev/full/x")):
        with pytest.raises(OSError) as error, naming(path), open(path, "w") as file:
            file.write("x")
        assert error.value.filename == named

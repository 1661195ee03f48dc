"""What a console shows, and how a command ends whose output nobody reads or no disk takes."""

import errno
import io
import json
import os
import pty
import subprocess
import sys
import termios
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import PYTHON
from test_entry import launch, spoken

import sample_tp
import shard_checkpoint
import train_tp
from base.console import Errors, Output, run
from base.errors import ReaderGone, UserError
from checkpoints.sources import latest_checkpoint
from cli.grammar import parse, parse_command
from cli.options import SampleOptions, SplitOptions, TrainOptions
from text.dataset import split_and_write
from text.tokenizer import CharTokenizer
from train import dry_run
from world.mesh import World

ROOT = Path(__file__).parent.parent
HOSTILE = "a\x1b]0;title\x07b\x9b2Jc\rd\x7fe\x00\u00e9\n\tf"


def text_on(path: int | Path | str, encoding: str = "utf-8") -> io.TextIOWrapper:
    return open(path, "w", encoding=encoding)


def no_reader() -> io.TextIOWrapper:
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    return text_on(write)


# --- what is shown --------------------------------------------------------------------------------


def seen_on_a_terminal(kind: type[Output], text: str) -> str:
    mine, theirs = pty.openpty()
    tty.setraw(theirs, termios.TCSANOW)  # or the terminal would turn \n into \r\n
    with os.fdopen(mine, "rb", buffering=0) as screen, text_on(theirs) as stream:
        print(text, end="", file=kind(stream), flush=True)
        return screen.read(1000).decode()


def test_a_terminal_shows_control_characters_and_obeys_none() -> None:
    shown = r"a\x1b]0;title\x07b\x9b2Jc\x0dd\x7fe\x00é" + "\n\tf"
    assert seen_on_a_terminal(Output, HOSTILE) == shown
    assert (
        seen_on_a_terminal(Errors, "\rbar\x1b[A") == "\rbar\x1b[A"
    )  # progress bars move the cursor


def test_files_and_pipes_get_the_text_as_it_is(tmp_path: Path) -> None:
    with text_on(tmp_path / "file") as stream:
        print(HOSTILE, end="", file=Output(stream), flush=True)
    assert (tmp_path / "file").read_bytes() == HOSTILE.encode()
    read, write = os.pipe()
    with open(read, "rb") as reader:
        with text_on(write) as stream:
            print(HOSTILE, end="", file=Output(stream), flush=True)
        assert reader.read() == HOSTILE.encode()


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("ascii", rb"\xe9 \u8a9e \U0001f600"),
        ("latin-1", b"\xe9 \\u8a9e \\U0001f600"),
        ("cp1252", b"\xe9 \\u8a9e \\U0001f600"),
    ],
)
@pytest.mark.parametrize("kind", [Output, Errors])
def test_a_character_that_a_console_cannot_show_is_shown_as_its_number(
    kind: type[Output], encoding: str, shown: bytes, tmp_path: Path
) -> None:
    with text_on(tmp_path / "file", encoding) as stream:
        print("é 語 😀", end="", file=kind(stream), flush=True)
    assert (tmp_path / "file").read_bytes() == shown


def test_a_reader_who_has_gone_is_told_of_once_and_a_full_disk_by_name() -> None:
    out = Output(no_reader())
    with pytest.raises(ReaderGone):
        print("x", file=out, flush=True)
    print("y", file=out, flush=True)
    out = Output(text_on("/dev/full"))
    with pytest.raises(OSError) as error:
        print("x", file=out, flush=True)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "standard output")
    print("y", file=out, flush=True)


@pytest.mark.parametrize("place", [no_reader, lambda: text_on("/dev/full")])
def test_standard_error_that_cannot_be_written_stops_nobody(place: Callable[[], Any]) -> None:
    for _ in range(3):
        print("x" * 10_000, file=Errors(place()), flush=True)


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_what_was_closed_is_there_and_no_other_file_takes_its_number(
    closed: str, tmp_path: Path
) -> None:
    script = (
        f"import gc, os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import base.quick_start\n"
        "from base.console import console\n"
        "assert not gc.isenabled()\n"
        "with console():\n"
        "    assert gc.isenabled() and not sys.stdout.isatty() and not sys.stderr.isatty()\n"
        "    print('out'); print('err', file=sys.stderr)\n"
        f"    assert os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY) > 2\n"
        "    os.write(1, b''); os.write(2, b'')\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = f'"{PYTHON}" "{tmp_path}/script.py" {closed}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (tmp_path / "done").exists(), done
    assert (done.returncode, done.stdout + done.stderr) == (
        0,
        "out\n" if closed == "2>&-" else "err\n" if closed == "1>&-" else "",
    )


# --- commands -------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "dataset": "letters", "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "batch_size": 2,
    "gradient_accumulation_steps": 2, "max_iters": 2, "eval_interval": 2, "eval_iters": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dataset, and a model of it in `out`."""
    place = tmp_path_factory.mktemp("home")
    text = "".join("abcdefg\né"[i * 7 % 9] for i in range(2000))
    split_and_write(place / "data" / "letters", text, CharTokenizer.of_text(text))
    ends = launch(1, _trained(place, "out"), place, ["--device=cpu"])
    assert ends == [(0, "")]
    return place


def _trained(home: Path, out: str, stdout: Callable[[], Any] = io.StringIO, **changes: Any) -> Any:
    """What trains on each rank, with this standard output."""

    def main(world: World, options: Any) -> None:
        where = {"data_dir": str(home / "data"), "out_dir": str(home / out)}
        made = stdout()
        sys.stdout = Output(made) if hasattr(made, "buffer") else made
        train_tp.main(world, TrainOptions(**{**TINY, **where, **changes}))

    return main


def _sampled(home: Path, stdout: Callable[[], Any], *words: str) -> Any:
    def main(world: World, options: Any) -> None:
        sys.stdout = Output(stdout())
        given = [
            f"--init_from={home / 'out'}",
            "--device=cpu",
            "--prompt=abc",
            "--num_samples=40",
            "--max_new_tokens=4",
            *words,
        ]
        sample_tp.main(world, parse(SampleOptions, given, "sample_tp.py"))

    return main


def test_samples_that_nobody_reads_end_quietly_on_all_ranks(home: Path, tmp_path: Path) -> None:
    """A launcher makes a report of any status but 0."""
    ends = launch(
        2, _sampled(home, no_reader, "--max_new_tokens=1000000"), tmp_path, ["--device=cpu"]
    )
    assert [status for status, _ in ends] == [0, 0]
    assert "prog.py" not in spoken(ends) and "Traceback" not in spoken(ends)


def test_samples_that_are_kept_are_all_made_though_nobody_reads(home: Path, tmp_path: Path) -> None:
    kept = tmp_path / "samples.jsonl"
    ends = launch(1, _sampled(home, no_reader, f"--out={kept}"), tmp_path, ["--device=cpu"])
    assert ends[0][0] == 0 and len(kept.read_text().splitlines()) == 40


def test_samples_go_to_a_console_that_cannot_show_them(home: Path, tmp_path: Path) -> None:
    shown, kept = tmp_path / "shown", tmp_path / "samples.jsonl"
    body = _sampled(
        home, lambda: text_on(shown, "ascii"), f"--out={kept}", "--temperature=5", "--num_samples=8"
    )
    assert launch(1, body, tmp_path, ["--device=cpu"])[0][0] == 0
    texts = [json.loads(line)["text"] for line in kept.read_text(encoding="utf-8").splitlines()]
    assert "é" in "".join(texts)
    lines = ("abc" + text + "\n---------------\n" for text in texts)
    assert shown.read_text(encoding="ascii") == "".join(lines).replace("é", r"\xe9")


@pytest.mark.parametrize(
    "stdout, words, name",
    [("/dev/full", [], "standard output"), (os.devnull, ["--out=/dev/full"], "/dev/full")],
    ids=["standard output", "out"],
)
def test_a_full_disk_is_one_line_that_names_the_file(
    home: Path, tmp_path: Path, stdout: str, words: list[str], name: str
) -> None:
    ends = launch(1, _sampled(home, lambda: text_on(stdout), *words), tmp_path, ["--device=cpu"])
    said = [line for line in spoken(ends).splitlines() if line.startswith("prog.py")]
    assert said == [f"prog.py: rank 0: No space left on device: {name}"]
    assert "Traceback" not in spoken(ends) and ends[0][0] == 1


def test_training_that_nobody_reads_saves_and_says_so(home: Path, tmp_path: Path) -> None:
    body = _trained(home, "unread", lambda: late_pipe(3), max_iters=1000000, eval_interval=1000000)
    ends = launch(2, body, tmp_path, ["--device=cpu"])
    assert [status for status, _ in ends] == [141, 141]
    saved = latest_checkpoint(home / "unread")
    assert saved.name.startswith("step-")
    iterations = int(saved.name.removeprefix("step-"))
    assert spoken(ends) == (
        f"prog.py: SIGPIPE: stopped after {iterations} iterations, saved {saved}. --init_from=resume goes on from there.\n"
    )


def late_pipe(flushes: int) -> io.TextIOWrapper:
    """Standard output whose reader goes after so many flushes."""
    read, write = os.pipe()

    class Buffer(io.BufferedWriter):
        left = flushes

        def flush(self) -> None:
            self.left -= 1
            if self.left == 0:
                os.close(read)
            super().flush()

    return io.TextIOWrapper(Buffer(io.FileIO(write, "w")))


@pytest.mark.parametrize("full", ["standard output", "metrics.jsonl"])
def test_training_goes_on_without_words_about_it(home: Path, tmp_path: Path, full: str) -> None:
    out, stdout = home / f"full {full}", "/dev/full" if full == "standard output" else os.devnull
    out.mkdir()
    if full == "metrics.jsonl":
        (out / full).symlink_to("/dev/full")
    ends = launch(1, _trained(home, out.name, lambda: text_on(stdout)), tmp_path, ["--device=cpu"])
    name = full if full == "standard output" else str(out / full)
    assert (
        spoken(ends)
        == f"train_tp.py: No space left on device: {name}. Training goes on without it.\n"
    )
    assert ends[0][0] == 0 and latest_checkpoint(out).name == "step-000002"


@pytest.mark.slow
def test_help_that_nobody_reads_ends_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "train_tp.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "show",
    [
        lambda: parse(SampleOptions, ["--help"], "sample_tp.py"),
        lambda: parse_command({"split": SplitOptions}, ["--help"], "shard_checkpoint.py"),
        lambda: dry_run.show(TrainOptions(**TINY, data_dir="/nowhere")),
    ],
    ids=["help", "commands", "dry run"],
)
def test_what_is_shown_before_a_run_ends_where_nobody_reads(
    show: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would find out at its end only, and complain then."""
    monkeypatch.setattr(sys, "stdout", Output(no_reader()))
    with pytest.raises(ReaderGone):
        show()


def _raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "main, status, said",
    [
        (lambda: print("127,940 characters"), 141, ""),
        (_raising(KeyboardInterrupt()), 130, "stopped by Ctrl-C\n"),
        (_raising(UserError("no text")), 2, "error: no text\n"),
    ],
)
def test_data_is_prepared_with_nobody_reading(
    main: Callable[[], None], status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdout", no_reader())
    with pytest.raises(SystemExit) as end:
        sys.exit(run(lambda: (lambda options: main(), None)))
    assert (end.value.code, capsys.readouterr().err) == (status, said)


def test_a_message_is_no_command_to_the_terminal(tmp_path: Path) -> None:
    def main(world: World, options: Any) -> None:
        raise UserError("there is no directory a\x1b[2J\x07b.")

    ends = launch(1, main, tmp_path, ["--device=cpu"])
    assert ends == [(2, "prog.py: there is no directory a\\x1b[2J\\x07b.\n")]


def test_split_runs_without_standard_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    words = [f"--init_from={home / 'out'}", "--tp=2", f"--out={tmp_path / 'shards'}"]
    assert shard_checkpoint.main(["split", *words]) == 0

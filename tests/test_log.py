"""What a training run leaves in words: the tail of metrics.jsonl, and wandb."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train_tp
from base.errors import UserError
from cli.options import TrainOptions
from train import checkpoint as training
from train import log
from train.directory import cut_metrics, iteration_of


def line(iteration: int, **more: Any) -> bytes:
    return json.dumps({"iter": iteration, "loss": 1.5, **more}).encode() + b"\n"


@pytest.mark.parametrize("tail", [
    b"",
    line(5) + line(6),
    line(6, text="x" * 100_000),
    line(5)[:-3],
    line(4)[:-1],  # whole but for its end: the next line would go on in it
    b"\n\n",
    b"\0" * 5000,
    b"\xff\xfe" + line(4),
    b"[" * 100_000 + b"\n",
    b'{"iter": -1}\n{"iter": true}\n{"iter": 3.0}\n{}\n[1]\n7\n',
    line(7)[:-3] + line(5) + line(6),
])  # fmt: skip
def test_what_comes_after_a_checkpoint_is_cut_and_what_a_kill_has_left(tail: bytes, tmp_path: Path) -> None:
    metrics, kept = tmp_path / "metrics.jsonl", b"".join(map(line, range(5)))
    metrics.write_bytes(kept + tail)
    cut_metrics(metrics, 5)
    assert metrics.read_bytes() == kept


@pytest.mark.parametrize("content", [None, b"", line(0) + line(1), line(1)[:-4], b"\n"])
def test_a_run_that_begins_or_finds_nothing_of_its_own_has_no_lines(content: bytes | None, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_bytes(content)
    cut_metrics(metrics, 0)
    assert metrics.read_bytes() == b""


def test_only_the_tail_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, read = tmp_path / "metrics.jsonl", list[bytes]()
    metrics.write_bytes(b"".join(map(line, range(20_000))))

    def counted(text: bytes) -> int:
        read.append(text)
        return iteration_of(text)

    monkeypatch.setattr("train.directory.iteration_of", counted)
    cut_metrics(metrics, 19_998)
    assert read == [line(19_999), line(19_998), line(19_997)]
    assert metrics.read_bytes() == b"".join(map(line, range(19_998)))


# --- wandb ----------------------------------------------------------------------------------------


def fake(error: Exception | None) -> Any:
    def init(**how: Any) -> dict[str, Any]:
        if error:
            raise error
        return how

    return SimpleNamespace(init=init)


class CommError(Exception):
    """Like wandb's own."""


@pytest.mark.parametrize(
    "error, said",
    [
        (CommError("No API key configured. Use `wandb login` to log in."), "No API key configured. Use `wandb login` to"),
        (CommError("Timed out: no such host\nConsider \x1b[1m..."), "Timed out: no such host WANDB_MODE=offline"),
        (CommError(), "CommError WANDB_MODE=offline keeps the run in "),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device WANDB_MODE=offline"),
    ],
)
def test_wandb_that_does_not_start_is_one_line_that_names_offline_mode(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake(error))
    with pytest.raises(UserError) as raised:
        log.start_wandb(TrainOptions(out_dir=str(tmp_path / "out"), wandb_log=True))
    message = str(raised.value)
    assert message.startswith(f"wandb does not start: {said}") and message.isprintable()
    assert f"WANDB_MODE=offline keeps the run in {tmp_path / 'out'}/wandb" in message


def test_without_wandb_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--wandb_log=True needs wandb: pip install wandb$"):
        log.start_wandb(TrainOptions(out_dir=str(tmp_path), wandb_log=True))


def test_wandb_is_asked_before_anything_is_read_or_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*what: Any) -> None:
        raise AssertionError("the run was prepared")

    monkeypatch.setitem(sys.modules, "wandb", fake(CommError("no login")))
    monkeypatch.setattr(train_tp, "prepare", too_late)
    monkeypatch.setattr(train_tp, "after_restart", lambda world, options: options)
    (tmp_path / "letters").mkdir()
    world: Any = SimpleNamespace(is_main=True)
    with pytest.raises(UserError, match="^wandb does not start: no login"):
        train_tp.main(world, TrainOptions(
            dataset="letters", data_dir=str(tmp_path), out_dir=str(tmp_path / "out"), wandb_log=True
        ))


# --- beside them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step-²", "step-", "step-x", "step--1", "step-1.5", "step-٣"])
def test_directories_that_are_no_checkpoints_are_left_alone(name: str, tmp_path: Path) -> None:
    for directory in (name, "step-000010", "step-000009"):
        (tmp_path / directory).mkdir()
    assert [path.name for path in training.steps(tmp_path)] == ["step-000009", "step-000010"]

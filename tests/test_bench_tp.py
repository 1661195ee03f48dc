"""bench_tp.py: its arithmetic, its fields, and that parties really do the same work. Nothing here is timed."""

import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_panels, run_ranks
from test_sample_tp import alone

import bench_tp
from base.errors import UserError
from bench.contestants import Contestant
from bench.rounds import Bench, compare
from cli.grammar import parse, parse_command
from cli.options import BenchDecodeOptions
from plan.link import ring_bytes
from world.mesh import World

TINY = ["--device=cpu", "--n_layer=2", "--n_head=3", "--n_embd=24", "--repeats=2"]
COMMANDS: dict[str, tuple[type[Any], Callable[[World, Any], None]]] = bench_tp.COMMANDS


def run(world: World, command: str, *words: str) -> str:
    out = StringIO()
    with redirect_stdout(out), redirect_stderr(StringIO()):
        cls, main = COMMANDS[command]
        main(world, parse(cls, list(words), f"bench_tp.py {command}"))
    return out.getvalue()


def test_the_figures_of_rounds() -> None:
    rounds: list[dict[str, dict[str, Any]]] = [
        {"nanotp": {"seconds": 0.1}, "hf": {"seconds": 0.2}},
        {"nanotp": {"seconds": 0.2}, "hf": {"seconds": 0.8}},
        {"nanotp": {"seconds": 0.5}, "hf": {"seconds": 0.5}},
    ]
    figures, lines = compare(rounds, "tokens/s", 4.0)
    assert figures["nanotp"]["tokens/s"] == {"median": 20.0, "min": 8.0, "max": 40.0}
    assert figures["hf"]["tokens/s"] == {"median": 8.0, "min": 5.0, "max": 20.0}
    assert figures["hf"]["ratio"] == {"median": 2.0, "min": 1.0, "max": 4.0}  # of each round, not of the medians
    assert lines[2].split() == ["hf", "8.0", "(5.0", "to", "20.0)", "2.00", "(1.00", "to", "4.00)"]


@pytest.mark.parametrize(
    "device, asked, place",
    [
        ("cpu", "bfloat16", {"device": "cpu", "dtype": "float32"}),  # what a user would pick there
        ("cuda:1", "auto", {"device": "cuda:1", "dtype": "bfloat16"}),
        ("cuda:1", "float32", {"device": "cuda:1", "dtype": "float32"}),
    ],
)
def test_contestants_compute_where_nanotp_does(
    device: str, asked: str, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    world = replace(alone(), device=torch.device(device))
    bench = Bench(world, parse(BenchDecodeOptions, [f"--dtype={asked}"], "bench_tp.py"), ())
    assert bench.place() == place


def test_the_ring_formula() -> None:
    assert [ring_bytes(1000, n) for n in (1, 2, 4)] == [0.0, 1000.0, 1500.0]


def _run(world: World, command: str, words: list[str]) -> str:
    return run(world, command, *words)


@pytest.mark.slow
def test_decode_and_its_contestants_write_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = [*TINY, "--vocab_size=131", "--prompt_tokens=5", "--new_tokens=9", "--against=hf,one_rank", f"--report={path}"]
    first, second = run_ranks(2, _run, "decode", words)
    assert second == "" and "hf: 9 of 9 tokens as ours" in first and "one_rank: 9 of 9 tokens as ours" in first
    made = json.loads(path.read_text())
    assert set(made["parties"]) == {"nanotp", "hf", "one_rank"} and "ratio" in made["parties"]["hf"]
    assert made["model"]["parameters"] == 131 * 24 + 1024 * 24 + 2 * (12 * 24 * 24 + 13 * 24) + 2 * 24
    # each rank: its part of the matrices, whose outputs fill panels, and of the biases, all LayerNorms and
    # row-parallel biases, its rows of the table
    split = sum(
        2 * (in_panels(24 * h) * 24 + in_panels(24) * (8 * h + 48) + in_panels(48) * 24) + in_panels(rows) * 24
        for h, rows in ((2, 66), (1, 65))
    )
    assert made["weight_bytes_read"] == 4 * (split + 2 * 7 * 24 + 2 * (2 * 6 * 24 + 2 * 24))
    assert all(made[name]["median"] > 0 for name in ("read_bandwidth", "share_of_bandwidth"))
    # of a step: 2 all-reduces a layer and 1 for the embedding, 24 floats each; a candidate; a token and whether it ends
    assert f"7.0 calls and {5 * 24 * 4 + 8 + 16} bytes a token" in first


def test_a_schedule_is_measured_beside_all_sync_points() -> None:
    words = [*TINY, "--vocab_size=131", "--prompt_tokens=5", "--new_tokens=9", "--sync=mlp", "--against=all_syncs"]
    said = run_ranks(2, _run, "decode", words)[0]
    assert "sync points: mlp" in said and "all_syncs: " in said
    assert f"5.0 calls and {3 * 24 * 4 + 8 + 16} bytes a token" in said  # 1 all-reduce a layer, and the embedding's


def test_narrow_weights_are_measured_beside_float32(tmp_path: Path) -> None:
    words = [*TINY, "--vocab_size=131", "--prompt_tokens=5", "--new_tokens=9", "--dtype=bfloat16", "--against=float32"]
    path = tmp_path / "r.json"
    said = run_ranks(2, _run, "decode", [*words, f"--report={path}"])[0]
    assert re.search(r"float32: \d of 9 tokens as ours", said)
    wide = run_ranks(2, _run, "decode", [*words[:-2], "--dtype=float32", f"--report={tmp_path / 'w.json'}"])[0]
    assert "decode of 9 tokens" in wide
    narrow, whole = (json.loads((tmp_path / name).read_text())["weight_bytes_read"] for name in ("r.json", "w.json"))
    assert narrow < 0.6 * whole  # of so small a model the parameters that stay float32 are a part


def test_a_draft_is_measured_beside_none(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = [*TINY, "--vocab_size=131", "--prompt=5 6 5 6", "--new_tokens=30", f"--report={path}"]
    said = run_ranks(2, _run, "decode", [*words, "--draft=ngram", "--draft_tokens=4", "--against=no_draft"])[0]
    assert "no_draft: 30 of 30 tokens as ours" in said and "decode of 30 tokens after 4" in said
    made = json.loads(path.read_text())
    calls = made["calls_per_token"]
    assert calls["no_draft"] == 7 and calls["nanotp"] < 3.5  # a fresh model says its last token again and again
    assert made["speculation"]["accepted"] > 10


@pytest.mark.slow
def test_prefill_and_transformers_choose_the_same_token(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = [*TINY, "--vocab_size=131", "--prompt_tokens=40", "--against=hf", f"--report={path}"]
    first, second = run_ranks(2, _run, "prefill", words)
    assert second == "" and "hf: 1 of 1 tokens as ours" in first
    # 2 all-reduces a layer and 1 for the embedding, of 40 tokens 24 wide; a candidate; a token and whether it ends
    assert f"7 calls and {5 * 40 * 24 * 4 + 8 + 16:,} bytes" in first
    assert json.loads(path.read_text())["parties"]["hf"]["ratio"]["median"] > 0


@pytest.mark.slow
def test_training_and_the_reference_see_the_same_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, dict[str, Any]]] = []
    rounds = Bench.rounds

    def noted(self: Any, ours: Any, contestants: Any) -> Any:
        seen.extend(rounds(self, ours, contestants))
        return seen

    monkeypatch.setattr(Bench, "rounds", noted)
    path = tmp_path / "r.json"
    words = [*TINY, "--vocab_size=257", "--batch_size=2", "--block_size=8", "--steps=2", "--against=reference"]
    run(alone(), "train", *words, f"--report={path}")
    assert json.loads(path.read_text())["model"]["vocab_size"] == 257
    ours, theirs = seen[0]["nanotp"]["losses"], seen[0]["reference"]["losses"]
    assert len(ours) == len(theirs) == 2 and ours[0] == pytest.approx(theirs[0], rel=0.05)


def test_saves_are_measured_in_front_and_in_the_background(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = [*TINY, "--block_size=8", "--tp=1", "--steps=2", f"--report={path}"]
    said, nothing = run_ranks(2, _run, "save", words)
    assert nothing == "" and "background over front" in said
    made = json.loads(path.read_text())
    assert made["bytes"] == 12 * (50304 * 24 + 8 * 24 + 2 * (12 * 24 * 24 + 13 * 24) + 2 * 24)
    assert all(turn["background"]["iterations"] > 0 == turn["front"]["iterations"] for turn in made["rounds"])


def test_allreduce_measures_every_transport(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = ["--device=cpu", "--repeats=1", "--sizes=4,4096", f"--report={path}"]
    said, nothing = run_ranks(2, _run, "allreduce", words)
    assert nothing == "" and "shm median" in said and "gloo median" in said
    sizes = json.loads(path.read_text())["sizes"]
    assert [line["bytes"] for line in sizes] == [4, 4096] and set(sizes[0]["us"]) == {"shm", "gloo"}


@pytest.mark.parametrize(
    "command, words, message",
    [
        ("decode", ["--against=vllm"], "--against=vllm is not one of hf, ctranslate2, llama_cpp, one_rank, float32, all_syncs"),
        ("train", ["--against=hf"], "--against=hf is not one of reference."),
        ("decode", ["--new_tokens=1000", *TINY, "--vocab_size=131"], "a prompt of 128 tokens and 1000 new ones do not fit"),
        ("allreduce", [], "bench_tp.py allreduce needs ranks"),
        ("prefill", ["--against=one_rank"], "--against=one_rank is not one of hf, ctranslate2."),
        ("decode", ["--report=/dev/null/r.json"], "--report=/dev/null/r.json"),
    ],
)
def test_mistakes(command: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(alone(), command, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_that_are_no_numbers() -> None:
    with pytest.raises(AssertionError, match="--sizes=1,x are not numbers of bytes with commas between"):
        run_ranks(2, _run, "allreduce", ["--device=cpu", "--sizes=1,x"])


@pytest.mark.slow
def test_a_contestant_that_cannot_start_is_one_line() -> None:
    with pytest.raises(UserError, match="^--against=hf failed: "):
        Contestant({"kind": "hf", "weights": "/nowhere/at/all", "threads": 1})


def test_the_command_comes_first() -> None:
    commands = {name: cls for name, (cls, _) in COMMANDS.items()}
    assert parse_command(commands, ["train", "--steps=2"], "bench_tp.py")[1].steps == 2
    with pytest.raises(UserError, match="unknown command 'trian'. Did you mean"):
        parse_command(commands, ["trian"], "bench_tp.py")
    assert all(cls.__doc__ for cls in commands.values())

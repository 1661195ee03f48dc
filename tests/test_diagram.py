"""The picture of a layer in a terminal, and the table beside it: against what ranks really say and keep."""

import json
import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_bench_tp import run
from test_sample_tp import alone

from base.errors import UserError
from bench.laboratory import counted, kept, line
from bench.strategies import STRATEGIES, Case, Piece, formula, kept_bytes
from model import GPTConfig
from plan.partition import Partition
from plan.schedule import Schedule
from report.diagram import PAGE, fit, layer, lines
from world.mesh import World

CONFIG = GPTConfig(block_size=11, vocab_size=67, n_layer=3, n_head=5, n_embd=20)  # 11 tokens and 5 heads over 2, 3, 4 ranks


def outline(config: GPTConfig) -> Case:
    return Case.draw("layer", config, 3, device="meta")


BIG = GPTConfig(n_layer=48, n_head=25, n_embd=25 * 492)


def picture(tp: int, sync: str = "all", sequence: bool = False, config: GPTConfig = CONFIG) -> list[str]:
    return lines(layer(Partition.of(config, tp), Schedule.parse(sync, config.n_layer), sequence))


def test_the_picture_fits_a_terminal_and_any_encoding() -> None:
    for tp in (1, 2, 3, 4, 25):
        for sync, sequence in (("all", False), ("mlp", False), ("all", True)):
            drawn = picture(tp, sync, sequence, BIG)
            assert max(map(len, drawn)) <= PAGE
            text = "\n".join(drawn)
            assert fit(text, "utf-8") == text == fit(text, None)
            for encoding in ("ascii", "latin-1", "no such"):
                plain = fit(text, encoding)
                assert plain.isascii() and "?" not in plain
                assert [len(row) for row in plain.split("\n")] == [len(row) for row in drawn]


@pytest.mark.parametrize("sync, after, before", [("all", [3, 3], [3, 3]), ("mlp", [0, 3], [3, 0]), ("0a,1m", [1, 2], [2, 1])])
def test_messages_stand_where_ranks_speak(sync: str, after: list[int], before: list[int]) -> None:
    """after, before: for attention and MLP, the layers in which there is a sync point after it, and so a g; and in which its f
    has an all-reduce, as a run begins there."""
    text = "\n".join(picture(2, sync))
    for name, times in (("g", after), ("f", before)):
        found = re.findall(rf"([━╌]) {name} [━╌]+ *([^\n]*)\n *│ *([^\n]*)(?:\n *│ *([^\n]*))?", text)
        assert [mark == "━" for mark, *_ in found] == [n > 0 for n in times]
        for (_, *said), n in zip(found, times, strict=True):
            assert ("left out" in " ".join(said)) == (n == 0)
            assert (f"in {n} of 3 layers" in " ".join(said)) == (0 < n < 3)
            assert ("SYNC POINT" in " ".join(said)) == (name == "g" and n > 0)


def test_shares_are_the_partitions() -> None:
    text = "\n".join(picture(3))
    assert all(said in text for said in ("heads 0–1", "heads 2–3", "head 4", "27 units", "26 units"))
    alone_ = "\n".join(picture(1))
    assert "all-reduce" not in alone_ and "sync points" not in alone_ and "nothing is communicated" in alone_


# --- the table ------------------------------------------------------------------------------------------------------


def _kept(world: World) -> dict[str, tuple[int, int]]:
    found = {}
    for name in STRATEGIES:
        piece = Piece(Case.draw("layer", CONFIG, 3), name, world.tp)
        found[name] = kept_bytes(piece.body, piece.forward), kept(CONFIG, name, world.size, 3, 4)
    return found


@pytest.mark.parametrize("tp", [2, 3])
def test_what_is_kept_is_what_is_measured(tp: int) -> None:
    for name, (measured, expected) in run_ranks(tp, _kept)[0].items():
        assert measured == expected, name
    assert kept(CONFIG, "megatron", 1, 3, 4) == kept(CONFIG, "naive", tp, 3, 4)


def test_an_outline_is_the_case_without_its_numbers() -> None:
    drawn, empty = Case.draw("layer", CONFIG, 3), outline(CONFIG)
    for tp in (2, 3):
        for name in STRATEGIES:
            assert formula(empty, name, tp) == formula(drawn, name, tp)
            assert line(empty, name, tp, formula(empty, name, tp)) == line(drawn, name, tp, formula(drawn, name, tp))


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = ["--n_layer=3", "--n_head=5", "--n_embd=20", "--block_size=11", "--tp=2,5", "--sync=every:3"]
    said = run(alone(), "diagram", *words, f"--report={path}")
    assert max(map(len, said.splitlines())) <= PAGE
    made = json.loads(path.read_text())
    found = list(counted(CONFIG, [2, 5], 1, torch.float32))
    assert [row["strategy"] for row in made["lines"]] == [*STRATEGIES] * 2
    assert [row["bytes_told"] for row in made["lines"]] == [row["bytes_told"] for row in found]
    assert (made["what"], made["tp"], made["sync"], made["model"]["n_layer"]) == ("diagram", 2, "every:3", 3)
    for row in made["lines"]:
        calls = [f"{row['calls'][way]:.3g}" for way in ("forward", "backward")]
        assert re.search(rf"^ +{row['tp']} {re.escape(row['strategy'])} +{calls[0]} +{calls[1]}", said, re.MULTILINE)
    single = run(alone(), "diagram", "--tp=1")
    assert "one rank" in single and "naive" not in single
    assert not re.search("^  2 sequence", run(alone(), "diagram", "--block_size=1"), re.MULTILINE)  # a token for every rank


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tp=2,x"], "--tp=2,x are not sizes with commas between."),
        (["--tp=13"], "tp=13 is more than n_head=12"),
        (["--sync=13m"], "there is no sub-block 13m"),
        (["--sequence_parallel=True", "--sync=mlp"], "needs --sync=all and a token for every rank"),
        (["--sequence_parallel=True", "--block_size=1"], "needs --sync=all and a token for every rank"),
        (["--n_embd=100"], "n_embd=100"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(alone(), "diagram", *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def _two(world: World, command: str, words: list[str]) -> None:
    run(world, command, *words)


@pytest.mark.parametrize("command, words", [("diagram", []), ("page", ["--kept=r.json", "--report=r.html"])])
def test_one_process_draws(command: str, words: list[str]) -> None:
    with pytest.raises(AssertionError, match=f"bench_tp.py {command} is one process"):
        run_ranks(2, _two, command, words)

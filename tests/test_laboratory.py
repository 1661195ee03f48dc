"""The laboratory: every strategy against double precision, what its ranks say against the formula and the profiler."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_bench_tp import _run
from test_bench_tp import run as alone_run
from test_sample_tp import alone
from test_tp_model import deaf

from base.errors import UserError
from bench.strategies import MISTAKES, STRATEGIES, Case, Piece, answers, formula, summed, wire_bytes
from model import GPTConfig
from plan.partition import Partition
from world.mesh import World

CONFIG = GPTConfig(block_size=11, vocab_size=67, n_layer=1, n_head=5, n_embd=20)  # 11 tokens and 5 heads over 2, 3, 4 ranks
EVERY = [(part, way) for part in ("mlp", "attention", "layer") for way in STRATEGIES if part == "layer" or way != "spd"]
Dropped = tuple[str, str, str]


def piece(
    world: World, part: str, strategy: str, dtype: torch.dtype, config: GPTConfig = CONFIG, intermediate: int = 0
) -> Piece:
    return Piece(Case.draw(part, config, 3, intermediate, dtype), strategy, world.tp)


def worst(piece: Piece) -> tuple[float, str]:
    spd = piece.strategy == "spd"
    errors = piece.errors(answers(piece.case, piece.split if spd else None))
    return max((error, name) for name, error in errors.items())


def _errors(world: World) -> dict[str, Any]:
    found = {}
    for part, strategy in EVERY:
        for dtype in (torch.float64, torch.float32):
            found[f"{part} {strategy} {dtype}"] = worst(piece(world, part, strategy, dtype))
        config = replace(CONFIG, bias=False, activation="gelu_tanh")
        found[f"{part} {strategy} torch.float64 other"] = worst(piece(world, part, strategy, torch.float64, config, 37))
    return found


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_every_strategy_is_right(tp: int) -> None:
    for rank in run_ranks(tp, _errors):
        assert len(rank) == 39
        for name, (error, where) in rank.items():
            assert error < (1e-5 if "32" in name else 1e-9), (name, error, where)


def _megatron_is_not_spd(world: World) -> float:
    spd = piece(world, "layer", "spd", torch.float64)
    return max(spd.errors(answers(spd.case)).values())


def test_spd_is_another_function() -> None:
    assert min(run_ranks(2, _megatron_is_not_spd)) > 1e-2  # or its own equations would show nothing


COUNTS = {"naive": (2, 2), "megatron": (1, 1), "sequence": (2, 3), "sequence+kept": (2, 2)}  # of one sub-block


def _said(world: World) -> dict[tuple[str, str], Any]:
    found = {}
    for part, strategy in EVERY:
        one = piece(world, part, strategy, torch.float32)
        before = world.ledger.snapshot()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            one.run()
            one.sum_partial()
        said = summed(world.ledger.since(before))
        seen = sum(event.count for event in profile.key_averages() if event.key in ("gloo:all_reduce", "gloo:all_gather"))
        weights = sum(p.numel() for p in one.body.parameters())
        found[part, strategy] = said, formula(one.case, strategy, world.size), seen, weights
    return found


@pytest.mark.parametrize("tp", [2, 3])
def test_the_account_is_the_formulas_and_the_profilers(tp: int) -> None:
    for (part, strategy), (said, expected, seen, _) in run_ranks(tp, _said, comm="gloo")[0].items():
        assert said == expected, (part, strategy)
        assert seen == sum(calls for calls, _ in said.values())
        ways = tuple(sum(n for (d, _), (n, _) in said.items() if d == way) for way in ("forward", "backward"))
        blocks = 2 if part == "layer" else 1
        assert ways == ((1, 1) if strategy == "spd" else tuple(blocks * n for n in COUNTS[strategy]))
        assert ("step", "all_reduce") in said or strategy in ("naive", "megatron")


def test_the_wires_bytes() -> None:
    case, one = Case.draw("mlp", CONFIG, 3), 3 * 11 * 20 * 4
    assert wire_bytes(formula(case, "megatron", 4), "megatron", 4) == 2 * 1.5 * one  # two all-reduces: 2 x 3/4 of each
    gathers = {key: value for key, value in formula(case, "sequence", 4).items() if key[0] != "step"}
    assert wire_bytes(gathers, "sequence", 4) == 5 * 0.75 * one
    # 80 columns gathered and their gradient summed, and the two all-reduces
    assert wire_bytes(formula(case, "naive", 4), "naive", 4) == pytest.approx((0.75 + 1.5) * 4 * one + 2 * 1.5 * one)


def _dropped(world: World, strategy: str, dropped: Dropped) -> float:
    deaf(*dropped)
    return worst(piece(world, "layer", strategy, torch.float64))[0]


@pytest.mark.parametrize("strategy, dropped", [
    ("naive", ("mlp", "forward", "all_reduce")), ("naive", ("attention", "backward", "all_reduce")),
    ("megatron", ("attention", "forward", "all_reduce")), ("megatron", ("mlp", "backward", "all_reduce")),
    ("sequence", ("attention", "forward", "all_gather")), ("sequence+kept", ("mlp", "backward", "reduce_scatter")),
    ("spd", ("mlp", "forward", "all_reduce")), ("spd", ("optimizer", "step", "all_reduce")),
])  # fmt: skip
def test_every_collective_is_needed(strategy: str, dropped: Dropped) -> None:
    assert max(run_ranks(2, _dropped, strategy, dropped)) > 1e-3


def test_the_naive_gather_is_the_one_that_is_not() -> None:
    """Which is why Megatron's pair of layers has none."""
    for block in ("attention", "mlp"):
        assert max(run_ranks(2, _dropped, "naive", (block, "forward", "all_gather"))) < 1e-9


# --- mistakes -------------------------------------------------------------------------------------------------------


def _made(world: World, part: str, mistake: str) -> tuple[dict[str, float], Any, Any]:
    one = piece(world, part, mistake, torch.float64)
    before = world.ledger.snapshot()
    one.run()
    said = summed(world.ledger.since(before))
    return one.errors(answers(one.case)), said, formula(one.case, "megatron", world.size)


SEEN = {  # which of output and input gradient a mistake is seen in
    "qkv": {"output", "input gradient"}, "bias": {"output"}, "no_f": {"input gradient"}, "no_g": {"output"},
}  # fmt: skip


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_caught_on_two_ranks_and_on_none_alone(mistake: str, tp: int) -> None:
    parts = [part for part in ("attention", "mlp") if (part, mistake) != ("mlp", "qkv")]
    for part in parts:
        alone_errors = run_ranks(1, _made, part, mistake)[0][0]
        assert max(alone_errors.values()) < 1e-9  # which is why a test on one rank shows nothing
        for errors, said, right in run_ranks(tp, _made, part, mistake):
            seen = {name for name in ("output", "input gradient") if errors[name] > 1e-2}
            assert seen == SEEN[mistake] and all(errors[name] < 1e-9 for name in {"output", "input gradient"} - seen)
            missing = {"no_f": ("backward", "all_reduce"), "no_g": ("forward", "all_reduce")}.get(mistake)
            assert said == {key: value for key, value in right.items() if key != missing}


# --- the command ----------------------------------------------------------------------------------------------------

TINY = ["--device=cpu", "--n_head=5", "--n_embd=20", "--block_size=11", "--batch_size=2", "--repeats=2"]


@pytest.mark.parametrize("part", ["mlp", "layer"])
def test_the_table(part: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = [*TINY, f"--part={part}", "--intermediate=33", "--tp=1,2,3,5", f"--report={path}"]
    said, *nothing = run_ranks(3, _run, "block", words)
    assert nothing == ["", ""]
    n = 2 if part == "layer" else 1
    assert re.search(f"\n  2 megatron +{n} +{n} .* [0-9.]+%\n", said)
    assert re.search(f"\n  5 megatron +{n} +{n} .* counted\n", said)
    made = json.loads(path.read_text())["lines"]
    strategies = list(STRATEGIES if part == "layer" else STRATEGIES[:-1])
    for tp in (2, 3, 5):
        lines = [row for row in made if row["tp"] == tp]
        assert [row["strategy"] for row in lines] == strategies
        for row in lines:
            assert ("seconds" in row) == (tp < 5)
            assert tp == 5 or (row["error"] < 1e-5 and row["kept_bytes"] > 0)
    whole, half, *_ = (row["weight_bytes"] for row in made if row["strategy"] in ("one rank", "megatron"))
    layer = 2 * 20 * 33 + 33 + 20 if part == "mlp" else 0
    assert half < whole and (not layer or whole == 4 * layer)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_beside_what_is_right(mistake: str, tmp_path: Path) -> None:
    words = [*TINY, "--tp=1,2,4", f"--mistake={mistake}", f"--report={tmp_path / 'r.json'}"]
    said = run_ranks(2, _run, "block", words)[0]
    assert f"\n{mistake} at tp=1 is right: output " in said and f"\n{mistake} at tp=2 is wrong: output " in said
    assert f"\n{mistake}: {MISTAKES[mistake]}\n" in said
    made = json.loads((tmp_path / "r.json").read_text())["lines"]
    ran = [(1, "one rank", True), (1, mistake, True), (2, "megatron", True), (2, mistake, True)]
    assert [(row["tp"], row["strategy"], "seconds" in row) for row in made] == [*ran, (4, "megatron", False)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mistake=qkv", "--part=mlp"], "--mistake=qkv: an MLP has no heads. Use --part=attention or --part=layer."),
        (["--n_head=12", "--n_embd=4096"], "n_embd=4096 does not divide into n_head=12 heads. Use n_embd=4092 or 4104."),
        (["--tp=2,8"], "tp=8 is more than n_head=5: some ranks would hold no head. Use a tp between 1 and 5"),
        (["--block_size=2", "--tp=3"], "block_size=2 is shorter than tp=3: some ranks would have no token."),
        (["--intermediate=2", "--tp=3"], "tp=3 is more than intermediate=2: some ranks would hold no column."),
        (["--tp=1,x"], "--tp=1,x are not sizes with commas between."),
        (["--tp=0"], "tp=0: the tensor-parallel size is at least 1."),
        (["--part=head"], "head"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        alone_run(alone(), "block", *TINY, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_a_rank_holds_are_the_formulas() -> None:
    for rank, found in enumerate(run_ranks(3, _said)):
        shapes = {name: shape for name, shape in Partition.of(CONFIG, 3).local_shapes(rank).items() if ".h.0." in name}
        assert found["layer", "megatron"][3] == sum(torch.Size(shape).numel() for shape in shapes.values())

"""The account of a run: equal to the formula, to torch.profiler's own count, and complete in the report."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_panels, run_ranks

import sample_tp
from base.errors import UserError
from cli.grammar import parse
from cli.options import SampleOptions
from inference.generation import generate
from inference.sampling import Sampling
from model import GPTConfig
from report import report
from tp_model import TensorParallelGPT
from world.mesh import World

CONFIG = GPTConfig(block_size=16, vocab_size=101, n_layer=3, n_head=3, n_embd=24)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
SAMPLING = Sampling(n_tokens=101, top_k=7, max_new_tokens=6, num_samples=2)
LONG = [list(range(14)), list(range(30))]  # the first slides after two tokens, the second does at once


def _run(world: World, prompts: list[list[int]], sampling: Sampling) -> dict[str, Any]:
    """What the ledger says of a generation, and what the profiler saw of it."""
    model = TensorParallelGPT(CONFIG, world.tp).eval()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generate(model, prompts, sampling)
    seen = {event.key.removeprefix("gloo:"): event.count for event in profile.key_averages() if event.key.startswith("gloo:")}
    told = {(e.layer, e.block, e.direction, e.op): (t.calls, t.bytes) for e, t in world.ledger.tallies.items()}
    return {"seen": seen, "told": told, "forward_passes": world.ledger.forward_passes}


def formula(passes: list[int], steps: list[int], tp: int, k: int) -> dict[Any, tuple[int, int]]:
    """The account of forward passes over so many tokens and of steps that choose a token for so many rows."""
    message = sum(passes) * CONFIG.n_embd * 4
    layers = {(i, block, "forward", "all_reduce"): (len(passes), message) for i in range(3) for block in ("attention", "mlp")}
    return layers | {
        (None, "embedding", "forward", "all_reduce"): (len(passes), message),
        (None, "sampling", "step", "all_gather"): (len(steps), sum(2 * rows * k * 4 for rows in steps)),
        (None, "sampling", "step", "broadcast"): (len(steps), sum(2 * rows * 8 for rows in steps)),
    }


# For each case: the tokens of each pass, then the rows of each step. Prompts are read once for both samples.
CASES = {
    "plain": (PROMPTS, SAMPLING, [8] + [4] * 5, [4] * 6),
    "one row": (PROMPTS[:1], replace(SAMPLING, num_samples=1), [3] + [1] * 5, [1] * 6),
    "groups": (PROMPTS, replace(SAMPLING, batch_size=3), [8] + [3] * 5 + [5] + [1] * 5, [3] * 6 + [1] * 6),
    "no cache": (PROMPTS, replace(SAMPLING, kv_cache=False), [8] + [2 * 8 + 4 * i for i in range(1, 6)], [4] * 6),
    # a row whose past is cached beside one that slides
    "sliding": (LONG, replace(SAMPLING, num_samples=1), [30] + [1 + 16] * 2 + [2 * 16] * 3, [2] * 6),
}


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_account_is_the_formula_and_the_profilers_count(case: str, tp: int) -> None:
    prompts, sampling, passes, steps = CASES[case]
    expected = formula(passes, steps, tp, sampling.top_k)
    for result in run_ranks(tp, _run, prompts, sampling, comm="gloo"):
        assert result["told"] == expected
        assert result["forward_passes"] == len(passes)
        calls = {op: sum(calls for (_, _, _, its), (calls, _) in expected.items() if its == op) for op in result["seen"]}
        assert result["seen"] == calls and set(calls) == {"all_reduce", "all_gather", "broadcast"}
        assert calls["all_reduce"] == (2 * CONFIG.n_layer + 1) * len(passes)


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("weights")
    GPT2LMHeadModel(GPT2Config(n_head=3, n_embd=24, n_layer=3, n_positions=16, vocab_size=101)).save_pretrained(directory)
    return directory


def _sampled(world: World, weights: Path, path: Path) -> None:
    words = ["--device=cpu", "--prompt=1 2 3", "--num_samples=2", "--max_new_tokens=6"]
    words += [f"--init_from={weights}", f"--report={path}"]
    sample_tp.main(world, parse(SampleOptions, words, "sample_tp.py"))


SHAPE: dict[str, Any] = {  # docs/formats.md
    "entry": str, "world_size": int, "tp": int, "pp": int, "dp": int, "comm": str, "device": str, "dtype": str, "quantize": str,
    "sync": str,
    "model": {"block_size": int, "vocab_size": int, "n_layer": int, "n_head": int, "n_embd": int, "dropout": float,
              "bias": bool, "activation": str, "parameters": int, "parameters_per_rank": list},
    "memory": {"weight_bytes_per_rank": list, "kv_cache_bytes_per_rank": list, "peak_bytes_per_rank": list},
    "timing": {"load_s": float, "time_to_first_token_s": float, "prefill_s": float, "decode_s": float, "decode_tokens": int,
               "decode_tokens_per_s": float},
    "comm_account": {"forward_passes": int, "layers": list, "other": dict,
                     "total": {"calls": int, "bytes": int, "seconds": float, "fraction_of_time": float}},
    "decoder": str, "per_token": {"tokens": int, "passes": float, "all_reduce": float}, "samples": list,
    "utilisation": {"bandwidth_bytes_per_s": float, "mbu": float, "peak_operations_per_s": float, "mfu": float},
}  # fmt: skip


def has_shape(found: Any, shape: Any) -> None:
    if isinstance(shape, dict):
        assert set(found) == set(shape)
        for key, inner in shape.items():
            has_shape(found[key], inner)
    else:
        assert type(found) is shape


def test_the_report_has_every_field_and_adds_up(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    run_ranks(2, _sampled, weights, path, comm="gloo")
    made = json.loads(path.read_text())
    has_shape(made, SHAPE)
    assert (made["entry"], made["world_size"], made["tp"], made["dp"]) == ("sample_tp", 2, 2, 1)
    assert (made["comm"], made["device"], made["dtype"]) == ("gloo", "cpu", "float32")
    check_memory(made)
    account = made["comm_account"]
    tally = {"calls": int, "bytes": int, "seconds": float}
    for i, layer in enumerate(account["layers"]):
        has_shape(layer, {"layer": int} | {block: {"forward": {"all_reduce": tally}} for block in ("attention", "mlp")})
        assert layer["layer"] == i
    assert set(account["other"]) == {"embedding", "sampling"}
    lines = [ops for layer in account["layers"] for block in ("attention", "mlp") for ops in layer[block].values()]
    lines += [ops for block in account["other"].values() for ops in block.values()]
    for key in ("calls", "bytes"):
        assert account["total"][key] == sum(line[key] for ops in lines for line in ops.values())
    assert 0 < account["total"]["fraction_of_time"] < 1
    assert account["forward_passes"] == 6 and made["timing"]["decode_tokens"] == 10
    for sample in made["samples"]:
        has_shape(sample, {"prompt": str, "prompt_tokens": list, "tokens": list, "text": str})
        assert sample["prompt_tokens"] == [1, 2, 3] and sample["text"].split() == [str(token) for token in sample["tokens"]]


def check_memory(made: dict[str, Any]) -> None:
    """Bytes and parameters as counted by hand: 3 layers, 24 wide, 2 and 1 heads of 8, 101 tokens, 16 positions."""
    layer = 4 * 24 + 4 * 24 * 24 + 4 * 24 + 8 * 24 * 24 + 5 * 24
    assert made["model"]["parameters"] == (101 + 16) * 24 + 3 * layer + 2 * 24
    replicated = 16 * 24 + 3 * 6 * 24 + 2 * 24  # positions, LayerNorms and the row-parallel biases
    assert sum(made["model"]["parameters_per_rank"]) == made["model"]["parameters"] + replicated
    beyond = lambda n: in_panels(n) - n  # noqa: E731  # outputs of a panel that there are not
    for rank, (heads, rows) in enumerate(((2, 51), (1, 50))):
        padding = beyond(rows) * 24 + 3 * (
            beyond(24 * heads) * 24 + beyond(24) * 8 * heads + beyond(columns := 48) * 24 + beyond(24) * columns
        )
        weights = made["model"]["parameters_per_rank"][rank] + padding
        assert made["memory"]["weight_bytes_per_rank"][rank] == 4 * weights
        cached = 9 + in_panels(9)  # values and keys of each of the 2 rows' tokens, in 3 layers, 8 channels a head, float32
        assert made["memory"]["kv_cache_bytes_per_rank"][rank] == 2 * 3 * cached * heads * 8 * 4
    assert all(2**20 < peak < 2**34 for peak in made["memory"]["peak_bytes_per_rank"])


def test_the_table_has_every_line_of_the_account(weights: Path, tmp_path: Path) -> None:
    run_ranks(2, _sampled, weights, tmp_path / "report.json", comm="gloo")
    made = json.loads((tmp_path / "report.json").read_text())
    table = report.account_table(made).splitlines()
    assert table[0] == "sample_tp: world 2 = dp 1 x tp 2, gloo, cpu, float32; 6 forward passes"
    assert len(table) == 2 + 2 * 3 + 3 + 2
    numbers = [[int(word.replace(",", "")) for word in line.split()[-3:-1]] for line in table[2:-1]]
    assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == numbers[-1]
    total = made["comm_account"]["total"]
    assert numbers[-1] == [total["calls"], total["bytes"]]
    assert table[-1].endswith("of the time was spent in collectives (rank 0's clock)")
    made["comm_account"]["layers"][0]["mlp"]["forward"]["reduce_scatter"] = {"calls": 1, "bytes": 2, "seconds": 0.0}
    for lines in (table, report.account_table(made).splitlines()):
        assert len({len(line) for line in lines[1:-1]}) == 1  # columns line up, whatever the collectives are called


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--report={tmp_path} cannot be written: Is a directory.$"):
        report.write(str(tmp_path), {})
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "r.json", "no does not exist")):
        with pytest.raises(UserError, match=message):
            report.check_place(str(path), "report")
    report.check_place("", "report")
    report.check_place(str(tmp_path / "r.json"), "report")
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_a_report_that_fails_half_way_costs_no_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path, link = tmp_path / "kept.json", tmp_path / "link.json"
    report.write(str(path), {"entry": "the first"})
    link.symlink_to(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"^--report={link} cannot be written: No space left on device.$"):
            report.write(str(link), {"entry": "the second"})
    assert json.loads(path.read_text()) == {"entry": "the first"}
    assert len(list(tmp_path.iterdir())) == 2
    report.write(str(link), {"entry": "the third"})
    assert json.loads(path.read_text()) == {"entry": "the third"} and link.is_symlink()
    report.write(os.devnull, {})
    assert Path(os.devnull).is_char_device()


def test_a_place_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="^--out=.*x cannot be written: permission denied.$"):
        report.check_place(str(tmp_path / "x"), "out")

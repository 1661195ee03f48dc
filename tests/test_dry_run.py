"""train_tp.py --dry_run, and the arithmetic below it: against the bytes of real models, passes and iterations."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

import train_tp
from base.errors import Unavailable, UserError
from base.native import load
from bench.strategies import kept_bytes
from cli.grammar import parse
from cli.options import TrainOptions
from model import GPTConfig, adamw
from parallel.collectives import Axis
from parallel.data_parallel import Sharding, last_only, replicate
from parallel.loss import chunk_rows
from parallel.shm import SOURCE
from plan.memory import FLOAT, Training
from plan.partition import Partition, spans
from plan.schedule import Schedule
from plan.stages import Stages
from tp_model import Stream, TensorParallelGPT
from train import dry_run
from train.dry_run import amount
from train.pipeline import Pipeline
from world.mesh import World, make_axis

UNEVEN = GPTConfig(block_size=18, vocab_size=131, n_layer=3, n_head=5, n_embd=40)


def training(config: GPTConfig, tp: int, rows: int = 2, **changes: Any) -> Training:
    split = Partition.of(config, tp)
    plan = Training(
        split=split, dp=1, rows=rows, micro_steps=1, eval_rows=rows, width=4,
        dropout=config.dropout > 0, gpu=False, logit_rows=chunk_rows(rows * config.block_size, split.local_vocab, "cpu"),
    )  # fmt: skip
    return replace(plan, **changes)


# --- parts against real tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_parameters_gradients_and_moments_are_those_of_the_model(tp: int, bias: bool) -> None:
    config = replace(UNEVEN, bias=bias)
    models = [TensorParallelGPT(config, Axis("tp", rank, tp)) for rank in range(tp)]
    held = [sum(p.nbytes for p in model.parameters()) for model in models]
    plan = training(config, tp)
    assert plan.parameters == held[0] == max(held)
    assert tp == 1 or held[-1] < held[0]  # 5 heads
    optimizer = adamw(models[0].named_parameters(), 0.1, 1e-3, (0.9, 0.95))
    for parameter in models[0].parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert plan.optimizer == sum(moment.nbytes for moment in moments)
    assert plan.gradients == held[0]
    cache = models[0].new_cache(1)
    assert plan.kv_cache == cache.nbytes


def test_sharded_over_dp_a_rank_has_its_piece_of_every_tensor() -> None:
    plan = training(UNEVEN, 2, dp=3, dp_shard=True)
    pieces = [-(-shape[0] // 3) * int(np.prod(shape[1:])) for shape in plan.shapes.values()]
    chunks = [len(torch.empty(shape).chunk(3)[0].flatten()) for shape in plan.shapes.values()]
    assert pieces == chunks and plan.parameters == FLOAT * sum(chunks) and plan.optimizer == 2 * plan.parameters
    assert replace(plan, micro_steps=2).gradients == plan.whole  # what micro-batches add up is not sharded


def _kept(world: World, config: GPTConfig, sync: str, how: dict[str, Any], half: bool) -> int:
    """Bytes that the layers and the last LayerNorm keep for the backward pass."""
    torch.manual_seed(0)
    model = TensorParallelGPT(config, world.tp, schedule=Schedule.parse(sync, config.n_layer), **how)
    T = config.block_size
    lo, hi = spans(T, world.tp.size)[world.tp.rank] if model.sequence_parallel else (0, T)
    x = torch.randn(2, hi - lo, config.n_embd, requires_grad=True)

    def forward() -> None:
        s = Stream(x, model.region(T))
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            for block in model.transformer.h:
                s = block(s)
            model.transformer.ln_f(s.x)

    return kept_bytes(model, forward)


@pytest.mark.parametrize(
    "sync, changes",
    [
        ("all", {}),
        ("all", {"dropout": 0.1}),
        ("all", {"dropout": 0.1, "half": True}),
        ("all", {"half": True}),
        ("all", {"half": True, "bias": False, "dropout": 0.1}),
        ("all", {"sequence_parallel": True}),
        ("all", {"sequence_parallel": True, "half": True, "dropout": 0.1}),
        ("mlp", {}),
        ("every:2", {"dropout": 0.1}),
        ("mlp", {"half": True, "dropout": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_a_pass_keeps_what_is_computed(tp: int, sync: str, changes: dict[str, Any]) -> None:
    changes = dict(changes)
    half, sequence = changes.pop("half", False), changes.pop("sequence_parallel", False)
    config = replace(UNEVEN, **changes)
    if tp == 1:
        sync = "all"
    ranks = run_ranks(tp, _kept, config, sync, {"sequence_parallel": sequence}, half)
    plan = training(config, tp, width=2 if half else 4, sequence_parallel=sequence)
    assert ranks[0] == max(ranks)
    expected = 3 * plan.kept_by_layer + plan.kept_by_norm
    # exact but for dropout's masks under autocast, which a float32 bias widens: 3 to 8 % less
    assert expected == pytest.approx(ranks[0], rel=0.15)


# --- the largest moment against torch's allocator -------------------------------------------------------------------

MODELS = {"wide": GPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=4, n_embd=128)}  # activations, above all
MODELS["table"] = replace(MODELS["wide"], vocab_size=9000)  # the table and its gradients
MODELS["layers"] = replace(MODELS["wide"], n_embd=256)  # with one row, their weights
MODELS["dropout"] = replace(MODELS["wide"], dropout=0.1)


def most_held(world: World, iterate: Callable[[], None]) -> int:
    """The most bytes that torch's allocator has handed out at a time in an iteration, above those before it began.

    The profiler does not see what gloo's threads free: such an iteration seems to end with more than it began with, and is
    made again.
    """
    iterate()
    iterate()
    for _ in range(30):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            iterate()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
        if all(world.gather(abs(held[-1]) < 0.001 * held.max())):
            break
    return int(held.max())


def _live(world: World, config: GPTConfig, plan: Training, half: bool) -> int:
    tp = make_axis("tp", world.groups.get("tp"), "shm", world.ledger)
    how: dict[str, Any] = {name: getattr(plan, name) for name in ("activation_checkpointing", "sequence_parallel")}
    model = TensorParallelGPT(config, tp, sharding=Sharding(world.dp, world.device) if plan.dp_shard else None, **how)
    wrapped = model if plan.dp_shard else replicate(model, world.dp)
    optimizer = adamw(model.named_parameters(), 0.1, 1e-3, (0.9, 0.95))
    tokens = torch.zeros(plan.rows, config.block_size, dtype=torch.int64)

    def iterate() -> None:
        for step in range(plan.micro_steps):
            last = step == plan.micro_steps - 1
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                _, loss = last_only(wrapped, last)(tokens.clone(), tokens.clone())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return most_held(world, iterate)


@pytest.mark.parametrize(
    "size, tp, shape, rows, changes",
    [
        (1, 1, "wide", 16, {}),
        (1, 1, "dropout", 16, {}),
        (1, 1, "wide", 16, {"activation_checkpointing": True}),
        (1, 1, "table", 4, {"micro_steps": 2}),
        (1, 1, "table", 4, {"width": 2}),
        (2, 1, "table", 1, {}),
        (2, 1, "table", 4, {"micro_steps": 2}),
        (2, 1, "layers", 1, {"dp_shard": True}),
        (2, 1, "table", 2, {"dp_shard": True, "micro_steps": 2}),
        (2, 2, "wide", 16, {"sequence_parallel": True}),
        (2, 2, "table", 4, {"width": 2}),
    ],
    ids=str,
)
def test_the_largest_moment_is_what_torch_hands_out(size: int, tp: int, shape: str, rows: int, changes: dict[str, Any]) -> None:
    config = MODELS[shape]
    if tp > 1:
        try:
            load(SOURCE)
        except Unavailable as why:
            pytest.skip(str(why))
    plan = training(config, tp, rows, dp=size // tp, **changes)
    found = run_ranks(size, _live, config, plan, plan.width == 2, tp=tp)[0]
    before = plan.parameters + plan.optimizer + (plan.parameters if plan.dp > 1 and not plan.dp_shard else 0)
    live, at = plan.live()
    print(f"{changes}: {found:,} found, {live - before:,} computed, {at}")
    # measured: -11 % with dp_shard, +6 % with accumulation as well, within 1.5 % everywhere else
    assert live - before == pytest.approx(found, rel=0.15)


def _live_in_stages(world: World, config: GPTConfig, plans: list[Training]) -> float:
    """Computed over found, for this rank's stages."""
    plan = plans[world.rank]
    count, rows = plan.micro_steps, plan.rows
    model = TensorParallelGPT(config, world.tp, stages=plan.stages, activation_checkpointing=plan.activation_checkpointing)
    half = partial(torch.autocast, "cpu", torch.bfloat16, enabled=plan.width == 2)
    pipeline = Pipeline(model, world, count, rows, rows, half)
    optimizer = adamw(model.named_parameters(), 0.1, 1e-3, (0.9, 0.95))
    tokens = torch.zeros(count * rows, config.block_size, dtype=torch.int64)

    def iterate() -> None:
        pipeline.train(tokens.clone(), tokens.clone(), 1.0, lambda micro, stage: 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found = most_held(world, iterate)
    received = {  # is there from the first iteration on
        id(info): info.buffer.nbytes
        for stage in pipeline._training[1] for infos in (stage.args_recv_info, stage.grad_recv_info)
        for info in chain(*infos.values()) if getattr(info, "buffer", None) is not None
    }  # fmt: skip
    return (plan.live()[0] - plan.parameters - plan.optimizer) / (found + sum(received.values()))


@pytest.mark.parametrize(
    "pp, tp, count, rows, schedule, changes",
    [
        (2, 1, 8, 8, "1F1B", {}), (2, 1, 32, 2, "1F1B", {}), (3, 1, 9, 4, "1F1B", {}),
        (2, 1, 8, 8, "1F1B", {"activation_checkpointing": True}), (2, 1, 8, 4, "GPipe", {}),
        (2, 1, 8, 4, "Interleaved1F1B", {}), (2, 1, 8, 1, "GPipe", {"width": 2}), (2, 2, 8, 1, "GPipe", {"width": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_the_largest_moment_of_each_stage(
    pp: int, tp: int, count: int, rows: int, schedule: str, changes: dict[str, Any]
) -> None:
    """In half precision GPipe would hold a copy of the weights for each micro-batch, if autocast made one for each."""
    config = replace(MODELS["wide"], n_layer=4)
    stages = [Stages.over(config, pp, rank // tp, schedule) for rank in range(pp * tp)]
    plans = [training(config, tp, rows, micro_steps=count, stages=at, **changes) for at in stages]
    ratios = run_ranks(pp * tp, _live_in_stages, config, plans, pp=pp, tp=tp)
    print(ratios)
    # measured: 1.01 to 1.11, 0.94 and 0.97 with two stages on a rank
    assert ratios == pytest.approx([1.0] * pp * tp, abs=0.15)


# --- the command ----------------------------------------------------------------------------------------------------

SMALL = ["--n_layer=3", "--n_head=5", "--n_embd=40", "--block_size=18", "--batch_size=2", "--gradient_accumulation_steps=6"]


def dry(*words: str) -> int:
    asked = parse(TrainOptions, ["--dry_run=True", "--device=cpu", *SMALL, *words], "train_tp.py")
    return dry_run.show(asked)


def test_a_run_that_fits_and_one_that_does_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    assert dry("--ranks=2", "--memory=80GB", f"--report={report}") == 0
    said = capsys.readouterr().out
    assert "it fits 80GB." in said
    made = json.loads(report.read_text())
    asked, others = made["layouts"][0], made["layouts"][1:]
    assert (asked["tp"], asked["dp"]) == (2, 1) and not asked["dp_shard"]
    assert {(line["tp"], line["dp"]) for line in others} == {(1, 2), (2, 1)}
    assert len(made["layouts"]) == 8 == said.count(" x ") - 1  # of each tp four, a line each, below the header
    assert made["model"]["vocab_size"] == 50304  # no dataset was named, nothing was opened
    parts = ("base", "parameters", "gradients", "optimizer", "activations", "temporary")
    for line in made["layouts"]:  # sharded, what is freed is given back
        assert line["peak"] == (line["base"] + line["live"] if line["dp_shard"] else sum(line[part] for part in parts))

    assert dry("--ranks=2", "--memory=100MB") == 1
    assert "does not fit 100MB, nor does another layout" in capsys.readouterr().out
    assert dry("--ranks=2", "--tp=1", f"--memory={asked['peak'] // 1000 + 5000}KB") == 1
    assert "What would: --tp=2" in capsys.readouterr().out
    assert dry("--ranks=2") == 0  # nothing to fit
    assert "--memory=80GB would say" in capsys.readouterr().out


def test_the_layouts_own_options_count(tmp_path: Path) -> None:
    def peak(*words: str) -> int:
        assert dry("--ranks=4", "--tp=2", f"--report={tmp_path / 'plan.json'}", *words) == 0
        line = json.loads((tmp_path / "plan.json").read_text())["layouts"][0]
        return int(line["peak"] - line["base"])

    plain = peak("--batch_size=64")
    for word in ("dp_shard", "sequence_parallel", "activation_checkpointing"):
        assert peak("--batch_size=64", f"--{word}=True") < plain
    assert peak("--batch_size=64", "--dropout=0.1") > plain
    assert peak("--batch_size=64", "--dtype=bfloat16") != plain


def test_an_evaluation_of_more_rows_may_be_the_peak() -> None:
    few = training(UNEVEN, 1, rows=1)  # as where many replicas share a small batch, and evaluate whole ones
    many = replace(few, eval_rows=500)
    assert few.live()[1] != many.live()[1] == "evaluation"
    assert many.peak - few.peak > 500 * 18 * 40 * 4 * 2  # the residual stream, and its LayerNorm's output


def test_a_gpu_is_reckoned_without_one_and_nothing_is_allocated(capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["--n_layer=48", "--n_head=128", "--n_embd=65536", "--device=cuda", "--batch_size=1"]
    assert dry("--ranks=6", "--tp=6", "--memory=80GB", *huge) == 1  # 2.5 x 10^12 parameters
    said = capsys.readouterr().out
    assert "GPU, products in half precision" in said and ", reckoned" in said


def test_a_source_gives_its_sizes_and_the_hub_is_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry("--ranks=6", "--init_from=gpt2-xl", "--tp=6") == 0
    parameters = 1_557_611_200 - (1024 - 18) * 1600  # transformers' count, less the positions beyond block_size
    assert f"{parameters:,} parameters: 48 layers, 25 heads" in capsys.readouterr().out


def test_amounts_of_memory() -> None:
    found = {text: amount(text) for text in ("80GB", "24GiB", "1.5 gb", "512MiB", "100kB", "2TB")}
    assert list(found.values()) == [80 * 10**9, 24 * 2**30, 15 * 10**8, 2**29, 10**5, 2 * 10**12]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--memory=abc"], "--memory=abc is no amount of memory. Write 80GB"),
        (["--memory=80"], "--memory=80 is no amount of memory"),
        (["--memory=0GB"], "--memory=0GB is no amount of memory"),
        (["--ranks=6", "--tp=4"], "world size 6 cannot be split into tensor-parallel groups of 4"),
        (["--ranks=6", "--tp=6"], "tp=6 is more than n_head=5"),
        (["--ranks=5", "--tp=1"], "dp=5 ranks cannot share them evenly"),
        (["--ranks=2", "--sequence_parallel=True", "--sync=mlp"], "--sequence_parallel=True needs --sync=all"),
        (["--ranks=2", "--sync=every:9"], "the model has 3 layers"),
        (["--init_from=nowhere"], "--init_from=nowhere is neither a file"),
        (["--init_from=resume", "--out_dir=nowhere"], "nowhere has no checkpoint to resume"),
        (["--report=nowhere/plan.json"], "does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        dry(*words)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_exit_status_of_the_command() -> None:
    root = Path(train_tp.__file__).parent
    for memory, status in (("80GB", 0), ("1MB", 1), ("abc", 2)):
        words = ["train_tp.py", "--dry_run=True", "--ranks=2", "--device=cpu", *SMALL, f"--memory={memory}"]
        done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
        assert done.returncode == status
        assert len(done.stderr.splitlines()) == (status == 2)

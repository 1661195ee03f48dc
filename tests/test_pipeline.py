"""Pipeline stages: the same curve at every layout and schedule, what is sent, and what is refused."""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_training import curve, figures, letters, options  # noqa: F401

import shard_checkpoint
import train_tp
from base.errors import UserError
from checkpoints.manifest import read_manifest
from checkpoints.shards import ShardDirectory
from cli.options import TrainOptions
from model import GPTConfig
from parallel.collectives import Axis
from parallel.ledger import total
from parallel.parameters import local_part
from parallel.pipeline import Messages, make_schedule
from parallel.replicas import DriftError
from plan.memory import Training
from plan.partition import Partition
from plan.stages import SCHEDULES, TABLE, Stages
from text.dataset import Dataset
from tp_model import TensorParallelGPT
from train import gradients, loop, pipeline, setup
from world.mesh import World, sizes

# an iteration of 12 rows, in micro-batches of 3
ROWS: dict[str, Any] = {"n_layer": 5, "batch_size": 3, "gradient_accumulation_steps": 4, "eval_iters": 3}


def _train(world: World, settings: TrainOptions) -> None:
    train_tp.main(world, settings)


def trained(letters: Path, out: Path, dp: int, pp: int, tp: int, **changes: Any) -> np.ndarray:  # noqa: F811
    settings = options(letters, out, tp=tp, pp=pp, **{**ROWS, **changes})
    run_ranks(dp * pp * tp, _train, settings, pp=pp, tp=tp)
    return figures(out)


@pytest.fixture(scope="module")
def one(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:  # noqa: F811
    """The run in one process that the others must repeat."""
    out = tmp_path_factory.mktemp("one")
    return out, trained(letters, out, 1, 1, 1)


@pytest.mark.parametrize("pp", [2, 3])
def test_the_curve_is_the_same_with_stages(letters: Path, tmp_path: Path, one: Any, pp: int) -> None:  # noqa: F811
    """5 layers: 3 and 2 on two ranks; 2, 2 and 1 on three."""
    mine = trained(letters, tmp_path, 1, pp, 1, always_save_checkpoint=False)
    assert len(mine) == 20
    np.testing.assert_allclose(mine, one[1], rtol=1e-4)


@pytest.mark.parametrize(
    "dp, pp, tp, more",
    [
        (1, 2, 2, {}), (2, 2, 1, {}), (1, 2, 2, {"activation_checkpointing": True, "sequence_parallel": True}),
        (1, 3, 1, {"activation_checkpointing": True}),
        (1, 2, 2, {"pp_schedule": "InterleavedZeroBubble", "sequence_parallel": True}),
        (2, 2, 1, {"dp_shard": True}), (2, 2, 1, {"dp_shard": True, "pp_schedule": "GPipe", "activation_checkpointing": True}),
    ],
    ids=["pp2-tp2", "dp2-pp2", "pp2-tp2-recomputed-sequence", "pp3-recomputed", "pp2-tp2-zero-bubble", "dp2-pp2-sharded",
         "dp2-pp2-sharded-recomputed"],
)  # fmt: skip
def test_the_curve_is_the_same_in_other_layouts(
    letters: Path, tmp_path: Path, one: Any, dp: int, pp: int, tp: int, more: dict[str, Any]  # noqa: F811
) -> None:
    rows = {"batch_size": 3, "gradient_accumulation_steps": 4}
    np.testing.assert_allclose(trained(letters, tmp_path, dp, pp, tp, **rows, **more), one[1], rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_curve_is_the_same_with_each_schedule(letters: Path, tmp_path: Path, one: Any, name: str) -> None:  # noqa: F811
    mine = trained(letters, tmp_path, 1, 2, 1, pp_schedule=name)
    np.testing.assert_allclose(mine, one[1], rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, kind in SCHEDULES.items() if kind.splits])
def test_gradients_of_weights_come_later_and_send_nothing(
    letters: Path, tmp_path: Path, one: Any, name: str  # noqa: F811
) -> None:
    mine = trained(letters, tmp_path, 1, 2, 2, pp_schedule=name, max_iters=8)
    np.testing.assert_allclose(mine, one[1][:8], rtol=1e-4)
    assert [line["all_reduce_per_layer"] for line in curve(tmp_path)] == [{"forward": 2.0, "backward": 2.0}] * 8


def test_a_stage_may_end_at_a_sync_point(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    how: dict[str, Any] = {"sync": "mlp", "max_iters": 5}
    alike = [trained(letters, tmp_path / str(pp), 1, pp, 2, **how) for pp in (1, 2)]
    np.testing.assert_allclose(alike[0], alike[1], rtol=1e-4)


# --- what is sent ---------------------------------------------------------------------------------------------------


def _sent(world: World, settings: TrainOptions) -> dict[str, Any]:
    """Messages between stages of two iterations and an evaluation: (calls, bytes) by the account and by torch's profiler,
    which sees those of gloo alone."""
    run = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(2):
            loop.iterate(run, 1e-3)
        loop.evaluate(run, 3)
    account, seen = world.ledger.snapshot(), {}
    for op in ("send", "recv"):
        shapes = [event.input_shapes[0] for event in profiler.events() if event.name == f"gloo:{op}"]
        seen[op] = len(shapes), 4 * sum(map(math.prod, shapes))
    by_direction = {
        (way, op): total(account, block="pipeline", direction=way, op=op).calls
        for way in ("forward", "backward") for op in ("send", "recv")
    }  # fmt: skip
    tallies = {op: total(account, block="pipeline", op=op) for op in ("send", "recv")}
    table = total(account, block="embedding", direction="step")
    return {"profiler": seen, "account": {op: (t.calls, t.bytes) for op, t in tallies.items()}, "ways": by_direction,
            "table": (table.calls, table.bytes)}


@pytest.mark.parametrize(
    "pp, tp, name, sequence",
    [(2, 1, "1F1B", False), (3, 1, "GPipe", False), (2, 1, "Interleaved1F1B", False), (2, 1, "ZBVZeroBubble", False),
     (2, 2, "1F1B", True)],
)  # fmt: skip
def test_what_stages_send(letters: Path, tmp_path: Path, pp: int, tp: int, name: str, sequence: bool) -> None:  # noqa: F811
    settings = options(letters, tmp_path, tp=tp, pp=pp, pp_schedule=name, sequence_parallel=sequence, **ROWS)
    for rank, sent in enumerate(run_ranks(pp * tp, _sent, settings, pp=pp, tp=tp)):
        stages = Stages(5, pp, rank // tp, name)
        before, after = stages.messages()
        assert sent["account"] == sent["profiler"]
        # two iterations of 4 micro-batches; two splits of 3 batches, in as many micro-batches as there are stages
        trained, measured = 2 * 4, 2 * stages.count * -(-3 // stages.count)
        assert sent["ways"] == {
            ("forward", "recv"): before * (trained + measured), ("forward", "send"): after * (trained + measured),
            ("backward", "send"): before * trained, ("backward", "recv"): after * trained,
        }  # fmt: skip
        calls, moved = sent["account"]["send"]
        assert moved == calls * 4 * 3 * (8 // tp if sequence else 8) * 16  # batch x tokens x width
        both = name == "ZBVZeroBubble" or pp == 3 and rank == 1  # one rank has both ends, or none
        assert sent["table"] == ((0, 0) if both else (2, 2 * 4 * 64 * 16))


def test_a_report_has_all_stages(letters: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Two iterations, and an evaluation before and after."""
    trained(letters, tmp_path, 1, 2, 2, max_iters=2, report=str(tmp_path / "report.json"))
    assert "train_tp: world 4 = dp 1 x pp 2 x tp 2, " in capfd.readouterr().out
    account = json.loads((tmp_path / "report.json").read_text())["comm_account"]
    passes = 2 * 4 + 2 * 2 * 4  # two splits of 3 batches, two at a time
    for layer in account["layers"]:
        for block in ("attention", "mlp"):
            assert layer[block]["forward"]["all_reduce"]["calls"] == passes
            assert layer[block]["backward"]["all_reduce"]["calls"] == 2 * 4
    sent = account["other"]["pipeline"]
    assert sent["forward"]["send"]["calls"] == sent["forward"]["recv"]["calls"] == passes
    assert sent["backward"]["send"]["calls"] == sent["backward"]["recv"]["calls"] == 2 * 4
    assert [line["all_reduce_per_layer"] for line in curve(tmp_path)] == [{"forward": 2.0, "backward": 2.0}] * 2


def _deaf(world: World, settings: TrainOptions, what: str) -> None:
    """Without one of the messages."""
    if what == "table":
        pipeline.sum_gradients = lambda parameters, axis: None
    elif what == "norm":
        whole = gradients.all_reduce
        gradients.all_reduce = lambda x, axis, *rest: x if axis.name == "pp" else whole(x, axis, *rest)
    else:  # activations, or their gradients
        note = Messages.note

        def silent(self: Messages, op: str, direction: str, asked: list[Any]) -> list[Any]:
            for message in asked:
                if (op, direction) == ("send", what):
                    message.tensor.zero_()
            return note(self, op, direction, asked)

        Messages.note = silent  # type: ignore[method-assign]
    train_tp.main(world, settings)


@pytest.mark.parametrize("what", ["table", "norm", "forward", "backward"])
def test_each_message_is_needed(letters: Path, tmp_path: Path, one: Any, what: str) -> None:  # noqa: F811
    settings = options(letters, tmp_path, tp=1, pp=2, **{**ROWS, "max_iters": 3})
    run_ranks(2, _deaf, settings, what, pp=2, tp=1)
    assert np.abs(figures(tmp_path) / one[1][:3] - 1).max() > 1e-3


def _drifting(world: World, settings: TrainOptions) -> str:
    """The last stage's copy of the table goes its own way."""
    step = loop.take_step

    def drifting(run: setup.Run, *rest: Any) -> None:
        step(run, *rest)
        if world.pp.rank == 1:
            run.model.head.weight.data[3, 1] += 1e-3

    loop.take_step = drifting  # type: ignore[assignment]
    with pytest.raises(DriftError) as error:
        train_tp.main(world, settings)
    return str(error.value)


def test_both_ends_hold_the_same_table(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = options(letters, tmp_path, tp=1, pp=2, check_replicas=1, **ROWS)
    for found in run_ranks(2, _drifting, settings, pp=2, tp=1):
        where = "differs between stages 0 and 1 (max 1e-03) at step 1"
        assert found == f"replicated parameter transformer.wte.weight {where}."


def _held(world: World, settings: TrainOptions) -> dict[str, int]:
    """Numbers that this rank keeps, and messages of FSDP2 in an iteration."""
    run = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    loop.iterate(run, 1e-3)
    sent = {(e.direction, e.op): t.calls for e, t in world.ledger.tallies.items() if e.block == "data_parallel"}
    return {
        "parameters": sum(local_part(p)[0].numel() for p in run.model.parameters()),
        "moments": sum(local_part(run.optimizer.state[p]["exp_avg"])[0].numel() for p in run.model.parameters()),
        "sums": sent.get(("backward", "reduce_scatter"), 0), "gathers": sent.get(("forward", "all_gather"), 0),
    }  # fmt: skip


def test_a_rank_holds_a_part_of_its_stage(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """And gradients are summed once an iteration: of each block, and of what is in no block."""
    settings = [options(letters, tmp_path, tp=1, pp=2, dp_shard=shard, **ROWS) for shard in (False, True)]
    whole, sharded = (run_ranks(4, _held, each, pp=2, tp=1) for each in settings)
    for stage, layers in enumerate((3, 2)):
        pair = sharded[stage], sharded[2 + stage]
        for what in ("parameters", "moments"):
            assert pair[0][what] + pair[1][what] == whole[stage][what]
            assert max(pair[0][what], pair[1][what]) < 0.52 * whole[stage][what]
        assert pair[0]["sums"] == layers + 1 and pair[0]["gathers"] > 0 == whole[stage]["sums"]


def _orders(world: World, settings: TrainOptions) -> dict[int, list[Any]]:
    run = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    orders = run.pipeline._training[0].pipeline_order
    return {
        rank: [part.computation_type.name for action in actions if action for part in action.sub_actions or [action]]
        for rank, actions in orders.items()
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_that_a_rank_holds(letters: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Counted in the order that torch makes: they come with a forward pass, and go with the gradients of weights."""
    changes = {"n_layer": 6, "batch_size": 1, "gradient_accumulation_steps": 9, "pp_schedule": name}
    settings = options(letters, tmp_path, tp=1, pp=3, **changes)
    for rank, order in run_ranks(3, _orders, settings, pp=3, tp=1)[0].items():
        steps = [(kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT")) for kind in order]
        assert max(np.cumsum(steps)) == Stages(6, 3, rank, name).in_flight(9)


@pytest.mark.parametrize("name, parts", [("1F1B", [[0], [1], [2]]), ("ZBVZeroBubble", [[0, 5], [1, 4], [2, 3]])])
def test_the_dry_run_counts_a_ranks_own_parameters(name: str, parts: list[list[int]]) -> None:
    config, bytes_of = GPTConfig(16, 500, n_layer=8, n_head=4, n_embd=32), []
    for rank in range(3):
        stages = Stages(8, 3, rank, name)
        assert stages.mine == parts[rank]
        model = TensorParallelGPT(config, Axis("tp"), stages=stages)
        split = Partition.of(config, 1)
        plan = Training(split=split, rows=2, eval_rows=2, logit_rows=8, micro_steps=6, stages=stages)
        assert plan.parameters == plan.gradients == sum(p.nbytes for p in model.parameters())
        bytes_of.append(plan.activations)
    assert name != "1F1B" or bytes_of[0] > bytes_of[1] > bytes_of[2]  # 3, 2, 1 micro-batches


def test_a_dry_run_shows_stages(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset=none", "--device=cpu", "--n_layer=12", "--gradient_accumulation_steps=8", "--ranks=4", "--memory=80GB"]
    sys.argv = ["train_tp.py", *words, "--pp=2", "--tp=2", "--dry_run=True"]
    with pytest.raises(SystemExit) as end:
        train_tp.command()
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "\n>   2   1  pp 2 " in shown
    assert re.search(r"^    1   1  pp 4 ckpt +12 x 8 ", shown, re.MULTILINE)


# --- resume ---------------------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"max_iters": 8, "save_interval": 4, "eval_interval": 8, "gradient_accumulation_steps": 4}
LAYOUTS = [(1, 2, 2), (1, 1, 3), (1, 3, 1), (2, 1, 2), (1, 1, 1), (2, 2, 1)]
STEPS = {"itself": 0, "next": 1}
if os.environ.get("PAIRS") == "all":  # every (dp, pp, tp) of at most 4 ranks, into every other: 5 minutes
    LAYOUTS += [(1, 1, 2), (1, 2, 1), (2, 1, 1), (3, 1, 1), (1, 1, 4), (1, 4, 1), (4, 1, 1)]
    STEPS = {f"+{step}": step for step in range(len(LAYOUTS))}


@pytest.fixture(scope="module")
def halves(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Path]:  # noqa: F811
    """The first 4 of 8 iterations, of every layout, and the second 4 of the same process."""
    made = {}
    for layout in LAYOUTS:
        made[layout] = tmp_path_factory.mktemp("dp{}-pp{}-tp{}".format(*layout))
        trained(letters, made[layout], *layout, dp_shard=layout[0] == 2, **SHORT)
    return made


@pytest.mark.parametrize("to", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=["dp{}-pp{}-tp{}".format(*layout) for layout in LAYOUTS])
def test_a_run_goes_on_in_another_layout(
    letters: Path, tmp_path: Path, halves: Any, number: int, to: int  # noqa: F811
) -> None:
    before, after = LAYOUTS[number], LAYOUTS[(number + to) % len(LAYOUTS)]
    (tmp_path / "latest").write_text("step-000004\n")
    shutil.copytree(halves[before] / "step-000004", tmp_path / "step-000004")
    mine = trained(letters, tmp_path, *after, init_from="resume", dp_shard=after[0] == 2, **SHORT)
    whole = figures(halves[before])
    if to == 0 and before[0] == 1:
        assert np.array_equal(mine, whole[4:])
        for name in ("", "optimizer/"):
            theirs, ours = (read_manifest(home / "step-000008" / name).files for home in (halves[before], tmp_path))
            assert theirs == ours  # sizes and sha256
    np.testing.assert_allclose(mine, whole[4:], rtol=1e-5)


def test_a_checkpoint_of_stages_has_each_tensor_once(halves: Any, tmp_path: Path) -> None:
    """And any command reads it: as one of pp x tp ranks."""
    home = halves[1, 2, 2] / "step-000008"
    manifest, alone = read_manifest(home), ShardDirectory(halves[1, 1, 1] / "step-000008")
    assert manifest.tp == 4
    sizes = [sum(tensor.numel() for tensor in load_file(home / name).values()) for name, _, _ in manifest.files]
    assert sum(sizes) == Partition.of(manifest.model, 1).count()
    assert max(sizes) < 0.4 * sum(sizes)
    read = ShardDirectory(home)
    for name, entry in alone.manifest.tensors.items():
        torch.testing.assert_close(read.read(name, None, ()), alone.read(name, None, ()), rtol=0, atol=1e-4)
        assert entry.shape == manifest.tensors[name].shape
    assert shard_checkpoint.main(["verify", f"--shards={home}"]) == shard_checkpoint.main(["inspect", f"--shards={home}"]) == 0
    assert shard_checkpoint.main(["merge", f"--shards={home}", f"--out={tmp_path / 'hf'}"]) == 0
    merged = load_file(tmp_path / "hf" / "model.safetensors")
    wanted = read.read("transformer.ln_f.weight", None, ())
    assert torch.equal(next(value for name, value in merged.items() if name.endswith("ln_f.weight")), wanted)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layer": 1}, "--pp=2: 2 stages are more than n_layer=1. Use a --pp of at most 1."),
        ({"n_layer": 3, "pp_schedule": "Interleaved1F1B"},
         "--pp=2: --pp_schedule=Interleaved1F1B has 2 stages on a rank, and 4 stages are more than n_layer=3."),
        ({"gradient_accumulation_steps": 1}, "--pp_schedule=1F1B on --pp=2 needs at least 2 micro-batches, one for each "
         "stage: each dp rank has 1 in an iteration. Use another --gradient_accumulation_steps, or --pp_schedule=GPipe"),
        ({"gradient_accumulation_steps": 3, "pp_schedule": "DualPipeV"},
         "--pp_schedule=DualPipeV on --pp=2 needs at least 4 micro-batches"),
        ({"gradient_accumulation_steps": 5, "pp_schedule": "InterleavedZeroBubble"},
         "--pp_schedule=InterleavedZeroBubble on --pp=2 needs a multiple of 2 micro-batches"),
        ({"pp_schedule": "2F2B"}, "--pp_schedule must be one of 1F1B, GPipe, "),
        ({"pp_schedule": "ZBVZeroBubble", "activation_checkpointing": True},
         "--pp=2 together with --activation_checkpointing=True and --pp_schedule=ZBVZeroBubble: use one of them."),
        ({"dp_shard": True, "pp_schedule": "LoopedBFS"},
         "--pp=2 together with --dp_shard=True and --pp_schedule=LoopedBFS: use one of them."),
        ({"dp_reduce_dtype": "bfloat16"}, "--pp=2 together with --dp_reduce_dtype=bfloat16: use one of them."),
        ({"sync": "every:5"}, "--pp=2 together with --sync=every:5, where a stage ends between sync points: use"),
    ],
)  # fmt: skip
def test_what_stages_cannot_do_is_said(
    letters: Path, tmp_path: Path, changes: dict[str, Any], message: str  # noqa: F811
) -> None:
    with pytest.raises(AssertionError) as error:
        trained(letters, tmp_path, 1, 2, 1, **changes)
    assert f"UserError: {message}" in str(error.value)


def test_worlds_that_do_not_fit() -> None:
    assert sizes(12, 2, "train_tp.py", 3) == (2, 3, 2) and sizes(6, 0, "train_tp.py", 3) == (1, 3, 2)
    for world, tp, advice in ((6, 2, "Start 4 or 8"), (9, 3, "Start 6 or 12"), (2, 2, "Start 4"), (6, 4, "Start 8")):
        with pytest.raises(UserError) as error:
            sizes(world, tp, "train_tp.py", 2)
        fault = f"world size {world} cannot be split into pipelines of 2 x {tp} ranks (pp x tp)"
        assert str(error.value).startswith(fault) and advice.lower() in str(error.value).lower(), error.value


def test_the_schedules_are_torchs() -> None:
    with pytest.raises(UserError, match="PyTorch .* has no such schedule. Use --pp_schedule=1F1B."):
        make_schedule("TwoForwardNoBackward", [], 2, None)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("vocabulary", [64, 2000, 50257])
def test_the_largest_stage_is_as_small_as_can_be(count: int, vocabulary: int) -> None:
    """Of all ways to deal 12 layers to stages, the table being held by the first and the last."""
    config = GPTConfig(8, vocabulary, n_layer=12, n_head=4, n_embd=384)
    model = Partition.of(config, 1)
    layer, table = (
        sum(prod(shape) for name, (shape, _) in model.table.items() if part in name and len(shape) == 2)
        for part in (".h.0.", ".wte.")
    )

    def largest(layers: Sequence[int]) -> int:
        return max(layer * n + table * (i in (0, count - 1)) for i, n in enumerate(layers))

    dealt = [hi - lo for lo, hi in Stages.over(config, count).layers]
    assert sum(dealt) == 12 and min(dealt) > 0
    every = (way for way in product(range(1, 12), repeat=count) if sum(way) == 12)
    assert largest(dealt) == min(map(largest, every))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_every_layer_is_in_one_stage(pp: int, name: str) -> None:
    ranks = [Stages(9, pp, rank, name) for rank in range(pp)]
    assert sorted(stage for rank in ranks for stage in rank.mine) == [*range(ranks[0].count)]
    table = Partition.of(GPTConfig(8, 64, n_layer=9, n_head=4, n_embd=16), 1).table
    for parameter in table:
        holders = [rank.rank for rank in ranks if rank.holds(parameter)]
        assert ranks[0].owner(parameter) in holders
        assert len(holders) == (2 if parameter == TABLE and not (ranks[0].has_last or pp == 1) else 1)

"""dp x tp: replicas and FSDP2's shards train alike, say what they send, hold what they should, and resume from each other."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_training import curve, figures, letters, options  # noqa: F401

import train_tp
from checkpoints.manifest import read_manifest
from cli.options import TrainOptions
from parallel import data_parallel
from parallel.parameters import local_part
from train import gradients, loop, setup
from world.mesh import World

# an iteration of 12 rows, which 2, 3 and 4 share: in two micro-batches on each of 2 or 3 ranks
ROWS: dict[str, Any] = {
    "batch_size": 3, "gradient_accumulation_steps": 4, "max_iters": 30, "lr_decay_iters": 30, "eval_interval": 100,
}  # fmt: skip


def _train(world: World, settings: TrainOptions) -> None:
    train_tp.main(world, settings)


def trained(letters: Path, out: Path, dp: int, tp: int, **changes: Any) -> np.ndarray:  # noqa: F811
    run_ranks(dp * tp, _train, options(letters, out, tp=tp, **{**ROWS, **changes}), tp=tp)
    return figures(out)


@pytest.fixture(scope="module")
def one(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:  # noqa: F811
    return trained(letters, tmp_path_factory.mktemp("one"), 1, 1)


@pytest.mark.parametrize(
    "dp, tp, changes",
    [
        (2, 1, {}),
        (2, 2, {}),
        (2, 1, {"dp_shard": True}),
        (3, 1, {"dp_shard": True}),
        (2, 2, {"dp_shard": True}),
        (2, 2, {"dp_shard": True, "activation_checkpointing": True}),
        (2, 2, {"dp_shard": True, "sequence_parallel": True}),
        (2, 1, {"dp_shard": True, "eval_iters": 3}),
    ],
    ids=lambda given: "-".join(given) or "replicated" if isinstance(given, dict) else None,
)
def test_the_curve_is_that_of_one_rank(
    letters: Path, tmp_path: Path, one: np.ndarray, dp: int, tp: int, changes: dict[str, Any]  # noqa: F811
) -> None:
    mine = trained(letters, tmp_path, dp, tp, **changes)
    assert len(mine) == 30
    np.testing.assert_allclose(mine, one, rtol=1e-4)


def test_shards_learn_under_a_schedule(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """Partial gradients are summed over tp, of each dp rank's part."""
    expected = trained(letters, tmp_path / "tp", 1, 2, sync="mlp")
    np.testing.assert_allclose(trained(letters, tmp_path / "both", 2, 2, sync="mlp", dp_shard=True), expected, rtol=1e-4)


def test_shards_of_a_compiled_model(letters: Path, tmp_path: Path, one: np.ndarray) -> None:  # noqa: F811
    mine = trained(letters, tmp_path, 2, 1, dp_shard=True, compile=True, max_iters=3)
    np.testing.assert_allclose(mine, one[:3], rtol=1e-4)


# --- what is sent, and what is held ---------------------------------------------------------------------------------


def _messages(world: World, settings: TrainOptions) -> dict[tuple[str, str], tuple[int, int]]:
    """(calls, bytes) of each kind of message of one iteration over dp, besides the losses'."""
    train_tp.main(world, settings)
    found = {(e.direction, e.op): (t.calls, t.bytes) for e, t in world.ledger.tallies.items() if e.block == "data_parallel"}
    found.pop(("step", "all_reduce"))
    return found


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_what_shards_send(letters: Path, tmp_path: Path, again: bool) -> None:  # noqa: F811
    """Two micro-batches of an iteration on each rank: the blocks' parameters are gathered twice in each, once forward and once
    backward; the others once, as they stay. Gradients travel in the last one alone. And two evaluations of four passes each,
    in which the others stay throughout. Blocks that are recomputed change nothing of it."""
    shards: dict[str, Any] = {"dp_shard": True, "activation_checkpointing": again, "n_layer": 4}
    settings = options(letters, tmp_path, tp=1, max_iters=1, eval_interval=100, eval_iters=4, **shards)
    sent = run_ranks(2, _messages, settings, tp=1)[0]
    block, rest = 12 * 16 * 16 + 13 * 16, (64 + 8) * 16 + 2 * 16
    layers, evaluations, passes, micro = 4, 2, 4, 2
    blocks, others = layers * (evaluations * passes + micro), evaluations + micro
    assert sent["forward", "all_gather"] == (blocks + others, 4 * (blocks * block + others * rest))
    assert sent["backward", "all_gather"] == (layers * micro, 4 * micro * layers * block)
    assert sent["backward", "reduce_scatter"] == (layers + 1, 4 * (layers * block + rest))
    half = replace(settings, dp_reduce_dtype="bfloat16", overwrite=True)
    assert run_ranks(2, _messages, half, tp=1)[0]["backward", "reduce_scatter"] == (layers + 1, 2 * (layers * block + rest))


def test_replicas_can_send_half(letters: Path, tmp_path: Path, one: np.ndarray) -> None:  # noqa: F811
    whole, half = ({"max_iters": 1, "dp_reduce_dtype": dtype, "overwrite": True} for dtype in ("float32", "bfloat16"))
    sent = [run_ranks(2, _messages, options(letters, tmp_path, tp=1, **how), tp=1)[0] for how in (whole, half)]
    assert sent[0]["backward", "all_reduce"][1] == 2 * sent[1]["backward", "all_reduce"][1]
    mine = trained(letters, tmp_path, 2, 1, dp_reduce_dtype="bfloat16", overwrite=True)
    np.testing.assert_allclose(mine[:, 0], one[:, 0], rtol=1e-2)  # 8 bits of a gradient
    assert not np.array_equal(mine[1:], one[1:])


def _deaf(world: World, settings: TrainOptions, name: str) -> None:
    """Without one of FSDP2's messages: what comes from the others is nothing."""

    def alone(out: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
        n = min(len(out), len(x))
        out.zero_()[:n].copy_(x[:n])

    setattr(data_parallel, name, alone)
    train_tp.main(world, settings)


@pytest.mark.parametrize("name", ["gather_into", "scatter_into"])
def test_each_message_of_shards_is_needed(letters: Path, tmp_path: Path, one: np.ndarray, name: str) -> None:  # noqa: F811
    run_ranks(2, _deaf, options(letters, tmp_path, tp=1, dp_shard=True, **{**ROWS, "max_iters": 3}), name, tp=1)
    assert np.abs(figures(tmp_path) / one[:3] - 1).max() > 1e-3


def _norm_deaf(world: World, settings: TrainOptions) -> None:
    """The norm of the gradient, of this dp rank's part alone."""
    whole = gradients.all_reduce
    gradients.all_reduce = lambda x, axis, *rest, **more: x if axis.name == "dp" else whole(x, axis, *rest, **more)
    train_tp.main(world, settings)


def test_the_norm_of_all_shards_is_needed(letters: Path, tmp_path: Path, one: np.ndarray) -> None:  # noqa: F811
    run_ranks(4, _norm_deaf, options(letters, tmp_path, tp=2, dp_shard=True, **{**ROWS, "max_iters": 3}), tp=2)
    assert np.abs(figures(tmp_path)[:, 1] / one[:3, 1] - 1).max() > 1e-3


def _held(world: World, settings: TrainOptions) -> dict[str, list[int]]:
    """Numbers that this rank keeps of parameters, gradients and moments."""
    from text.dataset import Dataset

    run = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    last: dict[str, list[int]] = {"parameters": [], "gradients": [], "moments": []}
    step = run.optimizer.step

    def look() -> None:
        step()
        for p in run.model.parameters():
            assert p.grad is not None
            last["parameters"].append(local_part(p)[0].numel())
            last["gradients"].append(local_part(p.grad)[0].numel())
            last["moments"].append(local_part(run.optimizer.state[p]["exp_avg"])[0].numel())

    run.optimizer.step = look  # type: ignore[method-assign, assignment]
    loop.iterate(run, 1e-3)
    return last


def test_a_rank_holds_its_part_alone(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    ranks = run_ranks(4, _held, options(letters, tmp_path, tp=2, dp_shard=True), tp=2)
    alone = run_ranks(2, _held, options(letters, tmp_path, tp=2), tp=2)
    for tp in range(2):
        for what in ("parameters", "gradients", "moments"):
            pair = [ranks[dp * 2 + tp][what] for dp in range(2)]
            assert [a + b for a, b in zip(*pair, strict=True)] == alone[tp][what]
            assert max(map(sum, pair)) < 0.52 * sum(alone[tp][what])


# --- resume ---------------------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {
    "max_iters": 8, "save_interval": 4, "batch_size": 12, "gradient_accumulation_steps": 1, "eval_iters": 1,
}  # fmt: skip
LAYOUTS = [(dp, tp) for dp in range(1, 5) for tp in range(1, 5) if dp * tp <= 4]


@pytest.fixture(scope="module")
def halves(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:  # noqa: F811
    """The first 4 of 8 iterations, of every layout, and the second 4 of the same process."""
    made = {}
    for dp, tp in LAYOUTS:
        made[dp, tp] = tmp_path_factory.mktemp(f"dp{dp}-tp{tp}")
        trained(letters, made[dp, tp], dp, tp, dp_shard=dp > 2, **SHORT)
    return made


@pytest.mark.parametrize("after", LAYOUTS, ids=lambda layout: "dp{}-tp{}".format(*layout))
@pytest.mark.parametrize("before", LAYOUTS, ids=lambda layout: "dp{}-tp{}".format(*layout))
def test_resume_over_all_pairs_of_layouts(
    letters: Path, tmp_path: Path, halves: Any, before: tuple[int, int], after: tuple[int, int]  # noqa: F811
) -> None:
    """A run that is broken off after iteration 4 and goes on in another layout has the curve of one that is not broken off."""
    home = halves[before]
    (tmp_path / "latest").write_text("step-000004\n")
    shutil.copytree(home / "step-000004", tmp_path / "step-000004")
    dp, tp = after
    again = trained(letters, tmp_path, dp, tp, dp_shard=dp > 1, init_from="resume", **SHORT)
    whole = figures(home)
    assert [line["iter"] for line in curve(tmp_path)] == [*range(4, 8)]
    if before == after and (dp == 1 or dp > 2):
        assert np.array_equal(again, whole[4:])
    np.testing.assert_allclose(again, whole[4:], rtol=1e-5)
    assert read_manifest(tmp_path / "step-000008").tp == tp


@pytest.mark.parametrize("changes", [{}, {"dp_every": 2}], ids=["every", "local-steps"])
def test_tp_ranks_share_the_bits_of_a_sum_over_many_ranks(letters: Path, tmp_path: Path, changes: Any) -> None:  # noqa: F811
    """A sum of 4 is rounded by its place in a message, which heads of unequal number move: 2 and 1 of 3."""
    sizes = {"n_head": 3, "n_embd": 48, "bias": True, "gradient_accumulation_steps": 4, "max_iters": 4}
    trained(letters, tmp_path, 4, 2, check_replicas=1, **sizes, **changes)  # a DriftError would end it

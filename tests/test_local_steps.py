"""--dp_every: against DiLoCo written out in plain torch, what is sent, what a checkpoint has, and how a run ends."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_dry_run import most_held, training
from test_training import curve, figures, letters, options  # noqa: F401
from torch import Tensor

import train_tp
from base.errors import Stopped
from checkpoints.manifest import read_manifest
from checkpoints.shards import ShardDirectory
from checkpoints.sources import open_source
from cli.options import TrainOptions
from model import GPT, GPTConfig
from parallel.collectives import Axis
from parallel.ledger import total
from parallel.replicas import DriftError
from text.dataset import Dataset, batch
from tp_model import TensorParallelGPT
from train import local_steps, loop, setup
from world.mesh import World

# 12 rows an iteration, which 2 and 3 groups share; averagings after iterations 3, 6 and 8, which is the last
ROWS: dict[str, Any] = {
    "batch_size": 3, "gradient_accumulation_steps": 4, "max_iters": 8, "lr_decay_iters": 8, "eval_interval": 100,
    "dp_every": 3, "learning_rate": 1e-3, "min_lr": 1e-4,
}  # fmt: skip
CONFIG = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=4, n_embd=16)


def _train(world: World, settings: TrainOptions) -> None:
    train_tp.main(world, settings)


def trained(letters: Path, out: Path, dp: int = 2, tp: int = 1, **changes: Any) -> np.ndarray:  # noqa: F811
    settings = options(letters, out, tp=tp, **{**ROWS, **changes})
    run_ranks(dp * settings.pp * tp, _train, settings, tp=tp, pp=settings.pp)
    return figures(out)


def diloco(letters: Path, settings: TrainOptions, groups: int, make: Any) -> tuple[np.ndarray, dict[str, Tensor]]:  # noqa: F811
    """(mean loss and gradient norm of each iteration, parameters at the end) of algorithm 1 of arXiv 2311.08105: all groups
    in one process, one after the other, and the outer step written out."""
    models = [make() for _ in range(groups)]
    optimizers = [
        torch.optim.AdamW(
            [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
             {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.95),
        )
        for model in models
    ]  # fmt: skip
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in before.items()}
    tokens, rows = Dataset(letters / "letters").train, []
    for step in range(settings.max_iters):
        said = []
        for group, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for part in optimizer.param_groups:
                part["lr"] = loop.learning_rate(settings, step)
            each = 12 // groups
            _, loss = model(*batch(tokens, range(group * each, (group + 1) * each), 8, settings.seed, step))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            said.append([loss.item(), norm.item()])
        rows.append(np.mean(said, axis=0))
        if (step + 1) % settings.dp_every == 0 or step + 1 == settings.max_iters:
            for name, old in before.items():
                now = [dict(model.named_parameters())[name].detach() for model in models]
                change = sum(old - one for one in now) / groups
                velocity[name] = settings.outer_momentum * velocity[name] + change
                old -= settings.outer_lr * (change + settings.outer_momentum * velocity[name])
                for one in now:
                    one.copy_(old)
    return np.array(rows), before


def far(out: Path, expected: dict[str, Tensor]) -> float:
    """The largest difference of the last checkpoint from these parameters."""
    found = open_source(str(out))
    return max((found.read(name, None, ()) - value[: 13 if "wte" in name else None]).abs().max().item()
               for name, value in expected.items())  # fmt: skip


@pytest.mark.parametrize("groups", [2, 3])
def test_every_iteration_without_an_outer_optimizer_is_parameter_averaging(
    letters: Path, tmp_path: Path, groups: int  # noqa: F811
) -> None:
    how: dict[str, Any] = {"dp_every": 1, "outer_lr": 1.0, "outer_momentum": 0.0, "bias": False}
    settings = options(letters, tmp_path, **{**ROWS, **how, "tp": 1})
    mine = trained(letters, tmp_path, groups, **how)
    rows, weights = diloco(letters, settings, groups, lambda: TensorParallelGPT(replace(CONFIG, bias=False), Axis("tp")))
    np.testing.assert_allclose(mine, rows, rtol=1e-6)
    assert far(tmp_path, weights) < 1e-6


@pytest.mark.parametrize("groups, every", [(2, 3), (3, 3), (2, 8), (1, 2)])
def test_local_steps_are_diloco(letters: Path, tmp_path: Path, groups: int, every: int) -> None:  # noqa: F811
    settings = options(letters, tmp_path, **{**ROWS, "dp_every": every, "bias": False, "tp": 1})
    mine = trained(letters, tmp_path, groups, dp_every=every, bias=False)
    rows, weights = diloco(letters, settings, groups, lambda: GPT(replace(CONFIG, bias=False)))
    np.testing.assert_allclose(mine, rows, rtol=1e-5)
    assert far(tmp_path, weights) < 1e-5
    assert open_source(str(tmp_path)).description == "training, iteration 8"


@pytest.fixture(scope="module")
def two(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two groups of one rank each, which other layouts repeat."""
    out = tmp_path_factory.mktemp("two")
    trained(letters, out, save_interval=2, keep_last=0)
    return out


@pytest.mark.parametrize(
    "dp, tp, changes",
    [
        (2, 2, {}), (2, 1, {"pp": 2}), (2, 2, {"sequence_parallel": True, "activation_checkpointing": True}),
        (2, 1, {"gradient_accumulation_steps": 1, "batch_size": 12}), (4, 1, {"dp_groups": 2}),
        (4, 1, {"dp_groups": 2, "dp_shard": True}), (4, 2, {"dp_groups": 2, "dp_shard": True}),
        (4, 1, {"dp_groups": 2, "pp": 2, "batch_size": 1, "gradient_accumulation_steps": 12}),
    ],
    ids=["tp", "pp", "sequence", "one-micro-batch", "dp", "sharded", "sharded-tp", "dp-pp"],
)  # fmt: skip
def test_a_group_may_be_split(
    letters: Path, tmp_path: Path, two: Path, dp: int, tp: int, changes: dict[str, Any]  # noqa: F811
) -> None:
    mine = trained(letters, tmp_path, dp, tp, **changes)
    np.testing.assert_allclose(mine, figures(two)[: len(mine)], rtol=1e-4)


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_with_groups_of_several_ranks(letters: Path, tmp_path: Path, two: Path, shard: bool) -> None:  # noqa: F811
    """From a checkpoint of single ones, and back."""
    how: dict[str, Any] = {"dp_groups": 2, "dp_shard": shard, "save_interval": 2, "keep_last": 0}
    broken_off(two, tmp_path)
    mine = trained(letters, tmp_path, 4, init_from="resume", **how)
    np.testing.assert_allclose(mine, figures(two)[6:], rtol=1e-5)
    for name in ("", "optimizer", "optimizer-1", "outer"):
        ours, theirs = (ShardDirectory(home / "step-000008" / name) for home in (tmp_path, two))
        for tensor in theirs.manifest.tensors:
            torch.testing.assert_close(ours.read(tensor, None, ()), theirs.read(tensor, None, ()), rtol=1e-4, atol=1e-6)
    whole = trained(letters, tmp_path / "a", 4, **how)
    (tmp_path / "b").mkdir()
    broken_off(tmp_path / "a", tmp_path / "b")
    np.testing.assert_allclose(trained(letters, tmp_path / "b", init_from="resume"), whole[6:], rtol=1e-5)


def test_half_precision_follows(letters: Path, tmp_path: Path, two: Path) -> None:  # noqa: F811
    """Of the messages, and of the products, where each group has a loss scale of its own."""
    changes: tuple[dict[str, Any], ...] = {"dp_reduce_dtype": "bfloat16"}, {"dtype": "float16"}
    for how in changes:
        mine = trained(letters, tmp_path, overwrite=True, **how)
        np.testing.assert_allclose(mine[:, 0], figures(two)[:, 0], rtol=1e-2)
        assert not np.array_equal(mine, figures(two))


# --- what is sent ---------------------------------------------------------------------------------------------------


def _sent(world: World, settings: TrainOptions) -> dict[str, tuple[int, int]]:
    """(calls, bytes) over dp, by the account, and by torch's profiler of all that gloo sums."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        train_tp.main(world, settings)
    account, found = world.ledger.snapshot(), {}
    for op in ("all_reduce", "all_gather"):
        tally = total(account, block="data_parallel", op=op)
        found[op] = tally.calls, tally.bytes
    shapes = [event.input_shapes[0] for event in profiler.events() if event.name == "gloo:all_reduce"]
    found["profiler"] = len(shapes), 4 * sum(int(np.prod(shape)) for shape in shapes)
    return found


def test_nothing_travels_between_two_averagings(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """All of dp's messages: the parameters and two small ones an averaging, two losses an evaluation."""
    numbers = sum(p.numel() for p in TensorParallelGPT(CONFIG, Axis("tp")).parameters())
    for every, averagings in ((3, 3), (8, 1)):
        settings = options(letters, tmp_path, **{**ROWS, "dp_every": every, "tp": 1, "overwrite": True})
        for sent in run_ranks(2, _sent, settings, tp=1):
            assert sent["all_reduce"] == (averagings + 2 * 2, 4 * (averagings * numbers + 2 * 2))
            assert sent["all_gather"] == (averagings, 8 * 8 * 5)  # 5 numbers in double precision of each of 8 iterations
            assert sent["profiler"] == sent["all_reduce"]


def _calls(world: World, settings: TrainOptions) -> dict[tuple[int, ...], int]:
    train_tp.main(world, settings)
    return {track.ranks: track.number for track in world.ledger.tracks if track.name == "dp"}


def test_groups_of_several_ranks_talk_among_themselves(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """Between the two: a sum of the parameters and an all-gather of figures, for each of 3 averagings."""
    settings = options(letters, tmp_path, **{**ROWS, "tp": 1, "dp_groups": 2, "check_replicas": 0})
    first, second, third, fourth = run_ranks(4, _calls, settings, tp=1)
    assert first[0, 2] == third[0, 2] == second[1, 3] == fourth[1, 3] == 3 * 2
    assert first[0, 1] == second[0, 1] >= 8 * 2 and (2, 3) in third


def test_a_large_model_is_sent_in_pieces(letters: Path, tmp_path: Path, two: Path) -> None:  # noqa: F811
    def _small(world: World, settings: TrainOptions) -> int:
        local_steps.MESSAGE = 1000
        train_tp.main(world, settings)
        return total(world.ledger.snapshot(), block="data_parallel", op="all_reduce").calls

    numbers = sum(p.numel() for p in TensorParallelGPT(CONFIG, Axis("tp")).parameters())
    calls = run_ranks(2, _small, options(letters, tmp_path, **{**ROWS, "tp": 1}), tp=1)
    assert calls == [3 * -(-numbers // 1000) + 2 * 2] * 2
    assert np.array_equal(figures(tmp_path), figures(two))


def _deaf(world: World, settings: TrainOptions, name: str) -> None:
    alone = {"all_reduce": lambda x, axis, way: 2 * x, "all_gather": lambda x, axis, way: x.unsqueeze(0)}
    setattr(local_steps, name, alone[name])
    train_tp.main(world, settings)


@pytest.mark.parametrize("name", ["all_reduce", "all_gather"])
def test_each_message_is_needed(letters: Path, tmp_path: Path, two: Path, name: str) -> None:  # noqa: F811
    run_ranks(2, _deaf, options(letters, tmp_path, **{**ROWS, "tp": 1, "check_replicas": 0}), name, tp=1)
    assert np.abs(figures(tmp_path) / figures(two) - 1).max() > 1e-3


# --- checkpoints ----------------------------------------------------------------------------------------------------


def broken_off(home: Path, out: Path) -> None:
    """A run that has come to iteration 6."""
    (out / "latest").write_text("step-000006\n")
    shutil.copytree(home / "step-000006", out / "step-000006")


def test_a_save_waits_for_an_averaging(two: Path) -> None:
    saved = [path.name for path in sorted(two.glob("step-*"))]
    assert saved == ["step-000003", "step-000006", "step-000008"]
    assert sorted(path.name for path in (two / saved[0]).iterdir() if path.is_dir()) == ["optimizer", "optimizer-1", "outer"]
    first, second = (ShardDirectory(two / saved[0] / name) for name in ("optimizer", "optimizer-1"))
    assert not torch.equal(*(one.read("exp_avg.transformer.wpe.weight", None, ()) for one in (first, second)))


@pytest.mark.parametrize("tp, pp, background", [(1, 1, False), (1, 1, True), (2, 1, False), (1, 2, False)])
def test_a_run_goes_on_bit_for_bit(
    letters: Path, tmp_path: Path, two: Path, tp: int, pp: int, background: bool  # noqa: F811
) -> None:
    home, out, how = two, tmp_path / "out", {"tp": tp, "pp": pp, "save_interval": 2, "async_save": background}
    if tp * pp > 1:
        trained(letters, home := tmp_path / "whole", **how, keep_last=0)
    out.mkdir()
    broken_off(home, out)
    assert np.array_equal(trained(letters, out, init_from="resume", **how), figures(home)[6:])
    for name in ("", "optimizer", "optimizer-1", "outer"):
        ours, theirs = (read_manifest(place / "step-000008" / name).files for place in (out, home))
        assert ours == theirs  # sizes and sha256


def test_a_run_without_outer_momentum_keeps_none(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = trained(letters, tmp_path / "a", outer_momentum=0.0, save_interval=2)
    assert not list((tmp_path / "a").glob("*/outer"))
    (tmp_path / "b").mkdir()
    broken_off(tmp_path / "a", tmp_path / "b")
    assert np.array_equal(trained(letters, tmp_path / "b", outer_momentum=0.0, init_from="resume"), whole[6:])


def _loaded(world: World, settings: TrainOptions) -> tuple[Tensor, float]:
    """A moment, and the sum of the outer momentum's squares, before the first iteration."""
    run = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    moment = run.optimizer.state[run.model.transformer.wpe.weight]["exp_avg"]
    return moment, run.local.momentum.square().sum().item() if run.local else 0.0


def test_at_another_dp_groups_share_the_moments(letters: Path, tmp_path: Path, two: Path) -> None:  # noqa: F811
    """Group g takes those of group g mod 2 of the 2 that were saved; without local steps all take the first's."""
    broken_off(two, tmp_path)
    saved = [ShardDirectory(two / "step-000006" / name).read("exp_avg.transformer.wpe.weight", None, ())
             for name in ("optimizer", "optimizer-1")]  # fmt: skip
    outer = ShardDirectory(two / "step-000006" / "outer")
    squares = sum(outer.read(name, None, ()).square().sum().item() for name in outer.manifest.tensors)
    for dp, every, expected in ((3, 3, (0, 1, 0)), (1, 3, (0,)), (2, 0, (0, 0))):
        settings = options(letters, tmp_path, **{**ROWS, "tp": 1, "dp_every": every, "init_from": "resume"})
        for (moment, outer_squares), group in zip(run_ranks(dp, _loaded, settings, tp=1), expected, strict=True):
            assert torch.equal(moment, saved[group])
            assert outer_squares == pytest.approx(squares if every else 0.0)
        mine = trained(letters, tmp_path, dp, dp_every=every, init_from="resume", max_iters=12)
        assert len(mine) == 6 and np.abs(mine[:2, 0] / figures(two)[6:, 0] - 1).max() < 0.05
        shutil.rmtree(tmp_path / "step-000012")
        (tmp_path / "latest").write_text("step-000006\n")


def test_a_plain_run_goes_on_with_local_steps(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    trained(letters, tmp_path, dp_every=0, max_iters=4)
    assert [line["iter"] for line in curve(tmp_path)] == [*range(4)]
    trained(letters, tmp_path, init_from="resume")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000004", "step-000008"]


def test_a_damaged_group_is_refused(letters: Path, tmp_path: Path, two: Path) -> None:  # noqa: F811
    broken_off(two, tmp_path)
    victim = tmp_path / "step-000006" / "optimizer-1" / "rank-00-of-01.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-3] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(AssertionError, match="optimizer-1.* is damaged or from another split"):
        trained(letters, tmp_path, init_from="resume")
    state = tmp_path / "step-000006" / "training.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "groups": []}))
    with pytest.raises(AssertionError, match="training.json is damaged or of another version"):
        trained(letters, tmp_path, init_from="resume")


# --- a run ----------------------------------------------------------------------------------------------------------


def test_evaluations_wait_for_an_averaging(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    trained(letters, tmp_path, eval_interval=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [*range(9)]
    assert [line["iter"] for line in lines if "val_loss" in line] == [0, 6, 8]  # 4 in its round of 3, 8 at the end


def _told_to_stop(world: World, settings: TrainOptions) -> str:
    iterate = loop.iterate

    def stopping(run: setup.Run, *rest: Any) -> Any:
        if run.progress.iter_num == 1 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(run, *rest)

    loop.iterate = stopping  # type: ignore[assignment]
    try:
        train_tp.main(world, settings)
    except Stopped as stop:
        return str(stop)
    return ""


def test_a_signal_to_one_group_ends_the_run_at_the_next_averaging(letters: Path, tmp_path: Path, two: Path) -> None:  # noqa: F811
    ends = run_ranks(2, _told_to_stop, options(letters, tmp_path, **{**ROWS, "tp": 1}), tp=1)
    said = f"SIGTERM: stopped after 3 iterations, saved {tmp_path}/step-000003. --init_from=resume goes on from there."
    assert ends == [said] * 2
    mine = trained(letters, tmp_path, init_from="resume")
    assert np.array_equal(mine, figures(two))


def _overflowing(world: World, settings: TrainOptions) -> None:
    """The second group's gradient is infinite in the last iteration."""
    norm = loop.gradients.grad_norm

    def infinite(*given: Any) -> Tensor:
        last = world.rank == 1 and "step 7" in world.ledger.doing
        return norm(*given) * (torch.inf if last else 1.0)

    loop.gradients.grad_norm = infinite  # type: ignore[assignment]
    train_tp.main(world, settings)


def test_a_gradient_of_one_group_that_is_not_finite(
    letters: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    run_ranks(2, _overflowing, options(letters, tmp_path, **{**ROWS, "tp": 1}), tp=1)
    assert "not saved at iteration 8: the norm of the gradient is inf" in capfd.readouterr().out
    assert not list(tmp_path.glob("step-*"))


def _drifting(world: World, settings: TrainOptions, at: int) -> str:
    iterate = loop.iterate

    def drifted(run: setup.Run, *rest: Any) -> Any:
        if run.progress.iter_num == at and world.rank == 1:
            with torch.no_grad():
                dict(run.model.named_parameters())["transformer.h.0.ln_1.weight"][1] += 0.5
        return iterate(run, *rest)

    loop.iterate = drifted  # type: ignore[assignment]
    try:
        train_tp.main(world, settings)
    except DriftError as error:
        return str(error)
    return ""


def test_groups_may_differ_between_averagings_and_not_after_one(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = options(letters, tmp_path, **{**ROWS, "tp": 1, "check_replicas": 2})
    assert run_ranks(2, _drifting, settings, 4, tp=1) == ["", ""]
    ends = run_ranks(2, _drifting, replace(settings, overwrite=True), 6, tp=1)
    said = "transformer.h.0.ln_1.weight differs between dp ranks 0 and 1 (max 5e-01) at step 6."
    assert ends == [f"replicated parameter {said}"] * 2


@pytest.mark.parametrize("changes, said", [
    ({"dp_shard": True}, "--dp_every=3 together with --dp_shard=True needs groups of several dp ranks: use --dp_groups=N, "),
    ({"dp_groups": 3}, "--dp_groups=3 does not divide dp=2."),
    ({"dp_groups": 2, "dp_every": 0}, "--dp_groups=2 needs --dp_every=H: without it there are no groups."),
])  # fmt: skip
def test_groups_that_cannot_be_are_refused(letters: Path, tmp_path: Path, changes: Any, said: str) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match=re.escape(f"UserError: {said}")):
        trained(letters, tmp_path, **changes)


# --- memory ---------------------------------------------------------------------------------------------------------


def _held(world: World, settings: TrainOptions) -> tuple[int, int]:
    """(bytes of the outer state, the most that an averaging takes beside it)"""
    run = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    assert run.local is not None
    return run.local.before.nbytes + run.local.momentum.nbytes, most_held(world, run.local.average)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_dry_run_counts_the_outer_state(letters: Path, tmp_path: Path, momentum: float) -> None:  # noqa: F811
    size = {**ROWS, "tp": 1, "outer_momentum": momentum, "n_embd": 128}
    held, most = run_ranks(2, _held, options(letters, tmp_path, **size), tp=1)[0]
    config = replace(CONFIG, n_embd=128)
    plain = training(config, 1, dp=2, micro_steps=2)
    plan = replace(plain, groups=2, outer=1 + (momentum > 0))
    assert plan.optimizer - plain.optimizer == held
    assert 2 * plan.gradients == plain.gradients  # no buckets
    assert plan.live()[0] - plan.parameters - plan.optimizer >= 0.98 * most
    assert most == pytest.approx(2 * plan.parameters, rel=0.02)

"""train_tp.main on forked ranks: the same curve at every layout, exact resume, and what ends a run."""

import json
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import PYTHON, run_ranks
from safetensors.torch import load_file
from torch import Tensor

import shard_checkpoint
import train_tp
from base.errors import UserError
from checkpoints.manifest import read_manifest
from checkpoints.shards import ShardDirectory
from cli.options import TrainOptions
from model import GPT, GPTConfig
from parallel.replicas import DriftError
from text.dataset import EVAL_STREAM, Dataset, batch
from text.tokenizer import CharTokenizer
from train import checkpoint as training
from train import loop, setup
from world.mesh import World

TINY: dict[str, Any] = {
    "dataset": "letters", "n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 8, "batch_size": 2, "bias": True,
    "gradient_accumulation_steps": 4, "max_iters": 20, "eval_interval": 10, "eval_iters": 2, "learning_rate": 1e-2,
    "min_lr": 1e-3, "warmup_iters": 3, "lr_decay_iters": 20, "log_interval": 100, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with something to learn: 13 letters, each mostly followed by the next."""
    home = tmp_path_factory.mktemp("data") / "letters"
    home.mkdir()
    steps = np.random.default_rng(0).choice([1, 1, 1, 2, 5], 3000)
    ids = (np.cumsum(steps) % 13).astype("<u2")
    ids[:2700].tofile(home / "train.bin")
    ids[2700:].tofile(home / "val.bin")
    (home / "tokenizer.json").write_text(json.dumps({"kind": "char", "chars": list("abcdefghijklm")}))
    return home.parent


def options(letters: Path, out: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(**{**TINY, "data_dir": str(letters), "out_dir": str(out), **changes})


def _train(world: World, settings: TrainOptions) -> None:
    train_tp.main(world, settings)


def curve(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def figures(out: Path) -> np.ndarray:
    return np.array([[line["loss"], line["grad_norm"]] for line in curve(out)])


def trained(letters: Path, out: Path, size: int, tp: int, **changes: Any) -> np.ndarray:
    run_ranks(size, _train, options(letters, out, tp=tp, **changes), tp=tp)
    return figures(out)


@pytest.fixture(scope="module")
def one(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """The run on one rank that the others must repeat."""
    out = tmp_path_factory.mktemp("one")
    return out, trained(letters, out, 1, 1)


@pytest.mark.parametrize("size, tp", [(2, 2), (3, 3), (4, 4), (2, 1), (4, 2)], ids=["tp2", "tp3", "tp4", "dp2", "dp2-tp2"])
def test_the_curve_is_the_same_at_every_layout(letters: Path, tmp_path: Path, one: Any, size: int, tp: int) -> None:
    mine, expected = trained(letters, tmp_path, size, tp), one[1]
    assert len(mine) == 20
    np.testing.assert_allclose(mine, expected, rtol=1e-4)
    assert mine[-1, 0] < 0.8 * mine[0, 0]  # and it learns


@pytest.mark.parametrize(
    "size, tp, recompute",
    [(2, 2, False), (3, 3, False), (4, 4, True), (4, 2, False)],
    ids=["tp2", "tp3", "tp4-recomputed", "dp2-tp2"],
)
def test_the_curve_is_the_same_with_the_sequence_split(
    letters: Path, tmp_path: Path, one: Any, size: int, tp: int, recompute: bool
) -> None:
    mine = trained(letters, tmp_path, size, tp, sequence_parallel=True, activation_checkpointing=recompute)
    np.testing.assert_allclose(mine, one[1], rtol=1e-4)


def test_a_run_goes_on_with_the_sequence_split(letters: Path, tmp_path: Path, one: Any) -> None:
    trained(letters, tmp_path, 3, 3, max_iters=10)
    mine = trained(letters, tmp_path, 2, 2, init_from="resume", sequence_parallel=True)
    np.testing.assert_allclose(mine, one[1], rtol=1e-4)


def test_a_sequence_too_short_to_split_is_refused(letters: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as error:
        trained(letters, tmp_path, 4, 4, block_size=3, sequence_parallel=True)
    said = "block_size=3 is shorter than tp=4, some ranks would have no token. Use a --tp of at most 3."
    assert f"UserError: --sequence_parallel=True: {said}" in str(error.value)
    trained(letters, tmp_path, 1, 1, block_size=1, max_iters=1, sequence_parallel=True)  # one rank splits nothing


def test_the_reference_trains_alike(letters: Path, one: Any) -> None:
    """model.py with torch's own clipping and AdamW, written out: not this program's loop."""
    config = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=4, n_embd=16)
    model, settings = GPT(config), options(letters, Path())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.95),
    )  # fmt: skip
    tokens, rows = Dataset(letters / "letters").train, []
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(settings, step)
        _, loss = model(*batch(tokens, range(8), 8, settings.seed, step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([loss.item(), norm.item()])
    np.testing.assert_allclose(one[1], np.array(rows), rtol=1e-4)


def test_metrics_say_what_happened(one: Any) -> None:
    lines = [json.loads(line) for line in (one[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [*range(20), 20]
    assert {"iter", "loss", "lr", "grad_norm", "tokens_per_s", "all_reduce_per_layer", "comm_fraction"} <= lines[5].keys()
    assert [line["iter"] for line in lines if "val_loss" in line] == [0, 10, 20]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]


def test_metrics_count_megatrons_all_reduces(letters: Path, tmp_path: Path) -> None:
    trained(letters, tmp_path, 2, 2, max_iters=2)
    assert curve(tmp_path)[1]["all_reduce_per_layer"] == {"forward": 2.0, "backward": 2.0}


def _data_parallel_account(world: World, settings: TrainOptions) -> tuple[int, dict[str, int]]:
    train_tp.main(world, settings)
    mine = {f"{e.direction}": t.bytes for e, t in world.ledger.tallies.items() if e.block == "data_parallel"}
    calls = {f"{e.direction}": t.calls for e, t in world.ledger.tallies.items() if e.block == "data_parallel"}
    return calls["backward"], mine


def test_data_parallel_messages_are_accounted_and_sent_once_an_iteration(letters: Path, tmp_path: Path) -> None:
    """With 4 micro-batches an iteration the gradients travel in the last one's backward pass alone."""
    settings = options(letters, tmp_path, tp=1, max_iters=3, eval_interval=100)
    _, moved = run_ranks(2, _data_parallel_account, settings, tp=1)[0]
    config = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=4, n_embd=16)
    padded = sum(p.numel() for p in GPT(config).parameters()) + (64 - 13) * 16  # the table's padding rows travel along
    assert moved["backward"] == 3 * 4 * padded


def deaf_to_gradients(world: World, settings: TrainOptions) -> None:
    from parallel import data_parallel

    def alone(x: torch.Tensor, axis: Any, direction: str, dtype: torch.dtype) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(x)
        return future

    data_parallel.average_later = alone  # type: ignore[assignment]
    train_tp.main(world, settings)


def test_the_gradient_average_is_needed(letters: Path, tmp_path: Path, one: Any) -> None:
    run_ranks(2, deaf_to_gradients, options(letters, tmp_path, tp=1), tp=1)
    assert np.abs(figures(tmp_path) / one[1] - 1).max() > 1e-3


def deaf_to_losses(world: World, settings: TrainOptions) -> None:
    loop.all_reduce = lambda x, axis, direction, op="sum": x
    train_tp.main(world, settings)


def test_the_loss_average_is_needed(letters: Path, tmp_path: Path, one: Any) -> None:
    run_ranks(2, deaf_to_losses, options(letters, tmp_path, tp=1), tp=1)
    assert np.abs(figures(tmp_path)[:, 0] / one[1][:, 0] - 1).max() > 1e-3


# --- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("size, tp", [(1, 1), (2, 2)])
def test_resume_continues_bit_for_bit(letters: Path, tmp_path: Path, size: int, tp: int, dropout: float) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    expected = trained(letters, whole, size, tp, dropout=dropout)
    trained(letters, halves, size, tp, dropout=dropout, max_iters=10)
    mine = trained(letters, halves, size, tp, dropout=dropout, init_from="resume")
    assert np.array_equal(mine, expected)
    for rank in range(tp):
        for part in ("", "optimizer/"):
            name = f"step-000020/{part}rank-{rank:02d}-of-{tp:02d}.safetensors"
            a, b = load_file(whole / name), load_file(halves / name)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("before, after", [(2, 3), (3, 1), (1, 4), (4, 2)])
def test_resume_at_another_tp(letters: Path, tmp_path: Path, one: Any, before: int, after: int) -> None:
    trained(letters, tmp_path, before, before, max_iters=10)
    mine = trained(letters, tmp_path, after, after, init_from="resume")
    np.testing.assert_allclose(mine, one[1], rtol=1e-4)
    assert read_manifest(tmp_path / "step-000020").tp == after


def test_resume_under_data_parallel(letters: Path, tmp_path: Path, one: Any) -> None:
    trained(letters, tmp_path, 2, 2, max_iters=10)
    mine = trained(letters, tmp_path, 4, 2, init_from="resume")
    np.testing.assert_allclose(mine, one[1], rtol=1e-4)


def test_a_resume_after_a_crash_repeats_the_lines_it_lost(letters: Path, tmp_path: Path, one: Any) -> None:
    trained(letters, tmp_path, 1, 1, max_iters=10)
    with open(tmp_path / "metrics.jsonl", "a") as file:  # iterations 10 to 12 ran, and were lost with the process
        file.writelines(json.dumps({"iter": i, "loss": 9.9, "grad_norm": 9.9}) + "\n" for i in (10, 11, 12))
    assert np.array_equal(trained(letters, tmp_path, 1, 1, init_from="resume"), one[1])


def test_checkpoints_are_kept_and_pointed_at(letters: Path, tmp_path: Path) -> None:
    trained(letters, tmp_path, 1, 1, eval_interval=4, keep_last=2, learning_rate=1e-3)
    assert [path.name for path in training.steps(tmp_path)] == ["step-000016", "step-000020"]
    assert (tmp_path / "latest").read_text() == "step-000020\n"
    assert not list(tmp_path.glob(".*tmp*"))


def test_save_interval_saves_between_evaluations(letters: Path, tmp_path: Path) -> None:
    trained(letters, tmp_path, 1, 1, max_iters=8, eval_interval=100, save_interval=3, keep_last=0)
    assert [path.name for path in training.steps(tmp_path)] == ["step-000003", "step-000006", "step-000008"]


def test_only_the_best_is_saved_when_asked(letters: Path, tmp_path: Path) -> None:
    trained(
        letters, tmp_path, 1, 1, max_iters=12, eval_interval=4, always_save_checkpoint=False, learning_rate=0.0, decay_lr=False
    )
    assert training.steps(tmp_path) == []  # with no learning rate nothing is ever better than the start


def test_an_earlier_run_is_not_overwritten_unasked(letters: Path, tmp_path: Path) -> None:
    trained(letters, tmp_path, 1, 1, max_iters=10)
    with pytest.raises(AssertionError, match="has checkpoints of an earlier run"):
        trained(letters, tmp_path, 1, 1)
    assert (tmp_path / "step-000010" / "shards.json").is_file()
    trained(letters, tmp_path, 1, 1, max_iters=5, eval_interval=5, overwrite=True)
    assert [path.name for path in training.steps(tmp_path)] == ["step-000005"]


def test_a_damaged_optimizer_shard_is_refused(letters: Path, tmp_path: Path) -> None:
    trained(letters, tmp_path, 2, 2, max_iters=10)
    victim = tmp_path / "step-000010" / "optimizer" / "rank-01-of-02.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-3] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(AssertionError, match="is damaged or from another split"):
        trained(letters, tmp_path, 2, 2, init_from="resume")


# --- fine-tuning and evaluation -------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_sources_weights(letters: Path, tmp_path: Path, one: Any) -> None:
    out = tmp_path / "tuned"
    mine = trained(letters, out, 2, 2, init_from=str(one[0]), max_iters=3)
    assert mine[0, 0] < 0.8 * one[1][0, 0]
    best = json.loads((one[0] / "step-000020" / "training.json").read_text())["progress"]["best_val_loss"]
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(best, rel=1e-5)


def test_a_shorter_context_crops_the_position_table(letters: Path, tmp_path: Path, one: Any) -> None:
    trained(letters, tmp_path / "tuned", 1, 1, init_from=str(one[0]), max_iters=1, block_size=5)
    assert read_manifest(tmp_path / "tuned" / "step-000001").model.block_size == 5


PAGES = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from train import setup
{keep}
def iteration():
    return sum(torch.ones(2**20 * n).sum() for n in (1, 5, 20))  # 4, 20 and 80 MB
for _ in range(8):
    iteration()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    iteration()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again() -> None:
    faults = []
    for keep in ("", "setup.set_up_heap(keep=True)"):
        script = PAGES.format(root=str(Path(train_tp.__file__).parent), keep=keep)
        done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
        faults.append(int(done.stdout))
    assert faults[0] > 4 * 5000 and faults[1] < faults[0] / 10, faults


HOLES = """
import sys
sys.path.insert(0, {root!r})
import torch
from train import setup
setup.set_up_heap(keep={keep})
def resident():
    return int(open("/proc/self/statm").read().split()[1])
torch.ones(4)
before = resident()
tensors = [torch.ones(2**20) for _ in range(40)]  # 4 MB each
del tensors[::2]
print((resident() - before) * 4096 / 2**22)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_given_back_where_a_run_is_sharded() -> None:
    held = []
    for keep in (True, False):
        script = HOLES.format(root=str(Path(train_tp.__file__).parent), keep=keep)
        done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
        held.append(float(done.stdout))
    assert held == pytest.approx([40, 20], abs=2)


def _evaluation(world: World, settings: TrainOptions) -> dict[str, float]:
    run_ = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    return loop.evaluate(run_, settings.eval_iters)


def test_evaluation_is_the_reference_on_the_same_batches(letters: Path, tmp_path: Path) -> None:
    losses = run_ranks(4, _evaluation, options(letters, tmp_path, tp=2), tp=2)
    assert all(loss == losses[0] for loss in losses)
    model = GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=4, n_embd=16))
    tokens = Dataset(letters / "letters").val
    expected = [model(*batch(tokens, range(2 * k, 2 * k + 2), 8, 1337, 0, EVAL_STREAM))[1].item() for k in range(2)]
    assert losses[0]["val"] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_eval_only_writes_nothing(letters: Path, tmp_path: Path) -> None:
    run_ranks(1, _train, options(letters, tmp_path / "none", eval_only=True))
    assert not (tmp_path / "none").exists()


def test_a_run_goes_on_with_a_shorter_context(letters: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The position table and its moments are cut, alike at every layout; what is said is what is used."""
    trained(letters, tmp_path / "begun", 1, 1, max_iters=10)
    capfd.readouterr()
    for name, size, tp, changes in (("one", 1, 1, {}), ("three", 3, 3, {}), ("dp", 2, 1, {"dp_shard": True})):
        out = Path(shutil.copytree(tmp_path / "begun", tmp_path / name))
        trained(letters, out, size, tp, init_from="resume", block_size=4, max_iters=14, **changes)
        assert capfd.readouterr().err == "resume: block_size is now 4, it was 8\n"
        assert read_manifest(out / "step-000014").model.block_size == 4
        moments = ShardDirectory(out / "step-000014" / "optimizer")
        assert moments.read("exp_avg_sq.transformer.wpe.weight", None, ()).shape == (4, 16)
        np.testing.assert_allclose(figures(out)[10:], figures(tmp_path / "one")[10:], rtol=1e-4)


@pytest.mark.parametrize(("changes", "said"), [
    ({}, ""),
    ({"block_size": 1024, "n_layer": 12, "dtype": "float32", "sync": ""}, ""),
    ({"block_size": 16}, "block_size=16 is not used: the weights have 8\n"),
    ({"n_layer": 3, "n_embd": 32}, "n_layer=3 is not used: the weights have 2\nn_embd=32 is not used: the weights have 16\n"),
    ({"dtype": "bfloat16"}, "resume: dtype is now 'bfloat16', it was 'float32'\n"),
    ({"sync": "mlp"}, "resume: sync is now 'mlp', it was 'all'\n"),
    ({"batch_size": 1, "seed": 3}, "resume: batch_size is now 1, it was 2\nresume: seed is now 3, it was 1337\n"),
], ids=str)  # fmt: skip
def test_a_resumed_run_says_what_is_used(
    letters: Path, one: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    out = Path(shutil.copytree(one[0], tmp_path / "out"))
    run_ranks(2, _prepare, options(letters, out, init_from="resume", **changes))
    assert capfd.readouterr().err == said


def test_a_schedule_that_stays_is_no_change(letters: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The weights say it; --sync need not be given again."""
    trained(letters, tmp_path, 2, 2, max_iters=2, sync="mlp")
    run_ranks(2, _prepare, options(letters, tmp_path, init_from="resume"))
    assert capfd.readouterr().err == ""
    run_ranks(2, _prepare, options(letters, tmp_path, init_from="resume", sync="all"))
    assert capfd.readouterr().err == "resume: sync is now 'all', it was 'mlp'\n"


def test_resume_where_there_is_no_run_says_what_works(letters: Path, one: Any, tmp_path: Path) -> None:
    """And what it says works."""
    step = one[0] / "step-000020"
    (tmp_path / "nanogpt").mkdir()
    save_nanogpt(tmp_path / "nanogpt" / "ckpt.pt", "letters")
    assert shard_checkpoint.main(["split", f"--init_from={step}", "--tp=2", f"--out={tmp_path / 'shards'}"]) == 0
    assert shard_checkpoint.main(["merge", f"--shards={tmp_path / 'shards'}", f"--out={tmp_path / 'hf'}"]) == 0
    for name, what in (("nanogpt", ""), ("shards", "shards"), ("hf", "a Hugging Face model")):
        place = tmp_path / name
        with pytest.raises(UserError) as error:
            training.read_state(place)
        fault = f"{place} has no checkpoint to resume. It has {what}, without an optimizer's state that is read"
        if name == "nanogpt":
            place = place / "ckpt.pt"
            fault = f"{place} has no AdamW state of this model's parameters"
        assert str(error.value) == f"{fault}: --init_from={place} with another --out_dir starts from its weights."
        trained(letters, tmp_path / f"{name}-out", 1, 1, init_from=str(place), max_iters=1)
    with pytest.raises(UserError) as error:
        training.read_state(step)
    assert str(error.value).endswith(f"It is one itself: --out_dir={one[0].resolve()} goes on from the newest there.")
    with pytest.raises(UserError, match="Start with --init_from=scratch, or name its out_dir"):
        training.read_state(tmp_path)


def _prepare(world: World, settings: TrainOptions) -> None:
    setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))


# --- what ends a run ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(letters: Path, tmp_path: Path) -> None:
    trained(letters, tmp_path, 1, 1, max_iters=10)
    with pytest.raises(AssertionError) as error:
        trained(letters, tmp_path, 2, 2, init_from="resume", learning_rate=1e30, min_lr=1e30, decay_lr=False, grad_clip=0.0)
    assert "UserError: loss is nan at iteration 11; last good checkpoint: " in str(error.value)
    assert (tmp_path / "latest").read_text() == "step-000010\n"


def test_foreign_tokens_are_refused(letters: Path, tmp_path: Path, one: Any) -> None:
    other = tmp_path / "data" / "letters"
    other.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (other / name).write_bytes((letters / "letters" / name).read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(CharTokenizer(list("nopqrstuvwxyz")).to_json()))
    with pytest.raises(AssertionError, match="was trained on char tokens, the dataset's tokenizer is another"):
        trained(other.parent, tmp_path / "out", 1, 1, init_from=str(one[0]))


def save_nanogpt(path: Path, dataset: str, vocab_size: int = 13) -> None:
    config = GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=2, n_head=4, n_embd=16)
    args = {key: value for key, value in config.as_json().items() if key != "activation"}
    raw = {"model": GPT(config).state_dict(), "model_args": args, "config": {"dataset": dataset}}
    torch.save(raw, path)


def test_the_dataset_that_a_checkpoint_names_is_looked_for_in_data_dir(
    letters: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fine-tuning on the very dataset; on another whose tokens are others; and where it is not there."""
    save_nanogpt(tmp_path / "ckpt.pt", "letters")
    trained(letters, tmp_path / "out", 1, 1, init_from=str(tmp_path / "ckpt.pt"), max_iters=1)
    assert "was trained on" not in capfd.readouterr().err
    shutil.copytree(letters, tmp_path / "data")
    other = Path(shutil.copytree(letters / "letters", tmp_path / "data" / "other"))
    (other / "tokenizer.json").write_text(json.dumps(CharTokenizer(list("nopqrstuvwxyz")).to_json()))
    start = {"init_from": str(tmp_path / "ckpt.pt"), "dataset": "other", "max_iters": 1}
    with pytest.raises(AssertionError, match="was trained on char tokens, the dataset's tokenizer is another"):
        trained(tmp_path / "data", tmp_path / "none", 1, 1, **start)
    shutil.rmtree(tmp_path / "data" / "letters")
    trained(tmp_path / "data", tmp_path / "out2", 2, 2, **start)
    said = f"{tmp_path / 'ckpt.pt'} was trained on the dataset letters, which is not in {tmp_path / 'data'}: its tokens are "
    assert capfd.readouterr().err.count(f"{said}taken to be those of {other}.\n") == 1
    found = json.loads((tmp_path / "out2" / "step-000001" / "tokenizer.json").read_text())
    assert found == {"kind": "char", "chars": list("nopqrstuvwxyz")}


def test_the_weights_tokenizer_is_kept_where_the_dataset_has_ids(letters: Path, tmp_path: Path, one: Any) -> None:
    """Of a meta.pkl with vocab_size alone nobody knows what its ids are; on with a resumed run, too."""
    ids = Path(shutil.copytree(letters / "letters", tmp_path / "data" / "letters"))
    (ids / "tokenizer.json").unlink()
    (ids / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 13, "split": [0.9, 0.1]}))
    for init_from, iters in ((str(one[0]), 1), ("resume", 2)):
        trained(ids.parent, tmp_path / "out", 1, 1, init_from=init_from, max_iters=iters)
        known = json.loads((tmp_path / "out" / f"step-00000{iters}" / "tokenizer.json").read_text())
        assert known == {"kind": "char", "chars": list("abcdefghijklm")}
    trained(ids.parent, tmp_path / "scratch", 1, 1, max_iters=1)
    known = json.loads((tmp_path / "scratch" / "step-000001" / "tokenizer.json").read_text())
    assert known == {"kind": "ids", "n_vocab": 13}


@pytest.mark.parametrize("rows, dp, expected", [
    ((40, 12), 1, (40, 12)), ((40, 12), 4, (10, 12)), ((1, 64), 2, (1, 32)), ((3, 4), 2, (2, 3)), ((5, 6), 3, (2, 5)),
])  # fmt: skip
def test_rows_are_dealt_without_gap_or_overlap(rows: tuple[int, int], dp: int, expected: tuple[int, int]) -> None:
    settings = TrainOptions(gradient_accumulation_steps=rows[0], batch_size=rows[1])
    layouts = [setup.Rows.of(settings, rank, dp) for rank in range(dp)]
    assert (layouts[0].micro_steps, layouts[0].micro_rows) == expected
    dealt = [row for layout in layouts for micro in range(layout.micro_steps) for row in layout.micro(micro)]
    assert dealt == list(range(rows[0] * rows[1]))


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match="an iteration has 15 rows .* dp=2 ranks cannot share them evenly"):
        setup.Rows.of(TrainOptions(gradient_accumulation_steps=5, batch_size=3), 0, 2)


def test_the_learning_rate_follows_the_published_schedule() -> None:
    settings = TrainOptions(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [loop.learning_rate(settings, i) for i in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1.0, 0.55, 0.1, 0.1])


def test_streams_differ_by_step_micro_and_dp_rank() -> None:
    seeds = {loop.stream_seed(1337, step, micro, dp) for step in range(20) for micro in range(5) for dp in range(4)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)


def _waits(world: World, settings: TrainOptions) -> list[str]:
    """The calls of the third iteration that would wait for a GPU, in its own thread and autograd's."""
    run_ = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    for _ in range(2):
        loop.iterate(run_, 1e-2)
    found: list[str] = []

    def noting(name: str) -> Any:
        call = getattr(torch.Tensor, name)

        def noted(self: Tensor, *args: Any) -> Any:
            if sys._getframe(1).f_code.co_name != "_host":  # gloo's, which nccl has not
                found.append(name)
            return call(self, *args)

        return noted

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        setattr(torch.Tensor, name, noting(name))
    loop.iterate(run_, 1e-2, lambda: (0, 1))
    return list(found)


@pytest.mark.parametrize("how", [{}, {"dtype": "float16"}, {"dp_shard": True}], ids=str)
def test_an_iteration_waits_for_its_device_once(letters: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    tp = 1 if how.get("dp_shard") else 2
    settings = options(letters, tmp_path, tp=tp, grad_clip=0.5, **how)
    assert run_ranks(2, _waits, settings, tp=tp) == [["tolist"]] * 2


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(letters: Path, tmp_path: Path, one: Any, dtype: str, sequence: bool) -> None:
    mine = trained(letters, tmp_path, 2, 2, dtype=dtype, max_iters=8, sequence_parallel=sequence)
    np.testing.assert_allclose(mine[:, 0], one[1][:8, 0], rtol=2e-2)  # bfloat16 keeps 8 bits
    assert read_manifest(tmp_path / "step-000008").dtype == "float32"  # master weights


def _overflow(world: World, settings: TrainOptions) -> tuple[int, float, bool]:
    run_ = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    run_.progress.loss_scale = 2.0**120
    before = [p.detach().clone() for p in run_.model.parameters()]
    loop.iterate(run_, 1e-2)
    same = all(torch.equal(a, b) for a, b in zip(before, run_.model.parameters(), strict=True))
    return run_.progress.optimizer_steps, run_.progress.loss_scale, same


def test_an_overflow_in_float16_is_skipped_by_all_ranks_alike(letters: Path, tmp_path: Path) -> None:
    assert run_ranks(3, _overflow, options(letters, tmp_path, dtype="float16")) == [(0, 2.0**119, True)] * 3


def _drifting(world: World, settings: TrainOptions, what: str) -> str:
    """A run of which one rank's LayerNorm, or one rank's batch, changes in the third iteration; what it ends with."""
    next_batch, iterate = loop.next_batch, loop.iterate

    def other_batch(run: setup.Run, *rest: Any, **more: Any) -> Any:
        x, y = next_batch(run, *rest, **more)
        return (x.flip(0) if run.progress.iter_num == 4 and world.rank == 1 else x), y

    def drifted(run: setup.Run, *rest: Any) -> Any:
        if run.progress.iter_num == 2 and world.rank == world.size - 1:
            with torch.no_grad():
                dict(run.model.named_parameters())[what][1] += 0.5
        return iterate(run, *rest)

    if what == "batch":
        loop.next_batch = other_batch
    elif what:
        loop.iterate = drifted  # type: ignore[assignment]
    try:
        train_tp.main(world, settings)
    except DriftError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("size, tp, what, said", [
    (2, 2, "transformer.h.1.ln_1.weight", "differs between tp ranks 0 and 1 (max 5e-01) at step 2."),
    (2, 2, "transformer.h.0.mlp.c_proj.bias", "differs between tp ranks 0 and 1 (max 5e-01) at step 2."),
    (2, 1, "transformer.h.0.attn.c_attn.weight", "differs between dp ranks 0 and 1 (max 5e-01) at step 2."),
    (2, 2, "batch", "batch mismatch at step 4 between tp ranks 0 ("),
    (2, 2, "", ""),
])  # fmt: skip
def test_ranks_that_drift_apart_are_found(letters: Path, tmp_path: Path, size: int, tp: int, what: str, said: str) -> None:
    settings = options(letters, tmp_path, tp=tp, max_iters=6, check_replicas=2)
    ends = run_ranks(size, _drifting, settings, what, tp=tp)
    assert len(set(ends)) == 1 and said in ends[0] and bool(said) == bool(ends[0])
    assert what == "batch" or not said or ends[0].startswith(f"replicated parameter {what} ")


def test_without_checks_drift_is_not_found(letters: Path, tmp_path: Path) -> None:
    settings = options(letters, tmp_path, tp=2, max_iters=6, check_replicas=0)
    assert run_ranks(2, _drifting, settings, "transformer.h.1.ln_1.weight", tp=2) == ["", ""]

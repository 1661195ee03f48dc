"""Training goes on from nanoGPT's ckpt.pt, and nanoGPT's from ours. nanoGPT's loop is written out here with torch's own
AdamW, clipping and schedule on model.py; the same was tried with nanoGPT's train.py and sample.py (docs/nanogpt.md)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import TINY, figures, letters, options, trained  # noqa: F401

import shard_checkpoint
from base.errors import UserError
from checkpoints.nanogpt import NanoGPTCheckpoint
from model import GPT, GPTConfig
from text.dataset import Dataset, batch
from train import checkpoint, loop

CONFIG = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=4, n_embd=16)
RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95)}


def groups(model: GPT, old: bool = False) -> list[dict[str, Any]]:
    """nanoGPT's two groups; old: as its configure_optimizers made them before June 2023."""
    named: dict[str, Any] = {"transformer.wte.weight": model.lm_head.weight}
    named |= {name: p for name, p in model.named_parameters() if name != "lm_head.weight"}
    decay = [name for name, p in named.items() if p.dim() >= 2]
    if old:
        decay = sorted(name for name in decay if not name.endswith(("wte.weight", "wpe.weight")))
    rest = [name for name in named if name not in decay]
    rest = sorted(rest) if old else rest
    return [{"params": [named[n] for n in names], "weight_decay": rate} for names, rate in ((decay, 0.1), (rest, 0.0))]


def learn(model: GPT, optimizer: torch.optim.Optimizer, home: Path, first: int, last: int) -> list[float]:
    """The losses of these iterations; batches are ours, so that both see the same."""
    settings, losses = options(home, Path()), []
    for i in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(settings, i)
        total = 0.0
        for micro in range(4):
            rows = range(2 * micro, 2 * micro + 2)
            x, y = batch(Dataset(home / "letters").train, rows, 8, settings.seed, i)
            loss = model(x, y)[1] / 4
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def saved(model: GPT, optimizer: torch.optim.Optimizer, at: int, prefix: str = "") -> dict[str, Any]:
    """What nanoGPT's train.py passes to torch.save."""
    args = {key: value for key, value in CONFIG.as_json().items() if key != "activation"}
    state = {prefix + name: p for name, p in model.state_dict().items()}
    return {"model": state, "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": at,
            "best_val_loss": torch.tensor(2.5), "config": {"dataset": "letters", "learning_rate": 1e-2, "batch_size": 2}}


@pytest.fixture(scope="module", params=["now", "before June 2023"])
def half(request: pytest.FixtureRequest, letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    """(a ckpt.pt after 10 iterations, the losses of the 10 that follow)."""
    model, place = GPT(CONFIG, seed=5), tmp_path_factory.mktemp("nanogpt")
    optimizer = torch.optim.AdamW(groups(model, old=request.param != "now"), **RATES)
    learn(model, optimizer, letters, 0, 10)
    prefix = "_orig_mod." if request.param == "now" else ""  # compiled
    torch.save(saved(model, optimizer, 10, prefix), place / "ckpt.pt")
    now = torch.optim.AdamW(groups(model), **RATES)  # which decays the tables, too
    now.state.update(optimizer.state)
    optimizer = now
    return place, learn(model, optimizer, letters, 10, 20)


@pytest.mark.parametrize("size, tp", [(1, 1), (2, 2), (3, 3), (2, 1)], ids=["one", "tp2", "tp3", "dp2"])
def test_a_run_of_nanogpts_goes_on_here(letters: Path, tmp_path: Path, half: Any, size: int, tp: int) -> None:  # noqa: F811
    (tmp_path / "ckpt.pt").write_bytes((half[0] / "ckpt.pt").read_bytes())
    mine = trained(letters, tmp_path, size, tp, init_from="resume")
    np.testing.assert_allclose(mine[:, 0], half[1], rtol=1e-4)
    path, progress, _ = checkpoint.read_state(tmp_path)  # from here on the run's own checkpoints count
    assert path.name == "step-000020" and (progress.iter_num, progress.optimizer_steps) == (20, 20)


def test_a_run_of_ours_goes_on_there(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = trained(letters, tmp_path / "whole", 1, 1)
    trained(letters, tmp_path / "half", 2, 2, max_iters=10)
    out = tmp_path / "ckpt.pt"
    words = [f"--shards={tmp_path / 'half'}", "--format=nanogpt", f"--out={out}"]
    assert shard_checkpoint.main(["merge", *words]) == 0
    raw = torch.load(out, weights_only=True)
    assert raw["iter_num"] == 10 and raw["best_val_loss"] < 2.6 and raw["config"]["dataset"] == "letters"
    model = GPT(GPTConfig(**raw["model_args"]))
    model.load_state_dict(raw["model"])  # strictly
    optimizer = torch.optim.AdamW(groups(model), lr=1.0)
    optimizer.load_state_dict(raw["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    np.testing.assert_allclose(learn(model, optimizer, letters, 10, 20), whole[10:, 0], rtol=1e-4)
    again = NanoGPTCheckpoint(out)
    assert again.optimizer_steps() == 10 and again.tokenizer == {"kind": "char", "chars": list("abcdefghijklm")}


def test_weights_alone_have_no_optimizer(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    trained(letters, tmp_path / "run", 1, 1, max_iters=1)
    out, step = tmp_path / "ckpt.pt", tmp_path / "run" / "step-000001"
    (step / "training.json").unlink()
    assert shard_checkpoint.main(["merge", f"--shards={step}", "--format=nanogpt", f"--out={out}"]) == 0
    assert "optimizer" not in torch.load(out, weights_only=True)


# --- what does not go on --------------------------------------------------------------------------------------------


def _other_shapes(raw: dict[str, Any]) -> None:
    raw["optimizer"]["state"][3]["exp_avg"] = torch.zeros(5, 7)


BAD: dict[str, Any] = {
    "no optimizer": lambda raw: raw.pop("optimizer"),
    "an optimizer of other shapes": _other_shapes,
    "an optimizer of fewer parameters": lambda raw: raw["optimizer"]["param_groups"][0]["params"].pop(),
    "a moment missing": lambda raw: raw["optimizer"]["state"][2].pop("exp_avg_sq"),
    "moments that are ints": lambda raw: raw["optimizer"]["state"][1].update(exp_avg=torch.zeros(8, 16, dtype=torch.int64)),
    "steps that differ": lambda raw: raw["optimizer"]["state"][1].update(step=torch.tensor(3.0)),
    "an optimizer that is a list": lambda raw: raw.update(optimizer=[1]),
}


@pytest.mark.parametrize("what", BAD)
def test_an_optimizer_that_is_not_this_models(what: str, half: Any, tmp_path: Path) -> None:
    raw = torch.load(half[0] / "ckpt.pt", weights_only=True)
    BAD[what](raw)
    torch.save(raw, tmp_path / "ckpt.pt")
    with pytest.raises(UserError) as refused:
        checkpoint.read_state(tmp_path)
    fault, path = "has no AdamW state of this model's parameters", tmp_path / "ckpt.pt"
    assert str(refused.value) == f"{path} {fault}: --init_from={path} with another --out_dir starts from its weights."


NO_PROGRESS = [{"iter_num": -1}, {"iter_num": "2"}, {"best_val_loss": "x"}, {"best_val_loss": float("nan")}]


@pytest.mark.parametrize("values", NO_PROGRESS, ids=str)
def test_progress_that_is_none(values: dict[str, Any], half: Any, tmp_path: Path) -> None:
    torch.save(torch.load(half[0] / "ckpt.pt", weights_only=True) | values, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="does not say its iteration and its best loss"):
        checkpoint.read_state(tmp_path)


def test_a_run_that_was_saved_half_way(half: Any, tmp_path: Path) -> None:
    whole = (half[0] / "ckpt.pt").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-500], b""):
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"ckpt.pt is not a readable ckpt.pt \("):
            checkpoint.read_state(tmp_path)

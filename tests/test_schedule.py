"""Schedules of sync points: their grammar, and the ranks' arithmetic against the equations."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_decoding import reference
from test_sample_tp import sample
from test_shards import write
from test_tp_model import data, deaf
from test_training import curve, letters, trained  # noqa: F401  letters is a fixture
from torch import Tensor

from base.errors import UserError
from checkpoints.manifest import Sync, read_manifest
from inference.decoders import TorchDecoder
from inference.native_decoder import NativeDecoder
from model import GPT, GPTConfig
from parallel.parameters import take
from plan.partition import Partition
from plan.schedule import Schedule
from tp_model import TensorParallelGPT
from train import gradients
from world.mesh import World

CONFIG = GPTConfig(block_size=12, vocab_size=67, n_layer=4, n_head=5, n_embd=20)
SCHEDULES = ["all", "mlp", "every:2", "every:4", "0a,0m,2a", "1a,2m"]


# --- the grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, runs",
    [
        ("all", ["0a", "0m", "1a", "1m", "2a", "2m", "3a", "3m"]),
        ("mlp", ["0a 0m", "1a 1m", "2a 2m", "3a 3m"]),
        ("every:2", ["0a 0m 1a 1m", "2a 2m 3a 3m"]),
        ("every:3", ["0a 0m 1a 1m 2a 2m", "3a 3m"]),
        ("0a, 0m,1m", ["0a", "0m", "1a 1m", "2a 2m 3a 3m"]),
        ("3m", ["0a 0m 1a 1m 2a 2m 3a 3m"]),
    ],
)
def test_runs(text: str, runs: list[str]) -> None:
    schedule = Schedule.parse(text, 4)
    assert [
        " ".join(f"{layer}{kind[0]}" for layer, kind in run) for run in schedule.stretches()
    ] == runs
    assert schedule.points == len(runs) and schedule.is_plain == (text == "all")


@given(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, 2 * n - 1))))
)
@settings(deadline=None, derandomize=True)
def test_what_a_schedule_is_called_makes_it_again(drawn: tuple[int, set[int]]) -> None:
    n_layer, points = drawn
    schedule = Schedule.after(points, n_layer)
    assert Schedule.parse(str(schedule), n_layer) == schedule


@pytest.mark.parametrize(
    "text, message",
    [
        ("4m", "there is no sub-block 4m, the model has 4 layers (0 to 3)."),
        ("0a,,1m", "'' is no sub-block. Use all, mlp, every:K, delay:D, or a list such as 0a,0m,1m"),
        ("every", "'every' is no sub-block"),
        ("every:0", "K is 1 to 4"),
        ("every:5", "K is 1 to 4"),
        ("0b", "'0b' is no sub-block"),
    ],
)
def test_what_is_no_schedule(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Schedule.parse(text, 4)
    assert message in str(caught.value)


# --- the equations --------------------------------------------------------------------------------


def equations(model: GPT, idx: Tensor, tp: int, schedule: Schedule) -> Tensor:
    """Logits [B, T, V] of a model whose ranks are lists in one process: h_i = X + own_i + B between
    sync points, and X + B + sum of own_i at one."""
    p, config = dict(model.named_parameters()), model.config
    rules, C, D = Partition.of(config, tp).rules, config.n_embd, config.n_embd // config.n_head

    def weight(name: str, rank: int) -> Tensor:
        return take(p[name], rules[name], rank)

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, (C,), p[f"{name}.weight"], p.get(f"{name}.bias"))

    def partial(h: Tensor, layer: int, kind: str, rank: int) -> Tensor:
        at = f"transformer.h.{layer}."
        into, out = (
            at + ("attn.c_attn" if kind == "attention" else "mlp.c_fc"),
            at + ("attn" if kind == "attention" else "mlp"),
        )
        z = (
            norm(h, at + ("ln_1" if kind == "attention" else "ln_2"))
            @ weight(into + ".weight", rank).T
        )
        if config.bias:
            z = z + weight(into + ".bias", rank)
        if kind == "attention":
            q, k, v = (t.unflatten(-1, (-1, D)).transpose(1, 2) for t in z.chunk(3, dim=-1))
            later = torch.ones(z.shape[1], z.shape[1]).triu(1).bool()
            scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(later, -torch.inf)
            z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        else:
            z = F.gelu(z, approximate="tanh" if config.activation == "gelu_tanh" else "none")
        return z @ weight(out + ".c_proj.weight", rank).T

    table = p["transformer.wte.weight"]
    X = table[idx] + p["transformer.wpe.weight"][: idx.shape[1]]
    for stretch in schedule.stretches():
        own, biases = [torch.zeros_like(X) for _ in range(tp)], torch.zeros(C, dtype=X.dtype)
        for layer, kind in stretch:
            own = [o + partial(X + o + biases, layer, kind, rank) for rank, o in enumerate(own)]
            if config.bias:
                body = "attn" if kind == "attention" else "mlp"
                biases = biases + p[f"transformer.h.{layer}.{body}.c_proj.bias"]
        X = X + biases + torch.stack(own).sum(0)
    return norm(X, "transformer.ln_f") @ table.T


def sharded(
    world: World, config: GPTConfig, sync: str, dtype: torch.dtype, checkpointing: bool = False
) -> TensorParallelGPT:
    state = dict(reference(config).named_parameters())
    return TensorParallelGPT(
        config,
        world.tp,
        lambda name, rule: take(state[name].detach(), rule, world.tp.rank),
        dtype=dtype,
        activation_checkpointing=checkpointing,
        schedule=Schedule.parse(sync, config.n_layer),
    )


def worst_error(
    world: World,
    config: GPTConfig,
    sync: str,
    dtype: torch.dtype,
    dropped: tuple[str, str, str] | None,
    checkpointing: bool,
) -> tuple[float, str]:
    """Largest relative error of logits, loss and any parameter's gradient against the equations,
    and where."""
    if dropped:
        deaf(*dropped)
    idx, targets = data(config)
    expected = reference(config).double()
    logits = equations(expected, idx, world.size, Schedule.parse(sync, config.n_layer))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    model = sharded(world, config, sync, dtype, checkpointing)
    with torch.no_grad():
        last = model(idx)[0]
    _, ours = model(idx, targets)
    assert last is not None and ours is not None
    ours.backward()
    gradients.sum_partial_gradients(model)
    errors = {
        "logits": ((last[:, 0] - logits[:, -1]).norm() / logits[:, -1].norm()).item(),
        "loss": abs(ours.item() / loss.item() - 1),
    }
    rules = model.split.rules
    for name, p in expected.named_parameters():
        mine = dict(model.named_parameters())[name].grad
        assert p.grad is not None and mine is not None
        part = take(p.grad, rules[name], world.tp.rank)
        whole = p.grad if ".c_attn.bias" in name else part  # a key's bias has no gradient but for rounding
        errors[name] = ((model.parts.owned(name, mine) - part).norm() / whole.norm()).item()
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


@pytest.mark.parametrize("sync", SCHEDULES)
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_forward_and_every_gradient_are_the_equations(tp: int, sync: str) -> None:
    for config in (CONFIG, replace(CONFIG, bias=False, activation="gelu_tanh")):
        for rank in run_ranks(
            tp, worst_error, config, sync if tp > 1 else "all", torch.float64, None, False
        ):
            assert rank[0] < 1e-9, rank  # heads: 5 over 2, 3 and 4 ranks


def test_float32_and_activation_checkpointing() -> None:
    for checkpointing in (False, True):
        for rank in run_ranks(
            3, worst_error, CONFIG, "every:2", torch.float32, None, checkpointing
        ):
            assert rank[0] < 1e-5, rank


@pytest.mark.parametrize(
    "dropped",
    [
        ("mlp", "forward", "all_reduce"),
        ("attention", "backward", "all_reduce"),
        ("optimizer", "step", "all_reduce"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("sync", ["mlp", "every:2"])
def test_every_sum_is_needed(dropped: tuple[str, str, str], sync: str) -> None:
    assert (
        max(
            rank[0]
            for rank in run_ranks(2, worst_error, CONFIG, sync, torch.float64, dropped, False)
        )
        > 1e-3
    )


def test_a_parameter_left_out_of_the_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients.partial_gradients
    names = {"ln_1.weight", "ln_2.bias", "attn.c_proj.bias"}
    for left_out in names:

        def without(model: TensorParallelGPT, left_out: str = left_out) -> list[torch.nn.Parameter]:
            gone = {id(p) for name, p in model.named_parameters() if name == f"transformer.h.1.{left_out}"}
            return [p for p in whole(model) if id(p) not in gone]

        monkeypatch.setattr(gradients, "partial_gradients", without)
        _, where = max(run_ranks(2, worst_error, CONFIG, "mlp", torch.float64, None, False))
        assert where == f"transformer.h.1.{left_out}"


# --- what is said, and what is not ----------------------------------------------------------------


def _account(world: World, sync: str) -> tuple[dict[str, int], int]:
    idx, targets = data(CONFIG)
    model = sharded(world, CONFIG, sync, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _, loss = model(idx, targets)
        assert loss is not None
        loss.backward()
        gradients.sum_partial_gradients(model)
    seen = sum(event.count for event in profile.key_averages() if event.key in ("gloo:all_reduce", "gloo:all_gather"))
    told = {f"{e.layer} {e.block} {e.direction}": t.calls for e, t in world.ledger.tallies.items()}
    return told, seen


def test_one_all_reduce_a_run_forward_and_backward() -> None:
    once = {
        "None embedding forward": 1,
        "None head backward": 1,
        "None loss forward": 1,
        "None optimizer step": 1,
    }
    for sync, layers in (("mlp", [0, 1, 2, 3]), ("every:2", None)):
        told, seen = run_ranks(2, _account, sync, comm="gloo")[0]
        assert seen == sum(told.values())
        ends, begins = (layers, layers) if layers else ([1, 3], [0, 2])
        assert told == once | {f"{i} mlp forward": 1 for i in ends} | {
            f"{i} attention backward": 1 for i in begins
        }


def _plain(world: World) -> bool:
    idx, _ = data(CONFIG)
    here, there = (sharded(world, CONFIG, sync, torch.float32) for sync in ("all", "0a,0m,1a,1m,2a,2m,3a,3m"))
    return torch.equal(here.hidden(idx), there.hidden(idx)) and not gradients.partial_gradients(here)


def test_all_is_megatron() -> None:
    assert all(run_ranks(3, _plain))


def _masks(world: World, sync: str) -> tuple[Tensor, float]:
    config = replace(CONFIG, dropout=0.3)
    model = sharded(world, config, sync, torch.float32, checkpointing=True)
    idx, targets = data(config)
    torch.manual_seed(3)
    _, loss = model(idx, targets)
    assert loss is not None
    loss.backward()
    gradients.sum_partial_gradients(model)
    return torch.tensor(gradients.grad_norm(model).item()), loss.item()


@pytest.mark.parametrize("sync", ["every:2", "delay:1", "delay:2+0a"])
def test_dropout_leaves_ranks_in_agreement(sync: str) -> None:
    (norm, loss), *others = run_ranks(3, _masks, sync)
    for other_norm, other_loss in others:
        assert other_loss == loss and other_norm.item() == pytest.approx(norm.item(), rel=1e-5)


def _stepped(world: World, config: GPTConfig, sync: str, kind: Any) -> list[Tensor]:
    """This rank's logits after each token of a few texts that follow prompts of different
    lengths."""
    model = sharded(world, config, sync, torch.float32).eval()
    decoder, texts = kind(model), TEXTS
    cache = decoder.new_cache(len(texts), config.block_size)
    with torch.inference_mode():
        decoder.logits([text[:-STEPS] for text in texts], cache)
        lengths, found = [len(text) - STEPS for text in texts], []
        for i in range(STEPS):
            cache.advance([n + i for n in lengths])
            found.append(
                decoder.logits(
                    [[text[n + i]] for text, n in zip(texts, lengths, strict=True)], cache
                ).clone()
            )
    return found


STEPS = 4
TEXTS = [[5, 17, 3, 44, 2, 8, 66], [1, 9, 9, 30, 12], [60, 2, 9, 31, 7, 7, 50, 21]]


@pytest.mark.parametrize("kind", [TorchDecoder, NativeDecoder])
@pytest.mark.parametrize("sync", SCHEDULES)
def test_decode_steps_are_the_equations(sync: str, kind: Any) -> None:
    for config in (CONFIG, replace(CONFIG, bias=False)):
        schedule, model = Schedule.parse(sync, config.n_layer), reference(config).double()
        whole = [equations(model, torch.tensor([text]), 3, schedule)[0, -STEPS:] for text in TEXTS]
        plain = [
            equations(model, torch.tensor([text]), 3, Schedule.plain(4))[0, -STEPS:]
            for text in TEXTS
        ]
        ranks = run_ranks(3, _stepped, config, sync, kind)
        for i in range(STEPS):
            ours = torch.cat([rank[i] for rank in ranks], dim=-1).double()
            expected = torch.stack([logits[i] for logits in whole])
            assert ((ours - expected).norm() / expected.norm()).item() < 1e-5
            other = torch.stack([logits[i] for logits in plain])
            assert (
                sync == "all" or ((other - expected).norm() / expected.norm()).item() > 1e-2
            )  # or nothing would be shown


# --- the option -----------------------------------------------------------------------------------


def _sample(world: World, weights: Path, *words: str) -> tuple[str, str, list[str]]:
    return sample(world, weights, *words)


def _sampled(tp: int, weights: Path, *words: str) -> tuple[str, str]:
    return run_ranks(
        tp, _sample, weights, "--prompt=5 17 3", "--temperature=0", "--overflow=stop", *words
    )[0][:2]


def test_sampling_obeys_the_schedule_of_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "made", 2, sync=Sync("mlp", 2))
    write(tmp_path / "plain", 2)
    report = tmp_path / "report.json"
    text, said = _sampled(2, tmp_path / "made", f"--report={report}")
    made = json.loads(report.read_text())
    assert (
        "ranks synchronise after 2 of 4 sub-blocks (--sync=mlp)" in said
        and "; sync points: mlp" in said
    )
    assert made["sync"] == "mlp" and all(
        layer["attention"] == {} for layer in made["comm_account"]["layers"]
    )
    assert _sampled(2, tmp_path / "plain", "--sync=mlp")[0] == text
    plain, said = _sampled(2, tmp_path / "made", "--sync=all", f"--report={report}")
    assert json.loads(report.read_text())["sync"] == "all" and "sync points" not in said
    assert plain == _sampled(1, tmp_path / "plain", "--sync=mlp")[0]  # alone a rank sees everything


def test_a_schedule_for_another_tp_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "made", 2, sync=Sync("mlp", 2))
    for tp in (1, 3):
        with pytest.raises((UserError, AssertionError)) as caught:
            _sampled(tp, tmp_path / "made")
        assert (
            f"was made for --sync=mlp on tp=2 ranks, and this run has tp={tp}. Start 2 ranks"
            in str(caught.value)
        )
        assert _sampled(tp, tmp_path / "made", "--sync=all")[0]


@pytest.mark.parametrize("sync, calls", [("mlp", 1.0), ("delay:1+0a", 2.0)])
def test_training_under_a_schedule(
    letters: Path, tmp_path: Path, sync: str, calls: float  # noqa: F811
) -> None:
    whole = trained(letters, tmp_path / "whole", 2, 2, sync=sync)
    assert whole[-1, 0] < 0.9 * whole[0, 0]  # it learns
    seen = curve(tmp_path / "whole")[3]["all_reduce_per_layer"]
    assert seen == {"forward": calls, "backward": calls}
    assert read_manifest(tmp_path / "whole" / "step-000020").sync == Sync(sync, 2)
    trained(letters, tmp_path / "half", 2, 2, sync=sync, max_iters=10)
    resumed = trained(letters, tmp_path / "half", 2, 2, init_from="resume")
    np.testing.assert_array_equal(resumed, whole)
    with pytest.raises(
        AssertionError, match=re.escape(f"was made for --sync={sync}") + " on tp=2 ranks, and this run has tp=1"
    ):
        trained(letters, tmp_path / "half", 1, 1, init_from="resume")


@pytest.mark.parametrize("sync", ["mlp", "delay:1"])
def test_data_parallel_replicas_agree_under_a_schedule(
    letters: Path, tmp_path: Path, sync: str  # noqa: F811
) -> None:
    one, two = (trained(letters, tmp_path / str(size), size, 2, sync=sync) for size in (2, 4))
    np.testing.assert_allclose(one, two, rtol=1e-4)

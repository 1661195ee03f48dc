"""Delayed sync points against their equations, computed by one process in double precision."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_decoding import Reruns
from torch import Tensor

from base.errors import UserError
from inference.cuda_graphs import GraphDecoder
from inference.decoders import TorchDecoder
from inference.native_decoder import NativeDecoder
from model import GPT, GPTConfig, attend
from parallel.flight import Away
from parallel.parameters import take
from parallel.quantized import quantize
from plan.partition import Partition
from plan.schedule import Schedule
from tp_model import TensorParallelGPT
from train.gradients import sum_partial_gradients
from world.mesh import World

CONFIG = GPTConfig(24, 61, 3, 5, 20)
SCHEDULES = ["delay:1", "delay:2", "delay:5", "delay:1+0a", "delay:1+0a,0m", "delay:2+0m,1m", "delay:3+1a"]


def full_model(config: GPTConfig) -> GPT:
    torch.manual_seed(7)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4)
    return model


def own_output(block: Any, kind: str, h: Tensor, split: Partition, rank: int) -> Tensor:
    """This rank's addend of a sub-block's output, from the full weights."""
    if kind == "mlp":
        lo, hi = split.columns(rank)
        return block.mlp.activation(block.mlp.c_fc(block.ln_2(h)))[..., lo:hi] @ block.mlp.c_proj.weight[:, lo:hi].t()
    heads = block.attn.c_attn(block.ln_1(h)).unflatten(-1, (3 * split.n_head, -1)).transpose(1, 2)
    q, k, v = (part[:, slice(*split.heads(rank))] for part in heads.chunk(3, dim=1))
    lo, hi = split.channels(rank)
    y: Tensor = attend(q, k, v, None, 0.0) @ block.attn.c_proj.weight[:, lo:hi].t()
    return y


def delayed(model: GPT, schedule: Schedule, tp: int, idx: Tensor) -> Tensor:
    """Logits by the sums that define h and X, each written out anew for every sub-block."""
    split, blocks = Partition.of(model.config, tp), list[Any](model.transformer.h)
    start: Any = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(idx.shape[1]))
    last, own, biases = len(schedule.syncs), list[list[Tensor]](), list[Any]()
    arrival = [n + 1 if sync else min(n + 1 + schedule.delay, last) for n, sync in enumerate(schedule.syncs)]
    def agreed(n: int) -> Tensor:
        there = [sum(own[m]) for m in range(n) if arrival[m] <= n]
        return start + sum(there) + sum(b for b in biases[:n] if b is not None)
    for n in range(last):
        block, kind = blocks[n // 2], ("attention", "mlp")[n % 2]
        away = [m for m in range(n) if arrival[m] > n]
        streams = [agreed(n) + sum(own[m][rank] for m in away) for rank in range(tp)]
        own.append([own_output(block, kind, h, split, rank) for rank, h in enumerate(streams)])
        biases.append((block.attn if kind == "attention" else block.mlp).c_proj.bias)
    return model.lm_head(model.transformer.ln_f(agreed(last)))


def sharded(model: GPT, world: World, schedule: Schedule, **more: Any) -> TensorParallelGPT:
    state = dict(model.named_parameters())
    read = lambda name, rule: take(state[name].detach(), rule, world.tp.rank)  # noqa: E731
    dtype = next(model.parameters()).dtype
    return TensorParallelGPT(model.config, world.tp, read, dtype=dtype, schedule=schedule, **more)


def data(config: GPTConfig) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    idx = torch.randint(0, config.vocab_size, (2, 11))
    return idx, torch.randn(2, 11, config.vocab_size, dtype=torch.float64)


def differences(world: World, config: GPTConfig, schedule: Schedule, **more: Any) -> tuple[float, float]:
    """The largest of the logits and of the gradients, relative to the largest of each tensor."""
    (idx, weights), whole = data(config), full_model(config)
    right = delayed(whole, schedule, world.tp.size, idx)
    (right * weights).sum().backward()
    model = sharded(whole, world, schedule, **more)
    local = model.local_logits(model.hidden(idx))
    (local * weights[..., model.vocab_lo : model.vocab_hi]).sum().backward()
    sum_partial_gradients(model)
    error = (local - right[..., model.vocab_lo : model.vocab_hi]).abs().max() / right.abs().max()
    grads: dict[str, Any] = {name: p.grad for name, p in whole.named_parameters()}
    worst = 0.0
    for name, p in model.named_parameters():
        wanted = take(grads[name], model.split.rules[name], world.tp.rank)
        found: Any = p.grad
        worst = max(worst, float((found[: len(wanted)] - wanted).abs().max() / grads[name].abs().max()))
    return float(error), worst


def _all(world: World, names: list[str], config: GPTConfig, more: dict[str, Any]) -> list[tuple[float, float]]:
    return [differences(world, config, Schedule.parse(name, config.n_layer), **more) for name in names]


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["bias", "no bias", "recomputed"])
def test_logits_and_every_gradient_are_the_equations(tp: int, how: str) -> None:
    more = {"activation_checkpointing": True} if how == "recomputed" else {}
    for found in run_ranks(tp, _all, SCHEDULES, replace(CONFIG, bias=how != "no bias"), more):
        for name, (logits, gradients) in zip(SCHEDULES, found, strict=True):
            assert logits < 1e-9 and gradients < 1e-9, (name, logits, gradients)


def _mistaken(world: World, how: str) -> list[float]:
    right = Away.due

    def due(self: Away, n: int) -> list[Tensor]:
        found = right(self, n)
        if how == "lost" and n == 3:
            return found[1:]
        return found + found if how == "doubled" and n == 3 else found

    if how == "late":
        arrivals = Schedule.arrivals
        Schedule.arrivals = lambda self: [min(a + 1, 6) for a in arrivals(self)]  # type: ignore[method-assign]
    Away.due = due  # type: ignore[method-assign]
    return list(differences(world, CONFIG, Schedule.parse("delay:1+0a", CONFIG.n_layer)))


@pytest.mark.parametrize("how", ["right", "lost", "doubled", "late"])
def test_a_late_part_that_is_lost_doubled_or_elsewhere_is_seen(how: str) -> None:
    for logits, gradients in run_ranks(2, _mistaken, how):
        assert (logits > 1e-3 and gradients > 1e-3) == (how != "right")


def _steps(world: World, decoder: Any, name: str) -> tuple[Tensor, Any]:
    """Logits of a prompt of 3, then of 7 tokens, one by one."""
    model = sharded(full_model(CONFIG).float(), world, Schedule.parse(name, CONFIG.n_layer)).eval()
    idx, found = data(CONFIG)[0][:1], []
    steps: Any = decoder(model)
    cache = steps.new_cache(1, CONFIG.block_size)
    with torch.inference_mode():
        for lo, hi in [(0, 3), *((t, t + 1) for t in range(3, 10))]:
            found.append(steps.logits(idx[:, lo:hi].tolist(), cache).clone())
            cache.advance([hi])
        calls = {(e.layer, e.block): t.calls for e, t in world.ledger.tallies.items()}
        return model.gather_logits(torch.cat(found)), calls


@pytest.mark.parametrize("decoder", [TorchDecoder, NativeDecoder, lambda model: GraphDecoder(model, Reruns())])
@pytest.mark.parametrize("name", ["delay:1", "delay:2+0a"])
def test_a_text_is_read_token_by_token(decoder: Any, name: str) -> None:
    right = delayed(full_model(CONFIG), Schedule.parse(name, CONFIG.n_layer), 3, data(CONFIG)[0][:1, :10])
    for logits, calls in run_ranks(3, _steps, decoder, name):
        assert (logits.double() - right).abs().max() < 2e-5 * right.abs().max()
        assert all(calls[layer, block] == 8 for layer in range(3) for block in ("attention", "mlp"))


def _half(world: World) -> tuple[Tensor, Tensor]:
    """The stream after a pass in bfloat16, and the gradients that all ranks have."""
    model = sharded(full_model(CONFIG).float(), world, Schedule.parse("delay:1", CONFIG.n_layer))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(data(CONFIG)[0])
    hidden.square().mean().backward()
    sum_partial_gradients(model)
    parts: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    shared = [grad.flatten() for name, grad in parts.items() if model.split.rules[name].dim is None]
    return hidden.detach(), torch.cat(shared)


def test_ranks_agree_in_half_precision() -> None:
    (hidden, shared), *others = run_ranks(3, _half)
    for other, theirs in others:
        assert torch.equal(hidden, other) and torch.equal(shared, theirs) and shared.isfinite().all()


def _int8(world: World) -> list[Tensor]:
    model = sharded(full_model(CONFIG).float(), world, Schedule.parse("delay:1", CONFIG.n_layer)).eval()
    quantize(model, world.gather)
    found = []
    for kind in (TorchDecoder, NativeDecoder):
        with torch.inference_mode():
            decoder = kind(model)
            found.append(decoder.logits([[5, 6, 7], [1, 2, 3]], decoder.new_cache(2, 3)).clone())
    return found


def test_int8_weights() -> None:
    for torchs, natives in run_ranks(2, _int8):
        assert (torchs - natives).abs().max() < 2e-5 * torchs.abs().max()


def _account(world: World) -> tuple[Any, int]:
    """Of a forward and backward pass, and the sums that torch's profiler saw."""
    model = sharded(full_model(CONFIG), world, Schedule.parse("delay:1+0a", CONFIG.n_layer))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.hidden(data(CONFIG)[0]).sum().backward()
    seen = sum(event.count for event in profile.key_averages() if event.key == "c10d::allreduce_")
    return world.ledger.snapshot(), seen


def test_the_account_has_every_sum_and_its_seconds_in_flight() -> None:
    for account, seen in run_ranks(2, _account, comm="gloo"):
        sums = {e: t for e, t in account.items() if e.op == "all_reduce"}
        assert seen == sum(t.calls for t in sums.values()) == 2 * 2 * CONFIG.n_layer + 1
        for entry, tally in sums.items():
            assert tally.bytes == 2 * 11 * CONFIG.n_embd * 8
            late = entry.layer is not None
            assert late == (tally.in_flight > 0) and tally.in_flight >= 0.99 * tally.seconds * late


def test_one_rank_is_the_dense_model() -> None:
    idx, model = data(CONFIG)[0], full_model(CONFIG)
    for name in SCHEDULES:
        found = delayed(model, Schedule.parse(name, CONFIG.n_layer), 1, idx)
        assert (found - model(idx, idx)[0]).abs().max() < 1e-9 * found.abs().max()


def test_names() -> None:
    for name in SCHEDULES:
        assert str(Schedule.parse(name, 3)) == name
    assert Schedule.parse("delay:0", 3) == Schedule.parse("delay:1+0a,0m,1a,1m,2a", 3) == Schedule.plain(3)
    assert Schedule.parse("delay:1+0a", 3).arrivals() == [1, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("name, message", [
    ("delay:6", "--sync=delay:6: the model has 6 sub-blocks, a delay is less."),
    ("delay:1+3a", "there is no sub-block 3a, the model has 3 layers"),
    ("delay:1+", "'' is no sub-block."),
    ("delay:x", "'delay:x' is no sub-block. Use all, mlp, every:K, delay:D, or a list"),
])  # fmt: skip
def test_what_is_no_delay(name: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        Schedule.parse(name, 3)
    assert message in str(refused.value)

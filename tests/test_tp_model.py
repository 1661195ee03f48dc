"""TensorParallelGPT against model.py and against itself at other sizes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from ranks import alone, run_ranks
from torch import Tensor

from model import GPT, GPTConfig
from parallel import collectives
from parallel.parameters import take
from plan.partition import Partition, spans
from tp_model import TensorParallelGPT, attend_with_own_dropout
from train import gradients
from world.mesh import World

SMALL = GPTConfig(block_size=16, vocab_size=131, n_layer=2, n_head=5, n_embd=20)


def test_tp1_is_the_reference_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plan.partition.VOCAB_MULTIPLE", 1)
    idx = torch.randint(131, (3, 16))
    model, reference = TensorParallelGPT(SMALL, alone()), GPT(SMALL)
    assert torch.equal(model(idx)[0], reference(idx)[0])
    torch.testing.assert_close(model(idx, idx)[1], reference(idx, idx)[1])


def test_names_and_counts_are_the_references() -> None:
    model, reference = TensorParallelGPT(SMALL, alone()), GPT(SMALL)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert model.get_num_params() == reference.get_num_params()
    assert {name: tuple(p.shape) for name, p in reference.named_parameters()} == Partition.of(SMALL, 1).shapes()


def test_base_config_counts_as_nanogpt_prints_it() -> None:
    base = GPTConfig()
    count = Partition.of(base, 1).count() - base.block_size * base.n_embd
    assert f"{count / 1e6:.2f}M" == "123.69M"


def data(config: GPTConfig, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    idx, targets = torch.randint(config.vocab_size, (2, rows, config.block_size), generator=generator)
    targets[0, :5] = -1
    return idx, targets


def deaf(block: str, direction: str, op: str, of_two: int | None = None) -> None:
    """In this process, drop one kind of collective: the rank hears itself alone. of_two: only the first (0) or the second (1)
    of every two calls."""
    dropped, calls, send, later = (block, direction, op), count(), collectives._send, collectives._start_all_reduce

    def alone(axis: collectives.Axis, direction: str, op: str) -> bool:
        return (axis.block, direction, op) == dropped and (of_two is None or next(calls) % 2 == of_two)

    def sent(method: str, axis: collectives.Axis, direction: str, x: Tensor, *more: Any) -> Tensor:
        if not alone(axis, direction, "all_gather" if method == "gather_tokens" else method):
            return send(method, axis, direction, x, *more)
        if method in ("all_reduce", "all_gather"):
            return x.clone() if method == "all_reduce" else torch.stack([x] * axis.size)
        tokens = more[0] if method == "gather_tokens" else x.shape[1]
        lo, hi = spans(tokens, axis.size)[axis.rank]
        return x[:, lo:hi].clone() if method == "reduce_scatter" else torch.nn.functional.pad(x, (0, 0, lo, tokens - hi))

    def sent_later(x: Tensor, axis: collectives.Axis, direction: str) -> Callable[[], Tensor]:
        return (lambda: x) if alone(axis, direction, "all_reduce") else later(x, axis, direction)

    collectives._send, collectives._start_all_reduce = sent, sent_later


def worst_error(
    world: World, config: GPTConfig, dropped: tuple[str, str, str] | None = None, checkpointing: bool = False
) -> float:
    """Largest relative error of loss, gradient norm and any parameter's gradient against model.py."""
    if dropped:
        deaf(*dropped)
    idx, targets = data(config)
    model, reference = TensorParallelGPT(config, world.tp, activation_checkpointing=checkpointing), GPT(config)
    _, loss = model(idx, targets)
    _, expected = reference(idx, targets)
    assert loss is not None and expected is not None
    loss.backward()
    expected.backward()
    rules = model.split.rules
    errors = [abs(loss.item() / expected.item() - 1)]
    full = {name: p.grad for name, p in reference.named_parameters()}
    norm = torch.stack([g.norm() for g in full.values() if g is not None]).norm()
    errors.append(abs(gradients.grad_norm(model).item() / norm.item() - 1))
    for name, p in model.named_parameters():
        grad, whole = p.grad, full[name]
        assert grad is not None and whole is not None
        part = take(whole, rules[name], world.tp.rank)
        if ".c_attn.bias" in name:  # a key's bias moves all scores of a query alike: its gradient is zero but for rounding
            errors.append(((model.parts.owned(name, grad) - part).norm() / whole.norm()).item())
        else:
            errors.append(((model.parts.owned(name, grad) - part).norm() / part.norm()).item())
    return max(errors)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, bias=False, activation="gelu_tanh")], ids=["bias", "plain"])
def test_loss_norm_and_every_gradient(tp: int, config: GPTConfig) -> None:
    assert max(run_ranks(tp, worst_error, config, comm="gloo")) < 2e-5


def test_activation_checkpointing_changes_no_number() -> None:
    assert max(run_ranks(2, worst_error, SMALL, None, True)) < 2e-5


COLLECTIVES = [
    ("attention", "forward", "all_reduce"),
    ("attention", "backward", "all_reduce"),
    ("mlp", "forward", "all_reduce"),
    ("mlp", "backward", "all_reduce"),
    ("embedding", "forward", "all_reduce"),
    ("head", "backward", "all_reduce"),
    ("loss", "forward", "all_gather"),
    ("optimizer", "step", "all_reduce"),
]


@pytest.mark.parametrize("dropped", COLLECTIVES, ids=["-".join(c) for c in COLLECTIVES])
def test_every_collective_is_needed(dropped: tuple[str, str, str]) -> None:
    assert max(run_ranks(2, worst_error, SMALL, dropped)) > 1e-3


def _account(world: World, checkpointing: bool) -> dict[str, tuple[int, int]]:
    idx, targets = data(SMALL)
    model = TensorParallelGPT(SMALL, world.tp, activation_checkpointing=checkpointing)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _, loss = model(idx, targets)
        assert loss is not None
        loss.backward()
        gradients.grad_norm(model)
    told = {f"{e.layer} {e.block} {e.direction}": (t.calls, t.bytes) for e, t in world.ledger.tallies.items()}
    seen = sum(event.count for event in profile.key_averages() if event.key in ("gloo:all_reduce", "gloo:all_gather"))
    told["profiler"] = (seen, sum(calls for calls, _ in told.values()))
    return told


@pytest.mark.parametrize("tp", [2, 3])
def test_the_account_is_megatrons_and_the_profilers(tp: int) -> None:
    told = run_ranks(tp, _account, False, comm="gloo")[tp - 1]
    seen, counted = told.pop("profiler")
    assert seen == counted
    message = 3 * SMALL.block_size * SMALL.n_embd * 4  # B x T x C float32
    expected = {
        f"{layer} {block} {way}": (1, message)
        for layer in (0, 1)
        for block in ("attention", "mlp")
        for way in ("forward", "backward")
    }
    expected |= {"None embedding forward": (1, message), "None head backward": (1, message)}
    rows = 3 * SMALL.block_size * 4
    expected |= {"None loss forward": (1, 3 * rows), "None optimizer step": (1, 4)}
    assert told == expected


def test_recomputed_all_reduces_are_accounted_to_the_backward_pass() -> None:
    plain, again = (run_ranks(2, _account, checkpointing, comm="gloo")[0] for checkpointing in (False, True))
    assert again["profiler"][0] == again["profiler"][1] > plain["profiler"][0]
    for layer in (0, 1):
        assert again[f"{layer} attention forward"] == plain[f"{layer} attention forward"]
        assert again[f"{layer} attention backward"][0] == 2  # the gradient's, and the forward one once more


def _dropout(world: World) -> tuple[Tensor, float, Tensor]:
    config = replace(SMALL, dropout=0.3)
    model = TensorParallelGPT(config, world.tp, activation_checkpointing=True)
    idx, targets = data(config)
    torch.manual_seed(11)
    x = model.hidden(idx)
    torch.manual_seed(11)
    _, loss = model(idx, targets)
    assert loss is not None
    loss.backward()
    torch.manual_seed(5)
    q = torch.ones(1, 1, 16, 4)
    mask = attend_with_own_dropout(q, q, q, 0.5, world.tp)
    grad = model.transformer.wpe.weight.grad
    assert grad is not None
    return x.detach(), grad.norm().item(), mask


def test_dropout_is_one_mask_on_replicated_activations_and_each_ranks_own_on_heads() -> None:
    ranks = run_ranks(3, _dropout)
    for hidden, norm, mask in ranks[1:]:
        assert torch.equal(hidden, ranks[0][0])  # had one rank dropped other residual entries, ranks would drift apart
        assert norm == pytest.approx(ranks[0][1], rel=1e-5)
        assert not torch.equal(mask, ranks[0][2])


def _checkpointed_dropout(world: World) -> float:
    """With the same seed, recomputing must draw the same masks: gradients equal those without checkpointing."""
    config, (idx, targets) = replace(SMALL, dropout=0.3), data(SMALL)
    norms = []
    for checkpointing in (False, True):
        model = TensorParallelGPT(config, world.tp, activation_checkpointing=checkpointing)
        torch.manual_seed(3)
        _, loss = model(idx, targets)
        assert loss is not None
        loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return ((norms[0] - norms[1]).norm() / norms[0].norm()).item()


def test_checkpointing_repeats_the_dropout_masks() -> None:
    assert max(run_ranks(2, _checkpointed_dropout)) < 1e-6


def _init(world: World) -> dict[str, Tensor]:
    model = TensorParallelGPT(SMALL, world.tp)
    return {name: model.parts.owned(name, p).detach() for name, p in model.named_parameters()}


def test_every_split_starts_from_the_same_weights() -> None:
    reference = dict(GPT(SMALL).named_parameters())
    rules = Partition.of(SMALL, 4).rules
    for rank, owned in enumerate(run_ranks(4, _init)):
        for name, tensor in owned.items():
            assert torch.equal(tensor, take(reference[name], rules[name], rank).detach())
    std = reference["transformer.h.0.mlp.c_proj.weight"].std().item()
    assert std == pytest.approx(0.02 / 2, rel=0.1)  # 0.02 / sqrt(2 n_layer)

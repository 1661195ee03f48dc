"""What torch.compile makes of a block: one graph without a break, compiled once for all blocks, with the collectives in
it; and how many operations and kernels a layer of a decode step has. By torch's own counters."""

import collections
import re
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_tp_model import deaf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.ahead import FixedCache
from model import GPTConfig
from parallel import loss
from parallel.flight import contribution
from parallel.loss import vocab_parallel_head_loss
from parallel.quantized import quantize
from plan.partition import spans
from plan.schedule import Schedule
from tp_model import TensorParallelGPT
from world.mesh import World

SMALL: dict[str, Any] = {"block_size": 32, "vocab_size": 67, "n_layer": 12, "n_head": 5, "n_embd": 40}
Numbers = tuple[list[Tensor], dict[Any, tuple[int, int]]]  # results; calls and bytes by line of the account


def train(world: World, model: TensorParallelGPT) -> Numbers:
    """Loss and gradients."""
    torch.manual_seed(3)
    idx, before = torch.arange(96).view(3, 32) % 67, world.ledger.snapshot()
    model.zero_grad()
    _, total = model(idx, idx.roll(1))
    assert total is not None
    total.backward()
    return [total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], account(world, before)


def decode(world: World, model: TensorParallelGPT, rows: int = 2) -> Numbers:
    """Hidden states of three steps over a cache of fixed size."""
    at, found, before = torch.zeros(rows, dtype=torch.int64), [], world.ledger.snapshot()
    cache = FixedCache(model.eval().new_cache(rows, 24), at)
    with torch.inference_mode():
        for _ in range(3):
            found.append(model.hidden(torch.arange(rows).unsqueeze(1) + at.unsqueeze(1), cache))
            at += 1
    return found, account(world, before)


def account(world: World, before: Any) -> dict[Any, tuple[int, int]]:
    return {entry: (tally.calls, tally.bytes) for entry, tally in world.ledger.since(before).items()}


def _compiled(world: World, body: Any, how: dict[str, Any], dropout: float, dropped: tuple[str, str, str] | None) -> Any:
    """(are the numbers those of blocks that are not compiled, is the account, torch's counters)."""
    from torch._dynamo.utils import counters

    config, found = GPTConfig(**SMALL, dropout=dropout), []
    for backend in ("", "aot_eager"):  # the graphs are those of any backend; this one's bits are torch's
        model = TensorParallelGPT(config, world.tp, **how)
        if backend and model.schedule.delay:  # only what lies between two messages
            model.contribution = torch.compile(contribution, backend=backend)
        for block in model.blocks if backend and not model.schedule.delay else ():
            block.compile(backend=backend)
        if backend and dropped:
            deaf(*dropped)
        found.append(body(world, model))
    (right, calls), (ours, theirs) = found
    same = all(map(torch.equal, ours, right))
    return same, calls == theirs, dict(counters["stats"]), dict(counters["frames"]), dict(counters["graph_break"])


CASES: dict[str, tuple[int, Any, dict[str, Any], float]] = {
    "decode": (1, decode, {}, 0.0),
    "decode, tp 2": (2, decode, {}, 0.0),
    "train": (1, train, {}, 0.0),
    "train, tp 2": (2, train, {}, 0.0),
    "dropout, tp 2": (2, train, {}, 0.2),
    "sequence, tp 3": (3, train, {"sequence_parallel": True}, 0.2),
    "delayed, tp 2": (2, train, {"schedule": Schedule.parse("delay:1", 12)}, 0.0),
    "recomputed, tp 2": (2, train, {"activation_checkpointing": True}, 0.2),
}


@pytest.mark.parametrize("case", CASES)
def test_twelve_blocks_are_one_graph_compiled_once(case: str) -> None:
    tp, *how = CASES[case]
    for same, alike, stats, frames, breaks in run_ranks(tp, _compiled, *how, None):
        assert same and alike and not breaks
        count = 1 + (case == "delayed, tp 2")  # attention and MLP apart
        assert stats["unique_graphs"] == count and frames == {"total": count, "ok": count}


@pytest.mark.parametrize("dropped", [("mlp", "forward", "all_reduce"), ("attention", "backward", "all_reduce")])
def test_the_messages_are_in_the_graph(dropped: tuple[str, str, str]) -> None:
    for same, *_ in run_ranks(2, _compiled, train, {}, 0.0, dropped):
        assert not same


def _shared_masks(world: World) -> list[Tensor]:
    """Gradients of replicated parameters under a compiler's own random numbers."""
    model = TensorParallelGPT(GPTConfig(**{**SMALL, "n_layer": 1}, dropout=0.3), world.tp)
    model.compile_blocks()
    train(world, model)
    return [p.grad for name, p in model.named_parameters() if model.split.rules[name].dim is None and p.grad is not None]


def test_compiled_dropout_has_one_mask_on_all_ranks() -> None:
    first, second = run_ranks(2, _shared_masks)
    assert len(first) == 9 and all(map(torch.equal, first, second))


# --- a layer of a decode step ---------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts the operations that write memory: a GPU would launch a kernel for each, at least."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_view = made and given.issuperset(made) and not function._schema.is_mutable
        if not is_view and "empty" not in str(function):
            self.counts[str(function)] += 1
        return out


def _launches(world: World, int8: bool) -> int:
    """Of the second of two layers."""
    counts = []
    for n_layer in (1, 2):
        model = TensorParallelGPT(GPTConfig(**{**SMALL, "n_layer": n_layer}), world.tp).eval()
        if int8:
            quantize(model, world.gather)
        cache = FixedCache(model.new_cache(1, 24), torch.zeros(1, dtype=torch.int64))
        with torch.no_grad(), Launches() as launches:  # inference mode would show operations before torch cuts them up
            model.hidden(torch.tensor([[5]]), cache)
        counts.append(launches.counts)
    counts[1].subtract(counts[0])
    return sum(counts[1].values())


@pytest.mark.parametrize("tp", [1, 2])
def test_operations_of_a_layer(tp: int) -> None:
    """Besides the two all-reduces, which are not torch's operations here."""
    assert run_ranks(tp, _launches, False) == [11] * tp


def _kernels(world: World, int8: bool) -> tuple[int, float]:
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    model = TensorParallelGPT(GPTConfig(**{**SMALL, "n_layer": 1}), world.tp).eval()
    if int8:
        quantize(model, world.gather)
    right = decode(world, model, 1)[0]
    model.compile_blocks()
    with config.patch(fx_graph_cache=False):
        (found, _), codes = run_and_get_code(decode, world, model, 1)
    call = codes[-1].partition("def call(")[2].partition("\nrunner")[0]
    kernels = re.findall(r"^ +(?:\w+ = )?(\w*cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", call, re.MULTILINE)
    return len(kernels), max(float((a - b).abs().max()) for a, b in zip(found, right, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_kernels_of_a_compiled_layer(tp: int, int8: bool) -> None:
    """The all-reduces among them."""
    for count, error in run_ranks(tp, _kernels, int8):
        assert 3 <= count <= 8 and error < 1e-5


# --- the head's loss ------------------------------------------------------------------------------------------------


def _loss(world: World, dtype: torch.dtype, fused: bool) -> tuple[Tensor, ...]:
    """Loss and gradients of a head whose table is padded, of chunks of unequal length, with targets that do not count."""
    stream = torch.Generator().manual_seed(4)
    lo, hi = spans(131, world.tp.size)[world.tp.rank]
    table = torch.randn(131, 24, generator=stream)[lo:hi]
    weight = torch.cat([table, torch.ones(192 - len(table), 24)]).requires_grad_()
    x = torch.randn(70, 24, generator=stream).requires_grad_()
    targets = torch.randint(131, (70,), generator=stream).masked_fill(torch.arange(70) % 9 == 0, -1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total = vocab_parallel_head_loss(x, weight, targets, lo, hi, world.tp, fused=fused)
    total.backward()
    assert x.grad is not None and weight.grad is not None
    return total.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_compiled_loss_is_the_other(dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 192 * 30)
    for ours, theirs in zip(run_ranks(3, _loss, dtype, True), run_ranks(3, _loss, dtype, False), strict=True):
        assert all(float((a - b).norm() / b.norm()) < most for a, b in zip(ours, theirs, strict=True))


def _bytes(world: World, n: int = 64, width: int = 50304) -> float:
    """Bytes through memory for a logit in bfloat16, by inductor's own count, and two for each reading or writing by a
    product: the head's writes a logit, and the two of the backward pass read its gradient."""
    from torch._inductor import config, metrics

    torch._logging.set_logs(inductor_metrics=True)
    logits, targets = torch.randn(n, width).bfloat16(), torch.arange(n)
    with config.patch(fx_graph_cache=False):
        metrics.reset()
        numbers = loss.compiled(loss.statistics)(logits, targets, 0, 50257)
        _, *both = loss.combined(numbers, targets, world.tp)
        loss.compiled(loss.gradient)(logits, targets, 0, 50257, *both)
    assert metrics.num_bytes_accessed > 4 * logits.numel()
    return metrics.num_bytes_accessed / logits.numel() + 3 * 2


def test_a_logit_is_at_most_sixteen_bytes() -> None:
    """Where the largest logit and the sum of exponentials take two readings the count is two bytes higher."""
    (found,) = run_ranks(1, _bytes)
    assert found + 2 < 16

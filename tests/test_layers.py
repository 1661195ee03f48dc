"""Column- and row-parallel layers, the embedding and the loss against their unsharded selves: y, dx and every dw."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import alone, run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.collectives import Axis
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.ledger import Ledger
from parallel.loss import CHUNK_LOGITS, vocab_parallel_cross_entropy, vocab_parallel_head_loss
from plan.partition import round_up, spans
from world.mesh import World

SIZES = [1, 2, 3, 4]
close = torch.testing.assert_close  # float32's own tolerance (1.3e-6 relative): only the order of sums differs


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _column_row(world: World) -> None:
    torch.manual_seed(0)
    x, w1, b1, w2, b2 = leaf(3, 5, 7), leaf(11, 7), leaf(11), leaf(6, 11), leaf(6)
    dy = torch.randn(3, 5, 6)
    expected = F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2)
    expected.backward(dy)
    lo, hi = spans(11, world.size)[world.tp.rank]
    column, row = ColumnParallelLinear(7, hi - lo, True, world.tp), RowParallelLinear(11, hi - lo, 6, True, world.tp)
    with torch.no_grad():
        assert column.bias is not None and row.bias is not None
        column.weight.copy_(w1[lo:hi])
        column.bias.copy_(b1[lo:hi])
        row.weight.copy_(w2[:, lo:hi])
        row.bias.copy_(b2)
    mine = x.detach().clone().requires_grad_()
    kept, kept_dy = mine.detach().clone(), dy.clone()
    hidden = column(mine)
    close(hidden, F.linear(x, w1, b1)[..., lo:hi])  # nothing is summed over ranks yet
    y = row(torch.tanh(hidden))
    y.backward(dy)
    close(y, expected)
    close(mine.grad, x.grad)
    assert w1.grad is not None and b1.grad is not None and w2.grad is not None
    close(column.weight.grad, w1.grad[lo:hi])
    close(column.bias.grad, b1.grad[lo:hi])
    close(row.weight.grad, w2.grad[:, lo:hi])
    close(row.bias.grad, b2.grad)  # whole on every rank: added once, after the all-reduce
    assert torch.equal(mine, kept) and torch.equal(dy, kept_dy)  # nobody writes into an argument or a gradient
    calls = {(e.direction, e.op): t.calls for e, t in world.ledger.tallies.items()}
    assert calls == ({} if world.size == 1 else {("forward", "all_reduce"): 1, ("backward", "all_reduce"): 1})


@pytest.mark.parametrize("size", SIZES)
def test_column_then_row_equals_two_linears(size: int) -> None:
    run_ranks(size, _column_row)


def _embedding(world: World) -> None:
    torch.manual_seed(0)
    table, ids, dy = leaf(13, 4), torch.randint(13, (3, 5)), torch.randn(3, 5, 4)
    x, dlogits = leaf(2, 4), torch.randn(2, 13)
    expected, expected_logits = F.embedding(ids, table), F.linear(x, table)
    torch.autograd.backward([expected, expected_logits], [dy, dlogits])
    lo, hi = spans(13, world.size)[world.tp.rank]
    layer = VocabParallelEmbedding(13, 4, lo, hi, round_up(-(-13 // world.size), 8), world.tp.at("embedding"))
    with torch.no_grad():
        layer.weight.normal_()  # what padding rows hold must not matter
        layer.weight[: hi - lo].copy_(table[lo:hi])
    mine = x.detach().clone().requires_grad_()
    y, logits = layer(ids), layer.logits(mine)
    torch.autograd.backward([y, logits], [dy, dlogits[:, lo:hi]])
    assert torch.equal(y, expected)  # one rank's row plus zeros: exact
    close(logits, expected_logits[:, lo:hi])
    close(mine.grad, x.grad)
    assert layer.weight.grad is not None and table.grad is not None
    close(layer.weight.grad[: hi - lo], table.grad[lo:hi])
    assert not layer.weight.grad[hi - lo :].any()


@pytest.mark.parametrize("size", SIZES)
def test_embedding_and_tied_head(size: int) -> None:
    run_ranks(size, _embedding)


def _token_losses(world: World, vocab: int) -> None:
    torch.manual_seed(0)
    logits, targets = 10 * torch.randn(9, vocab), torch.randint(vocab, (9,))
    targets[3], targets[4], targets[5] = -1, 0, vocab - 1
    expected = F.cross_entropy(logits.double(), targets, ignore_index=-1, reduction="none").float()
    lo, hi = spans(vocab, world.size)[world.tp.rank]
    mine = logits[:, lo:hi].clone()
    kept = mine.clone()
    nll = vocab_parallel_cross_entropy(mine, targets, lo, world.tp)
    close(nll, expected, rtol=1e-5, atol=1e-5)  # against double precision
    assert torch.equal(mine, kept)
    moved = {e.op: (t.calls, t.bytes) for e, t in world.ledger.tallies.items()}
    assert moved == ({} if world.size == 1 else {"all_gather": (1, 3 * 9 * 4)})  # three numbers a row, never the logits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab", [5, 131])
def test_losses_of_tokens_against_double_precision(size: int, vocab: int) -> None:
    run_ranks(size, _token_losses, vocab)


class LargestMade(TorchDispatchMode):
    """The most elements that any tensor made within had; views of what was there, and writing into it, do not count."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in [*args, *(kwargs or {}).values()] if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return out


Case = tuple[int, int, int, torch.dtype]  # rows, vocabulary, rows at a time, dtype


def _head_loss(world: World, case: Case) -> None:
    rows, vocab, chunk, dtype = case
    torch.manual_seed(0)
    x, table = (3 * torch.randn(rows, 6)).double().requires_grad_(), torch.randn(vocab, 6).double().requires_grad_()
    targets = torch.randint(vocab, (rows,))
    targets[0], targets[1], targets[-1] = -1, 0, vocab - 1
    expected = F.cross_entropy(F.linear(x, table), targets, ignore_index=-1, reduction="sum")
    (0.25 * expected).backward()
    lo, hi = spans(vocab, world.size)[world.tp.rank]
    padded = torch.full((round_up(-(-vocab // world.size), 8) + 8, 6), 9.0, dtype=dtype)  # padding that would win every maximum
    padded[: hi - lo] = table.detach()[lo:hi]
    mine, weight = x.detach().to(dtype).requires_grad_(), padded.requires_grad_()
    kept = mine.detach().clone()
    CHUNK_LOGITS["cpu"] = chunk * len(padded)
    with LargestMade() as largest:
        loss = vocab_parallel_head_loss(mine, weight, targets, lo, hi, world.tp)
        (0.25 * loss).backward()
    assert loss.dtype == dtype and loss.shape == ()
    assert x.grad is not None and table.grad is not None and weight.grad is not None
    error = 1e-10 if dtype == torch.float64 else 1e-5
    close(loss.double(), expected, rtol=error, atol=error)
    close(mine.grad, x.grad.to(dtype), rtol=error, atol=error)
    close(weight.grad[: hi - lo], table.grad[lo:hi].to(dtype), rtol=error, atol=error)
    assert not weight.grad[hi - lo :].any()
    assert torch.equal(mine, kept)  # nobody writes into an argument
    size, chunks = loss.element_size(), -(-rows // chunk)
    assert largest.numel == max(-(-rows // chunks) * len(weight), weight.numel(), mine.numel())
    assert chunks == 1 or largest.numel < rows * (hi - lo)  # the whole logits never were
    moved = {(e.block, e.direction, e.op): (t.calls, t.bytes) for e, t in world.ledger.tallies.items()}
    account = {
        ("loss", "forward", "all_gather"): (chunks, 3 * rows * size),
        ("head", "backward", "all_reduce"): (1, rows * 6 * size),
    }
    assert moved == ({} if world.size == 1 else account)
    with pytest.raises(RuntimeError):
        loss.backward()  # its gradient is gone; better no answer than a wrong one


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "case",
    [(9, 5, 256, torch.float64), (70, 131, 16, torch.float64), (64, 131, 16, torch.float32)],
    ids=["one chunk", "uneven chunks", "float32"],
)
def test_head_loss_against_double_precision(size: int, case: Case) -> None:
    run_ranks(size, _head_loss, case)


def _head_loss_alone(world: World) -> None:
    """Without gradients: the same loss, nothing in the backward pass, no table-sized tensor. One gradient without the other."""
    CHUNK_LOGITS["cpu"] = 4 * 40
    torch.manual_seed(0)
    x, weight, targets = leaf(10, 6), leaf(40, 6), torch.randint(80, (10,))
    lo, hi = (world.tp.rank * 40, world.tp.rank * 40 + 40)
    expected = vocab_parallel_head_loss(x, weight, targets, lo, hi, world.tp)
    before = world.ledger.snapshot()
    with torch.no_grad(), LargestMade() as largest:
        loss = vocab_parallel_head_loss(x, weight, targets, lo, hi, world.tp)
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert largest.numel == 4 * 40 < weight.numel()
    assert [(e.block, e.op, t.calls) for e, t in world.ledger.since(before).items()] == [("loss", "all_gather", 3)]
    expected.backward()
    for frozen_x in (True, False):
        a, b = x.detach().clone().requires_grad_(not frozen_x), weight.detach().clone().requires_grad_(frozen_x)
        vocab_parallel_head_loss(a, b, targets, lo, hi, world.tp).backward()
        close(b.grad if frozen_x else a.grad, weight.grad if frozen_x else x.grad, rtol=0.0, atol=0.0)


def test_head_loss_computes_no_gradient_that_nobody_wants() -> None:
    run_ranks(2, _head_loss_alone)


def _head_loss_in_half(world: World, dtype: torch.dtype) -> None:
    """Under autocast: close to double precision on the same rounded inputs, gradients in the parameters' float32."""
    CHUNK_LOGITS["cpu"] = 16 * 100
    torch.manual_seed(0)
    x, table, targets = torch.randn(64, 32), 0.3 * torch.randn(200, 32), torch.randint(200, (64,))
    wide_x, wide_table = (t.to(dtype).double().requires_grad_() for t in (x, table))
    expected = F.cross_entropy(F.linear(wide_x, wide_table), targets, reduction="sum")
    expected.backward()
    lo, hi = spans(200, world.size)[world.tp.rank]
    mine, weight = x.requires_grad_(), table[lo:hi].clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = vocab_parallel_head_loss(mine, weight, targets, lo, hi, world.tp)
    (loss * 8).backward()
    assert loss.dtype == torch.float32 and mine.grad is not None and weight.grad is not None
    assert wide_x.grad is not None and wide_table.grad is not None
    assert mine.grad.dtype == weight.grad.dtype == torch.float32
    close(loss.double(), expected, rtol=2e-3, atol=0.0)
    for found, whole in ((mine.grad, wide_x.grad), (weight.grad, wide_table.grad[lo:hi])):
        assert (found.double() / 8 - whole).norm() < 1e-2 * whole.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_loss_under_autocast(dtype: torch.dtype) -> None:
    run_ranks(2, _head_loss_in_half, dtype)


class Sync:
    """A transport without an asynchronous all-reduce, around one that has it."""

    name = "sync"

    def __init__(self, transport: Any):
        self.all_reduce, self.all_gather, self.broadcast = transport.all_reduce, transport.all_gather, transport.broadcast
        self.reduce_scatter, self.gather_tokens = transport.reduce_scatter, transport.gather_tokens


def _transports(world: World) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 3)
    found = []
    for transport in (world.tp.transport, Sync(world.tp.transport)):
        ledger = Ledger()
        layer = ColumnParallelLinear(8, 3, True, replace(world.tp, transport=transport, ledger=ledger).at("mlp", 0))
        with torch.no_grad():
            layer.weight.copy_(torch.arange(24.0).view(3, 8) + world.rank)
            assert layer.bias is not None
            layer.bias.zero_()
        mine = x.clone().requires_grad_()
        layer(mine).backward(dy)
        account = {entry: (tally.calls, tally.bytes) for entry, tally in ledger.tallies.items()}
        found.append((mine.grad, layer.weight.grad, layer.bias.grad, account))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b and len(a) == 1


def test_a_transport_without_asynchronous_all_reduce_gives_the_same() -> None:
    run_ranks(2, _transports)


def _frozen(world: World) -> None:
    """Only the gradients that are wanted: a frozen weight, and an input that needs none (no all-reduce for nobody)."""
    layer = ColumnParallelLinear(8, 3, True, world.tp)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(1.0)
    layer.weight.requires_grad_(False)
    x = torch.ones(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None and layer.bias is not None and layer.bias.grad is not None
    assert torch.equal(x.grad, torch.full((2, 8), 3.0 * world.size))
    before = world.ledger.snapshot()
    layer.weight.requires_grad_(True)
    layer(torch.ones(2, 8)).sum().backward()
    assert layer.weight.grad is not None and not world.ledger.since(before)


def test_a_column_parallel_layer_computes_the_gradients_that_are_wanted() -> None:
    run_ranks(2, _frozen)


def test_loss_with_huge_logits_stays_finite() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e4, -1e4, -1e4]])
    nll = vocab_parallel_cross_entropy(logits, torch.tensor([0, 2]), 0, alone())
    close(nll, torch.tensor([0.0, 3.0]).log1p().clamp(max=torch.tensor(3.0).log()))


def _wrong_widths(world: World) -> list[str]:
    row, column = RowParallelLinear(8, 8 // world.size, 3, True, world.tp), ColumnParallelLinear(8, 4, True, world.tp)
    said = []
    for layer, width in ((row, 8), (row, 3), (column, 4)):
        with pytest.raises(ValueError) as error:
            layer(torch.zeros(2, width))
        said.append(str(error.value))
    return said


def test_an_unsplit_input_is_refused_in_words() -> None:
    unsplit, odd, narrow = run_ranks(2, _wrong_widths)[1]
    assert unsplit == (
        "RowParallelLinear expects inputs of width 4, got 8: this is the whole, unsplit input. Feed the output of a "
        "ColumnParallelLinear, or this rank's own columns (rank 1 of 2 owns 4)"
    )
    assert odd == "RowParallelLinear expects inputs of width 4, got 3"
    assert narrow == "ColumnParallelLinear expects inputs of width 8, got 4"


def test_misfitting_vocabulary_and_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot hold vocabulary rows \[3, 20\) of 13"):
        VocabParallelEmbedding(13, 4, 3, 20, 24, alone())
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[4\]"):
        vocab_parallel_cross_entropy(torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64), 0, alone())
    with pytest.raises(ValueError, match=r"got \[2, 3\], \[8, 4\], \[2\]"):
        vocab_parallel_head_loss(torch.zeros(2, 3), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int64), 0, 8, alone())


def test_an_axis_without_transport_is_refused() -> None:
    from parallel.collectives import all_reduce

    with pytest.raises(ValueError, match="axis tp has size 2 and no transport"):
        all_reduce(torch.zeros(1), Axis("tp", 0, 2), "forward")

"""Column- and row-parallel layers, the embedding and the loss against their unsharded selves: y, dx and every dw."""

import pytest
import torch
import torch.nn.functional as F
from ranks import alone, run_ranks
from torch import Tensor

from parallel.collectives import Axis
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.loss import vocab_parallel_cross_entropy
from parallel.mesh import World
from parallel.partition import round_up, spans

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


def _loss(world: World, vocab: int) -> None:
    torch.manual_seed(0)
    logits = (10 * torch.randn(9, vocab)).requires_grad_()
    targets = torch.randint(vocab, (9,))
    targets[3], targets[4], targets[5] = -1, 0, vocab - 1
    weights = torch.rand(9)
    expected = F.cross_entropy(logits.double(), targets, ignore_index=-1, reduction="none").float()
    (expected * weights).sum().backward()
    lo, hi = spans(vocab, world.size)[world.tp.rank]
    mine = logits.detach()[:, lo:hi].clone().requires_grad_()
    kept = mine.detach().clone()
    nll = vocab_parallel_cross_entropy(mine, targets, lo, world.tp)
    (nll * weights).sum().backward()
    close(nll, expected, rtol=1e-5, atol=1e-5)  # against double precision
    assert logits.grad is not None
    close(mine.grad, logits.grad[:, lo:hi], rtol=1e-5, atol=1e-6)
    assert torch.equal(mine, kept)
    moved = {e.op: t for e, t in world.ledger.tallies.items()}
    if world.size > 1:  # a maximum a row, then a target logit and a sum of exponentials: never the logits
        assert (moved["all_reduce"].calls, moved["all_reduce"].bytes) == (2, 3 * 9 * 4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab", [5, 131])
def test_loss_against_double_precision(size: int, vocab: int) -> None:
    run_ranks(size, _loss, vocab)


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


def test_an_axis_without_transport_is_refused() -> None:
    from parallel.collectives import all_reduce

    with pytest.raises(ValueError, match="axis tp has size 2 and no transport"):
        all_reduce(torch.zeros(1), Axis("tp", 0, 2), "forward")

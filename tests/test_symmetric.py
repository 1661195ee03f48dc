"""Symmetric memory: what goes through it, who does without it, and its sums where there are GPUs."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_entry import launch, spoken
from torch import Tensor
from torch.distributed import _symmetric_memory

from parallel import symmetric
from parallel.collectives import GroupTransport, all_reduce, all_reduce_later
from parallel.ledger import total
from parallel.symmetric import MOST_BYTES, SymmetricTransport
from world.mesh import World, make_axis


class Noted:
    """In the place of nccl: one rank alone, and a list of what it was asked."""

    name = "nccl"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        self.asked.append(f"all_reduce {op}")
        return x.clone()

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        self.asked.append("all_reduce_later")
        return lambda: x

    def all_gather(self, x: Tensor) -> Tensor:
        self.asked.append("all_gather")
        return x.unsqueeze(0)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        self.asked.append(f"broadcast {source}")
        return x.clone()

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.asked.append("reduce_scatter")
        return x.clone()

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        self.asked.append(f"gather_tokens {tokens}")
        return x.clone()


def alone() -> tuple[SymmetricTransport, Noted, list[Tensor]]:
    """A transport on the CPU whose sum is three times the message, what stands for nccl, and the messages it summed."""
    other, summed = Noted(), list[Tensor]()

    def total(place: Tensor, message: Tensor) -> Tensor:
        assert message.is_contiguous()
        summed.append(place.copy_(message))
        return place * 3

    return SymmetricTransport(torch.zeros(MOST_BYTES, dtype=torch.uint8), total, other), other, summed  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (MOST_BYTES // 16, 4)])
def test_small_sums_go_through_the_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    transport, other, summed = alone()
    x = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).to(dtype).requires_grad_()
    before = x.detach().clone()
    out = transport.all_reduce(x, "sum")
    assert torch.equal(out, before * 3) and torch.equal(x, before) and not out.requires_grad
    assert not other.asked and summed[0].data_ptr() == transport.buffer.data_ptr() and summed[0].shape == shape
    strided = torch.arange(32.0).view(4, 8).t()
    assert torch.equal(transport.all_reduce(strided, "sum"), strided * 3) and summed[1].is_contiguous()


@pytest.mark.parametrize(
    "x, op",
    [
        (torch.ones(4), "max"),
        (torch.ones(MOST_BYTES // 4 + 4), "sum"),
        (torch.ones(5), "sum"),
        (torch.ones(4, dtype=torch.bfloat16), "sum"),
        (torch.ones(0), "sum"),
        (torch.ones(8, dtype=torch.float16), "sum"),
        (torch.ones(8, dtype=torch.int64), "sum"),
        (torch.ones(8, device="meta"), "sum"),
    ],
    ids=["max", "large", "20 bytes", "8 bytes", "nothing", "float16", "int64", "elsewhere"],
)
def test_all_else_goes_over_nccl(x: Tensor, op: str) -> None:
    transport, other, summed = alone()
    assert transport.all_reduce(x, op).shape == x.shape
    assert other.asked == [f"all_reduce {op}"] and not summed


def test_the_other_operations_are_nccls() -> None:
    transport, other, summed = alone()
    x = torch.ones(4)
    assert transport.all_reduce_later(x)() is x
    assert transport.all_gather(x).shape == (1, 4) and torch.equal(transport.broadcast(x, 1), x)
    tokens = torch.ones(1, 4, 2)
    assert torch.equal(transport.reduce_scatter(tokens), tokens) and torch.equal(transport.gather_tokens(tokens, 9), tokens)
    assert other.asked == ["all_reduce_later", "all_gather", "broadcast 1", "reduce_scatter", "gather_tokens 9"] and not summed


# --- opening it -----------------------------------------------------------------------------------------------------


def _pretend(world: World, fault: str) -> None:
    """A build of torch, and GPUs, on which everything is there but what `fault` names; rank 1 alone is at fault."""
    here = world.rank == 1
    torch.cuda.current_device = lambda: 0 if fault == "a GPU for two" else world.rank
    torch.cuda.can_device_access_peer = lambda *pair: not (here and fault == "a GPU out of reach")
    if here and fault == "another host":
        socket.gethostname = lambda: "elsewhere"
    setattr(symmetric, "_check_op", _no_op if here and fault == "no operation" else lambda: None)  # noqa: B010
    memory: Any = _symmetric_memory
    memory.empty = _no_memory if here and fault == "no memory" else lambda n, dtype, device: torch.zeros(n, dtype=dtype)
    memory.rendezvous = _no_memory if here and fault == "no rendezvous" else lambda buffer, group: None

    def total(place: Tensor, x: Tensor, op: str, group: str) -> Tensor:
        out = GroupTransport(world.groups["tp"], "gloo").all_reduce(x, op)
        return out + 1 if here and fault == "wrong sums" else out

    operations: Any = torch.ops.symm_mem
    operations.one_shot_all_reduce_copy = total


def _no_op() -> None:
    raise RuntimeError("operator does not exist")


def _no_memory(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("CUDA driver error: out of memory\nand much more")


def _opened(world: World, fault: str) -> tuple[str, str, int]:
    """The transport's name, why it is nccl, and what a small sum on it gives and is accounted as."""
    if fault != "this build":
        _pretend(world, fault)
    axis = make_axis("tp", world.groups.get("tp"), "nccl", world.ledger)
    assert axis.transport is not None
    assert all_reduce(torch.ones(4), axis.at("mlp", 0), "forward").tolist() == [world.size] * 4
    assert all_reduce_later(torch.ones(5), axis.at("mlp", 0), "backward")().tolist() == [world.size] * 5
    return axis.transport.name, getattr(axis.transport, "why", ""), total(world.ledger.tallies).bytes


def test_where_everything_is_there_it_is_used() -> None:
    assert run_ranks(3, _opened, "") == [("symmetric memory", "", 36)] * 3


@pytest.mark.parametrize(
    "fault, why",
    [
        ("no operation", "rank 1: operator does not exist"),
        ("another host", "the ranks are not on GPUs of one host that all of them see"),
        ("a GPU for two", "the ranks are not on GPUs of one host that all of them see"),
        ("a GPU out of reach", "rank 1: GPU 1 cannot read the memory of GPU 0"),
        ("no memory", "rank 1: CUDA driver error: out of memory"),
        ("no rendezvous", "rank 1: CUDA driver error: out of memory"),
        ("wrong sums", "rank 1: sums through symmetric memory are not those over nccl"),
    ],
)
def test_where_one_rank_cannot_all_use_nccl_alone(fault: str, why: str) -> None:
    assert run_ranks(3, _opened, fault) == [("nccl", why, 36)] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a build without CUDA, or no GPU")
def test_without_gpus_it_is_unavailable() -> None:
    (name, why, _), other = run_ranks(2, _opened, "this build")
    assert (name, why) == other[:2] and name == "nccl" and why


# --- on GPUs --------------------------------------------------------------------------------------------------------


def _sums(world: World, options: Any) -> None:
    """Sums of several sizes and types: float64's to rounding, the same bits on all ranks, and an input that stays."""
    transport = world.tp.transport
    if isinstance(transport, SymmetricTransport):
        for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16] * 4):
            shape = [(8,), (3, 5, 16), (768,), (MOST_BYTES // dtype.itemsize,), (MOST_BYTES + 8,), (7,)][i % 6]
            brought = []
            for rank in range(world.size):
                generator = torch.Generator().manual_seed(100 * i + rank)
                brought.append(torch.randn(shape, generator=generator).to(dtype))
            mine = brought[world.tp.rank].to(world.device)
            out = transport.all_reduce(mine, "sum")
            right, size = torch.stack(brought).double(), torch.stack(brought).double().abs().sum(0)
            assert ((out.double().cpu() - right.sum(0)).abs() <= torch.finfo(dtype).eps * world.size * size).all()
            assert torch.equal(mine.cpu(), brought[world.tp.rank])
            assert all(torch.equal(out, each) for each in transport.all_gather(out))
    print(getattr(transport, "why", "") or "symmetric", file=sys.stderr, flush=True)


@pytest.mark.gpu(2)
def test_sums_on_gpus(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count()
    ends = launch(ranks, _sums, tmp_path, ["--device=cuda", "--comm=nccl"], seconds=120, start="spawn")
    assert all(status == 0 for status, _ in ends), spoken(ends)
    if spoken(ends).count("symmetric\n") < ranks:
        pytest.skip(f"no symmetric memory: {spoken(ends).splitlines()[0]}")

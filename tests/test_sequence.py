"""Sequences that are split over the ranks: their messages."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from test_shm import carrier, message
from torch import Tensor

from parallel.collectives import GroupTransport, Transport
from parallel.mesh import World
from parallel.partition import spans
from parallel.shm import SLOT_BYTES

# --- the messages ---------------------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1), (2, 4, 3), (3, 7, 5), (1, 1000, 3), (5, 3, 2049), (1, 2, SLOT_BYTES // 4), (3, 5, SLOT_BYTES // 8 + 1),
    (2 * SLOT_BYTES // 32, 7, 8),
]  # fmt: skip  some with fewer tokens than ranks, some larger than a slot, with parts that begin and end anywhere in it


def transport_of(world: World, kind: str) -> Transport:
    assert isinstance(world.tp.transport, GroupTransport)
    if kind == "shm":
        return carrier(world)
    # what is written for nccl runs over gloo as well
    return replace(world.tp.transport, name=kind)


def _moved(world: World, kind: str, dtype: torch.dtype) -> tuple[bool, float, bool]:
    """(bits of the all-reduce, largest relative error otherwise, parts come back whole and inputs stay) over all shapes."""
    transport, same, error, whole = transport_of(world, kind), True, 0.0, True
    for shape in SHAPES:
        mine = message(world.rank, shape, dtype)
        before = mine.clone()
        lo, hi = spans(shape[1], world.size)[world.rank]
        part, expected = transport.reduce_scatter(mine), transport.all_reduce(mine, "sum")
        own = expected[:, lo:hi]
        same &= torch.equal(part, own) and part.untyped_storage().nbytes() == own.numel() * own.element_size()
        error = max(error, ((part - own).double().norm() / expected.double().norm()).item())
        whole &= torch.equal(mine, before) and torch.equal(transport.gather_tokens(own, shape[1]), expected)
        whole &= own.untyped_storage().nbytes() == expected.untyped_storage().nbytes()  # a view went in, not a copy
    return same, error, whole


@pytest.mark.parametrize("kind, dtype", [
    ("shm", torch.float32), ("shm", torch.bfloat16), ("shm", torch.float64), ("gloo", torch.float32), ("gloo", torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_have_the_bits_of_an_all_reduce(size: int, kind: str, dtype: torch.dtype) -> None:
    assert run_ranks(size, _moved, kind, dtype) == [(True, 0.0, True)] * size


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_parts_are_padded_where_equal_ones_are_wanted(size: int) -> None:
    for _, error, whole in run_ranks(size, _moved, "nccl", torch.float32):
        assert error < 1e-6 and whole


def _any_type(world: World) -> list[Tensor]:
    transport, found = carrier(world), []
    for dtype in (torch.int64, torch.float16, torch.bool, torch.int8):
        lo, hi = spans(5, world.size)[world.rank]
        found.append(transport.gather_tokens((torch.arange(30).view(2, 5, 3) % 2).to(dtype)[:, lo:hi], 5))
    return found


def test_gathering_moves_any_type() -> None:
    for found in run_ranks(3, _any_type):
        for whole in found:
            assert torch.equal(whole, (torch.arange(30).view(2, 5, 3) % 2).to(whole.dtype))


def _different(world: World) -> str:
    transport = carrier(world)
    try:
        transport.gather_tokens(torch.zeros(1, 2, 3 + world.rank), 4)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_ranks_that_bring_different_parts_are_told() -> None:
    assert run_ranks(2, _different)[0] == "rank 1 of the group brought another message than rank 0"

"""The shared-memory transport: the sums of double precision, the same bits everywhere, and what happens without it."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_entry import launch, spoken
from torch import Tensor

from base.errors import Unavailable
from parallel import shm
from parallel.collectives import all_reduce, all_reduce_later
from parallel.shm import SLOT_BYTES, ShmTransport
from world.devices import pick_comm
from world.launch import Launch
from world.mesh import World, make_axis

PIECE = SLOT_BYTES // 4  # float32 elements


def carrier(world: World, timeout: float = 20.0) -> ShmTransport:
    transport = make_axis("tp", world.groups.get("tp"), "shm", world.ledger, timeout).transport
    assert isinstance(transport, ShmTransport)
    return transport


def message(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 8).to(dtype)


# --- results --------------------------------------------------------------------------------------------------------

SHAPES = [(1,), (768,), (3, 5, 7), (2047,), (2049,), (PIECE - 1,), (PIECE,), (2 * PIECE + 3,), (5, PIECE)]


def _sums(world: World, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    transport = carrier(world)
    pairs = []
    for shape in SHAPES:
        mine = message(world.rank, shape, dtype)
        before = mine.clone()
        pairs.append((transport.all_reduce(mine, "sum"), transport.all_reduce(mine, "max")))
        assert torch.equal(mine, before)
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_and_maxima(size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(size, _sums, dtype)
    for i, shape in enumerate(SHAPES):
        brought = torch.stack([message(rank, shape, dtype) for rank in range(size)]).double()
        total, largest = ranks[0][i]
        # one rounding of the sum in bfloat16, size - 1 of them in float32
        unit = torch.finfo(dtype).eps / 2 * (1.01 if dtype == torch.bfloat16 else size - 1)
        assert total.dtype == dtype and total.shape == shape
        assert ((total.double() - brought.sum(0)).abs() <= unit * brought.abs().sum(0)).all()
        assert torch.equal(largest.double(), brought.amax(0))
        for other in ranks[1:]:
            assert torch.equal(other[i][0], total) and torch.equal(other[i][1], largest)


def _later(world: World, under_way: int) -> bool:
    """Sums that are begun, then waited for in another order, beside others that are not: each is the one at once."""
    transport, right, begun = carrier(world), [], []
    for i in range(60):
        shape = (1 + i * 37 % 5000,) if i % 7 else (shm.LATE_BYTES // 4 + i % 2,)
        mine = message(world.rank + 10 * i, shape, (torch.float32, torch.bfloat16)[i % 2])
        right.append(transport.all_reduce(mine, "sum"))
        begun.append((i, transport.all_reduce_later(mine)))
        if len(begun) == under_way:
            j, wait = begun.pop(i * 5 % under_way)
            assert torch.equal(wait(), right[j])
    return all(torch.equal(wait(), right[j]) for j, wait in begun)


@pytest.mark.parametrize("size, under_way", [(2, 1), (2, 3), (3, shm.LATE_SLOTS + 3)])
def test_sums_that_are_waited_for_later(size: int, under_way: int) -> None:
    assert all(run_ranks(size, _later, under_way))


def _hidden(world: World) -> bool:
    """Rank 1 begins a sum after it has heard that rank 0 did."""
    transport, mine = carrier(world), torch.ones(100)
    if world.rank == 1:
        world.barrier()
    wait = transport.all_reduce_later(mine)
    if world.rank == 0:
        world.barrier()
    return torch.equal(wait(), 2 * mine)


def test_whoever_begins_a_sum_waits_for_nobody() -> None:
    assert all(run_ranks(2, _hidden))


def _specials(world: World) -> list[Tensor]:
    transport = carrier(world)
    nan, inf = float("nan"), float("inf")
    mine = torch.tensor([[nan, 1.0, inf, inf, -0.0, 3e38], [1.0, 1.0, 1.0, -inf, -0.0, 3e38]][world.rank])
    return [transport.all_reduce(mine.to(dtype), op) for dtype in (torch.float32, torch.bfloat16) for op in ("sum", "max")]


def test_what_is_not_a_number_stays_so() -> None:
    for sums, maxima in zip(*[iter(run_ranks(2, _specials)[0])] * 2, strict=True):
        assert sums.isnan().tolist() == [True, False, False, True, False, False]
        assert sums[2] == float("inf") and sums[5] == float("inf")
        assert maxima.isnan().tolist() == [True, False, False, False, False, False]
        assert maxima[3] == float("inf")


def _moved(world: World, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    transport = carrier(world)
    shapes = [(), (3,), (2, 5), (2 * SLOT_BYTES // dtype.itemsize + 1,)]
    gathered, sent = [], []
    for i, shape in enumerate(shapes):
        mine = torch.full(shape, world.rank + i + 1).to(dtype)
        gathered.append(transport.all_gather(mine))
        sent.append(transport.broadcast(mine, i % world.size))
    return gathered, sent


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float16, torch.bool])
def test_gathering_and_broadcasting_move_any_type(dtype: torch.dtype) -> None:
    size = 3
    for gathered, sent in run_ranks(size, _moved, dtype):
        for i, (everyone, one) in enumerate(zip(gathered, sent, strict=True)):
            shape = one.shape
            assert torch.equal(everyone, torch.stack([torch.full(shape, rank + i + 1).to(dtype) for rank in range(size)]))
            assert torch.equal(one, torch.full(shape, i % size + i + 1).to(dtype))


def _others(world: World) -> list[Tensor]:
    transport = carrier(world)
    ours = torch.full((4,), world.rank + 1)
    strided = torch.arange(12.0).view(3, 4).t() * (world.rank + 1)
    return [transport.all_reduce(ours, "sum"), transport.all_reduce(ours.double(), "max"), transport.all_reduce(strided, "sum")]


def test_other_types_and_layouts() -> None:
    for whole, double, strided in run_ranks(2, _others):
        assert torch.equal(whole, torch.full((4,), 3)) and torch.equal(double, torch.full((4,), 2.0).double())
        assert torch.equal(strided, torch.arange(12.0).view(3, 4).t() * 3)


def _long(world: World, rounds: int) -> bool:
    """Many messages of changing size, with ranks that dawdle in turn: what a slot that is reused too early would break."""
    transport = carrier(world)
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 3000, (rounds,), generator=generator).tolist()
    for i, n in enumerate(lengths):
        if i % 97 == world.rank:
            time.sleep(0.002)
        expected = torch.full((n,), float(sum(i + 1 + rank for rank in range(world.size))))
        if not torch.equal(transport.all_reduce(torch.full((n,), float(i + 1 + world.rank)), "sum"), expected):
            return False
    return True


@pytest.mark.parametrize("size", [2, 8])
def test_more_ranks_than_cores_and_thousands_of_messages(size: int) -> None:
    assert all(run_ranks(size, _long, 2000))


def _axes(world: World) -> list[float]:
    axis = make_axis("tp", world.groups.get("tp"), "shm", world.ledger)
    assert axis.transport is not None
    return axis.transport.all_reduce(torch.tensor([float(world.rank)]), "sum").tolist()


def test_groups_beside_each_other() -> None:
    assert run_ranks(4, _axes, tp=2) == [[1.0], [1.0], [5.0], [5.0]]


# --- what can go wrong ----------------------------------------------------------------------------------------------


def _said(world: World, body: Any, timeout: float = 20.0) -> str:
    transport = carrier(world, timeout)
    try:
        body(world.rank, transport)
    except RuntimeError as error:
        world.barrier()
        return str(error)
    world.barrier()
    return "nothing"


def _lengths(rank: int, transport: ShmTransport) -> None:
    transport.all_reduce(torch.zeros(4 + rank), "sum")


def _types(rank: int, transport: ShmTransport) -> None:
    transport.all_reduce(torch.zeros(4, dtype=(torch.float32, torch.bfloat16)[rank]), "sum")


def _operations(rank: int, transport: ShmTransport) -> None:
    if rank:
        transport.all_gather(torch.zeros(4, dtype=torch.int8))
    else:
        transport.broadcast(torch.zeros(4, dtype=torch.int8), 0)


def _late_lengths(rank: int, transport: ShmTransport) -> None:
    wait = transport.all_reduce_later(torch.ones(5 + rank))
    transport.all_reduce(torch.ones(3), "sum")
    wait()


@pytest.mark.parametrize("body", [_lengths, _types, _operations, _late_lengths])
def test_ranks_that_bring_different_messages_are_told(body: Any) -> None:
    first, second = run_ranks(2, _said, body)
    assert first == "rank 1 of the group brought another message than rank 0"
    assert second == "rank 0 of the group brought another message than rank 1"


def _late(rank: int, transport: ShmTransport) -> None:
    if rank == 0:
        transport.all_reduce(torch.zeros(4), "sum")


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_limit() -> None:
    assert run_ranks(2, _said, _late, 0.5) == ["rank 1 of the group did not come within 0.5 s", "nothing"]


def _killed(world: World, options: Any) -> None:
    axis = world.tp
    assert isinstance(axis.transport, ShmTransport)
    axis.transport.all_reduce(torch.zeros(4), "sum")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce(torch.zeros(4), axis.at("mlp", 3), "forward")


def _killed_later(world: World, options: Any) -> None:
    waits = [all_reduce_later(torch.zeros(4), world.tp.at("mlp", 3), "forward") for _ in range(2)]
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    waits += [all_reduce_later(torch.zeros(4), world.tp.at("mlp", 4), "forward")]
    for wait in reversed(waits):
        wait()


def test_a_peer_killed_with_sums_under_way_is_named(tmp_path: Path) -> None:
    said = spoken(launch(2, _killed_later, tmp_path, ["--device=cpu", "--comm=shm"]))
    assert "rank 0 lost contact with its peers (rank 1 is gone) in all_reduce #1 (layer 4, mlp, forward)" in said
    assert said.count("\n") == 1


def test_a_peer_killed_inside_a_run_is_named(tmp_path: Path) -> None:
    started = time.monotonic()
    said = spoken(launch(2, _killed, tmp_path, ["--device=cpu", "--comm=shm"]))
    assert time.monotonic() - started < 10
    assert "rank 0 lost contact with its peers (rank 1 is gone) in all_reduce #1 (layer 3, mlp, forward)" in said
    assert said.count("\n") == 1


def _holdings(world: World) -> tuple[int, int]:
    """How many descriptors and how many mappings of the shared memory this rank has while the transport lives."""
    transport = carrier(world)
    # the listing's own descriptor is in the list, and gone
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:nanotp" in line]
    assert transport.all_reduce(torch.ones(1), "sum").item() == world.size
    return sum("memfd:nanotp" in link for link in links), len(maps)


def test_the_memory_is_held_by_its_mappings_alone() -> None:
    """So it is gone with the last process; mmap keeps a duplicate of the descriptor it was given, and nothing else does."""
    assert run_ranks(2, _holdings, comm="gloo") == [(1, 1), (1, 1)]


# --- without it -----------------------------------------------------------------------------------------------------


def _falls_back(world: World, fault: str) -> str:
    if fault == "no compiler":
        os.environ["CC"], os.environ["XDG_CACHE_HOME"] = "/nowhere/cc", "/dev/null/nowhere"  # no cache either
    elif fault == "a compiler that fails on rank 1" and world.rank == 1:
        os.environ["CC"] = "false"
    elif fault == "no memory" and world.rank == 0:
        os.memfd_create = _full
    elif fault == "nothing to open" and world.rank == 1:
        shm._attach = _closed  # type: ignore[assignment]
    try:
        make_axis("tp", world.groups.get("tp"), "shm", world.ledger)
    except Unavailable as error:
        return str(error)
    return "nothing"


def _full(name: str, flags: int = 0) -> int:
    raise OSError(28, "No space left on device")


def _closed(pid: int, descriptor: int, nbytes: int) -> None:
    raise Unavailable("the shared memory of rank 0 cannot be opened (Permission denied)")


@pytest.mark.parametrize(
    "fault, message",
    [
        ("no compiler", "/nowhere/cc could not be run ([Errno 2] No such file or directory: '/nowhere/cc')"),
        ("a compiler that fails on rank 1", "rank 1: false failed: no message"),
        ("no memory", "13 MB of shared memory cannot be had (No space left on device)"),
        ("nothing to open", "rank 1: the shared memory of rank 0 cannot be opened (Permission denied)"),
    ],
)
def test_where_one_rank_cannot_all_ranks_do_without(fault: str, message: str) -> None:
    assert run_ranks(2, _falls_back, fault) == [message, message]


def _comm(world: World, options: Any) -> None:
    print(world.comm, type(world.tp.transport).__name__, file=sys.stderr, flush=True)


def test_auto_says_why_it_goes_over_gloo_and_shm_alone_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    why = "false failed: no message"
    said = spoken(launch(2, _comm, tmp_path, ["--device=cpu"]))
    line = f"prog.py: ranks talk over gloo, which is slower than shared memory: {why}\n"
    assert said.count(line) == 1 and said.count("gloo GroupTransport\n") == 2
    said = spoken(launch(2, _comm, tmp_path, ["--device=cpu", "--comm=shm"]))
    assert said == f"prog.py: --comm=shm: {why}. Use --comm=gloo.\n"


@pytest.mark.parametrize(
    "comm, device, launched, tp, expected",
    [
        ("auto", "cpu", Launch(0, 4, 0, 4), 4, "shm"),
        ("auto", "cpu", Launch(0, 4, 0, 4), 2, "shm"),
        ("auto", "cpu", Launch(0, 4, 0, 4), 1, "gloo"),
        ("shm", "cpu", Launch(0, 4, 0, 4), 1, "gloo"),
        ("auto", "cpu", Launch(0, 4, 0, 2), 4, "gloo"),
        ("auto", "cpu", Launch(0, 4, 0, 2), 2, "shm"),
        ("gloo", "cpu", Launch(0, 4, 0, 4), 4, "gloo"),
        ("auto", "cpu", Launch(0, 1, 0, 1), 1, "none"),
    ],
)
def test_where_shared_memory_is_chosen(comm: str, device: str, launched: Launch, tp: int, expected: str) -> None:
    assert pick_comm(comm, torch.device(device), launched, tp) == expected

"""Every way in which ranks talk: a handful of collectives over one transport, each call told to the ledger.

A collective takes the axis it runs along as an argument; there is no process-group state in this module or any other.
None of them writes into its input. Along an axis of size 1 each is the identity and costs nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.graphs import outside_graphs
from parallel.ledger import Entry, Ledger, Tally

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective did not come back: a rank is gone, late, or brought something else."""


class Transport(Protocol):
    """What carries a message between the ranks of one group. Results are new tensors, equal bit for bit on all ranks.

    One that can sum while its caller computes has `all_reduce_later` as well, see GroupTransport's.
    """

    @property
    def name(self) -> str: ...
    def all_reduce(self, x: Tensor, op: str) -> Tensor: ...
    def all_gather(self, x: Tensor) -> Tensor: ...
    def broadcast(self, x: Tensor, source: int) -> Tensor: ...


@dataclass(frozen=True)
class GroupTransport:
    """torch.distributed's collectives over nccl or gloo. `source` of a broadcast is a rank of this group.

    gloo moves host memory: where ranks share a GPU (nccl refuses that) messages are staged through the host.
    why: what kept SymmetricTransport from being used, where it was tried; to be looked up, nobody is told.
    """

    group: dist.ProcessGroup
    name: str  # nccl | gloo
    why: str = ""

    def _staged(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        if self.name == "gloo" and x.is_cuda:
            return run(x.cpu()).to(x.device)
        return run(x)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        def run(message: Tensor) -> Tensor:
            out = message.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(out, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=self.group)
            return out

        return self._staged(x, run)

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Start summing x, in place; the function returned waits for the end of it and gives the sum."""
        if self.name == "gloo" and x.is_cuda:
            out = self.all_reduce(x, "sum")
            return lambda: out
        work = dist.all_reduce(x, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return x

        return wait

    def all_gather(self, x: Tensor) -> Tensor:
        def run(message: Tensor) -> Tensor:
            parts = [torch.empty_like(message) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(parts, message, group=self.group)
            return torch.stack(parts)

        return self._staged(x.contiguous(), run)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        def run(message: Tensor) -> Tensor:
            out = message.clone(memory_format=torch.contiguous_format)
            dist.broadcast(out, group_src=source, group=self.group)
            return out

        return self._staged(x, run)


@dataclass(frozen=True)
class Axis:
    """One dimension of the dp x tp mesh as one rank sees it, with the account of what is said along it.

    rank, size: this rank's place on the axis, and how many there are. transport: None on an axis of size 1.
    layer, block: what a call along this axis is accounted to; `at` gives the same axis under another label.
    """

    name: str  # tp | dp
    rank: int = 0
    size: int = 1
    transport: Transport | None = None
    ledger: Ledger = field(default_factory=Ledger)
    layer: int | None = None
    block: str = ""
    # what is looked up once; a copy under another label, or over another transport, begins anew
    _lines: dict[tuple[str, str], tuple[Entry, Tally]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _labels: dict[tuple[str, int | None], "Axis"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, block: str, layer: int | None = None) -> "Axis":
        """The same axis under another label; made once."""
        found = self._labels.get((block, layer))
        if found is None:
            found = self._labels[block, layer] = replace(self, layer=layer, block=block)
        return found

    def account(self, op: str, direction: str, message: Tensor, call: Callable[[], T]) -> T:
        """Make one call that moves `message` and tell the ledger of it; an error in it says which call it was.

        A decode step makes two of these a layer, each a few microseconds long: what is done here is kept short.
        """
        if not self.ledger.on:
            return call()
        entry, tally = self.line(op, direction)
        start = _clock(message)
        try:
            result = call()
        except RuntimeError as error:
            raise _named(error, entry) from error
        self.ledger.record(tally, message.nbytes, _elapsed(start, message))
        return result

    def line(self, op: str, direction: str) -> tuple[Entry, Tally]:
        """The line of the account for such a call, looked up once."""
        direction = self.ledger.direction(direction)
        found = self._lines.get((op, direction))
        if found is None:
            entry = Entry(self.layer, self.block, direction, op)
            found = self._lines[op, direction] = entry, self.ledger.tally(entry)
        return found

    def _carrier(self) -> Transport:
        if self.transport is None:
            raise ValueError(f"axis {self.name} has size {self.size} and no transport")
        return self.transport


def _named(error: RuntimeError, entry: Entry) -> CollectiveError:
    return CollectiveError(f"{entry.op} ({entry.where()}): {str(error).strip().splitlines()[0]}")


def _clock(message: Tensor) -> Any:
    if not message.is_cuda:
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None  # nothing runs now, and when it does an event of the graph's own tells no time
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, message: Tensor) -> float | Callable[[], float]:
    """Seconds since `start`; on a GPU a function that knows them once the stream has got there. 0 in a graph's capture."""
    if not message.is_cuda:
        return time.perf_counter() - start
    if start is None:
        return 0.0
    end = _clock(message)
    return lambda: start.elapsed_time(end) / 1000.0


# A compiler must neither trace nor reorder a call that other ranks wait for, and the ledger counts real calls only: these
# are the graph breaks of a compiled model, one at each sync point.


@outside_graphs
def _all_reduce(x: Tensor, axis: Axis, direction: str, op: str) -> Tensor:
    return axis.account("all_reduce", direction, x, lambda: axis._carrier().all_reduce(x, op))


@outside_graphs
def _all_reduce_later(x: Tensor, axis: Axis, direction: str) -> Callable[[], Tensor]:
    start: Callable[[Tensor], Callable[[], Tensor]] | None = getattr(axis._carrier(), "all_reduce_later", None)
    if start is None:
        out = _all_reduce(x, axis, direction, "sum")
        return lambda: out
    try:
        finish = start(x)
    except RuntimeError as error:
        raise _named(error, axis.line("all_reduce", direction)[0]) from error
    return lambda: axis.account("all_reduce", direction, x, finish)


@outside_graphs
def _all_gather(x: Tensor, axis: Axis, direction: str) -> Tensor:
    return axis.account("all_gather", direction, x, lambda: axis._carrier().all_gather(x))


@outside_graphs
def _broadcast(x: Tensor, axis: Axis, direction: str, source: int) -> Tensor:
    return axis.account("broadcast", direction, x, lambda: axis._carrier().broadcast(x, source))


def all_reduce(x: Tensor, axis: Axis, direction: str, op: str = "sum") -> Tensor:
    """Sum (or `op="max"`) of every rank's x, on every rank. Same shape, a new tensor."""
    return x if axis.size == 1 else _all_reduce(x, axis, direction, op)


def all_gather(x: Tensor, axis: Axis, direction: str) -> Tensor:
    """Every rank's x [...], stacked in rank order: [size, ...]. All ranks bring the same shape."""
    return x.unsqueeze(0) if axis.size == 1 else _all_gather(x, axis, direction)


def broadcast(x: Tensor, axis: Axis, direction: str, source: int = 0) -> Tensor:
    """The x of rank `source` of this axis, on every rank. All ranks bring the same shape and dtype."""
    return x if axis.size == 1 else _broadcast(x, axis, direction, source)


def all_reduce_later(x: Tensor, axis: Axis, direction: str) -> Callable[[], Tensor]:
    """Start summing every rank's x; the function returned, called once, gives the sum. x is given away: it may be written.

    Meanwhile the caller computes something else. The seconds accounted are those spent waiting in that function: what the
    computation hid is not in them. A transport without an asynchronous all-reduce does it at once.
    """
    return (lambda: x) if axis.size == 1 else _all_reduce_later(x, axis, direction)


def average_later(x: Tensor, axis: Axis, direction: str) -> torch.futures.Future[Tensor]:
    """Start averaging x over the axis, in place; the future gives x. For gradient buckets, which are made to be written.

    The seconds accounted are from the start to the end of the message, whatever was computed meanwhile.
    """
    transport = axis._carrier()
    if not isinstance(transport, GroupTransport):
        raise ValueError(f"{transport.name} has no asynchronous all-reduce")
    _, tally = axis.line("all_reduce", direction)
    start = _clock(x)
    work = dist.all_reduce(x.div_(axis.size), group=transport.group, async_op=True)

    def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        axis.ledger.record(tally, x.numel() * x.element_size(), _elapsed(start, x))
        return future.value()[0]

    return work.get_future().then(done)

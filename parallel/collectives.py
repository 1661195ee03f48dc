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
import torch.nn.functional as F
from torch import Tensor

from parallel.graphs import outside_graphs
from parallel.ledger import Entry, Ledger, Repeat, Tally, Track, call_text
from plan.partition import Span, spans

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective did not come back: a rank is gone, late, or brought something else."""


class Transport(Protocol):
    """What carries a message between the ranks of one group. Results are new tensors, equal bit for bit on all ranks.

    A sequence of T tokens, dimension 1 of [B, T, C], is split as `spans` splits it: reduce_scatter takes all of it and
    gives this rank's tokens of the sum, with the bits of an all-reduce; gather_tokens takes this rank's and gives all T.
    One that can sum while its caller computes has `all_reduce_later` as well, see GroupTransport's.
    """

    @property
    def name(self) -> str: ...
    def all_reduce(self, x: Tensor, op: str) -> Tensor: ...
    def all_gather(self, x: Tensor) -> Tensor: ...
    def broadcast(self, x: Tensor, source: int) -> Tensor: ...
    def reduce_scatter(self, x: Tensor) -> Tensor: ...
    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor: ...


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

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Over gloo an all-reduce, of which a rank keeps its part: torch's own does the same where it has one, for equal parts
        only. nccl sends each rank its part alone (equal parts, so short ones are padded) and adds in an order of its own: the
        bits may not be those of its all-reduce."""
        runs = self._spans(x.shape[1])
        lo, hi = runs[dist.get_rank(self.group)]
        if self.name == "gloo":
            return self._staged(x, lambda message: _own(self.all_reduce(message, "sum"), lo, hi))
        parts = torch.cat([_padded(x[:, first:last], runs) for first, last in runs])
        out = torch.empty_like(parts[: len(x)])
        dist.reduce_scatter_tensor(out, parts, group=self.group)
        return _own(out, 0, hi - lo)

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        runs = self._spans(tokens)
        parts = self.all_gather(_padded(x, runs))
        return torch.cat([part[:, : hi - lo] for part, (lo, hi) in zip(parts, runs, strict=True)], dim=1)

    def _spans(self, tokens: int) -> list[Span]:
        return spans(tokens, dist.get_world_size(self.group))


def _own(x: Tensor, lo: int, hi: int) -> Tensor:
    """Tokens [lo, hi) of x [B, T, C], without the rest of its memory."""
    return x[:, lo:hi].clone(memory_format=torch.contiguous_format)


def _padded(x: Tensor, runs: list[Span]) -> Tensor:
    """x [B, t, C] with zeros after its last token, as long as the longest of the runs (the first)."""
    return F.pad(x, (0, 0, 0, runs[0][1] - x.shape[1]))


@dataclass(frozen=True)
class Axis:
    """One dimension of the dp x tp mesh as one rank sees it, with the account of what is said along it.

    rank, size: this rank's place on the axis, and how many there are. transport: None on an axis of size 1.
    layer, block: what a call along this axis is accounted to; `at` gives the same axis under another label.
    track: how far this rank has come along it, under whatever label.
    """

    name: str  # tp | dp
    rank: int = 0
    size: int = 1
    transport: Transport | None = None
    ledger: Ledger = field(default_factory=Ledger)
    layer: int | None = None
    block: str = ""
    track: Track = field(default_factory=Track)
    # what is looked up once; a copy under another label, or over another transport, begins anew
    _lines: dict[tuple[str, str], tuple[Entry, Tally]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _labels: dict[tuple[str, int | None], "Axis"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, block: str, layer: int | None = None) -> "Axis":
        """The same axis under another label; made once."""
        found = self._labels.get((block, layer))
        if found is None:
            found = self._labels[block, layer] = replace(self, layer=layer, block=block)
        return found

    def account(self, op: str, direction: str, message: Tensor, call: Callable[[], T], nbytes: int | None = None) -> T:
        """Make one call that moves `message` and tell the ledger of it; an error in it says which call it was. nbytes: what is
        told, the message's own unless given.

        A decode step makes two of these a layer, each a few microseconds long: what is done here is kept short.
        """
        if not self.ledger.on:
            return call()
        entry, tally = self.line(op, direction)
        ledger, track = self.ledger, self.track
        size = message.nbytes if nbytes is None else nbytes
        ledger.latest = track
        track.number += 1
        track.call = entry, size, ledger.doing
        track.waiting = True
        start = _clock(message)
        try:
            result = call()
        except RuntimeError as error:
            raise named(error, track) from error
        seconds = _elapsed(start, message)
        track.waiting = False
        if ledger.aside is not None:
            ledger.aside.calls.append(Repeat(tally, track, track.call, call))
            return result
        ledger.record(tally, size, seconds)
        if track.queued is not None and isinstance(seconds, _Span):
            track.queued.append((track.number, track.call, seconds.has_ended))
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


def named(error: RuntimeError, track: Track) -> CollectiveError:
    """An error in the track's last call, which says which call that was."""
    call = call_text(track.number, track.call) if track.call else "a collective"
    return CollectiveError(f"{call}: {str(error).strip().splitlines()[0]}")


def _clock(message: Tensor) -> Any:
    if not message.is_cuda:
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None  # nothing runs now, and when it does an event of the graph's own tells no time
    event = torch.cuda.Event(enable_timing=True)
    # gloo ends a call in a thread of its own, whose device is another
    event.record(torch.cuda.current_stream(message.device))
    return event


@dataclass(frozen=True)
class _Span:
    """Between two events of a GPU's stream; called, it waits for the second and tells the seconds."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    def __call__(self) -> float:
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000.0

    def has_ended(self) -> bool:
        return self.end.query()  # which any thread may ask


def _elapsed(start: Any, message: Tensor) -> float | _Span:
    """Seconds since `start`; on a GPU a function that knows them once the stream has got there. 0 in a graph's capture."""
    if not message.is_cuda:
        return time.perf_counter() - start
    if start is None:
        return 0.0
    return _Span(start, _clock(message))


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
    track = axis.track
    track.call, track.waiting = (axis.line("all_reduce", direction)[0], x.nbytes, axis.ledger.doing), True  # some do it here
    try:
        finish = start(x)
    except RuntimeError as error:
        raise named(error, track) from error
    track.waiting = False
    return lambda: axis.account("all_reduce", direction, x, finish)


@outside_graphs
def _all_gather(x: Tensor, axis: Axis, direction: str) -> Tensor:
    return axis.account("all_gather", direction, x, lambda: axis._carrier().all_gather(x))


@outside_graphs
def _broadcast(x: Tensor, axis: Axis, direction: str, source: int) -> Tensor:
    return axis.account("broadcast", direction, x, lambda: axis._carrier().broadcast(x, source))


@outside_graphs
def _reduce_scatter(x: Tensor, axis: Axis, direction: str) -> Tensor:
    return axis.account("reduce_scatter", direction, x, lambda: axis._carrier().reduce_scatter(x))


@outside_graphs
def _gather_tokens(x: Tensor, axis: Axis, direction: str, tokens: int) -> Tensor:
    nbytes = len(x) * tokens * x.shape[2] * x.element_size()  # the whole message, as of the reduce-scatter it undoes
    return axis.account("all_gather", direction, x, lambda: axis._carrier().gather_tokens(x, tokens), nbytes)


def all_reduce(x: Tensor, axis: Axis, direction: str, op: str = "sum") -> Tensor:
    """Sum (or `op="max"`) of every rank's x, on every rank. Same shape, a new tensor."""
    return x if axis.size == 1 else _all_reduce(x, axis, direction, op)


def all_gather(x: Tensor, axis: Axis, direction: str) -> Tensor:
    """Every rank's x [...], stacked in rank order: [size, ...]. All ranks bring the same shape."""
    return x.unsqueeze(0) if axis.size == 1 else _all_gather(x, axis, direction)


def broadcast(x: Tensor, axis: Axis, direction: str, source: int = 0) -> Tensor:
    """The x of rank `source` of this axis, on every rank. All ranks bring the same shape and dtype."""
    return x if axis.size == 1 else _broadcast(x, axis, direction, source)


def reduce_scatter(x: Tensor, axis: Axis, direction: str) -> Tensor:
    """This rank's tokens, spans(T, size)[rank], of the sum of every rank's x [B, T, C]: [B, t, C]."""
    return x if axis.size == 1 else _reduce_scatter(x, axis, direction)


def gather_tokens(x: Tensor, axis: Axis, direction: str, tokens: int) -> Tensor:
    """All tokens [B, tokens, C] of a sequence of which every rank brings its own, x [B, t, C] with t as in reduce_scatter."""
    return x if axis.size == 1 else _gather_tokens(x, axis, direction, tokens)


def all_reduce_later(x: Tensor, axis: Axis, direction: str) -> Callable[[], Tensor]:
    """Start summing every rank's x; the function returned, called once, gives the sum. x is given away: it may be written.

    Meanwhile the caller computes something else. The seconds accounted are those spent waiting in that function: what the
    computation hid is not in them. A transport without an asynchronous all-reduce does it at once.
    """
    return (lambda: x) if axis.size == 1 else _all_reduce_later(x, axis, direction)


def average_later(
    x: Tensor, axis: Axis, direction: str, dtype: torch.dtype = torch.float32
) -> torch.futures.Future[Tensor]:
    """Start averaging x over the axis, in place; the future gives x. For gradient buckets, which are made to be written.

    dtype: what x travels and is added in, if it is of fewer bytes than x's own. The seconds accounted are from the start to the
    end of the message, whatever was computed meanwhile.
    """
    entry, tally = axis.line("all_reduce", direction)
    track = axis.track
    track.number += 1
    number, call = track.number, (entry, x.nbytes, axis.ledger.doing)
    track.call = track.begun[number] = call
    start = _clock(x)
    message = x.div_(axis.size)
    if dtype.itemsize < x.dtype.itemsize:
        message = x.to(dtype)
    work = dist.all_reduce(message, group=torch_group(axis), async_op=True)

    def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        seconds = _elapsed(start, x)
        axis.ledger.record(tally, message.nbytes, seconds)
        if track.queued is not None and isinstance(seconds, _Span):
            track.queued.append((number, call, seconds.has_ended))
        track.begun.pop(number, None)
        summed = future.value()[0]
        return summed if message is x else x.copy_(summed)

    return work.get_future().then(done)


def gather_into(out: Tensor, x: Tensor, axis: Axis, direction: str, later: bool = False) -> dist.Work | None:
    """Every rank's x, one after the other in rank order, written to out [size * len(x)]. With `later` something to wait for,
    if there is anything to be waited for. For FSDP2, whose memory it is."""
    group = torch_group(axis)

    def call() -> dist.Work | None:
        if out.is_cuda and dist.get_backend(group) == "gloo":  # ranks share a GPU
            whole = out.cpu()
            dist.all_gather_into_tensor(whole, x.cpu(), group=group)
            out.copy_(whole)
            return None
        return dist.all_gather_into_tensor(out, x, group=group, async_op=later)

    return _travels(axis, axis.account("all_gather", direction, out, call))


def scatter_into(
    out: Tensor, x: Tensor, op: Any, axis: Axis, direction: str, later: bool = False
) -> dist.Work | None:
    """This rank's part of the reduction `op` of every rank's x [size * len(out)], written to out; see gather_into."""
    group = torch_group(axis)

    def call() -> dist.Work | None:
        if out.is_cuda and dist.get_backend(group) == "gloo":
            part = out.cpu()
            dist.reduce_scatter_tensor(part, x.cpu(), op=op, group=group)
            out.copy_(part)
            return None
        return dist.reduce_scatter_tensor(out, x, op=op, group=group, async_op=later)

    return _travels(axis, axis.account("reduce_scatter", direction, x, call))


def _travels(axis: Axis, work: dist.Work | None) -> dist.Work | None:
    """What is to be waited for later is under way until it is there."""
    track = axis.track
    if work is not None and track.queued is not None and track.call is not None:
        track.queued.append((track.number, track.call, work.is_completed))
    return work


def torch_group(axis: Axis) -> dist.ProcessGroup:
    """The group of torch.distributed's that an axis runs over, for what PyTorch itself sends. ValueError where it has none."""
    transport = axis._carrier()
    if not isinstance(transport, GroupTransport):
        raise ValueError(f"{transport.name} is no group of torch.distributed's")
    return transport.group

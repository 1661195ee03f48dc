"""The collectives: all messages between ranks, each over one transport and in the ledger.

A collective takes the axis it runs along as an argument, and never writes into its input. Along an
axis of size 1 it is the identity. In a graph that a compiler traces it is an operator
(operators.py)."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.ledger import Entry, GraphCall, Ledger, Tally, Track
from plan.partition import Span, spans

T = TypeVar("T")


class Transport(Protocol):
    """Carries messages between the ranks of one group. Results are new tensors, equal bit for bit
    on all ranks. `source` is a rank of the group. reduce_scatter returns this rank's tokens of the
    sum of x [B, T, C], as `spans` splits T, with the bits of an all-reduce; gather_tokens takes
    such tokens and returns all. A transport that can sum while its caller computes also has
    `all_reduce_later`, see GroupTransport."""

    @property
    def name(self) -> str: ...
    def all_reduce(self, x: Tensor, op: str) -> Tensor: ...
    def all_gather(self, x: Tensor) -> Tensor: ...
    def broadcast(self, x: Tensor, source: int) -> Tensor: ...
    def reduce_scatter(self, x: Tensor) -> Tensor: ...
    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor: ...


@dataclass(frozen=True)
class GroupTransport:
    """torch.distributed over nccl or gloo. gloo moves host memory: where ranks share a GPU, which
    nccl refuses, messages go through the host. why: the reason that SymmetricTransport is not in
    use, for debugging."""

    group: dist.ProcessGroup
    name: str  # nccl | gloo
    why: str = ""

    def _host(self, x: Tensor) -> Tensor:
        return x.cpu() if self.name == "gloo" else x

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        out = self._host(x).clone(memory_format=torch.contiguous_format)
        kind = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        dist.all_reduce(out, op=kind, group=self.group)
        return out.to(x.device)

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Start summing x in place; the returned function waits for the sum and returns it."""
        if self._host(x) is not x:
            return partial(self.all_reduce, x, "sum")
        work = dist.all_reduce(x, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return x

        return wait

    def all_gather(self, x: Tensor) -> Tensor:
        message = self._host(x.contiguous())
        out = message.new_empty((self.group.size(), *message.shape))
        dist.all_gather_into_tensor(out.view(-1), message.view(-1), group=self.group)
        return out.to(x.device)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        out = self._host(x).clone(memory_format=torch.contiguous_format)
        dist.broadcast(out, group_src=source, group=self.group)
        return out.to(x.device)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """gloo: an all-reduce, of which a rank keeps its part. nccl: parts are padded to equal size
        and added in nccl's own order, so the bits may differ from its all-reduce."""
        runs = spans(x.shape[1], self.group.size())
        lo, hi = runs[self.group.rank()]
        if self.name == "gloo":
            return _part(self.all_reduce(x, "sum"), lo, hi)
        parts = torch.cat([_padded(x[:, first:last], runs) for first, last in runs])
        out = torch.empty_like(parts[: len(x)])
        dist.reduce_scatter_tensor(out, parts, group=self.group)
        return _part(out, 0, hi - lo)

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        runs = spans(tokens, self.group.size())
        parts = zip(self.all_gather(_padded(x, runs)), runs, strict=True)
        return torch.cat([part[:, : hi - lo] for part, (lo, hi) in parts], dim=1)


def _part(x: Tensor, lo: int, hi: int) -> Tensor:
    """A copy of tokens [lo, hi) of x [B, T, C]: a view would keep all of x alive."""
    return x[:, lo:hi].clone(memory_format=torch.contiguous_format)


def _padded(x: Tensor, runs: list[Span]) -> Tensor:
    """x [B, t, C] with zeros after its last token, up to the length of the first, longest run."""
    return F.pad(x, (0, 0, 0, runs[0][1] - x.shape[1]))


# a field that `replace` makes anew
_own: Any = partial(field, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class Axis:
    """One dimension of the dp x pp x tp mesh as one rank sees it. transport: None if size is 1.
    layer, block: the label under which calls are accounted. track: this rank's calls under any."""

    name: str  # tp | pp | dp | ends
    rank: int = 0
    size: int = 1
    transport: Transport | None = None
    ledger: Ledger = field(default_factory=Ledger)
    layer: int | None = None
    block: str = ""
    track: Track = field(default_factory=Track)
    # for operators.py: the number of this axis in AXES, and the all-reduces under way
    tag: Tensor = _own()
    waits: deque[Callable[[], Tensor]] = _own(default_factory=deque)
    _lines: dict[tuple[str, str, bool], tuple[Entry, Tally]] = _own(default_factory=dict)
    _labels: dict[tuple[str, int | None], "Axis"] = _own(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tag", torch.tensor(id(self), device="cpu"))
        AXES[id(self)] = self

    def at(self, block: str, layer: int | None = None) -> "Axis":
        """The same axis under another label; made once."""
        if (found := self._labels.get((block, layer))) is None:
            found = self._labels[block, layer] = replace(self, layer=layer, block=block)
        return found

    def account(self, op: str, direction: str, message: Tensor, call: Callable[[], T],
                nbytes: int = -1, begun: Any = None, again: Any = None) -> T:
        """Make one call that moves `message`, and account it. nbytes: message's own unless given.
        begun: `clock` when the message started, if that was earlier; `call` then waits for it, and
        `again` sends one like it.
        Raises CollectiveError, which names the call, for a RuntimeError in it.

        A decode step makes two calls a layer, of some microseconds: this must stay short, and does
        by hand what `with ledger.calling(...)` does."""
        ledger = self.ledger
        entry, tally = self.line(op, direction)
        size = message.nbytes if nbytes < 0 else nbytes
        track = ledger.calling(self.track, entry, size)
        start = clock(message) if ledger.on else None
        try:
            result = call()
        except RuntimeError as error:
            raise track.named(error) from error
        track.waiting = False
        if not ledger.on:
            return result
        seconds = elapsed(start, message)
        if ledger.recorded is not None and track.call is not None:
            ledger.recorded.calls.append(GraphCall(tally, track, track.call, again or call))
            return result
        ledger.record(tally, size, seconds, elapsed(begun, message) if begun else 0.0)
        if track.queued is not None and isinstance(seconds, _GpuTime):
            track.leave_open(track.number, track.call, seconds.end.query)
        return result

    def line(self, op: str, direction: str) -> tuple[Entry, Tally]:
        """The line of the account for such a call; made once."""
        key = op, direction, self.ledger.is_recomputing
        if (found := self._lines.get(key)) is None:
            own = "backward" if key[2] and direction == "forward" else direction
            entry = Entry(self.layer, self.block, own, op)
            found = self._lines[key] = entry, self.ledger.tallies.setdefault(entry, Tally())
        return found


AXES: WeakValueDictionary[int, Axis] = WeakValueDictionary()  # by `tag`


def clock(message: Tensor) -> Any:
    if not message.is_cuda:
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None  # nothing runs now, and an event inside a graph tells no time
    event = torch.cuda.Event(enable_timing=True)
    # gloo ends a call in a thread of its own, whose current device is another
    event.record(torch.cuda.current_stream(message.device))
    return event


@dataclass(frozen=True)
class _GpuTime:
    """The time between two events of a GPU's stream. Calling it waits for the second. Any thread
    may ask `end.query`."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    def __call__(self) -> float:
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000.0


def elapsed(start: Any, message: Tensor) -> float | _GpuTime:
    """Seconds since `start`, 0 in the capture of a graph; on a GPU a function that returns them."""
    if not message.is_cuda:
        return time.perf_counter() - start
    return 0.0 if start is None else _GpuTime(start, clock(message))


def _send(method: str, axis: Axis, direction: str, x: Tensor, *more: Any) -> Tensor:
    transport = axis.transport
    if transport is None:
        raise ValueError(f"axis {axis.name} has size {axis.size} and no transport")
    call = partial(getattr(transport, method), x, *more)
    if method != "gather_tokens":
        return axis.account(method, direction, x, call)
    # accounted as the whole message, like the reduce-scatter it undoes
    nbytes = len(x) * more[0] * x.shape[2] * x.element_size()
    return axis.account("all_gather", direction, x, call, nbytes)


def all_reduce(x: Tensor, axis: Axis, direction: str, op: str = "sum") -> Tensor:
    """The sum (or `op="max"`) of every rank's x, on every rank."""
    if axis.size == 1:
        return x
    if torch.compiler.is_compiling():
        return torch.ops.nanotp.all_reduce(x, axis.tag, direction, op)
    return _send("all_reduce", axis, direction, x, op)


def all_gather(x: Tensor, axis: Axis, direction: str) -> Tensor:
    """Every rank's x [...] of one shape, stacked in rank order: [size, ...]."""
    return x.unsqueeze(0) if axis.size == 1 else _send("all_gather", axis, direction, x)


def broadcast(x: Tensor, axis: Axis, direction: str, source: int = 0) -> Tensor:
    """The x of rank `source` of this axis, on every rank. All x have one shape and dtype."""
    return x if axis.size == 1 else _send("broadcast", axis, direction, x, source)


def reduce_scatter(x: Tensor, axis: Axis, direction: str) -> Tensor:
    """This rank's tokens [B, t, C], spans(T, size)[rank], of the sum of the ranks' x [B, T, C]."""
    if axis.size == 1:
        return x
    if torch.compiler.is_compiling():
        lo, hi = spans(x.shape[1], axis.size)[axis.rank]
        return torch.ops.nanotp.reduce_scatter(x, axis.tag, direction, hi - lo)
    return _send("reduce_scatter", axis, direction, x)


def gather_tokens(x: Tensor, axis: Axis, direction: str, tokens: int,
                  after: Tensor | None = None) -> Tensor:
    """All tokens [B, tokens, C] of a sequence that is split as in reduce_scatter; x [B, t, C].
    after: the result of a call that comes first, though x does not depend on it: a compiler could
    change their order on one rank."""
    if axis.size == 1:
        return x
    if torch.compiler.is_compiling():
        return torch.ops.nanotp.gather_tokens(x, axis.tag, direction, tokens, after)
    return _send("gather_tokens", axis, direction, x, tokens)


def all_reduce_later(x: Tensor, axis: Axis, direction: str) -> Callable[[], Tensor]:
    """Start summing every rank's x, which may be overwritten; call the returned function once, for
    the sum, and compute something else in between. The seconds accounted are those spent waiting
    in that function. A transport without an asynchronous all-reduce sums at once."""
    if axis.size == 1:
        return lambda: x
    if not torch.compiler.is_compiling():
        return _start_all_reduce(x, axis, direction)
    total = torch.ops.nanotp.start(x, axis.tag, direction)

    def wait() -> Tensor:
        torch.ops.nanotp.wait(total, axis.tag)
        return total

    return wait


def _start_all_reduce(x: Tensor, axis: Axis, direction: str) -> Callable[[], Tensor]:
    start: Any = getattr(axis.transport, "all_reduce_later", None)
    if start is None:
        out = all_reduce(x, axis, direction)
        return lambda: out
    # the call is counted, and has a number, when it is waited for
    track, entry = axis.track, axis.line("all_reduce", direction)[0]
    track.call, track.waiting = (entry, x.nbytes, axis.ledger.doing), True
    begun = clock(x) if axis.ledger.on else None
    with track:
        finish = start(x)
    return lambda: axis.account("all_reduce", direction, x, finish, begun=begun,
                                again=lambda: start(torch.empty_like(x))())


# --- messages of PyTorch's own data parallelism ---------------------------------------------------


def torch_group(axis: Axis) -> dist.ProcessGroup:
    """The process group of an axis over nccl or gloo, for messages that PyTorch itself sends."""
    transport: Any = axis.transport
    return transport.group


def average_later(x: Tensor, axis: Axis, direction: str,
                  dtype: torch.dtype = torch.float32) -> torch.futures.Future[Tensor]:
    """Start averaging a gradient bucket over the axis, in place; the future's value is x. The
    seconds accounted are those from the message's start to its end. dtype: in which x travels and
    is added, if smaller than its own."""
    entry, tally = axis.line("all_reduce", direction)
    with axis.ledger.calling(axis.track, entry, x.nbytes) as track:
        number, call = track.number, (entry, x.nbytes, axis.ledger.doing)
        track.begun[number] = call
        start = clock(x)
        message = x.div_(axis.size)
        if dtype.itemsize < x.dtype.itemsize:
            message = x.to(dtype)
        work = dist.all_reduce(message, group=torch_group(axis), async_op=True)

    def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        seconds = elapsed(start, x)
        axis.ledger.record(tally, message.nbytes, seconds)
        if isinstance(seconds, _GpuTime):
            track.leave_open(number, call, seconds.end.query)
        track.begun.pop(number, None)
        summed = future.value()[0]
        return summed if message is x else x.copy_(summed)

    return work.get_future().then(done)


def gather_into(out: Tensor, x: Tensor, axis: Axis, later: bool = False) -> dist.Work | None:
    """Write every rank's x to out [size * len(x)], in rank order. later: return the Work to wait
    on, or None if the message has already arrived."""
    call = partial(_fill, dist.all_gather_into_tensor, out, x, axis, async_op=later)
    work = axis.account("all_gather", "forward", out, call)
    if work is not None:
        axis.track.leave_open(axis.track.number, axis.track.call, work.is_completed)
    return work


def scatter_into(out: Tensor, x: Tensor, axis: Axis, op: Any) -> None:
    """Write this rank's part of the reduction `op` of every rank's x [size * len(out)] to out."""
    call = partial(_fill, dist.reduce_scatter_tensor, out, x, axis, op=op)
    axis.account("reduce_scatter", "backward", x, call)


def _fill(send: Any, out: Tensor, x: Tensor, axis: Axis, **how: Any) -> dist.Work | None:
    group = torch_group(axis)
    if not (out.is_cuda and dist.get_backend(group) == "gloo"):
        return send(out, x, group=group, **how)
    received = out.cpu()
    send(received, x.cpu(), group=group, **how | {"async_op": False})
    out.copy_(received)
    return None

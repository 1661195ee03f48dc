"""One rank's record of its collectives: the account (calls, bytes and seconds by layer, block and
pass), and a track of each axis for the watchdog and for error messages. No torch.distributed."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from base.errors import first_line


class CollectiveError(RuntimeError):
    """A collective failed: a rank is gone or late, or sent another message."""


@dataclass(frozen=True)
class Entry:
    """The key of one line of the account. layer: None outside the layers."""

    layer: int | None
    # attention | mlp | embedding | head | loss | sampling | optimizer | data_parallel | pipeline
    block: str
    direction: str  # forward | backward | step
    op: str  # all_reduce | all_gather | reduce_scatter | broadcast | send | recv


@dataclass(slots=True)
class Tally:
    """bytes: of the messages that this rank handed in, not of the wire. seconds: in the calls.
    in_flight: from the start of sums that were waited for later to the end of the wait."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    in_flight: float = 0.0

    def add(self, other: "Tally", sign: int = 1) -> None:
        self.calls += sign * other.calls
        self.bytes += sign * other.bytes
        self.seconds += sign * other.seconds
        self.in_flight += sign * other.in_flight

    def as_json(self) -> dict[str, float]:
        found = {"calls": self.calls, "bytes": self.bytes, "seconds": round(self.seconds, 9)}
        return found | ({"in_flight": round(self.in_flight, 9)} if self.in_flight else {})


Account = dict[Entry, Tally]
Clocked = float | Callable[[], float]


def total(account: Account, **match: Any) -> Tally:
    """The sum of the lines with these fields: total(account, block="mlp", direction="forward")."""
    found = Tally()
    for entry, tally in account.items():
        if all(getattr(entry, name) == value for name, value in match.items()):
            found.add(tally)
    return found


def as_json(account: Account, n_layer: int) -> dict[str, Any]:
    """The account as in a report: layers -> block -> pass -> op -> tally, the rest in `other`."""
    layers: list[Any] = [{"layer": i, "attention": {}, "mlp": {}} for i in range(n_layer)]
    other: dict[str, Any] = {}
    for entry, tally in account.items():
        blocks = other if entry.layer is None else layers[entry.layer]
        passes = blocks.setdefault(entry.block, {})
        passes.setdefault(entry.direction, {})[entry.op] = tally.as_json()
    return {"layers": layers, "other": other, "total": total(account).as_json()}


# --- tracks ---------------------------------------------------------------------------------------

# the line it is accounted to, its bytes, and what the run was doing: "step 77, evaluation"
Call = tuple[Entry, int, str]


def call_text(number: int, call: Call, with_bytes: bool = False) -> str:
    """`all_reduce #1843 (step 77, layer 5, mlp, forward, 3.1 MB)`"""
    entry, nbytes, doing = call
    size = f"{nbytes} B" if nbytes < 1e3 else f"{nbytes / 1e3:.1f} kB"
    size = size if nbytes < 1e5 else f"{nbytes / 1e6:.1f} MB"
    layer = "" if entry.layer is None else f"layer {entry.layer}"
    details = doing, layer, entry.block, entry.direction, size if with_bytes and nbytes else ""
    return f"{entry.op} #{number} ({', '.join(filter(None, details))})"


@dataclass(eq=False, slots=True)
class Track:
    """How far this rank has come along one axis. world/watch.py reads it in another thread.

    ranks: of the world, which the axis joins. number: of the last call, counted from 1; the same on
    all ranks if all is well. waiting: that call has not returned. begun: asynchronous calls under
    way, by number. queued: GPU calls that returned before the GPU finished them, oldest first, as
    (number, call, has_ended); None if there is no watchdog.
    """

    name: str = ""
    ranks: tuple[int, ...] = ()
    number: int = 0
    call: Call | None = None
    waiting: bool = False
    begun: dict[int, Call] = field(default_factory=dict)
    queued: deque[tuple[int, Call, Callable[[], bool]]] | None = None

    def __enter__(self) -> "Track":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """The last call has returned, or has failed: the error then names the call."""
        if error is None:
            self.waiting = False
        elif isinstance(error, RuntimeError):
            raise self.named(error) from error

    def named(self, error: RuntimeError) -> CollectiveError:
        call = call_text(self.number, self.call) if self.call else "a collective"
        return CollectiveError(f"{call}: {first_line(error)}")

    def leave_open(self, number: int, call: Call | None, has_ended: Callable[[], bool]) -> None:
        """Show a call that has returned to the watchdog until has_ended()."""
        if self.queued is not None and call is not None:
            self.queued.append((number, call, has_ended))

    def open(self) -> Iterator[tuple[int, Call]]:
        """The calls that have not ended, each with its number."""
        if self.waiting and self.call is not None:
            yield self.number, self.call
        yield from list(self.begun.items())
        while self.queued and self.queued[0][2]():
            self.queued.popleft()
        if self.queued:
            yield self.queued[0][:2]


# --- calls inside a CUDA graph --------------------------------------------------------------------


@dataclass
class GraphCall:
    """A call in a CUDA graph. again: makes it once more. seconds: 0 until measured."""

    tally: Tally
    track: Track
    call: Call
    again: Callable[[], object]
    seconds: float = 0.0


@dataclass
class Recording:
    """The collectives and forward passes of one run of a captured function."""

    forward_passes: int = 0
    calls: list[GraphCall] = field(default_factory=list)


@dataclass
class Ledger:
    """One rank's account and tracks. Collectives alone write to it. on: False stops the account, to
    measure what it costs; tracks go on. doing: what the run does, for messages about a call.
    latest: the track of the last call. replayed: the part of all lines that CUDA graphs have
    replayed. recorded: where calls go within `recording`."""

    tallies: Account = field(default_factory=dict)
    forward_passes: int = 0
    on: bool = True
    doing: str = ""
    tracks: list[Track] = field(default_factory=list)
    latest: Track | None = None
    replayed: Tally = field(default_factory=Tally)
    recorded: Recording | None = None
    is_recomputing: bool = False
    _pending: list[tuple[Tally, str, Callable[[], float]]] = field(default_factory=list)

    def track(self, name: str, ranks: tuple[int, ...]) -> Track:
        """The track of an axis that joins these ranks of the world."""
        found = next((t for t in self.tracks if (t.name, t.ranks) == (name, ranks)), None)
        if found is None:
            self.tracks.append(found := Track(name, ranks))
        return found

    def calling(self, track: Track, entry: Entry, nbytes: int) -> Track:
        """`with ledger.calling(...):` around a call, for the watchdog and for naming its error."""
        self.latest = track
        track.number += 1
        track.call = entry, nbytes, self.doing
        track.waiting = True
        return track

    def record(self, tally: Tally, nbytes: int, seconds: Clocked, in_flight: Clocked = 0.0,
               calls: int = 1) -> None:
        """Account one call. A GPU's seconds are a function, asked when the GPU is idle."""
        tally.calls += calls
        tally.bytes += nbytes
        for name, clocked in (("seconds", seconds), ("in_flight", in_flight)):
            if callable(clocked):
                self._pending.append((tally, name, clocked))
            else:
                setattr(tally, name, getattr(tally, name) + clocked)

    @contextmanager
    def _set(self, **values: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    def during(self, what: str) -> AbstractContextManager[None]:
        """Within, the run is doing `what`."""
        return self._set(doing=f"{self.doing}, {what}".removeprefix(", "))

    def recomputing(self) -> AbstractContextManager[None]:
        """Within, forward calls are accounted to the backward pass, to which they belong."""
        return self._set(is_recomputing=True)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Within, calls and forward passes are collected, not accounted, whether `on` or not."""
        found = Recording()
        with self._set(recorded=found, on=True, forward_passes=0):
            yield found
            found.forward_passes = self.forward_passes

    def replay(self, recording: Recording, has_ended: Callable[[], bool]) -> None:
        """Account a replay of the CUDA graph that was captured in `recording`. Until has_ended(),
        when the GPU has finished it, the watchdog sees the first call of each axis as open."""
        self.forward_passes += recording.forward_passes
        begun: set[int] = set()
        for made in recording.calls:
            track = self.latest = made.track
            track.number += 1
            if id(track) not in begun:
                begun.add(id(track))
                track.call = *made.call[:2], f"{self.doing}, CUDA graph".removeprefix(", ")
                track.leave_open(track.number, track.call, has_ended)
            if self.on:
                for line in (made.tally, self.replayed):
                    self.record(line, made.call[1], made.seconds)

    def settle(self) -> None:
        """Read the clocks that were left for later. On a GPU call it after a synchronize."""
        for tally, name, seconds in self._pending:
            setattr(tally, name, getattr(tally, name) + seconds())
        self._pending.clear()

    def snapshot(self) -> Account:
        self.settle()
        return {entry: replace(tally) for entry, tally in self.tallies.items()}

    def since(self, before: Account) -> Account:
        """What was added to the account after `before = snapshot()`."""
        now = self.snapshot()
        for entry, tally in before.items():
            now[entry].add(tally, sign=-1)
        return {entry: tally for entry, tally in now.items() if tally.calls}

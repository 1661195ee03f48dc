"""The account: how often, how much and how long ranks talked, by layer, block and pass. No torch.distributed."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BLOCKS = ("attention", "mlp", "embedding", "head", "loss", "sampling", "optimizer", "data_parallel")


@dataclass(frozen=True)
class Entry:
    """What one line of the account is about; `layer` is None outside the layers."""

    layer: int | None
    block: str
    direction: str  # forward | backward | step
    op: str  # all_reduce | all_gather | broadcast | ...

    def where(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}"
        return ", ".join(filter(None, (layer, self.block, self.direction)))


@dataclass
class Tally:
    """calls; bytes of the messages handed to the collective (one rank's, not the wire's); seconds spent in it."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, other: "Tally", sign: int = 1) -> None:
        self.calls += sign * other.calls
        self.bytes += sign * other.bytes
        self.seconds += sign * other.seconds

    def as_json(self) -> dict[str, float]:
        return {"calls": self.calls, "bytes": self.bytes, "seconds": round(self.seconds, 9)}


Account = dict[Entry, Tally]


Call = tuple[Entry, int, str]  # what it is accounted to, the message's bytes, and where the run was: "step 77, evaluation"


@dataclass(eq=False)
class Track:
    """How far this rank has come along one axis. Collectives write it; world/watch.py reads it, from a thread of its own.

    ranks: those of the world that the axis joins. number: of the last call, counted from 1 and the same on all of them where
    all is well. waiting: that call has not come back. begun: messages that travel while this rank computes, by number. queued:
    calls that came back before they were done, in order, each with its number and what tells whether it has ended; None where
    nobody looks.
    """

    name: str = ""
    ranks: tuple[int, ...] = ()
    number: int = 0
    call: Call | None = None
    waiting: bool = False
    begun: dict[int, Call] = field(default_factory=dict)
    queued: deque[tuple[int, Call, Callable[[], bool]]] | None = None

    def open(self) -> Iterator[tuple[int, Call]]:
        """The calls that have not come back, each with its number."""
        if self.waiting and self.call is not None:
            yield self.number, self.call
        yield from list(self.begun.items())
        while self.queued and self.queued[0][2]():
            self.queued.popleft()
        if self.queued:
            yield self.queued[0][:2]


def call_text(number: int, call: Call, with_bytes: bool = False) -> str:
    """`all_reduce #1843 (step 77, layer 5, mlp, forward, 3.1 MB)`"""
    entry, nbytes, doing = call
    size = f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB" if nbytes >= 1e3 else f"{nbytes} B"
    return f"{entry.op} #{number} ({', '.join(filter(None, (doing, entry.where(), size if with_bytes and nbytes else '')))})"


@dataclass
class Repeat:
    """A call that was told aside. track, call: what the watchdog is told of it; again: makes the same
    call on the same message; seconds: what it takes, 0 until somebody has measured it."""

    tally: Tally
    track: Track
    call: Call
    again: Callable[[], object]
    seconds: float = 0.0


@dataclass
class Told:
    """What a ledger was told aside: forward passes, and every call."""

    forward_passes: int = 0
    calls: list[Repeat] = field(default_factory=list)


@dataclass
class Ledger:
    """One rank's account. Every collective tells it; nothing else writes to it."""

    tallies: Account = field(default_factory=dict)
    forward_passes: int = 0
    on: bool = True  # False: nothing is recorded, to see what recording costs
    doing: str = ""  # where the run is, for messages about a call: "step 77", "step 77, evaluation"
    tracks: list[Track] = field(default_factory=list)
    latest: Track | None = None  # along which the last call was made
    repeated: Tally = field(default_factory=Tally)  # of all lines, what CUDA graphs have replayed
    aside: Told | None = None  # where calls go within `telling_aside`
    _recomputing: bool = False
    _pending: list[tuple[Tally, Callable[[], float]]] = field(default_factory=list)

    def tally(self, entry: Entry) -> Tally:
        """The line of the account for these calls, begun if need be."""
        found = self.tallies.get(entry)
        if found is None:
            found = self.tallies[entry] = Tally()
        return found

    def record(self, tally: Tally, nbytes: int, seconds: float | Callable[[], float]) -> None:
        """One finished call. `seconds` may be a function that is asked later (a GPU's clock is read when it is idle)."""
        tally.calls += 1
        tally.bytes += nbytes
        if callable(seconds):
            self._pending.append((tally, seconds))
        else:
            tally.seconds += seconds

    def track(self, name: str, ranks: tuple[int, ...]) -> Track:
        """The track of an axis that joins these ranks of the world."""
        found = next((track for track in self.tracks if (track.name, track.ranks) == (name, ranks)), None)
        if found is None:
            found = Track(name, ranks)
            self.tracks.append(found)
        return found

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Within, the run is at `what`."""
        before = self.doing
        self.doing = f"{before}, {what}" if before else what
        try:
            yield
        finally:
            self.doing = before

    def direction(self, direction: str) -> str:
        """Forward work repeated by activation checkpointing happens in, and is accounted to, the backward pass."""
        return "backward" if self._recomputing and direction == "forward" else direction

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        before, self._recomputing = self._recomputing, True
        try:
            yield
        finally:
            self._recomputing = before

    @contextmanager
    def telling_aside(self) -> Iterator[Told]:
        """Within, calls and forward passes are not counted but noted in what this gives, on or not: see
        `repeat`."""
        before, passes, on, told = self.aside, self.forward_passes, self.on, Told()
        self.aside, self.on = told, True
        try:
            yield told
        finally:
            told.forward_passes = self.forward_passes - passes
            self.aside, self.forward_passes, self.on = before, passes, on

    def repeat(self, told: Told, has_ended: Callable[[], bool]) -> None:
        """Count what was told aside: a CUDA graph makes it again. has_ended: whether the GPU has; until
        then the calls are under way, the first of each axis in the watchdog's eyes."""
        self.forward_passes += told.forward_passes
        begun: set[int] = set()
        for made in told.calls:
            track = self.latest = made.track
            track.number += 1
            if id(track) not in begun:
                begun.add(id(track))
                track.call = made.call[:2] + (f"{self.doing}, CUDA graph".removeprefix(", "),)
                if track.queued is not None:
                    track.queued.append((track.number, track.call, has_ended))
            if self.on:
                for line in (made.tally, self.repeated):
                    self.record(line, made.call[1], made.seconds)

    def settle(self) -> None:
        """Read the clocks that were left for later. On a GPU call it after a synchronize."""
        for tally, seconds in self._pending:
            tally.seconds += seconds()
        self._pending.clear()

    def snapshot(self) -> Account:
        self.settle()
        return {entry: Tally(t.calls, t.bytes, t.seconds) for entry, t in self.tallies.items()}

    def since(self, before: Account) -> Account:
        """What was added to the account after `before = snapshot()`."""
        now = self.snapshot()
        for entry, tally in before.items():
            now[entry].add(tally, sign=-1)
        return {entry: tally for entry, tally in now.items() if tally.calls}


def total(account: Account, **match: Any) -> Tally:
    """Sum of the lines whose fields equal `match`, e.g. total(account, block="mlp", direction="forward")."""
    found = Tally()
    for entry, tally in account.items():
        if all(getattr(entry, name) == value for name, value in match.items()):
            found.add(tally)
    return found


def as_json(account: Account, n_layer: int) -> dict[str, Any]:
    """The account in the report's form: layers -> block -> pass -> op -> tally, and the rest under `other`."""
    layers: list[dict[str, Any]] = [{"layer": i, "attention": {}, "mlp": {}} for i in range(n_layer)]
    other: dict[str, Any] = {}
    for entry, tally in account.items():
        blocks = other if entry.layer is None else layers[entry.layer]
        blocks.setdefault(entry.block, {}).setdefault(entry.direction, {})[entry.op] = tally.as_json()
    return {"layers": layers, "other": other, "total": total(account).as_json()}

"""The process of each rank, how far it has come, and which rank to suspect when a call is late."""

import contextlib
import itertools
import os
import socket
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from parallel.ledger import Ledger, Track, call_text


@dataclass(frozen=True)
class Peer:
    """The process of a rank. space: the host, boot and PID namespace in which `pid` is unique."""

    host: str
    pid: int
    space: str

    @classmethod
    def here(cls) -> "Peer":
        parts = [socket.gethostname()]
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            parts += [boot, os.readlink("/proc/self/ns/pid")]
        return cls(parts[0], os.getpid(), " ".join(parts))


@dataclass(frozen=True)
class Progress:
    """What a rank publishes every second. beat: counts the publications. finished: the rank has
    ended well. latest: the axis of the last call. calls: for each axis, under `key_of` it, (number,
    is open, text) of the oldest open call or else of the last one."""

    beat: int
    finished: bool
    latest: str
    calls: dict[str, tuple[int, bool, str]]
    compiling: bool = False

    @classmethod
    def of(cls, beat: int, finished: bool, ledger: Ledger) -> "Progress":
        calls, latest = {}, key_of(ledger.latest) if ledger.latest else ""
        for track in ledger.tracks:
            if track.call is not None:
                opened = next(track.open(), None)
                number, call = opened or (track.number, track.call)
                calls[key_of(track)] = number, opened is not None, call_text(number, call)
        return cls(beat, finished, latest, calls, is_compiling())

    @property
    def waits(self) -> bool:
        return any(is_open for _, is_open, _ in self.calls.values())

    def at(self, key: str) -> tuple[int, str]:
        """(number, text) of the call along an axis."""
        number, _, text = self.calls.get(key, (0, False, "no call yet"))
        return number, text


def key_of(track: Track) -> str:
    return " ".join([track.name, *map(str, track.ranks)])


def is_compiling() -> bool:
    """Whether any thread is in torch's compiler: autograd's threads compile backward passes."""
    stacks = map(traceback.walk_stack, sys._current_frames().values())
    files = (frame.f_code.co_filename for stack in stacks for frame, _ in stack)
    return any(file.endswith(("convert_frame.py", "compile_fx.py")) for file in files)


def diagnosis(
    key: str, number: int, text: str, ranks: tuple[int, ...], progress: dict[int, Progress],
    ended: set[int], stalled: set[int],
) -> str:  # fmt: skip
    """Where each rank was last seen, and which rank to look at, when a call does not come back.
    key, ranks: of the call's axis. number, text: of the call. stalled: ranks that do not run."""
    places = {rank: progress[rank].at(key) for rank in ranks if rank in progress}
    behind = [rank for rank, (at, _) in places.items() if at < number]
    finished = {rank for rank, seen in progress.items() if seen.finished}
    idle = {rank for rank, seen in progress.items() if not seen.waits} - finished
    suspects = {
        "its process has ended": sorted(ended),
        "it does not run: stopped, or its host is out of reach": sorted(stalled),
        "it has come to its end": [rank for rank in ranks if rank in finished],
        "it is in no collective": sorted(idle, key=lambda rank: (rank not in behind, rank)),
        "it is behind": sorted(behind, key=lambda rank: places[rank][0]),
        "it is in another call": [rank for rank in places if places[rank][1] != text],
    }
    first, why = next(((who[0], why) for why, who in suspects.items() if who), (-1, ""))
    advice = "All have come to it: look at the network between them."
    if why:
        advice = f"Look at rank {first} first: {why}."
    if first in progress:
        places.setdefault(first, progress[first].at(progress[first].latest))
    groups: dict[str, list[int]] = {}
    for rank, (at, theirs) in sorted(places.items()):
        short = theirs.removeprefix(text.partition(" ")[0] + " ")
        groups.setdefault(f"#{at}" if theirs == text else short, []).append(rank)
    seen = ", ".join(f"{ranks_text(who)} {where}" for where, who in groups.items())
    return (f" Last seen: {seen}." if seen else " The store does not answer.") + f" {advice}"


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`"""
    # in a run of neighbours a rank is as far from its place as the first one
    runs = itertools.groupby(enumerate(sorted(ranks)), lambda at: at[1] - at[0])
    ends = [[run[0][1], run[-1][1]] for run in (list(group) for _, group in runs)]
    text = ", ".join(f"{lo}" if lo == hi else f"{lo}-{hi}" for lo, hi in ends)
    return f"rank{'s' if ',' in text or '-' in text else ''} {text}"

"""The watchdog: a run in which a rank has died, stopped or lost its way ends within seconds, and says which one and where.

Each rank has two threads beside the one that computes. One wakes about once a second: it publishes in the store how far the
rank has come along each axis, looks whether a call has been under way for longer than the limit, and whether a rank of this
host has ended. The other waits for the word that some rank has failed. Only a rank that waits complains; it reads what the
others have published twice, with a pause between, and a rank that has published nothing meanwhile does not run: on its own host
it is killed, as a stopped process answers to nothing else, and its launcher would wait for it half a minute.

Nothing here talks through torch.distributed: its transports may be what hangs.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from base.processes import answer, is_running, process_state
from parallel.ledger import Call, Ledger, Track, call_text
from world.roll_call import ranks_text

BEAT_S = 1.0
ANSWER_S = 3.0  # how long the store is waited for when a run ends: the process that holds it may be the one that hangs
GRACE_S = 2.0  # from the word that a rank has failed to the end of the others
BEATS = 2  # between two looks at the others
FAILED = "failed"  # the store's counter of ranks that have found the run to have failed
BY_A_RANK = "failed by a rank"  # set before that: any process that reaches the store can count there
ORPHAN_S = 8.0  # how long a run may go on without a launcher before it saves
# what asks a process to end: SIGHUP where its terminal is closed, the last two what batch systems send ahead of time
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Peer:
    """Where a rank runs. space: of processes; a process id means the same only within one (containers may share a name)."""

    host: str
    pid: int
    space: str

    @classmethod
    def here(cls) -> "Peer":
        parts = [socket.gethostname()]
        with contextlib.suppress(OSError):
            parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
        return cls(parts[0], os.getpid(), " ".join(parts))

    def has_ended(self, seen_from: "Peer") -> bool:
        return self.space == seen_from.space and not is_running(self.pid)


@dataclass(frozen=True)
class Seen:
    """What a rank has published. left: it has come to its end. calls: of each axis, by `key_of`, the number of the last call,
    whether it has not come back, and its text. latest: along which axis the last of all was made. compiles: it is in torch's
    compiler."""

    beat: int
    left: bool
    latest: str
    calls: dict[str, tuple[int, bool, str]]
    compiles: bool = False

    def as_json(self) -> str:
        return json.dumps([self.beat, self.left, self.latest, self.calls, self.compiles])

    @classmethod
    def parse(cls, text: bytes) -> "Seen":
        beat, left, latest, calls, compiles = json.loads(text)
        known = {key: (number, is_open, said) for key, (number, is_open, said) in calls.items()}
        return cls(beat, left, latest, known, compiles)

    @property
    def waits(self) -> bool:
        return any(is_open for _, is_open, _ in self.calls.values())

    def at(self, key: str) -> tuple[int, str]:
        """(number, text) of the last call along an axis."""
        number, _, said = self.calls.get(key, (0, False, "no call yet"))
        return number, said


def is_compiling() -> bool:
    """Whether a thread of this process is in torch's compiler (autograd's threads compile backward passes)."""
    for frame in sys._current_frames().values():
        at: FrameType | None = frame
        while at is not None:
            if at.f_code.co_filename.endswith(("convert_frame.py", "compile_fx.py")):
                return True
            at = at.f_back
    return False


def key_of(track: Track) -> str:
    return " ".join([track.name, *map(str, track.ranks)])


class Watch:
    """The watchdog of one rank.

    store: each thread has a clone of this client, as a call that waits blocks its connection. holds: the store is in this
    process. peers: of all ranks. limit: the seconds a call may take; it may be changed while the watch goes on. prog: what
    messages begin with. gone: tells whether the launcher, which has the store, is; None where there is none.
    """

    def __init__(
        self, store: Any, holds: bool, rank: int, peers: tuple[Peer, ...], ledger: Ledger, limit: float, prog: str,
        gone: Callable[[], bool] | None = None,
    ):  # fmt: skip
        self._gone, self._lost_at = gone or (lambda: False), 0.0
        self._launched = gone is not None
        self._placed = False  # this rank has been asked where no store could tell who is first
        self.holds = holds
        self.store, self.rank, self.peers, self.ledger, self.limit, self.prog = store.clone(), rank, peers, ledger, limit, prog
        self._failed, self._asking = store.clone(), store.clone()
        self._beat = 0
        self._since: dict[tuple[str, int], float] = {}  # the calls that are under way, and when each was first seen to be
        self._heard = threading.Event()  # that some rank has failed
        self._lingers = False  # at this rank's end
        self._mute = False  # the store has not answered, or is gone: who asks it again may wait for ever
        self._left: set[int] = set()  # ranks of this host that have come to their end
        self._stop = threading.Event()
        self._bell, self._rope = os.pipe()  # a signal rings it, whatever the main thread does
        self._before: dict[int, Any] = {}  # how signals were handled; the bell's as number 0
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._watch, self._listen)]

    # --- what the run calls -----------------------------------------------------------------------------------------

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            os.set_blocking(self._rope, False)
            self._before[0] = signal.set_wakeup_fd(self._rope, warn_on_full_buffer=False)
            for number in STOPS:  # a run that saves when it is told to stop has a handler of its own
                if signal.getsignal(number) == signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._terminated)
        self._publish()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """This rank has come to its end; others may not have. Who holds the store stays for them, some seconds."""
        self._stop.set()
        os.write(self._rope, b"\0")
        for thread in self._threads:
            thread.join(ANSWER_S)
        with contextlib.suppress(RuntimeError):
            self._publish(left=True)
            end = time.monotonic() + (ANSWER_S if self.holds else 0)
            while time.monotonic() < end and not all(seen.left for seen in (self._others(self.store) or {}).values()):
                time.sleep(0.01)
        for number, handler in self._before.items():
            if number == 0:
                signal.set_wakeup_fd(handler)
            elif signal.getsignal(number) == self._terminated:
                signal.signal(number, handler)

    def is_first(self) -> bool:
        """Whether this rank is the first to have found the run to have failed; all are told."""
        # where the store is gone its holder went without a word, the launcher or rank 0: the first of each host speaks
        by_place = self.rank == min({rank for rank, peer in enumerate(self.peers) if self._is_here(peer)} - self._ended())
        if self._heard.is_set() or self._mute or self._gone():
            by_place, self._placed = by_place and not self._placed and not self._heard.is_set(), True
            return by_place
        return answer(lambda: first_to_say(self._asking), by_place, ANSWER_S)

    def linger(self, said: bool) -> None:
        """Stay for as long as others need this process, at a run's bad end. said: this rank has said why."""
        self._lingers = True
        if self.holds:
            end = time.monotonic() + BEAT_S + GRACE_S + ANSWER_S  # others have its store to ask
            while time.monotonic() < end and len(self._ended()) < len(self.peers) - 1:
                time.sleep(0.05)
        elif said and (self._mute or self._gone()):
            time.sleep(2 * BEAT_S)  # while this rank is there no other of its host speaks
        else:
            time.sleep(0.3 if said else 1)  # a launcher ends all with the first one: that is who has spoken

    def _terminated(self, number: int, frame: Any) -> None:
        """Python wants a handler, or it rings no bell. The bell does the work: the main thread may be deep in a call."""
        if not self._threads[0].is_alive():
            os._exit(128 + number)

    # --- once a beat ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            beat = min(BEAT_S, self.limit / 4)
            ready, _, _ = select.select([self._bell], [], [], beat)
            rung = os.read(self._bell, 64) if ready else b""
            if self._stop.is_set():
                return
            now = time.monotonic()
            if now - last > 3 * beat + 1:
                self._since.clear()  # this process has been stopped itself: it was not the others who were late
            last = now
            if self._lingers:  # the run has failed, and this rank is about to end with a status of its own
                with contextlib.suppress(RuntimeError):
                    self._publish()
                continue
            self._look_at_launcher(now)
            self._look_at_processes()
            for number in STOPS:
                if number in rung and signal.getsignal(number) == self._terminated:
                    self._end(f"rank {self.rank} was told to stop ({number.name}) {self._where()}", 128 + number)
            self._look_at_calls(now)

    def _publish(self, left: bool = False) -> None:
        if self._mute:
            return
        calls = {}
        for track in self.ledger.tracks:
            if track.call is not None:
                open_calls = list(track.open())
                number, call = open_calls[0] if open_calls else (track.number, track.call)
                calls[key_of(track)] = number, bool(open_calls), call_text(number, call)
        self._beat += 1
        latest = self.ledger.latest
        axis = key_of(latest) if latest else ""
        mine = Seen(self._beat, left, axis, calls, is_compiling())
        self.store.set(f"seen/{self.rank}", mine.as_json())

    def _where(self) -> str:
        """`in all_reduce #1843 (...)`"""
        for track in self.ledger.tracks:
            for number, call in track.open():
                return f"in {call_text(number, call)}"
        latest = self.ledger.latest
        return f"after {call_text(latest.number, latest.call)}" if latest and latest.call else "before its first collective"

    @property
    def orphaned(self) -> bool:
        """Whether the launcher is gone: nobody would end this process, or start it again."""
        return self._lost_at > 0

    def _look_at_launcher(self, now: float) -> None:
        """Publish in its store. Where it is gone the run saves if it can, and ends."""
        gone = self._gone()
        try:
            self._mute = self._mute or gone
            self._publish()
        except RuntimeError:  # the store is gone, and torch would complain at each further question
            self._mute, gone = True, self._launched
        if gone and not self.orphaned:
            self._lost_at = now
        saves = signal.getsignal(signal.SIGTERM) != self._terminated
        saving = saves and (now - self._lost_at < ORPHAN_S or "save" in self.ledger.doing)
        if self.orphaned and not saving:
            self._end(f"the launcher of rank {self.rank} is gone: the run has ended {self._where()}", 128 + signal.SIGTERM)

    def _look_at_processes(self) -> None:
        """A rank of this host whose process has ended without a word ends the run."""
        ended = self._ended() - self._left
        if ended:
            seen = self._others(self.store)
            # where nothing can be read the store was that rank's: it may have left in order, and if not, the next call fails
            self._left |= {rank for rank in ended if seen is None or rank in seen and seen[rank].left}
            if ended - self._left:
                gone = ranks_text(ended - self._left)
                self._end(f"rank {self.rank} lost contact with its peers ({gone} {_is_or_are(gone)} gone) {self._where()}")

    def _look_at_calls(self, now: float) -> None:
        calls = {(key_of(track), number): (track, call) for track in self.ledger.tracks for number, call in track.open()}
        self._since = {at: self._since.get(at, now) for at in calls}
        late = [at for at, since in self._since.items() if now - since > self.limit]
        if late:
            (key, number), (track, call) = late[0], calls[late[0]]
            self._complain(key, number, track, call)

    # --- when a call is late ----------------------------------------------------------------------------------------

    def _complain(self, key: str, number: int, track: Track, call: Call) -> None:
        before = self._others(self.store)
        for _ in range(BEATS):
            self._stop.wait(BEAT_S)
            with contextlib.suppress(RuntimeError):
                self._publish()  # others may be looking at this rank
        if self._stop.is_set() or number not in [still for still, _ in track.open()]:
            return  # it was late, and came
        seen = self._others(self.store) or {}
        ended, silent = self._ended(), self._silent(before or {}, seen)
        if any(rank in seen and seen[rank].compiles for rank in set(track.ranks) - ended - silent):
            return  # it comes when it has compiled, and is asked for again at the next beat
        waited = f"[rank {self.rank} host {self.peers[self.rank].host}] waited {self.limit:g} s in "
        line = waited + call_text(number, call, with_bytes=True) + "."
        self._end(line + verdict(key, number, call_text(number, call), track.ranks, seen, ended, silent), silent=silent)

    def _others(self, store: Any) -> dict[int, Seen] | None:
        """What each rank has published last; None where the store does not answer."""
        if self._mute:
            return None

        def read() -> dict[int, Seen] | None:
            keys = {rank: f"seen/{rank}" for rank in range(len(self.peers))}
            there = [rank for rank, key in keys.items() if store.check([key])]
            return dict(zip(there, map(Seen.parse, store.multi_get([keys[rank] for rank in there])), strict=True))

        found = answer(read, None, ANSWER_S)
        self._mute = found is None
        return found

    def _ended(self) -> set[int]:
        return {rank for rank, peer in enumerate(self.peers) if peer.has_ended(self.peers[self.rank])}

    def _silent(self, before: dict[int, Seen], seen: dict[int, Seen]) -> set[int]:
        """Ranks whose processes do not run: stopped ones of this host, and those that have published nothing between two
        looks."""
        mute = {rank for rank in seen.keys() & before.keys() if seen[rank].beat == before[rank].beat and not seen[rank].left}
        here = {rank: peer for rank, peer in enumerate(self.peers) if self._is_here(peer)}
        stopped = {rank for rank, peer in here.items() if process_state(peer.pid) in ("T", "t")}
        return (mute | stopped) - {self.rank} - self._ended()

    def _is_here(self, peer: Peer) -> bool:
        return peer.space == self.peers[self.rank].space

    # --- the end ----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """End this process some time after another has said that the run has failed, whatever it does."""
        with contextlib.suppress(RuntimeError):  # the store is gone, with its holder: there will be no word
            while not self._stop.wait(min(BEAT_S, self.limit / 4)) and not self._gone():
                if self._failed.check([FAILED]):
                    self._heard.set()
                    break
        if not self._heard.is_set():
            return
        with contextlib.suppress(RuntimeError):
            if not self._failed.check([BY_A_RANK]) and self._failed.add(BY_A_RANK, 1) == 1:
                said = f"key {FAILED!r} of the run's store was set, and by none of its ranks"
                line = f"{self.prog}: {said}: another process, which can reach the store, has ended the run."
                print(line, file=sys.stderr, flush=True)
        before = self._others(self._failed) or {}
        if self._stop.wait(GRACE_S):
            return
        self._kill(self._silent(before, self._others(self._failed) or {}))
        if self._lingers:
            return
        if self.holds:
            self.linger(said=True)  # torch complains on ranks whose store goes before they do
        os._exit(1)

    def _end(self, line: str, status: int = 1, silent: set[int] | None = None) -> NoReturn:
        """Say it, unless another has spoken, and end this process at once: the main thread hangs, or will."""
        said = self.is_first()
        if said:
            with contextlib.suppress(OSError):  # a terminal that has been closed
                print(f"{self.prog}: {line}", file=sys.stderr, flush=True)
            self._kill(silent or set())
        answer(lambda: self._publish(left=True), None, 0.5)  # or this rank would be taken for a silent one
        self.linger(said)
        answer(sys.stdout.flush, None, 0.5)
        os._exit(status)

    def _kill(self, silent: set[int]) -> None:
        """A stopped process ends by nothing else, and its launcher would ask it kindly first, for half a minute."""
        for peer in (self.peers[rank] for rank in silent):
            if self._is_here(peer):
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)


def first_to_say(store: Any) -> bool:
    """True on the first rank that asks; all are told by it that the run has failed."""
    store.set(BY_A_RANK, "1")
    return bool(store.add(FAILED, 1) == 1)


def verdict(
    key: str, number: int, text: str, ranks: tuple[int, ...], seen: dict[int, Seen], ended: set[int], silent: set[int]
) -> str:
    """Where the ranks of the axis were last seen, and which to look at, after a call that did not come back.

    key, ranks: of the axis; number, text: of the call.
    """
    places = {rank: seen[rank].at(key) for rank in ranks if rank in seen}
    behind = [rank for rank, (at, _) in places.items() if at < number]
    idle = [rank for rank, theirs in seen.items() if not theirs.waits and not theirs.left]
    left = [rank for rank in ranks if rank in seen and seen[rank].left]
    suspects = (
        (sorted(ended), "its process has ended"),
        (sorted(silent), "it does not run: stopped, or its host is out of reach"),
        (left, "it has come to its end"),
        ([rank for rank in behind if rank in idle], "it is in no collective"),
        (idle, "it is in no collective"),
        (sorted(behind, key=lambda rank: places[rank][0]), "it is behind"),
        ([rank for rank, (_, said) in places.items() if said != text], "it is in another call"),
    )
    found, why = next(((ranks, why) for ranks, why in suspects if ranks), ([], ""))
    if found and found[0] not in places and found[0] in seen:
        places[found[0]] = seen[found[0]].at(seen[found[0]].latest)
    lines: dict[str, list[int]] = {}
    for rank, (at, said) in sorted(places.items()):
        op = text.partition(" ")[0]
        lines.setdefault(f"#{at}" if said == text else said.removeprefix(op + " "), []).append(rank)
    last_seen = ", ".join(f"{ranks_text(who)} {said}" for said, who in lines.items())
    advice = f"Look at rank {found[0]} first: {why}." if found else "All have come to it: look at the network between them."
    return (f" Last seen: {last_seen}." if last_seen else " The store does not answer.") + f" {advice}"


def _is_or_are(ranks: str) -> str:
    return "are" if ranks.startswith("ranks") else "is"

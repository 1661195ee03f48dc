"""The watchdog: ends a run within seconds if a rank has died, stopped or diverged, and names it.

Beside the thread that computes, each rank has two that talk through the launcher's key-value store
alone, because torch.distributed may be what hangs. The store's keys:

    seen/RANK          the `Progress` that the rank publishes, as JSON
    failed             number of ranks that have reported a failure; the first prints the reason
    failed by a rank   set before `failed`; if missing, another program has set `failed`

`_watch` publishes once a second, and ends the run if
  - the launcher is gone, and training does not save within ORPHAN_S seconds: status 143;
  - a process of this host has ended and had not published that it finished: status 1;
  - a signal of STOPS came for which the run has no handler: status 128 + signal;
  - a call of this rank has been open for longer than `limit` seconds, and no rank of its axis is
    compiling: status 1. A rank that publishes nothing between two readings is stalled.
`_listen` polls `failed`, in a thread of its own as the store may not answer. Once that is set, it
ends this process after GRACE_S seconds: status 1. Both kill the stalled processes of this host: a
stopped one obeys only SIGKILL, which its launcher would send half a minute later.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import astuple
from typing import Any, NoReturn

from base.errors import print_error
from base.processes import call_within, is_running, process_state
from parallel.ledger import Call, Ledger, Track, call_text
from world.launch import ANSWER_S, Launch
from world.peers import Peer, Progress, diagnosis, key_of, ranks_text

BEAT_S = 1.0
GRACE_S = 2.0  # from a failure to the end of the other ranks
FAILED = "failed"
BY_A_RANK = "failed by a rank"
FOREIGN = (
    f"key {FAILED!r} of the run's store was set, and by none of its ranks: another process, which "
    f"can reach the store, has ended the run."
)
ORPHAN_S = 8.0  # the longest that training may go on without a launcher before it saves
# SIGHUP: the terminal was closed. SIGUSR1 and SIGUSR2: batch systems send them ahead of the end
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Watch:
    """The watchdog of one rank. holds: this process holds the store. limit: seconds that a call may
    take; it may be changed at any time. prog: how messages begin."""

    def __init__(
        self, store: Any, holds: bool, launch: Launch, peers: tuple[Peer, ...], ledger: Ledger,
        limit: float, prog: str,
    ):  # fmt: skip
        self.holds, self.launch, self.rank, self.peers = holds, launch, launch.rank, peers
        self.ledger, self.limit, self.prog = ledger, limit, prog
        # one client for each thread: a call that waits blocks its connection
        self.store, self._listening, self._reporting = (store.clone() for _ in range(3))
        space = peers[self.rank].space
        self._here = {rank for rank, peer in enumerate(peers) if peer.space == space}
        self._beat = 0  # publications
        self._open_since: dict[tuple[Track, int], float] = {}  # when a call was first seen open
        self._finished: set[int] = set()  # ranks of this host that have ended well
        self._failed = False  # a rank has reported that the run failed
        self._exiting = False  # this rank is about to exit with a status of its own
        self._store_lost = False  # never asked again: the question might not return
        self._reported = False
        self.orphaned_at = 0.0  # when the launcher was found gone; nothing would end this process
        self._stop = threading.Event()
        self._wakeup, self._wake = os.pipe()  # signals write to it, whatever the main thread does
        targets = self._watch, self._listen
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]

    # --- called by the run ------------------------------------------------------------------------

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            os.set_blocking(self._wake, False)
            signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            for number in STOPS:
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, self._on_signal)
        self._publish()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """This rank has ended well. If it holds the store it waits for the others, some seconds."""
        self._stop.set()
        os.write(self._wake, b"\0")
        for thread in self._threads:
            thread.join(ANSWER_S)
        with contextlib.suppress(RuntimeError):
            self._publish(finished=True)
            if self.holds:
                _wait_until(lambda: all(x.finished for x in self._read(self.store).values()))

    def is_first(self) -> bool:
        """Report that the run has failed; True on the first rank, which prints why. Without a store
        that is the lowest running rank of each host."""
        if self._failed or self._reported:
            return False
        self._reported = True
        lowest = self.rank == min(self._here - self.ended())
        if self._store_lost or self.launch.has_ended():
            return lowest
        return call_within(lambda: report_failure(self._reporting), lowest, ANSWER_S)

    def linger(self, printed: bool) -> None:
        """Wait before the exit of a failed run, while others need this process. printed: this rank
        has printed why it failed."""
        self._exiting = True
        if self.holds:  # others ask its store
            others = len(self.peers) - 1
            _wait_until(lambda: len(self.ended()) == others, BEAT_S + GRACE_S + ANSWER_S)
        elif printed and (self._store_lost or self.launch.has_ended()):
            time.sleep(2 * BEAT_S)  # no other rank of this host prints as long as this one runs
        else:  # a launcher ends all ranks when the first exits: let that be the one that printed
            time.sleep(0.3 if printed else 1)

    def ended(self) -> set[int]:
        """Ranks of this host, or rather of its process space, whose process has ended."""
        return {rank for rank in self._here if not is_running(self.peers[rank].pid)}

    def _on_signal(self, number: int, frame: Any) -> None:
        """`_watch` reads signals from a pipe, which Python writes only if there is a handler."""
        if not self._threads[0].is_alive():
            os._exit(128 + number)

    # --- once a second ----------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            beat = min(BEAT_S, self.limit / 4)
            ready, _, _ = select.select([self._wakeup], [], [], beat)
            signals = os.read(self._wakeup, 64) if ready else b""
            if self._stop.is_set():
                return
            now = time.monotonic()
            if now - last > 3 * beat + 1:
                self._open_since.clear()  # this process itself was stopped: do not blame the others
            last = now
            if self._exiting:
                with contextlib.suppress(RuntimeError):
                    self._publish()
                continue
            self._check_launcher(now)
            self._check_processes()
            for number in STOPS:
                if number in signals and signal.getsignal(number) == self._on_signal:
                    stopped = f"rank {self.rank} was told to stop ({number.name}) {self._where()}"
                    self._end_run(stopped, 128 + number)
            self._check_calls(now)

    def _publish(self, finished: bool = False) -> None:
        if not self._store_lost:
            self._beat += 1
            progress = Progress.of(self._beat, finished, self.ledger)
            self.store.set(f"seen/{self.rank}", json.dumps(astuple(progress)))

    def _read(self, store: Any) -> dict[int, Progress]:
        """The last publication of each rank; empty if the store does not answer."""

        def read() -> dict[int, Progress]:
            ranks = [rank for rank in range(len(self.peers)) if store.check([f"seen/{rank}"])]
            texts = store.multi_get([f"seen/{rank}" for rank in ranks])
            return {r: Progress(*json.loads(text)) for r, text in zip(ranks, texts, strict=True)}

        found = None if self._store_lost else call_within(read, None, ANSWER_S)
        self._store_lost = found is None
        return found or {}

    def _open_calls(self) -> dict[tuple[Track, int], Call]:
        tracks = self.ledger.tracks
        return {(track, number): call for track in tracks for number, call in track.open()}

    def _where(self) -> str:
        """`in all_reduce #1843 (...)`"""
        for (_, number), call in self._open_calls().items():
            return f"in {call_text(number, call)}"
        if (latest := self.ledger.latest) is None or latest.call is None:
            return "before its first collective"
        return f"after {call_text(latest.number, latest.call)}"

    def _check_launcher(self, now: float) -> None:
        gone = self.launch.has_ended()
        self._store_lost |= gone
        try:
            self._publish()
        except RuntimeError:  # the store is gone, and torch would log each further attempt
            self._store_lost, gone = True, bool(self.launch.run)
        if gone:
            self.orphaned_at = self.orphaned_at or now
        saves = signal.getsignal(signal.SIGTERM) != self._on_signal
        in_time = now - self.orphaned_at < ORPHAN_S or "save" in self.ledger.doing
        if self.orphaned_at and not (saves and in_time):
            lost = f"the launcher of rank {self.rank} is gone: the run has ended {self._where()}"
            self._end_run(lost, 128 + signal.SIGTERM)

    def _check_processes(self) -> None:
        if not (ended := self.ended() - self._finished):
            return
        finished = {rank for rank, seen in self._read(self.store).items() if seen.finished}
        # without a store: the rank that ended held it. If that rank failed, the next call fails
        self._finished |= ended if self._store_lost else ended & finished
        if lost := ended - self._finished:
            gone = f"{ranks_text(lost)} {'is' if len(lost) == 1 else 'are'} gone"
            self._end_run(f"rank {self.rank} lost contact with its peers ({gone}) {self._where()}")

    def _check_calls(self, now: float) -> None:
        calls = self._open_calls()
        self._open_since = {at: self._open_since.get(at, now) for at in calls}
        late = [at for at, since in self._open_since.items() if now - since > self.limit]
        if not late:
            return
        (track, number), call = late[0], calls[late[0]]
        before = self._read(self.store)
        for _ in range(2):  # beats between the two readings
            self._stop.wait(BEAT_S)
            with contextlib.suppress(RuntimeError):
                self._publish()  # other ranks may be reading
        if self._stop.is_set() or late[0] not in self._open_calls():
            return  # the call was late, and came back
        progress = self._read(self.store)
        ended, stalled = self.ended(), self._stalled(before, progress)
        running = progress.keys() & set(track.ranks) - ended - stalled
        if any(progress[rank].compiling for rank in running):
            return
        where = f"[rank {self.rank} host {self.peers[self.rank].host}]"
        line = f"{where} waited {self.limit:g} s in {call_text(number, call, with_bytes=True)}."
        about = key_of(track), number, call_text(number, call), track.ranks
        self._end_run(line + diagnosis(*about, progress, ended, stalled), stalled=stalled)

    def _stalled(self, before: dict[int, Progress], now: dict[int, Progress]) -> set[int]:
        """Ranks that have published nothing between two readings, and stopped ones of this host."""
        both = now.keys() & before.keys()
        silent = {r for r in both if now[r].beat == before[r].beat and not now[r].finished}
        stopped = {r for r in self._here if process_state(self.peers[r].pid) in ("T", "t")}
        return (silent | stopped) - {self.rank} - self.ended()

    # --- the end ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        store = self._listening
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not self._stop.wait(min(BEAT_S, self.limit / 4)) and not self.launch.has_ended():
                if store.check([FAILED]):
                    self._failed = True
                    if not store.check([BY_A_RANK]) and store.add(BY_A_RANK, 1) == 1:
                        print_error(f"{self.prog}: {FOREIGN}")
                    break
        if not self._failed:
            return
        before = self._read(store)
        if self._stop.wait(GRACE_S):
            return
        self._kill(self._stalled(before, self._read(store)))
        if self._exiting:
            return
        if self.holds:
            self.linger(printed=True)  # torch logs errors on ranks that outlive their store
        os._exit(1)

    def _end_run(self, line: str, status: int = 1, stalled: Collection[int] = ()) -> NoReturn:
        """Print the line if no other rank has, and end this process: the main thread may hang."""
        first = self.is_first()
        if first:
            with contextlib.suppress(OSError):  # the terminal was closed
                print_error(f"{self.prog}: {line}")
            self._kill(stalled)
        call_within(lambda: self._publish(finished=True), None, 0.5)  # this rank is not stalled
        self.linger(first)
        call_within(sys.stdout.flush, None, 0.5)
        os._exit(status)

    def _kill(self, ranks: Collection[int]) -> None:
        for rank in self._here.intersection(ranks):
            with contextlib.suppress(OSError):
                os.kill(self.peers[rank].pid, signal.SIGKILL)


def _wait_until(condition: Callable[[], bool], seconds: float = ANSWER_S) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.02)


def report_failure(store: Any) -> bool:
    """Tell all ranks that the run has failed; True on the first rank that does."""
    store.set(BY_A_RANK, "1")
    return bool(store.add(FAILED, 1) == 1)

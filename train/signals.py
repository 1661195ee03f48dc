"""Signals that ask a training run to end."""

import signal
import time
from typing import Any

from base.errors import Stopped
from train import directory
from train.setup import Run
from world.watch import STOPS

ORPHANED = 1000  # beside the numbers of signals: the launcher is gone


class Signals:
    """Notes a signal that asks the run to end; the loop looks at `asked` between two iterations.
    A second Ctrl-C ends it at once, after 2 s: torchrun repeats the terminal's first one."""

    def __init__(self) -> None:
        self.asked, self._since, self._before = 0, 0.0, dict[int, Any]()

    def __enter__(self) -> "Signals":
        for number in (*STOPS, signal.SIGINT):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def number(self, log: int, orphaned: bool) -> int:
        """The signal to end by: of this process, of its log, ORPHANED, or 0 to go on."""
        return self.asked or log or ORPHANED * orphaned

    def _note(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() > self._since + 2:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = number, time.monotonic()


def stopped(run: Run, asked: int) -> Stopped:
    """The end of a run that got a signal, with its exit status."""
    at, kept = run.progress.iter_num, directory.last_good(run.out_dir)
    number = signal.SIGTERM if asked == ORPHANED else signal.Signals(asked)
    why = "the launcher is gone" if asked == ORPHANED else number.name
    saved = f"saved {kept}. --init_from=resume goes on from there."
    if kept is None or directory.iteration(kept) < at:
        saved = f"not saved; last good checkpoint: {kept or 'none'}."
    return Stopped(f"{why}: stopped after {at} iterations, {saved}", 128 + number)

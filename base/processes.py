"""What the processes of a group find out about each other: who still runs, and whether all of them can do a thing."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from base.native import Unavailable

T = TypeVar("T")
Exchange = Callable[[Any], list[Any]]  # a small picklable thing of every rank of the group, in rank order


def process_state(pid: int) -> str:
    """The letter that /proc has for it: Z for one that has ended and waits for its parent, T for a stopped one; "" where there
    is none, ? where it exists and nothing more is known."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return ""
    except OSError:  # another user's process, or a system without /proc
        return "?"


def is_running(pid: int) -> bool:
    """False for one that has ended, also while it waits as a zombie for its parent."""
    return process_state(pid) not in ("", "Z", "X")


def answer(ask: Callable[[], T], otherwise: T, seconds: float) -> T:
    """What `ask` gives; `otherwise` where it fails, or takes longer: it is left to itself then."""
    given = []

    def asked() -> None:
        with contextlib.suppress(Exception):
            given.append(ask())

    thread = threading.Thread(target=asked, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there is no memory for a thread
        asked()
    else:
        thread.join(seconds)
    return given[0] if given else otherwise


def on_all(exchange: Exchange, make: Callable[[], Any]) -> Any:
    """What this rank's `make` gives. Where it fails on one rank it fails on all, and says why and where."""
    made, fault = None, ""
    try:
        made = make()
    except (Unavailable, RuntimeError) as error:  # RuntimeError: torch's
        fault = str(error).strip().partition("\n")[0]
    for rank, theirs in enumerate(exchange(fault)):
        if theirs:
            raise Unavailable(f"rank {rank}: {theirs}" if rank else theirs)
    return made

"""Processes of one group: who is running, who answers, and agreeing on a step that may fail."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from base.errors import Unavailable

T = TypeVar("T")
Exchange = Callable[[Any], list[Any]]  # all-gather of a small picklable value, in rank order


def process_state(pid: int) -> str:
    """The state letter in /proc: Z zombie, T stopped, ...; "" no such process, ? unknown."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return ""
    except OSError:  # another user's process, or no /proc
        return "?"


def is_running(pid: int) -> bool:
    """False for a process that has ended, including a zombie."""
    return process_state(pid) not in ("", "Z", "X")


def call_within(function: Callable[[], T], default: T, seconds: float) -> T:
    """function(), or `default` if it raises or takes longer; it is then left running."""
    results = []

    def call() -> None:
        with contextlib.suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no memory for a thread
        call()
    else:
        thread.join(seconds)
    return results[0] if results else default


def on_all(exchange: Exchange, make: Callable[[], Any]) -> Any:
    """make() of this rank. If it raises Unavailable on one rank, all raise it and name the rank."""
    made, fault = None, ""
    try:
        made = make()
    except (Unavailable, RuntimeError) as error:  # RuntimeError: torch's
        fault = str(error).strip().partition("\n")[0]
    for rank, other in enumerate(exchange(fault)):
        if other:
            raise Unavailable(f"rank {rank}: {other}" if rank else other)
    return made

"""What the processes of a group find out about each other: who still runs, and whether all of them can do a thing."""

import os
from collections.abc import Callable
from typing import Any

from native.library import Unavailable

Exchange = Callable[[Any], list[Any]]  # a small picklable thing of every rank of the group, in rank order


def is_running(pid: int) -> bool:
    """False for one that has ended, also while it waits as a zombie for its parent."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or a system without /proc: it exists
        return True


def on_all(exchange: Exchange, make: Callable[[], Any]) -> Any:
    """What this rank's `make` gives. Where it fails on one rank it fails on all, and says why and where."""
    made, fault = None, ""
    try:
        made = make()
    except Unavailable as error:
        fault = str(error)
    for rank, theirs in enumerate(exchange(fault)):
        if theirs:
            raise Unavailable(f"rank {rank}: {theirs}" if rank else theirs)
    return made

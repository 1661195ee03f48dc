"""The roll call at the start of a run: each rank says through the store that it is there and what it brings, and hears who
else is.

The store is the launcher's. torchrun keeps one for all attempts of a run, each of its agents counts restarts for itself, and
what an earlier attempt has left lies in the store still. So rank 0 gives the attempt a name that no other has, the ranks
answer to that name, and each believes only a roll that has its own answer in it.
"""

import json
import os
import time
from collections.abc import Iterable
from typing import Any

from base.errors import UserError

POLL_S = 0.01
LATER_S = 5.0  # rank 0 gives up first: it knows who is missing


def call_roll(store: Any, rank: int, size: int, statement: dict[str, Any], seconds: float) -> tuple[str, list[dict[str, Any]]]:
    """(the name of this attempt, what each rank states, in rank order); every rank calls this.

    statement: anything JSON can say, with `host` among it. UserError on all who are there where somebody is not within
    `seconds`.
    """
    mine = os.urandom(8).hex()
    if rank == 0:
        return _call(store, mine, size, statement, seconds)
    end, answered = time.monotonic() + seconds + LATER_S, ""
    while time.monotonic() < end:
        called = store.get("roll").decode() if store.check(["roll"]) else ""
        if called != answered:
            store.set(f"roll/{called}/{rank}", json.dumps([mine, statement]))
            answered = called
        if called and store.check([f"roll/{called}"]):
            roll = json.loads(store.get(f"roll/{called}"))
            if roll["answers"].get(str(rank)) == mine:
                if roll["missing"]:
                    raise UserError(roll["missing"])
                return called, roll["stated"]
        time.sleep(POLL_S)
    raise UserError(f"rank 0 did not come within {seconds:g} s. Look at its output, or wait longer with --start_timeout.")


def _call(store: Any, mine: str, size: int, statement: dict[str, Any], seconds: float) -> tuple[str, list[dict[str, Any]]]:
    store.set("roll", mine)
    answers, stated = {0: mine}, {0: statement}
    end = time.monotonic() + seconds
    while len(stated) < size and time.monotonic() < end:
        time.sleep(POLL_S)
        for rank in [rank for rank in range(1, size) if rank not in stated and store.check([f"roll/{mine}/{rank}"])]:
            answers[rank], stated[rank] = json.loads(store.get(f"roll/{mine}/{rank}"))
    missing = ""
    if len(stated) < size:
        hosts = ", ".join(dict.fromkeys(stated[rank]["host"] for rank in sorted(stated)))
        missing = (
            f"{ranks_text(set(range(size)) - set(stated))} did not come within {seconds:g} s; {ranks_text(stated)} did, on "
            f"{hosts}. Look at the output of those that are missing, or wait longer with --start_timeout."
        )
    everyone = [stated.get(rank, {}) for rank in range(size)]
    store.set(f"roll/{mine}", json.dumps({"answers": answers, "missing": missing, "stated": everyone}))
    if missing:
        raise UserError(missing)
    return mine, everyone


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`"""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = ", ".join(f"{lo}" if lo == hi else f"{lo}-{hi}" for lo, hi in runs)
    return f"rank{'s' if ',' in shown or '-' in shown else ''} {shown}"

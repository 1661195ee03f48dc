"""The roll call: every rank states through the store what it brings, and learns what others state.

torchrun keeps one store for all attempts of a run, its agents count restarts each by itself, and
keys of earlier attempts stay. So rank 0 gives the attempt a random name, the others answer to that
name, and each rank accepts only a result that contains its own answer:

    roll               the name of the attempt
    roll/NAME/RANK     a rank's answer: [a random word, its statement]
    roll/NAME          the result: [who is missing, in words; the answers of all ranks]
"""

import json
import os
import time
from typing import Any

from base.errors import UserError, print_error
from world.peers import Peer, ranks_text

POLL_S = 0.01
LATER_S = 5.0  # rank 0 gives up first, as it knows who is missing

Statement = dict[str, Any]


def call_roll(
    store: Any, rank: int, size: int, statement: Statement, seconds: float
) -> tuple[str, list[Statement]]:
    """(the name of this attempt, the statements of all ranks). All ranks call this.

    statement: JSON with at least `host`. UserError on all ranks if one does not come in time.
    """
    word, answered, end = os.urandom(8).hex(), "", time.monotonic() + seconds + LATER_S
    if rank == 0:
        _collect_answers(store, word, size, statement, seconds)
    while time.monotonic() < end:
        name = store.get("roll").decode() if store.check(["roll"]) else ""
        if rank and name != answered:
            store.set(f"roll/{name}/{rank}", json.dumps([word, statement]))
            answered = name
        if name and store.check([f"roll/{name}"]):
            missing, answers = json.loads(store.get(f"roll/{name}"))
            if word in [theirs for theirs, _ in answers]:
                if missing:
                    raise UserError(missing)
                return name, [theirs for _, theirs in answers]
        time.sleep(POLL_S)
    advice = "Look at its output, or wait longer with --start_timeout."
    raise UserError(f"rank 0 did not come within {seconds:g} s. {advice}")


def _collect_answers(
    store: Any, name: str, size: int, statement: Statement, seconds: float
) -> None:
    """Rank 0's part: name the attempt, wait for the answers, write the result."""
    store.set("roll", name)
    answers: list[Any] = [[name, statement]] + [["", {}]] * (size - 1)
    absent, end, missing = set(range(1, size)), time.monotonic() + seconds, ""
    while absent and time.monotonic() < end:
        time.sleep(POLL_S)
        for rank in [rank for rank in absent if store.check([f"roll/{name}/{rank}"])]:
            answers[rank] = json.loads(store.get(f"roll/{name}/{rank}"))
            absent.remove(rank)
    if absent:
        present = sorted({*range(size)} - absent)
        hosts = ", ".join(dict.fromkeys(answers[rank][1]["host"] for rank in present))
        missing = (
            f"{ranks_text(absent)} did not come within {seconds:g} s; {ranks_text(present)} did, "
            f"on {hosts}. Look at the output of those that are missing, or wait longer with "
            f"--start_timeout."
        )
    store.set(f"roll/{name}", json.dumps([missing, answers]))


def check_statements(statements: list[Statement]) -> None:
    """UserError for the first rank with another kind of device or other options than rank 0."""
    first = statements[0]
    for rank, mine in enumerate(statements):
        where = f"rank {rank} (host {mine['host']})"
        kind, wanted = (stated["device"].partition(":")[0] for stated in (mine, first))
        if kind != wanted:
            raise UserError(
                f"ranks disagree on where to compute: {where} on {kind}, rank 0 (host "
                f"{first['host']}) on {wanted}. Give --device."
            )
        for key, value in first["options"].items():
            if (other := mine["options"].get(key)) != value:
                raise UserError(
                    f"ranks disagree on options: {where} has {key}={other!r}, rank 0 has {value!r}."
                )


def warn_of_hosts(peers: tuple[Peer, ...], tp: int, prog: str) -> None:
    """Warn about a tp group that spans hosts: it works, but the network carries its all-reduces."""
    for first in range(0, len(peers), tp):
        hosts = {peer.space: peer.host for peer in peers[first : first + tp]}
        if len(hosts) > 1:
            spaces = [peer.space for peer in peers]
            least = min(map(spaces.count, spaces))
            fit = max(k for k in range(1, least + 1) if least % k == len(peers) % k == 0)
            group = f"tp group {first // tp} ({ranks_text(range(first, first + tp))})"
            return print_error(
                f"{prog}: {group} spans hosts {', '.join(hosts.values())}: every all-reduce of its "
                f"layers crosses the network. --tp={fit} keeps groups on one host."
            )

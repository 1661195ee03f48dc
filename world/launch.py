"""How the launcher started this process, and the key-value store through which ranks meet.

In the roll call every rank states what it brings, and learns what others state. torchrun keeps one
store for all attempts of a run, its agents count restarts each by itself, and keys of earlier
attempts stay. So rank 0 gives the attempt a random name, the others answer to that name, and each
rank accepts only a result that contains its own answer:

    roll               the name of the attempt
    roll/NAME/RANK     a rank's answer: [a random word, its statement]
    roll/NAME          the result: [who is missing, in words; the answers of all ranks]
"""

import json
import math
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from base.errors import UserError, first_line, print_error, shown
from base.processes import call_within
from world.peers import Peer, ranks_text

HOW_TO_START = "Start ranks with torchrun --standalone --nproc_per_node=N."
ANSWER_S = 3.0  # how long to wait for an answer of the store: the process that holds it may hang
LATER_S = 5.0  # rank 0 gives up first, as it knows who is missing

Statement = dict[str, Any]


class NoStore(UserError):
    """The store cannot be reached, so each rank prints this itself."""


@dataclass(frozen=True)
class Launch:
    """This process as torchrun started it; one rank of one under plain python. restarts: how often
    torchrun has restarted the ranks of this host. run: torchrun's id of the run. parent: torchrun's
    process id, 0 if there is none."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    restarts: int = 0
    run: str = ""
    parent: int = 0

    @classmethod
    def from_environment(cls) -> "Launch":
        """UserError if the environment is incomplete or contradicts itself."""
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not os.environ.keys() & keys:
            _refuse_other_launchers()
            return cls(0, 1, 0, 1)
        rank, size, local_rank, local_size = map(_number, keys)
        if rank >= size or local_rank >= local_size or local_size > size:
            values = ", ".join(f"{key}={os.environ[key]}" for key in keys)
            raise UserError(f"there is no such rank: {values}. {HOW_TO_START}")
        run = os.environ.get("TORCHELASTIC_RUN_ID", "")
        restarts = _number("TORCHELASTIC_RESTART_COUNT", "0")
        parent = os.getppid() if run else 0
        return cls(rank, size, local_rank, local_size, restarts, run, parent)

    def has_ended(self) -> bool:
        """True if torchrun was killed: otherwise it ends its ranks before itself."""
        return self.parent > 0 and os.getppid() != self.parent


def _number(key: str, default: str = "") -> int:
    text = os.environ.get(key, default)
    if not text:
        raise UserError(f"{key} is not set. {HOW_TO_START}")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{key}={shown(text)} is not a whole number. {HOW_TO_START}")
    return int(text)


def _refuse_other_launchers() -> None:
    """UserError if mpirun or srun started several processes: they set no RANK."""
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]
    if os.environ.get("SLURM_PROCID", "0") != "0":  # a batch script has SLURM_NTASKS too
        names.append("SLURM_NTASKS")
    for name in names:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            launcher = "srun" if name.startswith("SLURM") else "mpirun"
            fault = f"has started {count} processes ({name}), and each would be a run of its own"
            raise UserError(
                f"{launcher} {fault}. Start ranks with torchrun --standalone --nproc_per_node="
                f"{count}, on several nodes as docs/cluster.md has it."
            )


def open_store(launch: Launch, seconds: float) -> tuple[Any, bool]:
    """(a client of the store, whether this process holds the store). torchrun holds it; without
    torchrun, rank 0 does. NoStore if there is none within `seconds`."""
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    if not host:
        raise UserError(f"MASTER_ADDR is not set. {HOW_TO_START}")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port: those are 1 to {2**16 - 1}.")
    holds = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end = time.monotonic() + seconds
    store = call_within(lambda: connect(host, port, holds, end), None, seconds + ANSWER_S)
    if not isinstance(store, Exception | None):
        return store, holds
    if holds:
        fault = f"rank 0 cannot listen at port {port} ({first_line(store)})"
        raise NoStore(f"{fault}. Set another MASTER_PORT.")
    if store is None or isinstance(store, RuntimeError):
        fault = f"what answers at {host}:{port} is no store: another program has that port"
        raise NoStore(f"{fault}. Set another MASTER_PORT.")
    here = f"rank {launch.rank} (host {socket.gethostname()})"
    fault = f"{here} found nobody at {host}:{port} within {seconds:g} s"
    advice = "Is rank 0 there, and can this host reach it? --start_timeout waits longer."
    raise NoStore(f"{fault}. {advice}")


def connect(host: str, port: int, holds: bool, end: float) -> Any:
    """A TCPStore, or the exception that prevented one. end: when to give up."""
    listener = None
    try:
        if not holds:
            _wait_for_listener(host, port, end)
        elif (address := socket.gethostbyname(host)).startswith("127."):
            # torch would listen on all addresses
            listener = socket.create_server((address, port)).detach()
        limit = timedelta(seconds=max(1.0, end - time.monotonic()))
        how: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
        return dist.TCPStore(host, port, None, holds, limit, master_listen_fd=listener, **how)
    except (RuntimeError, ValueError, OSError) as error:
        return error


def _wait_for_listener(host: str, port: int, end: float) -> None:
    """OSError if nothing listens until `end`. torch would log each failed attempt."""
    while True:
        try:
            return socket.create_connection((host, port), 1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


# --- the roll call ------------------------------------------------------------------------------


def call_roll(
    store: Any, rank: int, size: int, statement: Statement, seconds: float
) -> tuple[str, list[Statement]]:
    """(the name of this attempt, the statements of all ranks). All ranks call this. statement: JSON
    with at least `host`. UserError on all ranks if one does not come in time."""
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
        time.sleep(0.01)
    fault = f"rank 0 did not come within {seconds:g} s"
    raise UserError(f"{fault}. Look at its output, or wait longer with --start_timeout.")


def _collect_answers(store: Any, name: str, size: int, mine: Statement, seconds: float) -> None:
    """Rank 0's part: name the attempt, wait for the answers, write the result."""
    store.set("roll", name)
    answers: dict[int, Any] = {0: [name, mine]}
    end, missing = time.monotonic() + seconds, ""
    while (absent := {*range(size)} - answers.keys()) and time.monotonic() < end:
        time.sleep(0.01)
        for rank in absent:
            if store.check([f"roll/{name}/{rank}"]):
                answers[rank] = json.loads(store.get(f"roll/{name}/{rank}"))
    ordered = [answers[rank] for rank in sorted(answers)]
    if absent:
        hosts = ", ".join(dict.fromkeys(theirs["host"] for _, theirs in ordered))
        missing = f"{ranks_text(absent)} did not come within {seconds:g} s; {ranks_text(answers)} "
        missing += f"did, on {hosts}. Look at the output of those that are missing, or wait longer "
        missing += "with --start_timeout."
    store.set(f"roll/{name}", json.dumps([missing, ordered]))


def check_statements(statements: list[Statement]) -> None:
    """UserError for the first rank with another kind of device or other options than rank 0."""
    first = statements[0]
    for rank, mine in enumerate(statements):
        here, there = f"rank {rank} (host {mine['host']})", f"rank 0 (host {first['host']})"
        kind, wanted = (stated["device"].partition(":")[0] for stated in (mine, first))
        if kind != wanted:
            fault = f"where to compute: {here} on {kind}, {there} on {wanted}. Give --device."
            raise UserError(f"ranks disagree on {fault}")
        for key, value in first["options"].items():
            if (other := mine["options"].get(key)) != value:
                fault = f"{here} has {key}={other!r}, rank 0 has {value!r}"
                raise UserError(f"ranks disagree on options: {fault}.")


def warn_of_hosts(peers: tuple[Peer, ...], tp: int, prog: str) -> None:
    """Warn about a tp group that spans hosts: it works, but the network carries its all-reduces."""
    for first in range(0, len(peers), tp):
        hosts = {peer.space: peer.host for peer in peers[first : first + tp]}
        if len(hosts) > 1:
            spaces = [peer.space for peer in peers]
            fit = math.gcd(len(peers), min(map(spaces.count, spaces)))
            group = f"tp group {first // tp} ({ranks_text(range(first, first + tp))})"
            return print_error(
                f"{prog}: {group} spans hosts {', '.join(hosts.values())}: every all-reduce of its "
                f"layers crosses the network. --tp={fit} keeps groups on one host."
            )

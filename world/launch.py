"""How the launcher started this process, and the key-value store through which ranks meet."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from base.errors import UserError, shown
from base.processes import call_within

HOW_TO_START = "Start ranks with torchrun --standalone --nproc_per_node=N."
ANSWER_S = 3.0  # how long to wait for an answer of the store: the process that holds it may hang


class NoStore(UserError):
    """The store cannot be reached, so each rank prints this itself."""


@dataclass(frozen=True)
class Launch:
    """This process as torchrun started it; one rank of one under plain python.

    restarts: how often torchrun has restarted the ranks of this host. run: torchrun's id of the
    run. parent: torchrun's process id, 0 if there is none.
    """

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
            raise UserError(
                f"{launcher} has started {count} processes ({name}), and each would be a run of "
                f"its own. Start ranks with torchrun --standalone --nproc_per_node={count}, on "
                f"several nodes as docs/cluster.md has it."
            )


def open_store(launch: Launch, seconds: float) -> tuple[Any, bool]:
    """(a client of the store, whether this process holds the store).

    torchrun holds it; without torchrun, rank 0 does. NoStore if there is none within `seconds`.
    """
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
        reason = str(store).strip().splitlines()[0]
        raise NoStore(f"rank 0 cannot listen at port {port} ({reason}). Set another MASTER_PORT.")
    if store is None or isinstance(store, RuntimeError):
        other = "another program has that port. Set another MASTER_PORT."
        raise NoStore(f"what answers at {host}:{port} is no store: {other}")
    here = f"rank {launch.rank} (host {socket.gethostname()})"
    raise NoStore(
        f"{here} found nobody at {host}:{port} within {seconds:g} s. Is rank 0 there, and can this "
        f"host reach it? --start_timeout waits longer."
    )


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

"""What the launcher has told this process, and the store through which ranks find each other."""

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from base.errors import Unheard, UserError, shown
from base.processes import answer
from world.watch import ANSWER_S

HOW_TO_START = "Start ranks with torchrun --standalone --nproc_per_node=N."


def _number(key: str, otherwise: str = "") -> int:
    """What the environment says there. UserError where that is no whole number."""
    text = os.environ.get(key, otherwise)
    if not text:
        raise UserError(f"{key} is not set. {HOW_TO_START}")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{key}={shown(text)} is not a whole number. {HOW_TO_START}")
    return int(text)


@dataclass(frozen=True)
class Launch:
    """What torchrun told this process; one rank when it was started by plain python. restarts: how often torchrun has started
    the ranks of this host again; run: the name it has for the run; parent: its process, 0 where there is none."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    restarts: int = 0
    run: str = ""
    parent: int = 0

    @classmethod
    def from_environment(cls) -> "Launch":
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not any(key in os.environ for key in keys):
            _check_alone()
            return cls(0, 1, 0, 1)
        rank, size, local_rank, local_size = map(_number, keys)
        if rank >= size or local_rank >= local_size or local_size > size:
            said = ", ".join(f"{key}={os.environ[key]}" for key in keys)
            raise UserError(f"there is no such rank: {said}. {HOW_TO_START}")
        restarts, run = _number("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("TORCHELASTIC_RUN_ID", "")
        return cls(rank, size, local_rank, local_size, restarts, run, os.getppid() if run else 0)

    def has_ended(self) -> bool:
        """Whether torchrun is gone: it ends its ranks first, unless it is killed."""
        return self.parent > 0 and os.getppid() != self.parent


def _check_alone() -> None:
    """UserError where a launcher that sets no RANK has started several processes: each would be a run of its own."""
    counts = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}
    if os.environ.get("SLURM_PROCID", "0") != "0":  # SLURM_NTASKS alone is set in a batch script as well
        counts["SLURM_NTASKS"] = "srun"
    for name, launcher in counts.items():
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"{launcher} has started {count} processes ({name}), and each would be a run of its own. Start ranks with "
                f"torchrun --standalone --nproc_per_node={count}, on several nodes as docs/cluster.md has it."
            )


def open_store(launch: Launch, seconds: float) -> tuple[Any, bool]:
    """A client of the store through which ranks find each other, and whether this process holds it: torchrun does, or, where
    something else has started the ranks, rank 0. UserError where it is not there within `seconds`."""
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    if not host:
        raise UserError(f"MASTER_ADDR is not set. {HOW_TO_START}")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port: those are 1 to {2**16 - 1}.")
    holds, end = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", time.monotonic() + seconds

    def connect() -> Any:
        try:
            while not holds and not _answers(host, port):  # torch would complain at each attempt
                if time.monotonic() > end:
                    return TimeoutError()
                time.sleep(0.05)
            limit = timedelta(seconds=max(1.0, end - time.monotonic()))
            listen = _listening_here(host, port) if holds else None
            return dist.TCPStore(
                host, port, None, holds, limit, wait_for_workers=False, multi_tenant=True, master_listen_fd=listen
            )
        except (RuntimeError, ValueError, OSError) as error:
            return error

    store = answer(connect, None, seconds + ANSWER_S)
    if not isinstance(store, Exception | None):
        return store, holds
    if holds:
        fault = f"rank 0 cannot listen at port {port} ({str(store).strip().splitlines()[0]}). Set another MASTER_PORT."
    elif store is None or isinstance(store, RuntimeError):
        fault = f"what answers at {host}:{port} is no store: another program has that port. Set another MASTER_PORT."
    else:
        fault = (
            f"rank {launch.rank} (host {socket.gethostname()}) found nobody at {host}:{port} within {seconds:g} s. Is "
            f"rank 0 there, and can this host reach it? --start_timeout waits longer."
        )
    raise Unheard(fault)


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), 1).close()
        return True
    return False


def _listening_here(host: str, port: int) -> int | None:
    """A socket that only this host reaches, where ranks look for the store at a loopback address; torch would listen to
    all the world. None elsewhere. OSError where the port cannot be had."""
    address = socket.gethostbyname(host)
    return socket.create_server((address, port)).detach() if address.startswith("127.") else None

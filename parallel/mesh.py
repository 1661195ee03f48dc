"""Start-up and shutdown: which device, which transport, and the dp x tp mesh. The only reader of torchrun's environment."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from errors import UserError
from native.library import Unavailable
from parallel.collectives import Axis, GroupTransport, Transport
from parallel.ledger import Ledger
from parallel.processes import is_running
from parallel.shm import ShmTransport
from parallel.symmetric import SymmetricTransport


@dataclass(frozen=True)
class Launch:
    """What torchrun told this process; one rank when it was started by plain python."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> "Launch":
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not any(key in os.environ for key in keys):
            return cls(0, 1, 0, 1)
        missing = [key for key in keys if not os.environ.get(key, "").isdigit()]
        if missing:
            raise UserError(f"{missing[0]} is not set. Start ranks with torchrun --standalone --nproc_per_node=N.")
        return cls(*(int(os.environ[key]) for key in keys))


@dataclass(frozen=True)
class World:
    """This rank's view of the run. `tp` and `dp` are the axes; `mesh` is None where one process runs alone."""

    rank: int
    size: int
    device: torch.device
    comm: str  # nccl | gloo | shm | none (one rank has nobody to talk to)
    tp: Axis
    dp: Axis
    ledger: Ledger
    mesh: DeviceMesh | None = None
    peers: tuple[tuple[str, int], ...] = ()  # (host, process id) of every rank

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes. It takes part in every collective like the others."""
        return self.rank == 0

    def gather(self, thing: Any) -> list[Any]:
        """A small picklable thing of every rank, in rank order, on all ranks (start-up and reports; not accounted)."""
        if self.mesh is None:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        self.gather(None)

    def gone(self) -> list[int]:
        """Ranks of this host whose process has ended."""
        return [rank for rank, (host, pid) in enumerate(self.peers) if host == socket.gethostname() and not is_running(pid)]

    def synchronize(self) -> None:
        """Wait until this rank's device has done all it was asked to: clocks are read after this."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def sizes(world_size: int, tp: int, prog: str) -> tuple[int, int]:
    """(dp, tp) of a world; tp=0 means all of it. UserError where tp does not divide the world."""
    tp = tp or world_size
    if world_size % tp:
        fit = ", ".join(str(k) for k in range(1, world_size + 1) if world_size % k == 0)
        low = world_size // tp * tp
        counts = " or ".join(str(n) for n in (low, low + tp) if n)
        raise UserError(
            f"world size {world_size} cannot be split into tensor-parallel groups of {tp}. Use --tp in {{{fit}}}, or start "
            f"{counts} processes: torchrun --standalone --nproc_per_node={low + tp} {prog} ..."
        )
    return world_size // tp, tp


def pick_device(device: str, launch: Launch, oversubscribe: bool) -> torch.device:
    """The device of this rank. auto is a GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device={device} is not a device. Use auto, cpu, cuda or cuda:N.") from None
    if kind.type == "mps" and launch.size > 1:
        raise UserError("--device=mps runs one rank only: it has no collectives. Use --device=cpu for several ranks.")
    if kind.type != "cuda":
        return kind
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError("--device=cuda, but torch sees no CUDA device. Use --device=cpu.")
    if kind.index is not None and launch.size == 1:
        if kind.index >= count:
            raise UserError(f"--device={device}, but this host has {count} CUDA devices.")
        return kind
    if launch.local_size > count and not oversubscribe:
        raise UserError(
            f"{launch.local_size} processes on this host but {count} CUDA devices. "
            f"Start {count}, pass --device=cpu, or share a device with --oversubscribe=True."
        )
    return torch.device("cuda", launch.local_rank % count)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of a run: auto is bfloat16 on a GPU that has it, else float32 (never float16 by surprise)."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def pick_comm(comm: str, device: torch.device, launch: Launch, tp: int) -> str:
    """The transport: nccl where every rank has a GPU of its own, shm between CPU ranks where no tp group leaves its host,
    else gloo."""
    shared = device.type == "cuda" and launch.local_size > torch.cuda.device_count()
    if comm == "auto":
        comm = "gloo"
        if device.type == "cuda" and not shared:
            comm = "nccl"
        elif device.type == "cpu" and tp > 1 and launch.local_size % tp == 0:
            comm = "shm"
    if comm == "shm" and device.type != "cpu":
        raise UserError(f"--comm=shm is for ranks on CPU cores, the device is {device.type}. Use --comm=auto.")
    if comm == "shm" and launch.local_size % tp:
        raise UserError(f"--comm=shm: hosts of {launch.local_size} ranks do not hold whole groups of tp={tp}. Use --comm=gloo.")
    if comm == "nccl" and device.type != "cuda":
        raise UserError(f"--comm=nccl needs GPUs, the device is {device.type}. Use --comm=gloo.")
    if comm == "nccl" and shared:
        raise UserError("--comm=nccl cannot share a GPU between ranks. Use --comm=gloo.")
    if comm == "shm" and tp == 1:
        comm = "gloo"  # the dp axis is torch's own
    return comm if launch.size > 1 else "none"


def set_threads(threads: int, device: torch.device, launch: Launch) -> None:
    """CPU threads of this rank: its share of the cores it may use, unless told otherwise."""
    if not threads and device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        threads = max(1, cores // launch.local_size)
    if threads:
        torch.set_num_threads(threads)


def _agree(launch: Launch, device: torch.device, promise: dict[str, Any]) -> list[Any]:
    """Every rank states where it runs and what it was asked to do; the first difference from rank 0 is an error."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "device": str(device), "options": promise}
    stated: list[Any] = [None] * launch.size
    dist.all_gather_object(stated, mine)
    for rank, other in enumerate(stated):
        for key, value in stated[0]["options"].items():
            if other["options"].get(key) != value:
                raise UserError(
                    f"ranks disagree on options: rank {rank} (host {other['host']}) has {key}="
                    f"{other['options'].get(key)!r}, rank 0 has {value!r}."
                )
    return stated


def make_axis(name: str, mesh: DeviceMesh, comm: str, ledger: Ledger, timeout: float = 120.0) -> Axis:
    """One axis of the mesh over nccl, gloo or shm; timeout: seconds that a rank is waited for over shm.

    Over nccl, what the tp axis says in a few bytes goes through symmetric memory where that can be had; where it cannot,
    all goes over nccl. Unavailable, on all ranks of the axis, where it cannot be shm.
    """
    size = mesh[name].size()
    if size == 1:
        return Axis(name, ledger=ledger)
    rank, group = mesh.get_local_rank(name), mesh[name].get_group()
    plain = GroupTransport(group, "gloo" if comm == "shm" else comm)
    transport: Transport = plain

    def exchange(thing: Any) -> list[Any]:
        things: list[Any] = [None] * size
        dist.all_gather_object(things, thing, group=group)
        return things

    if comm == "shm":
        transport = ShmTransport.open(rank, size, exchange, plain, timeout)
    elif comm == "nccl" and name == "tp":
        try:
            transport = SymmetricTransport.open(rank, exchange, plain)
        except Unavailable as error:
            transport = replace(plain, why=str(error))
    return Axis(name, rank, size, transport, ledger)


def first_ranks(world: World, size: int, timeout: float = 120.0) -> Axis | None:
    """A tp axis over the first `size` ranks of the world, in its own transport; None on the others. All ranks call it."""
    if size == 1 or world.mesh is None:
        return Axis("tp", ledger=world.ledger) if world.is_main else None
    mesh = DeviceMesh(world.mesh.device_type, list(range(size)), mesh_dim_names=("tp",))
    return make_axis("tp", mesh, world.comm, world.ledger, timeout) if world.rank < size else None


@contextmanager
def start(options: Any, tp: int, prog: str, promise: dict[str, Any]) -> Iterator[World]:
    """The world of this run, for as long as the `with` lasts.

    options: device, comm, threads, oversubscribe, comm_timeout. tp: tensor-parallel size, 0 for the world size.
    promise: options that every rank must have been given alike.
    Ranks of one tp group are neighbours: rank = dp_rank * tp + tp_rank, so a group stays on one host where it fits.
    """
    launch = Launch.from_environment()
    dp, tp = sizes(launch.size, tp, prog)
    device = pick_device(options.device, launch, options.oversubscribe)
    comm = pick_comm(options.comm, device, launch, tp)
    set_threads(options.threads, device, launch)
    ledger = Ledger()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1:
        yield World(0, 1, device, comm, Axis("tp", ledger=ledger), Axis("dp", ledger=ledger), ledger)
        return
    # host memory always goes over gloo; with nccl, a GPU's memory goes over nccl
    backend = "cpu:gloo,cuda:nccl" if comm == "nccl" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=options.comm_timeout),
        device_id=device if comm == "nccl" else None,
    )
    stated = _agree(launch, device, promise)
    mesh = init_device_mesh("cuda" if comm == "nccl" else "cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    # DistributedDataParallel sends its messages itself, over torch's own groups
    dp_axis = make_axis("dp", mesh, "gloo" if comm == "shm" else comm, ledger)
    try:
        tp_axis = make_axis("tp", mesh, comm, ledger, options.comm_timeout)
    except Unavailable as error:
        if options.comm == "shm":
            raise UserError(f"--comm=shm: {error}. Use --comm=gloo.") from None
        comm = "gloo"
        tp_axis = make_axis("tp", mesh, comm, ledger)
        if tp_axis.rank == 0:
            print(f"{prog}: ranks talk over gloo, which is slower than shared memory: {error}", file=sys.stderr)
    yield World(
        launch.rank,
        launch.size,
        device,
        comm,
        tp_axis,
        dp_axis,
        ledger,
        mesh,
        tuple((rank["host"], rank["pid"]) for rank in stated),
    )
    dist.destroy_process_group()


def first_to_fail() -> bool:
    """True on the first rank that asks, False on those that fail in its wake: one error is shown once."""
    if not dist.is_initialized():
        return Launch.from_environment().rank == 0
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        return bool(store.add("nanotp/failed", 1) == 1)
    except RuntimeError:  # the store is gone with the rank or the agent that held it: somebody else has spoken
        return False

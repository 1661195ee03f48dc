"""Start-up and shutdown: which device, which transport, and the dp x tp mesh. The only reader of torchrun's environment."""

import contextlib
import importlib.util
import os
import shutil
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from errors import Unheard, UserError, shown
from native.library import Unavailable
from parallel.collectives import Axis, GroupTransport, Transport, named
from parallel.ledger import Entry, Ledger, Track
from parallel.processes import answer
from parallel.roll_call import call_roll, ranks_text
from parallel.shm import ShmTransport
from parallel.symmetric import SymmetricTransport
from parallel.watch import ANSWER_S, Peer, Watch, first_to_say

# at the start torch's transports give up this much later than the watchdog, which knows more and says it
LATER_S = 30.0


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


@dataclass(frozen=True)
class World:
    """This rank's view of the run. `tp` and `dp` are the axes; groups: torch's group of each axis that
    joins several ranks."""

    rank: int
    size: int
    device: torch.device
    comm: str  # nccl | gloo | shm | none (one rank has nobody to talk to)
    tp: Axis
    dp: Axis
    ledger: Ledger
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()  # where every rank runs
    launch: Launch = Launch(0, 1, 0, 1)
    track: Track = field(default_factory=Track)  # of what is said among all ranks
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes. It takes part in every collective like the others."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether the launcher of this rank is gone."""
        return self.launch.has_ended() or (self.watch is not None and self.watch.orphaned)

    def gather(self, thing: Any, what: str = "") -> list[Any]:
        """A small picklable thing of every rank, in rank order, on all ranks (start-up, saving and reports; not accounted).
        what: for messages, where what the run is doing does not tell."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        with self.waiting("gather", what):
            dist.all_gather_object(things, thing)
        return things

    def barrier(self, what: str = "") -> None:
        self.gather(None, what)

    @contextmanager
    def waiting(self, op: str, what: str = "") -> Iterator[None]:
        """Within, this rank waits for others in something that no axis carries; the watchdog knows of it."""
        track, self.ledger.latest = self.track, self.track
        track.number += 1
        track.call = Entry(None, what, "", op), 0, self.ledger.doing
        track.waiting = True
        try:
            yield
        except RuntimeError as error:
            raise named(error, track) from error
        track.waiting = False

    def agree(self, what: str, mine: Any) -> None:
        """UserError on all ranks where one has something else than rank 0; what: its name for the message."""
        for rank, theirs in enumerate(stated := self.gather(mine, what)):
            if theirs != stated[0]:
                where = f"rank {rank} (host {self.peers[rank].host})"
                raise UserError(f"ranks disagree on {what}: {where} has {theirs}, rank 0 has {stated[0]}.")

    def gone(self) -> list[int]:
        """Ranks of this host whose process has ended."""
        return [rank for rank, peer in enumerate(self.peers) if peer.has_ended(self.peers[self.rank])]

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


def pick_device(device: str, launch: Launch) -> torch.device:
    """The device of this rank. auto is a GPU where there is one, else the CPU. Several ranks take the
    GPUs that they see in turn: whether two of them have the same one, the roll call finds out."""
    try:
        kind = torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        raise UserError(f"--device={device} is not a device. Use auto, cpu, cuda or cuda:N.") from None
    if kind.type == "mps" and launch.size > 1:
        raise UserError(
            "--device=mps runs one rank only: it has no collectives. Use --device=cpu for several ranks."
        )
    if device != "auto" and kind.type != "cuda":
        return kind
    count, why = _gpus()
    if device == "auto" and not count:
        if why and launch.rank == 0:
            print(f"no GPU is used: {why}", file=sys.stderr)
        return kind
    if not count:
        raise UserError(f"--device={device}, but {why or 'torch sees no CUDA device'}. Use --device=cpu.")
    if kind.index is not None and launch.size > 1:
        raise UserError(
            f"--device={device} is one GPU and there are {launch.size} ranks. Use --device=cuda, and "
            f"CUDA_VISIBLE_DEVICES to choose GPUs."
        )
    if kind.index is not None and kind.index >= count:
        raise UserError(f"--device={device}, but this host has {count} CUDA devices.")
    index = launch.local_rank % count if kind.index is None else kind.index
    return torch.device("cuda", index)


def _gpus() -> tuple[int, str]:
    """(how many GPUs this process can use, why none where there is a driver that does not work)."""
    with warnings.catch_warnings(record=True) as said:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    texts = [str(warning.message).strip() for warning in said if "CUDA" in str(warning.message)]
    return count, texts[0].partition(". ")[0].splitlines()[0].rstrip(".") if texts else ""


def gpu_name(device: torch.device) -> str:
    """What tells a GPU from every other, whatever number a rank has for it; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def share_gpus(stated: list[dict[str, Any]], oversubscribe: bool) -> bool:
    """Whether ranks share a GPU, by what each has stated. UserError where they may not."""
    owner: dict[str, int] = {}
    for rank, mine in enumerate(stated):
        other = owner.setdefault(mine["gpu"], rank) if mine["gpu"] else rank
        if other != rank and not oversubscribe:
            here = [said["gpu"] for said in stated if said["host"] == mine["host"]]
            count = len(set(here))
            raise UserError(
                f"{len(here)} processes on host {mine['host']} but {count} CUDA devices: ranks {other} and "
                f"{rank} have the same one. Start {count}, pass --device=cpu, or share a device with "
                f"--oversubscribe=True."
            )
    return 0 < len(owner) < sum(1 for mine in stated if mine["gpu"])


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of a run: auto is bfloat16 on a GPU that has it, else float32 (never float16 by
    surprise). UserError for bfloat16 on a GPU that only emulates it."""
    has = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--dtype=bfloat16: {name} has none. Use --dtype=float16 or --dtype=float32.")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and has else "float32"
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return kinds[dtype]


def pick_comm(comm: str, device: torch.device, launch: Launch, tp: int, shared: bool = False) -> str:
    """The transport: nccl where every rank has a GPU of its own, shm between CPU ranks where no tp
    group leaves its host, else gloo. shared: two ranks have one GPU."""
    if comm == "auto":
        comm = "gloo"
        if device.type == "cuda" and not shared:
            comm = "nccl"
        elif device.type == "cpu" and tp > 1 and launch.local_size % tp == 0:
            comm = "shm"
    if comm == "shm" and device.type != "cpu":
        kind = device.type
        raise UserError(f"--comm=shm is for ranks on CPU cores, the device is {kind}. Use --comm=auto.")
    if comm == "shm" and launch.local_size % tp:
        raise UserError(
            f"--comm=shm: hosts of {launch.local_size} ranks do not hold whole groups of tp={tp}. "
            f"Use --comm=gloo."
        )
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


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile has nothing to compile with: a C++ compiler for a CPU; Triton and a C compiler
    (for what starts its kernels) for a GPU."""
    gpu = device.type == "cuda"
    given = os.environ.get("CC" if gpu else "CXX")
    usual = ("gcc", "clang") if gpu else ("clang++" if sys.platform == "darwin" else "g++",)
    names = (given,) if given else usual
    missing = "" if any(map(shutil.which, names)) else f"a compiler ({' or '.join(names)})"
    if gpu and importlib.util.find_spec("triton") is None:
        missing = "the package triton"
    if missing:
        raise UserError(f"--compile=True needs {missing}, which is not here. Install it, or leave --compile out.")


def _store(launch: Launch, seconds: float) -> tuple[Any, bool]:
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


def _check_statements(stated: list[dict[str, Any]]) -> None:
    """UserError for the first rank that brings something else than rank 0."""
    for rank, other in enumerate(stated):
        kinds = [said["device"].partition(":")[0] for said in (other, stated[0])]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"ranks disagree on where to compute: rank {rank} (host {other['host']}) on {kinds[0]}, "
                f"rank 0 (host {stated[0]['host']}) on {kinds[1]}. Give --device."
            )
        for key, value in stated[0]["options"].items():
            if other["options"].get(key) != value:
                raise UserError(
                    f"ranks disagree on options: rank {rank} (host {other['host']}) has {key}="
                    f"{other['options'].get(key)!r}, rank 0 has {value!r}."
                )


def _warn_of_hosts(peers: tuple[Peer, ...], tp: int, prog: str) -> None:
    """A tp group that spans hosts is allowed, and slow: all its all-reduces cross the network."""
    for first in range(0, len(peers), tp):
        spaces = {peer.space: peer.host for peer in peers[first : first + tp]}
        if len(spaces) > 1:
            least = min(sum(peer.space == space for peer in peers) for space in {peer.space for peer in peers})
            fit = max(k for k in range(1, least + 1) if least % k == 0 and len(peers) % k == 0)
            group, hosts = f"tp group {first // tp} ({ranks_text(range(first, first + tp))})", ", ".join(spaces.values())
            advice = f"every all-reduce of its layers crosses the network. --tp={fit} keeps groups on one host."
            print(f"{prog}: {group} spans hosts {hosts}: {advice}", file=sys.stderr)
            return


def _try_out(axis: Axis, world: World) -> None:
    """One tiny message over the axis's real transport: what cannot work is found now, and named."""
    if axis.transport is not None:
        with axis.ledger.during("start-up"), world.waiting("all_reduce", f"{axis.name} over {axis.transport.name}"):
            came = axis.transport.all_reduce(torch.ones(1, device=world.device), "sum").item()
            if came != axis.size:
                raise RuntimeError(f"{axis.size} ones add up to {came:g}")


def make_groups(dp: int, tp: int, timeout: float) -> dict[str, dist.ProcessGroup]:
    """torch's group of each axis that joins several ranks; every rank of the world calls this.

    Not torch's DeviceMesh: its groups time out after torch's default, and those of nccl warn.
    """
    ranks = torch.arange(dp * tp).view(dp, tp)
    found: dict[str, dist.ProcessGroup] = {}
    for name, lines in (("dp", ranks.T.tolist()), ("tp", ranks.tolist())):
        for line in lines if len(lines[0]) > 1 else []:
            whole = len(line) == dp * tp  # the groups are made by all, also by those outside
            group = dist.group.WORLD if whole else dist.new_group(line, timedelta(seconds=timeout))
            if dist.get_rank() in line and group is not None:
                found[name] = group
    return found


def make_axis(
    name: str, group: dist.ProcessGroup | None, comm: str, ledger: Ledger, timeout: float = 120.0
) -> Axis:
    """An axis over nccl, gloo or shm; group: None for an axis of one rank. timeout: seconds that a rank
    is waited for over shm, where no watchdog ends the run before.

    Over nccl, what the tp axis says in a few bytes goes through symmetric memory where that can be had;
    where it cannot, all goes over nccl. Unavailable, on all ranks of the axis, where it cannot be shm.
    """
    if group is None:
        return Axis(name, ledger=ledger)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
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
    track = ledger.track(name, tuple(dist.get_process_group_ranks(group)))
    return Axis(name, rank, size, transport, ledger, track=track)


def first_ranks(world: World, size: int, timeout: float = 120.0) -> Axis | None:
    """A tp axis over the first `size` ranks of the world, in its own transport; None on the others.
    All ranks call it."""
    if size == 1 or world.size == 1:
        return Axis("tp", ledger=world.ledger) if world.is_main else None
    group = dist.new_group(list(range(size)), timedelta(seconds=timeout))
    if world.rank >= size:
        return None
    return make_axis("tp", group, world.comm, world.ledger, timeout)


def _connect(
    store: Any, watch: Watch, launch: Launch, shape: tuple[int, int], device: torch.device, comm: str,
    options: Any, prog: str,
) -> World:  # fmt: skip
    """The world of ranks that have answered the roll call: groups, axes, and a first message over each.
    shape: dp, tp."""
    latest, ledger = options.comm_timeout + LATER_S, watch.ledger
    store.set_timeout(timedelta(seconds=latest))
    # host memory always goes over gloo; with nccl, a GPU's memory goes over nccl
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if comm == "nccl" else "gloo",
        timeout=timedelta(seconds=latest),
        device_id=device if comm == "nccl" else None,
        store=store,
        rank=launch.rank,
        world_size=launch.size,
    )
    groups = make_groups(*shape, latest)
    # DistributedDataParallel sends its messages itself, over torch's own groups
    dp_axis = make_axis("dp", groups.get("dp"), "gloo" if comm == "shm" else comm, ledger)
    try:
        tp_axis = make_axis("tp", groups.get("tp"), comm, ledger, latest)
    except Unavailable as error:
        if options.comm == "shm":
            raise UserError(f"--comm=shm: {error}. Use --comm=gloo.") from None
        comm = "gloo"
        tp_axis = make_axis("tp", groups.get("tp"), comm, ledger)
        if tp_axis.rank == 0:
            slower = "ranks talk over gloo, which is slower than shared memory"
            print(f"{prog}: {slower}: {error}", file=sys.stderr)
    everyone = ledger.track("world", tuple(range(launch.size)))
    axes, peers = (tp_axis, dp_axis), watch.peers
    world = World(
        launch.rank, launch.size, device, comm, *axes, ledger, groups, peers, launch, everyone, watch
    )
    for axis in axes:
        _try_out(axis, world)
    for track in ledger.tracks:
        track.queued = deque()
    return world


@contextmanager
def start(options: Any, tp: int, prog: str, promise: dict[str, Any]) -> Iterator[World]:
    """The world of this run, for as long as the `with` lasts.

    options: device, comm, threads, oversubscribe, comm_timeout, start_timeout. tp: tensor-parallel size, 0 for the world size.
    promise: options that every rank must have been given alike.
    Ranks of one tp group are neighbours: rank = dp_rank * tp + tp_rank, so a group stays on one host where it fits.
    """
    launch = Launch.from_environment()
    dp, tp = sizes(launch.size, tp, prog)
    device = pick_device(options.device, launch)
    comm = pick_comm(options.comm, device, launch, tp)
    set_threads(options.threads, device, launch)
    if options.compile:
        check_compiler(device)
    ledger = Ledger()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1:
        yield World(0, 1, device, comm, Axis("tp", ledger=ledger), Axis("dp", ledger=ledger), ledger, launch=launch)
        return
    store, holds = _store(launch, options.start_timeout)
    mine = {**vars(Peer.here()), "device": str(device), "gpu": gpu_name(device), "options": promise}
    attempt, stated = call_roll(store, launch.rank, launch.size, mine, options.start_timeout)
    _check_statements(stated)
    comm = pick_comm(options.comm, device, launch, tp, share_gpus(stated, options.oversubscribe))
    peers = tuple(Peer(said["host"], said["pid"], said["space"]) for said in stated)
    if launch.rank == 0:
        _warn_of_hosts(peers, tp, prog)
    store = dist.PrefixStore(attempt, store)
    gone = launch.has_ended if launch.run else None
    watch = Watch(store, holds, launch.rank, peers, ledger, options.start_timeout, prog, gone)
    watch.start()
    try:
        world = _connect(store, watch, launch, (dp, tp), device, comm, options, prog)
    except BaseException:
        watch.stop()  # it is this rank's own fault, and told as one
        raise
    watch.limit = options.comm_timeout
    _leave_time_to_watch(world)
    yield world
    watch.stop()
    dist.destroy_process_group()


def _leave_time_to_watch(world: World) -> None:
    """From here on the watchdog sees every call. It counts the seconds in which this process runs; torch's clock goes on
    while all ranks are stopped, by a batch system or a laptop's lid."""
    for group in (None, *world.groups.values()):
        dist.distributed_c10d._set_pg_timeout(timedelta(days=30), group)


def linger(world: World | None, said: bool) -> None:
    """Stay, at a run's bad end, for as long as other ranks need this process; said: it has said why."""
    if world is not None and world.watch is not None:
        world.watch.linger(said)
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(0.3 if said else 5)  # torchrun ends all ranks with the first one: who speaks comes first, but may start late


def first_to_fail(world: World | None) -> bool:
    """True on the first rank that asks, False on those that fail in its wake: one error is shown once. world: None where the
    run fails before there is one."""
    if world is not None:
        return world.watch is None or world.watch.is_first()
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return True
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "0")
    follows = rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size)  # rank 0 speaks for it

    def ask() -> bool:
        socket.create_connection((host, int(port)), 1).close()  # torch would try again and again, and complain
        store = dist.TCPStore(host, int(port), wait_for_workers=False, timeout=timedelta(seconds=1))
        # ranks that fail this early have no name for the attempt yet
        return first_to_say(dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store))

    return answer(ask, not follows, ANSWER_S)

"""The dp x pp x tp mesh: the world as a rank sees it, its groups and axes, how they are built."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from base.errors import Unavailable, UserError, print_error
from parallel.collectives import Axis, GroupTransport, Transport
from parallel.emulated_link import EmulatedLink
from parallel.ledger import Entry, Ledger, Track
from parallel.shm import ShmTransport
from parallel.symmetric import SymmetricTransport
from plan.link import Link
from world.devices import check_compiler, gpu_name, pick_comm, pick_device, set_threads, share_gpus
from world.launch import Launch, call_roll, check_statements, open_store, warn_of_hosts
from world.peers import Peer
from world.watch import Watch

# At the start torch's own timeouts come this much later than the watchdog, whose message says more
LATER_S = 30.0


@dataclass(frozen=True)
class World:
    """This rank's view of the run. groups: torch's group of each axis with several ranks. peers:
    the process of each rank. track: of the calls among all ranks, for the watchdog."""

    rank: int
    size: int
    device: torch.device
    comm: str  # nccl | gloo | shm | none (a single rank)
    tp: Axis
    dp: Axis
    ledger: Ledger
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    launch: Launch = Launch(0, 1, 0, 1)
    track: Track = field(default_factory=Track)
    watch: Watch | None = None
    link: Link | None = None  # that is emulated on the tp axis
    pp: Axis = field(default_factory=lambda: Axis("pp"))
    ends: Axis = field(default_factory=lambda: Axis("ends"))  # first and last rank of a pipeline

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes. It joins every collective like the others."""
        return self.rank == 0

    @property
    def over(self) -> str:
        """The transport of the tp axis, for people."""
        return f"{self.comm}, link emulated ({self.link})" if self.link else self.comm

    @property
    def layout(self) -> str:
        """`dp 2 x tp 4`, with the stages of a pipeline between them if there are several."""
        stages = f" x pp {self.pp.size}" * (self.pp.size > 1)
        return f"dp {self.dp.size}{stages} x tp {self.tp.size}"

    @property
    def orphaned(self) -> bool:
        return self.launch.has_ended() or self.watch is not None and self.watch.orphaned_at > 0

    def gather(self, value: Any, what: str = "") -> list[Any]:
        """All-gather a small picklable value, in rank order. Not accounted: for start-up, saving
        and reports. what: names the call in messages, if the run's current step does not."""
        if self.size == 1:
            return [value]
        with self.waiting("gather", what):
            return _gathered(value, self.size)

    def barrier(self) -> None:
        self.gather(None)

    def waiting(self, op: str, what: str = "") -> Track:
        """Within, this rank waits for others, and not along an axis; the watchdog knows of it."""
        return self.ledger.calling(self.track, Entry(None, what, "", op), 0)

    def agree(self, what: str, value: Any) -> None:
        """UserError on all ranks if one has another value than rank 0. what: its name."""
        for rank, other in enumerate(values := self.gather(value, what)):
            if other != values[0]:
                where = f"rank {rank} (host {self.peers[rank].host})"
                fault = f"{where} has {other}, rank 0 has {values[0]}"
                raise UserError(f"ranks disagree on {what}: {fault}.")

    def synchronize(self) -> None:
        """Wait until the device has done all its work, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _gathered(value: Any, size: int, group: dist.ProcessGroup | None = None) -> list[Any]:
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def sizes(world_size: int, tp: int, prog: str, pp: int = 1) -> tuple[int, int, int]:
    """(dp, pp, tp) of a world; tp=0 means all that pp leaves. UserError if pp x tp does not divide
    the world size."""
    tp = tp or max(1, world_size // pp)
    size = pp * tp
    if world_size % size == 0:
        return world_size // size, pp, tp
    fit = ", ".join(str(k) for k in range(1, world_size + 1) if world_size % (k * pp) == 0)
    groups, use = f"tensor-parallel groups of {tp}", f"Use --tp in {{{fit}}}, or start"
    if pp > 1:
        groups = f"pipelines of {pp} x {tp} ranks (pp x tp)"
        use = use if fit else "Start"
    low = world_size // size * size
    counts = " or ".join(str(n) for n in (low, low + size) if n)
    start = f"torchrun --standalone --nproc_per_node={low + size} {prog} ..."
    fault = f"world size {world_size} cannot be split into {groups}"
    raise UserError(f"{fault}. {use} {counts} processes: {start}")


def make_groups(dp: int, pp: int, tp: int, timeout: float) -> dict[str, dist.ProcessGroup]:
    """torch's group of each axis with several ranks, on this rank. All ranks call this.
    Not torch's DeviceMesh: its groups have torch's default timeout, and those of nccl warn."""
    ranks = torch.arange(dp * pp * tp).view(dp, pp, tp)
    lines_of = {
        name: ranks.movedim(dim, 2).reshape(-1, ranks.shape[dim]).tolist()
        for dim, name in enumerate(("dp", "pp", "tp"))
    }
    lines_of["ends"] = [[line[0], line[-1]] for line in lines_of["pp"] if pp > 1]
    found: dict[str, dist.ProcessGroup] = {}
    for name, lines in lines_of.items():
        for line in lines if lines and len(lines[0]) > 1 else []:
            whole = len(line) == dp * pp * tp
            group = dist.group.WORLD if whole else dist.new_group(line, timedelta(seconds=timeout))
            if dist.get_rank() in line and group is not None:
                found[name] = group
    return found


def make_axis(
    name: str, group: dist.ProcessGroup | None, comm: str, ledger: Ledger, timeout: float = 120.0,
    link: Link | None = None,
) -> Axis:
    """An axis over nccl, gloo or shm. group: None for an axis of one rank. timeout: seconds that
    shm waits for a rank. link: that shm emulates. Unavailable, on all ranks, if shm cannot be used.
    With nccl, small sums along tp use symmetric memory where it is available."""
    if group is None:
        return Axis(name, ledger=ledger)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    plain = GroupTransport(group, "gloo" if comm == "shm" else comm)
    transport: Transport = plain
    exchange = partial(_gathered, size=size, group=group)
    if comm == "shm":
        transport = shm = ShmTransport(rank, size, exchange, plain, timeout)
        if link is not None:
            transport = EmulatedLink(shm, link, exchange)
    elif comm == "nccl" and name == "tp":
        try:
            transport = SymmetricTransport.open(rank, exchange, plain)
        except Unavailable as error:
            transport = replace(plain, why=str(error))
    track = ledger.track(name, tuple(dist.get_process_group_ranks(group)))
    return Axis(name, rank, size, transport, ledger, track=track)


def new_axis(world: World, name: str, lines: list[list[int]], timeout: float) -> Axis | None:
    """An axis over that line of ranks that has this one; None if none has. All ranks call this."""
    found, over = None, "gloo" if name == "dp" and world.comm == "shm" else world.comm
    for line in lines:
        group = dist.new_group(line, timedelta(seconds=timeout)) if len(line) > 1 else None
        if world.rank in line:
            found = make_axis(name, group, over, world.ledger, timeout, world.link)
            found.track.queued = deque()
    return found


@contextmanager
def start(options: Any, tp: int, prog: str, shared: dict[str, Any]) -> Iterator[World]:
    """The world of this run, inside the block. options: RunOptions. tp: 0 = world size. shared:
    options that must be the same on all ranks. rank = (dp_rank * pp + pp_rank) * tp + tp_rank: a tp
    group stays on one host if it fits."""
    launch, ledger = Launch.from_environment(), Ledger()
    shape = sizes(launch.size, tp, prog, getattr(options, "pp", 1))
    device = pick_device(options.device, launch)
    link = Link.parse(options.link) if options.link else None
    comm = pick_comm(options.comm, device, launch, shape[2], link=link)
    set_threads(options.threads, device, launch)
    if options.compile:
        check_compiler(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1:
        axes = Axis("tp", ledger=ledger), Axis("dp", ledger=ledger)
        yield World(0, 1, device, comm, *axes, ledger, launch=launch)
        return
    store, holds = open_store(launch, options.start_timeout)
    mine = {"device": str(device), "gpu": gpu_name(device), "options": shared, **vars(Peer.here())}
    attempt, statements = call_roll(store, launch.rank, launch.size, mine, options.start_timeout)
    check_statements(statements)
    same_gpu = share_gpus(statements, options.oversubscribe)
    comm = pick_comm(options.comm, device, launch, shape[2], same_gpu, link)
    peers = tuple(Peer(stated["host"], stated["pid"], stated["space"]) for stated in statements)
    if launch.rank == 0:
        warn_of_hosts(peers, shape[2], prog)
    store = dist.PrefixStore(attempt, store)
    watch = Watch(store, holds, launch, peers, ledger, options.start_timeout, prog)
    watch.start()
    try:
        world = _connect(store, watch, shape, device, comm, link, options)
    except BaseException:
        watch.stop()  # this rank's own fault, which world/entry.py reports
        raise
    yield world
    watch.stop()
    dist.destroy_process_group()


def _connect(
    store: Any, watch: Watch, shape: tuple[int, int, int], device: torch.device, comm: str,
    link: Link | None, options: Any,
) -> World:
    """The world after the roll call. shape: (dp, pp, tp)."""
    seconds, ledger, launch = options.comm_timeout + LATER_S, watch.ledger, watch.launch
    limit, nccl = timedelta(seconds=seconds), comm == "nccl"
    store.set_timeout(limit)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",  # host memory always goes over gloo
        timeout=limit, device_id=device if nccl else None, store=store, rank=launch.rank,
        world_size=launch.size,
    )  # fmt: skip
    groups = make_groups(*shape, seconds)
    over = "gloo" if comm == "shm" else comm
    dp_axis, pp_axis, ends = (make_axis(name, groups.get(name), over, ledger)
                              for name in ("dp", "pp", "ends"))  # fmt: skip
    try:
        tp_axis = make_axis("tp", groups.get("tp"), comm, ledger, seconds, link)
    except Unavailable as error:
        if options.comm == "shm" or link is not None:
            without = " without --link" * (link is not None)
            raise UserError(f"--comm=shm: {error}. Use --comm=gloo{without}.") from None
        comm = "gloo"
        tp_axis = make_axis("tp", groups.get("tp"), comm, ledger)
        if tp_axis.rank == 0:
            slower = "ranks talk over gloo, which is slower than shared memory"
            print_error(f"{watch.prog}: {slower}: {error}")
    world = World(
        launch.rank, launch.size, device, comm, tp_axis, dp_axis, ledger, groups, watch.peers,
        launch, ledger.track("world", tuple(range(launch.size))), watch, link, pp_axis, ends,
    )  # fmt: skip
    _test(world)
    for track in ledger.tracks:
        track.queued = deque()
    watch.limit = options.comm_timeout
    # From here on the watchdog sees every call, and counts only seconds in which this process runs.
    # torch's clock also runs while a batch system or a laptop's lid has stopped all ranks.
    for group in (None, *groups.values()):
        dist.distributed_c10d._set_pg_timeout(timedelta(days=30), group)
    return world


def _test(world: World) -> None:
    """One tiny message along each axis: a transport that does not work fails at the start."""
    for axis in (world.tp, world.dp, world.pp, world.ends):
        if axis.transport is not None:
            what = f"{axis.name} over {axis.transport.name}"
            with world.ledger.during("start-up"), world.waiting("all_reduce", what):
                total = axis.transport.all_reduce(torch.ones(1, device=world.device), "sum").item()
                if total != axis.size:
                    raise RuntimeError(f"{axis.size} ones add up to {total:g}")

"""Start-up and shutdown of a run: the roll call, the groups and axes of the dp x tp mesh, how a run ends."""

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from base.errors import UserError
from base.native import Unavailable
from base.processes import answer
from parallel.collectives import Axis, GroupTransport, Transport
from parallel.ledger import Entry, Ledger, Track
from parallel.shm import ShmTransport
from parallel.symmetric import SymmetricTransport
from world.devices import check_compiler, gpu_name, pick_comm, pick_device, set_threads, share_gpus
from world.launch import Launch, open_store
from world.roll_call import call_roll, ranks_text
from world.watch import ANSWER_S, Peer, Watch, first_to_say

# at the start torch's transports give up this much later than the watchdog, which knows more and says it
LATER_S = 30.0


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

    def waiting(self, op: str, what: str = "") -> Track:
        """Within, this rank waits for others, and not along an axis; the watchdog knows of it."""
        return self.ledger.calling(self.track, Entry(None, what, "", op), 0)

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
    store, holds = open_store(launch, options.start_timeout)
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

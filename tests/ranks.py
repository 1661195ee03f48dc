"""run_ranks: a world of forked ranks, in a tenth of a second."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from base.errors import Unavailable
from base.native import load
from inference.packed import SOURCES
from parallel.collectives import Axis
from parallel.ledger import Ledger
from world.mesh import World, make_axis, make_groups

PYTHON = sys.executable  # conftest.py puts a quicker one in its place
TIMEOUT = 90.0


def in_panels(outputs: int) -> int:
    """The outputs of a packed matrix, with those that fill its last panel."""
    panel: int = load(*SOURCES).nanotp_panel()
    return -(-outputs // panel) * panel


def run_ranks(
    size: int, body: Any, *args: Any, tp: int | None = None, pp: int = 1, comm: str = "shm"
) -> list[Any]:
    """Run `body(world, *args)` on `size` ranks; returns what each returned, in rank order.

    comm: the tp axis's transport: shm (gloo where that cannot be had), which the commands choose for ranks on CPU cores, or
    gloo, whose messages torch.profiler sees, at 1 ms of the system's time each: for tests that are about those.
    The first rank to fail ends the others; its error is raised here, with its traceback. A failure that is only the
    echo of a lost peer gives way to the one that caused it.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        shape = size, pp, tp or size // pp, comm
        ranks = [context.Process(target=_rank, args=(rank, *shape, scratch, body, args)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + TIMEOUT
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        late = [i for i, rank in enumerate(ranks) if rank.is_alive()]
        failed = [i for i, rank in enumerate(ranks) if rank.exitcode]
        if failed:
            time.sleep(0.1)  # the cause may be written just after its echo
        for rank in ranks:
            rank.kill()
            rank.join()
        errors = [file.read_text() for file in sorted(Path(scratch).glob("error-*"))]
        # what gloo and shared memory say of a rank that has left
        causes = [error for error in errors if "by peer" not in error and "of the group has ended" not in error] or errors
        if causes:
            raise AssertionError(causes[0])
        if failed or late:
            raise AssertionError(f"ranks {failed} died, ranks {late} did not finish in {TIMEOUT} s")
        return [pickle.loads((Path(scratch) / f"result-{i}").read_bytes()) for i in range(size)]


def _rank(rank: int, size: int, pp: int, tp: int, comm: str, scratch: str, body: Any, args: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ledger = Ledger()
        dist.init_process_group(
            "gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=size, timeout=timedelta(seconds=20)
        )
        groups = make_groups(size // tp // pp, pp, tp, timeout=20)
        try:
            tp_axis = make_axis("tp", groups.get("tp"), comm, ledger)
        except Unavailable:
            tp_axis = make_axis("tp", groups.get("tp"), "gloo", ledger)
        said = tp_axis.transport.name if tp_axis.transport else "gloo" if size > 1 else "none"
        dp_axis, pp_axis, ends = (make_axis(name, groups.get(name), "gloo", ledger) for name in ("dp", "pp", "ends"))
        world = World(rank, size, torch.device("cpu"), said, tp_axis, dp_axis, ledger, groups, pp=pp_axis, ends=ends)
        result = body(world, *args)
        world.barrier()  # one that leaves while another is still connecting would be missed
        dist.destroy_process_group()
        (Path(scratch) / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(scratch) / f"error-{rank}").write_text(f"rank {rank} of {size}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def alone() -> Axis:
    """A tp axis of size 1."""
    return Axis("tp")

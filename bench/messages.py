"""All-reduces of many sizes over every transport that can run here."""

import sys
import time
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from base.native import Unavailable
from bench.rounds import Bench, numbers, spread, table
from cli.options import BenchAllreduceOptions
from parallel.collectives import Axis, all_reduce
from plan.cost import ring_bytes
from world.mesh import World, make_axis


def allreduce(world: World, options: BenchAllreduceOptions) -> None:
    bench = Bench(world, options)
    if world.size == 1:
        command = "torchrun --standalone --nproc_per_node=2 bench_tp.py allreduce"
        raise UserError(f"bench_tp.py allreduce needs ranks: {command}")
    sizes = numbers(options.sizes, "sizes", "numbers of bytes")
    axes = {}
    for comm in ("nccl",) if world.device.type == "cuda" else ("shm", "gloo"):
        try:
            axes[comm] = make_axis("tp", world.groups.get("tp"), comm, world.ledger)
        except Unavailable as error:
            print(f"{comm}: {error}", file=sys.stderr)
    found: list[dict[str, Any]] = []
    for nbytes in sizes:
        found.append({"bytes": nbytes, "us": microseconds(world, axes, nbytes, options.repeats)})
    rows = [["bytes"]]
    rows[0] += [head for comm in axes for head in (f"{comm} median", "min", "bus GB/s")]
    for line in found:
        rows.append([f"{line['bytes']:,}"])
        for us in line["us"].values():
            bus = ring_bytes(line["bytes"], world.size) / us["median"] / 1e3
            rows[-1] += [f"{us['median']:,.1f}", f"{us['min']:,.1f}", f"{bus:.2f}"]
    ranks = f"{world.size} ranks of {torch.get_num_threads()} threads"
    head = f"all-reduce over {ranks}, float32; microseconds of a call"
    bench.finish("allreduce", {"sizes": found}, [head, *table(rows, 0)])


def microseconds(world: World, axes: dict[str, Axis], nbytes: int, repeats: int) -> dict[str, Any]:
    """The spread of an all-reduce's time over each axis, which take turns."""
    message = torch.randn(max(1, nbytes // 4), device=world.device)
    calls = max(5, min(300, (1 << 24) // nbytes))
    times: dict[str, list[float]] = {comm: [] for comm in axes}
    for _ in range(repeats):
        for comm, axis in axes.items():
            world.barrier()
            timed = [1e6 * timed_call(world, message, axis) for _ in range(3 + calls)]
            times[comm] += timed[3:]  # the first ones warm up
    return {comm: spread(found) for comm, found in times.items()}


def timed_call(world: World, message: Tensor, axis: Axis) -> float:
    started = time.perf_counter()
    all_reduce(message, axis, "forward")
    world.synchronize()
    return time.perf_counter() - started

"""Messages, measured: all-reduces of many sizes over every transport."""

import sys
import time
from typing import Any

import torch

from base.errors import UserError
from base.native import Unavailable
from bench.rounds import Bench, spread
from cli.options import BenchAllreduceOptions
from parallel.collectives import all_reduce
from plan.cost import ring_bytes
from report import report
from world.mesh import World, make_axis


def allreduce(world: World, options: BenchAllreduceOptions) -> None:
    bench = Bench(world, options, ())
    if world.size == 1:
        raise UserError("bench_tp.py allreduce needs ranks: torchrun --standalone --nproc_per_node=2 bench_tp.py allreduce")
    try:
        sizes = [int(word) for word in options.sizes.split(",")]
    except ValueError:
        raise UserError(f"--sizes={options.sizes} are not numbers of bytes with commas between.") from None
    axes = {}
    for comm in ("nccl",) if world.device.type == "cuda" else ("shm", "gloo"):
        try:
            axes[comm] = make_axis("tp", world.groups.get("tp"), comm, world.ledger)
        except Unavailable as error:
            print(f"{comm}: {error}", file=sys.stderr)
    found: list[dict[str, Any]] = []
    for nbytes in sizes:
        message = torch.randn(max(1, nbytes // 4), device=world.device)
        calls = max(5, min(300, (1 << 24) // nbytes))
        times: dict[str, list[float]] = {comm: [] for comm in axes}
        for _ in range(options.repeats):
            for comm, axis in axes.items():
                world.barrier()
                for i in range(calls + 3):
                    started = time.perf_counter()
                    all_reduce(message, axis, "forward")
                    world.synchronize()
                    if i >= 3:
                        times[comm].append(time.perf_counter() - started)
        row = {comm: spread([1e6 * t for t in seconds]) for comm, seconds in times.items()}
        found.append({"bytes": nbytes, "us": row})
    lines = [f"all-reduce over {world.size} ranks of {torch.get_num_threads()} threads, float32; microseconds of a call"]
    lines.append(f"{'bytes':>12}" + "".join(f"{comm + ' median':>14}{'min':>10}{'bus GB/s':>10}" for comm in axes))
    for line in found:
        cells = ""
        for comm in axes:
            us = line["us"][comm]
            bus = ring_bytes(line["bytes"], world.size) / us["median"] / 1e3
            cells += f"{us['median']:>14,.1f}{us['min']:>10,.1f}{bus:>10.2f}"
        lines.append(f"{line['bytes']:>12,}{cells}")
    if world.is_main and options.plot:
        plt = report.pyplot()
        figure, plane = plt.subplots(figsize=(7, 4))
        for comm in axes:
            plane.plot(sizes, [line["us"][comm]["median"] for line in found], marker="o", label=comm)
        plane.set(xscale="log", yscale="log", xlabel="bytes", ylabel="microseconds", title=f"all-reduce, {world.size} ranks")
        plane.legend()
        figure.tight_layout()
        report.write_figure(options.plot, figure)
    bench.finish("allreduce", {"sizes": found}, lines)

"""The machine's measured peaks, and what share of them a run has used.

MBU: bytes of weights that decoding reads a second, over the memory bandwidth. MFU: operations of
the model's products a second, counted as nanoGPT counts them, over the rate of a large product of
the same precision. All ranks measure at once.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plan.partition import Partition
from world.mesh import World

COPIED_BYTES = 1 << 28  # in a GPU's memory: more than its cache holds
LEAST_BYTES = 1 << 14  # smaller weights are not read: a torch call takes microseconds
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
WINDOW_S = 0.05
WINDOWS = 5  # the best one counts: other programs may be running


def best_rate(world: World, once: Callable[[], object], amount: float) -> float:
    """The sum over all ranks of `amount` per second, if each call of `once` does `amount`."""
    best = 0.0
    for _ in range(1 + WINDOWS):  # the first one maps memory and loads kernels
        world.barrier()
        count, started, seconds = 0, time.perf_counter(), 0.0
        while seconds < WINDOW_S:
            once()
            world.synchronize()
            count, seconds = count + 1, time.perf_counter() - started
        best = max(best, sum(world.gather(count * amount / seconds)))
    return best


def _buffer(world: World, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Memory for a measurement; None on all ranks if one rank has none left."""
    made = None
    with suppress(RuntimeError, MemoryError):
        made = torch.full(shape, 0.5, device=world.device, dtype=dtype)
    return made if all(world.gather(made is not None)) else None


def bandwidth(world: World, weights: list[Tensor]) -> float:
    """Memory bandwidth in bytes a second; 0 if there is no memory to measure it. On a CPU, of
    reading these weights: where they lie (cache, socket) decides the speed. On a GPU, of a copy
    (each byte is read once and written once)."""
    if world.device.type != "cuda":
        parts = [w.detach().flatten().view(torch.uint8) for w in weights if w.nbytes >= LEAST_BYTES]
        words = [part[: len(part) // 8 * 8].view(torch.int64) for part in parts]  # the fastest sum
        return best_rate(world, lambda: [w.sum() for w in words], sum(w.nbytes for w in words))
    buffer = _buffer(world, (2, COPIED_BYTES // 4), torch.float32)
    if buffer is None:
        return 0.0
    # the host waits once for eight copies
    return best_rate(
        world, lambda: [buffer[1].copy_(buffer[0]) for _ in range(8)], 16 * COPIED_BYTES
    )


def arithmetic(world: World, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product; 0 if there is no memory to measure it."""
    n = SIDE.get(world.device.type, SIDE["cpu"])
    matrix = _buffer(world, (n, n), dtype)
    if matrix is None:
        return 0.0
    matrix.uniform_(-1, 1)  # a GPU multiplies equal numbers faster than random ones
    return best_rate(world, lambda: torch.mm(matrix, matrix), 2.0 * n**3)


def operations(split: Partition, length: float, backward: bool) -> float:
    """Operations of the model's products for a token that attends to `length` tokens, as nanoGPT
    counts them (PaLM, arXiv 2204.02311, appendix B): two a parameter, and those of the scores;
    three times as many with the backward pass."""
    weights = split.count() - split.block_size * split.n_embd
    forward = 2.0 * weights + 4.0 * split.n_layer * split.n_embd * length
    return 3.0 * forward if backward else forward


@dataclass(frozen=True)
class Use:
    """What a run used. operations: a second, of products in `dtype`. read: bytes of `weights` read
    a second by all ranks; 0 if that does not bound the run."""

    operations: float
    dtype: torch.dtype
    read: float = 0.0
    weights: list[Tensor] = field(default_factory=list)

    def figures(self, world: World) -> dict[str, Any]:
        """The report's `utilisation`. All ranks call this."""
        found: dict[str, Any] = {}
        if self.read:
            found["bandwidth_bytes_per_s"] = peak = bandwidth(world, self.weights)
            found["mbu"] = round(self.read / peak, 6) if peak else 0.0
        found["peak_operations_per_s"] = peak = arithmetic(world, self.dtype)
        found["mfu"] = round(self.operations / peak, 6) if peak else 0.0
        return found


def text(figures: dict[str, Any], what: str, precision: str) -> str:
    """`decoding: MBU 78.1% of the 27.3 GB/s at which its weights can be read, MFU ...`"""
    parts = []
    if mbu := figures.get("mbu"):
        peak = f"{figures['bandwidth_bytes_per_s'] / 1e9:,.1f} GB/s"
        parts.append(f"MBU {mbu:.1%} of the {peak} at which its weights can be read")
    if mfu := figures.get("mfu"):
        giga = figures["peak_operations_per_s"] / 1e9
        peak = f"{giga:,.1f} GFLOP/s" if giga < 1e4 else f"{giga / 1e3:,.1f} TFLOP/s"
        parts.append(f"MFU {mfu:.1%} of {peak} (a large {precision} product)")
    return f"{what}: {', '.join(parts) or 'no memory was left to measure the peak'}"

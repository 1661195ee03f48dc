"""What the machine gives while all ranks ask for it at once, and how much of that a run has used.

MBU: bytes of weights that decoding reads a second over those that memory gives. MFU: operations of the model's products a
second over what a large product of the same precision gets, counted as nanoGPT counts them.
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
LEAST_BYTES = 1 << 14  # of a weight that is read: a call of torch's takes microseconds
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
WINDOW_S = 0.05
WINDOWS = 5  # the best counts: other programs may run beside


def together(world: World, once: Callable[[], object], amount: float) -> float:
    """What all ranks together get done a second where each call of `once` gets `amount` done."""
    best = 0.0
    for _ in range(1 + WINDOWS):  # in the first one memory is mapped, and kernels are loaded
        world.barrier()
        count, started, seconds = 0, time.perf_counter(), 0.0
        while seconds < WINDOW_S:
            once()
            world.synchronize()
            count, seconds = count + 1, time.perf_counter() - started
        best = max(best, sum(world.gather(count * amount / seconds)))
    return best


def _room(world: World, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Memory for a measurement; None on all ranks where one has none left: the run comes first."""
    made = None
    with suppress(RuntimeError, MemoryError):
        made = torch.full(shape, 0.5, device=world.device, dtype=dtype)
    return made if all(world.gather(made is not None)) else None


def bandwidth(world: World, weights: list[Tensor]) -> float:
    """Bytes a second that memory gives: on a CPU for reading these weights themselves, as where they lie
    matters (its caches, another socket's memory); on a GPU for a copy (a byte read, a byte written)."""
    if world.device.type != "cuda":
        words = [w.detach().flatten().view(torch.uint8) for w in weights if w.nbytes >= LEAST_BYTES]
        words = [w[: len(w) // 8 * 8].view(torch.int64) for w in words]  # summed as fast as they come
        return together(world, lambda: [w.sum() for w in words], sum(w.nbytes for w in words))
    buffer = _room(world, (2, COPIED_BYTES // 4), torch.float32)
    if buffer is None:
        return 0.0

    def copy() -> None:
        for _ in range(8):  # long beside the host's wait for the last
            buffer[1].copy_(buffer[0])

    return together(world, copy, 16 * COPIED_BYTES)


def arithmetic(world: World, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product in this precision."""
    n = SIDE.get(world.device.type, SIDE["cpu"])
    matrix = _room(world, (n, n), dtype)
    if matrix is None:
        return 0.0
    matrix.uniform_(-1, 1)  # a GPU multiplies equal numbers faster than it does a model's
    return together(world, lambda: torch.mm(matrix, matrix), 2.0 * n**3)


def operations(split: Partition, length: float, backward: bool) -> float:
    """Of the model's matrix products for one token whose attention sees `length` tokens (PaLM, arXiv
    2204.02311, appendix B; nanoGPT counts the same): two a parameter, and those of the scores. The
    backward pass has twice as many."""
    weights = split.count() - split.block_size * split.n_embd
    forward = 2.0 * weights + 4.0 * split.n_layer * split.n_embd * length
    return 3.0 * forward if backward else forward


@dataclass(frozen=True)
class Use:
    """What a run has used a second, of what there was. dtype: of its products. read: bytes of `weights`
    over all ranks, 0 where reading them is not what bounds it."""

    operations: float
    dtype: torch.dtype
    read: float = 0.0
    weights: list[Tensor] = field(default_factory=list)

    def figures(self, world: World) -> dict[str, Any]:
        """The report's `utilisation`; every rank calls this."""
        found: dict[str, Any] = {}
        if self.read:
            found["bandwidth_bytes_per_s"] = peak = bandwidth(world, self.weights)
            found["mbu"] = round(self.read / peak, 6) if peak else 0.0
        found["peak_operations_per_s"] = peak = arithmetic(world, self.dtype)
        found["mfu"] = round(self.operations / peak, 6) if peak else 0.0
        return found


def text(figures: dict[str, Any], what: str, precision: str) -> str:
    """`decoding: MBU 78.1% of 27.3 GB/s, ...`: the figures and what they are held against."""
    words = []
    if figures.get("mbu"):
        most = figures["bandwidth_bytes_per_s"] / 1e9
        words.append(
            f"MBU {figures['mbu']:.1%} of the {most:,.1f} GB/s at which its weights can be read"
        )
    if figures.get("mfu"):
        most = figures["peak_operations_per_s"] / 1e9
        unit, most = ("TFLOP/s", most / 1e3) if most >= 1e4 else ("GFLOP/s", most)
        words.append(
            f"MFU {figures['mfu']:.1%} of {most:,.1f} {unit} (a large {precision} product)"
        )
    return (
        f"{what}: {', '.join(words)}"
        if words
        else f"{what}: no memory was left to measure the peak"
    )

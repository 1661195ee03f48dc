"""The transport for ranks on one CPU host: collectives through shared memory, in a few microseconds.

The work is done by parallel/shm.c. Where that cannot be compiled the ranks agree to go on without, and say why.

The memory has no name: it is a file descriptor of rank 0 that the others open through /proc. It is gone with the last
process that holds it, however that ends, and a small /dev/shm does not limit it.
"""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.native import Unavailable, load
from base.processes import Exchange, is_running, on_all
from parallel.collectives import Transport
from plan.partition import spans

SOURCE = Path(__file__).with_name("shm.c")
LINE = 64  # bytes of a rank's header
SLOT_BYTES = 1 << 20  # two a rank; smaller ones cost more waits, larger ones leave the cache
PATIENCE_S = 0.1  # how often a waiting rank looks whether its peers are alive, and lets Python see a signal

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_BYTES = 2
_OPS = {"sum": 0, "max": 1}
_GATHER, _BROADCAST, _SUM_PART, _GATHER_PARTS = 2, 3, 4, 5
_DONE, _DIFFERENT = -1, -2

# --- the memory -----------------------------------------------------------------------------------------------------


class _Group(ctypes.Structure):
    """`group` in parallel/shm.c."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
        ("piece", ctypes.c_uint64),
        ("at", ctypes.c_int64),
        ("posted", ctypes.c_int64),
    ]


def _create(nbytes: int) -> int:
    """The descriptor of new shared memory, all zero and all there: a later write cannot fail for want of it."""
    if not hasattr(os, "memfd_create"):
        raise Unavailable("this system has no memfd_create")
    memory = -1
    try:
        memory = os.memfd_create("nanotp")
        os.posix_fallocate(memory, 0, nbytes)
    except OSError as error:
        if memory >= 0:
            os.close(memory)
        raise Unavailable(f"{nbytes / 1e6:.0f} MB of shared memory cannot be had ({error.strerror})") from None
    return memory


def _attach(pid: int, descriptor: int, nbytes: int) -> mmap.mmap:
    """The shared memory that is `descriptor` in process `pid`."""
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "r+b", buffering=0) as file:
            return mmap.mmap(file.fileno(), nbytes)
    except (OSError, ValueError) as error:
        raise Unavailable(f"the shared memory of rank 0 cannot be opened ({error})") from None


# --- the transport --------------------------------------------------------------------------------------------------


class ShmTransport:
    """Collectives of one host's ranks through shared memory; see parallel/shm.c. All results are the same bits on all ranks.

    float32 and bfloat16 are added here; what other dtypes there are, and other devices, goes to `other`.
    A call raises RuntimeError that names the rank where a peer has ended, has not come after `timeout` seconds, or has
    brought another message.
    """

    name = "shm"

    def __init__(self, call: Any, memory: mmap.mmap, rank: int, pids: list[int], other: Transport, timeout: float):
        self.rank, self.size, self.pids, self.other, self.timeout = rank, len(pids), pids, other, timeout
        self._call = call
        self._memory = memory  # mapped for as long as this lives
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._group = _Group(base, rank, self.size, SLOT_BYTES, 0, 0, 0)
        self._at = ctypes.addressof(self._group)

    @classmethod
    def open(cls, rank: int, size: int, exchange: Exchange, other: Transport, timeout: float) -> "ShmTransport":
        """The transport of a group; every rank of it calls this. Unavailable on all of them where it is so on one.

        rank, size: in the group. timeout: seconds that a rank is waited for.
        """
        nbytes = size * (LINE + 2 * SLOT_BYTES)
        move = on_all(exchange, lambda: load(SOURCE)).nanotp_move
        move.restype = ctypes.c_int64
        move.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4 + [ctypes.c_void_p, ctypes.c_double]
        descriptor = on_all(exchange, lambda: _create(nbytes) if rank == 0 else None)
        try:
            places = exchange((os.getpid(), descriptor))
            pid, theirs = places[0]
            memory = on_all(exchange, lambda: _attach(pid, theirs, nbytes))
        finally:
            if rank == 0:
                os.close(descriptor)  # all have mapped it, or nobody will
        return cls(move, memory, rank, [pid for pid, _ in places], other, timeout)

    def _move(self, x: Tensor, out: Tensor, n: int, kind: int, op: int, source: int = 0, edges: Any = None) -> Tensor:
        """x must be contiguous, on the CPU and not `out`."""
        came = self._call(self._at, x.data_ptr(), out.data_ptr(), n, kind, op, source, edges, PATIENCE_S)
        if came != _DONE:
            self._wait(came, (self._at, x.data_ptr(), out.data_ptr(), n, kind, op, source, edges, PATIENCE_S))
        return out

    def _parts(self, tokens: int, width: int) -> tuple[int, Any]:
        """(this rank's tokens, where each rank's begin and the last one's end, in a C array) of `tokens`, `width` elements
        each."""
        runs = spans(tokens, self.size)
        lo, hi = runs[self.rank]
        edges = [lo * width for lo, _ in runs] + [tokens * width]
        return hi - lo, (ctypes.c_int64 * len(edges))(*edges)

    def _wait(self, late: int, call: tuple[Any, ...]) -> None:
        """Go on with a call that a rank has kept waiting."""
        waited = 0.0  # while this process runs: it may be stopped, with all others
        while late != _DONE:
            if late <= _DIFFERENT:
                raise RuntimeError(f"rank {_DIFFERENT - late} of the group brought another message than rank {self.rank}")
            if not is_running(self.pids[late]):
                raise RuntimeError(f"rank {late} of the group has ended (process {self.pids[late]})")
            if (waited := waited + PATIENCE_S) > self.timeout:
                raise RuntimeError(f"rank {late} of the group did not come within {self.timeout:g} s")
            late = self._call(*call)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        kind = _TYPES.get(x.dtype)
        if kind is None or x.device.type != "cpu":
            return self.other.all_reduce(x, op)
        x = x.detach().contiguous()
        return self._move(x, torch.empty_like(x), x.numel(), kind, _OPS[op])

    def all_gather(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.other.all_gather(x)
        x = x.detach().contiguous()
        return self._move(x, x.new_empty((self.size, *x.shape)), x.nbytes, _BYTES, _GATHER)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        if x.device.type != "cpu":
            return self.other.broadcast(x, source)
        x = x.detach().contiguous()
        return self._move(x, torch.empty_like(x), x.nbytes, _BYTES, _BROADCAST, source)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        kind = _TYPES.get(x.dtype)
        if kind is None or x.device.type != "cpu":
            return self.other.reduce_scatter(x)
        x = x.detach().contiguous()
        B, T, C = x.shape
        own, edges = self._parts(T, C)
        return self._move(x, x.new_empty(B, own, C), x.numel(), kind, _SUM_PART, edges=edges)

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        if x.device.type != "cpu":
            return self.other.gather_tokens(x, tokens)
        x = x.detach().contiguous()
        B, _, C = x.shape
        out = x.new_empty(B, tokens, C)
        _, edges = self._parts(tokens, C * x.element_size())
        return self._move(x, out, out.nbytes, _BYTES, _GATHER_PARTS, edges=edges)

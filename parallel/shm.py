"""The transport for ranks on one CPU host: collectives through shared memory, in microseconds.

parallel/shm.c does the work. If it cannot be compiled, the ranks agree to do without, and say why.
The memory has no name: it is a file descriptor of rank 0, which the others open through /proc. It
ends with the last process that holds it, however that ends, and /dev/shm does not limit it.
"""

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import Unavailable
from base.native import load
from base.processes import Exchange, is_running, on_all
from parallel.collectives import Transport
from plan.partition import spans

SOURCE = Path(__file__).with_name("shm.c")
LINE = 128  # bytes of a rank's header
SLOT_BYTES = 1 << 20  # smaller ones cost more waits, larger ones leave the cache
SLOTS = 2  # of a rank
LATE_SLOTS, LATE_BYTES = 8, 1 << 19  # for sums that are waited for later
PATIENCE_S = 0.1  # a waiting rank then checks that its peers live, and lets Python see a signal

_TYPES, _BYTES = {torch.float32: 0, torch.bfloat16: 1}, 2
_OPS = {"sum": 0, "max": 1}
_GATHER, _GATHER_TOKENS, _BROADCAST = 2, 3, 4  # a broadcast from rank r is _BROADCAST + r
_DONE, _DIFFERENT = -1, -2


class _Group(ctypes.Structure):
    """`group` in parallel/shm.c."""

    _fields_ = [("base", ctypes.c_void_p)] + [
        (name, ctypes.c_int64)
        for name in ("rank", "size", "slots", "slot_bytes", "piece", "at", "posted")
    ]


def _create(nbytes: int) -> int:
    """A descriptor of new shared memory, zero and allocated: a later write cannot fail."""
    if not hasattr(os, "memfd_create"):
        raise Unavailable("this system has no memfd_create")
    memory = -1
    try:
        memory = os.memfd_create("nanotp")
        os.posix_fallocate(memory, 0, nbytes)
    except OSError as error:
        if memory >= 0:
            os.close(memory)
        what = f"{nbytes / 1e6:.0f} MB of shared memory cannot be had"
        raise Unavailable(f"{what} ({error.strerror})") from None
    return memory


def _attach(pid: int, descriptor: int, nbytes: int) -> mmap.mmap:
    """The shared memory that is `descriptor` in process `pid`."""
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "r+b", buffering=0) as file:
            return mmap.mmap(file.fileno(), nbytes)
    except (OSError, ValueError) as error:
        raise Unavailable(f"the shared memory of rank 0 cannot be opened ({error})") from None


def share(rank: int, nbytes: int, exchange: Exchange) -> tuple[mmap.mmap, list[int]]:
    """Memory that all ranks of a group have mapped, and their processes; each of them calls this.
    Raises Unavailable on all if one has none."""
    descriptor = on_all(exchange, lambda: _create(nbytes) if rank == 0 else None)
    try:
        places = exchange((os.getpid(), descriptor))
        pid, theirs = places[0]
        return on_all(exchange, lambda: _attach(pid, theirs, nbytes)), [pid for pid, _ in places]
    finally:
        if rank == 0:
            os.close(descriptor)  # all have mapped it, or nobody will


class ShmTransport:
    """Collectives of one host's ranks through shared memory, of tensors on the CPU.

    float32 and bfloat16 are added here; `other` adds other dtypes. A call raises a RuntimeError
    that names the rank if a peer has ended, does not come within `timeout` seconds, or sends
    another message. rank, size: in the group.
    """

    name = "shm"

    def __init__(self, rank: int, size: int, exchange: Exchange, other: Transport,
                 timeout: float) -> None:
        """Every rank of the group calls this. Raises Unavailable on all of them if one has no
        shared memory."""
        self.rank, self.size, self.other, self.timeout = rank, size, other, timeout
        half = size * (LINE + SLOTS * SLOT_BYTES)
        nbytes = half + size * (LINE + LATE_SLOTS * LATE_BYTES)
        library = on_all(exchange, lambda: load(SOURCE))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for name, parameters in {"move": [*[pointer] * 3, *[number] * 3, pointer],
                                 "post": [pointer, pointer, number, number],
                                 "finish": [pointer, pointer, number, number]}.items():
            function = getattr(library, f"nanotp_{name}")
            function.restype, function.argtypes = number, [*parameters, ctypes.c_double]
        self._library = library
        self._memory, self.pids = share(rank, nbytes, exchange)  # mapped while it is kept
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._groups = (_Group(base, rank, size, SLOTS, SLOT_BYTES, 0, 0, 0),
                        _Group(base + half, rank, size, LATE_SLOTS, LATE_BYTES, 0, 0, 0))
        self._at, self._late_at = map(ctypes.addressof, self._groups)
        self._late = deque[Callable[[], None]]()  # finish the sums under way, oldest first

    def _move(self, x: Tensor, out: Tensor, n: int, kind: int, op: int,
              edges: list[int] | None = None) -> Tensor:
        """x must be contiguous and not `out`. See nanotp_move in parallel/shm.c."""
        ends = None if edges is None else (ctypes.c_int64 * len(edges))(*edges)
        self._until_done(self._library.nanotp_move, self._at, x.data_ptr(), out.data_ptr(), n, kind,
                         op, ends)
        return out

    def _until_done(self, function: Any, *call: Any) -> None:
        waited = 0.0  # counted here: this process and all others may be stopped for a while
        while (late := function(*call, PATIENCE_S)) != _DONE:
            if late <= _DIFFERENT:
                whose = f"rank {_DIFFERENT - late} of the group brought another message"
                raise RuntimeError(f"{whose} than rank {self.rank}")
            rank, pid = f"rank {late} of the group", self.pids[late]
            if not is_running(pid):
                raise RuntimeError(f"{rank} has ended (process {pid})")
            if (waited := waited + PATIENCE_S) > self.timeout:
                raise RuntimeError(f"{rank} did not come within {self.timeout:g} s")

    def _edges(self, tokens: int, width: int) -> list[int]:
        """Where each rank's tokens of `width` elements begin, and where the last one's end."""
        return [lo * width for lo, _ in spans(tokens, self.size)] + [tokens * width]

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        if (kind := _TYPES.get(x.dtype)) is None:
            return self.other.all_reduce(x, op)
        x = x.detach().contiguous()
        return self._move(x, torch.empty_like(x), x.numel(), kind, _OPS[op])

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the sum of x; the returned function waits for it. A message of more than
        LATE_BYTES, or of another dtype, is summed when it is waited for."""
        kind, x = _TYPES.get(x.dtype), x.contiguous()
        if kind is None or x.nbytes > LATE_BYTES:
            return lambda: self.all_reduce(x, "sum")
        if len(self._late) == LATE_SLOTS:
            self._late.popleft()()
        call = self._late_at, x.data_ptr(), x.numel(), kind
        self._until_done(self._library.nanotp_post, *call)
        out = torch.empty_like(x)

        def finish() -> None:
            self._until_done(self._library.nanotp_finish, call[0], out.data_ptr(), *call[2:])

        self._late.append(finish)

        def wait() -> Tensor:
            while finish in self._late:
                self._late.popleft()()
            return out

        return wait

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        out = x.new_empty((self.size, *x.shape))
        edges = self._edges(self.size, x.nbytes)
        return self._move(x, out, out.nbytes, _BYTES, _GATHER, edges)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        x = x.detach().contiguous()
        edges = [0 if rank <= source else x.nbytes for rank in range(self.size + 1)]
        return self._move(x, torch.empty_like(x), x.nbytes, _BYTES, _BROADCAST + source, edges)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        if (kind := _TYPES.get(x.dtype)) is None:
            return self.other.reduce_scatter(x)
        x = x.detach().contiguous()
        B, T, C = x.shape
        lo, hi = spans(T, self.size)[self.rank]
        out = x.new_empty(B, hi - lo, C)
        return self._move(x, out, x.numel(), kind, _OPS["sum"], self._edges(T, C))

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        x = x.detach().contiguous()
        out = x.new_empty(x.shape[0], tokens, x.shape[2])
        edges = self._edges(tokens, x.shape[2] * x.element_size())
        return self._move(x, out, out.nbytes, _BYTES, _GATHER_TOKENS, edges)

"""The transport for GPUs of one host: one kernel sums a small message out of all GPUs' memory.

nccl starts a pipeline for a message of any size; a decode step sends a few kilobytes twice a layer,
and waits each time. In symmetric memory (torch.distributed._symmetric_memory) every rank has a
buffer that the others have mapped. If one rank has none, the ranks agree to do without.
"""

import socket
from collections.abc import Callable

import torch
from torch import Tensor

from base.errors import Unavailable
from base.processes import Exchange, on_all
from parallel.collectives import GroupTransport

# Every rank reads the whole message of every other. For larger messages it is faster to read a part
# of each: torch's own intra-node all-reduce leaves its one-shot kernel at this size, too.
MOST_BYTES = 256 << 10
ALIGNMENT = 16  # bytes: messages are whole numbers of the widest load
_TYPES = (torch.float32, torch.bfloat16)  # the kernel's
_OP = "symm_mem::one_shot_all_reduce_copy"


class SymmetricTransport:
    """Small sums through symmetric memory, all else through `other`, over nccl. A rank's calls must
    be on one stream, or on streams that wait for each other.

    buffer: [MOST_BYTES] uint8, this rank's symmetric memory. total: (its beginning as a tensor like
    the message, the message) -> the sum of all ranks' messages, a new tensor. Its kernel copies the
    message there and adds in rank order, so all ranks get the same bits; a multicast sum by the
    switch promises no order. It reads when every rank has written its buffer and ends when every
    rank has read it, so the next call may write again.
    """

    name = "symmetric memory"

    def __init__(
        self, buffer: Tensor, total: Callable[[Tensor, Tensor], Tensor], other: GroupTransport
    ) -> None:
        self.buffer, self.total, self.other = buffer, total, other
        self.all_reduce_later = other.all_reduce_later  # nccl has a stream of its own for it
        self.all_gather, self.broadcast = other.all_gather, other.broadcast
        self.reduce_scatter, self.gather_tokens = other.reduce_scatter, other.gather_tokens

    @classmethod
    def open(cls, rank: int, exchange: Exchange, other: GroupTransport) -> "SymmetricTransport":
        """The transport of a group, whose ranks all call this. Raises Unavailable on all of them if
        it is so on one."""
        from torch.distributed import _symmetric_memory as memory

        # one step at a time: a rank that fails must not leave the others waiting in the next step
        on_all(exchange, _check_op)
        places = exchange((socket.gethostname(), torch.cuda.current_device()))
        on_all(exchange, lambda: _check_reach(places, rank))
        device = torch.device("cuda", places[rank][1])
        make = lambda: memory.empty(MOST_BYTES, dtype=torch.uint8, device=device)  # noqa: E731
        buffer = on_all(exchange, make)
        on_all(exchange, lambda: memory.rendezvous(buffer, other.group))
        kernel, group = torch.ops.symm_mem.one_shot_all_reduce_copy, other.group.group_name
        made = cls(buffer, lambda place, x: kernel(place, x, "sum", group), other)
        on_all(exchange, lambda: made._check_sums(rank))
        return made

    def _check_sums(self, rank: int) -> None:
        """Unavailable if a sum differs from nccl's; with such small numbers both are exact."""
        mine = (torch.arange(16, device=self.buffer.device) + rank) % 4
        sums = [[t.all_reduce(mine.to(kind), "sum") for kind in _TYPES] for t in (self, self.other)]
        if not all(map(torch.equal, *sums)):
            name = self.other.name
            raise Unavailable(f"sums through symmetric memory are not those over {name}")

    def _takes(self, x: Tensor, op: str) -> bool:
        fits = 0 < x.nbytes <= len(self.buffer) and x.nbytes % ALIGNMENT == 0
        return op == "sum" and fits and x.dtype in _TYPES and x.device == self.buffer.device

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        if not self._takes(x, op):
            return self.other.all_reduce(x, op)
        place = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        return self.total(place, x.detach().contiguous())


def _check_op() -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CUDA"):
        raise Unavailable(f"torch {torch.__version__} has no {_OP} for GPUs")


def _check_reach(places: list[tuple[str, int]], rank: int) -> None:
    """places: every rank's host and device index, as the rank itself counts devices."""
    if len({host for host, _ in places}) > 1 or len(set(places)) < len(places):
        raise Unavailable("the ranks are not on GPUs of one host that all of them see")
    mine = places[rank][1]
    for _, device in places:
        if device != mine and not torch.cuda.can_device_access_peer(mine, device):
            raise Unavailable(f"GPU {mine} cannot read the memory of GPU {device}")

"""The transport for GPUs of one host: a small message is summed by one kernel that reads it from the other GPUs' memory.

nccl starts a pipeline for a message of any size; a decode step sends a few kilobytes twice a layer, and waits each time.
What symmetric memory is, torch.distributed._symmetric_memory says: every rank has a buffer that the others have mapped.
Where it cannot be had the ranks agree to do without.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base.native import Unavailable
from base.processes import Exchange, on_all
from parallel.collectives import GroupTransport

# Every rank reads the whole message of every other: from some size on it is faster to read a part of each. torch's own
# intra-node all-reduce leaves its one-shot kernel at this size.
MOST_BYTES = 256 << 10
ALIGNMENT = 16  # bytes: messages are whole numbers of the widest load
_TYPES = (torch.float32, torch.bfloat16)  # which the kernel can add
_OP = "symm_mem::one_shot_all_reduce"


@dataclass(frozen=True)
class SymmetricTransport:
    """Small sums through symmetric memory; all else goes to `other`, over nccl. Calls of a rank must be on one stream, or on
    streams that wait for each other.

    buffer: [MOST_BYTES] uint8, this rank's symmetric memory. total: gives the sum of what all ranks have at the beginning
    of it, as a new tensor. Its kernel adds in rank order, so all ranks get the same bits (a multicast sum, which the switch
    makes for each rank by itself, promises no order). It begins when every rank has written its buffer, and ends when every
    rank has read it: the next call may write it again.
    """

    buffer: Tensor
    total: Callable[[Tensor], Tensor]
    other: GroupTransport
    name: str = "symmetric memory"

    @classmethod
    def open(cls, rank: int, exchange: Exchange, other: GroupTransport) -> "SymmetricTransport":
        """The transport of a group; every rank of it calls this. Unavailable on all of them where it is so on one."""
        from torch.distributed import _symmetric_memory as memory

        # one thing at a time: a rank that fails must not leave the others waiting for it within the next
        _on_all(exchange, _check_op)
        places = exchange((socket.gethostname(), torch.cuda.current_device()))
        _on_all(exchange, lambda: _check_reach(places, rank))
        device = torch.device("cuda", places[rank][1])
        buffer = _on_all(exchange, lambda: memory.empty(MOST_BYTES, dtype=torch.uint8, device=device))
        _on_all(exchange, lambda: memory.rendezvous(buffer, other.group))
        made = cls(buffer, lambda x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", other.group.group_name), other)
        _on_all(exchange, lambda: made._check_sums(rank))
        return made

    def _check_sums(self, rank: int) -> None:
        """Unavailable where a sum is not nccl's. The numbers are so small that it is exact."""
        mine = (torch.arange(16, device=self.buffer.device) + rank) % 4
        both = [(self.all_reduce(x, "sum"), self.other.all_reduce(x, "sum")) for x in map(mine.to, _TYPES)]
        if not all(torch.equal(ours, theirs) for ours, theirs in both):
            raise Unavailable(f"sums through symmetric memory are not those over {self.other.name}")

    def _takes(self, x: Tensor, op: str) -> bool:
        fits = 0 < x.nbytes <= len(self.buffer) and x.nbytes % ALIGNMENT == 0
        return op == "sum" and fits and x.dtype in _TYPES and x.device == self.buffer.device

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        if not self._takes(x, op):
            return self.other.all_reduce(x, op)
        message = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        message.copy_(x.detach())
        return self.total(message)

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Over nccl, which has a stream of its own for it."""
        return self.other.all_reduce_later(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self.other.all_gather(x)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self.other.broadcast(x, source)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self.other.reduce_scatter(x)

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        return self.other.gather_tokens(x, tokens)


def _check_op() -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CUDA"):
        raise Unavailable(f"torch {torch.__version__} has no {_OP} for GPUs")


def _check_reach(places: list[tuple[str, int]], rank: int) -> None:
    """places: host and device index of every rank, as the rank itself numbers devices."""
    if len({host for host, _ in places}) > 1 or len(set(places)) < len(places):
        raise Unavailable("the ranks are not on GPUs of one host that all of them see")
    mine = places[rank][1]
    for _, device in places:
        if device != mine and not torch.cuda.can_device_access_peer(mine, device):
            raise Unavailable(f"GPU {mine} cannot read the memory of GPU {device}")


def _on_all(exchange: Exchange, make: Callable[[], Any]) -> Any:
    """`on_all`, for what says with a RuntimeError of torch's that it cannot be had."""

    def tried() -> Any:
        try:
            return make()
        except RuntimeError as error:
            raise Unavailable(str(error).strip().partition("\n")[0]) from None

    return on_all(exchange, tried)

"""A rank's parts of a model's parameters: taken from full tensors, stored, and read back.

Over tp a parameter is split by its Rule, and may be padded. Over dp FSDP2 may shard that part once
more, as a DTensor. Its `to_local` method shows it: importing the class would double the start-up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.tensor_file import runs_of
from parallel.collectives import Axis, all_gather
from plan.partition import Rule, Span


def take(full: Tensor, rule: Rule, rank: int) -> Tensor:
    """The part of a full tensor that a tp rank owns."""
    return runs_of(full, rule.dim, rule.runs_of(rank))


def local_part(tensor: Any) -> tuple[Tensor, Span]:
    """(this dp rank's part of a tensor, which rows it has): all rows unless it is sharded."""
    if not hasattr(tensor, "to_local"):
        return tensor, (0, tensor.shape[0])
    n, mesh = tensor.shape[0], tensor.device_mesh
    most = -(-n // mesh.size())  # torch.chunk's rule
    lo = min(most * mesh.get_local_rank(), n)
    return tensor.to_local(), (lo, min(lo + most, n))


@dataclass(frozen=True)
class Parts:
    """What one tp rank owns of each parameter, and of optimizer state of a parameter's shape. dp:
    the axis over which the parts are sharded once more, if they are."""

    rules: Mapping[str, Rule]
    rank: int
    dp: Axis | None = None

    def _rows(self, name: str, tensor: Tensor) -> int:
        rule = self.rules[name]
        return tensor.shape[0] if rule.rows is None else rule.owned(self.rank)

    @torch.no_grad()
    def store(self, name: str, tensor: Tensor, given: Tensor) -> None:
        """Write what this rank owns, [rows, ...] without padding, into a parameter."""
        shape = [self._rows(name, tensor), *tensor.shape[1:]]
        if shape != list(given.shape):
            raise ValueError(f"{name}: rank {self.rank} holds {shape}, was given {[*given.shape]}")
        local, (lo, hi) = local_part(tensor)
        own = given[lo:hi]
        local[: len(own)].copy_(own)
        local[len(own) :].zero_()  # padding

    def owned(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter without padding. If it is sharded over dp, all ranks of dp call this, for one
        all-gather, and get all rows."""
        rows = self._rows(name, tensor)
        if self.dp is None:
            return tensor[:rows]
        local, (lo, hi) = local_part(tensor)
        # all send as many rows as the first rank has
        message = local.new_zeros(-(-tensor.shape[0] // self.dp.size), *tensor.shape[1:])
        message[: hi - lo] = local
        return all_gather(message, self.dp.at("data_parallel"), "step").flatten(0, 1)[:rows]

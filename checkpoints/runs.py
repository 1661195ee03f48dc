"""Runs of a tensor: contiguous ranges along one dimension, by which a rank's part is described."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from plan.partition import Rule, Span

Read = Callable[[str, Rule], Tensor]  # (name, its rule): the entries that this rank owns, unpadded


def runs_of(part: Any, dim: int | None, runs: Iterable[Span]) -> Tensor:
    """Runs along `dim`, concatenated, of a tensor or safetensors slice; all if dim is None."""
    if dim is None:
        return part[:]
    return joined([part[(slice(None),) * dim + (slice(lo, hi),)] for lo, hi in runs], dim)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

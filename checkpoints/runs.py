"""Runs of a tensor: contiguous ranges along one dimension, which is how a rank's part is described."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from plan.partition import Rule, Span

Read = Callable[[str, Rule], Tensor]  # (name, its rule): the entries that this rank owns, without padding


def runs_of(part: Any, dim: int | None, runs: Iterable[Span]) -> Tensor:
    """Runs along `dim`, concatenated, of a tensor or a safetensors slice; the whole if dim is None."""
    if dim is None:
        return part[:]
    pieces = [part[(slice(None),) * dim + (slice(lo, hi),)] for lo, hi in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

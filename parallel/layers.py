"""The sharded layers of Megatron-LM (arXiv 1909.08053, section 3). A column-parallel layer and the
row-parallel layer that it feeds are one region: f enters it, g leaves it (parallel/regions.py)."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Axis
from parallel.regions import WHOLE, Region, f, f_linear, g, product


class Sharded(nn.Module):
    """A layer with this rank's part of a weight, [outputs, inputs]. stored: has the products in the
    weight's place where it is quantized or packed."""

    def __init__(self, outputs: int, inputs: int, bias: bool, axis: Axis):
        super().__init__()
        self.inputs, self.axis = inputs, axis
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.stored: Any = None

    def check(self, x: Tensor, hint: str = "") -> None:
        """ValueError if the last dimension of x does not fit."""
        if x.shape[-1] != self.inputs:
            fault = f"expects inputs of width {self.inputs}, got {x.shape[-1]}"
            raise ValueError(f"{type(self).__name__} {fault}{hint}")

    def product(self, x: Tensor, bias: Tensor | None = None, hint: str = "") -> Tensor:
        """x [..., inputs] -> x W^T + bias [..., outputs]. No collective."""
        self.check(x, hint)
        if self.stored is not None:
            return self.stored.product(x, bias)
        return product(x, self.weight, bias)


class ColumnParallelLinear(Sharded):
    """y = x W^T + b with W split along its outputs: this rank computes `local_out` columns of y.

    x: [B, T, in_features], or this rank's tokens of it, as `region` says. y: [B, T, local_out].
    forward: f, nothing (SplitTokens: an all-gather); backward: one all-reduce of x's gradient (a
    reduce-scatter, and the all-gather once more) while W's is computed.
    """

    def __init__(self, in_features: int, local_out: int, bias: bool, axis: Axis):
        super().__init__(local_out, in_features, bias, axis)

    def forward(self, x: Tensor, region: Region = WHOLE) -> Tensor:
        if self.stored is not None:
            return self.local(f(x, self.axis, region))
        self.check(x)
        return f_linear(x, self.weight, self.bias, self.axis, region)

    def local(self, x: Tensor) -> Tensor:
        """y of an x that has been through f, or is this rank's own. No collective."""
        return self.product(x, self.bias)


class RowParallelLinear(Sharded):
    """y = x W^T + b with W split along its inputs: this rank multiplies its own columns of x.

    x: [B, T, local_in], this rank's columns of an input `in_features` wide.
    y: [B, T, out_features], or this rank's tokens of it, as `region` says.
    forward: g, one all-reduce (SplitTokens: a reduce-scatter); backward: nothing (an all-gather).
    The bias is replicated and added once: after g, as every rank needs its gradient, or by rank 0
    where there is none. With split tokens each rank has a part of that gradient.
    """

    def __init__(self, in_features: int, local_in: int, out_features: int, bias: bool, axis: Axis):
        super().__init__(out_features, local_in, bias, axis)
        self.in_features = in_features

    def forward(self, x: Tensor, region: Region = WHOLE) -> Tensor:
        if self.axis.size == 1 or not torch.is_grad_enabled():  # rank 0 adds it
            return g(self.partial(x, self.bias if self.axis.rank == 0 else None), self.axis, region)
        y = g(self.partial(x), self.axis, region)
        return y if self.bias is None else y + self.bias

    def partial(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """This rank's addend of y, with a bias if one is given. No collective."""
        hint = ""
        if self.axis.size > 1 and x.shape[-1] == self.in_features:
            own = f"rank {self.axis.rank} of {self.axis.size} owns {self.inputs}"
            feed = "Feed the output of a ColumnParallelLinear, or this rank's own columns"
            hint = f": this is the whole, unsplit input. {feed} ({own})"
        return self.product(x, bias, hint)


class VocabParallelEmbedding(Sharded):
    """The embedding table split by vocabulary: this rank holds rows [lo, hi), then padding.

    ids: [B, T] int64, the same on all ranks, in [0, num_embeddings). Output: [B, T, dim], or this
    rank's tokens of it, as `region` says. forward: each id is looked up by the rank that holds it,
    the others add zeros; g. backward: g's.
    """

    def __init__(self, num_embeddings: int, dim: int, lo: int, hi: int, rows: int, axis: Axis):
        if not 0 <= lo < hi <= num_embeddings or rows < hi - lo:
            wanted = f"vocabulary rows [{lo}, {hi}) of {num_embeddings} in {rows} rows"
            raise ValueError(f"rank {axis.rank} cannot hold {wanted}")
        super().__init__(rows, dim, False, axis)
        self.lo, self.hi = lo, hi
        self.table: Any = None  # table: stands for the weight in look-ups

    def forward(self, ids: Tensor, region: Region = WHOLE) -> Tensor:
        if self.table is not None:
            return g(self.table.rows(ids, self.lo), self.axis, region)
        if self.axis.size == 1:
            return F.embedding(ids, self.weight)
        elsewhere = (ids < self.lo) | (ids >= self.hi)
        local = (ids - self.lo).masked_fill(elsewhere, 0)
        rows = F.embedding(local, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return g(rows, self.axis, region)

    def logits(self, x: Tensor) -> Tensor:
        """As the head: x [..., dim], the same on all ranks -> this rank's columns of the logits,
        [..., hi - lo]. forward: f, nothing; backward: one all-reduce of x's gradient. Padding
        columns are computed, as hardware likes the width, and cut off."""
        return self.product(f(x, self.axis.at("head")))[..., : self.hi - self.lo]

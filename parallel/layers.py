"""The sharded layers of Megatron-LM (arXiv 1909.08053, section 3) and its two operators f and g.

A column-parallel layer feeds a row-parallel one without a word between ranks; f stands where a replicated activation
enters that pair, g where it leaves.

Where the activation outside that pair is split over the sequence (arXiv 2205.05198, section 4.2), each rank with its own
tokens, gather stands in f's place and scatter in g's. Everything here that takes `tokens` is told so by it: the length T of
the sequence that is split, or 0 where every rank has all of it.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Axis, all_reduce, all_reduce_later, gather_tokens, reduce_scatter
from parallel.graphs import outside_graphs
from plan.partition import spans


class _F(torch.autograd.Function):
    """f: forward identity, backward all-reduce of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.axis, "backward"), None


class _G(torch.autograd.Function):
    """g: forward all-reduce, backward identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis, "forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _FLinear(torch.autograd.Function):
    """f, and the product it leads to: forward x W^T + b; backward all-reduce of x's gradient, beside W's and b's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        used, w, b = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(used, w)
        ctx.axis, ctx.dtypes = axis, (x.dtype, weight.dtype)
        return F.linear(used, w, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        with torch.autocast(grad.device.type, enabled=False):
            summed = all_reduce_later((grad @ weight).to(x_dtype), ctx.axis, "backward") if ctx.needs_input_grad[0] else None
            rows = grad.flatten(0, -2)
            dw = (rows.t() @ x.flatten(0, -2)).to(dtype) if ctx.needs_input_grad[1] else None
            db = rows.sum(dim=0).to(dtype) if ctx.needs_input_grad[2] else None
        return summed and summed(), dw, db, None


class _Gather(torch.autograd.Function):
    """gather: forward all-gather, backward reduce-scatter of the gradient; or, where that is whole, nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, tokens: int, whole: bool) -> Tensor:
        ctx.axis, ctx.whole = axis, whole
        return gather_tokens(x, axis, "forward", tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.whole:
            lo, hi = spans(grad.shape[1], ctx.axis.size)[ctx.axis.rank]
            return grad[:, lo:hi], None, None, None
        return reduce_scatter(grad, ctx.axis, "backward"), None, None, None


class _Scatter(torch.autograd.Function):
    """scatter: forward reduce-scatter, backward all-gather of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.tokens = axis, x.shape[1]
        return reduce_scatter(x, axis, "forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grad, ctx.axis, "backward", ctx.tokens), None


class _GatherLinear(torch.autograd.Function):
    """gather, and the product it leads to: forward all-gather of x, x W^T + b; backward reduce-scatter of x's gradient.

    W's gradient needs all of x again. keep: it is kept for that; else it is gathered once more, and nothing but this rank's
    tokens is held in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, tokens: int, keep: bool) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        own, w, b = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        used = gather_tokens(own, axis, "forward", tokens)
        ctx.save_for_backward(used if keep else own, w)
        ctx.axis, ctx.tokens, ctx.keep, ctx.dtypes = axis, tokens, keep, (x.dtype, weight.dtype)
        return F.linear(used, w, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        dx = dw = db = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = reduce_scatter((grad @ weight).to(x_dtype), ctx.axis, "backward")
            rows = grad.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                used = x if ctx.keep else gather_tokens(x, ctx.axis, "backward", ctx.tokens)
                dw = (rows.t() @ used.flatten(0, -2)).to(dtype)
            if ctx.needs_input_grad[2]:
                db = rows.sum(dim=0).to(dtype)
        return dx, dw, db, None, None, None


@outside_graphs
def _gather_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, tokens: int, keep: bool) -> Tensor:
    y: Tensor = _GatherLinear.apply(x, weight, bias, axis, tokens, keep)
    return y


@outside_graphs
def _f_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
    y: Tensor = _FLinear.apply(x, weight, bias, axis)
    return y


@outside_graphs
def _apply(function: Any, x: Tensor, axis: Axis, *more: Any) -> Tensor:
    return function.apply(x, axis, *more)


class _Share(torch.autograd.Function):
    """Forward identity, backward a share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.parts, None


def share(x: Tensor, axis: Axis) -> Tensor:
    """A replicated parameter in a place where every rank has its whole gradient, while elsewhere ranks have different parts
    of it: here each takes an equal share, so that the sum over the ranks is right."""
    shared: Tensor = _Share.apply(x, axis.size)
    return shared


def f(x: Tensor, axis: Axis) -> Tensor:
    """Enter a tensor-parallel region: every rank uses the same x, so the ranks' gradients of it add up."""
    return _apply(_F, x, axis) if axis.size > 1 and torch.is_grad_enabled() else x


def g(x: Tensor, axis: Axis) -> Tensor:
    """Leave a tensor-parallel region: the ranks' partial sums add up to the output, and all share its gradient."""
    if axis.size > 1 and torch.is_grad_enabled():
        return _apply(_G, x, axis)
    return all_reduce(x, axis, "forward")


def gather(x: Tensor, axis: Axis, tokens: int, whole: bool = False) -> Tensor:
    """Enter a tensor-parallel region from a split sequence: every rank uses all of x [B, t, C] -> [B, tokens, C].

    The ranks' gradients add up, each rank being given its tokens of the sum; whole: they come summed, as from f.
    """
    return _apply(_Gather, x, axis, tokens, whole)


def scatter(x: Tensor, axis: Axis) -> Tensor:
    """Leave a tensor-parallel region for a split sequence: this rank's tokens [B, t, C] of the ranks' partial sums [B, T, C]
    added up."""
    return _apply(_Scatter, x, axis)


def check_width(layer: nn.Module, x: Tensor, width: int, hint: str = "") -> None:
    """ValueError where the last dimension of a layer's input is not what the layer was made for."""
    if x.shape[-1] != width:
        raise ValueError(f"{type(layer).__name__} expects inputs of width {width}, got {x.shape[-1]}{hint}")


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with W split along its outputs: this rank computes `local_out` of the columns of y.

    x: [..., in_features], the same on all ranks. y: [..., local_out], this rank's columns.
    forward: no collective; backward: one all-reduce of x's gradient (f), under way while W's is computed.
    With tokens, x: [B, t, in_features], this rank's tokens, and y is of all of them. forward: one all-gather; backward: one
    reduce-scatter, and the all-gather once more, or else (keep_gathered) its result is kept.
    """

    def __init__(self, in_features: int, local_out: int, bias: bool, axis: Axis, keep_gathered: bool = False):
        super().__init__()
        self.in_features, self.local_out, self.axis, self.keep_gathered = in_features, local_out, axis, keep_gathered
        self.weight = nn.Parameter(torch.empty(local_out, in_features))
        self.bias = nn.Parameter(torch.empty(local_out)) if bias else None

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        if tokens:
            check_width(self, x, self.in_features)
            return _gather_linear(x, self.weight, self.bias, self.axis, tokens, self.keep_gathered)
        if self.axis.size > 1 and torch.is_grad_enabled():
            check_width(self, x, self.in_features)
            return _f_linear(x, self.weight, self.bias, self.axis)
        return self.local(x)

    def local(self, x: Tensor) -> Tensor:
        """The same of an x that is this rank's own, or has been through f before: no collective in either pass."""
        check_width(self, x, self.in_features)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with W split along its inputs: this rank holds the rows that multiply its own columns of x.

    x: [..., local_in], this rank's columns of an input `in_features` wide. y: [..., out_features], the same on all ranks.
    forward: one all-reduce (g); backward: no collective. The bias is replicated and added once, after the all-reduce.
    With tokens, y: [B, t, out_features], this rank's tokens. forward: one reduce-scatter; backward: one all-gather. What a
    rank then has of the bias's gradient is its tokens' part.
    """

    def __init__(self, in_features: int, local_in: int, out_features: int, bias: bool, axis: Axis):
        super().__init__()
        self.in_features, self.local_in, self.axis = in_features, local_in, axis
        self.weight = nn.Parameter(torch.empty(out_features, local_in))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        y = self.partial(x)
        y = scatter(y, self.axis) if tokens else g(y, self.axis)
        return y if self.bias is None else y + self.bias

    def partial(self, x: Tensor) -> Tensor:
        """This rank's addend of y, without the bias: no collective in either pass."""
        hint = ""
        if self.axis.size > 1 and x.shape[-1] == self.in_features:
            hint = (
                f": this is the whole, unsplit input. Feed the output of a ColumnParallelLinear, "
                f"or this rank's own columns (rank {self.axis.rank} of {self.axis.size} owns {self.local_in})"
            )
        check_width(self, x, self.local_in, hint)
        return F.linear(x, self.weight)


class VocabParallelEmbedding(nn.Module):
    """The embedding table split along the vocabulary: this rank holds rows [lo, hi) and zero rows of padding after them.

    ids: [...] int64, the same on all ranks, in [0, num_embeddings). Output: [..., dim], the same on all ranks.
    forward: one all-reduce (each id is looked up where its row lives, the other ranks add zeros); backward: none.
    With tokens, ids are [B, T] and the output is [B, t, dim], this rank's tokens: one reduce-scatter; backward: one all-gather.
    """

    def __init__(self, num_embeddings: int, dim: int, lo: int, hi: int, rows: int, axis: Axis):
        super().__init__()
        if not 0 <= lo < hi <= num_embeddings or rows < hi - lo:
            raise ValueError(f"rank {axis.rank} cannot hold vocabulary rows [{lo}, {hi}) of {num_embeddings} in {rows} rows")
        self.num_embeddings, self.lo, self.hi, self.axis = num_embeddings, lo, hi, axis
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor, tokens: int = 0) -> Tensor:
        if self.axis.size == 1:
            return F.embedding(ids, self.weight)
        elsewhere = (ids < self.lo) | (ids >= self.hi)
        local = (ids - self.lo).masked_fill(elsewhere, 0)
        rows = F.embedding(local, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return scatter(rows, self.axis) if tokens else g(rows, self.axis)

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: x [..., dim], the same on all ranks -> this rank's columns of the logits, [..., hi - lo].

        Padding columns are computed (the product has the width the hardware likes) and cut off: nobody can sample them.
        forward: no collective; backward: one all-reduce of x's gradient (f).
        """
        check_width(self, x, self.weight.shape[1])
        return F.linear(f(x, self.axis.at("head")), self.weight)[..., : self.hi - self.lo]

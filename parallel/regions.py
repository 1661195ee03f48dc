"""f and g: how activations enter and leave a tensor-parallel region, in which each rank computes
its own heads, columns or vocabulary rows of all tokens.

Outside the regions every rank holds all tokens (Whole; Megatron-LM, arXiv 1909.08053, section 3),
or each rank its own (SplitTokens; sequence parallelism, arXiv 2205.05198, section 4.2). f enters a
region, g leaves it, and the backward pass of one is the forward pass of the other:

                    f forward, g backward (gather)      g forward, f backward (sum)
    Whole           nothing                             all-reduce
    SplitTokens     all-gather                          reduce-scatter
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Axis, all_reduce, all_reduce_later, gather_tokens, reduce_scatter
from parallel.operators import own_dropout, wanted


@dataclass(frozen=True)
class Whole:
    """Every rank holds all tokens, [B, T, C], the same on all ranks."""

    keep: ClassVar[bool] = True

    def gather(self, x: Tensor, axis: Axis, direction: str, after: Tensor | None = None) -> Tensor:
        return x

    def sum(self, x: Tensor, axis: Axis, direction: str) -> Tensor:
        return all_reduce(x, axis, direction)

    def sum_later(self, x: Tensor, axis: Axis, direction: str) -> Callable[[], Tensor]:
        return all_reduce_later(x, axis, direction)

    def dropout(self, x: Tensor, p: float, axis: Axis) -> Tensor:
        return F.dropout(x, p)  # torch's default stream, which all ranks of a tp group seed alike


@dataclass(frozen=True)
class SplitTokens:
    """Each rank holds its own tokens, [B, t, C]: spans(tokens, size)[rank] of all.

    keep: for the backward pass a column-parallel layer keeps all tokens of its input. Otherwise it
    keeps this rank's and gathers the others once more.
    """

    tokens: int
    keep: bool = False

    def gather(self, x: Tensor, axis: Axis, direction: str, after: Tensor | None = None) -> Tensor:
        return gather_tokens(x, axis, direction, self.tokens, after)

    def sum(self, x: Tensor, axis: Axis, direction: str) -> Tensor:
        return reduce_scatter(x, axis, direction)

    def sum_later(self, x: Tensor, axis: Axis, direction: str) -> Callable[[], Tensor]:
        out = reduce_scatter(x, axis, direction)
        return lambda: out

    def dropout(self, x: Tensor, p: float, axis: Axis) -> Tensor:
        return own_dropout(x, p, axis) if p > 0 else x


Region = Whole | SplitTokens
WHOLE = Whole()


# --- f and g --------------------------------------------------------------------------------------


class _F(torch.autograd.Function):
    """f enters a region: forward gathers tokens, backward sums the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, region: Region) -> Tensor:
        ctx.axis, ctx.region = axis, region
        return region.gather(x, axis, "forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.region.sum(grad, ctx.axis, "backward"), None, None


class _G(torch.autograd.Function):
    """g leaves a region: forward sums the ranks' outputs, backward gathers the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, region: Region) -> Tensor:
        ctx.axis, ctx.region = axis, region
        return region.sum(x, axis, "forward")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.region.gather(grad, ctx.axis, "backward"), None, None


class _FLinear(torch.autograd.Function):
    """f and the product after it. Backward sums x's gradient while the weight's is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis,
                region: Region) -> Tensor:
        dtype = product_dtype(x)
        own, w, b = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        full = region.gather(own, axis, "forward")
        ctx.save_for_backward(full if region.keep else own, weight)  # no copy of it
        ctx.axis, ctx.region, ctx.dtypes = axis, region, (x.dtype, weight.dtype)
        return F.linear(full, w, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (x_dtype, dtype), region, axis = ctx.dtypes, ctx.region, ctx.axis
        dx = dw = db = None
        with torch.autocast(grad.device.type, enabled=False):
            if wanted(ctx, 0):
                dx = region.sum_later((grad @ weight.to(grad.dtype)).to(x_dtype), axis, "backward")
            rows = grad.flatten(0, -2)
            if wanted(ctx, 1):
                full = x if region.keep else region.gather(x, axis, "backward", dx and dx())
                dw = (rows.t() @ full.flatten(0, -2)).to(dtype)
            if wanted(ctx, 2):
                db = rows.sum(dim=0).to(dtype)
        return dx and dx(), dw, db, None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """In which x is multiplied: autocast's dtype within autocast, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _learns(axis: Axis) -> bool:
    return axis.size > 1 and torch.is_grad_enabled()


def f(x: Tensor, axis: Axis, region: Region = WHOLE) -> Tensor:
    """Enter a region: x outside -> x [B, T, C] of all tokens, on every rank."""
    return _F.apply(x, axis, region) if _learns(axis) else region.gather(x, axis, "forward")


def g(x: Tensor, axis: Axis, region: Region = WHOLE) -> Tensor:
    """Leave a region: the sum of the ranks' x [B, T, C], as it lies outside."""
    return _G.apply(x, axis, region) if _learns(axis) else region.sum(x, axis, "forward")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. A compiler fuses one row's product, written as a sum, with what surrounds it."""
    one_row = torch.compiler.is_compiling() and x.numel() == x.shape[-1]
    if not one_row or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


def f_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis,
             region: Region = WHOLE) -> Tensor:
    """F.linear(f(x), weight, bias)"""
    if _learns(axis) or isinstance(region, SplitTokens):  # which gathers in autocast's dtype
        return _FLinear.apply(x, weight, bias, axis, region)
    return product(x, weight, bias)


class _DivideGradient(torch.autograd.Function):
    """Forward nothing, backward divides the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.parts, None


def divide_gradient(x: Tensor, axis: Axis) -> Tensor:
    """x. For where every rank computes the full gradient of x, and the ranks' gradients of x are
    summed later."""
    return _DivideGradient.apply(x, axis.size)

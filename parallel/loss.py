"""Cross-entropy of logits that stay split by vocabulary (after Megatron-LM, arXiv 1909.08053).

In training the head's product and the loss are one function, which takes the rows in chunks and
computes loss and gradient of each at once: the logits of one chunk exist at a time, computed once.
Without a compiler a chunk is overwritten step by step. With one, `statistics` and `gradient` read
it once each.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Axis, all_gather, all_reduce
from parallel.regions import WHOLE, Region, product_dtype

# Logits of a chunk, on one rank: 32 MiB on a CPU, 512 MiB on a GPU, in float32. Smaller chunks take
# less memory, but read and write the table's gradient more often and send more messages. On a CPU
# 256 rows of a GPT-2 split in two multiply as fast as more do. A GPU wants more (estimated).
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}


def chunk_rows(rows: int, width: int, kind: str) -> int:
    """Rows of a chunk: few chunks, of about equal size. The same on all ranks, which keep step."""
    chunks = -(-rows * width // CHUNK_LOGITS.get(kind, CHUNK_LOGITS["cpu"]))
    return -(-rows // min(max(chunks, 1), max(rows, 1)))


def statistics(logits: Tensor, targets: Tensor, lo: int, hi: int) -> Tensor:
    """[3, n] float32 or wider, of n rows of this rank's logits: the largest, the target's (0 on
    other ranks), the sum of exponentials relative to the largest. logits: [n, width]; columns
    beyond hi - lo are padding. targets: [n], negative ones are ignored."""
    z = logits[:, : hi - lo].to(torch.promote_types(logits.dtype, torch.float32))
    here = (targets >= lo) & (targets < hi)
    index = (targets - lo).masked_fill(~here, 0).unsqueeze(-1)
    target = torch.where(here, z.gather(-1, index).squeeze(-1), 0.0)
    peak = z.amax(dim=-1)
    return torch.stack([peak, target, (z - peak.unsqueeze(-1)).exp().sum(dim=-1)])


def combined(numbers: Tensor, targets: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, highest, total), [n] each, of all ranks' `statistics`: the loss, 0 where the target is
    negative; the largest logit; the sum of exponentials relative to it. One all-gather."""
    peaks, found, sums = all_gather(numbers, axis, "forward").unbind(1)  # [size, n] each
    highest = peaks.amax(dim=0)
    total = (sums * (peaks - highest).exp()).sum(dim=0)
    nll = total.log() + (highest - found.sum(dim=0))
    return nll.masked_fill(targets < 0, 0.0), highest, total


def gradient(logits: Tensor, targets: Tensor, lo: int, hi: int, highest: Tensor,
             total: Tensor) -> Tensor:
    """The gradient of the summed loss [n, width] with respect to the logits, in their dtype."""
    column = torch.arange(logits.shape[1], device=logits.device)
    p = (logits.to(highest.dtype) - highest.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    dz = p - (column == (targets - lo).unsqueeze(-1)).to(p.dtype)
    return torch.where((targets >= 0).unsqueeze(-1) & (column < hi - lo), dz, 0.0).to(logits.dtype)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _in_place(z: Tensor, targets: Tensor, lo: int, hi: int, axis: Axis,
              learn: bool) -> tuple[Tensor, Tensor | None]:
    """(nll, the gradient or None) of a chunk z [n, width], which is overwritten."""
    z[:, hi - lo :] = float("-inf")  # adds 0 to every sum
    here = (targets >= lo) & (targets < hi)
    index = (targets - lo).masked_fill(~here, 0).unsqueeze(-1)
    target = torch.where(here, z.gather(-1, index).squeeze(-1), 0.0)
    peak = z.amax(dim=-1)
    z.sub_(peak.unsqueeze(-1)).exp_()
    numbers = torch.stack([peak, target, z.sum(dim=-1)])
    nll, highest, total = combined(numbers, targets, axis)
    if not learn:
        return nll, None
    scale = torch.where(targets < 0, 0.0, (peak - highest).exp() / total)  # to probabilities
    return nll, z.mul_(scale.unsqueeze(-1)).scatter_add_(-1, index, -here.unsqueeze(-1).to(z.dtype))


class _HeadLoss(torch.autograd.Function):
    """forward: f, and one all-gather of [3, n] a chunk; backward: f's. The gradient of the sum is
    computed in the forward pass, where the logits are; backward scales it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, lo: int, hi: int, axis: Axis,
                region: Region, learn: bool, fused: bool, keep: bool) -> Tensor:
        kind, dtype = x.device.type, product_dtype(x)
        wide = torch.promote_types(dtype, torch.float32)
        x = region.gather(x, axis.at("head"), "forward")
        ctx.shape, x, targets = x.shape, x.flatten(0, -2), targets.flatten()
        with torch.autocast(kind, enabled=False):
            w, dx, dw = weight.to(dtype), None, None
            if learn:
                dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
            loss = torch.zeros((), dtype=wide, device=x.device)
            rows = chunk_rows(len(x), len(w), kind)
            logits = torch.empty(rows, len(w), dtype=dtype, device=x.device)  # for all chunks
            for start in range(0, len(x), rows):
                part = slice(start, start + rows)
                mine, given = x[part].to(dtype), (targets[part], lo, hi)
                z = torch.mm(mine, w.t(), out=logits[: len(mine)])
                if fused:
                    numbers = compiled(statistics)(z, *given)
                    nll, *both = combined(numbers, given[0], axis.at("loss"))
                    dz = compiled(gradient)(z, *given, *both) if learn else None
                else:
                    nll, dz = _in_place(z.to(wide), *given, axis.at("loss"), learn)
                loss += nll.sum()
                if dx is not None and dw is not None and dz is not None:
                    dz = dz.to(dtype)
                    dx[part] = dz @ w
                    dw = dw.addmm_(dz.t(), mine) if dtype == wide else dw.add_(dz.t() @ mine)
        ctx.gradients, ctx.dtype, ctx.axis, ctx.region = (dx, dw), weight.dtype, axis, region
        ctx.keep = keep
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the head's gradient is used up: run the forward pass again.")
        dx, dw = ctx.gradients
        if ctx.keep:
            dx, dw = dx.clone(), dw.clone()
        else:
            ctx.gradients = None
        dx.mul_(grad)  # ours alone, and so scaled in place
        summed = None
        if ctx.needs_input_grad[0]:
            summed = ctx.region.sum_later(dx.view(ctx.shape), ctx.axis.at("head"), "backward")
        dw = dw.mul_(grad).to(ctx.dtype)
        return summed and summed(), dw, *[None] * 8


def vocab_parallel_head_loss(x: Tensor, weight: Tensor, targets: Tensor, lo: int, hi: int,
                             axis: Axis, region: Region = WHOLE, fused: bool = False,
                             keep: bool = False) -> Tensor:
    """The summed negative log-likelihood of targets under logits x W^T: a float32 scalar (float64
    for float64), the same on all ranks.

    x: [N, C], the same on all ranks; or with split tokens [B, t, C], this rank's. weight: [rows,
    C], this rank's rows of the tied table: ids [lo, hi), then padding, which takes no part and gets
    no gradient; as many rows on every rank. targets: [N] or [B, T] int64, the same on all ranks,
    below vocab_size; negative: ignored. fused: by torch.compile. Products are made in autocast's
    dtype; the loss and the table's gradient add up in float32. The backward pass can run once, or
    with `keep`, which takes more memory, again.
    Raises ValueError if the shapes do not fit.
    """
    fits = region is not WHOLE or targets.shape == x.shape[:-1]
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or not fits:
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, targets))
        raise ValueError(f"expected x [N, C], weight [rows, C] and targets [N], got {shapes}")
    learn = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(x, weight, targets, lo, hi, axis, region, learn, fused, keep)
    return loss


@torch.no_grad()
def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, lo: int, axis: Axis) -> Tensor:
    """The negative log-likelihood of each target, [N] float32 without gradient, the same on all
    ranks; 0 where the target is negative. One all-gather of [3, N]. logits are not written to.

    logits: [N, width], this rank's columns; column j is vocabulary id lo + j. targets: [N] int64,
    the same on all ranks, below vocab_size. Raises ValueError if the shapes do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"expected logits [N, width] and targets [N], got {shapes}")
    z = logits.to(torch.float32, copy=True)
    return _in_place(z, targets, lo, lo + logits.shape[1], axis.at("loss"), False)[0]


def vocab_parallel_divergence(logits: Tensor, teacher: Tensor, axis: Axis) -> Tensor:
    """The Kullback-Leibler divergence of each row, KL(teacher || model) in nats, [N]; the same on
    all ranks. One all-gather of [2, N] and one all-reduce of [N]; backward: none. logits, which get
    the gradient, and teacher: [N, width], this rank's columns, without padding."""
    axis = axis.at("loss")
    with torch.no_grad():
        both = torch.stack([logits, teacher])
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        normal = all_gather(both.logsumexp(dim=-1), axis, "forward").logsumexp(dim=0)  # [2, N]
        log_p, log_q = both - normal.unsqueeze(-1)
        q = log_q.exp()
        slope = (log_p.exp() - q).to(logits.dtype)  # of the divergence
        divergence = all_reduce((q * (log_q - log_p)).sum(dim=-1), axis, "forward")
    line = torch.linalg.vecdot(slope, logits)
    return divergence + (line - line.detach())  # which adds a gradient and nothing else

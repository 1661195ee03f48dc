"""Cross-entropy over logits that stay split along the vocabulary (Megatron-LM, arXiv 1909.08053, section 3)."""

from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Axis, all_reduce
from parallel.graphs import outside_graphs


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """forward: one all-reduce of the maxima [N], one of target logits and sums of exponentials [2, N]; backward: none."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, lo: int, axis: Axis) -> Tensor:
        z = logits.float()
        peak = all_reduce(z.max(dim=-1).values, axis, "forward", op="max")
        exp = (z - peak.unsqueeze(-1)).exp()
        local = targets - lo
        here = (local >= 0) & (local < z.shape[-1])
        index = local.clamp(0, z.shape[-1] - 1).unsqueeze(-1)
        # peak is subtracted before the sum over ranks: a single rank's share of the target logit, zero elsewhere
        target = torch.where(here, z.gather(-1, index).squeeze(-1) - peak, 0.0)
        target, total = all_reduce(torch.stack([target, exp.sum(dim=-1)]), axis, "forward")
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), index, here)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, index, here = ctx.saved_tensors
        dz = softmax * grad.unsqueeze(-1)
        dz.scatter_add_(-1, index, (-grad * here).unsqueeze(-1))
        return dz.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, lo: int, axis: Axis) -> Tensor:
    """Negative log-likelihood of each target, in float32; logits are never gathered and never written to.

    logits: [N, width], this rank's columns; column j is vocabulary id lo + j.
    targets: [N] int64, the same on all ranks, in [0, vocab_size); where negative (ignored) the loss is 0.
    Returns [N] float32, the same on all ranks. Raises ValueError where the shapes do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [N, width] and targets [N], got {list(logits.shape)} and {list(targets.shape)}")
    nll = _cross_entropy(logits, targets, lo, axis.at("loss"))
    return nll.masked_fill(targets < 0, 0.0)


@outside_graphs
def _cross_entropy(logits: Tensor, targets: Tensor, lo: int, axis: Axis) -> Tensor:
    return _VocabParallelCrossEntropy.apply(logits, targets, lo, axis)

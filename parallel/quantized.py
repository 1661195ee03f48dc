"""Weights in 8 bits, for inference: the sharded layers over an int8 matrix with a scale per output.

A row of the weight (one output channel) becomes q = round(w / s) with s = max |w| / 127 over the
row of the full matrix: q and s are the same at every tp. Row-parallel layers hold some columns of a
row; ranks agree on its maximum when the model is loaded. Activations keep their dtype: some of
GPT-2's channels are far larger than the rest, which 8 bits cannot hold. No message changes.

The native decode step (inference/product.c) reads the 8-bit weights themselves, a quarter of the
bytes. Elsewhere rows are widened a few at a time, which saves memory and hardly any time.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from base.processes import Exchange
from parallel.layers import RowParallelLinear, Sharded, VocabParallelEmbedding
from parallel.regions import product

LEVELS = 127
# Entries of a matrix that are widened at a time. On a CPU they stay in the cache. Elsewhere each
# piece costs kernel launches, and is as large as memory allows.
WIDENED_ON_CPU, WIDENED = 1 << 18, 1 << 26


class Int8Weight(nn.Module):
    """A matrix W [out, in] as int8 rows q and a float32 scale [out, 1]: W is about q * scale.
    weight: [out, in], of any float dtype. largest: [out], the largest |W| of each full row."""

    scale: Tensor
    q: Tensor

    def __init__(self, weight: Tensor, largest: Tensor):
        super().__init__()
        largest = largest.float().unsqueeze(1)
        self.register_buffer("scale", torch.where(largest == 0, 1.0, largest / LEVELS))
        self.register_buffer("q", (weight.float() / self.scale).round_().to(torch.int8))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out], in the dtype of x, which has integers up to 127.
        In float16 a row is scaled before the product: sums of 127 x may leave its range."""
        if torch.compiler.is_compiling():  # which widens in registers where x is one row
            return product(x, (self.q * self.scale).to(x.dtype), bias)
        rows = max(1, (WIDENED_ON_CPU if x.is_cpu else WIDENED) // self.q.shape[1])
        half = x.dtype == torch.float16
        pieces = zip(self.q.split(rows), self.scale.split(rows), strict=True)
        parts = [F.linear(x, (q * scale if half else q).to(x.dtype)) for q, scale in pieces]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if not half:
            y = (y * self.scale.view(-1)).to(x.dtype)
        return y if bias is None else y + bias


@torch.no_grad()
def quantize(model: nn.Module, gather: Exchange, ends: tuple[bool, bool] = (True, True)) -> None:
    """Give every sharded layer of a loaded model its int8 weight, one by one, and freeze the other
    parameters. Every rank calls it. gather: called once, to agree on the scales of row-parallel
    layers. Tokens are looked up in the float table: exact, and no slower than in 8 bits. ends:
    whether tokens are looked up, and logits computed, in this rank's stage."""
    model.requires_grad_(False)
    layers = [layer for layer in model.modules() if isinstance(layer, Sharded)]
    tables = [layer for layer in layers if isinstance(layer, VocabParallelEmbedding)]
    looked_up, head = tables[: ends[0]], tables[-1:] if ends[1] else []
    layers = [layer for layer in layers if layer not in looked_up or layer in head]
    row_parallel = [layer for layer in layers if isinstance(layer, RowParallelLinear)]
    everyone = gather([layer.weight.abs().amax(1).float().cpu() for layer in row_parallel])
    parts = zip(row_parallel, *everyone, strict=True)
    largest = {layer: torch.stack(maxima).amax(0) for layer, *maxima in parts}
    for layer in layers:
        weight = layer.weight
        agreed = largest[layer] if layer in largest else weight.abs().amax(1)
        layer.stored = Int8Weight(weight, agreed.to(weight.device))
        if layer not in looked_up:
            del layer.weight


def quantization(model: nn.Module) -> str:
    """The precision that --quantize gave the model: "int8" or ""."""
    return "int8" if any(b.dtype == torch.int8 for b in model.buffers()) else ""


def read_weights(model: Any) -> list[Tensor]:
    """This rank's weights that a decode step reads: neither table of which it looks up a row, but
    for the head's."""
    wte, stages, skipped = model.transformer.wte, model.stages, list[Tensor]()
    if stages.has_first:
        skipped.append(model.transformer.wpe.weight)
        if not stages.has_last or wte is not model.head or wte.stored is not wte.table:
            skipped += [wte.weight] if wte.table is None else wte.table.buffers()
    every = [*model.parameters(), *model.buffers()]
    return [tensor.detach() for tensor in every if all(tensor is not other for other in skipped)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of this rank's weights: parameters, and int8 rows with their scales."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])

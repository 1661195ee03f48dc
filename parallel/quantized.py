"""Weights in 8 bits, for inference: the sharded layers over an int8 matrix with a scale per output.

A row of the weight (one output channel) becomes q = round(w / s) with s = max |w| / 127 over the
row of the full matrix: q and s are the same at every tp. Row-parallel layers hold some columns of a
row; ranks agree on its maximum when the model is loaded. Activations keep their dtype: some of
GPT-2's channels are far larger than the rest, which 8 bits cannot hold. No message changes.

The native decode step (inference/decode.c) reads the 8-bit weights themselves, a quarter of the
bytes. Elsewhere rows are widened a few at a time, which saves memory and hardly any time.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from base.processes import Exchange
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    check_width,
)  # fmt: skip
from parallel.regions import WHOLE, Region, f, product

LEVELS = 127
# Entries of a matrix that are widened at a time. On a CPU they stay in the cache. Elsewhere each
# piece costs kernel launches, and is as large as memory allows.
WIDENED_ON_CPU, WIDENED = 1 << 18, 1 << 26


class Int8Weight(nn.Module):
    """A matrix W [out, in] as int8 rows q and a float32 scale [out]: W is about q * scale.

    weight: [out, in], of any float dtype. largest: [out], the largest |W| of each full row.
    """

    def __init__(self, weight: Tensor, largest: Tensor):
        super().__init__()
        largest = largest.float()
        self.scale = torch.where(largest == 0, 1.0, largest / LEVELS)
        self.q = (weight.float() / self.scale.unsqueeze(1)).round_().to(torch.int8)

    @property
    def nbytes(self) -> int:
        return self.q.numel() + 4 * len(self.scale)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out], in the dtype of x, which holds integers up to 127.

        In float16 a row is scaled before the product: sums of 127 x may leave its range.
        """
        if torch.compiler.is_compiling():  # which widens in registers where x is one row
            return product(x, (self.q * self.scale.unsqueeze(1)).to(x.dtype), bias)
        most = WIDENED_ON_CPU if x.device.type == "cpu" else WIDENED
        pieces = self.q.split(max(1, most // self.q.shape[1]))
        if x.dtype == torch.float16:
            scales = self.scale.unsqueeze(1).split(len(pieces[0]))
            rows = ((q * s).to(x.dtype) for q, s in zip(pieces, scales, strict=True))
            y = torch.cat([F.linear(x, wide) for wide in rows], dim=-1)
        else:
            parts = [F.linear(x, q.to(x.dtype)) for q in pieces]
            y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
            y = (y * self.scale).to(x.dtype)
        return y if bias is None else y + bias


class QuantizedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, layer: ColumnParallelLinear):
        nn.Module.__init__(self)
        self.in_features, self.axis, self.bias = layer.in_features, layer.axis, layer.bias
        self.int8 = Int8Weight(layer.weight, layer.weight.abs().amax(1))

    def forward(self, x: Tensor, region: Region = WHOLE) -> Tensor:
        return self.local(f(x, self.axis, region))

    def local(self, x: Tensor) -> Tensor:
        check_width(self, x, self.in_features)
        return self.int8.product(x, self.bias)


class QuantizedRowParallelLinear(RowParallelLinear):
    """largest: [out_features], the largest |W| of each row of the full matrix."""

    def __init__(self, layer: RowParallelLinear, largest: Tensor):
        nn.Module.__init__(self)
        self.local_in, self.axis, self.bias = layer.local_in, layer.axis, layer.bias
        self.int8 = Int8Weight(layer.weight, largest)

    def partial(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        check_width(self, x, self.local_in)
        return self.int8.product(x, bias)


class QuantizedVocabParallelEmbedding(VocabParallelEmbedding):
    """With an int8 head. Tokens are looked up in the float table, a row at a time: exact, and no
    slower than in 8 bits."""

    def __init__(self, layer: VocabParallelEmbedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.lo, self.hi = layer.num_embeddings, layer.lo, layer.hi
        self.axis, self.weight = layer.axis, layer.weight
        self.int8 = Int8Weight(layer.weight, layer.weight.abs().amax(1))

    def logits(self, x: Tensor) -> Tensor:
        check_width(self, x, self.weight.shape[1])
        return self.int8.product(x)[..., : self.hi - self.lo]


@torch.no_grad()
def quantize(model: nn.Module, gather: Exchange) -> None:
    """Replace every sharded layer of a loaded model by its int8 form, in place, one by one, and
    freeze the other parameters. Every rank calls it. gather: called once, to agree on the scales of
    row-parallel layers."""
    model.requires_grad_(False)
    row_parallel = [m for m in model.modules() if isinstance(m, RowParallelLinear)]
    everyone = gather([layer.weight.abs().amax(1).float().cpu() for layer in row_parallel])
    parts = zip(row_parallel, *everyone, strict=True)
    largest = {layer: torch.stack(maxima).amax(0) for layer, *maxima in parts}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            made: nn.Module
            if isinstance(layer, ColumnParallelLinear):
                made = QuantizedColumnParallelLinear(layer)
            elif isinstance(layer, RowParallelLinear):
                made = QuantizedRowParallelLinear(layer, largest[layer].to(layer.weight.device))
            elif isinstance(layer, VocabParallelEmbedding):
                made = QuantizedVocabParallelEmbedding(layer)
            else:
                continue
            setattr(parent, name, made)
            if not isinstance(layer, VocabParallelEmbedding):
                del layer.weight  # the lists above keep every layer alive until the end


def quantization(model: nn.Module) -> str:
    """The precision that --quantize gave the model: "int8" or ""."""
    return "int8" if any(isinstance(m, Int8Weight) for m in model.modules()) else ""


def read_weights(model: Any) -> list[Tensor]:
    """This rank's weights that a decode step reads: not the position table, nor, with an int8 head,
    the float one."""
    wte, wpe = model.transformer.wte, model.transformer.wpe
    skipped = [wpe.weight] + [wte.weight] * hasattr(wte, "int8")
    int8 = [module for module in model.modules() if isinstance(module, Int8Weight)]
    found = [p.detach() for p in model.parameters() if all(p is not other for other in skipped)]
    return found + [tensor for module in int8 for tensor in (module.q, module.scale)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of this rank's weights: parameters, and int8 rows with their scales."""
    int8 = sum(m.nbytes for m in model.modules() if isinstance(m, Int8Weight))
    return int8 + sum(p.nbytes for p in model.parameters())

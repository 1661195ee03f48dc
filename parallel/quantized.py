"""Weights in 8 bits, for inference: the sharded layers again, over an int8 matrix with one scale for each output.

A row of the weight (one output channel) becomes q = round(w / s), s = max |w| / 127 over the row of the full matrix, so
that every tp has the same q and s. Row-parallel layers hold only some columns of a row; its maximum is agreed on when the
model is loaded. Activations keep their dtype: GPT-2's do not survive 8 bits, as a few channels are far larger than the
rest. Partial sums leave a layer as before, so ranks say exactly what they say without quantizing.

The native decode step (native_decoder.py) reads the 8-bit weights themselves, a quarter of the bytes. Elsewhere some rows of a
matrix at a time are widened for the product they are needed in: that saves memory, and hardly any time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, check_width, g, gather, scatter

LEVELS = 127
# Entries of a matrix that are floats at a time. On a CPU they stay in the cache; elsewhere each piece
# costs launches, and is as large as memory allows.
WIDENED_ON_CPU, WIDENED = 1 << 18, 1 << 26

Gather = Callable[[Any], list[Any]]  # a small thing of every rank, on all ranks (World.gather)


class Int8Weight(nn.Module):
    """A matrix W [out, in] as int8 rows q and a float32 scale [out]: W is about q * scale. Nothing in it is trained.

    weight: [out, in], of any float dtype. largest: [out], the row maxima of |W|, over all ranks where W is split by columns.
    """

    def __init__(self, weight: Tensor, largest: Tensor):
        super().__init__()
        largest = largest.float()
        self.scale = torch.where(largest == 0, 1.0, largest / LEVELS)
        self.q = (weight.float() / self.scale.unsqueeze(1)).round_().to(torch.int8)

    @property
    def nbytes(self) -> int:
        return self.q.numel() + 4 * len(self.scale)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> x W^T [..., out], in the dtype of x (whole numbers up to 127 are exact in each).

        In float16 a row is scaled before the product, as sums of 127 x may be beyond its range.
        """
        most = WIDENED_ON_CPU if x.device.type == "cpu" else WIDENED
        pieces = self.q.split(max(1, most // self.q.shape[1]))
        if x.dtype == torch.float16:
            scales = self.scale.unsqueeze(1).split(len(pieces[0]))
            rows = ((q * s).to(x.dtype) for q, s in zip(pieces, scales, strict=True))
            return torch.cat([F.linear(x, wide) for wide in rows], dim=-1)
        parts = [F.linear(x, q.to(x.dtype)) for q in pieces]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return (y * self.scale).to(x.dtype)


class QuantizedColumnParallelLinear(nn.Module):
    """ColumnParallelLinear over an int8 weight: x [..., in_features] -> this rank's columns of y. No collective; with tokens
    one all-gather."""

    def __init__(self, layer: ColumnParallelLinear):
        super().__init__()
        self.in_features, self.axis, self.bias = layer.in_features, layer.axis, layer.bias
        self.int8 = Int8Weight(layer.weight, layer.weight.abs().amax(1))

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        return self.local(gather(x, self.axis, tokens) if tokens else x)

    def local(self, x: Tensor) -> Tensor:
        check_width(self, x, self.in_features)
        y = self.int8.product(x)
        return y if self.bias is None else y + self.bias


class QuantizedRowParallelLinear(nn.Module):
    """RowParallelLinear over an int8 weight: this rank's columns of x -> y [..., out_features]. One all-reduce (g),
    or, with tokens, reduce-scatter.

    largest: [out_features], the maxima of the full matrix's rows.
    """

    def __init__(self, layer: RowParallelLinear, largest: Tensor):
        super().__init__()
        self.local_in, self.axis, self.bias = layer.local_in, layer.axis, layer.bias
        self.int8 = Int8Weight(layer.weight, largest)

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        y = self.partial(x)
        y = scatter(y, self.axis) if tokens else g(y, self.axis)
        return y if self.bias is None else y + self.bias

    def partial(self, x: Tensor) -> Tensor:
        check_width(self, x, self.local_in)
        return self.int8.product(x)


class QuantizedVocabParallelEmbedding(VocabParallelEmbedding):
    """VocabParallelEmbedding with an int8 head. Tokens are looked up in the float table, a row of it at a time: exact,
    and no slower than looking them up in 8 bits."""

    def __init__(self, layer: VocabParallelEmbedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.lo, self.hi, self.axis = layer.num_embeddings, layer.lo, layer.hi, layer.axis
        self.weight = layer.weight
        self.int8 = Int8Weight(layer.weight, layer.weight.abs().amax(1))

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: x [..., dim] -> this rank's columns of the logits, [..., hi - lo]. No collective."""
        check_width(self, x, self.weight.shape[1])
        return self.int8.product(x)[..., : self.hi - self.lo]


@torch.no_grad()
def quantize(model: nn.Module, gather: Gather) -> None:
    """Replace every sharded layer of a loaded model by its int8 form, in place, freeing the float weights one by one.

    Every rank calls it. What is left of the parameters is frozen: the model infers, it does not train. `gather` is how
    ranks agree on the scales of row-parallel layers, once.
    """
    model.requires_grad_(False)
    # lists of modules keep every old layer alive until the end: each gives up its weight as soon as it is replaced
    row_parallel = [module for module in model.modules() if isinstance(module, RowParallelLinear)]
    everyone = gather([module.weight.abs().amax(1).float().cpu() for module in row_parallel])
    largest = {module: torch.stack(parts).amax(0) for module, *parts in zip(row_parallel, *everyone, strict=True)}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ColumnParallelLinear):
                setattr(parent, name, QuantizedColumnParallelLinear(layer))
                del layer.weight
            elif isinstance(layer, RowParallelLinear):
                setattr(parent, name, QuantizedRowParallelLinear(layer, largest[layer].to(layer.weight.device)))
                del layer.weight
            elif isinstance(layer, VocabParallelEmbedding):
                setattr(parent, name, QuantizedVocabParallelEmbedding(layer))


def quantization(model: nn.Module) -> str:
    """What --quantize has made of this model: "int8" or ""."""
    return "int8" if any(isinstance(module, Int8Weight) for module in model.modules()) else ""


def read_weights(model: Any) -> list[Tensor]:
    """This rank's weights that a decode step reads: not the position table, and beside an int8 head not the float one."""
    wte, wpe = model.transformer.wte, model.transformer.wpe
    skipped = [wpe.weight] + [wte.weight] * hasattr(wte, "int8")
    int8 = [module for module in model.modules() if isinstance(module, Int8Weight)]
    found = [p.detach() for p in model.parameters() if all(p is not other for other in skipped)]
    return found + [tensor for module in int8 for tensor in (module.q, module.scale)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of this rank's weights: its parameters, and int8 rows with their scales."""
    int8 = sum(module.nbytes for module in model.modules() if isinstance(module, Int8Weight))
    return int8 + sum(p.numel() * p.element_size() for p in model.parameters())

"""Weights in 8 bits, for inference: the sharded layers again, over an int8 matrix with one scale for each output.

A row of the weight (one output channel) becomes q = round(w / s), s = max |w| / 127 over the row of the full matrix, so
that every tp has the same q and s. Row-parallel layers hold only some columns of a row; its maximum is agreed on when the
model is loaded. Partial sums leave a layer in the activations' dtype: ranks say exactly what they say without quantizing.

Activations stay as good as float32. Integer kernels want 8-bit inputs, and GPT-2's activations do not survive that (a few
channels are far larger than the rest), so each row of x is written with three digits to base 126, and the kernel is given
three rows instead of one:

    x  ~  max |x| / 63 * (d0 + d1 / 126 + d2 / 126**2),     each d an integer in [-63, 63]

At batch 1 a product waits for the weights, which are still read once: three rows take as long as one. Integer sums are
exact, and a row's digits are its own, so a row's result does not depend on the rows beside it. Why base 126: below AVX-512
VNNI the kernels add two products of 8-bit numbers in 16 bits, and 2 * 127 * 127 is the most that fits there.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from parallel.graphs import outside_graphs
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, _check_width, g

LEVELS = 127  # of a weight
HALF, BASE = 63, 126  # a digit's largest absolute value, and what the next digit is worth less
DIGITS = 3

Gather = Callable[[Any], list[Any]]  # a small thing of every rank, on all ranks (World.gather)


class Kernel(Protocol):
    """digits [..., in], float32 integers in [-63, 63] -> digits (q s)^T [..., out], float32, from exact integer sums."""

    def __call__(self, digits: Tensor) -> Tensor: ...


class _Fbgemm:
    """The CPU kernel of torch's eager quantization on x86: weights packed once, in the order in which they are read."""

    def __init__(self, q: Tensor, scale: Tensor):
        engines: Any = torch.backends.quantized
        before = engines.engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors will leave torch some day; _IntMM stays
            engines.engine = "fbgemm"
            try:
                zero_points = torch.zeros(len(scale), dtype=torch.int64)
                weight = torch._make_per_channel_quantized_tensor(q, scale.double(), zero_points, 0)
                self.packed = torch.ops.quantized.linear_prepack(weight, None)
            finally:
                engines.engine = before
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def __call__(self, digits: Tensor) -> Tensor:
        # an input of scale 1 and zero point HALF + 1: the kernel's own 8-bit inputs are the digits themselves
        y: Tensor = self.product(digits, 1.0, HALF + 1, self.packed)
        return y

    @staticmethod
    def exists() -> bool:
        return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
            torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"
        )


class _IntMM:
    """torch._int_mm: int8 x int8 -> int32, on any CPU and on CUDA, where it wants multiples of 8 and more than 16 rows."""

    FEWEST_ROWS = 32

    def __init__(self, q: Tensor, scale: Tensor):
        self.out, self.scale = len(q), scale
        self.pad = -q.shape[1] % 8
        self.transposed = F.pad(q, (0, self.pad, 0, -self.out % 8)).t()

    def __call__(self, digits: Tensor) -> Tensor:
        rows = digits.to(torch.int8).flatten(0, -2)
        more = max(0, self.FEWEST_ROWS - len(rows)) if digits.is_cuda else 0
        y = torch._int_mm(F.pad(rows, (0, self.pad, 0, more)), self.transposed)[: len(rows), : self.out]
        return (y * self.scale).view(*digits.shape[:-1], self.out)


def kernel_of(device: torch.device) -> Callable[[Tensor, Tensor], Kernel]:
    """The fastest exact kernel for this device. UserError where torch has none."""
    if device.type == "cpu" and _Fbgemm.exists():
        return _Fbgemm
    q = torch.arange(-128, 128, device=device).view(16, 16).to(torch.int8)
    try:
        kernel = _IntMM(q, torch.ones(16, device=device))
        exact = bool(torch.equal(kernel(torch.eye(16, device=device)), q.t().float()))
    except (RuntimeError, AttributeError):
        exact = False
    if not exact:
        raise UserError(f"--quantize=int8: torch {torch.__version__} has no int8 matrix product for {device}. Leave it out.")
    return _IntMM


class Int8Weight(nn.Module):
    """A matrix W [out, in] as int8 rows and a float32 scale for each. Holds no parameters: there is nothing to train.

    weight: [out, in], of any float dtype. largest: [out], the row maxima of |W|, over all ranks where W is split by columns.
    """

    def __init__(self, weight: Tensor, largest: Tensor):
        super().__init__()
        largest = largest.float()
        scale = torch.where(largest == 0, 1.0, largest / LEVELS)
        q = (weight.float() / scale.unsqueeze(1)).round_().to(torch.int8)
        self.nbytes = q.numel() + 4 * len(scale)
        self.kernel = kernel_of(weight.device)(q, scale)
        worth = [float(BASE) ** i for i in range(DIGITS)]
        # the leading 0 is the digit before the first: each is what the one before has left over, times BASE
        self.steps = torch.tensor([0.0, *(HALF * w for w in worth)], device=weight.device).view(-1, 1, 1)
        self.values = torch.tensor([1 / (HALF * w) for w in worth], device=weight.device).view(-1, 1, 1)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> x W^T [..., out], in the dtype of x."""
        return _product(self, x)


@outside_graphs  # a compiler knows nothing of packed weights
def _product(weight: Int8Weight, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    largest = rows.abs().amax(-1, keepdim=True).clamp_min_(1e-30)  # [rows, 1]
    scaled = (rows * (weight.steps / largest)).round_()  # [1 + DIGITS, rows, in]; integers below 2**24, so exact
    digits = torch.sub(scaled[1:], scaled[:-1], alpha=BASE)
    y = weight.kernel(digits).mul_(weight.values * largest).sum(0)  # [DIGITS, rows, out] -> [rows, out]
    return y.to(x.dtype).view(*x.shape[:-1], -1)


class QuantizedColumnParallelLinear(nn.Module):
    """ColumnParallelLinear over an int8 weight: x [..., in_features] -> this rank's columns of y. No collective."""

    def __init__(self, layer: ColumnParallelLinear):
        super().__init__()
        self.in_features, self.bias = layer.in_features, layer.bias
        self.int8 = Int8Weight(layer.weight, layer.weight.abs().amax(1))

    def forward(self, x: Tensor) -> Tensor:
        _check_width(self, x, self.in_features)
        y = self.int8.product(x)
        return y if self.bias is None else y + self.bias


class QuantizedRowParallelLinear(nn.Module):
    """RowParallelLinear over an int8 weight: this rank's columns of x -> y [..., out_features]. One all-reduce (g).

    largest: [out_features], the maxima of the full matrix's rows.
    """

    def __init__(self, layer: RowParallelLinear, largest: Tensor):
        super().__init__()
        self.local_in, self.axis, self.bias = layer.local_in, layer.axis, layer.bias
        self.int8 = Int8Weight(layer.weight, largest)

    def forward(self, x: Tensor) -> Tensor:
        _check_width(self, x, self.local_in)
        y = g(self.int8.product(x), self.axis)
        return y if self.bias is None else y + self.bias


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
        _check_width(self, x, self.weight.shape[1])
        return self.int8.product(x)[..., : self.hi - self.lo]


@torch.no_grad()
def quantize(model: nn.Module, gather: Gather) -> None:
    """Replace every sharded layer of a loaded model by its int8 form, in place, freeing the float weights one by one.

    Every rank calls it. What is left of the parameters is frozen: the model infers, it does not train. `gather` is how
    ranks agree on the scales of row-parallel layers, once. UserError where torch has no kernel for the device.
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


def weight_bytes(model: nn.Module) -> int:
    """Bytes of this rank's weights: its parameters, and int8 rows with their scales."""
    int8 = sum(module.nbytes for module in model.modules() if isinstance(module, Int8Weight))
    return int8 + sum(p.numel() * p.element_size() for p in model.parameters())

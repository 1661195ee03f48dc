"""Weights packed for the products of product.c: on a CPU rank of one thread they stand in the place
of a sharded layer's weight, which they free.

They keep the weight's precision, float32, 16 bits or int8, and are widened in registers, int8 only
if it cannot be multiplied as it is (digits.c). Inputs, sums and messages are float32. So a model
of 16 bits computes what the float32 model of the same rounded weights does, from half the memory.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from base.native import load
from parallel.layers import Sharded, VocabParallelEmbedding

SOURCES = [Path(__file__).with_name(name) for name in ("decode.c", "product.c", "digits.c")]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def fields(names: str) -> list[tuple[str, Any]]:
    """The names and types of a structure's or function's fields: * marks a pointer, else int64."""
    return [(name.rstrip("*"), ctypes.c_void_p if name.endswith("*") else ctypes.c_int64)
            for name in names.split()]


def address(tensor: Tensor | None) -> int | None:
    """NULL for None. The caller keeps the tensor, which is contiguous, while C uses the address."""
    return None if tensor is None else tensor.data_ptr()


def digits(library: ctypes.CDLL, rows: int, inputs: int) -> Tensor:
    """Memory in which a product with int8 weights has its inputs' digits"""
    return torch.empty(rows * library.nanotp_digits(ctypes.c_int64(inputs)), dtype=torch.int8)


class Linear(ctypes.Structure):
    _fields_ = fields("panels* factor* bias* outputs inputs kind activation")


class Packed(nn.Module):
    """A matrix W [out, in]. weight: W, or with scale [out, 1] the int8 numbers of W = q * scale."""

    panels: Tensor
    scale: Tensor | None

    def __init__(self, library: ctypes.CDLL, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        kept = weight.dtype
        self.library, self.shape, self.kind = library, weight.shape, KINDS[kept]
        panel, depth = library.nanotp_panel(), library.nanotp_depth()
        if kept == torch.int8 and depth > 1:  # so many inputs are packed as one number
            weight = F.pad(weight, (0, -weight.shape[1] % depth)).view(torch.int32)
        out, width = weight.shape
        panels = weight.new_empty(-(-out // panel), width, panel)
        self.register_buffer("panels", panels.view(kept))
        self.register_buffer("scale", scale)
        sizes = map(ctypes.c_int64, (out, width, weight.itemsize))
        places = map(ctypes.c_void_p, (weight.contiguous().data_ptr(), panels.data_ptr()))
        library.nanotp_pack(*places, *sizes)

    def linear(self, bias: Tensor | None = None, activation: int = 0) -> Linear:
        """For C. activation: 0 for none, else from 1 on as model.ACTIVATIONS has them."""
        places = map(address, (self.panels, self.scale, bias))
        return Linear(*places, *self.shape, self.kind, activation)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] float32 -> x W^T + bias [..., out]"""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.shape[0])
        rows, inputs = x.numel() // self.shape[1], self.shape[1]
        work = digits(self.library, rows, inputs)
        x_at, y_at, work_at = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y, work))
        linear = ctypes.byref(self.linear(bias))
        self.library.nanotp_product(linear, x_at, y_at, ctypes.c_int64(rows), work_at)
        return y

    def rows(self, ids: Tensor, lo: int) -> Tensor:
        """ids [...] int64 -> [..., in] float32, row id - lo of W; zeros if it has no such row."""
        ids = ids.contiguous()
        y = self.panels.new_empty(*ids.shape, self.shape[1], dtype=torch.float32)
        places, linear = map(ctypes.c_void_p, (ids.data_ptr(), y.data_ptr())), self.linear()
        numbers = map(ctypes.c_int64, (ids.numel(), lo))
        self.library.nanotp_rows(ctypes.byref(linear), next(places), *numbers, next(places))
        return y


def suits(model: Any) -> bool:
    """Whether the products of a model are faster packed: on one CPU thread, as far as measured."""
    return model.device.type == "cpu" and not model.compiled and torch.get_num_threads() == 1


@torch.no_grad()
def pack(model: Any) -> ctypes.CDLL:
    """Pack the weights of a model on a CPU, quantized or not, layer by layer. Its other parameters
    become float32. Returns the library of decode.c. Unavailable without a compiler."""
    wte, layers = model.transformer.wte, [m for m in model.modules() if isinstance(m, Sharded)]
    if isinstance(layers[-1].stored, Packed):  # the model is packed
        library: ctypes.CDLL = layers[-1].stored.library
        return library
    library = load(*SOURCES)
    model.requires_grad_(False)
    for layer in layers:
        weight, int8 = getattr(layer, "weight", None), layer.stored
        rows = layer.hi - layer.lo if isinstance(layer, VocabParallelEmbedding) else None
        if layer is wte and weight is not None:  # tokens are looked up in it
            layer.table = layer.stored = Packed(library, wte.weight[:rows])
        if int8 is not None:
            layer.stored = Packed(library, int8.q[:rows], int8.scale[:rows])
        elif layer is not wte:
            layer.stored = Packed(library, layer.weight[:rows])
        if weight is not None:
            del layer.weight
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return library

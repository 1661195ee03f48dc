"""The decode step of a GPU in Triton kernels: four products and one attention a layer.

`hidden` has their order. The function above a kernel launches it. Only this file needs triton.
Nobody has measured the kernels on a GPU yet: tests run them in Triton's interpreter on a CPU, and
compile them for a GPU.

On a GPU that has programmatic dependent launch (DEPENDENT) a kernel starts while the one before it
ends. Until it waits for that one it reads only what no kernel of the same step writes: weights,
lengths and the keys and values of earlier steps. Every program waits, so a kernel that has waited
sees what all earlier ones wrote.

Shapes: C inputs of a product, h = this rank's heads, D = head width.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inference.ahead import FixedCache
from model import LayerNorm
from parallel.collectives import all_reduce
from parallel.quantized import quantization
from tp_model import TensorParallelGPT

MOST_ROWS = 8  # of a step; the sums of more do not fit a thread's registers
SPAN = 128  # positions of a cache that one program attends to


def unusable(model: TensorParallelGPT) -> str:
    """Why `hidden` cannot run this model, or ""."""
    if model.device.type != "cuda":
        return f"they run on a GPU, not on {model.device.type}"
    if quantization(model):
        return "they read no 8-bit matrices"
    c = model.config
    if "gelu" not in c.activation or c.layer_norm_epsilon != 1e-5 or c.attention_factor(1) != 1:
        return "they know GELU, layer_norm_epsilon=1e-05 and attention scaled by 1 / sqrt(D) alone"
    return "" if model.schedule.is_plain else f"they skip no sync point, and sync={model.schedule}"


def hidden(model: TensorParallelGPT, tokens: Tensor, cache: FixedCache) -> Tensor:
    """TensorParallelGPT.hidden; by itself for more than one token a row or MOST_ROWS rows."""
    if tokens.shape[1] > 1 or len(tokens) > MOST_ROWS:
        return model.hidden(tokens, cache)
    x = model.embed(tokens, cache).x[:, 0]
    y: Any = None  # what has arrived, to be added to x
    for block, kv in zip(model.blocks, cache.kv, strict=True):
        attn, mlp, activation = block.attn, block.mlp, model.config.activation
        qkv, x = product(x, attn.c_attn.weight, attn.c_attn.bias, block.ln_1, y)
        y = attend(qkv, kv, cache.at)
        y, _ = product(y, attn.c_proj.weight, _once(attn))
        y = all_reduce(y, attn.axis, "forward")
        columns, x = product(x, mlp.c_fc.weight, mlp.c_fc.bias, block.ln_2, y, activation)
        y, _ = product(columns, mlp.c_proj.weight, _once(mlp))
        y = all_reduce(y, mlp.axis, "forward")
    final: Tensor = model.transformer.ln_f(x + y)
    return final.unsqueeze(1)


def _once(body: Any) -> Tensor | None:
    """The bias of c_proj, on the one rank that adds it."""
    bias: Tensor | None = body.c_proj.bias
    return bias if body.axis.rank == 0 else None


def _launched(x: Tensor, warps: int) -> tuple[bool, dict[str, Any]]:
    """Whether kernels on x's device are dependent, and a launch's options."""
    dependent = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    # enable_fp_fusion: newer versions warn where it is not given
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    return dependent, options | ({"launch_pdl": True} if dependent else {})


# --- y = activation(norm(x + more) W^T + bias) ----------------------------------------------------


def blocks(rows: int, C: int, itemsize: int) -> tuple[int, int, int]:
    """A program's outputs, its block of a weight's row, and warps. A thread reads 16 bytes at once
    and has a sum for each output and row, which must fit its registers."""
    warps = 4
    return 4 if rows <= 4 else 2, min(triton.next_power_of_2(C), 32 * warps * 16 // itemsize), warps


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: LayerNorm | None = None,
    more: Tensor | None = None, activation: str = "", cut: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [rows, outputs], x + more) of x and more [rows, C] and weight [outputs, C].

    more: only with norm. activation: gelu, gelu_tanh or "". Sums are in float32. cut: see `blocks`.
    """
    (rows, C), outputs = x.shape, len(weight)
    out, total = x.new_empty(rows, outputs), x if more is None else torch.empty_like(x)
    block_out, block_c, warps = cut or blocks(rows, C, x.element_size())
    dependent, options = _launched(x, warps)
    gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    _product[triton.cdiv(outputs, block_out),](
        x, more, total, gain, shift, weight, bias, out, outputs, C, triton.next_power_of_2(C),
        rows, triton.next_power_of_2(rows), block_out, block_c, activation, dependent, **options,
    )  # fmt: skip
    return out, total


@triton.jit
def _sum(x, more, at, mask):
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if more is not None:
        value += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)  # as the residual stream keeps it
    return value


@triton.jit
def _product(
    x, more, total, gain, shift, weight, bias, out, outputs, C: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Everything is [R, OUT, BLOCK], in one layout, so nothing moves between threads before the
    last sum. WIDTH, R: C and ROWS, as powers of two."""
    number = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row, column = tl.arange(0, R)[:, None, None], tl.arange(0, BLOCK)[None, None, :]
    tile, here = weight + number[None, :, None] * C + column, number[None, :, None] < outputs
    w = tl.load(tile, mask=here & (column < C), other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if gain is not None:
        every = tl.arange(0, WIDTH)[None, None, :]
        mask = (row < ROWS) & (every < C)
        whole = _sum(x, more, row * C + every, mask)
        if (more is not None) and (tl.program_id(0) == 0):
            tl.store(total + row * C + every, whole, mask=mask)
        mean = tl.sum(whole, axis=2, keep_dims=True) / C
        off = tl.where(mask, whole - mean, 0.0)
        scale = tl.rsqrt(tl.sum(off * off, axis=2, keep_dims=True) / C + 1e-5)
    sums = tl.zeros([R, OUT, BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        at = start + column
        following = tl.load(tile + start + BLOCK, mask=here & (at + BLOCK < C), other=0.0)
        value = _sum(x, more, row * C + at, (row < ROWS) & (at < C))
        if gain is not None:
            value = (value - mean) * scale * tl.load(gain + at, mask=at < C, other=0.0)
            if shift is not None:
                value += tl.load(shift + at, mask=at < C, other=0.0)
        sums += value * w.to(tl.float32)
        w = following
    y, row, number = tl.sum(sums, axis=2), tl.arange(0, R)[:, None], number[None, :]
    if bias is not None:
        y += tl.load(bias + number, mask=number < outputs, other=0.0)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is sigmoid(2 u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    tl.store(out + row * outputs + number, y, mask=(row < ROWS) & (number < outputs))


# --- attention of one new token a row -------------------------------------------------------------


def attend(qkv: Tensor, kv: Tensor, lengths: Tensor, span: int = SPAN) -> Tensor:
    """The heads [rows, h * D] of qkv [rows, 3 * h * D]: a row's queries, new keys, new values.

    kv [rows, 2 * h, size, D]: keys, then values, of a row's lengths[row] tokens; the new ones are
    written after them. Programs take `span` positions each; a second kernel merges theirs.
    """
    rows, heads, size, D = len(kv), kv.shape[1] // 2, kv.shape[2], kv.shape[3]
    out, splits = qkv.new_empty(rows, heads * D), triton.cdiv(size, span)
    # of each program: the largest score, the sum of weights, the sum of weighted values
    parts = torch.empty(rows, heads, splits, D + 2, dtype=torch.float32, device=qkv.device)
    width, scale = triton.next_power_of_2(D), math.log2(math.e) / math.sqrt(D)
    dependent, options = _launched(qkv, 4)
    _attend[rows, heads, splits](
        qkv, kv, lengths, parts, out, size, heads, scale, D, width, splits, span, dependent,
        **options,
    )  # fmt: skip
    if splits > 1:
        most = triton.next_power_of_2(splits)
        shape = heads, D, width, splits, most, span, dependent
        _merge[rows, heads](parts, lengths, out, *shape, **options)
    return out


@triton.jit
def _attend(
    qkv, kv, lengths, parts, out, size, heads, scale, D: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """WIDTH: D, as a power of two. scale: of scores that are exponents of 2."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    at, d = split * SPAN + tl.arange(0, SPAN)[:, None], tl.arange(0, WIDTH)[None, :]
    keys = kv + (2 * heads * row + head).to(tl.int64) * size * D + d
    values = kv + (2 * heads * row + heads + head).to(tl.int64) * size * D + d
    k = tl.load(keys + at * D, mask=(at < length) & (d < D), other=0.0)
    v = tl.load(values + at * D, mask=(at < length) & (d < D), other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mine = qkv + (3 * heads * row + head) * D + d
    q = tl.load(mine, mask=d < D, other=0.0).to(tl.float32)
    new_k = tl.load(mine + heads * D, mask=d < D, other=0.0)
    new_v = tl.load(mine + 2 * heads * D, mask=d < D, other=0.0)
    if length // SPAN == split:
        tl.store(keys + length * D, new_k, mask=d < D)
        tl.store(values + length * D, new_v, mask=d < D)
    k = tl.where(at == length, new_k, k).to(tl.float32)
    v = tl.where(at == length, new_v, v).to(tl.float32)
    score = tl.sum(q * k, axis=1, keep_dims=True) * scale
    score = tl.where(at <= length, score, float("-inf"))
    largest = tl.maximum(tl.max(score), -1e30)  # -inf in a program beyond the length
    weight = tl.exp2(score - largest)
    total, y = tl.sum(weight), tl.sum(weight * v, axis=0, keep_dims=True)
    if SPLITS == 1:
        tl.store(out + (row * heads + head) * D + d, y / total, mask=d < D)
    else:
        part = parts + ((row * heads + head) * SPLITS + split) * (D + 2)
        tl.store(part, largest)
        tl.store(part + 1, total)
        tl.store(part + 2 + d, y, mask=d < D)


@triton.jit
def _merge(
    parts, lengths, out, heads, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    MOST: tl.constexpr, SPAN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """MOST: SPLITS, as a power of two. Programs beyond the row's length count for nothing."""
    row, head = tl.program_id(0), tl.program_id(1)
    split, d = tl.arange(0, MOST)[:, None], tl.arange(0, WIDTH)[None, :]
    there = split <= tl.load(lengths + row) // SPAN
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part = parts + ((row * heads + head) * SPLITS + split) * (D + 2)
    largest = tl.load(part, mask=there, other=float("-inf"))
    weight = tl.exp2(largest - tl.max(largest))
    total = tl.sum(weight * tl.load(part + 1, mask=there, other=0.0))
    y = tl.load(part + 2 + d, mask=there & (d < D), other=0.0)
    y = tl.sum(weight * y, axis=0, keep_dims=True) / total
    tl.store(out + (row * heads + head) * D + d, y, mask=d < D)

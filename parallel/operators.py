"""Collectives and dropout as operators of torch, which a compiler carries through its graphs.

An operator makes its call whenever the graph runs, so the account and the watchdog see it as they
see any other. Operators take no objects: `tag` holds the number of the axis. It is a tensor, as a
graph with another number would be another graph, and all layers share one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import attend
from parallel import collectives
from parallel.collectives import AXES, Axis

LIBRARY = torch.library.Library("nanotp", "FRAGMENT")


def operator(schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> None:
    """Define an operator nanotp::...; shape: makes an empty result for the compiler."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanotp::{name}", shape, lib=LIBRARY)


def _send(method: str, x: Tensor, tag: Tensor, direction: str, *more: Any) -> Tensor:
    return collectives._send(method, AXES[int(tag)], direction, x, *more)


def _start(x: Tensor, tag: Tensor, direction: str) -> Tensor:
    axis, total = AXES[int(tag)], x.clone(memory_format=torch.contiguous_format)
    axis.waits.append(collectives._start_all_reduce(total, axis, direction))
    return total


def _wait(total: Tensor, tag: Tensor) -> None:
    if (found := AXES[int(tag)].waits.popleft()()) is not total:
        total.copy_(found)


def _tokens(x: Tensor, tag: Tensor, direction: str, tokens: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], tokens, x.shape[2])


def _alike(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


operator("all_reduce(Tensor x, Tensor tag, str direction, str op) -> Tensor",
         lambda *args: _send("all_reduce", *args), _alike)
operator("reduce_scatter(Tensor x, Tensor tag, str direction, SymInt tokens) -> Tensor",
         lambda *args: _send("reduce_scatter", *args[:3]), _tokens)
operator("gather_tokens(Tensor x, Tensor tag, str direction, SymInt n, Tensor? after) -> Tensor",
         lambda *args: _send("gather_tokens", *args[:4]), _tokens)
operator("start(Tensor x, Tensor tag, str direction) -> Tensor", _start, _alike)
operator("wait(Tensor(a!) total, Tensor tag) -> ()", _wait, lambda total, tag: None)

# --- dropout of activations that other ranks do not hold, each rank with masks of its own ---------


def drawn_seed() -> Tensor:
    """A seed from the stream that all ranks of a tp group share: so activation checkpointing, which
    restores that stream, repeats it."""
    return torch.randint(2**62, ())


@contextmanager
def own_stream(seed: Tensor, device: torch.device, axis: Axis) -> Iterator[None]:
    """Within, torch's default stream is this rank's own: that of the seed, moved by the rank."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed) + axis.rank)
        yield


def own_dropout(x: Tensor, p: float, axis: Axis) -> Tensor:
    if torch.compiler.is_compiling():
        return x * torch.ops.nanotp.own_mask(x.detach(), p, axis.tag)
    with own_stream(drawn_seed(), x.device, axis):
        return F.dropout(x, p)


def attend_with_own_dropout(q: Tensor, k: Tensor, v: Tensor, p: float, axis: Axis) -> Tensor:
    """Attention whose dropout mask is this rank's own, as its heads are."""
    make = torch.ops.nanotp.attend if torch.compiler.is_compiling() else _attend
    y: Tensor = make(q, k, v, p, axis.tag)[0]
    return y


def _own_mask(x: Tensor, p: float, tag: Tensor) -> Tensor:
    with own_stream(drawn_seed(), x.device, AXES[int(tag)]):
        return F.dropout(torch.ones_like(x), p)


def _attend(q: Tensor, k: Tensor, v: Tensor, p: float, tag: Tensor) -> tuple[Tensor, Tensor]:
    seed = drawn_seed()
    with own_stream(seed, q.device, AXES[int(tag)]):
        return attend(q, k, v, None, p).contiguous(), seed


def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, p: float,
                     tag: Tensor) -> tuple[Tensor, ...]:
    """The forward pass once more, with the same mask, and its gradients."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad(), own_stream(seed, q.device, AXES[int(tag)]):
        y = attend(q, k, v, None, p)
    return tuple(x.contiguous() for x in torch.autograd.grad(y, leaves, grad))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.p, tag = inputs
    ctx.save_for_backward(q, k, v, output[1], tag)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, seed, tag = ctx.saved_tensors
    return *torch.ops.nanotp.attend_backward(grad, q, k, v, seed, ctx.p, tag), None, None


operator("own_mask(Tensor x, float p, Tensor tag) -> Tensor", _own_mask,
         lambda x, p, tag: torch.empty_like(x))
operator("attend(Tensor q, Tensor k, Tensor v, float p, Tensor tag) -> (Tensor, Tensor)", _attend,
         lambda q, *_: (q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3]),
                        torch.empty((), dtype=torch.int64)))
operator("attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor seed, float p, "
         "Tensor tag) -> (Tensor, Tensor, Tensor)", _attend_backward,
         lambda grad, *qkv: tuple(x.new_empty(x.shape) for x in qkv[:3]))
torch.library.register_autograd("nanotp::attend", _backward, setup_context=_setup, lib=LIBRARY)


def wanted(ctx: Any, number: int) -> bool:
    """Whether this backward pass wants an input's gradient. A zero-bubble schedule makes two: one
    for gradients of activations, a later one for those of weights."""
    needs: bool = ctx.needs_input_grad[number]
    if not needs or torch.compiler.is_compiling():
        return needs
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[number][0])
    except RuntimeError:  # of a leaf that autograd.grad was asked for
        return True

"""The collectives as operators of torch, which a compiler carries through its graphs.

An operator makes its call whenever the graph runs, so the account and the watchdog see it as they
see any other. Operators take no objects: `tag` holds the number of the axis. It is a tensor, as a
graph with another number would be another graph, and all layers share one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel import collectives
from parallel.collectives import AXES, Axis

LIBRARY = torch.library.Library("nanotp", "FRAGMENT")


def operator(schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> None:
    """Define an operator nanotp::...; shape: makes an empty result for the compiler."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanotp::{name}", shape, lib=LIBRARY)


def axis_of(tag: Tensor) -> Axis:
    return AXES[int(tag)]


def _send(method: str, x: Tensor, tag: Tensor, direction: str, *more: Any) -> Tensor:
    return collectives._send(method, axis_of(tag), direction, x, *more)


def _start(x: Tensor, tag: Tensor, direction: str) -> Tensor:
    axis, total = axis_of(tag), x.clone(memory_format=torch.contiguous_format)
    axis.waits.append(collectives._start_all_reduce(total, axis, direction))
    return total


def _wait(total: Tensor, tag: Tensor) -> None:
    if (found := axis_of(tag).waits.popleft()()) is not total:
        total.copy_(found)


def _tokens(x: Tensor, tag: Tensor, direction: str, tokens: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], tokens, x.shape[2])


def _alike(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


operator("all_reduce(Tensor x, Tensor tag, str direction, str op) -> Tensor",
         lambda *args: _send("all_reduce", *args), _alike)
operator("reduce_scatter(Tensor x, Tensor tag, str direction, SymInt tokens) -> Tensor",
         lambda *args: _send("reduce_scatter", *args[:3]), _tokens)
operator("gather_tokens(Tensor x, Tensor tag, str direction, SymInt tokens, Tensor? after) -> Tensor",
         lambda *args: _send("gather_tokens", *args[:4]), _tokens)
operator("start(Tensor x, Tensor tag, str direction) -> Tensor", _start, _alike)
operator("wait(Tensor(a!) total, Tensor tag) -> ()", _wait, lambda total, tag: None)

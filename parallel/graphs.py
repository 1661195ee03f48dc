"""Calls that torch.compile leaves to Python."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """A compiled caller's graph ends before this function and another begins after it.

    torch.compiler.disable, without its import of the compiler: that takes seconds, which a run
    without --compile need not wait.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        before = set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(before)

    marked: Any = call
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = None
    return call


def compile_each(blocks: nn.ModuleList) -> None:
    """torch.compile each block in place. Its graph breaks at the collectives."""
    for block in blocks:
        block.compile()

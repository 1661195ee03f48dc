"""What torch.compile leaves to Python."""

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class outside_graphs(Generic[P, R]):
    """torch.compiler.disable, put off until something is compiled: it imports the compiler, most of a second that a run
    without --compile need not wait. A compiled caller's graph ends before the call and another begins after it."""

    def __init__(self, function: Callable[P, R]):
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    @classmethod
    def take_effect(cls) -> None:
        """Before the first compilation of a process."""
        setattr(cls, "__call__", torch.compiler.disable(cls.__call__))  # noqa: B010  mypy has no word for it

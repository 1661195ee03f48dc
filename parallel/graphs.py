"""Functions that torch.compile leaves to Python."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])
_Action = eval_frame._FrameAction
_SKIP = eval_frame._FrameExecStrategy(_Action.SKIP, _Action.SKIP)  # this frame, and all within


def outside_graphs(function: F) -> F:
    """A compiled caller's graph ends before this function, and another begins after it.

    torch.compiler.disable, without its import of the compiler: that takes seconds, which a run
    without --compile need not wait.
    """
    marked: Any = function
    eval_frame.set_code_exec_strategy(marked.__code__, _SKIP)
    marked._torchdynamo_disable, marked._torchdynamo_disable_msg = True, None
    return function

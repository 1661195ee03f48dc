"""Delayed sync points: the ranks' outputs of a sub-block are summed while the next ones compute.

After sub-block n rank i goes on at once with its own output own_i(n) and the bias b(n). The
all-reduce of own(n) starts there, and its sum joins the stream before sub-block a(n): n + 1 where
the ranks wait, else n + 1 + D. So sub-block n reads, with X(n) the part on which all ranks agree,

    h_i(n) = X(n) + sum of own_i(m) over m under way (m < n < a(m))
    X(n)   = X(0) + sum of b(m) over m < n + sum of the ranks' sums of own(m) over a(m) <= n

and before ln_f everything arrives (Delayed Tensor Parallelism, blog.kog.ai, and Ladder-Residual,
arXiv 2501.06589, are of this kind). The gradient of what arrived late is summed late: with G(n) the
all-reduce of the ranks' gradients of h(n), and E the gradient of the last X,

    gradient of own_i(m) = E + sum of G(n) over n >= a(m) + sum of its own at h_i(n), m < n < a(m)

G(n) starts when sub-block n's backward pass ends, and is waited for by the m with a(m) = n.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Axis, all_reduce_later
from plan.schedule import Schedule


def contribution(norm: Any, body: Any, here: Tensor, *past: Any) -> Tensor:
    """This rank's addend [B, T, C] of a sub-block's output, without the bias. No collective."""
    y: Tensor = body.partial(norm(here), *past)
    return y


def masked(body: Any, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both after dropout, with one mask on all ranks: the dropped parts add up."""
    if not body.training or body.dropout == 0:
        return y, bias
    mask = F.dropout(torch.ones_like(y), body.dropout)
    return y * mask, None if bias is None else bias * mask


class Away:
    """The sums under way in one pass. own: this rank's outputs that are not in the stream yet, by
    the number of their sub-block."""

    def __init__(self, schedule: Schedule):
        self.arrivals = schedule.arrivals()
        self.own, self._totals = dict[int, Tensor](), dict[int, Callable[[], Tensor]]()

    def start(self, n: int, own: Tensor, axis: Axis) -> None:
        """Begin to sum the output of sub-block n."""
        self.own[n] = own
        message = own.detach().clone()  # which may be overwritten
        self._totals[n] = all_reduce_later(message, axis, "forward")

    def due(self, n: int) -> list[Tensor]:
        """Wait for the sums that join before sub-block n."""
        found = [m for m in self.own if self.arrivals[m] <= n]
        for m in found:
            del self.own[m]
        return [self._totals.pop(m)() for m in found]


class Flight:
    """The residual stream of one pass, [B, T, C], and the sums under way. x: of the embeddings.
    run(norm, body, here, ...): this rank's output of a sub-block, without a message.

    The gradient of X takes no edge of autograd's graph: it is kept here, see `gradient_from`.
    """

    def __init__(self, x: Tensor, schedule: Schedule, run: Callable[..., Tensor]):
        self.run, self.delay, self.n, self.away = run, schedule.delay, 0, Away(schedule)
        self.arrivals = self.away.arrivals
        self.previous: Tensor | None = _Start.apply(x, self)
        self.x = x.detach()
        # of the backward pass: G(n) under way; E + G(n) + G(n + 1) + ...; this rank's own sum
        self.late: dict[int, Callable[[], Tensor]] = {}
        self.sums: dict[int, Tensor] = {}
        self.end: Any = None  # E
        self.local: Any = 0.0

    def enter(self, axis: Axis) -> Tensor:
        """What the next sub-block reads on this rank. axis: of the sub-block, for its gradient."""
        self._join(self.n)
        previous = self.x, self.previous
        here: Tensor = _Enter.apply(self, self.n, axis, *previous, *self.away.own.values())
        return here

    def leave(self, y: Tensor, bias: Tensor | None, axis: Axis) -> None:
        """Go on with this rank's output y [B, T, C]. bias: of y's shape, the same on all ranks."""
        own = _Leave.apply(self, self.n, axis.size, y, bias)
        self.away.start(self.n, own, axis)
        if bias is not None:
            self.x = self.x + bias.detach()
        self.previous, self.n = own, self.n + 1

    def land(self) -> Tensor:
        """The stream after the last sub-block, the same on all ranks."""
        self._join(self.n)
        landed: Tensor = _Land.apply(self, self.x, self.previous)
        self.previous = None  # which knows the graph, which knows this object
        return landed

    def _join(self, n: int) -> None:
        for total in self.away.due(n):
            self.x = self.x + total

    def gradient_from(self, n: int) -> Tensor:
        """E + G(n) + G(n + 1) + ..."""
        while (first := min(self.sums)) > n:
            late = self.late.pop(first - 1, None)  # none: nothing below learns from it
            found = self.sums[first]
            self.sums[first - 1] = found if late is None else found + late()
        return self.sums[n]

    def forget(self, n: int) -> None:
        """Of the sums keep those that outputs before sub-block n want, and the last one."""
        last = min(self.sums)
        self.sums = {k: v for k, v in self.sums.items() if k <= n + self.delay or k == last}


class _Start(torch.autograd.Function):
    """X(0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[Tensor, None]:
        return ctx.flight.gradient_from(0), None


class _Enter(torch.autograd.Function):
    """h(n) of X(n) and this rank's outputs under way. previous: the output before this sub-block,
    which has no gradient from here unless it is under way, but must wait for this backward pass."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, n: int, axis: Axis, x: Tensor, previous: Tensor,
                *own: Tensor) -> Tensor:
        ctx.flight, ctx.n, ctx.axis, ctx.under_way = flight, n, axis, len(own)
        return sum(own, x) if own else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        flight = ctx.flight
        flight.late[ctx.n] = all_reduce_later(grad.clone(), ctx.axis, "backward")
        flight.local = flight.local + grad
        return None, None, None, None, None, *[grad] * ctx.under_way


class _Leave(torch.autograd.Function):
    """own(n). Its gradient is the stream's where its sum arrives, and its own on the way there. The
    bias has a part of its gradient on each rank (plan.messages.partial_gradients)."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, n: int, parts: int, y: Tensor,
                bias: Tensor | None) -> Tensor:
        ctx.flight, ctx.n, ctx.parts, ctx.dtype = flight, n, parts, y.dtype
        ctx.set_materialize_grads(False)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        flight, n = ctx.flight, ctx.n
        whole = flight.gradient_from(flight.arrivals[n])
        mine = whole if grad is None else whole + grad
        bias = None
        if ctx.needs_input_grad[4]:
            bias = flight.end / ctx.parts + flight.local
        flight.forget(n)
        return None, None, None, mine.to(ctx.dtype), bias


class _Land(torch.autograd.Function):
    """The last X."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, x: Tensor, previous: Tensor) -> Tensor:
        ctx.flight = flight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        flight = ctx.flight
        flight.end = flight.sums[len(flight.arrivals)] = grad
        return None, None, None

"""A slower link than the host's memory, to try a schedule on: --link.

The ranks, what they compute and their waiting are real. Only the link is emulated: a message
arrives no earlier than the cost model's link (plan/link.py) would deliver it, by the clock that
all processes of a host share. It leaves when its last rank has brought its part. Messages follow
each other: one occupies the link for the time of its bytes, not for the latency.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from base.processes import Exchange
from parallel.shm import ShmTransport, share
from plan.link import Link

SLOTS = 1024  # messages whose times are kept: more than any two ranks are apart
SPIN_S = 1e-4  # a sleep ends about this late


class EmulatedLink:
    """Carries messages as `inner` does, but later. All ranks of the group create it together."""

    name = "shm"

    def __init__(self, inner: ShmTransport, link: Link, exchange: Exchange):
        self.inner, self.link, self.size = inner, link, inner.size
        self._memory, _ = share(inner.rank, 8 * SLOTS * inner.size, exchange)
        times = ctypes.c_double * SLOTS
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._times = [times.from_address(base + 8 * SLOTS * rank) for rank in range(inner.size)]
        self._number, self._free = 0, 0.0  # messages begun; when the link has sent the last one
        self._begun = deque[tuple[int, str, int]]()  # number, op, nbytes; not sent yet
        self._arrivals = dict[int, float]()  # of those that nobody has waited for

    def _begin(self, op: str, nbytes: int) -> int:
        self._number += 1
        self._begun.append((self._number, op, nbytes))
        self._times[self.inner.rank][self._number % SLOTS] = time.monotonic()
        return self._number

    def _arrive(self, number: int) -> None:
        """Wait until message `number` is there. All ranks have brought it, and those before it."""
        while self._begun and self._begun[0][0] <= number:
            n, op, nbytes = self._begun.popleft()
            seconds = self.link.seconds(op, nbytes, self.size)
            sending = replace(self.link, alpha=0.0).seconds(op, nbytes, self.size)
            left = max(self._free, *(times[n % SLOTS] for times in self._times))
            self._free, self._arrivals[n] = left + sending, left + seconds
        arrival = self._arrivals.pop(number)
        if (seconds := arrival - time.monotonic() - SPIN_S) > 0:
            time.sleep(seconds)
        while time.monotonic() < arrival:
            pass

    def _call(self, op: str, nbytes: int, call: Callable[[], Tensor]) -> Tensor:
        number = self._begin(op, nbytes)
        result = call()
        self._arrive(number)
        return result

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return self._call("all_reduce", x.nbytes, lambda: self.inner.all_reduce(x, op))

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        number = self._begin("all_reduce", x.nbytes)
        finish = self.inner.all_reduce_later(x)

        def wait() -> Tensor:
            total = finish()
            self._arrive(number)
            return total

        return wait

    def all_gather(self, x: Tensor) -> Tensor:
        return self._call("all_gather", self.size * x.nbytes, lambda: self.inner.all_gather(x))

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self._call("broadcast", x.nbytes, lambda: self.inner.broadcast(x, source))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._call("reduce_scatter", x.nbytes, lambda: self.inner.reduce_scatter(x))

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        nbytes = len(x) * tokens * x.shape[2] * x.element_size()
        return self._call("all_gather", nbytes, lambda: self.inner.gather_tokens(x, tokens))

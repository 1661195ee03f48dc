"""Messages between the stages of a pipeline that writes text: each stage sends to the next one, the
last to the first. A message leaves at once and waits for its receiver on the way, so that no stage
waits to be heard. It goes through host memory: over nccl a send may wait, and two stages that send
to each other would hang."""

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Axis, torch_group


class Ring:
    """The place of one rank in it. axis: pp, of several ranks."""

    def __init__(self, axis: Axis):
        ranks, self.size, here = axis.track.ranks, axis.size, axis.rank
        self._group: Any = torch_group(axis)
        self._to, self._from = (here + 1) % self.size, (here - 1) % self.size
        # two neighbours count the messages between them alike
        pairs = (ranks[here], ranks[self._to]), (ranks[self._from], ranks[here])
        tracks = (axis.ledger.track("pp ring", pair) for pair in pairs)
        self._out, self._in = (replace(axis, block="pipeline", track=track) for track in tracks)
        self._sent = deque[tuple[Any, Tensor]]()  # torch needs the memory until a message has left

    def send(self, x: Tensor, direction: str = "forward") -> None:
        """Send x, which may be overwritten afterwards, to the next stage."""
        message = x.to("cpu", copy=True)

        def call() -> None:
            self._sent.append((self._group.send([message], self._to, 0), message))
            # of the passes under way, one for each stage, each has sent two messages from here
            self.flush(2 * self.size + 2)

        self._out.account("send", direction, message, call)

    def receive(self, like: Tensor, direction: str = "forward") -> Tensor:
        """The next message of the stage before. like: has its shape, dtype and device."""
        message = torch.empty(like.shape, dtype=like.dtype)
        call = lambda: self._group.recv([message], self._from, 0).wait()  # noqa: E731
        self._in.account("recv", direction, message, call)
        return message.to(like.device)

    def flush(self, most: int = 0) -> None:
        """Wait until at most so many messages are on their way."""
        while len(self._sent) > most:
            self._sent.popleft()[0].wait()

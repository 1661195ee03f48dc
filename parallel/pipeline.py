"""Pipeline stages over the pp axis. PyTorch's own stages and schedules send activations forward and
their gradients backward; here these messages are put in the ledger.

A schedule does one thing at a time: it computes, or it sends and waits for messages. So the seconds
of `pipeline` in the account are those in which this rank does not compute: the bubble and the
transfers. They count for the message that was asked for last. A message that travels while the next
micro-batch is computed costs nothing."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from base.errors import UserError
from parallel.collectives import Axis, clock, elapsed, torch_group
from parallel.ledger import Tally, Track

# it would print the whole schedule with an error that names its cause itself
logging.getLogger(schedules.__name__).setLevel(logging.CRITICAL)


class Messages:
    """The sends and receives of all stages of this rank, for the ledger. Each pair of neighbours
    has a track for each direction, on which both count the same messages."""

    def __init__(self, axis: Axis, device: torch.device):
        self.axis, self.here = axis.at("pipeline"), torch.empty(0, device=device)
        self._asked: tuple[Track, Tally] | None = None  # what this rank waits for, if it waits
        self._sent: tuple[Track, Tally] | None = None
        self._since: Any = None

    def note(self, op: str, direction: str, asked: list[Any]) -> list[Any]:
        """Put messages (P2POp) in the ledger that torch is about to send or to receive."""
        ledger, ranks = self.axis.ledger, self.axis.track.ranks
        for message in asked:
            ends = ranks[self.axis.rank], message.peer
            track = ledger.track(f"pp {direction}", ends if op == "send" else ends[::-1])
            entry, tally = self.axis.line(op, direction)
            if self._asked:
                self._asked[0].waiting = False
            ledger.calling(track, entry, message.tensor.nbytes)
            if ledger.on:
                ledger.record(tally, message.tensor.nbytes, 0.0)
            self._asked = track, tally
            if op == "send":
                self._sent = self._asked
        return asked

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within, a schedule runs, which ends when all its messages have arrived."""
        self._since, self._sent = clock(self.here), None
        yield
        self._arrived()

    def _arrived(self) -> None:
        """This rank has got what it waited for."""
        if self._asked and self.axis.ledger.on:
            seconds = elapsed(self._since, self.here)
            self.axis.ledger.record(self._asked[1], 0, seconds, calls=0)
        if self._asked:
            self._asked[0].waiting = False
        self._asked = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, this rank computes. Then it waits again: if not for a new message, it can only be
        for the last one that it sent."""
        self._arrived()
        yield
        self._since, self._asked = clock(self.here), self._sent
        if self._asked:
            self._asked[0].waiting = True


class Stage(PipelineStage):
    """Stage `number` of `count`. module: called with the stage's input, returns its output. shapes:
    of both, as tensors on the meta device. kept: how many inputs and how many gradients that it has
    received are in use at a time. around: called with a micro-batch's number, returns what its
    forward pass runs in."""

    def __init__(self, module: nn.Module, number: int, count: int, shapes: tuple[Tensor, Tensor],
                 kept: tuple[int, int], messages: Messages,
                 around: Callable[[int], AbstractContextManager[Any]]):
        self.kept, self.messages, self.around = kept, messages, around
        super().__init__(
            module, number, count, messages.here.device, input_args=shapes[0],
            output_args=shapes[1], group=torch_group(messages.axis),
        )  # fmt: skip

    # torch would allocate memory to receive in for each micro-batch of an iteration

    def _prepare_forward_infra(self, count: Any, *args: Any, **more: Any) -> Any:  # type: ignore
        made = super()._prepare_forward_infra(min(count, self.kept[0]), *args, **more)
        infos = self.args_recv_info
        infos.update({micro: infos[micro % self.kept[0]] for micro in range(count)})
        return made

    def _prepare_backward_infra(self, count: Any, *args: Any, **more: Any) -> Any:  # type: ignore
        made = super()._prepare_backward_infra(min(count, self.kept[1]), *args, **more)
        infos, self.chunks = self.grad_recv_info, count
        infos.update({micro: infos[micro % self.kept[1]] for micro in range(count)})
        return made

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        for info in self.args_recv_info[fwd_chunk_id]:
            if (buffer := getattr(info, "buffer", None)) is not None:
                buffer.grad = None  # that of an earlier micro-batch
        return self.messages.note("recv", "forward", super().get_fwd_recv_ops(fwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self.messages.note("send", "forward", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self.messages.note("recv", "backward", super().get_bwd_recv_ops(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self.messages.note("send", "backward", super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **more: Any) -> Any:
        with self.messages.computing(), self.around(fwd_chunk_id):
            try:
                return super().forward_one_chunk(fwd_chunk_id, *args, **more)
            except RuntimeError as error:  # torch wraps the error of a module
                raise error.__cause__ or error from None

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **more: Any) -> None:
        # a sharded model gathers again in the backward pass
        with self.messages.computing(), self.messages.axis.ledger.recomputing():
            super().backward_one_chunk(bwd_chunk_id, *args, **more)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **more: Any) -> None:
        with self.messages.computing():
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **more)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        with self.messages.computing():  # FSDP2 sends what the micro-batches have added up
            super().perform_reduce_grad(grad_scale_factor)

    # Between two stages of one rank torch hands gradients over in forward passes alone, too

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # torch's stages vote whether all of them know their shapes. These do, and send nothing

    def _warmup_forward_vote(self, *args: Any, **more: Any) -> Tensor:
        return torch.ones(1)

    def _warmup_backward_result(self, *args: Any, **more: Any) -> Tensor:
        return torch.ones(1)


def make_schedule(name: str, stages: list[Stage], micro_batches: int,
                  loss: Callable[..., Tensor] | None) -> Any:
    """torch's schedule of this name over a rank's stages. loss: of a last stage's output and
    target; None for forward passes only. UserError if this torch does not have it."""
    try:
        made: Any = schedules.get_schedule_class(name)
    except ValueError:
        has = f"PyTorch {torch.__version__} has no such schedule"
        raise UserError(f"--pp_schedule={name}: {has}. Use --pp_schedule=1F1B.") from None
    single = issubclass(made, schedules.PipelineScheduleSingle)
    return made(stages[0] if single else stages, micro_batches, loss_fn=loss, scale_grads=False)

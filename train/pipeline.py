"""The pipeline of a training run: the model's stages under one of PyTorch's schedules."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError
from parallel.collectives import all_reduce
from parallel.data_parallel import Sharding, rest
from parallel.pipeline import Messages, Stage, make_schedule
from plan.partition import length, spans
from tp_model import Stream, TensorParallelGPT
from train.gradients import sum_gradients
from world.mesh import World


class Part(nn.Module):
    """The module of one stage, with this stage's parameters. x: the tokens [B, T] for the first
    stage; for the others the stream [B, T, C], or this rank's tokens of it [B, t, C]. Returns the
    stream after the stage, of the last one the mean loss [1] of targets [B, T]."""

    def __init__(self, model: TensorParallelGPT, stage: int):
        super().__init__()
        t, self.span = model.transformer, model.stages.layers[stage]
        lo, hi = self.span
        self.is_last = hi == model.config.n_layer
        ends = [t.wte, t.wpe] * (not lo) + [t.ln_f, model.head] * self.is_last
        self.parts = nn.ModuleList([*ends, *t.h[lo:hi]])
        self.model = lambda: model  # as a module of this one it would bring all its parameters

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        model = self.model()
        s = Stream(x, model.region(model.config.block_size)) if self.span[0] else model.embed(x)
        s = model.layers(s, self.span)
        if not self.is_last or targets is None:
            return s.x
        return model.loss(Stream(model.transformer.ln_f(s.x), s.region), targets).reshape(1)


@dataclass(frozen=True)
class StageSharding(Sharding):
    """FSDP2 for each stage of a rank by itself, as PyTorch's stages expect it."""

    parts: dict[int, Part] = field(default_factory=dict)

    def apply(self, model: Any, blocks: Iterable[nn.Module]) -> None:
        for number in model.stages.mine:
            self.parts[number] = Part(model, number)
            super().apply(self.parts[number], filter(None, blocks))


class Pipeline:
    """Runs micro-batches through the stages of a world. count, rows: how many micro-batches an
    iteration has, and the sequences in each. around: as in parallel/pipeline.py."""

    def __init__(self, model: TensorParallelGPT, world: World, count: int, rows: int,
                 eval_rows: int, autocast: Callable[[], AbstractContextManager[Any]]):
        self.model, self.world, self.stages = model, world, model.stages
        self.count, self.scale = count, 1.0
        self.stages.check_micro_batches(count)
        if world.device.type == "cuda" and world.comm != "nccl":
            raise UserError(f"--pp={self.stages.pp} needs --comm=nccl and a GPU for each rank.")
        self.eval_count = model.stages.count  # enough for every schedule
        self.autocast: Any = autocast
        self.seed_of: Callable[[int, int], int]  # of a micro-batch in a stage
        self.messages = Messages(world.pp, model.device)
        sharding: Any = model.sharding
        self.parts: dict[int, Part] = sharding.parts if sharding else {
            number: Part(model, number) for number in self.stages.mine
        }  # fmt: skip
        self._training = self._schedule(count, rows, self._loss)
        self._forward_only = self._schedule(self.eval_count, eval_rows, None)

    def _schedule(self, count: int, rows: int, loss: Any) -> tuple[Any, list[Stage]]:
        """A schedule of `count` micro-batches, and its stages. loss: None for forward passes."""
        model, stages, c = self.model, self.stages, self.model.config
        made = []
        like, own = partial(torch.empty, device="meta"), (0, c.block_size)
        if model.sequence_parallel:
            own = spans(c.block_size, model.tp.size)[model.tp.rank]
        stream = like(rows, length(own), c.n_embd, requires_grad=True)
        tokens = like(rows, c.block_size, dtype=torch.int64)
        kept = (stages.in_flight(count), 1) if loss and stages.kind.each == 1 else (count, count)
        for number, part in self.parts.items():
            out = like(1, requires_grad=True) if part.is_last else stream
            around = partial(self._around, number) if loss else lambda _: self.autocast()
            place = number, stages.count, (stream if number else tokens, out), kept
            made.append(Stage(part, *place, self.messages, around))
        return make_schedule(stages.schedule, made, count, loss), made

    def _around(self, stage: int, micro: int) -> AbstractContextManager[Any]:
        torch.manual_seed(self.seed_of(micro, stage))
        return self.autocast()

    def _loss(self, loss: Tensor, targets: Tensor) -> Tensor:
        return loss.sum() * (self.scale / self.count)

    def _run(self, made: tuple[Any, list[Stage]], x: Tensor, y: Tensor, count: int) -> Tensor:
        """The mean loss of each micro-batch, [count], on all ranks of the pipeline."""
        tokens, targets = [x] if self.stages.has_first else [], {"targets": y}
        schedule, stages = made
        # around all micro-batches: autocast's copies of the weights serve all of them
        with self.messages.step(), torch.autocast(x.device.type, enabled=False):
            losses = schedule.step(*tokens, target=y, **targets if self.stages.has_last else {})
        for stage in stages:  # of an evaluation it would keep all activations
            stage.clear_runtime_states()
            rest(stage.submod)
        if losses is None:
            losses = torch.zeros(count, device=x.device)
        return all_reduce(losses.detach(), self.messages.axis, "step")

    def train(self, x: Tensor, y: Tensor, scale: float,
              seed_of: Callable[[int, int], int]) -> Tensor:
        """Forward and backward passes of an iteration. x, y: [count * rows, T]. Returns the mean
        loss of each micro-batch; the gradients are those of their mean over dp, times `scale`."""
        self.scale, self.seed_of = scale, seed_of
        losses = self._run(self._training, x, y, self.count)
        dp, modules = self.world.dp, (m for part in self.parts.values() for m in part.parts)
        for module in dict.fromkeys(modules) if dp.size > 1 and not self.model.sharding else ():
            sum_gradients(module.parameters(), dp.at("data_parallel"))
            for p in module.parameters():
                p.grad = None if p.grad is None else p.grad.div_(dp.size)
        if self.stages.shares_table:  # after dp, whose sums may be rounded differently at both ends
            sum_gradients([self.model.head.weight], self.world.ends.at("embedding"))
        return losses

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward passes of eval_count batches, in [eval_count * eval_rows, T]: their losses."""
        return self._run(self._forward_only, x, y, self.eval_count)

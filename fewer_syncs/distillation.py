"""Repair by distillation: a model under a schedule learns to do what the same weights did with every sync point.

Run by run (block-to-block in Sync-Point Drop, arXiv 2502.20727): from what the teacher has at a run's beginning, the run is to
give what the teacher has at its end; mean squared error, only the run's parameters learn. End to end: all parameters, and the
teacher's distribution of the next token. The teacher is the model itself under plain Megatron, on the same ranks.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import adamw
from parallel.loss import vocab_parallel_divergence
from plan.schedule import SubBlock
from text.dataset import TokenFile, batch
from tp_model import Stream, TensorParallelGPT
from train import gradients

CLIP = 1.0  # of the gradient's norm, as in training


@dataclass(frozen=True)
class Lessons:
    """What is learned from: `steps` batches of rows x block_size tokens, the learning rate falling to 0 in a line after a
    tenth of warm-up. Alike on all ranks."""

    tokens: TokenFile
    rows: int
    steps: int
    learning_rate: float
    seed: int
    stream: int  # of random batches: one of its own for each thing that learns

    def batches(self, model: TensorParallelGPT, name: str) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(learning rate, inputs [rows, T], targets [rows, T]) of each step."""
        show = model.tp.rank == 0 and sys.stderr.isatty()
        warm = max(1, self.steps // 10)
        for step in tqdm(range(self.steps), desc=name, unit="step", disable=not show):
            share = min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))
            config = model.config
            x, y = batch(self.tokens, range(self.rows), config.block_size, self.seed, step, self.stream, config.vocab_size)
            yield self.learning_rate * share, x.to(model.device), y.to(model.device)


def learn(
    model: TensorParallelGPT,
    learners: list[tuple[str, nn.Parameter]],
    lessons: Lessons,
    name: str,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[float, float]:
    """Let these parameters learn under `loss(inputs, targets)`; every rank calls it. Its mean over the first and over the
    last tenth of the steps."""
    optimizer = adamw(iter(learners), 0.0, lessons.learning_rate, (0.9, 0.95), model.device.type)
    frozen = [p for p in model.parameters() if not any(p is learner for _, learner in learners)]
    losses = []
    for p in frozen:
        p.requires_grad_(False)
    for learning_rate, x, y in lessons.batches(model, name):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        value = loss(x, y)
        value.backward()
        gradients.sum_partial_gradients(model)
        norm = gradients.grad_norm(model).item()
        if math.isfinite(norm):
            torch._foreach_mul_([p.grad for _, p in learners if p.grad is not None], min(1.0, CLIP / (norm + 1e-6)))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
    for p in frozen:
        p.requires_grad_(True)
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def repair_run(
    student: TensorParallelGPT, teacher: TensorParallelGPT, before: list[SubBlock], run: list[SubBlock], lessons: Lessons
) -> tuple[float, float]:
    """Let one run learn. before: all sub-blocks ahead of it."""

    def loss(x: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            start = teacher.through(teacher.embed(x), before)
            end = teacher.through(start, run)
        return (student.through(Stream(start.x), run).x - end.x).square().mean()

    return learn(student, _parameters(student, run), lessons, f"{_name(run[0])} to {_name(run[-1])}", loss)


def repair_whole(student: TensorParallelGPT, teacher: TensorParallelGPT, lessons: Lessons) -> tuple[float, float]:
    """Let all parameters learn the teacher's distribution of the next token."""

    def loss(x: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher.local_logits(teacher.hidden(x)).flatten(0, 1)
        found = student.local_logits(student.hidden(x)).flatten(0, 1)
        return vocab_parallel_divergence(found, wanted, student.tp).mean()

    return learn(student, list(student.named_parameters()), lessons, "end to end", loss)


def train_on(model: TensorParallelGPT, lessons: Lessons) -> tuple[float, float]:
    """Plain further training on the text itself, for as many steps: what is not repair."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = model(x, y)[1]
        assert value is not None
        return value

    return learn(model, list(model.named_parameters()), lessons, "control", loss)


def _name(sub_block: SubBlock) -> str:
    return f"{sub_block[0]}{sub_block[1][0]}"


def _parameters(model: TensorParallelGPT, run: list[SubBlock]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of these sub-blocks, their LayerNorms among them."""
    parts = {"attention": ("ln_1.", "attn."), "mlp": ("ln_2.", "mlp.")}
    own = tuple(f"transformer.h.{layer}.{part}" for layer, kind in run for part in parts[kind])
    return [(name, p) for name, p in model.named_parameters() if name.startswith(own)]

"""`repair`: weights learn to compute with fewer sync points what they computed with all of them.

The teacher is the model with all sync points, the student the same weights under the schedule, on
the same ranks. Stretch by stretch (block-to-block in Sync-Point Drop, arXiv 2502.20727): from the
teacher's stream where a stretch starts, the student's stretch learns the teacher's stream where it
ends, by mean squared error. End to end: all parameters learn the teacher's next-token distribution.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from base.errors import UserError
from base.files import check_target
from checkpoints.convert import SHARD_FILES, place
from checkpoints.manifest import Sync
from checkpoints.sources import Source
from cli.options import RepairOptions
from fewer_syncs.inputs import about, build, open_inputs, perplexity, validation_tokens
from model import adamw
from parallel.loss import vocab_parallel_divergence
from plan.schedule import MODULES, Schedule, SubBlock, short_name
from report import report
from text.dataset import Dataset, TokenFile, batch
from tp_model import Stream, TensorParallelGPT
from train import gradients
from train.checkpoint import export
from world.mesh import World

CLIP = 1.0  # of the gradient's norm, as in training


@dataclass(frozen=True)
class Lessons:
    """`steps` batches of rows x block_size tokens, the same on all ranks. The learning rate rises
    for a tenth of the steps, then falls to 0, both linearly."""

    tokens: TokenFile
    rows: int
    steps: int
    learning_rate: float
    seed: int
    stream: int  # of random batches: every learner has its own

    def batches(self, model: TensorParallelGPT,
                name: str) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(learning rate, inputs [rows, T], targets [rows, T]) of each step."""
        show, config = model.tp.rank == 0 and sys.stderr.isatty(), model.config
        warm = max(1, self.steps // 10)
        for step in tqdm(range(self.steps), desc=name, unit="step", disable=not show):
            share = min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))
            x, y = batch(self.tokens, range(self.rows), config.block_size, self.seed, step,
                         self.stream, config.vocab_size)
            yield self.learning_rate * share, x.to(model.device), y.to(model.device)


def repair(world: World, options: RepairOptions) -> None:
    """The command."""
    out = place(options.out)
    if world.is_main:
        check_target(out, options.force, SHARD_FILES)
    source, dataset, tokenizer = open_inputs(world, options, "repair")
    schedule = Schedule.parse(options.sync, source.config.n_layer)
    if schedule.is_plain:
        raise UserError("--sync=all drops no sync point: there is nothing to repair.")
    if schedule.delay and not options.whole_steps:
        raise UserError(f"--sync={schedule} is repaired end to end, as no stretch lies between two "
                        "sync points: add --whole_steps=300.")
    job = Repair(world, options, source, dataset, schedule)
    if options.steps and not schedule.delay:
        job.stretch_by_stretch()
    if options.whole_steps:
        job.end_to_end()
    evidence, after = job.evidence, job.perplexity(job.student)
    if not math.isfinite(after):
        raise UserError("the repaired weights are not numbers any more: lower --learning_rate or "
                        "--whole_learning_rate.")
    evidence |= {"after": after, "loss": after / job.dense - 1}
    sync = Sync(str(schedule), world.tp.size, dict(evidence))
    description = f"{source.description}, repaired for --sync={schedule}"
    export(world, job.student, out, description, tokenizer.to_json(), sync)
    job.print(f"{options.out}: {schedule.points} sync points, {job.change(after)}")
    if options.control:
        job.control(after)
    if world.is_main:
        report.write(options.report, about("repair", world, source, job.tokens) | {
            "sync": str(schedule), "points": schedule.points, "evidence": evidence})


class Repair:
    """The phases of a repair. Each prints what it did and adds it to the evidence."""

    def __init__(self, world: World, options: RepairOptions, source: Source, dataset: Dataset,
                 schedule: Schedule):
        self.world, self.options, self.schedule = world, options, schedule
        self.teacher = build(world, source, options, Schedule.plain(source.config.n_layer))
        self.student = build(world, source, options, schedule)
        self.tokens = validation_tokens(dataset, options)
        self.lessons = Lessons(dataset.train, options.batch_size, options.steps,
                               options.learning_rate, options.seed, 0)
        self.dense, before = self.perplexity(self.teacher), self.perplexity(self.student)
        self.evidence: dict[str, Any] = {"tokens": len(self.tokens), "dense": self.dense,
                                         "runs": [], "before": before}
        self.print(f"perplexity {self.dense:.4f} with all sync points, {before:.4f} "
                   f"({self.change(before)}) with {schedule.points} of {len(schedule.syncs)} "
                   f"(--sync={schedule}) before repair")

    def print(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    def perplexity(self, model: TensorParallelGPT) -> float:
        return perplexity(model, self.tokens, self.options.batch_size)

    def change(self, perplexity: float) -> str:
        return f"{perplexity / self.dense - 1:+.2%}"

    def keep(self, phase: str, did: str, lessons: Lessons, **more: Any) -> None:
        """What a phase has come to. did: how it is told, before the perplexity."""
        made = self.perplexity(self.student)
        self.print(f"after {lessons.steps} steps {did}perplexity {made:.4f} ({self.change(made)})")
        self.evidence[phase] = {"steps": lessons.steps, "learning_rate": lessons.learning_rate,
                                **more, "perplexity": made}

    def stretch_by_stretch(self) -> None:
        before = list[SubBlock]()
        for i, stretch in enumerate(self.schedule.stretches()):
            if len(stretch) > 1:
                lessons = replace(self.lessons, stream=100 + i)
                error = repair_stretch(self.student, self.teacher, before, stretch, lessons)
                names = list(map(short_name, stretch))
                self.evidence["runs"].append({"run": names, "error": list(error)})
                self.print("run {} to {}: mean squared error {:.3g} -> {:.3g}".format(
                    names[0], names[-1], *error))
            before = before + stretch
        self.keep("by_run", "a run: ", self.lessons)

    def whole(self, steps: int) -> Lessons:
        rate = self.options.whole_learning_rate
        return replace(self.lessons, steps=steps, learning_rate=rate, stream=99)

    def end_to_end(self) -> None:
        lessons = self.whole(self.options.whole_steps)
        first, last = repair_whole(self.student, self.teacher, lessons)
        self.keep("whole", f"end to end: divergence {first:.3g} -> {last:.3g}, ", lessons,
                  divergence=[first, last])

    def control(self, after: float) -> None:
        """The teacher's perplexity after as many steps on the text. after: the student's."""
        steps = max(self.options.steps * (not self.schedule.delay), self.options.whole_steps)
        model = self.teacher
        learn(model, self.whole(steps), "control", lambda x, y: model(x, y)[1])
        self.evidence["control"] = made = self.perplexity(model)
        self.print(f"control: the dense model after {steps} more steps on the text: {made:.4f} "
                   f"({self.change(made)}); the repaired one is {after / made - 1:+.2%} beside it")


def learn(model: TensorParallelGPT, lessons: Lessons, name: str,
          loss: Callable[[Tensor, Tensor], Any],
          learners: tuple[str, ...] = ("",)) -> tuple[float, float]:
    """Minimise `loss(inputs, targets)`; every rank calls it.

    learners: the beginnings of the names of the parameters that learn. Returns the mean loss of the
    first and of the last tenth of the steps.
    """
    for parameter, p in model.named_parameters():
        p.requires_grad_(parameter.startswith(learners))
    losses = []
    optimizer = adamw(model.named_parameters(), 0.0, lessons.learning_rate, (0.9, 0.95))
    for learning_rate, x, y in lessons.batches(model, name):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        value = loss(x, y)
        value.backward()
        gradients.sum_partial_gradients(model)
        norm = gradients.grad_norm(model).item()
        if math.isfinite(norm):
            present = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_mul_(present, min(1.0, CLIP / (norm + 1e-6)))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def repair_stretch(student: TensorParallelGPT, teacher: TensorParallelGPT, before: list[SubBlock],
                   stretch: list[SubBlock], lessons: Lessons) -> tuple[float, float]:
    """Only the stretch's parameters learn. before: all sub-blocks ahead of it."""

    def loss(x: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            start = teacher.through(teacher.embed(x), before)
            end = teacher.through(start, stretch)
        return (student.through(Stream(start.x), stretch).x - end.x).square().mean()

    name = f"{short_name(stretch[0])} to {short_name(stretch[-1])}"
    modules = (f"transformer.h.{i}.{part}." for i, kind in stretch for part in MODULES[kind])
    return learn(student, lessons, name, loss, tuple(modules))


def repair_whole(student: TensorParallelGPT, teacher: TensorParallelGPT,
                 lessons: Lessons) -> tuple[float, float]:
    """All parameters learn the teacher's distribution of the next token."""

    def loss(x: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher.local_logits(teacher.hidden(x)).flatten(0, 1)
        found = student.local_logits(student.hidden(x)).flatten(0, 1)
        return vocab_parallel_divergence(found, wanted, student.tp).mean()

    return learn(student, lessons, "end to end", loss)

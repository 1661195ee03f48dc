"""The sensitivity scan: the exact perplexity of a text under many schedules, and the search among them.

What has been measured is kept in a file after each measurement, so a scan that was broken off goes on where it stood.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from base.errors import UserError
from base.files import read_json, replacing
from inference.perplexity import measure
from plan.schedule import KINDS, Schedule
from tp_model import TensorParallelGPT
from world.mesh import World

Measure = Callable[[Schedule], float]  # the perplexity under a schedule


@dataclass(frozen=True)
class Measured:
    """A schedule and what it costs. loss: the increase of the perplexity over plain Megatron's, as a fraction of that."""

    schedule: Schedule
    perplexity: float
    loss: float

    def as_json(self) -> dict[str, Any]:
        return {"sync": str(self.schedule), "points": self.schedule.points, "perplexity": self.perplexity, "loss": self.loss}


class Perplexities:
    """The perplexity of one text under any schedule of a model, each measured once; alike on all ranks.

    path: where they are kept, "" for nowhere. A file of other weights, another text or another tp is a UserError.
    """

    def __init__(self, world: World, model: TensorParallelGPT, tokens: Tensor, path: str, batch_size: int, weights: str):
        size = model.config.block_size
        if len(tokens) <= size:
            raise UserError(
                f"the text has {len(tokens)} tokens; a scan needs at least block_size + 1 = {size + 1}, or it measures nothing."
            )
        self.world, self.model, self.tokens, self.batch_size = world, model, tokens, batch_size
        self.path = Path(path) if path else None
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
        self.about = {"weights": weights, "text": digest, "tokens": len(tokens), "tp": world.tp.size}
        # one rank reads: all go on from the same
        self.known: dict[str, float] = world.gather(self._read() if world.is_main else None)[0]
        self.bar = tqdm(desc="scan", unit="schedule", disable=not (world.is_main and sys.stderr.isatty()))

    def _read(self) -> dict[str, float]:
        if self.path is None or not os.path.lexists(self.path):
            return {}
        raw = read_json(self.path)
        about, known = (raw.get("about"), raw.get("perplexity")) if isinstance(raw, dict) else (None, None)
        if not isinstance(known, dict) or not all(isinstance(value, float) and value >= 1 for value in known.values()):
            raise UserError(f"{self.path} is not a scan's: name another file with --scan.")
        if about != self.about:
            raise UserError(f"{self.path} is of other weights, another text or another tp: name another file with --scan.")
        return known

    def __call__(self, schedule: Schedule) -> float:
        name = str(schedule)
        if name not in self.known:
            self.model.set_schedule(schedule)
            total, count = measure(self.model, self.tokens, self.model.config.block_size, self.batch_size)
            self.known[name] = math.exp(min(700, total / count))  # in this order what is not a number counts as 700
            if self.world.is_main and self.path is not None:
                with replacing(self.path) as file:
                    file.write(json.dumps({"about": self.about, "perplexity": self.known}, indent=1).encode() + b"\n")
        self.bar.update()
        return self.known[name]

    def measured(self, schedule: Schedule) -> Measured:
        perplexity, plain = self(schedule), self(Schedule.plain(self.model.config.n_layer))
        return Measured(schedule, perplexity, perplexity / plain - 1)


def sensitivities(perplexities: Perplexities, n_layer: int) -> list[tuple[str, Measured]]:
    """What it costs to drop the sync point after each sub-block, all others staying; the least sensitive first."""
    every = range(2 * n_layer)
    found = []
    for i in every[:-1]:
        made = perplexities.measured(Schedule.after((j for j in every if j != i), n_layer))
        found.append((f"{i // 2}{KINDS[i % 2][0]}", made))
    return sorted(found, key=lambda pair: pair[1].loss)


def curve(perplexities: Perplexities, n_layer: int, greedy: bool, limit: float) -> Iterator[Measured]:
    """Schedules with ever fewer sync points, until one costs more than `limit` (included) or one point is left.

    greedy: of all points that are left, the one whose going costs least is dropped next: about 2 n_layer^2 measurements.
    Otherwise they are dropped in the order of their sensitivities: about 4 n_layer.
    """
    points = set(range(2 * n_layer))
    order = [] if greedy else [_number(name) for name, _ in sensitivities(perplexities, n_layer)]
    while len(points) > 1:
        if greedy:
            options = [perplexities.measured(Schedule.after(points - {i}, n_layer)) for i in sorted(points)[:-1]]
            best = min(options, key=lambda made: made.loss)
        else:
            best = perplexities.measured(Schedule.after(points - {order.pop(0)}, n_layer))
        points = {i for i, sync in enumerate(best.schedule.syncs) if sync}
        yield best
        if best.loss > limit:
            return


def _number(name: str) -> int:
    return 2 * int(name[:-1]) + "am".index(name[-1])


def within(measured: list[Measured], budget: float) -> Measured:
    """The one with the fewest sync points whose loss is at most `budget`, of those with as few the best. UserError where
    there is none with fewer than plain Megatron has."""
    fit = [made for made in measured if made.loss <= budget and not made.schedule.is_plain]
    if not fit:
        best = min((made for made in measured if not made.schedule.is_plain), key=lambda made: made.loss)
        raise UserError(
            f"no schedule that was measured stays within {budget:.3%}: the best, --sync={best.schedule}, loses "
            f"{best.loss:.3%}. Repair one (drop_syncs.py repair), or allow more."
        )
    return min(fit, key=lambda made: (made.schedule.points, made.loss))


def parse_budget(text: str) -> float:
    """The text "1%" or "0.01" as a fraction. UserError for what is neither."""
    try:
        budget = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        raise UserError(f"--budget={text} is no share of the perplexity: write --budget=1% or --budget=0.01.")
    return budget

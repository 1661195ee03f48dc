"""`scan`: the exact perplexity of a text under many schedules, and the search among them.

A file keeps every measurement, so an interrupted scan resumes.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from base.errors import UserError
from base.files import read_json, replacing
from bench.rounds import spread
from cli.options import ScanOptions
from fewer_syncs.inputs import about, build, open_inputs, perplexity, validation_tokens
from inference.decoders import decoder_for
from inference.generation import generate
from inference.sampling import Sampling
from parallel.ledger import total
from plan.schedule import Schedule, short_name
from report import report
from report.html import at, fits
from tp_model import TensorParallelGPT
from world.mesh import World

ROUNDS = 5  # of decoding; in each every schedule has a turn, as a shared machine's speed changes
PROMPT = 8  # tokens before decoding

Times = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    schedule: Schedule
    perplexity: float
    loss: float  # increase of the perplexity over plain Megatron's, as a fraction of that

    def as_json(self, times: Times) -> dict[str, Any]:
        return {"sync": str(self.schedule), "points": self.schedule.points, "loss": self.loss,
                "perplexity": self.perplexity, **times.get(str(self.schedule), {})}


def scan(world: World, options: ScanOptions) -> None:
    budget = parse_budget(options.budget) if options.budget else math.inf
    source, dataset, _ = open_inputs(world, options, "scan")
    n_layer = source.config.n_layer
    check_length(options.decode_tokens, source.config.block_size)
    words = filter(None, map(str.strip, options.schedules.split(";")))
    named, delay = [Schedule.parse(word, n_layer) for word in words], options.delay
    Schedule.parse(f"delay:{delay}", n_layer)  # or there are too few sub-blocks
    if world.is_main:
        report.check_place(options.scan, "scan")
    model = build(world, source, options, Schedule.plain(n_layer))
    mark = sum(p.double().abs().sum().item() for p in model.parameters())  # file names are none
    weights = world.gather(f"{source.description} {mark:.9g}")[0]
    tokens = validation_tokens(dataset, options)
    known = Perplexities(world, model, tokens, options.scan, options.batch_size, weights)
    plain, single = known.measured(Schedule.plain(n_layer)), sensitivities(known, delay)
    steps = list(curve(known, delay, options.search == "greedy", budget))
    others = [known.measured(schedule) for schedule in named]
    known.bar.close()
    rows = [plain, *steps, *others]
    chosen = within([*rows, *single.values()], budget) if options.budget else None
    timed = [row.schedule for row in (*rows, chosen) if row]
    times = decode_times(world, model, timed, tokens.tolist(), options.decode_tokens)
    if not world.is_main:
        return
    print(f"{source.description}, tp {world.tp.size}, {len(tokens):,} tokens: perplexity "
          f"{plain.perplexity:.4f}")
    losses = ", ".join(f"{name} {row.loss:+.2%}" for name, row in single.items())
    what = f"delayed by {delay}" if delay else "dropped"
    print(f"one sync point {what}: {losses}\n{table(rows, times)}")
    if chosen:
        print(f"within {options.budget}: --sync={chosen.schedule} ({chosen.schedule.points} sync "
              f"points, {chosen.loss:+.3%})")
    report.write(options.report, about("scan", world, source, tokens) | {
        "delay": delay, "plain": plain.as_json(times),
        "curve": [row.as_json(times) for row in steps],
        "single": {name: row.as_json({}) for name, row in single.items()},
        "others": [row.as_json(times) for row in others],
        "chosen": chosen and chosen.as_json(times)})


def table(rows: list[Measured], times: Times) -> str:
    ms = "  ms a token" if times else ""
    lines = [f"{'sync points':>11} {'perplexity':>11} {'loss':>9}{ms}   schedule"]
    for row in rows:
        ms = f"{times[str(row.schedule)]['ms_per_token']['median']:>12.3f}" if times else ""
        lines.append(f"{row.schedule.points:>11} {row.perplexity:>11.4f} {row.loss:>+9.2%}{ms}   "
                     f"{row.schedule}")
    return "\n".join(lines)


class Perplexities:
    """Measures the perplexity of a text under each schedule once. All ranks have the same results.

    path: the file that keeps them, "" for none. UserError if it is of other weights, text or tp.
    """

    def __init__(self, world: World, model: TensorParallelGPT, tokens: Tensor, path: str,
                 batch_size: int, weights: str):
        need = model.config.block_size + 1
        if len(tokens) < need:
            raise UserError(f"the text has {len(tokens)} tokens; a scan needs at least block_size "
                            f"+ 1 = {need}, or it measures nothing.")
        self.world, self.model, self.tokens, self.batch_size = world, model, tokens, batch_size
        self.path = Path(path) if path else None
        text, tp = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16], world.tp.size
        self.about = {"weights": weights, "text": text, "tokens": len(tokens), "tp": tp}
        # rank 0 alone reads, so that all ranks start from the same results
        self.known: dict[str, float] = world.gather(self._read() if world.is_main else None)[0]
        hidden = not (world.is_main and sys.stderr.isatty())
        self.bar = tqdm(desc="scan", unit="schedule", disable=hidden)

    def _read(self) -> dict[str, float]:
        if self.path is None or not os.path.lexists(self.path):
            return {}
        raw = read_json(self.path)
        known = at(raw, "perplexity")
        if not fits(known, {str: float}) or min(known.values(), default=1) < 1:
            raise UserError(f"{self.path} is not a scan's: name another file with --scan.")
        if raw.get("about") != self.about:
            raise UserError(f"{self.path} is of other weights, another text or another tp: name "
                            "another file with --scan.")
        return known

    def __call__(self, schedule: Schedule) -> float:
        name = str(schedule)
        if name not in self.known:
            self.model.set_schedule(schedule)
            found = perplexity(self.model, self.tokens, self.batch_size)
            self.known[name] = min(math.exp(700), found)  # in this order NaN is e^700
            if self.world.is_main and self.path is not None:
                kept = {"about": self.about, "perplexity": self.known}
                with replacing(self.path) as file:
                    file.write(json.dumps(kept, indent=1).encode() + b"\n")
        self.bar.update()
        return self.known[name]

    def measured(self, schedule: Schedule) -> Measured:
        found, plain = self(schedule), self(Schedule.plain(self.model.config.n_layer))
        return Measured(schedule, found, found / plain - 1)


def sensitivities(known: Perplexities, delay: int) -> dict[str, Measured]:
    """Each sync point but the last dropped or delayed alone, by the sub-block's name, least loss
    first. delay: 0 drops."""
    found, n_layer = {}, known.model.config.n_layer
    for i, (sub_block,) in enumerate(Schedule.plain(n_layer).stretches()[:-1]):
        kept = (j for j in range(2 * n_layer) if j != i)
        found[short_name(sub_block)] = known.measured(Schedule.after(kept, n_layer, delay))
    return dict(sorted(found.items(), key=lambda pair: pair[1].loss))


def curve(known: Perplexities, delay: int, greedy: bool, limit: float) -> Iterator[Measured]:
    """Schedules with ever fewer sync points, down to one, or to the first that loses over `limit`.

    greedy: drop next what costs least of all that are left: about 2 n_layer^2 measurements.
    Else drop in the order of sensitivities: about 4 n_layer.
    """
    n_layer = known.model.config.n_layer
    points = set(range(2 * n_layer))
    order = [] if greedy else list(sensitivities(known, delay).values())
    while len(points) > 1:
        drop = sorted(points)[:-1] if greedy else [order.pop(0).schedule.syncs.index(False)]
        found = [known.measured(Schedule.after(points - {i}, n_layer, delay)) for i in drop]
        best = min(found, key=lambda row: row.loss)
        points = {i for i, sync in enumerate(best.schedule.syncs) if sync}
        yield best
        if best.loss > limit:
            return


def within(measured: list[Measured], budget: float) -> Measured:
    """The best of the schedules with the fewest sync points that lose at most `budget`. UserError
    if there is none but plain Megatron."""
    dropped = [row for row in measured if not row.schedule.is_plain]
    fit = [row for row in dropped if row.loss <= budget]
    if not fit:
        best = min(dropped, key=lambda row: row.loss)
        raise UserError(f"no schedule that was measured stays within {budget:.3%}: the best, "
                        f"--sync={best.schedule}, loses {best.loss:.3%}. Repair one "
                        "(drop_syncs.py repair), or allow more.")
    return min(fit, key=lambda row: (row.schedule.points, row.loss))


def parse_budget(text: str) -> float:
    """The text "1%" or "0.01" as a fraction; UserError for any other."""
    try:
        budget = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        raise UserError(f"--budget={text} is no share of the perplexity: write --budget=1% or "
                        "--budget=0.01.")
    return budget


def check_length(n: int, block_size: int) -> None:
    """UserError if n tokens exceed the context, or are too few to time. 0: no measurement."""
    if n == 1 or PROMPT + n > block_size and n:
        raise UserError(f"--decode_tokens={n}: with a prompt of {PROMPT} tokens use 2 to "
                        f"{block_size - PROMPT}, or 0 for none.")


def decode_times(world: World, model: TensorParallelGPT, schedules: list[Schedule],
                 prompt: list[int], n: int) -> Times:
    """ms_per_token (rank 0's clock) and all_reduces_per_token (counted) of greedy decoding.

    By the schedule's name. n: tokens generated in a turn after the first PROMPT ids of `prompt`;
    if 0, nothing is measured. The model keeps the last schedule.
    """
    if not n:
        return {}
    sampling = Sampling(n_tokens=model.config.vocab_size, temperature=0, max_new_tokens=n)
    decoders, times, counts = {}, dict[str, list[float]](), dict[str, float]()
    for _ in range(ROUNDS + 1):  # the first one warms up
        for name, schedule in {str(schedule): schedule for schedule in schedules}.items():
            model.set_schedule(schedule)
            if name not in decoders:
                decoders[name], times[name] = decoder_for(model), []
            world.barrier()
            before = world.ledger.snapshot()
            timing = generate(model, [prompt[:PROMPT]], sampling, decoder=decoders[name]).timing
            counts[name] = total(world.ledger.since(before), op="all_reduce").calls / n
            times[name].append(1e3 * timing.decode_s / timing.decode_tokens)
    return {name: {"ms_per_token": spread(ms[1:]), "all_reduces_per_token": counts[name]}
            for name, ms in times.items()}

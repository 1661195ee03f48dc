"""Measure the cost model's constants on this machine, and compare its predictions with real steps.

    torchrun --standalone --nproc_per_node=2 tests/predict_here.py --report=predict.json

Wants two idle cores, one thread a rank, and about three minutes. docs/predictions.md has a result.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from base.errors import UserError
from bench.inference import subject
from bench.rounds import Bench, spread, table
from bench.training import iterations, prepared
from cli.options import BenchDecodeOptions, BenchOptions, BenchTrainOptions
from inference.decoders import decoder_for
from inference.generation import Generation, generate
from inference.sampling import Sampling
from parallel.collectives import Axis, all_reduce
from parallel.loss import chunk_rows
from plan.cost import Hardware, Seconds, Step
from plan.link import Link
from plan.schedule import Schedule
from world.entry import run
from world.mesh import World, make_axis

ALONE, EMULATED = "one rank", "emulated link"
STAGES, REPLICAS = "2 stages over gloo", "dp 2 over gloo"
LINK = Link(250e-6, 1 / 0.1e9)
GOAL = 0.2  # how far a prediction may be from the measurement
SIZES = (64, 3072, 16384, 131072, 1 << 20)  # bytes of the all-reduces that a link is fitted to
DECODED, REPEATED = 24, 3  # steps of a measurement: tokens, prompts or iterations


@dataclass(frozen=True)
class Job:
    """A step to measure. sizes: n_layer, n_embd, n_head, vocabulary (training has GPT-2's). comm: a
    transport of tp 2, EMULATED (shm with LINK), ALONE, STAGES or REPLICAS. rows x tokens: of a
    prompt or a micro-batch. past: tokens of the prompt."""

    mode: str
    sizes: tuple[int, int, int, int]
    comm: str = "shm"
    sync: str = "all"
    int8: bool = False
    rows: int = 1
    tokens: int = 1
    past: int = 32
    micro_batches: int = 1

    @property
    def name(self) -> str:
        n_layer, n_embd, _, vocab = self.sizes
        what = f"{self.rows} x {self.tokens}"
        what += f" x {self.micro_batches}" if self.micro_batches > 1 else ""
        if self.mode == "decode":
            what = f"{self.past} + {DECODED}"
        words = [f"{self.mode} {what}: {n_layer} x {n_embd}", f"{vocab:,}"]
        words += ["int8"] * self.int8 + [self.comm] + [self.sync] * (self.sync != "all")
        return ", ".join(words)


GPT2, SMALL = (12, 768, 12, 50257), (8, 640, 10, 20000)
TINY, WIDE, NARROW = (24, 64, 2, 512), (5, 896, 14, 20000), (6, 768, 12, 20000)
# The constants of the decode step are fitted to these, in this order.
FITTED = {
    "overhead": (Job("decode", TINY, ALONE),),  # there is hardly anything to read
    # two, because decode.c reads rows of some widths faster than of others
    "memory alone": (Job("decode", WIDE, ALONE), Job("decode", NARROW, ALONE)),
    "memory": (Job("decode", WIDE), Job("decode", NARROW)),
    "widening": (Job("decode", WIDE, int8=True),),
}
CHECKED = (
    Job("decode", GPT2), Job("decode", GPT2, sync="mlp"), Job("decode", GPT2, sync="every:4"),
    Job("decode", GPT2, ALONE), Job("decode", GPT2, "gloo"), Job("decode", GPT2, int8=True),
    Job("decode", SMALL), Job("decode", SMALL, past=900), Job("decode", SMALL, "gloo", "mlp"),
    Job("prefill", GPT2, tokens=256), Job("prefill", GPT2, ALONE, tokens=256),
    Job("prefill", SMALL, tokens=512), Job("train", (4, 512, 8, 50304), rows=2, tokens=128),
    Job("train", (4, 512, 8, 50304), ALONE, rows=2, tokens=128),
    Job("train", (6, 768, 12, 50304), sync="mlp", rows=2, tokens=128),
    *(Job("decode", GPT2, EMULATED, sync) for sync in ("all", "mlp", "delay:1", "delay:2")),
    *(Job("prefill", SMALL, EMULATED, sync, tokens=256) for sync in ("all", "mlp", "delay:1")),
    *(Job("train", (6, 768, 12, 50304), EMULATED, sync, rows=2, tokens=128)
      for sync in ("all", "mlp", "delay:1")),
    *(Job("train", (6, 768, 12, 50304), STAGES, rows=1, tokens=128, micro_batches=m)
      for m in (2, 6)),
    *(Job("train", (6, 768, 12, 50304), REPLICAS, rows=2, tokens=128, micro_batches=m)
      for m in (1, 4)),
)  # fmt: skip


def seconds_of(call: Callable[[int], Any], times: int) -> list[float]:
    seconds = []
    for i in range(times):
        started = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - started)
    return seconds


def typical(samples: list[float]) -> float:
    """The lower quartile, which other programs disturb less than the median."""
    return sorted(samples)[len(samples) // 4]


class Runner:
    """Measures jobs, with models that several jobs share while the stack is open."""

    def __init__(self, world: World, stack: ExitStack):
        self.world, self.stack, self.models = world, stack, dict[Any, Any]()
        gloo = make_axis("tp", world.groups.get("tp"), "gloo", world.ledger)
        slow = make_axis("tp", world.groups.get("tp"), "shm", world.ledger, link=LINK)
        self.worlds = {"shm": world, "gloo": replace(world, comm="gloo", tp=gloo),
                       EMULATED: replace(world, tp=slow, link=LINK)}
        group, one = world.groups.get("tp"), Axis("tp", ledger=world.ledger)
        dp, pp, ends = (make_axis(name, group, "gloo", world.ledger) for name in ("dp", "pp", "ends"))
        self.worlds[STAGES] = replace(world, comm="gloo", tp=one, pp=pp, ends=ends)
        self.worlds[REPLICAS] = replace(world, comm="gloo", tp=one, dp=dp)
        if world.is_main:
            axes = Axis("tp", ledger=world.ledger), Axis("dp", ledger=world.ledger)
            self.worlds[ALONE] = World(0, 1, world.device, "none", *axes, world.ledger)

    def prepare(self, job: Job) -> tuple[Step, Callable[[], float]] | None:
        """The job's step and a function that measures its seconds; None on ranks without a part."""
        world, made = self.worlds.get(job.comm), None
        if world is not None:
            made = (self.training if job.mode == "train" else self.generation)(job, world)
        self.world.barrier()
        return made

    def options(self, job: Job) -> dict[str, Any]:
        names = ("n_layer", "n_embd", "n_head", "vocab_size")
        return dict(zip(names, job.sizes, strict=True)) | {"device": "cpu", "dtype": "float32"}

    def generation(self, job: Job, world: World) -> tuple[Step, Callable[[], float]]:
        key, vocab, decodes = (job.sizes, job.comm, job.int8), job.sizes[3], job.mode == "decode"
        if key not in self.models:
            quantize = "int8" if job.int8 else ""
            options = BenchDecodeOptions(**self.options(job), quantize=quantize)
            self.models[key] = self.stack.enter_context(subject(world, options, 1))[0].model
        model, schedule = self.models[key], Schedule.parse(job.sync, job.sizes[0])
        prompt = [(7 * i * i + 3) % (vocab - 1) for i in range(job.past if decodes else job.tokens)]
        sampling = Sampling(vocab, temperature=0, max_new_tokens=DECODED + 2 if decodes else 1)

        def measure() -> float:
            model.set_schedule(schedule)
            if not decodes:
                return typical(seconds_of(lambda i: generate(model, [prompt], sampling), REPEATED))
            made = Generation(model, [prompt], sampling, decoder_for(model))
            return typical(np.diff([time.perf_counter() for _ in made]).tolist())

        past, tokens = (job.past + DECODED // 2, 1) if decodes else (0, job.tokens)
        points = schedule if model.tp.size > 1 else Schedule.plain(job.sizes[0])
        return Step(model.split, points, job.mode, 1, tokens, past, int8=job.int8), measure

    def training(self, job: Job, world: World) -> tuple[Step, Callable[[], float]]:
        sizes = self.options(job) | {"vocab_size": 50257, "tp": world.tp.size}
        options = BenchTrainOptions(**sizes, batch_size=job.rows, block_size=job.tokens)
        training, _ = self.stack.enter_context(prepared(
            world, options, sync=job.sync, pp=world.pp.size,
            gradient_accumulation_steps=job.micro_batches))
        split, dealt = training.model.split, training.rows
        rows = chunk_rows(dealt.micro_rows * job.tokens, split.local_vocab, "cpu")
        step = Step(split, training.model.schedule, job.mode, dealt.micro_rows, job.tokens, logit_rows=rows,
                    micro_batches=dealt.micro_steps, pp=world.pp.size, dp=world.dp.size)
        return step, lambda: typical([iterations(training, 1)[0] for _ in range(REPEATED)])


# --- constants ------------------------------------------------------------------------------------


def fit_link(world: World, axis: Axis, one_shot: bool, runs: int = 8, calls: int = 12) -> Link:
    """alpha and beta of all-reduces between pieces of work, as a step has them: a call's time
    includes the wait for the later rank. Weighted least squares of 2 alpha + m beta, which every
    algorithm takes over two ranks; each residual over the time that it is of."""
    work, rows = torch.ones(8, 1 << 21), []  # a piece is 8 MB, a sub-block's weights, uncached
    for nbytes in SIZES:
        message, means = torch.randn(nbytes // 4), []
        world.barrier()
        for _ in range(runs):
            spent = 0.0
            for i in range(calls):
                work[i % 8].sum()
                started = time.perf_counter()
                all_reduce(message, axis, "forward")
                spent += time.perf_counter() - started
            means.append(spent / calls)
        seconds = statistics.mean(world.gather(typical(means)))
        rows.append((2 / seconds, nbytes / seconds))
    (alpha, beta), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return Link(max(0.0, float(alpha)), max(0.0, float(beta)), one_shot)


def kernels(calls: int = 24) -> dict[str, float]:
    """This rank's rates: peak, flop/s of products whose weights come from memory; attend, flop/s of
    causal attention; touch, seconds a number in GELU and in a sum."""
    x, weights = torch.randn(256, 768), torch.randn(calls, 1536, 768)
    hidden, q = torch.randn(256, 1536), torch.randn(1, 6, 256, 64)

    def timed(call: Callable[[int], Any]) -> float:
        return typical(seconds_of(call, calls))

    product = timed(lambda i: F.linear(x, weights[i]))
    attention = timed(lambda i: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    touched = timed(lambda i: F.gelu(hidden, approximate="tanh")) + timed(lambda i: hidden + hidden)
    attend = 4 * (q.shape[2] + 1) / 2 * q.numel() / attention
    peak = 2 * x.shape[0] * weights[0].numel() / product
    return {"peak": peak, "attend": attend, "touch": touched / (2 * hidden.numel())}


def solve(
    took: dict[str, float], steps: dict[str, list[Step]], rates: dict[bool, dict[str, float]],
    links: dict[str, Link],
) -> dict[str, Hardware]:  # fmt: skip
    """By transport, the hardware on which the fitted jobs take what they took. rates: of a rank
    while all compute (False) and alone (True)."""
    overhead = took["overhead"] / len(steps["overhead"][0].entries)

    def rest(name: str, memory: float, link: Link) -> tuple[Seconds, float]:
        """The steps at this rate of reading; their measured time without messages and overhead."""
        machine = Hardware(name, memory, float("inf"), overhead, link)
        predicted = sum((step.seconds(machine) for step in steps[name]), start=Seconds())
        return predicted, took[name] - predicted.communication - predicted.overhead

    memory, none = {}, Link(0.0, 0.0)
    for alone, name, link in ((True, "memory alone", none), (False, "memory", links["shm"])):
        predicted, seconds = rest(name, 1.0, link)
        memory[alone] = (predicted.weights + predicted.attention) / seconds
    predicted, seconds = rest("widening", memory[False], links["shm"])
    widened = sum(sum(step.entries) for step in steps["widening"])
    widening = widened / (seconds - predicted.attention)
    return {
        comm: Hardware(comm, memory[comm == ALONE], overhead=overhead, link=link, widening=widening,
                       **rates[comm == ALONE])
        for comm, link in (links | {ALONE: none}).items()
    }  # fmt: skip


def figures(machines: dict[str, Hardware]) -> dict[str, float]:
    shm = machines["shm"]
    found = {"overhead_us": 1e6 * shm.overhead, "widening_G": shm.widening / 1e9}
    for comm, word in ((ALONE, "alone"), ("shm", "all")):
        at = machines[comm]
        found |= {f"memory_GBps_{word}": at.memory / 1e9, f"touch_ns_{word}": 1e9 * at.touch}
        found |= {f"peak_gflops_{word}": at.peak / 1e9, f"attend_gflops_{word}": at.attend / 1e9}
    for comm in ("shm", "gloo"):
        link = machines[comm].link
        found |= {f"{comm}_alpha_us": 1e6 * link.alpha}
        found |= {f"{comm}_GBps": 1e-9 / (link.beta or np.inf)}
    return found


# --- rounds ---------------------------------------------------------------------------------------


def one_round(runner: Runner, fitted: dict[str, list[Any]], checked: list[Any]) -> dict[str, Any]:
    """On rank 0 the constants, and (predicted, measured) seconds of each checked job. Constants are
    measured before and after the steps of their kind, because a shared machine's speed changes."""
    world = runner.world

    def measure(ready: Any) -> float:
        world.barrier()  # gloo's: a rank that waits in it sleeps
        return ready[1]() if ready else 0.0

    def fit() -> dict[str, float]:
        return {name: sum(map(measure, jobs)) for name, jobs in fitted.items()}

    def rates() -> list[dict[str, float]]:
        world.barrier()
        both = kernels()
        world.barrier()
        return [both, kernels() if world.is_main else both]

    axes = {comm: runner.worlds[comm].tp for comm in ("shm", "gloo")}
    links = {comm: fit_link(world, axis, comm == "shm") for comm, axis in axes.items()}
    links |= {EMULATED: LINK, STAGES: links["gloo"], REPLICAS: links["gloo"]}
    decoding = [job.mode == "decode" for job in CHECKED]
    took = [fit()]
    measured = {i: measure(checked[i]) for i in range(len(CHECKED)) if decoding[i]}
    took.append(fit())
    speeds = [rates()]
    measured |= {i: measure(checked[i]) for i in range(len(CHECKED)) if not decoding[i]}
    speeds.append(rates())
    if not world.is_main:
        return {}
    means = {name: (took[0][name] + took[1][name]) / 2 for name in took[0]}
    both, alone = ({key: (x[key] + y[key]) / 2 for key in x} for x, y in zip(*speeds, strict=True))
    steps = {name: [step for step, _ in jobs] for name, jobs in fitted.items()}
    machines = solve(means, steps, {False: both, True: alone}, links)
    predicted = [checked[i][0].seconds(machines[job.comm]) for i, job in enumerate(CHECKED)]
    pairs = [(predicted[i], measured[i]) for i in range(len(CHECKED))]
    return {"constants": figures(machines), "pairs": pairs}


def main(world: World, options: BenchOptions) -> None:
    bench = Bench(world, options)
    if world.size != 2 or world.comm != "shm":
        raise UserError("predict_here.py measures 2 CPU ranks over shm: start it with torchrun.")
    with ExitStack() as stack:
        runner = Runner(world, stack)
        fitted = {name: [runner.prepare(job) for job in jobs] for name, jobs in FITTED.items()}
        checked = [runner.prepare(job) for job in CHECKED]
        one_round(runner, fitted, checked)  # allocates memory, compiles C
        turns = bench.rounds(lambda: one_round(runner, fitted, checked), [])
    if world.is_main:
        bench.finish("predict", *compared([turn["nanotp"] for turn in turns]))


def compared(rounds: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    names = rounds[0]["constants"]
    constants = {name: spread([turn["constants"][name] for turn in rounds]) for name in names}
    rows = [["constant", "median", "min", "max"]]
    for name, found in constants.items():
        rows.append([name, *(f"{value:,.2f}" for value in found.values())])
    lines, cells = [], [["ms a step", "predicted", "measured", "ratio", "min", "max"]]
    for i, job in enumerate(CHECKED):
        pairs = [turn["pairs"][i] for turn in rounds]
        ratios = [predicted.total / seconds for predicted, seconds in pairs]
        ordered = sorted((predicted for predicted, _ in pairs), key=lambda step: step.total)
        middle, ratio = ordered[(len(pairs) - 1) // 2], spread(ratios)
        measured = spread([seconds for _, seconds in pairs])
        line = {"job": job.name, **asdict(job), "predicted": asdict(middle), "measured": measured}
        lines.append(line | {"ratio": ratio, "ratios": ratios})
        times = [f"{1e3 * middle.total:,.2f}", f"{1e3 * measured['median']:,.2f}"]
        cells.append([job.name, *times, *(f"{value:.2f}" for value in ratio.values())])
    worst = max(lines, key=lambda line: abs(line["ratio"]["median"] - 1))
    within = sum(abs(line["ratio"]["median"] - 1) <= GOAL for line in lines)
    farthest = f"{worst['job']}, {worst['ratio']['median']:.2f}"
    said = f"{within} of {len(lines)} within {GOAL:.0%}; the farthest: {farthest}"
    each = [turn["constants"] for turn in rounds]
    figures = {"constants": constants, "rounds": each, "lines": lines, "worst": worst["job"]}
    return figures | {"within": within}, [*table(rows), *table(cells), said]


if __name__ == "__main__":
    run(BenchOptions, main, "predict_here.py")

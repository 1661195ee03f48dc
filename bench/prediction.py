"""The cost model (plan/cost.py) on this machine: its constants, measured, and what it says against what a step takes."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from base.errors import UserError
from bench.elsewhere import ask
from bench.inference import subject
from bench.rounds import Bench, spread
from bench.training import prepared
from cli.options import BenchDecodeOptions, BenchPredictOptions, BenchTrainOptions
from inference.decoding import Decoder, decoder_for
from inference.generation import generate
from inference.sampling import Sampling
from model import KVCache
from parallel.collectives import Axis, all_reduce
from parallel.loss import chunk_rows
from plan.cost import MODES, Hardware, Link, Seconds, Step, fit_link
from plan.schedule import Schedule
from report import report
from train import loop
from world.mesh import World, make_axis

ALONE = "one rank"
GOAL = 0.2  # how far a prediction may be from what is measured
SIZES = (64, 3072, 16384, 131072, 1 << 20)  # bytes of the all-reduces that a link is fitted on


@dataclass(frozen=True)
class Job:
    """A step that is measured. sizes: n_layer, n_embd, n_head, vocabulary (training has GPT-2's). comm: a transport, or ALONE.
    rows x tokens: what a prefill or an iteration reads. past: tokens in the cache when decoding begins."""

    mode: str
    sizes: tuple[int, int, int, int]
    comm: str = "shm"
    sync: str = "all"
    int8: bool = False
    rows: int = 1
    tokens: int = 1
    past: int = 32

    @property
    def name(self) -> str:
        n_layer, n_embd, n_head, vocab = self.sizes
        what = f"{self.past} + {DECODED}" if self.mode == "decode" else f"{self.rows} x {self.tokens}"
        words = [f"{self.mode} {what}:", f"{n_layer} x {n_embd},", f"{vocab:,}" if self.mode != "train" else "50,304"]
        words += [", int8"] * self.int8 + [f", {self.comm}"] + [f", {self.sync}"] * (self.sync != "all")
        return " ".join(words).replace(" ,", ",")


DECODED, REPEATED = 24, 3  # steps of a measurement: tokens, and of those that are longer
GPT2, SMALL = (12, 768, 12, 50257), (8, 640, 10, 20000)
TINY, WIDE, NARROW = (24, 64, 2, 512), (5, 896, 14, 20000), (6, 768, 12, 20000)
# The constants of the decode step come from these; those of messages and arithmetic from messages and kernels by themselves.
FITTED = {
    "overhead": (Job("decode", TINY, ALONE),),  # there is hardly anything to read
    # two, as decode.c reads rows of some widths faster than of others
    "memory alone": (Job("decode", WIDE, ALONE), Job("decode", NARROW, ALONE)),
    "memory": (Job("decode", WIDE), Job("decode", NARROW)),
    "widening": (Job("decode", WIDE, int8=True),),
}
# They are held against these.
CHECKED = (
    Job("decode", GPT2),
    Job("decode", GPT2, sync="mlp"),
    Job("decode", GPT2, sync="every:4"),
    Job("decode", GPT2, ALONE),
    Job("decode", GPT2, "gloo"),
    Job("decode", GPT2, int8=True),
    Job("decode", SMALL),
    Job("decode", SMALL, past=900),
    Job("decode", SMALL, "gloo", "mlp"),
    Job("prefill", GPT2, tokens=256),
    Job("prefill", GPT2, ALONE, tokens=256),
    Job("prefill", SMALL, tokens=512),
    Job("train", (4, 512, 8, 0), rows=2, tokens=128),
    Job("train", (4, 512, 8, 0), ALONE, rows=2, tokens=128),
    Job("train", (6, 768, 12, 0), sync="mlp", rows=2, tokens=128),
)


def repeated(call: Callable[[], Any]) -> list[float]:
    """Seconds of each of a few calls."""
    seconds = []
    for _ in range(REPEATED):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


class Clocked:
    """A decoder that notes when each of its steps begins."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.name, self.why = decoder, decoder.name, decoder.why
        self.capture_s = 0.0
        self.began: list[float] = []

    def logits(self, tokens: list[list[int]], cache: KVCache) -> torch.Tensor:
        self.began.append(time.perf_counter())
        return self.decoder.logits(tokens, cache)

    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.began, self.began[1:], strict=False)]


@dataclass(frozen=True)
class Ready:
    """A job that can be measured: what the model says of it, and what it takes, seconds of several steps."""

    job: Job
    step: Step
    measure: Callable[[], list[float]]


class Workshop:
    """The worlds that jobs run in, and models that several jobs share, for as long as the stack holds. world: over shm."""

    def __init__(self, world: World, stack: ExitStack):
        self.world, self.stack = world, stack
        gloo = replace(world, comm="gloo", tp=make_axis("tp", world.groups.get("tp"), "gloo", world.ledger))
        self.worlds: dict[str, World | None] = {"shm": world, "gloo": gloo, ALONE: None}
        if world.is_main:
            axes = Axis("tp", ledger=world.ledger), Axis("dp", ledger=world.ledger)
            self.worlds[ALONE] = World(0, 1, world.device, "none", *axes, world.ledger)
        self.models: dict[tuple[Any, ...], Any] = {}

    def axis(self, comm: str) -> Axis:
        world = self.worlds[comm]
        assert world is not None
        return world.tp

    def ready(self, job: Job) -> Ready | None:
        """All ranks call it; None on those that a job for one rank has no use for."""
        world = self.worlds[job.comm]
        found = None if world is None else (self._training if job.mode == "train" else self._generation)(job, world)
        self.world.barrier()
        return found

    def _generation(self, job: Job, world: World) -> Ready:
        n_layer, n_embd, n_head, vocab = job.sizes
        key = job.sizes, job.comm, job.int8
        if key not in self.models:
            asked: dict[str, Any] = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": vocab}
            options = BenchDecodeOptions(device="cpu", dtype="float32", quantize="int8" if job.int8 else "", **asked)
            self.models[key] = self.stack.enter_context(subject(world, options, 1)).model
        model = self.models[key]
        schedule = Schedule.parse(job.sync, n_layer)
        n = job.past if job.mode == "decode" else job.tokens
        prompt = [(7 * i * i + 3) % (vocab - 1) for i in range(n)]
        sampling = Sampling(vocab, temperature=0, max_new_tokens=DECODED + 2 if job.mode == "decode" else 1)

        def measure() -> list[float]:
            model.set_schedule(schedule)
            if job.mode == "prefill":
                return repeated(lambda: generate(model, [prompt], sampling))
            decoder = Clocked(decoder_for(model))
            generate(model, [prompt], sampling, decoder=decoder)
            return decoder.steps()

        past, tokens = (job.past + DECODED // 2, 1) if job.mode == "decode" else (0, job.tokens)
        asked_of = schedule if model.tp.size > 1 else Schedule.plain(n_layer)
        return Ready(job, Step(model.split, asked_of, job.mode, 1, tokens, past, int8=job.int8), measure)

    def _training(self, job: Job, world: World) -> Ready:
        n_layer, n_embd, n_head, _ = job.sizes
        asked: dict[str, Any] = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}
        asked |= {"batch_size": job.rows, "block_size": job.tokens}
        options = BenchTrainOptions(device="cpu", dtype="float32", tp=world.tp.size, **asked)
        run, _ = self.stack.enter_context(prepared(world, options, sync=job.sync))

        def iterate() -> None:
            loop.iterate(run, 1e-4)
            run.progress.iter_num += 1

        model, n = run.model, job.rows * job.tokens
        rows = chunk_rows(n, model.split.local_vocab, "cpu")
        step = Step(model.split, model.schedule, job.mode, job.rows, job.tokens, logit_rows=rows)
        return Ready(job, step, lambda: repeated(iterate))


# --- constants ------------------------------------------------------------------------------------------------------


def typical(samples: list[float]) -> float:
    """The lower quartile: what else runs on the machine disturbs it less than it does the median."""
    return sorted(samples)[len(samples) // 4]


def message_times(world: World, axis: Axis, runs: int = 8, calls: int = 12) -> list[tuple[int, float]]:
    """(bytes, seconds) of all-reduces that stand between pieces of work, as they do in a step: what a call adds to the work,
    the wait for the later rank and the waking of one that slept included. Means over the ranks and over the calls of a run: a
    step has many messages, and its time all of theirs, the late ones too."""
    work, found = torch.ones(8, 1 << 21), []  # a piece is 8 MB, a sub-block's weights, and not in a cache
    for nbytes in SIZES:
        message, seconds = torch.randn(nbytes // 4), []
        world.barrier()
        for _ in range(runs):
            spent = 0.0
            for i in range(calls):
                work[i % 8].sum()
                started = time.perf_counter()
                all_reduce(message, axis, "forward")
                spent += time.perf_counter() - started
            seconds.append(spent / calls)
        found.append((nbytes, statistics.mean(world.gather(typical(seconds)))))
    return found


def kernels(calls: int = 24) -> dict[str, float]:
    """What this rank's arithmetic does by itself: peak and attend, flop a second, of products as layers have them, each with
    weights of its own that come from memory, and of causal attention; touch, the seconds for a number in GELU and in a sum."""
    x, weights, hidden = torch.randn(256, 768), torch.randn(calls, 1536, 768), torch.randn(256, 1536)
    q = torch.randn(1, 6, 256, 64)

    def timed(call: Callable[[int], Any]) -> float:
        seconds = []
        for i in range(calls):
            started = time.perf_counter()
            call(i)
            seconds.append(time.perf_counter() - started)
        return typical(seconds)

    product = timed(lambda i: F.linear(x, weights[i]))
    attention = timed(lambda i: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    touched = timed(lambda i: F.gelu(hidden, approximate="tanh")) + timed(lambda i: hidden + hidden)
    flops = 4 * (q.shape[2] + 1) / 2 * q.numel()
    return {
        "peak": 2 * x.shape[0] * weights[0].numel() / product,
        "attend": flops / attention,
        "touch": touched / (2 * hidden.numel()),
    }


@dataclass(frozen=True)
class Constants:
    """This machine, as one round finds it: what a rank does while it is alone and while all compute."""

    overhead: float
    widening: float
    memory: dict[bool, float]  # whether the rank is alone
    kernels: dict[bool, dict[str, float]]  # see `kernels`
    links: dict[str, Link]

    def hardware(self, comm: str) -> Hardware:
        alone = comm == ALONE
        link = Link(0.0, 0.0) if alone else self.links[comm]
        rates = self.kernels[alone]
        return Hardware(
            comm, self.memory[alone], rates["peak"], self.overhead, link, rates["attend"], rates["touch"], self.widening
        )  # fmt: skip

    def as_json(self) -> dict[str, float]:
        found = {"overhead_us": 1e6 * self.overhead, "widening_G": self.widening / 1e9}
        for alone, word in ((True, "alone"), (False, "all")):
            rates = self.kernels[alone]
            found |= {f"memory_GBps_{word}": self.memory[alone] / 1e9, f"touch_ns_{word}": 1e9 * rates["touch"]}
            found |= {f"{name}_gflops_{word}": rates[name] / 1e9 for name in ("peak", "attend")}
        for comm, link in self.links.items():
            found |= {f"{comm}_alpha_us": 1e6 * link.alpha, f"{comm}_GBps": 1e-9 / link.beta if link.beta else 0.0}
        return found


def solve(
    took: dict[str, list[float]],
    steps: dict[str, list[Step]],
    rates: dict[bool, dict[str, float]],
    links: dict[str, Link],
) -> Constants:
    """The constants under which the fitted jobs take what they took, one after the other, each from jobs of its own.

    took: seconds of a step, steps: what it does, both by FITTED's names.
    """
    overhead = took["overhead"][0] / len(steps["overhead"][0].entries)

    def rest(name: str, memory: float, link: Link) -> tuple[Seconds, float]:
        """(the steps at so many bytes a second, what they took beyond their messages and overhead). Nothing in them waits for
        arithmetic: one row at a time is read, not multiplied."""
        machine = Hardware(name, memory, float("inf"), overhead, link)
        reckoned = sum((step.seconds(machine) for step in steps[name]), start=Seconds())
        return reckoned, sum(took[name]) - reckoned.communication - reckoned.overhead

    memory = {}
    for alone, name, link in ((True, "memory alone", Link(0.0, 0.0)), (False, "memory", links["shm"])):
        reckoned, seconds = rest(name, 1.0, link)
        memory[alone] = (reckoned.weights + reckoned.attention) / seconds
    reckoned, seconds = rest("widening", memory[False], links["shm"])
    widened = sum(entries for step in steps["widening"] for entries in step.entries)
    return Constants(overhead, widened / (seconds - reckoned.attention), memory, rates, links)


def one_round(workshop: Workshop, fitted: dict[str, list[Ready | None]], checked: list[Ready | None]) -> dict[str, Any]:
    """Constants and steps, measured in turn: {"constants", "pairs": [(reckoned, measured seconds), ...]} on rank 0.

    What constants come from is measured before and after the steps that they are held against, and the mean taken: a shared
    machine's speed changes within a round.
    """
    world = workshop.world

    def seconds(ready: Ready | None) -> float:
        world.barrier()  # gloo's: those who wait there sleep
        return typical(ready.measure()) if ready is not None else 0.0

    def rates() -> list[dict[str, float]]:
        world.barrier()
        both = kernels()
        world.barrier()
        return [both, kernels() if world.is_main else both]

    def around(of: Callable[[], Any], decoding: bool) -> list[Any]:
        """Before and after the steps of one kind."""
        before = of()
        for i, ready in enumerate(checked):
            if (CHECKED[i].mode == "decode") == decoding:
                measured[i] = seconds(ready)
        return [before, of()]

    measured = [0.0] * len(checked)
    links = {comm: message_times(world, workshop.axis(comm)) for comm in ("shm", "gloo")}
    twice = around(lambda: {name: [seconds(ready) for ready in jobs] for name, jobs in fitted.items()}, True)
    first, last = around(rates, False)
    if not world.is_main:
        return {}
    took = {name: [statistics.mean(pair) for pair in zip(*(turn[name] for turn in twice), strict=True)] for name in fitted}
    both, alone = ({name: (x[name] + y[name]) / 2 for name in x} for x, y in zip(first, last, strict=True))
    steps = {name: [ready.step for ready in jobs if ready is not None] for name, jobs in fitted.items()}
    found = {comm: fit_link(times, comm == "shm") for comm, times in links.items()}
    constants = solve(took, steps, {True: alone, False: both}, found)
    reckoned = [ready.step.seconds(constants.hardware(ready.job.comm)) for ready in checked if ready is not None]
    return {"constants": constants.as_json(), "pairs": list(zip(reckoned, measured, strict=True))}


# --- what is said of it ---------------------------------------------------------------------------------------------


def check(world: World, options: BenchPredictOptions) -> None:
    """Rounds of constants and steps on these two ranks, and how far the one is from the other."""
    bench = Bench(world, options, ())
    if world.size != 2 or world.comm != "shm" or world.tp.size != 2:
        raise UserError(
            "bench_tp.py predict measures this machine on 2 CPU ranks over shm: torchrun --standalone --nproc_per_node=2 "
            "bench_tp.py predict. --hardware=all asks about others, and needs no ranks."
        )
    with ExitStack() as stack:
        workshop = Workshop(world, stack)
        fitted = {name: [workshop.ready(job) for job in jobs] for name, jobs in FITTED.items()}
        checked = [workshop.ready(job) for job in CHECKED]
        one_round(workshop, fitted, checked)  # memory is taken, C compiled
        rounds = [turn["nanotp"] for turn in bench.rounds(lambda: one_round(workshop, fitted, checked), [])]
    if not world.is_main:
        return
    names = rounds[0]["constants"]
    constants = {name: spread([turn["constants"][name] for turn in rounds]) for name in names}
    lines = []
    for i, job in enumerate(CHECKED):
        pairs = [turn["pairs"][i] for turn in rounds]
        middle = statistics.median_low([reckoned.total for reckoned, _ in pairs])
        parts = next(reckoned for reckoned, _ in pairs if reckoned.total == middle)
        ratios = [reckoned.total / seconds for reckoned, seconds in pairs]
        figures = {"predicted": asdict(parts), "measured": spread([seconds for _, seconds in pairs]), "ratio": spread(ratios)}
        lines.append({"job": job.name, **asdict(job), **figures, "ratios": ratios})
    worst = max(lines, key=lambda line: abs(line["ratio"]["median"] - 1))
    within = sum(abs(line["ratio"]["median"] - 1) <= GOAL for line in lines)
    said = table(lines, constants)
    said.append(f"{within} of {len(lines)} within {GOAL:.0%}; the farthest: {worst['job']}, {worst['ratio']['median']:.2f}")
    if options.plot:
        scatter(options.plot, lines)
    fitted_on = {name: [job.name for job in jobs] for name, jobs in FITTED.items()}
    found = {"constants": constants, "rounds": [turn["constants"] for turn in rounds], "fitted": fitted_on}
    bench.finish("predict", {**found, "lines": lines, "worst": worst["job"], "within": within}, said)


def table(lines: list[dict[str, Any]], constants: dict[str, dict[str, float]]) -> list[str]:
    said = ["constants of this machine, medians of the rounds (least to most):"]
    for name, s in constants.items():
        said.append(f"  {name:<20}{s['median']:>10,.2f}  ({s['min']:,.2f} to {s['max']:,.2f})")
    said.append(f"{'ms a step':<50}{'predicted':>11}{'measured':>11}{'ratio':>8}   (least to most)")
    for line in lines:
        predicted, measured, ratio = sum(line["predicted"].values()), line["measured"]["median"], line["ratio"]
        said.append(
            f"{line['job']:<50}{1e3 * predicted:>11,.2f}{1e3 * measured:>11,.2f}{ratio['median']:>8.2f}   "
            f"({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    return said


def scatter(path: str, lines: list[dict[str, Any]]) -> None:
    """Predicted against measured, a point for each job."""
    plt = report.pyplot()
    figure, plane = plt.subplots(figsize=(6, 6))
    for mode, marker in zip(MODES, "osD", strict=True):
        of = [line for line in lines if line["mode"] == mode]
        points = [(1e3 * line["measured"]["median"], 1e3 * sum(line["predicted"].values())) for line in of]
        plane.plot(*zip(*points, strict=True), marker, label=mode, alpha=0.8)
    ends = [f(1e3 * line["measured"]["median"] for line in lines) * s for f, s in ((min, 0.7), (max, 1.4))]
    plane.plot(ends, ends, color="#888888", linewidth=1)
    plane.fill_between(ends, [(1 - GOAL) * x for x in ends], [(1 + GOAL) * x for x in ends], color="#888888", alpha=0.15)
    plane.set(xscale="log", yscale="log", xlabel="measured, ms a step", ylabel="predicted, ms a step", title="the band is 20 %")
    plane.legend()
    figure.tight_layout()
    report.write_figure(path, figure)


def predict(world: World, options: BenchPredictOptions) -> None:
    (ask if options.hardware else check)(world, options)

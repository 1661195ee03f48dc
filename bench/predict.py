"""The cost model (plan/cost.py) asked about hardware that is not here: which tp and which sync
points are fastest, and when one device is. Every figure is a prediction: none was measured.
"""

import bisect
import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from base.errors import UserError
from bench.rounds import Bench, numbers, table
from checkpoints.sources import GPT2_TOKENS, HUB_SIZES
from cli.options import BenchPredictOptions as Options
from model import GPTConfig
from parallel.loss import chunk_rows
from plan.cost import MODES, Hardware, Link, Seconds, Step
from plan.partition import Partition
from plan.schedule import Schedule
from world.mesh import World

# docs/predictions.md names the measurements that these numbers are from.
MEMORY, PEAK = 0.83, 0.6  # reached of the rated bandwidth by a decode step, of the peak by products
OVERHEAD = 26e-6  # of a sub-block's kernels in a CUDA graph
NVLINK4, NVLINK3 = Link(4e-6, 1 / 365e9, one_shot=True), Link(4e-6, 1 / 243e9, one_shot=True)
PCIE, PCIE_HOST = Link(5e-6, 1 / 19e9), Link(7e-6, 1 / 10e9)
ROCE, ETHERNET = Link(15e-6, 1 / 12e9), Link(40e-6, 1 / 5e9)
RATED = {  # GB/s, TFLOP/s (bfloat16, dense) and GB of NVIDIA's data sheets
    "h100-nvlink": (3350, 989, 80, NVLINK4),
    "a100-nvlink": (2039, 312, 80, NVLINK3),
    "a100-pcie": (1935, 312, 80, PCIE),
    "rtx4090-pcie": (1008, 165, 24, PCIE_HOST),
    "h100-roce": (3350, 989, 80, ROCE),
    "h100-ethernet": (3350, 989, 80, ETHERNET),
}
PROFILES = {
    name: Hardware(name, MEMORY * 1e9 * GBps, PEAK * 1e12 * peak, OVERHEAD, link, capacity=1e9 * GB)
    for name, (GBps, peak, GB, link) in RATED.items()
}
MOST_RANKS = 8  # that the links are known for
CUSTOM = "custom"
# n_layer, n_head, n_embd: GPT-2s of the sizes of well-known models (three Llamas and GPT-3)
SHAPES = HUB_SIZES | {
    "7b-like": (32, 32, 4096), "13b-like": (40, 40, 5120), "65b-like": (80, 64, 8192),
    "175b-like": (96, 96, 12288),
}  # fmt: skip
FEWER = ("mlp", "every:2")  # fewer sync points: another function, approximately the same


@dataclass(frozen=True)
class Way:
    """A layout and its step. strategy: all, sequence, mlp or every:2."""

    tp: int
    strategy: str
    step: Step
    seconds: Seconds
    fits: bool

    def as_json(self, base: float) -> dict[str, Any]:
        """base: the seconds that the speed-up is over."""
        found = {"tp": self.tp, "strategy": self.strategy, "fits": self.fits}
        found |= {"bytes": self.step.capacity, "seconds": self.seconds.total}
        found |= {"speedup": base / self.seconds.total, "share": self.seconds.share}
        return found | {"parts": asdict(self.seconds)}


# --- the question ---------------------------------------------------------------------------------


def chosen(text: str, known: Iterable[str], option: str) -> list[str]:
    """The names in a list with commas between, or all. UserError for an unknown one."""
    known = list(known)
    names = known if text == "all" else [word.strip() for word in text.split(",") if word.strip()]
    for name in names or [text]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"--{option}={name} is not one of {', '.join(known)}.{hint}")
    return names


def hardware_of(name: str, options: Options) -> Hardware:
    """A profile changed by the options. UserError if a custom one lacks something."""
    needed = ("alpha_us", "link_GBps", "memory_GBps", "peak_tflops", "memory_GB")
    missing = [f"--{option}" for option in needed if not getattr(options, option)]
    if name == CUSTOM and missing:
        raise UserError(f"--hardware=custom needs {', '.join(missing)} as well.")
    found = PROFILES.get(name) or Hardware(CUSTOM, 0.0, 0.0, OVERHEAD, Link(0.0, 0.0))
    alpha = 1e-6 * options.alpha_us or found.link.alpha
    beta = 1e-9 / options.link_GBps if options.link_GBps else found.link.beta
    return replace(
        found,
        link=replace(found.link, alpha=alpha, beta=beta),
        memory=1e9 * options.memory_GBps or found.memory,
        peak=1e12 * options.peak_tflops or found.peak,
        capacity=1e9 * options.memory_GB or found.capacity,
        overhead=1e-6 * options.overhead_us if options.overhead_us >= 0 else found.overhead,
    )


def config_of(name: str, options: Options) -> GPTConfig:
    own = (options.vocab_size, options.n_layer, options.n_head, options.n_embd)
    sizes = own if name == CUSTOM else (GPT2_TOKENS, *SHAPES[name])
    return GPTConfig(options.tokens + 1, *sizes)


def step_of(config: GPTConfig, tp: int, strategy: str, mode: str, options: Options) -> Step:
    """UserError if the model cannot be split so."""
    trains, batch = mode == "train", options.batch_size
    split = Partition.of(replace(config, block_size=options.tokens) if trains else config, tp)
    schedule = Schedule.parse(strategy if strategy in FEWER else "all", config.n_layer)
    tokens, past = (1, options.tokens) if mode == "decode" else (options.tokens, 0)
    width, int8 = 4 if options.dtype == "float32" else 2, bool(options.quantize) and not trains
    rows = chunk_rows(batch * tokens, split.local_vocab, "cuda") if trains else 0
    sequence = strategy == "sequence"
    return Step(split, schedule, mode, batch, tokens, past, width, int8, sequence, rows)


def ways(
    config: GPTConfig, sizes: Iterable[int], hardware: Hardware, mode: str, options: Options
) -> list[Way]:
    """All layouts in which the model can be split, fitting or not. UserError if there is none."""
    found, fault = [], None
    fewer = FEWER[: 1 + (config.n_layer > 1)]
    for tp in sizes:
        for name in ("all", *["sequence"] * (mode != "decode"), *fewer) if tp > 1 else ("all",):
            try:
                step = step_of(config, tp, name, mode, options)
                fits = not hardware.capacity or step.capacity <= hardware.capacity
                found.append(Way(tp, name, step, step.seconds(hardware), fits))
            except UserError as error:
                fault = error
    if fault is not None and not found:
        raise fault
    return found


# --- the answer -----------------------------------------------------------------------------------


def fastest(found: Iterable[Way]) -> Way:
    return min(found, key=lambda way: way.seconds.total)


def exact(found: list[Way]) -> dict[int, Way]:
    """By tp, the fastest layout that fits and computes the same function as one device."""
    fitting = [way for way in found if way.fits and way.strategy not in FEWER]
    sizes = sorted({way.tp for way in fitting})
    return {tp: fastest(way for way in fitting if way.tp == tp) for tp in sizes}


def break_even(step: Step, limit: float, hardware: Hardware) -> float | None:
    """The largest alpha (to 1e-12 s) at which the step takes at most `limit` seconds, if any."""

    def total(alpha: int) -> float:
        link = replace(hardware.link, alpha=1e-12 * alpha)
        return step.seconds(replace(hardware, link=link)).total

    fitting = bisect.bisect(range(10**12), limit, key=total)
    return 1e-12 * (fitting - 1) if fitting else None


def pays_from(hardware: Hardware, tp: int, mode: str, options: Options) -> GPTConfig | None:
    """The smallest model from which on tp ranks beat one device, if any. Tries n layers of n heads
    of 128 channels, as Llamas of 7 and 13 billion have, n from tp to 160 in steps of 10 %."""
    found = None
    for n in sorted({min(160, round(tp * 1.1**k)) for k in range(60)}, reverse=True):
        config = GPTConfig(options.tokens + 1, GPT2_TOKENS, n, n, 128 * n)
        steps = (step_of(config, size, "all", mode, options) for size in (1, tp))
        one, many = (step.seconds(hardware).total for step in steps)
        if many >= one:
            break
        found = config
    return found


def too_large(name: str, found: list[Way], hardware: Hardware, options: Options) -> str:
    """The message for a model that fits in no layout that was asked for, with one that would do."""
    least = min(found, key=lambda way: way.step.capacity)
    config, mode = config_of(name, options), least.step.mode
    every = ways(config, range(1, MOST_RANKS + 1), hardware, mode, options)
    smallest = math.ceil(min(way.step.capacity for way in every) / 1e9)
    would = [f"--tp={way.tp}" for way in every if way.fits]
    would += [f"--memory_GB={smallest} at tp={every[-1].tp}"]
    return (
        f"--model={name} does not fit {hardware.name} ({hardware.capacity / 1e9:.0f} GB): the "
        f"layout that takes least, tp={least.tp}, {least.strategy}, takes "
        f"{least.step.capacity / 1e9:.1f} GB a rank. What would do: {would[0]}."
    )


def verdict(
    name: str, found: list[Way], sizes: list[int], hardware: Hardware
) -> tuple[dict[str, Any], list[str]]:
    """A model in the report and in the table: all layouts, the fastest exact one, the fastest with
    fewer sync points, and each tp's break-even alpha. If none fits, the bytes of the smallest."""
    parameters, best = found[0].step.split.count(), exact(found)
    line: dict[str, Any] = {"model": name, "parameters": parameters}
    if not best:
        return line | {"ways": [], "least_bytes": min(way.step.capacity for way in found)}, []
    first, *others = best.values()
    base, top = first.seconds.total, fastest(best.values())
    line |= {"base_tp": first.tp, "ways": [way.as_json(base) for way in found]}
    line |= {"best": top.as_json(base)}
    cells = [name, f"{parameters / 1e6:,.0f}M", f"{1e3 * base:,.2f}", str(first.tp)]
    for tp in sizes[1:]:
        none = "no room" if any(way.tp == tp for way in found) else "no split"
        way = best.get(tp)
        cells.append(f"{base / way.seconds.total:.2f}x {way.seconds.share:>4.0%}" if way else none)
    cells += [f"tp {top.tp} {top.strategy}", "-", "-"]
    if fewer := [way for way in found if way.fits and way.strategy in FEWER]:
        way = fastest(fewer)
        line["fewer"] = way.as_json(base)
        cells[-2] = f"{base / way.seconds.total:.2f}x {way.strategy} {way.tp}"
    if first.tp == 1 and others:
        alphas = [break_even(way.step, base, hardware) for way in others]
        limits = [None if alpha is None else 1e6 * alpha for alpha in alphas]
        line["alpha_limit_us"] = dict(zip((way.tp for way in others), limits, strict=True))
        cells[-1] = "never" if limits[0] is None else f"{limits[0]:,.1f} us"
    return line, cells


def predict(world: World, options: Options) -> None:
    """Predictions for each hardware, model and mode. Rank 0 prints; more ranks are of no use."""
    bench = Bench(world, options)
    if options.quantize and options.dtype == "float32":
        raise UserError("--quantize=int8 is predicted with --dtype=bfloat16, as all other numbers.")
    known = [*PROFILES] if options.hardware == "all" else [*PROFILES, CUSTOM]
    machines = [hardware_of(n, options) for n in chosen(options.hardware, known, "hardware")]
    if options.dtype == "float32":  # in TF32, at half of bfloat16's rate
        machines = [replace(machine, peak=machine.peak / 2) for machine in machines]
    models = chosen(options.model, [*SHAPES, CUSTOM], "model")
    sizes = sorted(set(numbers(options.tp, "tp")))
    if not 1 <= sizes[0] <= sizes[-1] <= MOST_RANKS:
        most = f"sizes are 1 to {MOST_RANKS}, as many ranks as the links are known for."
        raise UserError(f"--tp={options.tp}: {most}")
    figures, lines = [], []
    for mode in chosen(options.mode, MODES, "mode"):
        found: dict[tuple[str, str], list[Way]] = {}
        for name in models:
            config, largest = config_of(name, options), max(machines, key=lambda m: m.capacity)
            of = {m.name: ways(config, sizes, m, mode, options) for m in machines}
            if not any(way.fits for several in of.values() for way in several):
                raise UserError(too_large(name, of[largest.name], largest, options))
            found |= {(name, machine): several for machine, several in of.items()}
        for machine in machines:
            of = {name: found[name, machine.name] for name in models}
            made, words = answer(machine, mode, of, sizes, options)
            figures.append(made)
            lines += [*words, ""]
    lines.append("These are predictions: nothing was measured. Sources: docs/predictions.md")
    about = {"dtype": options.dtype, "batch_size": options.batch_size, "tokens": options.tokens}
    bench.finish("predict", about | {"predictions": figures}, lines)


def answer(
    hardware: Hardware, mode: str, found: dict[str, list[Way]], sizes: list[int], options: Options
) -> tuple[dict[str, Any], list[str]]:
    """The report and the lines of one hardware and mode. A model's line has the first layout that
    fits, and how many times as fast the others are."""
    verdicts = [verdict(name, of, sizes, hardware) for name, of in found.items()]
    head = ["", "parameters", "ms", "at tp", *(f"tp {tp}" for tp in sizes[1:])]
    head += ["best", "fewer syncs", "alpha limit"]
    words, pays = [], dict[int, dict[str, int] | None]()
    for tp in sizes[sizes[0] == 1 :]:
        config, size = pays_from(hardware, tp, mode, options), "at no size"
        pays[tp] = None
        if config is not None:
            parameters = Partition.of(config, 1).count()
            pays[tp] = {"n_embd": config.n_embd, "parameters": parameters}
            size = f"from {parameters / 1e6:,.0f}M parameters on"
        words.append(f"tp {tp} {size}")
    reduce, bus = 1e6 * hardware.link.seconds("all_reduce", 0, 2), 1e-9 / hardware.link.beta
    lines = [
        f"{hardware.name}, {mode}: {options.batch_size} x {options.tokens:,} tokens; memory "
        f"{hardware.memory / 1e9:,.0f} GB/s, products {hardware.peak / 1e12:,.0f} TFLOP/s, "
        f"{1e6 * hardware.overhead:.0f} us a sub-block, an all-reduce of 2 ranks {reduce:,.0f} us, "
        f"{bus:,.0f} GB/s",
        *table([head, *(cells for _, cells in verdicts if cells)]),
    ]
    for line, cells in verdicts:
        if not cells:
            least = f"{line['least_bytes'] / 1e9:,.1f} GB a rank"
            lines.append(f"{line['model']} no room: at least {least}")
    shape = "128 channels a head, as many layers as heads"
    lines.append(f"faster than one device: {'; '.join(words)} ({shape})")
    figures = {"hardware": asdict(hardware), "mode": mode, "lines": [line for line, _ in verdicts]}
    return figures | {"pays_from": pays}, lines

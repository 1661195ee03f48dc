"""The cost model (plan/cost.py) asked about hardware that is not here: which tp and which sync
points are fastest, and when one device is. Every figure is a prediction: none was measured.
"""

import bisect
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from operator import itemgetter
from typing import Any

from base.errors import UserError
from bench.cluster import answer as answer_for_cluster
from bench.rounds import Bench, chosen, numbers, table
from checkpoints.huggingface import GPT2_TOKENS, HUB_SIZES
from cli.options import BenchPredictOptions as Options
from model import GPTConfig
from parallel.loss import chunk_rows
from plan.cost import MODES, Hardware, Step
from plan.link import ETHERNET, NVLINK3, NVLINK4, PCIE, PCIE_HOST, ROCE, Link
from plan.partition import Partition
from plan.schedule import Schedule
from world.mesh import World

# docs/predictions.md names the measurements that these numbers are from.
MEMORY, PEAK = 0.83, 0.6  # reached of the rated bandwidth by a decode step, of the peak by products
OVERHEAD = 26e-6  # of a sub-block's kernels in a CUDA graph
RATED = {  # GB/s, TFLOP/s (bfloat16, dense) and GB of NVIDIA's data sheets
    "h100-nvlink": (3350, 989, 80, NVLINK4), "a100-nvlink": (2039, 312, 80, NVLINK3),
    "a100-pcie": (1935, 312, 80, PCIE), "rtx4090-pcie": (1008, 165, 24, PCIE_HOST),
    "h100-roce": (3350, 989, 80, ROCE), "h100-ethernet": (3350, 989, 80, ETHERNET)}
PROFILES = {
    name: Hardware(name, MEMORY * 1e9 * GBps, PEAK * 1e12 * peak, OVERHEAD, link, capacity=1e9 * GB)
    for name, (GBps, peak, GB, link) in RATED.items()}
MOST_RANKS = 8  # that the links are known for
CUSTOM = "custom"
# n_layer, n_head, n_embd: GPT-2s of the sizes of well-known models (three Llamas and GPT-3)
SHAPES = HUB_SIZES | {
    "7b-like": (32, 32, 4096), "13b-like": (40, 40, 5120), "65b-like": (80, 64, 8192),
    "175b-like": (96, 96, 12288)}
FEWER = ("mlp", "every:2", "delay:1")  # another function, approximately the same

Way = dict[str, Any]  # a layout: tp, strategy (all, sequence or one of FEWER), its step and figures


def hardware_of(name: str, options: Options) -> Hardware:
    """A profile changed by the options. UserError if a custom one lacks something."""
    needed = ("alpha_us", "link_GBps", "memory_GBps", "peak_tflops", "memory_GB")
    missing = [f"--{option}" for option in needed if not getattr(options, option)]
    if name == CUSTOM and missing:
        raise UserError(f"--hardware=custom needs {', '.join(missing)} as well.")
    found = PROFILES.get(name) or Hardware(CUSTOM, 0.0, 0.0, OVERHEAD, Link(0.0, 0.0))
    beta = 1e-9 / options.link_GBps if options.link_GBps else found.link.beta
    link = replace(found.link, alpha=1e-6 * options.alpha_us or found.link.alpha, beta=beta)
    return replace(
        found, link=link, memory=1e9 * options.memory_GBps or found.memory,
        peak=1e12 * options.peak_tflops or found.peak,
        capacity=1e9 * options.memory_GB or found.capacity,
        overhead=1e-6 * options.overhead_us if options.overhead_us >= 0 else found.overhead)


def config_of(name: str, options: Options) -> GPTConfig:
    own = (options.vocab_size, options.n_layer, options.n_head, options.n_embd)
    return GPTConfig(options.tokens + 1, *own if name == CUSTOM else (GPT2_TOKENS, *SHAPES[name]))


def step_of(config: GPTConfig, tp: int, strategy: str, mode: str, options: Options) -> Step:
    """UserError if the model cannot be split so."""
    trains, batch = mode == "train", options.batch_size
    split = Partition.of(replace(config, block_size=options.tokens) if trains else config, tp)
    schedule = Schedule.parse(strategy if strategy in FEWER else "all", config.n_layer)
    tokens, past = (1, options.tokens) if mode == "decode" else (options.tokens, 0)
    width, int8 = 4 if options.dtype == "float32" else 2, bool(options.quantize) and not trains
    rows = chunk_rows(batch * tokens, split.local_vocab, "cuda") if trains else 0
    micro_batches = options.gradient_accumulation_steps if trains else 1
    return Step(split, schedule, mode, batch, tokens, past, width, int8, strategy == "sequence",
                rows, micro_batches)


def ways(config: GPTConfig, sizes: Iterable[int], hardware: Hardware, mode: str,
         options: Options) -> list[Way]:
    """All layouts in which the model can be split, fitting or not. UserError if there is none."""
    found, fault = [], None
    fewer = [name for name in FEWER if config.n_layer > 1 or name != "every:2"]
    for tp in sizes:
        for name in ("all", *["sequence"] * (mode != "decode"), *fewer) if tp > 1 else ("all",):
            try:
                step = step_of(config, tp, name, mode, options)
            except UserError as error:
                fault = error
                continue
            size, seconds = step.capacity, step.seconds(hardware)
            found.append({
                "tp": tp, "strategy": name, "step": step, "bytes": size, "share": seconds.share,
                "seconds": seconds.total, "parts": asdict(seconds),
                "fits": not hardware.capacity or size <= hardware.capacity})
    if fault is not None and not found:
        raise fault
    return found


def fastest(found: Iterable[Way]) -> Way:
    return min(found, key=itemgetter("seconds"))


def break_even(step: Step, limit: float, hardware: Hardware) -> float | None:
    """The largest alpha in us (to 1e-6) at which the step takes at most `limit` seconds, if any."""

    def total(alpha: int) -> float:
        link = replace(hardware.link, alpha=1e-12 * alpha)
        return step.seconds(replace(hardware, link=link)).total

    fitting = bisect.bisect(range(10**12), limit, key=total)
    return 1e-6 * (fitting - 1) if fitting else None


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


def too_large(name: str, sizes: list[int], hardware: Hardware, mode: str,
              options: Options) -> UserError:
    """For a model that fits in no layout that was asked for; names one that would do."""
    config = config_of(name, options)
    least = min(ways(config, sizes, hardware, mode, options), key=itemgetter("bytes"))
    every = ways(config, range(1, MOST_RANKS + 1), hardware, mode, options)
    smallest = math.ceil(min(way["bytes"] for way in every) / 1e9)
    would = [f"--tp={way['tp']}" for way in every if way["fits"]]
    would += [f"--memory_GB={smallest} at tp={every[-1]['tp']}"]
    return UserError(
        f"--model={name} does not fit {hardware.name} ({1e-9 * hardware.capacity:.0f} GB): the "
        f"layout that takes least, tp={least['tp']}, {least['strategy']}, takes "
        f"{least['bytes'] / 1e9:.1f} GB a rank. What would do: {would[0]}.")


def verdict(name: str, found: list[Way], sizes: list[int],
            hardware: Hardware) -> tuple[dict[str, Any], list[str]]:
    """A model in the report and in the table: all layouts, the fastest exact one, the fastest with
    fewer sync points, and each tp's break-even alpha. If none fits, the bytes of the smallest."""
    line: dict[str, Any] = {"model": name, "parameters": found[0]["step"].split.count()}
    fitting = [way for way in found if way["fits"]]
    exact = [way for way in fitting if way["strategy"] not in FEWER]
    if not exact:
        return line | {"ways": [], "least_bytes": min(way["bytes"] for way in found)}, []
    best = {tp: fastest(way for way in exact if way["tp"] == tp) for tp in {w["tp"] for w in exact}}
    first, top = best[min(best)], fastest(exact)
    for way in found:
        way["speedup"] = first["seconds"] / way["seconds"]
    line |= {"base_tp": first["tp"], "ways": found, "best": top}
    cells = [name, f"{line['parameters'] / 1e6:,.0f}M", f"{1e3 * first['seconds']:,.2f}",
             f"{first['tp']}"]
    for tp in sizes[1:]:
        none = "no room" if any(way["tp"] == tp for way in found) else "no split"
        at = best.get(tp)
        cells.append(f"{at['speedup']:.2f}x {at['share']:>4.0%}" if at else none)
    fewer, limit = "-", "-"
    if len(exact) < len(fitting):
        line["fewer"] = few = fastest(way for way in fitting if way["strategy"] in FEWER)
        fewer = f"{few['speedup']:.2f}x {few['strategy']} {few['tp']}"
    if first["tp"] == 1 and len(best) > 1:
        line["alpha_limit_us"] = limits = {
            tp: break_even(best[tp]["step"], first["seconds"], hardware) for tp in sorted(best)[1:]}
        smallest = limits[min(limits)]
        limit = "never" if smallest is None else f"{smallest:,.1f} us"
    for way in found:
        del way["step"]  # it is no figure
    return line, [*cells, f"tp {top['tp']} {top['strategy']}", fewer, limit]


def answer(hardware: Hardware, mode: str, models: list[str], sizes: list[int],
           options: Options) -> tuple[dict[str, Any], list[str]]:
    """The report and the lines of one hardware and mode. A model's line has the first layout that
    fits, and how many times as fast the others are."""
    verdicts = [verdict(name, ways(config_of(name, options), sizes, hardware, mode, options), sizes,
                        hardware) for name in models]
    words, pays = [], dict[int, dict[str, int] | None]()
    for tp in sizes[sizes[0] == 1 :]:
        config, size, pays[tp] = pays_from(hardware, tp, mode, options), "at no size", None
        if config is not None:
            parameters = Partition.of(config, 1).count()
            pays[tp] = {"n_embd": config.n_embd, "parameters": parameters}
            size = f"from {parameters / 1e6:,.0f}M parameters on"
        words.append(f"tp {tp} {size}")
    reduce, bus = 1e6 * hardware.link.seconds("all_reduce", 0, 2), 1e-9 / hardware.link.beta
    head = ["", "parameters", "ms", "at tp", *(f"tp {tp}" for tp in sizes[1:]), "best",
            "fewer syncs", "alpha limit"]
    steps = f" x {options.gradient_accumulation_steps} micro-batches" if mode == "train" else ""
    lines = [
        f"{hardware.name}, {mode}: {options.batch_size} x {options.tokens:,} tokens{steps}; "
        f"memory {hardware.memory / 1e9:,.0f} GB/s, products {hardware.peak / 1e12:,.0f} TFLOP/s, "
        f"{1e6 * hardware.overhead:.0f} us a sub-block, an all-reduce of 2 ranks {reduce:,.0f} us, "
        f"{bus:,.0f} GB/s", *table([head, *(cells for _, cells in verdicts if cells)])]
    lines += [f"{line['model']} no room: at least {line['least_bytes'] / 1e9:,.1f} GB a rank"
              for line, cells in verdicts if not cells]
    lines += [f"faster than one device: {'; '.join(words)} (128 channels a head, as many layers as "
              "heads)", ""]
    return {"hardware": asdict(hardware), "mode": mode, "lines": [line for line, _ in verdicts],
            "pays_from": pays}, lines


def predict(world: World, options: Options) -> None:
    """Predictions for each hardware, model and mode. Rank 0 prints; more ranks are of no use."""
    bench = Bench(world, options)

    def finish(figures: list[dict[str, Any]], lines: list[str]) -> None:
        lines.append("These are predictions: nothing was measured. Sources: docs/predictions.md")
        bench.finish("predict", {"dtype": options.dtype, "batch_size": options.batch_size,
                                 "tokens": options.tokens, "predictions": figures}, lines)

    if options.quantize and options.dtype == "float32":
        raise UserError("--quantize=int8 is predicted with --dtype=bfloat16, as all other numbers.")
    if options.nnodes and options.quantize:
        raise UserError("--quantize together with --nnodes, which is about training: use one.")
    if options.dp_every and not options.nnodes:
        raise UserError("--dp_every needs --nnodes: without it predictions have no dp.")
    known = [*PROFILES] if options.hardware == "all" else [*PROFILES, CUSTOM]
    machines = [hardware_of(n, options) for n in chosen(options.hardware, known, "hardware")]
    if options.dtype == "float32":  # in TF32, at half of bfloat16's rate
        machines = [replace(machine, peak=machine.peak / 2) for machine in machines]
    models = chosen(options.model, [*SHAPES, CUSTOM], "model")
    if options.nnodes:
        made = [answer_for_cluster(machine, name, config_of(name, options), options)
                for machine in machines for name in models]
        return finish([figure for figure, _ in made], [line for _, said in made for line in said])
    sizes = sorted(set(numbers(options.tp, "tp")))
    if not 1 <= sizes[0] <= sizes[-1] <= MOST_RANKS:
        raise UserError(f"--tp={options.tp}: sizes are 1 to {MOST_RANKS}, as many ranks as the "
                        "links are known for.")
    figures, lines, largest = [], [], max(machines, key=lambda machine: machine.capacity)
    for mode in chosen(options.mode, MODES, "mode"):
        made = [answer(machine, mode, models, sizes, options) for machine in machines]
        for i, name in enumerate(models):
            if not any(figure["lines"][i]["ways"] for figure, _ in made):
                raise too_large(name, sizes, largest, mode, options)
        figures += [figure for figure, _ in made]
        lines += [line for _, said in made for line in said]
    finish(figures, lines)

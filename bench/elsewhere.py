"""The cost model (plan/cost.py) asked about hardware that is not here: which tp, which sync points, and when one device is
faster. Every figure it gives is a prediction: none of it was measured.

An efficiency is stated beside each rated number. What is not rated is from public measurements, named below, and the model with
these numbers is held against others of them in tests/test_cost.py (gpt-fast's Llama-2-7B on 1 to 8 A100s).
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from base.errors import UserError
from bench.rounds import Bench
from checkpoints.huggingface import GPT2_TOKENS, HUB_SIZES
from cli.options import BenchPredictOptions
from model import GPTConfig
from parallel.loss import chunk_rows
from plan.cost import MODES, Hardware, Link, Seconds, Step
from plan.partition import Partition
from plan.schedule import Schedule
from report import report
from world.mesh import World

# Of the rated memory bandwidth, what a decode step reads with: gpt-fast's authors see 1,700 of an A100's 2,039 GB/s.
MEMORY = 0.83
# Of the rated peak of dense products in bfloat16, what products of a layer's size reach: 0.5 to 0.7 as usually reported.
PEAK = 0.6
# A sub-block's kernels inside a CUDA graph. gpt-fast: Llama-2-7B on one A100, 104.9 tokens/s and 13.3 GB of weights a token,
# 7.8 of 9.5 ms at 1,700 GB/s: the rest is 26 us for each of 64 sub-blocks and the head.
OVERHEAD = 26e-6
# Links. alpha is half of what a small all-reduce of 2 ranks takes, beta follows from the bus bandwidth of large ones.
# NVLink: 6 us over 2 and 11 us over 8 H100s, in one shot (NVIDIA/nccl issue 1259, yifuwang/symm-mem-recipes pull request 3);
# 365 of 450 GB/s (NVIDIA/nccl issue 1455), the same share of the A100's 300.
# PCIe: 19 us over 4 ranks in a CUDA graph, 41 us over 8 without peer-to-peer access (haohervchb/sglang-V100 pull request 2,
# NVIDIA/nccl issue 1530), 4 and 6 rounds of a tree; 60 % of the 32 GB/s of 16 lanes, a third where host memory is between.
# Network: 30 us over 2 nodes with RoCE, 12 GB/s a 100 Gb card (NVIDIA/dgx-spark-playbooks pull request 103, NVIDIA/nccl-tests
# issue 119); TCP: 40 us one way, 5 GB/s (NVIDIA/nccl-tests issue 82, NVIDIA/nccl issue 450).
NVLINK4, NVLINK3 = Link(4e-6, 1 / 365e9, one_shot=True), Link(4e-6, 1 / 243e9, one_shot=True)
PCIE, PCIE_HOST = Link(5e-6, 1 / 19e9), Link(7e-6, 1 / 10e9)
ROCE, ETHERNET = Link(15e-6, 1 / 12e9), Link(40e-6, 1 / 5e9)


def gpu(name: str, memory: float, peak: float, room: float, link: Link) -> Hardware:
    """memory, peak: as rated, in GB/s and TFLOP/s (bfloat16, dense). room: GB."""
    return Hardware(name, MEMORY * 1e9 * memory, PEAK * 1e12 * peak, OVERHEAD, link, capacity=1e9 * room)


# Rated numbers are of NVIDIA's data sheets.
PROFILES = {
    profile.name: profile
    for profile in (
        gpu("h100-nvlink", 3350, 989, 80, NVLINK4),
        gpu("a100-nvlink", 2039, 312, 80, NVLINK3),
        gpu("a100-pcie", 1935, 312, 80, PCIE),
        gpu("rtx4090-pcie", 1008, 165, 24, PCIE_HOST),
        gpu("h100-roce", 3350, 989, 80, ROCE),
        gpu("h100-ethernet", 3350, 989, 80, ETHERNET),
    )
}
MOST_RANKS = 8
CUSTOM = "custom"

# n_layer, n_head, n_embd: GPT-2s of the sizes of well-known models (Llama's first three, and GPT-3)
LARGER = {"7b-like": (32, 32, 4096), "13b-like": (40, 40, 5120), "65b-like": (80, 64, 8192), "175b-like": (96, 96, 12288)}
SHAPES = HUB_SIZES | LARGER
WITHOUT = ("mlp", "every:2")  # fewer sync points: another function, approximately the same


@dataclass(frozen=True)
class Way:
    """A layout and what a step takes in it."""

    tp: int
    strategy: str  # all | sequence | mlp | every:2
    step: Step
    seconds: Seconds
    fits: bool


# --- what is asked --------------------------------------------------------------------------------------------------


def chosen(text: str, known: Iterable[str], option: str) -> list[str]:
    """The names in a list with commas between, or all. UserError for one that nobody knows."""
    known = list(known)
    names = known if text == "all" else [word.strip() for word in text.split(",") if word.strip()]
    for name in names or [text]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"--{option}={name} is not one of {', '.join(known)}.{hint}")
    return names


def hardware_of(name: str, options: BenchPredictOptions) -> Hardware:
    """A profile, with what the options say in its place. UserError where a custom one lacks something."""
    said = {
        "alpha_us": options.alpha_us,
        "link_GBps": options.link_GBps,
        "memory_GBps": options.memory_GBps,
        "peak_tflops": options.peak_tflops,
        "memory_GB": options.memory_GB,
    }
    missing = [f"--{key}" for key, value in said.items() if not value]
    if name == CUSTOM and missing:
        raise UserError(f"--hardware=custom needs {', '.join(missing)} as well.")
    found = PROFILES.get(name) or Hardware(CUSTOM, 0.0, 0.0, OVERHEAD, Link(0.0, 0.0))
    link = replace(
        found.link,
        alpha=1e-6 * options.alpha_us or found.link.alpha,
        beta=1e-9 / options.link_GBps if options.link_GBps else found.link.beta,
    )
    return replace(
        found,
        link=link,
        memory=1e9 * options.memory_GBps or found.memory,
        peak=1e12 * options.peak_tflops or found.peak,
        capacity=1e9 * options.memory_GB or found.capacity,
        overhead=1e-6 * options.overhead_us if options.overhead_us >= 0 else found.overhead,
    )


def config_of(name: str, options: BenchPredictOptions) -> GPTConfig:
    if name == CUSTOM:
        return GPTConfig(options.tokens + 1, options.vocab_size, options.n_layer, options.n_head, options.n_embd)
    n_layer, n_head, n_embd = SHAPES[name]
    return GPTConfig(options.tokens + 1, GPT2_TOKENS, n_layer, n_head, n_embd)


def step_of(config: GPTConfig, tp: int, strategy: str, mode: str, options: BenchPredictOptions) -> Step:
    """UserError where the model cannot be split so."""
    split = Partition.of(replace(config, block_size=options.tokens) if mode == "train" else config, tp)
    schedule = Schedule.parse("all" if strategy == "sequence" or tp == 1 else strategy, config.n_layer)
    tokens, past = (1, options.tokens) if mode == "decode" else (options.tokens, 0)
    width = 4 if options.dtype == "float32" else 2
    logit_rows = chunk_rows(options.batch_size * tokens, split.local_vocab, "cuda") if mode == "train" else 0
    int8 = options.quantize == "int8" and mode != "train"
    return Step(
        split, schedule, mode, options.batch_size, tokens, past, width, int8, strategy == "sequence", logit_rows
    )  # fmt: skip


def strategies(tp: int, mode: str, n_layer: int) -> list[str]:
    if tp == 1:
        return ["all"]
    exact = ["all"] if mode == "decode" else ["all", "sequence"]
    return exact + [word for word in WITHOUT if word != "every:2" or n_layer > 1]


def ways(config: GPTConfig, sizes: list[int], hardware: Hardware, mode: str, options: BenchPredictOptions) -> list[Way]:
    """Every layout of these sizes that the model can be split in, whether it fits or not. UserError where there is none."""
    found, fault = [], None
    for tp in sizes:
        for strategy in strategies(tp, mode, config.n_layer):
            try:
                step = step_of(config, tp, strategy, mode, options)
            except UserError as error:
                fault = error
                continue
            fits = not hardware.capacity or step.capacity <= hardware.capacity
            found.append(Way(tp, strategy, step, step.seconds(hardware), fits))
    if not found and fault is not None:
        raise fault
    return found


# --- what follows ---------------------------------------------------------------------------------------------------


def exact(found: list[Way]) -> list[Way]:
    """Those that fit and compute what one device does: of each tp the faster one."""
    best: dict[int, Way] = {}
    for way in found:
        if way.fits and way.strategy not in WITHOUT and (way.tp not in best or way.seconds.total < best[way.tp].seconds.total):
            best[way.tp] = way
    return [best[tp] for tp in sorted(best)]


def break_even(step: Step, limit: float, hardware: Hardware) -> float | None:
    """The longest alpha at which the step takes at most `limit` seconds: None where it takes longer at alpha 0, too."""

    def total(alpha: float) -> float:
        return step.seconds(replace(hardware, link=replace(hardware.link, alpha=alpha))).total

    low, high = 0.0, 1.0
    if total(low) > limit:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= limit else (low, middle)
    return low


def pays_from(hardware: Hardware, tp: int, mode: str, options: BenchPredictOptions) -> GPTConfig | None:
    """The size from which on tp ranks beat one device, of models with 128 channels a head and as many layers as heads (as those
    of 7 and 13 billion have), tp to 160 heads, each a tenth more than the one before; None where the largest does not."""
    heads = sorted({min(160, round(tp * 1.1**k)) for k in range(60)})
    found = None
    for n in reversed(heads):
        config = GPTConfig(options.tokens + 1, GPT2_TOKENS, n, n, 128 * n)
        one, many = (step_of(config, size, "all", mode, options).seconds(hardware).total for size in (1, tp))
        if many >= one:
            break
        found = config
    return found


def too_large(name: str, found: list[Way], hardware: Hardware, options: BenchPredictOptions) -> UserError:
    """What to say of a model that fits in no layout that was asked about: what the least of them takes, and what would do."""
    least = min(found, key=lambda way: way.step.capacity)
    every = ways(config_of(name, options), list(range(1, MOST_RANKS + 1)), hardware, least.step.mode, options)
    would = next((f"--tp={way.tp}" for way in every if way.fits), "")
    if not would:
        smallest = min(way.step.capacity for way in every)
        would = f"--memory_GB={math.ceil(smallest / 1e9)} at tp={every[-1].tp}"
    return UserError(
        f"--model={name} does not fit {hardware.name} ({hardware.capacity / 1e9:.0f} GB): the layout that takes least, "
        f"tp={least.tp}, {least.strategy}, takes {least.step.capacity / 1e9:.1f} GB a rank. What would do: {would}."
    )


def verdict(name: str, found: list[Way], hardware: Hardware) -> dict[str, Any]:
    """A line of the report: every layout, the best exact one, what fewer sync points would add, and break-even. Where none
    fits, what the one that takes least takes."""
    fitting = exact(found)
    if not fitting:
        least = min(way.step.capacity for way in found)
        return {"model": name, "parameters": found[0].step.split.count(), "ways": [], "least_bytes": least}
    base, best = fitting[0], min(fitting, key=lambda way: way.seconds.total)
    fewer = [way for way in found if way.fits and way.strategy in WITHOUT]
    line: dict[str, Any] = {
        "model": name,
        "parameters": base.step.split.count(),
        "base_tp": base.tp,
        "ways": [_told(way, base.seconds.total) for way in found],
        "best": _told(best, base.seconds.total),
    }
    if fewer:
        line["fewer"] = _told(min(fewer, key=lambda way: way.seconds.total), base.seconds.total)
    if base.tp == 1 and len(fitting) > 1:
        line["alpha_limit_us"] = {}
        for way in fitting[1:]:
            alpha = break_even(way.step, base.seconds.total, hardware)
            line["alpha_limit_us"][way.tp] = None if alpha is None else 1e6 * alpha
    return line


def _told(way: Way, base: float) -> dict[str, Any]:
    parts = {"tp": way.tp, "strategy": way.strategy, "fits": way.fits, "bytes": way.step.capacity}
    total = {"seconds": way.seconds.total, "speedup": base / way.seconds.total, "share": way.seconds.share}
    return parts | total | {"parts": asdict(way.seconds)}


# --- what is said ---------------------------------------------------------------------------------------------------


def ask(world: World, options: BenchPredictOptions) -> None:
    """Predictions for each hardware, model and mode. Rank 0 speaks; more ranks are of no use."""
    bench = Bench(world, options, ())
    if options.quantize and options.dtype == "float32":
        raise UserError("--quantize=int8 is asked about with --dtype=bfloat16, which its other numbers are in.")
    names = chosen(options.hardware, [*PROFILES, CUSTOM] if options.hardware != "all" else PROFILES, "hardware")
    machines = [hardware_of(name, options) for name in names]
    if options.dtype == "float32":  # in TF32, at half of bfloat16's rate
        machines = [replace(machine, peak=machine.peak / 2) for machine in machines]
    models, modes = chosen(options.model, [*SHAPES, CUSTOM], "model"), chosen(options.mode, MODES, "mode")
    try:
        sizes = sorted({int(word) for word in options.tp.split(",")})
    except ValueError:
        raise UserError(f"--tp={options.tp} are not sizes with commas between.") from None
    if not 1 <= sizes[0] <= sizes[-1] <= MOST_RANKS:
        raise UserError(f"--tp={options.tp}: sizes are 1 to {MOST_RANKS}, as many ranks as the links are known for.")
    figures, said = [], []
    for mode in modes:
        found = {(name, machine): ways(config_of(name, options), sizes, machine, mode, options)
                 for name in models for machine in machines}  # fmt: skip
        for name in models:
            if not any(way.fits for machine in machines for way in found[name, machine]):
                largest = max(machines, key=lambda machine: machine.capacity)
                raise too_large(name, found[name, largest], largest, options)
        for machine in machines:
            lines = [verdict(name, found[name, machine], machine) for name in models]
            smallest = {tp: pays_from(machine, tp, mode, options) for tp in sizes if tp > 1}
            figures.append({"hardware": asdict(machine), "mode": mode, "lines": lines, "pays_from": pays_json(smallest)})
            said += table(machine, mode, lines, sizes, smallest, options)
    said.append("These are predictions: nothing was measured on such hardware. Model and sources: docs/predictions.md")
    if world.is_main and options.plot:
        plot(options.plot, figures)
    bench.finish("predict", {"dtype": options.dtype, "batch_size": options.batch_size, "tokens": options.tokens,
                             "predictions": figures}, said)  # fmt: skip


def pays_json(smallest: dict[int, GPTConfig | None]) -> dict[int, Any]:
    def told(config: GPTConfig | None) -> dict[str, int] | None:
        return None if config is None else {"n_embd": config.n_embd, "parameters": Partition.of(config, 1).count()}

    return {tp: told(config) for tp, config in smallest.items()}


def table(
    machine: Hardware, mode: str, lines: list[dict[str, Any]], sizes: list[int], smallest: dict[int, GPTConfig | None],
    options: BenchPredictOptions,
) -> list[str]:  # fmt: skip
    """A line for each model: the step in the first layout that fits, then how many times as fast the others are."""
    words = {
        "decode": f"a token for each of {options.batch_size}, {options.tokens:,} in the cache",
        "prefill": f"a prompt of {options.batch_size} x {options.tokens:,} tokens",
        "train": f"an iteration of {options.batch_size} x {options.tokens:,} tokens",
    }
    reduce = 1e6 * machine.link.seconds("all_reduce", 0, 2)
    bus = f", {1e-9 / machine.link.beta:,.0f} GB/s" if machine.link.beta else ""
    said = [
        f"{machine.name}, {mode}: {words[mode]}; memory {machine.memory / 1e9:,.0f} GB/s, products {machine.peak / 1e12:,.0f} "
        f"TFLOP/s, {1e6 * machine.overhead:.0f} us a sub-block, an all-reduce of 2 ranks {reduce:,.0f} us{bus}",
        f"{'':<12}{'parameters':>11}{'ms':>9} at tp" + "".join(f"{f'tp {tp}':>13}" for tp in sizes[1:])
        + f"{'best':>15}{'fewer syncs':>20}{'alpha limit':>13}",
    ]  # fmt: skip
    for line in lines:
        if not line["ways"]:
            size = f"no room: at least {line['least_bytes'] / 1e9:,.1f} GB a rank"
            said.append(f"{line['model']:<12}{line['parameters'] / 1e6:>10,.0f}M   {size}")
            continue
        best, cells = line["best"], ""
        first = next(way for way in line["ways"] if way["fits"] and way["tp"] == line["base_tp"])
        for tp in sizes[1:]:
            of = [way for way in line["ways"] if way["tp"] == tp and way["strategy"] not in WITHOUT]
            way = max((way for way in of if way["fits"]), key=lambda way: way["speedup"], default=None)
            text = f"{way['speedup']:.2f}x {way['share']:>4.0%}" if way else "no room" if of else "no split"
            cells += f"{text:>13}"
        fewer, limits = line.get("fewer"), list(line.get("alpha_limit_us", {}).values())
        extra = f"{fewer['speedup']:.2f}x {fewer['strategy']} {fewer['tp']}" if fewer else "-"
        limit = "-" if not limits else "never" if limits[0] is None else f"{limits[0]:,.1f} us"
        layout = f"tp {best['tp']} {best['strategy']}"
        said.append(
            f"{line['model']:<12}{line['parameters'] / 1e6:>10,.0f}M{1e3 * first['seconds']:>9,.2f}{line['base_tp']:>6}{cells}"
            f"{layout:>15}{extra:>20}{limit:>13}"
        )
    pays = []
    for tp, config in smallest.items():
        size = "at no size" if config is None else f"from {Partition.of(config, 1).count() / 1e6:,.0f}M parameters on"
        pays.append(f"tp {tp} {size}")
    return said + [f"faster than one device: {'; '.join(pays)} (128 channels a head, as many layers as heads)", ""]


def plot(path: str, figures: list[dict[str, Any]]) -> None:
    """Speed-up over the first layout that fits, against tp: a panel for each mode and model, a line for each hardware."""
    plt = report.pyplot()
    modes = list(dict.fromkeys(figure["mode"] for figure in figures))
    models = [line["model"] for line in figures[0]["lines"]]
    figure, planes = plt.subplots(
        len(modes), len(models), figsize=(2.9 * len(models) + 0.6, 2.9 * len(modes) + 0.9), squeeze=False, sharey="row"
    )
    names = list(dict.fromkeys(figure["hardware"]["name"] for figure in figures))
    for found in figures:
        for column, line in enumerate(found["lines"]):
            plane = planes[modes.index(found["mode"])][column]
            if not line["ways"]:
                continue
            best: dict[int, float] = {}
            for way in line["ways"]:
                if way["fits"] and way["strategy"] not in WITHOUT:
                    best[way["tp"]] = max(best.get(way["tp"], 0.0), way["speedup"])
            colour = f"C{names.index(found['hardware']['name'])}"
            plane.plot(list(best), list(best.values()), marker="o", markersize=4, color=colour)
            ticks = sorted({way["tp"] for way in line["ways"]})
            plane.set_xscale("log", base=2)
            plane.set_xticks(ticks, [str(tp) for tp in ticks])
            plane.axhline(1, color="#888888", linewidth=0.8)
            plane.set_title(f"{line['model']}, {found['mode']}", fontsize=9)
            plane.grid(alpha=0.25)
    for row in planes:
        row[0].set_ylabel("times as fast (predicted)")  # as the smallest layout that fits
    for plane in planes[-1]:
        plane.set_xlabel("tp")
    handles = [plt.Line2D([], [], color=f"C{i}", marker="o", markersize=4, label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, ncol=min(6, len(names)), loc="lower center", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07 if len(modes) == 1 else 0.04, 1, 1))
    report.write_figure(path, figure)

"""Rounds of nanoTP and its contestants: their clockwork, figures, tables and plots.

A round is one turn of nanoTP and one of each contestant; ratios are taken within rounds, between neighbours in time. While
one runs the others wait without using a core. Figures are medians over the rounds, with the least and the most.
"""

import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from base.errors import UserError
from bench.contestants import Contestant
from cli.options import BenchOptions
from report import report
from world.devices import pick_dtype
from world.mesh import World


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: list[float], form: str = ",.1f") -> str:
    s = spread(values)
    return f"{s['median']:{form}} ({s['min']:{form}} to {s['max']:{form}})"


def machine() -> dict[str, Any]:
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    found: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "torch": torch.__version__}
    found["python"] = platform.python_version()
    if torch.cuda.is_available():
        found["gpus"] = list(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return found


class Bench:
    """Rounds of nanoTP and its contestants; rank 0 alone has contestants, and speaks."""

    def __init__(self, world: World, options: BenchOptions, known: tuple[str, ...], own: tuple[str, ...] = ()):
        """known: contestants that there are; own: those of `against` that these ranks are themselves."""
        self.world, self.options, self.own = world, options, own
        self.names = [name for name in options.against.split(",") if name]
        for name in self.names:
            if name not in known + own:
                raise UserError(f"--against={name} is not one of {', '.join(known + own)}.")
        if world.is_main:
            report.check_place(options.report, "report")
            report.check_place(options.plot, "plot")
        if options.plot and world.is_main:
            report.pyplot()
        self.threads = world.size * torch.get_num_threads()

    @contextmanager
    def contestants(self, job: dict[str, Any]) -> Iterator[list[Contestant]]:
        """The contestants, loaded; on the other ranks none."""
        with ExitStack() as stack:
            found = []
            for name in self.names if self.world.is_main else []:
                if name in self.own:
                    continue
                contestant = Contestant({"kind": name, "threads": self.threads, **self.place(), **job})
                stack.callback(contestant.close)
                found.append(contestant)
            self.world.barrier()
            yield found

    def place(self) -> dict[str, str]:
        """Where contestants compute: on a GPU in the run's precision, on a CPU in float32."""
        device = self.world.device
        half = device.type == "cuda" and pick_dtype(self.options.dtype, device) != torch.float32
        dtype = str(pick_dtype(self.options.dtype, device))[6:] if half else "float32"
        return {"device": str(device), "dtype": dtype}

    def rounds(
        self, ours: Callable[[], dict[str, Any]], contestants: list[Contestant], **others: Callable[[], dict[str, Any]]
    ) -> list[dict[str, dict[str, Any]]]:
        """For each round what each of the parties answered; the others than rank 0 get nanoTP's alone. others: what these
        ranks do in another way, beside `ours`."""
        made = []
        show = self.world.is_main and sys.stderr.isatty()
        for _ in tqdm(range(self.options.repeats), desc="bench", unit="round", disable=not show):
            self.world.barrier()
            turn = {"nanotp": ours()} | {name: other() for name, other in others.items()}
            for contestant in contestants:
                turn[contestant.kind] = contestant.round()
            self.world.barrier()  # gloo's: those who wait here sleep
            made.append(turn)
        return made

    def finish(self, what: str, figures: dict[str, Any], lines: list[str]) -> None:
        if not self.world.is_main:
            return
        print("\n".join(lines))
        if self.options.report:
            sizes = {"world_size": self.world.size, "tp": self.world.tp.size, "dp": self.world.dp.size}
            world = {**sizes, "comm": self.world.comm, "device": self.world.device.type}
            made = {"entry": "bench_tp", "what": what, **world, "machine": machine(), "command": sys.argv, **figures}
            report.write(self.options.report, made)


def compare(rounds: list[dict[str, dict[str, Any]]], unit: str, per_round: float) -> tuple[dict[str, Any], list[str]]:
    """Rates of all parties (per_round / seconds), and within each round nanoTP's over each contestant's."""
    rates = {name: [per_round / turn[name]["seconds"] for turn in rounds] for name in rounds[0]}
    figures: dict[str, Any] = {name: {unit: spread(values), "rounds": values} for name, values in rates.items()}
    lines = [f"{'':<14} {unit:>28} {'nanoTP is so many times as fast':>34}"]
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["nanotp"], values, strict=True)]
        figures[name]["ratio"] = spread(ratios)
        lines.append(f"{name:<14} {shown(values):>28} {'' if name == 'nanotp' else shown(ratios, '.2f'):>34}")
    return figures, lines


def plot_bars(path: str, title: str, unit: str, figures: dict[str, Any]) -> None:
    """A bar for each party, with the spread of its rounds."""
    plt = report.pyplot()
    names = list(figures)
    middles = [figures[name][unit]["median"] for name in names]
    low = [figures[name][unit]["median"] - figures[name][unit]["min"] for name in names]
    high = [figures[name][unit]["max"] - figures[name][unit]["median"] for name in names]
    figure, axes = plt.subplots(figsize=(7, 0.7 * len(names) + 1.4))
    bars = axes.barh(names, middles, xerr=[low, high], color=["#c44e52" if n == "nanotp" else "#8c9bb0" for n in names])
    axes.bar_label(bars, [f"{m:,.1f}" for m in middles], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel=unit, title=title)
    figure.tight_layout()
    report.write_figure(path, figure)

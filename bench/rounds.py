"""Rounds of nanoTP and its contestants: their order, their figures and the tables that are printed.

In a round nanoTP runs once, then each contestant. Ratios are taken within a round, between
neighbours in time. While one runs the others wait without using a core. Figures are medians over
the rounds, with the smallest and the largest.
"""

import difflib
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
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

Round = dict[str, dict[str, Any]]  # the figures of each party, by its name
Once = Callable[[], dict[str, Any]]  # measures once


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: list[float], form: str = ",.1f") -> str:
    s = spread(values)
    return f"{s['median']:{form}} ({s['min']:{form}} to {s['max']:{form}})"


def column(rounds: list[Round], key: str, scale: float = 1.0) -> list[float]:
    """A figure of nanoTP in each round."""
    return [scale * turn["nanotp"][key] for turn in rounds]


def table(rows: list[list[str]], names: int = 1) -> list[str]:
    """The lines of a table with a head. The first `names` columns are aligned to the left."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = " ".join(map(str.ljust, row[:names], widths))
        right = (cell.rjust(n + 2) for cell, n in zip(row[names:], widths[names:], strict=True))
        lines.append((left + "".join(right)).rstrip())
    return lines


def numbers(text: str, option: str, what: str = "sizes") -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--{option}={text} are not {what} with commas between.") from None


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


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    gpus = list(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return {"cpu": model[1].strip() if model else platform.processor(), "cores": os.cpu_count(),
            "torch": torch.__version__, "python": platform.python_version(),
            **({"gpus": gpus} if gpus else {})}


class Bench:
    """A measurement in rounds. Only rank 0 has contestants, prints and writes the report."""

    def __init__(self, world: World, options: BenchOptions, known: tuple[str, ...] = ()):
        """known: the names that --against may have."""
        self.world, self.options = world, options
        self.names = chosen(options.against, known, "against") if options.against else []
        if world.is_main:
            report.check_place(options.report, "report")

    def place(self) -> dict[str, str]:
        """Where contestants compute: on a GPU in the run's precision, on a CPU in float32."""
        device = self.world.device
        dtype = pick_dtype(self.options.dtype, device) if device.type == "cuda" else torch.float32
        return {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}

    def against(self, ours: Once, job: dict[str, Any], **own: Once) -> list[Round]:
        """Rounds of `ours` and all of --against: contestants that do the job, and `own`, which
        these ranks run themselves."""
        job = {"threads": self.world.size * torch.get_num_threads(), **self.place(), **job}
        others = [name for name in self.names if name not in own and self.world.is_main]
        own = {name: run for name, run in own.items() if name in self.names}
        with ExitStack() as stack:
            contestants = [stack.enter_context(closing(Contestant({"kind": name, **job})))
                           for name in others]
            self.world.barrier()
            return self.rounds(ours, contestants, **own)

    def rounds(self, ours: Once, contestants: list[Contestant], **own: Once) -> list[Round]:
        """The contestants' figures are on rank 0 only."""
        made, show = [], self.world.is_main and sys.stderr.isatty()
        for _ in tqdm(range(self.options.repeats), desc="bench", unit="round", disable=not show):
            self.world.barrier()
            turn = {"nanotp": ours()} | {name: run() for name, run in own.items()}
            turn |= {contestant.kind: contestant.round() for contestant in contestants}
            self.world.barrier()  # gloo's: a rank that waits in it sleeps
            made.append(turn)
        return made

    def finish(self, what: str, figures: dict[str, Any], lines: list[str]) -> None:
        if self.world.is_main:
            print("\n".join(lines))
            report.write(self.options.report, {
                "entry": "bench_tp", "what": what, **report.where(self.world), "machine": machine(),
                "command": sys.argv, **figures})


def compare(rounds: list[Round], unit: str, amount: float) -> tuple[dict[str, Any], list[str]]:
    """The rates of all parties, amount / seconds, and in each round nanoTP's rate over theirs."""
    rates = {name: [amount / turn[name]["seconds"] for turn in rounds] for name in rounds[0]}
    figures, rows = {}, [["", unit, "nanoTP is so many times as fast"]]
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["nanotp"], values, strict=True)]
        figures[name] = {unit: spread(values), "rounds": values, "ratio": spread(ratios)}
        rows.append([name, shown(values), "" if name == "nanotp" else shown(ratios, ".2f")])
    return figures, table(rows)


def collectives(rounds: list[Round], of: str, unit: str) -> str:
    """of: the time that shares are of; unit: what calls and bytes are counted in."""
    first, share = rounds[0]["nanotp"], shown(column(rounds, "share"), ".1%")
    counted = f"{first['calls']:.{int(unit != '')}f} calls and {first['bytes']:,.0f} bytes{unit}"
    return f"in collectives (rank 0's clock): {share} of {of}; {counted}"

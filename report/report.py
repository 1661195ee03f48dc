"""The account and the figures of a run, as JSON, as a page and as a table."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError, printable
from base.files import json_of, read_json, read_small, replacing
from model import GPTConfig
from parallel.ledger import Account, Tally, as_json
from parallel.quantized import quantization, weight_bytes
from plan.partition import Partition
from plan.stages import Stages
from report.page import page, record
from report.sections import account_rows, entries
from tp_model import TensorParallelGPT
from world.mesh import World

PAGES = (".html", ".htm")  # endings of the files that --report writes a page into


def check_place(path: str, option: str) -> None:
    """Before a run: UserError if the file that --`option` names cannot be written."""
    if not path:
        return
    place = Path(path).resolve()
    if place.is_dir():
        raise UserError(f"--{option}={path} is a directory: name a file in it.")
    if not place.parent.is_dir():
        raise UserError(f"--{option}={path}: the directory {place.parent} does not exist.")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise UserError(f"--{option}={path} cannot be written: permission denied.")


def peak_bytes(device: torch.device) -> int:
    """The most memory this rank has held: torch's on a GPU, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def where(world: World) -> dict[str, Any]:
    """Of every run's report: who computed."""
    return {"world_size": world.size, "tp": world.tp.size, "pp": world.pp.size,
            "dp": world.dp.size, "comm": world.over, "device": world.device.type}


def model_of(config: GPTConfig, split: Partition, stages: Stages) -> dict[str, Any]:
    """Of a report: the model's sizes, and the parameters of each rank of a pipeline."""
    names = [[name for name in split.table if stages.owner(name) == rank]
             for rank in range(stages.pp)]
    return {**config.as_json(), "parameters": split.count(), "parameters_per_rank": [
        split.count(rank, own) for own in names for rank in range(split.tp)]}


def build(entry: str, world: World, model: TensorParallelGPT, account: Account,
          timing: dict[str, float], seconds: float, kv_cache_bytes: int = 0, **more: Any,
          ) -> dict[str, Any]:
    """The report of a run. Every rank calls it and gets the same.

    account: of the run, on this rank; with stages the report has the sum over those of a pipeline.
    seconds: the time that it took, collectives and all else.
    """
    mine = (weight_bytes(model), kv_cache_bytes, peak_bytes(world.device), account)
    weights, caches, peaks, accounts = map(list, zip(*world.gather(mine), strict=True))
    stages = world.pp.size
    if stages > 1:
        account = {}
        for theirs in accounts[: stages * world.tp.size : world.tp.size]:
            for line, tally in theirs.items():
                account.setdefault(line, Tally()).add(tally)
    comm = as_json(account, model.config.n_layer)
    if world.ledger.replayed.calls:
        comm["in_graphs"] = world.ledger.replayed.as_json()
    fraction = comm["total"]["seconds"] / seconds / stages if seconds else 0.0
    comm["total"]["fraction_of_time"] = round(fraction, 6)
    return {
        "entry": entry, **where(world), "dtype": str(model.dtype)[6:],
        "quantize": quantization(model), "sync": str(model.schedule),
        "model": model_of(model.config, model.split, model.stages),
        "memory": {"weight_bytes_per_rank": weights, "kv_cache_bytes_per_rank": caches,
                   "peak_bytes_per_rank": peaks},
        "timing": {key: round(value, 6) for key, value in timing.items()},
        "comm_account": {"forward_passes": world.ledger.forward_passes, **comm},
        **more}


def write(path: str, report: dict[str, Any]) -> None:
    """Write a page if the file's name ends in .html, else JSON; nothing if path is ""."""
    if not path:
        return
    is_page = Path(path).suffix.lower() in PAGES
    text = page(report) if is_page else json.dumps(report, indent=1) + "\n"
    try:
        with replacing(Path(path)) as file:
            file.write(text.encode())
    except UserError as error:
        reason = str(error).rpartition(": ")[2]
        raise UserError(f"--report={path} cannot be written: {reason}.") from error


def read(path: Path) -> Any:
    """Read what `write` wrote. UserError if the file is no JSON, or no page that carries some."""
    if path.suffix.lower() not in PAGES:
        return read_json(path)
    try:
        return json_of(record(read_small(path).decode()).encode())
    except (ValueError, RecursionError) as error:
        reason = printable(str(error), 80)
        raise UserError(f"{path} is no page of a report ({reason}).") from None


def account_table(report: dict[str, Any]) -> str:
    """The account as a table: each layer's attention and MLP, the rest, the sum."""
    account = report["comm_account"]
    weights = f", {report['quantize']} weights" if report["quantize"] else ""
    sync = "" if report["sync"] == "all" else f"; sync points: {report['sync']}"
    stages = f" x pp {report['pp']}" if report.get("pp", 1) > 1 else ""
    title = (f"{report['entry']}: world {report['world_size']} = dp {report['dp']}{stages} x tp "
             f"{report['tp']}, {report['comm']}, {report['device']}, {report['dtype']}{weights}; "
             f"{account['forward_passes']} forward passes{sync}")
    if report["world_size"] == 1:
        return f"{title}\none rank: nothing is communicated"

    lines = account_rows(entries(report), 3)
    lines[-1] |= {"layer": "sum", "block": ""}
    wide = max(11, *(len(line["collective"]) for line in lines))
    form = (f"{{layer:>5}}  {{block:<13}} {{pass:<9}} {{collective:<{wide}}} {{calls:>8}} "
            "{bytes:>14} {seconds:>9}")
    table = [form.format(**line) for line in ({head: head for head in lines[0]}, *lines)]
    table.append(f"{account['total']['fraction_of_time']:.1%} of the time was spent in collectives "
                 f"({'rank 0' if not stages else 'a rank'}'s clock)")
    late = [tally for tally in entries(report).values() if tally.in_flight]
    if late:
        calls, flown, waited = (sum(getattr(tally, name) for tally in late)
                                for name in ("calls", "in_flight", "seconds"))
        table.append(f"{calls:,} sums were in flight while the ranks computed, for {flown:.3f} s; "
                     f"the ranks waited for {waited:.3f} s of that")
    if graphs := account.get("in_graphs"):
        table.append(f"{graphs['calls']:,} of the calls were in CUDA graphs, where no clock runs: "
                     f"their {graphs['seconds']:.3f} s are those of the same messages alone, timed "
                     "once")
    return "\n".join([title, *table])

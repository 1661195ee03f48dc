"""The account and the figures of a run, as JSON, as a page and as a table."""

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError, printable
from base.files import json_of, read_json, read_small, replacing
from parallel.ledger import Account, as_json
from parallel.quantized import quantization, weight_bytes
from report.account import told
from report.page import page, record
from tp_model import TensorParallelGPT
from world.mesh import World

PAGES = (".html", ".htm")  # endings of the files that --report writes a page into


def check_place(path: str, option: str) -> None:
    """Said before the run, not after it: UserError where the file that --`option` names cannot be written."""
    if not path:
        return
    place = Path(path).resolve()
    if place.is_dir():
        raise UserError(f"--{option}={path} is a directory: name a file in it.")
    if not place.parent.is_dir():
        raise UserError(f"--{option}={path}: the directory {place.parent} does not exist.")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise UserError(f"--{option}={path} cannot be written: permission denied.")


def pyplot() -> Any:
    """What draws into files. UserError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def peak_bytes(device: torch.device) -> int:
    """The most memory this rank has held: on a GPU what torch allocated there, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build(
    entry: str,
    world: World,
    model: TensorParallelGPT,
    account: Account,
    timing: dict[str, float],
    seconds: float,
    kv_cache_bytes: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """The report of a run; every rank calls it, and gets the same.

    account: what this rank's ledger holds of the run. seconds: the time in which it was made; the share of it that rank
    0 spent in collectives is `fraction_of_time`.
    """
    ranks = world.gather((weight_bytes(model), kv_cache_bytes, peak_bytes(world.device)))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    comm = as_json(account, model.config.n_layer)
    if world.ledger.replayed.calls:
        comm["in_graphs"] = world.ledger.replayed.as_json()
    comm["total"]["fraction_of_time"] = round(comm["total"]["seconds"] / seconds, 6) if seconds else 0.0
    return {
        "entry": entry,
        "world_size": world.size,
        "tp": world.tp.size,
        "dp": world.dp.size,
        "comm": world.comm,
        "device": world.device.type,
        "dtype": dtype,
        "quantize": quantization(model),
        "sync": str(model.schedule),
        "model": {
            **asdict(model.config),
            "parameters": model.split.count(),
            "parameters_per_rank": [model.split.count(rank) for rank in range(world.tp.size)],
        },
        "memory": {
            "weight_bytes_per_rank": [rank[0] for rank in ranks],
            "kv_cache_bytes_per_rank": [rank[1] for rank in ranks],
            "peak_bytes_per_rank": [rank[2] for rank in ranks],
        },
        "timing": {key: round(value, 6) for key, value in timing.items()},
        "comm_account": {"forward_passes": world.ledger.forward_passes, **comm},
        **more,
    }


def write(path: str, report: dict[str, Any]) -> None:
    """Into a file: a page where its name ends in .html, else JSON."""
    place = Path(path)
    try:
        text = page(report) if place.suffix.lower() in PAGES else json.dumps(report, indent=1) + "\n"
        with replacing(place) as file:
            file.write(text.encode())
    except UserError as error:
        raise UserError(f"--report={path} cannot be written: {str(error).rpartition(': ')[2]}.") from error


def write_figure(path: str | Path, figure: Any) -> None:
    """What matplotlib has drawn, into a file of the kind that its name says."""
    place = Path(path)
    with replacing(place) as file:
        figure.savefig(file, dpi=120, format=place.suffix[1:] or "png")


def read(path: Path) -> Any:
    """What was written there: JSON, or the record of a page. UserError where it is neither, see base/files.py."""
    if path.suffix.lower() not in PAGES:
        return read_json(path)
    try:
        return json_of(record(read_small(path).decode()).encode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no page of a report ({printable(str(error), 80)}).") from None


def account_table(report: dict[str, Any]) -> str:
    """The account as a table: a line for each layer's attention and MLP, then the rest, then the sum."""
    found = list(told(report["comm_account"]))
    wide = max([11, *(len(line.op) for line in found)])
    precision = f"{report['dtype']}, {report['quantize']} weights" if report["quantize"] else report["dtype"]
    sync = "" if report["sync"] == "all" else f"; sync points: {report['sync']}"
    lines = [
        f"{report['entry']}: world {report['world_size']} = dp {report['dp']} x tp {report['tp']}, {report['comm']}, "
        f"{report['device']}, {precision}; {report['comm_account']['forward_passes']} forward passes{sync}",
        f"{'layer':>5}  {'block':<13} {'pass':<9} {'collective':<{wide}} {'calls':>8} {'bytes':>14} {'seconds':>9}",
    ]
    if report["tp"] * report["dp"] == 1:
        return lines[0] + "\none rank: nothing is communicated"

    for line in found:
        figures = f"{line.calls:>8,} {line.bytes:>14,} {line.seconds:>9.3f}"
        lines.append(f"{line.layer:>5}  {line.block:<13} {line.direction:<9} {line.op:<{wide}} {figures}")
    total = report["comm_account"]["total"]
    lines.append(f"{'sum':>5}  {'':<{24 + wide}} {total['calls']:>8,} {total['bytes']:>14,} {total['seconds']:>9.3f}")
    lines.append(f"{total['fraction_of_time']:.1%} of the time was spent in collectives (rank 0's clock)")
    if graphs := report["comm_account"].get("in_graphs"):
        lines.append(
            f"{graphs['calls']:,} of the calls were in CUDA graphs, where no clock runs: their {graphs['seconds']:.3f} s are "
            "those of the same messages alone, timed once"
        )
    return "\n".join(lines)

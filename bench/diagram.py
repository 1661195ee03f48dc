"""A layer as its ranks see it, and what every strategy says and holds, by formula: nothing runs, one process is enough."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError
from bench.laboratory import line
from bench.strategies import Case, Said, Split, formula, of_part
from cli.options import BenchDiagramOptions, BenchPageOptions
from model import GPTConfig
from plan.memory import Training
from plan.partition import Partition
from plan.schedule import Schedule
from report import report
from report.diagram import fit, layer, lines
from world.devices import pick_dtype
from world.mesh import World


def outline(config: GPTConfig, batch: int, dtype: torch.dtype) -> Case:
    """A layer's case without its numbers: shapes alone."""
    shapes = of_part("layer", Split.sized(config, 1, 0).shapes())
    weights = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    x = torch.empty(batch, config.block_size, config.n_embd, dtype=dtype, device="meta")
    return Case("layer", config, 0, weights, x, x)


def kept(config: GPTConfig, strategy: str, tp: int, batch: int, width: int) -> int:
    """Bytes that rank 0 keeps of a layer for its backward pass; width: bytes of a number in the matrix products."""
    # done naively everything between the two matrix products is there in full, as on one rank
    split = Partition.of(config, 1 if strategy == "naive" else tp)
    sequence = strategy.startswith("sequence")
    whole = Training(
        split=split, dp=1, rows=batch, micro_steps=1, eval_rows=batch, width=width,
        dropout=False, gpu=False, logit_rows=1, sequence_parallel=sequence,
    )  # fmt: skip
    gathered = 2 * (whole.tokens - whole.own_tokens) * config.n_embd * width if strategy == "sequence+kept" else 0
    return whole.kept_by_layer + gathered


NORM, BIAS = ("ln_1.weight", "ln_1.bias"), ("attn.c_proj.bias",)  # the MLP's have the same sizes


def scheduled(case: Case, schedule: Schedule) -> Said:
    """What a rank says under a schedule in all layers: an all-reduce for each run between two sync points, in both passes."""
    one, partial = case.x.numel() * case.x.element_size(), 0
    said: Said = {(way, "all_reduce"): (schedule.points, schedule.points * one) for way in ("forward", "backward")}
    norm, bias = (sum(case.weights[name].numel() for name in names if name in case.weights) for names in (NORM, BIAS))
    for run in schedule.stretches():
        partial += (norm * len(run) + bias * (len(run) - 1)) if len(run) > 1 else 0
    return said | ({("step", "all_reduce"): (1, partial * case.x.element_size())} if partial else {})


def rows(config: GPTConfig, schedule: Schedule, sizes: list[int], batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A line of the report for each strategy at each tp, of one layer; for a schedule the mean over all of them."""
    case, found = outline(config, batch, dtype), []
    for tp in sizes:
        names = [name for name in case.strategies(tp) if tp <= config.block_size or not name.startswith("sequence")]
        for name in names:
            row = line(case, name, tp, formula(case, name, tp))
            found.append(row | {"kept_bytes": kept(config, name, tp, batch, dtype.itemsize)})
        if tp > 1 and str(schedule) not in ("all", "mlp"):  # every layer as megatron's, or as spd's
            row = averaged(line(case, f"--sync={schedule}", tp, scheduled(case, schedule)), config.n_layer)
            found.append(row | {"kept_bytes": kept(config, "spd", tp, batch, dtype.itemsize)})
    return found


def averaged(row: dict[str, Any], layers: int) -> dict[str, Any]:
    """A line that counts a model's layers together, as the mean of one; the sum of partial gradients is one for them all."""
    calls = {way: n if way == "step" else n / layers for way, n in row["calls"].items()}
    told = [one | {key: one[key] / layers for key in ("calls", "bytes")} for one in row["told"]]
    return row | {"calls": calls, "told": told} | {key: row[key] / layers for key in ("bytes_told", "bytes_on_the_wire")}


def table(made: list[dict[str, Any]]) -> list[str]:
    said = [
        f"{'':>3} {'':<16}{'collectives':>14}{'KB a rank':>21}{'MB a rank':>21}",
        f"{'tp':>3} {'strategy':<16}{'forward':>7}{'back':>7}{'told':>11}{'wire':>10}{'weights':>11}{'kept':>10}",
    ]
    for row in made:
        name = row["strategy"] if len(row["strategy"]) < 17 else f"{row['strategy'][:15]}…"
        calls = f"{row['calls']['forward']:>7.3g}{row['calls']['backward']:>7.3g}{'+1' if row['calls']['step'] else '':<2}"
        sizes = f"{row['bytes_told'] / 1e3:>9,.1f}{row['bytes_on_the_wire'] / 1e3:>10,.1f}"
        held = f"{row['weight_bytes'] / 1e6:>11,.2f}{row['kept_bytes'] / 1e6:>10,.2f}"
        said.append(f"{row['tp']:>3} {name:<16}{calls}{sizes}{held}")
    return said + [
        "of one layer, a forward and a backward pass, by formula; told: bytes of a rank's",
        "messages; wire: what it sends of them in rings; weights: of the rank with most;",
        "kept: for the backward pass; +1: one sum of partial gradients for all layers",
    ]


def page(world: World, options: BenchPageOptions) -> None:
    """A report that was kept, written anew."""
    if world.size > 1:
        raise UserError("bench_tp.py page is one process: start it with plain python.")
    report.check_place(options.report, "report")
    if not options.report:
        raise UserError("--report=FILE.html is required: the page to write.")
    kept_one = report.read(Path(options.kept))
    if not isinstance(kept_one, dict):
        raise UserError(f"{options.kept} is no report: --report=FILE of any command writes one.")
    report.write(options.report, kept_one)


def diagram(world: World, options: BenchDiagramOptions) -> None:
    if world.size > 1:
        raise UserError("bench_tp.py diagram is one process: start it with plain python. --tp is what is drawn.")
    report.check_place(options.report, "report")
    try:
        sizes = [int(word) for word in options.tp.split(",")]
    except ValueError:
        raise UserError(f"--tp={options.tp} are not sizes with commas between.") from None
    config = GPTConfig(options.block_size, options.vocab_size, options.n_layer, options.n_head, options.n_embd)
    splits = [Partition.of(config, tp) for tp in sizes]  # or its UserError
    schedule, dtype = Schedule.parse(options.sync, config.n_layer), pick_dtype(options.dtype, world.device)
    if options.sequence_parallel and (not schedule.is_plain or sizes[0] > config.block_size):
        raise UserError(
            f"--sequence_parallel=True needs --sync=all and a token for every rank: --sync={schedule} and "
            f"block_size={config.block_size} on tp={sizes[0]}."
        )
    drawn = layer(splits[0], schedule, options.sequence_parallel)
    made = rows(config, schedule, sizes, options.batch_size, dtype)
    about = f"{options.batch_size} x {options.block_size} tokens, {str(dtype).removeprefix('torch.')}"
    print(fit("\n".join([*lines(drawn), "", f"{about}:", *table(made)]), sys.stdout.encoding))
    if options.report:
        split = splits[0]
        model = {**asdict(config), "parameters": split.count()}
        model["parameters_per_rank"] = [split.count(rank) for rank in range(split.tp)]
        figures = {"entry": "bench_tp", "what": "diagram", "tp": split.tp, "dtype": str(dtype).removeprefix("torch.")}
        figures |= {"sync": str(schedule), "sequence_parallel": drawn.sequence, "batch_size": options.batch_size}
        report.write(options.report, {**figures, "model": model, "lines": made})

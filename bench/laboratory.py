"""A part of a layer under every strategy (strategies.py): its errors, messages, time and memory.

`block` runs it on ranks. `diagram` counts it for any shape, and draws the layer. `allreduce`
measures single messages over every transport.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import Unavailable, UserError
from bench import strategies
from bench.rounds import Bench, numbers, spread, table
from bench.strategies import MISTAKES, Case, Counts, Piece, answers, formula
from cli import options as opt
from model import GPTConfig
from parallel.collectives import Axis, all_reduce
from parallel.ledger import total
from plan.link import ring_bytes
from plan.memory import Training
from plan.partition import Partition
from plan.schedule import Schedule
from plan.stages import Stages
from report import report
from report.diagram import fit, layer, lines
from world.devices import pick_dtype
from world.mesh import World, make_axis, new_axis

WAYS = ("forward", "backward", "step")
WRONG = 0.03  # a relative error that no rounding explains, not even in bfloat16
NOTES = """forward, back: collectives in a pass; +1: one sum of partial gradients, apart
told: KB of a rank's messages; wire: KB that it sends of them in rings
weights: MB of the rank with most; kept: MB for the backward pass, without them"""
TIMED_NOTES = """
error: the largest relative one of output, input gradient and any weight's gradient, against
one rank in double precision (spd: its own equations); ms: both passes, median; in coll.: the
share of them (rank 0's clock)"""


def line(case: Case, strategy: str, tp: int, counts: Counts, **measured: Any) -> dict[str, Any]:
    """A line of the report. weight_bytes: of rank 0, which has most."""
    rules, width = case.rules(tp), case.x.element_size()
    shapes = (rules[name].local_shape(tuple(full.shape), 0) for name, full in case.weights.items())
    passes = {key: value for key, value in counts.items() if key[0] != "step"}
    told = [{"direction": way, "op": op, "calls": n, "bytes": nbytes}
            for (way, op), (n, nbytes) in sorted(counts.items())]
    return {
        "strategy": strategy if tp > 1 or strategy in MISTAKES else "one rank", "tp": tp,
        "calls": {way: sum(n for key, (n, _) in counts.items() if key[0] == way) for way in WAYS},
        "told": told, "bytes_told": sum(nbytes for _, nbytes in passes.values()),
        "bytes_on_the_wire": strategies.wire_bytes(passes, strategy, tp),
        "weight_bytes": width * sum(map(math.prod, shapes)), **measured}


def strategy_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each strategy and tp. A strategy that did not run has no times."""
    timed = any("seconds" in row for row in rows)
    head = [" tp", "strategy", "forward", "back", "KB told", "KB wire", "weights MB", "kept MB"]
    made = [head + ["error", "ms", "in coll."] * timed]
    for row in rows:
        name, calls, kept = row["strategy"], row["calls"], row.get("kept_bytes")
        cells = [f"{row['tp']:>3}", name if len(name) < 17 else f"{name[:15]}…"]
        cells += [f"{calls['forward']:.3g}", f"{calls['backward']:.3g}{'+1' * bool(calls['step'])}"]
        cells += [f"{row[key] / 1e3:,.1f}" for key in ("bytes_told", "bytes_on_the_wire")]
        cells += [f"{row['weight_bytes'] / 1e6:,.2f}", f"{kept / 1e6:,.2f}" if kept else ""]
        if "seconds" in row:
            cells += [f"{row['error']:.1e}", f"{1e3 * row['seconds']['median']:,.2f}"]
            cells.append(f"{row['share_in_collectives']['median']:.1%}")
        made.append(cells + ["", "counted", ""] * (timed and "seconds" not in row))
    return [*table(made, 2), NOTES + TIMED_NOTES * timed]


# --- measured -------------------------------------------------------------------------------------


def timed(world: World, piece: Piece) -> dict[str, Any]:
    """The clock and the account of both passes, and the sum of partial gradients after them."""
    all_reduce(torch.zeros(1, device=world.device), piece.axis, "step")  # ranks begin together
    started, before = time.perf_counter(), world.ledger.snapshot()
    piece.run()
    world.synchronize()
    seconds = time.perf_counter() - started
    share = total(world.ledger.since(before)).seconds / seconds
    piece.sum_partial()
    counts = strategies.summed(world.ledger.since(before))
    return {"seconds": seconds, "share": share, "counts": counts}


def measured(world: World, bench: Bench, case: Case, dense: dict[str, Tensor], tp: int,
             mistake: str) -> Iterator[dict[str, Any]]:
    """The lines of all strategies, or of megatron with and without a mistake, run on the first tp
    ranks while the others wait. They are complete on rank 0."""
    axis = new_axis(world, "tp", [[*range(tp)] or [0]], bench.options.comm_timeout)
    names = ("megatron", mistake) if mistake else case.strategies(tp)
    pieces = {} if axis is None else {name: Piece(case, name, axis, world.device) for name in names}
    right = {name: answers(case, case.split(tp)) if name == "spd" else dense for name in pieces}
    errors = world.gather({name: piece.errors(right[name]) for name, piece in pieces.items()})
    turns = bench.rounds(lambda: {name: timed(world, piece) for name, piece in pieces.items()}, [])
    for name, piece in pieces.items():
        rounds = [turn["nanotp"][name] for turn in turns]
        worst = {key: max(found[name][key] for found in errors[:tp]) for key in errors[0][name]}
        where = max(worst, key=lambda key: worst[key])
        yield line(
            case, name, tp, rounds[0]["counts"], error=worst[where], error_in=where,
            errors={way: worst[way] for way in ("output", "input gradient")},
            seconds=spread([turn["seconds"] for turn in rounds]),
            share_in_collectives=spread([turn["share"] for turn in rounds]),
            kept_bytes=strategies.kept_bytes(piece.body, piece.forward))


def verdict(row: dict[str, Any]) -> str:
    """What a mistake did."""
    outside = ", ".join(f"{way} {error:.1e}" for way, error in row["errors"].items())
    found, most = "right", "at most"
    if row["error"] > WRONG:
        found, most = "wrong", f"most in {row['error_in']}"
    return f"{row['strategy']} at tp={row['tp']} is {found}: {outside}, {most} {row['error']:.1e}"


def block(world: World, options: opt.BenchBlockOptions) -> None:
    bench, T, batch = Bench(world, options), options.block_size, options.batch_size
    sizes, mistake = sorted(set(numbers(options.tp, "tp"))), options.mistake
    if mistake == "qkv" and options.part == "mlp":
        raise UserError("--mistake=qkv: an MLP has no heads. Use --part=attention or --part=layer.")
    config = GPTConfig(T, options.vocab_size, 1, options.n_head, options.n_embd)
    width = options.intermediate or config.n_hidden
    for tp in sizes:
        if tp > T:
            raise UserError(f"block_size={T} is shorter than tp={tp}: "
                            "some ranks would have no token.")
        if tp > width:
            raise UserError(f"tp={tp} is more than intermediate={width}: "
                            "some ranks would hold no column.")
    dtype = pick_dtype(options.dtype, world.device)
    case = Case.draw(options.part, config, batch, options.intermediate, dtype, options.seed)
    dense, rows = answers(case), list[dict[str, Any]]()
    for tp in sizes:
        if tp <= world.size:
            rows += measured(world, bench, case, dense, tp, mistake)
        else:
            names = ("megatron",) if mistake else case.strategies(tp)
            rows += [line(case, name, tp, formula(case, name, tp)) for name in names]
    about = {"n_embd": config.n_embd, "n_head": config.n_head, "intermediate": width,
             "batch_size": batch, "block_size": T}
    said = [f"{case.part}: {', '.join(f'{key}={value}' for key, value in about.items())}; "
            f"{str(dtype)[6:]}, {torch.get_num_threads()} threads a rank, {world.over}"]
    said += strategy_table(rows) + [verdict(row) for row in rows if row["strategy"] in MISTAKES]
    said += [f"{mistake}: {MISTAKES[mistake]}"] if mistake else []
    bench.finish("block", {"part": options.part, **about, "lines": rows}, said)


def allreduce(world: World, options: opt.BenchAllreduceOptions) -> None:
    bench = Bench(world, options)
    if world.size == 1:
        raise UserError("bench_tp.py allreduce needs ranks: "
                        "torchrun --standalone --nproc_per_node=2 bench_tp.py allreduce")
    sizes, axes = numbers(options.sizes, "sizes", "numbers of bytes"), {}
    for comm in ("nccl",) if world.device.type == "cuda" else ("shm", "gloo"):
        try:
            axes[comm] = make_axis("tp", world.groups.get("tp"), comm, world.ledger,
                                   link=world.link)
        except Unavailable as error:
            print(f"{comm}: {error}", file=sys.stderr)
    heads = [head for comm in axes for head in (f"{comm} median", "min", "bus GB/s")]
    found, rows = [], [["bytes", *heads]]
    for nbytes in sizes:
        us = microseconds(world, axes, nbytes, options.repeats)
        found.append({"bytes": nbytes, "us": us})
        rows.append([f"{nbytes:,}"])
        for times in us.values():
            bus = ring_bytes(nbytes, world.size) / times["median"] / 1e3
            rows[-1] += [f"{times['median']:,.1f}", f"{times['min']:,.1f}", f"{bus:.2f}"]
    head = (f"all-reduce over {world.size} ranks of {torch.get_num_threads()} threads, float32; "
            f"microseconds of a call{f'; {world.over}' * bool(world.link)}")
    bench.finish("allreduce", {"sizes": found}, [head, *table(rows, 0)])


def microseconds(world: World, axes: dict[str, Axis], nbytes: int,
                 repeats: int) -> dict[str, dict[str, float]]:
    """The spread of an all-reduce's time over each axis, which take turns."""
    message = torch.randn(max(1, nbytes // 4), device=world.device)
    warm, calls = 3, max(5, min(300, (1 << 24) // nbytes))
    times: dict[str, list[float]] = {comm: [] for comm in axes}
    for _ in range(repeats):
        for comm, axis in axes.items():
            world.barrier()
            for i in range(warm + calls):
                started = time.perf_counter()
                all_reduce(message, axis, "forward")
                world.synchronize()
                times[comm] += [1e6 * (time.perf_counter() - started)] * (i >= warm)
    return {comm: spread(found) for comm, found in times.items()}


# --- counted --------------------------------------------------------------------------------------


def kept(config: GPTConfig, strategy: str, tp: int, batch: int, width: int) -> int:
    """Bytes that rank 0 keeps of a layer for its backward pass. width: bytes of a number."""
    split = Partition.of(config, 1 if strategy == "naive" else tp)  # naive keeps all columns
    training = Training(
        split=split, dp=1, rows=batch, micro_steps=1, eval_rows=batch, width=width, dropout=False,
        gpu=False, logit_rows=1, sequence_parallel=strategy.startswith("sequence"))
    others = training.tokens - training.own_tokens if strategy == "sequence+kept" else 0
    return training.kept_by_layer + 2 * others * config.n_embd * width


def counted(config: GPTConfig, sizes: list[int], batch: int,
            dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A line for each strategy at each tp."""
    case = Case.draw("layer", config, batch, dtype=dtype, device="meta")
    for tp in sizes:
        for name in case.strategies(tp):
            if tp <= config.block_size or not name.startswith("sequence"):
                yield line(case, name, tp, formula(case, name, tp),
                           kept_bytes=kept(config, name, tp, batch, dtype.itemsize))


def diagram(world: World, options: opt.BenchDiagramOptions) -> None:
    one_process(world, "diagram", " --tp is what is drawn.")
    report.check_place(options.report, "report")
    sizes, T, batch = numbers(options.tp, "tp"), options.block_size, options.batch_size
    config = GPTConfig(T, options.vocab_size, options.n_layer, options.n_head, options.n_embd)
    split, *_ = [Partition.of(config, tp) for tp in sizes]  # or its UserError
    schedule = Schedule.parse(options.sync, config.n_layer)
    if options.sequence_parallel and (not schedule.is_plain or sizes[0] > T):
        raise UserError("--sequence_parallel=True needs --sync=all and a token for every rank: "
                        f"--sync={schedule} and block_size={T} on tp={sizes[0]}.")
    dtype = pick_dtype(options.dtype, world.device)
    drawn = layer(split, schedule, options.sequence_parallel)
    rows = list(counted(config, sizes, batch, dtype))
    about = f"a layer's two passes by formula, {batch} x {T} tokens, {str(dtype)[6:]}:"
    said = [*lines(drawn), "", about, *strategy_table(rows)]
    print(fit("\n".join(said), sys.stdout.encoding))
    report.write(options.report, {
        "entry": "bench_tp", "what": "diagram", "tp": split.tp, "dtype": str(dtype)[6:],
        "sync": str(schedule), "sequence_parallel": drawn.sequence, "batch_size": batch,
        "model": report.model_of(config, split, Stages(config.n_layer)), "lines": rows})


def page(world: World, options: opt.BenchPageOptions) -> None:
    """A kept report, written again."""
    one_process(world, "page")
    report.check_place(options.report, "report")
    if not options.report:
        raise UserError("--report=FILE.html is required: the page to write.")
    found = report.read(Path(options.kept))
    if not isinstance(found, dict):
        raise UserError(f"{options.kept} is no report: --report=FILE of any command writes one.")
    report.write(options.report, found)


def one_process(world: World, command: str, note: str = "") -> None:
    if world.size > 1:
        raise UserError(f"bench_tp.py {command} is one process: start it with plain python.{note}")

"""The laboratory: a part of a layer under every strategy (bench/strategies.py), measured: is it right, what do its ranks
say, how long does it take, what does it hold."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from bench.rounds import Bench, plot_bars, spread
from bench.strategies import MISTAKES, Case, Piece, Said, Split, answers, formula, kept_bytes, summed, wire_bytes
from cli.options import BenchBlockOptions
from model import GPTConfig
from parallel.collectives import all_reduce
from parallel.ledger import total
from world.devices import pick_dtype
from world.mesh import World, first_ranks

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")
WAYS = ("forward", "backward", "step")
WRONG = 0.03  # a relative error that no rounding explains, in bfloat16 either


def together(world: World, piece: Piece) -> None:
    """The ranks of the group begin at the same time."""
    all_reduce(torch.zeros(1, device=world.device), piece.axis, "step")


def timed(world: World, piece: Piece) -> dict[str, Any]:
    """A forward and a backward pass with their clock and account, then the sum of what the ranks have in parts."""
    together(world, piece)
    before, started = world.ledger.snapshot(), time.perf_counter()
    piece.run()
    world.synchronize()
    seconds = time.perf_counter() - started
    share = total(world.ledger.since(before)).seconds / seconds
    piece.sum_partial()
    return {"seconds": seconds, "share": share, "said": summed(world.ledger.since(before))}


def products(world: World, piece: Piece) -> tuple[float, float]:
    """Seconds in matrix products in one forward and backward pass, the profiler's self time of torch's operators for them, and
    the share of them in that pass (which the profiler makes slower)."""
    gpu = world.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=kinds) as profile:
        together(world, piece)  # one rank's profiler may take a second longer to start
        started = time.perf_counter()
        piece.run()
        world.synchronize()
        passed = time.perf_counter() - started
    events: list[Any] = [event for event in profile.key_averages() if event.key in PRODUCTS]
    seconds = sum(event.self_device_time_total if gpu else event.self_cpu_time_total for event in events) / 1e6
    return seconds, seconds / passed


def line(case: Case, strategy: str, tp: int, said: Said, **measured: Any) -> dict[str, Any]:
    """A line of the report. weight_bytes: of rank 0, which has the most."""
    shapes = (rule.local_shape(tuple(case.weights[name].shape), 0) for name, rule in case.rules(tp).items())
    calls = {way: sum(n for (direction, _), (n, _) in said.items() if direction == way) for way in WAYS}
    passes = {key: value for key, value in said.items() if key[0] != "step"}  # the sum of partial gradients stands apart
    return {
        "strategy": strategy if tp > 1 or strategy in MISTAKES else "one rank",
        "tp": tp,
        "calls": calls,
        "told": [{"direction": key[0], "op": key[1], "calls": n, "bytes": size} for key, (n, size) in sorted(said.items())],
        "bytes_told": sum(nbytes for _, nbytes in passes.values()),
        "bytes_on_the_wire": wire_bytes(passes, strategy, tp),
        "weight_bytes": case.x.element_size() * sum(math.prod(shape) for shape in shapes),
        **measured,
    }


def measured(
    world: World, bench: Bench, case: Case, dense: dict[str, Tensor], tp: int, mistake: str
) -> list[dict[str, Any]]:
    """The lines of all strategies, or of megatron with and without a mistake, run on the first tp ranks while the others wait;
    rank 0's are to be read."""
    axis = first_ranks(world, tp, bench.options.comm_timeout)
    names = ("megatron", mistake) if mistake else case.strategies(tp)
    pieces = {} if axis is None else {name: Piece(case, name, axis, world.device) for name in names}
    wanted = {name: answers(case, case.split(tp)) if name == "spd" else dense for name in pieces}
    errors = [theirs for theirs in world.gather({name: p.errors(wanted[name]) for name, p in pieces.items()}) if theirs]
    turns = bench.rounds(lambda: {name: timed(world, piece) for name, piece in pieces.items()}, [])
    found = []
    for name, piece in pieces.items():
        rounds = [turn["nanotp"][name] for turn in turns]
        error, where = max((value, where) for theirs in errors for where, value in theirs[name].items())
        columns, rows = piece.linear_errors()
        seconds, share = products(world, piece)
        figures = {
            "error": error,
            "error_in": where,
            "errors": {way: max(theirs[name][way] for theirs in errors) for way in ("output", "input gradient")},
            "seconds": spread([turn["seconds"] for turn in rounds]),
            "share_in_collectives": spread([turn["share"] for turn in rounds]),
            "product_seconds": seconds,
            "share_in_products": share,
            "kept_bytes": kept_bytes(piece.body, piece.forward),
            "columns_error": columns,
            "rows_error": rows,
        }
        found.append(line(case, name, tp, rounds[0]["said"], **figures))
    return found


def table(lines: list[dict[str, Any]]) -> list[str]:
    """One line for each strategy and tp; `counted` where there were no ranks to run it on."""
    said = [
        f"{'tp':>3} {'strategy':<14}{'error':>9}{'calls':>7}{'KB told':>10}{'KB wire':>10}{'ms':>9}{'in coll.':>9}"
        f"{'products ms':>15}{'weights MB':>11}{'kept MB':>9}"
    ]
    for row in lines:
        calls = f"{row['calls']['forward']}/{row['calls']['backward']}" + ("+1" if row["calls"]["step"] else "")
        head = f"{row['tp']:>3} {row['strategy']:<14}"
        sizes = f"{calls:>7}{row['bytes_told'] / 1e3:>10,.1f}{row['bytes_on_the_wire'] / 1e3:>10,.1f}"
        weights = f"{row['weight_bytes'] / 1e6:>11,.2f}"
        if "seconds" in row:
            times = f"{1e3 * row['seconds']['median']:>9,.2f}{row['share_in_collectives']['median']:>9.1%}"
            times += f"{1e3 * row['product_seconds']:>10,.2f}{row['share_in_products']:>5.0%}"
            times += f"{weights}{row['kept_bytes'] / 1e6:>9,.2f}"
            said.append(f"{head}{row['error']:>9.1e}{sizes}{times}")
        else:
            said.append(f"{head}{'':>9}{sizes}{'counted':>9}{'':>24}{weights}")
    return said + [
        "error: the largest relative one of output, input gradient and any weight's gradient, against one rank in double",
        "precision (spd: its own equations); calls: collectives forward/backward, +1 the sum of partial gradients, apart;",
        "told: bytes of one rank's messages; wire: what a rank sends of them in rings; ms: forward and backward, median;",
        "in coll.: share of that inside collectives (rank 0's clock); products: the profiler's self time of mm, addmm and bmm",
        "in one pass under it, and the share of that pass; weights: of one rank; kept: for the backward pass, without weights",
    ]


def words(case: Case, lines: list[dict[str, Any]]) -> list[str]:
    """What the lines say, in words."""
    said, size = [], case.config.n_head
    ran = [row for row in lines if "seconds" in row and row["strategy"] == "megatron"]
    if ran:
        columns, rows = max(row["columns_error"] for row in ran), max(row["rows_error"] for row in ran)
        said.append(f"the ranks' columns, side by side, are the full column layer's output (relative error {columns:.1e})")
        said.append(f"the ranks' addends add up to the full row layer's output (relative error {rows:.1e})")
    name = {"layer": "layer", "mlp": "MLP", "attention": "attention block"}[case.part]
    for row in lines:
        if row["strategy"] in ("one rank", "megatron"):
            calls = row["calls"]
            said.append(
                f"one {name} of {size} heads at tp={row['tp']}, megatron: {calls['forward']} all-reduces forward and "
                f"{calls['backward']} backward" + ("" if "seconds" in row else " (counted)")
            )
    for row in lines:
        if row["strategy"] in MISTAKES:
            outside = [f"{way} {error:.1e}" for way, error in row["errors"].items()]
            wrong = row["error"] > WRONG
            verdict, most = ("wrong", f"most in {row['error_in']}") if wrong else ("right", "at most")
            said.append(f"{row['strategy']} at tp={row['tp']} is {verdict}: {', '.join(outside)}, {most} {row['error']:.1e}")
    said += [f"{name}: {MISTAKES[name]}" for name in dict.fromkeys(row["strategy"] for row in lines) if name in MISTAKES]
    for row in lines:
        if "seconds" in row and row["tp"] > 1 and row["strategy"] not in MISTAKES:
            share = row["share_in_collectives"]
            said.append(
                f"communication at tp={row['tp']}, {row['strategy']}: {share['median']:.1%} of the time "
                f"({share['min']:.1%} to {share['max']:.1%})"
            )
    return said


def block(world: World, options: BenchBlockOptions) -> None:
    bench = Bench(world, options, ())
    try:
        sizes = sorted({int(word) for word in options.tp.split(",")})
    except ValueError:
        raise UserError(f"--tp={options.tp} are not sizes with commas between.") from None
    if options.mistake == "qkv" and options.part == "mlp":
        raise UserError("--mistake=qkv: an MLP has no heads. Use --part=attention or --part=layer.")
    config = GPTConfig(options.block_size, options.vocab_size, 1, options.n_head, options.n_embd)
    for tp in sizes:
        width = Split.sized(config, tp, options.intermediate).n_hidden  # or its UserError
        if tp > options.block_size:
            raise UserError(f"block_size={options.block_size} is shorter than tp={tp}: some ranks would have no token.")
        if tp > width:
            raise UserError(f"tp={tp} is more than intermediate={width}: some ranks would hold no column.")
    dtype = pick_dtype(options.dtype, world.device)
    case = Case.draw(options.part, config, options.batch_size, options.intermediate, dtype, options.seed)
    dense = answers(case)
    lines = []
    for tp in sizes:
        if tp <= world.size:
            lines += measured(world, bench, case, dense, tp, options.mistake)
        else:
            names = ("megatron",) if options.mistake else case.strategies(tp)
            lines += [line(case, name, tp, formula(case, name, tp)) for name in names]
    about = {"n_embd": config.n_embd, "n_head": config.n_head, "intermediate": case.split(1).n_hidden}
    about |= {"batch_size": options.batch_size, "block_size": options.block_size}
    head = f"{options.part}: " + ", ".join(f"{name}={value}" for name, value in about.items())
    head += f"; {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads a rank, {world.comm}"
    if world.is_main and options.plot:
        ran = {f"{row['strategy']}, tp={row['tp']}": row["seconds"] for row in lines if "seconds" in row}
        tokens = f"{options.batch_size} x {options.block_size} tokens"
        title = f"{options.part}, {config.n_embd} wide, {tokens}: forward and backward"
        plot_bars(options.plot, title, "ms", {name: {"ms": {k: 1e3 * v for k, v in s.items()}} for name, s in ran.items()})
    bench.finish("block", {"part": options.part, **about, "lines": lines}, [head, *table(lines), *words(case, lines)])

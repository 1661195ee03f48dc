"""Memory that training takes on each rank, in the run's layout and in others; nothing is started.

    python train_tp.py configs/train_gpt2.py --dry_run=True --ranks=8 --device=cuda --memory=80GB
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError
from checkpoints.sources import Source, open_sizes
from cli.options import TrainOptions
from model import GPTConfig, adamw
from parallel.collectives import Axis
from parallel.loss import chunk_rows
from plan.memory import Training
from plan.partition import Partition
from report import report
from text.dataset import Dataset, is_prepared
from tp_model import TensorParallelGPT
from train.checkpoint import read_state
from train.setup import Rows, make_config, pick_schedule
from world.launch import Launch
from world.mesh import sizes

UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
FITS, DOES_NOT_FIT = 0, 1  # exit statuses
# the columns of the table, and their widths
COLUMNS = {
    "parameters": 12, "gradients": 11, "optimizer": 11, "activations": 13, "temporary": 11,
    "kv_cache": 10, "peak": 10,
}  # fmt: skip
SHORT = {"dp_shard": "shard", "sequence_parallel": "seq", "activation_checkpointing": "ckpt"}
# An estimate of what a process holds on a GPU before torch allocates there: CUDA's context and
# kernels, cuBLAS's workspace, NCCL's buffers. On a CPU it is measured, see process_bytes.
GPU_BASE = 10**9


def sizes_of(options: TrainOptions) -> tuple[GPTConfig, Source | None]:
    """The model's sizes, and its weights' description if there are any. Reads no tensors."""
    source: Source | None = None
    if options.init_from == "resume":
        source = open_sizes(str(read_state(Path(options.out_dir))[0]))
    elif options.init_from != "scratch":
        source = open_sizes(options.init_from)
    place = Path(options.data_dir) / options.dataset
    dataset = Dataset(place) if is_prepared(place) else None
    return make_config(options, dataset, source), source


def training(
    options: TrainOptions, config: GPTConfig, source: Source | None, ranks: int
) -> Training:
    """The run's plan. UserError if its layout is impossible on so many ranks."""
    dp, tp = sizes(ranks, options.tp, "train_tp.py")
    split, size = Partition.of(config, tp), config.block_size
    sequence_parallel = options.sequence_parallel and tp > 1
    if tp > 1:
        schedule = pick_schedule(options, config, source, tp)
        if sequence_parallel and (tp > size or not schedule.is_plain):
            raise UserError(
                "--sequence_parallel=True needs --sync=all and a token for every rank: "
                f"--sync={schedule} and block_size={size} on tp={tp}."
            )
    rows, auto = Rows.of(options, 0, dp), torch.cuda.is_available()
    gpu = options.device.startswith("cuda") or options.device == "auto" and auto
    half = options.dtype in ("bfloat16", "float16") or options.dtype == "auto" and gpu
    tokens = rows.micro_rows * size
    return Training(
        split=split, dp=dp, rows=rows.micro_rows, micro_steps=rows.micro_steps,
        eval_rows=options.batch_size, width=2 if half else 4, dropout=config.dropout > 0, gpu=gpu,
        logit_rows=chunk_rows(tokens, split.local_vocab, "cuda" if gpu else "cpu"),
        dp_shard=options.dp_shard and dp > 1, sequence_parallel=sequence_parallel,
        activation_checkpointing=options.activation_checkpointing,
    )  # fmt: skip


def need(options: TrainOptions, ranks: int) -> str:
    """A note for a run that is out of memory: what it takes, and what the GPU has."""
    plan = training(options, *sizes_of(options), ranks)
    takes = f"takes {(plan.peak + GPU_BASE * plan.gpu) / 1e9:.1f} GB a rank"
    if plan.gpu:
        has = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        takes += f", its GPU has {has / 1e9:.1f} GB"
    else:
        takes += " beside Python and torch"
    return f"By the dry run it {takes}: --dry_run=True shows layouts that take less."


def show(options: TrainOptions) -> int:
    """Print the table on rank 0; returns the exit status: FITS if the run's own layout does.

    UserError if the run's own layout is impossible or --memory is no amount.
    """
    (config, source), launch = sizes_of(options), Launch.from_environment()
    report.check_place(options.report, "report")
    limit = amount(options.memory) if options.memory else 0
    ranks = options.ranks or launch.size
    own = training(options, config, source, ranks)
    plans = {own: None}  # a set in order
    for layout in layouts(options, ranks):
        with contextlib.suppress(UserError):
            plans[training(layout, config, source, ranks)] = None
    base = GPU_BASE if own.gpu else process_bytes()
    found = [row(plan, base) for plan in plans]
    if launch.rank == 0:
        print("\n".join(table(options, config, found, own, limit)), flush=True)
        if options.report:
            model = {**asdict(config), "parameters": own.split.count()}
            about = {"entry": "train_tp", "dry_run": True, "ranks": ranks, "model": model}
            report.write(options.report, {**about, "layouts": found})
    return DOES_NOT_FIT if limit and found[0]["peak"] > limit else FITS


def process_bytes() -> int:
    """Bytes that a rank's process takes besides the model: the peak of this process, after a tiny
    model is trained, because torch imports and sets up much on first use."""
    sizes = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)
    model = TensorParallelGPT(sizes, Axis("tp"))
    optimizer = adamw(model.named_parameters(), 0.1, 1e-3, (0.9, 0.95), "cpu")
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    _, loss = model(tokens, tokens)
    if loss is not None:
        loss.backward()
    optimizer.step()
    return report.peak_bytes(torch.device("cpu"))


def layouts(options: TrainOptions, ranks: int) -> Iterator[TrainOptions]:
    """The options of every layout of so many ranks, some of them twice."""
    for tp in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for values in product((False, True), repeat=len(SHORT)):
            savings: dict[str, Any] = dict(zip(SHORT, values, strict=True))
            yield replace(options, tp=tp, **savings)


def row(plan: Training, base: int) -> dict[str, Any]:
    """A layout's figures in bytes. live: the most that tensors take at a time, at the moment `at`.
    peak: of the rank, the process (`base`) included."""
    live, at = plan.live()
    figures = {"tp": plan.split.tp, "dp": plan.dp}
    figures |= {name: getattr(plan, name) for name in (*SHORT, "rows", "micro_steps", *COLUMNS)}
    return figures | {"live": live, "at": at, "base": base, "peak": base + plan.peak}


# --- what is printed ----------------------------------------------------------------------------


def table(
    options: TrainOptions, config: GPTConfig, found: list[dict[str, Any]], own: Training, limit: int
) -> list[str]:
    """The lines of a dry run. found: the run's own layout first, which is marked by a >."""
    asked, base = found[0], found[0]["base"]
    unit, scale = ("GB", 1e9) if asked["peak"] >= 1e9 else ("MB", 1e6)
    peak = "the sum (what is freed is kept, unless sharded)"
    if own.gpu:
        peak = "the worst moment (activations go as gradients come)"
    heads = "".join(f"{name.replace('kv_', 'KV '):>{wide}}" for name, wide in COLUMNS.items())
    lines = [
        f"{own.split.count():,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} wide, vocabulary {config.vocab_size:,}; {config.block_size} tokens a "
        f"sequence; {'GPU' if own.gpu else 'CPU'}, products in "
        f"{'half precision' if own.width == 2 else 'float32'}",
        f"{unit} on the rank that has most; peak is {peak} "
        f"and the process, {base / 1e9:.2f} GB{', reckoned' if own.gpu else ''}",
        "shard: --dp_shard, seq: --sequence_parallel, ckpt: --activation_checkpointing. "
        "KV cache: a sequence, sampling.",
        f"{'tp':>5}{'dp':>4}  {'options':<15}{'rows x steps':>12}{heads}" + "  fits" * bool(limit),
    ]
    for line in sorted(found, key=lambda line: (line["tp"], [line[name] for name in SHORT])):
        words = " ".join(short for name, short in SHORT.items() if line[name])
        shown = "".join(f"{line[name] / scale:>{wide},.2f}" for name, wide in COLUMNS.items())
        fits = "" if not limit else "   yes" if line["peak"] <= limit else "    no"
        start = f"{'>' if line is asked else ' ':<2}{line['tp']:>3}{line['dp']:>4}  {words:<15}"
        steps = f"{line['rows']} x {line['micro_steps']}"
        lines.append(f"{start}{steps:>12}{shown}{fits}")
    return [*lines, verdict(options, found, limit)]


def verdict(options: TrainOptions, found: list[dict[str, Any]], limit: int) -> str:
    """Says whether the run as asked for fits and, if not, which layout does."""
    need = f"the run as asked for (>) takes {found[0]['peak'] / 1e9:.2f} GB a rank"
    if not limit:
        return f"{need}; --memory=80GB would say whether that fits."
    if found[0]["peak"] <= limit:
        return f"{need}: it fits {options.memory}."
    need = f"{need}: it does not fit {options.memory}"
    fitting = [line for line in found if line["peak"] <= limit]
    if not fitting:
        return f"{need}, nor does another layout. Use a smaller --batch_size or more ranks."
    best = min(fitting, key=lambda line: (sum(line[name] for name in SHORT), line["tp"]))
    words = "".join(f" --{name}=True" for name in SHORT if best[name])
    return f"{need}. What would: --tp={best['tp']}{words}, {best['peak'] / 1e9:.2f} GB."


def amount(text: str) -> int:
    """Bytes: 80GB is 80 x 10^9, 24GiB is 24 x 2^30. UserError for any other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(iB|B)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(
            f"--memory={text} is no amount of memory. Write 80GB (10^9 bytes each) or 24GiB (2^30)."
        )
    step = 1024 if found[3].lower() == "ib" else 1000
    return int(float(found[1]) * step ** UNITS[found[2].upper()])

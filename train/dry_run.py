"""Memory that training takes on each rank, in the run's layout and in others; nothing is started.

    python train_tp.py configs/train_gpt2.py --dry_run=True --ranks=8 --device=cuda --memory=80GB
"""

import contextlib
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError
from checkpoints.sources import Source, open_sizes, schedule_of
from cli.options import TrainOptions
from model import GPTConfig, adamw
from parallel.collectives import Axis
from parallel.loss import chunk_rows
from plan.memory import Training
from plan.partition import Partition
from plan.stages import Stages
from report import report
from text.dataset import Dataset, is_prepared
from tp_model import TensorParallelGPT
from train.checkpoint import read_state
from train.local_steps import group_size
from train.setup import Rows, make_config
from world.launch import Launch
from world.mesh import sizes

COLUMNS = ("parameters", "gradients", "optimizer", "activations", "temporary", "kv_cache", "peak")
SHORT = {"dp_shard": "shard", "sequence_parallel": "seq", "activation_checkpointing": "ckpt"}
# An estimate of what a process holds on a GPU before torch allocates there: CUDA's context and
# kernels, cuBLAS's workspace, NCCL's buffers. On a CPU it is measured, see process_bytes.
GPU_BASE = 10**9


def described(options: TrainOptions) -> Source:
    """The run's model, and the sync points that its weights were made for. Reads no tensors."""
    source, spec = None, options.init_from
    if spec != "scratch":
        resumed = spec == "resume"
        source = open_sizes(str(read_state(Path(options.out_dir))[0]) if resumed else spec)
    place = Path(options.data_dir) / options.dataset
    dataset = Dataset(place) if is_prepared(place) else None
    config = make_config(options, dataset, source)
    return Source(config, source.description, source.sync) if source else Source(config, "")


def training(options: TrainOptions, model: Source, ranks: int) -> Training:
    """The run's plan. UserError if its layout is impossible on so many ranks."""
    dp, pp, tp = sizes(ranks, options.tp, "train_tp.py", options.pp)
    split, size = Partition.of(model.config, tp), model.config.block_size
    sequence_parallel = options.sequence_parallel and tp > 1
    own = group_size(options, dp)
    schedule = schedule_of(model, options.sync if tp > 1 else "all", tp)
    if sequence_parallel and (tp > size or not schedule.is_plain):
        fault = "--sequence_parallel=True needs --sync=all and a token for every rank"
        raise UserError(f"{fault}: --sync={schedule} and block_size={size} on tp={tp}.")
    rows, auto = Rows.of(options, 0, dp), torch.cuda.is_available()
    stages = Stages.of(options, model.config, schedule)
    stages.check_micro_batches(rows.micro_steps)
    gpu = options.device.startswith("cuda") or options.device == "auto" and auto
    half = options.dtype in ("bfloat16", "float16") or options.dtype == "auto" and gpu
    plan = Training(
        split=split, dp=dp, rows=rows.micro_rows, micro_steps=rows.micro_steps,
        eval_rows=options.batch_size, width=2 if half else 4, dropout=model.config.dropout > 0,
        logit_rows=chunk_rows(rows.micro_rows * size, split.local_vocab, "cuda" if gpu else "cpu"),
        gpu=gpu, dp_shard=options.dp_shard and own > 1, sequence_parallel=sequence_parallel,
        activation_checkpointing=options.activation_checkpointing, stages=stages,
        groups=dp // own, outer=(options.dp_every > 0) * (1 + (options.outer_momentum > 0)),
    )  # fmt: skip
    each = (replace(plan, stages=replace(stages, rank=rank)) for rank in range(pp))
    return max(each, key=lambda plan: plan.peak)


def need(options: TrainOptions, ranks: int) -> str:
    """A note for a run that is out of memory: what it takes, and what the GPU has."""
    plan, beside = training(options, described(options), ranks), " beside Python and torch"
    if plan.gpu:
        has = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        beside = f", its GPU has {has / 1e9:.1f} GB"
    takes = f"{(plan.peak + GPU_BASE * plan.gpu) / 1e9:.1f} GB a rank{beside}"
    return f"By the dry run it takes {takes}: --dry_run=True shows layouts that take less."


def show(options: TrainOptions) -> int:
    """Print the table on rank 0; returns the exit status: 1 if the run's own layout does not fit.
    UserError if it is impossible or --memory is no amount."""
    model, launch = described(options), Launch.from_environment()
    report.check_place(options.report, "report")
    limit = amount(options.memory) if options.memory else 0
    ranks = options.ranks or launch.size
    own = training(options, model, ranks)
    plans, tps = [own], [n for n in range(1, ranks + 1) if ranks % n == 0]
    pps = tps if options.pp > 1 else [1]
    for tp, pp, *values in product(tps, pps, *[(False, True)] * len(SHORT)):
        savings: dict[str, Any] = dict(zip(SHORT, values, strict=True))
        with contextlib.suppress(UserError):
            plan = training(replace(options, tp=tp, pp=pp, **savings), model, ranks)
            plans += [plan] * (plan not in plans)
    base = GPU_BASE if own.gpu else process_bytes()
    found = [row(plan, base) for plan in plans]
    if launch.rank == 0:
        print("\n".join(table(options, found, own, limit)), flush=True)
        if options.report:
            shape = {**model.config.as_json(), "parameters": own.split.count()}
            about = {"entry": "train_tp", "dry_run": True, "ranks": ranks, "model": shape}
            report.write(options.report, {**about, "layouts": found})
    return int(0 < limit < found[0]["peak"])


def process_bytes() -> int:
    """Bytes that a rank's process takes besides the model: the peak of this process, after a tiny
    model is trained, because torch imports and sets up much on first use."""
    model = TensorParallelGPT(GPTConfig(8, 64, n_layer=1, n_head=1, n_embd=8), Axis("tp"))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens)[1].backward()
    adamw(model.named_parameters(), 0.1, 1e-3, (0.9, 0.95)).step()
    return report.peak_bytes(torch.device("cpu"))


def row(plan: Training, base: int) -> dict[str, Any]:
    """A layout's figures in bytes. live: the most that tensors take at a time, at the moment `at`.
    peak: of the rank, the process (`base`) included."""
    names = ("dp", *SHORT, "rows", "micro_steps", *COLUMNS)
    figures: dict[str, Any] = {"tp": plan.split.tp, "pp": plan.place.pp}
    figures |= {name: getattr(plan, name) for name in names}
    figures |= zip(("live", "at"), plan.live(), strict=True)
    return figures | {"base": base, "peak": base + plan.peak}


# --- what is printed ----------------------------------------------------------------------------


def table(
    options: TrainOptions, found: list[dict[str, Any]], own: Training, limit: int
) -> list[str]:
    """The lines of a dry run. found: the run's own layout first, which is marked by a >."""
    asked, s = found[0], own.split
    unit, scale = ("GB", 1e9) if asked["peak"] >= 1e9 else ("MB", 1e6)
    device, peak, reckoned = "CPU", "sum (what is freed is kept, unless sharded)", ""
    if own.gpu:
        device, reckoned = "GPU", ", reckoned"
        peak = "worst moment (activations go as gradients come)"
    wide = {name: max(10, len(name) + 2) for name in COLUMNS}
    heads = "".join(f"{name.replace('kv_', 'KV '):>{wide[name]}}" for name in COLUMNS)
    lines = [
        f"{s.count():,} parameters: {s.n_layer} layers, {s.n_head} heads, {s.n_embd} wide, "
        f"vocabulary {s.vocab_size:,}; {s.block_size} tokens a sequence; {device}, products in "
        f"{'half precision' if own.width == 2 else 'float32'}",
        f"{unit} on the rank that has most; peak is the {peak} and the process, "
        f"{asked['base'] / 1e9:.2f} GB{reckoned}",
        "shard: --dp_shard, seq: --sequence_parallel, ckpt: --activation_checkpointing. "
        "KV cache: a sequence, sampling.",
        f"{'tp':>5}{'dp':>4}  {'options':<15}{'rows x steps':>12}{heads}" + "  fits" * bool(limit),
    ]
    for line in sorted(found, key=lambda line: [line[name] for name in ("tp", "pp", *SHORT)]):
        words = " ".join(short for name, short in SHORT.items() if line[name])
        words = f"pp {line['pp']} {words}" if line["pp"] > 1 else words
        steps, mark = f"{line['rows']} x {line['micro_steps']}", ">" if line is asked else " "
        shown = "".join(f"{line[name] / scale:>{wide[name]},.2f}" for name in COLUMNS)
        shown += ("   yes" if line["peak"] <= limit else "    no") * bool(limit)
        lines.append(f"{mark}{line['tp']:>4}{line['dp']:>4}  {words:<15}{steps:>12}{shown}")
    return [*lines, verdict(options, found, limit)]


def verdict(options: TrainOptions, found: list[dict[str, Any]], limit: int) -> str:
    """Says whether the run as asked for fits and, if not, which layout does."""
    need = f"the run as asked for (>) takes {found[0]['peak'] / 1e9:.2f} GB a rank"
    if not limit:
        return f"{need}; --memory=80GB would say whether that fits."
    fitting = [line for line in found if line["peak"] <= limit]
    if found[0] in fitting:
        return f"{need}: it fits {options.memory}."
    need = f"{need}: it does not fit {options.memory}"
    if not fitting:
        return f"{need}, nor does another layout. Use a smaller --batch_size or more ranks."
    best = min(fitting, key=lambda line: (sum(line[name] for name in SHORT), line["tp"]))
    words = f" --pp={best['pp']}" * (best["pp"] > 1)
    words += "".join(f" --{name}=True" for name in SHORT if best[name])
    return f"{need}. What would: --tp={best['tp']}{words}, {best['peak'] / 1e9:.2f} GB."


def amount(text: str) -> int:
    """Bytes: 80GB is 80 x 10^9, 24GiB is 24 x 2^30. UserError for any other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(iB|B)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        advice = "Write 80GB (10^9 bytes each) or 24GiB (2^30)."
        raise UserError(f"--memory={text} is no amount of memory. {advice}")
    step = 1024 if found[3].lower() == "ib" else 1000
    return int(float(found[1]) * step ** (1 + "KMGT".index(found[2].upper())))

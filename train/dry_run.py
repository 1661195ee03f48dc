"""What a training run takes of each rank's memory, in this layout and in others, without starting it.

    python train_tp.py configs/train_gpt2.py --dry_run=True --ranks=8 --tp=2 --device=cuda --memory=80GB

The arithmetic is in plan/memory.py; here are the layouts, the table, and the answer.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Protocol

import torch

from base.errors import UserError
from cli.options import TrainOptions
from model import GPTConfig, adamw
from parallel.collectives import Axis
from parallel.loss import chunk_rows
from plan.memory import Training
from plan.partition import Partition
from plan.schedule import Schedule
from report import report
from tp_model import TensorParallelGPT
from world.launch import Launch
from world.mesh import sizes

UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
FITS, DOES_NOT_FIT = 0, 1  # exit statuses
PARTS = ("parameters", "gradients", "optimizer", "activations", "temporary", "kv_cache")
SHORT = {"dp_shard": "shard", "sequence_parallel": "seq", "activation_checkpointing": "ckpt"}  # what saves memory, in the table
# What a process holds on a GPU before torch allocates there: CUDA's context and kernels, cuBLAS's workspace, NCCL's buffers.
# Reckoned, not measured. On a CPU it is measured, see process_bytes.
GPU_BASE = 10**9


class Deal(Protocol):
    """How an iteration's rows fall to one rank: so many micro-batches of so many rows."""

    micro_steps: int
    micro_rows: int


@dataclass(frozen=True)
class Layout:
    """One way to run: tp, dp and the options that save memory."""

    tp: int
    dp: int
    dp_shard: bool
    sequence_parallel: bool
    activation_checkpointing: bool


@dataclass(frozen=True)
class Plans:
    """What a run takes of a rank's memory, in any layout.

    schedule_at: the sync points at a tp; deal_at: how rows are dealt at a dp.
    """

    options: TrainOptions
    config: GPTConfig
    schedule_at: Callable[[int], Schedule]
    deal_at: Callable[[int], Deal]

    @property
    def gpu(self) -> bool:
        device = self.options.device
        return device.startswith("cuda") or device == "auto" and torch.cuda.is_available()

    def asked(self, ranks: int) -> Layout:
        """The run's own layout."""
        dp, tp = sizes(ranks, self.options.tp, "train_tp.py")
        shard, sequence = self.options.dp_shard and dp > 1, self.options.sequence_parallel and tp > 1
        return Layout(tp, dp, shard, sequence, self.options.activation_checkpointing)

    def training(self, layout: Layout) -> Training:
        split, deal, options = Partition.of(self.config, layout.tp), self.deal_at(layout.dp), self.options
        savings = {name: getattr(layout, name) for name in SHORT}
        half = options.dtype in ("bfloat16", "float16") or options.dtype == "auto" and self.gpu
        rows = deal.micro_rows * self.config.block_size
        logit_rows = chunk_rows(rows, split.local_vocab, "cuda" if self.gpu else "cpu")
        return Training(
            split, self.schedule_at(layout.tp), layout.dp, deal.micro_rows, deal.micro_steps,
            options.batch_size, 2 if half else 4, self.config.dropout > 0, self.gpu, logit_rows, **savings,
        )  # fmt: skip


def need(plans: Plans, ranks: int) -> str:
    """For a run that has no memory left: what the run takes, and the GPU has."""
    peak = plans.training(plans.asked(ranks)).peak
    if plans.gpu:
        has = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        takes = f"takes {(GPU_BASE + peak) / 1e9:.1f} GB a rank, its GPU has {has / 1e9:.1f} GB"
    else:
        takes = f"takes {peak / 1e9:.1f} GB a rank beside Python and torch"
    return f"By the dry run it {takes}: --dry_run=True shows layouts that take less."


def show(plans: Plans) -> int:
    """Print the table; the exit status: whether the run's own layout fits.

    UserError where the run's own layout cannot be, or --memory is no amount. Where torchrun started several ranks, rank 0
    speaks.
    """
    launch, options, config = Launch.from_environment(), plans.options, plans.config
    report.check_place(options.report, "report")
    limit = amount(options.memory) if options.memory else 0
    ranks = options.ranks or launch.size
    asked, gpu = plans.asked(ranks), plans.gpu
    base = GPU_BASE if gpu else process_bytes()
    own = plans.training(asked)
    if asked.sequence_parallel and not can_split_tokens(own):
        raise UserError(
            f"--sequence_parallel=True needs --sync=all and a token for every rank: --sync={own.schedule} and "
            f"block_size={config.block_size} on tp={asked.tp}."
        )
    made = {asked: own}
    for layout in layouts(ranks):
        try:
            plan = plans.training(layout)
        except UserError:  # too many ranks for the heads, or rows that so many replicas cannot share
            continue
        if not layout.sequence_parallel or can_split_tokens(plan):
            made.setdefault(layout, plan)
    found = [row(layout, plan, base) for layout, plan in made.items()]
    if launch.rank == 0:
        print("\n".join(table(options, config, found, own, limit, gpu)), flush=True)
        if options.report:
            model = {**asdict(config), "parameters": own.split.count()}
            about = {"entry": "train_tp", "dry_run": True, "ranks": ranks, "model": model}
            report.write(options.report, {**about, "layouts": found})
    return DOES_NOT_FIT if limit and found[0]["peak"] > limit else FITS


def process_bytes() -> int:
    """What a rank's process takes besides the model: this one's peak, once it has trained a model of a few numbers, as torch
    imports and sets up much when it is first used."""
    model = TensorParallelGPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8), Axis("tp"))
    optimizer = adamw(model.named_parameters(), 0.1, 1e-3, (0.9, 0.95), "cpu")
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    _, loss = model(tokens, tokens)
    if loss is not None:
        loss.backward()
    optimizer.step()
    return report.peak_bytes(torch.device("cpu"))


def layouts(ranks: int) -> Iterator[Layout]:
    """Every way to run on so many ranks."""
    for tp in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for shard, sequence, again in product((False, True), repeat=3):
            if (ranks > tp or not shard) and (tp > 1 or not sequence):
                yield Layout(tp, ranks // tp, shard, sequence, again)


def can_split_tokens(plan: Training) -> bool:
    return plan.schedule.is_plain and plan.split.tp <= plan.split.block_size


def row(layout: Layout, plan: Training, base: int) -> dict[str, Any]:
    """One layout's figures, bytes on the rank that has most. live: the most that tensors take at a time, at the moment `at`.
    peak: what the rank takes, the process itself, base, included."""
    live, at = plan.live()
    return {
        **asdict(layout),
        "rows": plan.rows,
        "micro_steps": plan.micro_steps,
        **{part: getattr(plan, part) for part in PARTS},
        "live": live,
        "at": at,
        "base": base,
        "peak": base + plan.peak,
    }


# --- what is printed ------------------------------------------------------------------------------------------------


def table(
    options: TrainOptions, config: GPTConfig, found: list[dict[str, Any]], own: Training, limit: int, gpu: bool
) -> list[str]:
    """The lines of a dry run. found: the run's own layout, then the others, which it is shown among."""
    asked, base = found[0], found[0]["base"]
    unit, scale = ("GB", 1e9) if asked["peak"] >= 1e9 else ("MB", 1e6)
    precision = "half precision" if own.width == 2 else "float32"
    peak = "the worst moment (activations go as gradients come)" if gpu else "the sum (what is freed is kept, unless sharded)"
    lines = [
        f"{own.split.count():,} parameters: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, vocabulary "
        f"{config.vocab_size:,}; {config.block_size} tokens a sequence; {'GPU' if gpu else 'CPU'}, products in {precision}",
        f"{unit} on the rank that has most; peak is {peak} "
        f"and the process, {base / 1e9:.2f} GB{', reckoned' if gpu else ''}",
        "shard: --dp_shard, seq: --sequence_parallel, ckpt: --activation_checkpointing. KV cache: a sequence, sampling.",
        f"{'tp':>5}{'dp':>4}  {'options':<15}{'rows x steps':>12}{'parameters':>12}{'gradients':>11}{'optimizer':>11}"
        f"{'activations':>13}{'temporary':>11}{'KV cache':>10}{'peak':>10}{'  fits' if limit else ''}",
    ]
    for line in sorted(found, key=lambda line: (line["tp"], [line[name] for name in SHORT])):
        words = " ".join(short for name, short in SHORT.items() if line[name])
        sizes = zip((*PARTS, "peak"), (12, 11, 11, 13, 11, 10, 10), strict=True)
        shown = "".join(f"{line[name] / scale:>{wide},.2f}" for name, wide in sizes)
        fits = "" if not limit else "   yes" if line["peak"] <= limit else "    no"
        steps = f"{line['rows']} x {line['micro_steps']}"
        lines.append(f"{'>' if line is asked else ' ':<2}{line['tp']:>3}{line['dp']:>4}  {words:<15}{steps:>12}{shown}{fits}")
    return lines + [verdict(options, found, limit)]


def verdict(options: TrainOptions, found: list[dict[str, Any]], limit: int) -> str:
    """Whether the run as it was asked for fits, and what does where it does not."""
    asked = found[0]
    need = f"the run as asked for (>) takes {asked['peak'] / 1e9:.2f} GB a rank"
    if not limit:
        return f"{need}; --memory=80GB would say whether that fits."
    if asked["peak"] <= limit:
        return f"{need}: it fits {options.memory}."
    fitting = [line for line in found if line["peak"] <= limit]
    if not fitting:
        return f"{need}: it does not fit {options.memory}, nor does another layout. Use a smaller --batch_size or more ranks."
    best = min(fitting, key=lambda line: (sum(line[name] for name in SHORT), line["tp"]))
    words = "".join(f" --{name}=True" for name in SHORT if best[name])
    return f"{need}: it does not fit {options.memory}. What would: --tp={best['tp']}{words}, {best['peak'] / 1e9:.2f} GB."


def amount(text: str) -> int:
    """Bytes of an amount of memory: 80GB is 80 x 10^9, 24GiB is 24 x 2^30. UserError where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(iB|B)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"--memory={text} is no amount of memory. Write 80GB (10^9 bytes each) or 24GiB (2^30).")
    step = 1024 if found[3].lower() == "ib" else 1000
    return int(float(found[1]) * step ** UNITS[found[2].upper()])

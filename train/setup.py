"""What a training run is made of: weights, optimizer, layout of rows."""

import ctypes
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.errors import UserError, shown
from checkpoints.manifest import DTYPES
from checkpoints.sources import Described, Source, common_tokenizer, identity, open_sizes, open_source, reader, schedule_of
from cli.options import TrainOptions, as_dict
from model import GPTConfig
from parallel.data_parallel import Sharding, replicate
from plan.schedule import Schedule
from text.dataset import Dataset, is_prepared
from text.tokenizer import GPT2Tokenizer, Tokenizer
from tp_model import TensorParallelGPT
from train import checkpoint as training
from train import directory, dry_run
from train.checkpoint import Progress
from train.directory import METRICS
from train.metrics import cut_metrics
from world.devices import pick_dtype
from world.mesh import World

GPT2_VOCAB = 50304  # nanoGPT's table for GPT-2's 50257 tokens
# options whose change on resume a user should hear of
SHAPES_THE_CURVE = {
    "dataset", "gradient_accumulation_steps", "batch_size", "block_size", "dropout", "learning_rate", "weight_decay", "beta1",
    "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "seed", "dtype", "sync",
}  # fmt: skip


@dataclass
class Layout:
    """How an iteration's rows are dealt: the same rows at every layout, dp ranks taking neighbouring shares.

    rows: of the whole iteration. micro_steps, micro_rows: how many micro-batches a rank runs and their size.
    """

    rows: int
    micro_steps: int
    micro_rows: int
    dp_rank: int

    @classmethod
    def of(cls, options: TrainOptions, dp_rank: int, dp: int) -> "Layout":
        rows = options.gradient_accumulation_steps * options.batch_size
        if rows % dp:
            raise UserError(
                f"an iteration has {rows} rows (batch_size {options.batch_size} x gradient_accumulation_steps "
                f"{options.gradient_accumulation_steps}): dp={dp} ranks cannot share them evenly."
            )
        own = rows // dp
        steps = next(n for n in range(-(-own // options.batch_size), own + 1) if own % n == 0)
        return cls(rows, steps, own // steps, dp_rank)

    def micro(self, step: int) -> range:
        """The iteration's rows that this rank's micro-batch `step` holds."""
        first = (self.dp_rank * self.micro_steps + step) * self.micro_rows
        return range(first, first + self.micro_rows)


@dataclass
class Run:
    world: World
    options: TrainOptions
    dataset: Dataset
    model: TensorParallelGPT
    wrapped: nn.Module  # the model as the backward pass sees it: averaging over dp
    optimizer: torch.optim.Optimizer
    layout: Layout
    progress: Progress
    out_dir: Path
    dtype: torch.dtype
    first: Progress  # where this process began
    tokenizer: Tokenizer
    replaces: list[Path]  # an earlier run's checkpoints, which go when there is a new one
    seconds: list[float] = field(default_factory=list)  # of each iteration
    skipped: float = 0.0  # the norm of the last gradient, where the update was skipped for it

    @property
    def tokens_per_iter(self) -> int:
        return self.layout.rows * self.model.config.block_size

    def autocast(self) -> Any:
        """Matrix products in the run's dtype; parameters, LayerNorm, softmax and loss stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.dtype)

    def describe(self) -> str:
        w, c = self.world, self.model.config
        return (
            f"number of parameters: {self.model.get_num_params() / 1e6:.2f}M "
            f"({c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide)\n"
            f"world {w.size} = dp {w.dp.size} x tp {w.tp.size}, {w.comm}, {w.device.type}, {str(self.dtype)[6:]}; "
            f"{self.tokens_per_iter:,} tokens/iter = {self.layout.micro_rows} seq x {c.block_size} x "
            f"{self.layout.micro_steps} accum x {w.dp.size} dp"
            f"{', sharded' if self.model.sharding else ''}"
            f"{'' if self.model.schedule.is_plain else f'; sync points: {self.model.schedule}'}"
        )


def prepare(world: World, options: TrainOptions, dataset: Dataset) -> Run:
    """Everything before the first iteration: weights, optimizer, and where the run stands."""
    shard = options.dp_shard and world.dp.size > 1
    if world.device.type == "cpu":
        set_up_heap(keep=not shard)
    out_dir = Path(options.out_dir)
    progress, checkpoint, source, before = Progress(loss_scale=65536.0), None, None, dict[str, Any]()
    if options.init_from == "resume":
        checkpoint, progress, before = training.read_state(out_dir)
        source = open_source(str(checkpoint), (world.rank, world.size))
        world.agree("checkpoint", identity(source))
    elif not options.overwrite and not options.eval_only:
        directory.check_free(out_dir)
    if options.init_from not in ("resume", "scratch"):
        source = open_source(options.init_from, (world.rank, world.size), also=("scratch", "resume"))
        world.agree("weights", identity(source))
    config = make_config(options, dataset, source)
    tokenizer, notice = dataset.tokenizer, ""
    if source is not None:
        tokenizer, notice = common_tokenizer(source, dataset, options.data_dir)
    if notice and world.is_main:
        print(notice, file=sys.stderr)
    dataset.check(config.block_size, config.vocab_size)
    read = reader(source, world.tp.rank, config.block_size) if source else None
    if options.sequence_parallel and config.block_size < world.tp.size:
        raise UserError(
            f"--sequence_parallel=True: block_size={config.block_size} is shorter than tp={world.tp.size}, some ranks would "
            f"have no token. Use a --tp of at most {config.block_size}."
        )
    asked, reduce_dtype = options.sync or "all", DTYPES[options.dp_reduce_dtype]
    model = TensorParallelGPT(
        config,
        world.tp,
        read,
        options.seed,
        world.device,
        activation_checkpointing=options.activation_checkpointing,
        schedule=schedule_of(source, options.sync, world.tp.size) if source else Schedule.parse(asked, config.n_layer),
        sequence_parallel=options.sequence_parallel,
        sharding=Sharding(world.dp, world.device, reduce_dtype) if shard else None,
    )
    if options.compile:
        model.compile_blocks()
    betas = (options.beta1, options.beta2)
    optimizer = model.configure_optimizers(options.weight_decay, options.learning_rate, betas, world.device.type)
    if checkpoint is not None:
        training.load_optimizer(model, optimizer, checkpoint, progress.optimizer_steps, world)
    layout = Layout.of(options, world.dp.rank, world.dp.size)
    dtype = pick_dtype(options.dtype, world.device)
    wrapped = model if model.sharding else replicate(model, world.dp, reduce_dtype)
    writes = world.is_main and not options.eval_only
    old = start_directory(out_dir, progress.iter_num, options) if writes else []
    parts = world, options, dataset, model, wrapped, optimizer, layout, progress
    run = Run(*parts, out_dir, dtype, replace(progress), tokenizer, old)
    if source is not None and world.is_main:
        report_unused(options, config)
        if checkpoint is not None:
            report_changes(before, run, source)
    return run


def make_config(options: TrainOptions, dataset: Dataset | None, source: Source | Described | None) -> GPTConfig:
    """The model's sizes: the source's, or those of the options for a fresh one, with GPT-2's vocabulary where no dataset is."""
    if source is None:
        tokenizer = dataset.tokenizer if dataset else GPT2Tokenizer()
        return GPTConfig(
            block_size=options.block_size,
            vocab_size=GPT2_VOCAB if tokenizer.kind == "gpt2" else tokenizer.n_vocab,
            n_layer=options.n_layer,
            n_head=options.n_head,
            n_embd=options.n_embd,
            dropout=options.dropout,
            bias=options.bias,
        )
    # a shorter context is a part of the position table; a longer one does not exist
    block_size = min(options.block_size, source.config.block_size)
    return replace(source.config, dropout=options.dropout, block_size=block_size)


def plans(options: TrainOptions) -> dry_run.Plans:
    """What the run would take of a rank's memory. Weights and tokens stay unread."""
    source: Described | None = None
    if options.init_from == "resume":
        source = open_sizes(str(training.read_state(Path(options.out_dir))[0]))
    elif options.init_from != "scratch":
        source = open_sizes(options.init_from)
    place = Path(options.data_dir) / options.dataset
    config = make_config(options, Dataset(place) if is_prepared(place) else None, source)

    def schedule(tp: int) -> Schedule:
        if source and tp > 1:
            return schedule_of(source, options.sync, tp)
        return Schedule.parse(options.sync or "all", config.n_layer) if tp > 1 else Schedule.plain(config.n_layer)

    return dry_run.Plans(options, config, schedule, lambda dp: Layout.of(options, 0, dp))


def report_changes(before: dict[str, Any], run: Run, source: Source) -> None:
    """Which of what shapes the loss curve is not as in the run that is resumed. What is used counts, not what was asked for:
    the weights have a block_size and a schedule of their own."""
    auto = pick_dtype("auto", run.world.device)
    before = before | {
        "block_size": source.config.block_size,
        "sync": source.sync.schedule if source.sync else "all",
        "dtype": str(auto)[6:] if before.get("dtype") == "auto" else before.get("dtype"),
    }
    now = as_dict(run.options) | {
        "block_size": run.model.config.block_size,
        "sync": str(run.model.schedule),
        "dtype": str(run.dtype)[6:],
    }
    for key in sorted(before.keys() & now.keys() & SHAPES_THE_CURVE):
        if before[key] != now[key]:
            print(f"resume: {key} is now {now[key]!r}, it was {shown(before[key])}", file=sys.stderr)


def report_unused(options: TrainOptions, config: GPTConfig) -> None:
    """Which sizes were asked for in vain, since the weights have their own."""
    for key in ("n_layer", "n_head", "n_embd", "bias", "block_size"):
        asked, used = getattr(options, key), getattr(config, key)
        if asked not in (used, getattr(TrainOptions, key)):
            print(f"{key}={asked} is not used: the weights have {used}", file=sys.stderr)


def start_directory(out_dir: Path, iter_num: int, options: TrainOptions) -> list[Path]:
    """Make out_dir ready: later lines of metrics.jsonl cut. Gives the checkpoints that go when there is a new one."""
    old = directory.make_ready(out_dir, options.init_from == "resume")
    cut_metrics(out_dir / METRICS, iter_num)
    return old


def set_up_heap(keep: bool) -> None:
    """What glibc does with memory that is freed. Other C libraries are left alone.

    keep: it stays, for the next iteration. glibc would hand large tensors back to the kernel each time, and take a tenth of a
    124M model's iteration to have the pages mapped and cleared again. Else it goes, at once: sharded over dp whole
    parameters come and go with every layer, and the holes that they leave among the rest fit little else.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
        if keep:
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        else:
            libc.mallopt(M_MMAP_THRESHOLD, 2**18)

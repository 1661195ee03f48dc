"""A training run before its first iteration: weights, optimizer, and how rows are dealt."""

import ctypes
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.errors import UserError, print_error, shown
from checkpoints import sources
from checkpoints.manifest import DTYPES, dtype_name
from cli.options import TrainOptions, as_dict
from model import GPTConfig, adamw
from parallel.collectives import Axis
from parallel.data_parallel import Sharding, replicate
from plan.stages import Stages
from text.dataset import Dataset
from text.tokenizer import GPT2Tokenizer, Tokenizer
from tp_model import TensorParallelGPT
from train import checkpoint, directory
from train.checkpoint import Progress
from train.local_steps import LocalSteps, dp_axes
from world.devices import pick_dtype
from world.mesh import World

SIZES = ("n_layer", "n_head", "n_embd", "bias", "block_size")
# options that shape the loss curve: a resumed run reports which of them changed
SHAPES_THE_CURVE = {
    "dataset", "gradient_accumulation_steps", "batch_size", "block_size", "dropout", "seed", "sync",
    "learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters",
    "lr_decay_iters", "min_lr", "dtype", "dp_every", "dp_groups", "outer_lr", "outer_momentum",
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """How an iteration's rows are dealt: a dp rank takes neighbouring ones, in micro_steps
    micro-batches of micro_rows."""

    micro_steps: int
    micro_rows: int
    dp_rank: int

    @classmethod
    def of(cls, options: Any, dp_rank: int, dp: int) -> "Rows":
        most = options.batch_size
        total = options.gradient_accumulation_steps * most
        if total % dp:
            raise UserError(
                f"an iteration has {total} rows (batch_size {most} x gradient_accumulation_steps "
                f"{options.gradient_accumulation_steps}): dp={dp} ranks cannot share them evenly."
            )
        own = total // dp
        steps = next(n for n in range(-(-own // most), own + 1) if own % n == 0)
        return cls(steps, own // steps, dp_rank)

    def micro(self, step: int) -> range:
        """The iteration's rows in this rank's micro-batch `step`."""
        first = (self.dp_rank * self.micro_steps + step) * self.micro_rows
        return range(first, first + self.micro_rows)


@dataclass
class Run:
    world: World
    options: TrainOptions
    dataset: Dataset
    model: TensorParallelGPT
    wrapped: nn.Module  # the model whose backward pass averages gradients over dp
    optimizer: torch.optim.Optimizer
    dp: Axis  # over which gradients are averaged: with local steps that of a group
    rows: Rows
    progress: Progress
    first: Progress  # at the start of this process
    out_dir: Path
    dtype: torch.dtype
    tokenizer: Tokenizer
    replaces: list[Path]  # checkpoints of an earlier run, deleted after the first save
    seconds: list[float] = field(default_factory=list)  # of each iteration
    skipped: float = 0.0  # the norm of the last gradient, if its update was skipped
    pipeline: Any = None  # train/pipeline.py's, if there are several stages
    local: LocalSteps | None = None

    @property
    def tokens_per_iter(self) -> int:
        rows = self.rows.micro_steps * self.rows.micro_rows * self.world.dp.size
        return rows * self.model.config.block_size

    @property
    def averaged(self) -> bool:
        """Whether all dp groups have the same parameters: with local steps, after an averaging."""
        at, options = self.progress.iter_num, self.options
        return at % max(1, options.dp_every) == 0 or at == options.max_iters

    def due(self, interval: int) -> bool:
        """Whether it is time for what is done every `interval` iterations, 0 = never; with local
        steps it waits for the next averaging."""
        late = self.progress.iter_num % interval if interval else math.inf
        return self.averaged and late < max(1, self.options.dp_every)

    def autocast(self) -> Any:
        """Matrix products in the run's dtype; the rest (parameters, LayerNorm, loss) in float32."""
        half = self.dtype != torch.float32
        return torch.autocast(self.world.device.type, self.dtype, enabled=half)

    def describe(self) -> str:
        w, c, schedule, rows = self.world, self.model.config, self.model.schedule, self.rows
        points = "" if schedule.is_plain else f"; sync points: {schedule}"
        every, groups = self.options.dp_every, w.dp.size // self.dp.size
        return (
            f"number of parameters: {self.model.get_num_params() / 1e6:.2f}M "
            f"({c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide)\n"
            f"world {w.size} = {w.layout}, {w.over}, {w.device.type}, "
            f"{dtype_name(self.dtype)}; {self.tokens_per_iter:,} tokens/iter = {rows.micro_rows} "
            f"seq x {c.block_size} x {rows.micro_steps} accum x {w.dp.size} dp"
            f"{', sharded' * bool(self.model.sharding)}{points}{self.model.stages}"
            f"{f'; dp groups averaged every {every} iterations: {groups}' * bool(every)}"
        )


def prepare(world: World, options: TrainOptions, dataset: Dataset) -> Run:
    """Everything before the first iteration. UserError if options, weights and data do not fit."""
    dp, groups = dp_axes(world, options)
    shard, local = options.dp_shard and dp.size > 1, options.dp_every > 0
    group = groups.rank  # whose optimizer state is read
    if world.device.type == "cpu":
        set_up_heap(keep=not shard)
    out_dir, progress = Path(options.out_dir), Progress(loss_scale=65536.0)
    saved, source, before = None, None, dict[str, Any]()
    if options.init_from == "resume":
        saved, progress, before = checkpoint.read_state(out_dir, group)
    elif not options.overwrite and not options.eval_only:
        directory.check_free(out_dir)
    if options.init_from != "scratch":
        spec, share = str(saved or options.init_from), (world.rank, world.size)
        source = sources.open_source(spec, share, also=("scratch", "resume"))
        world.agree("checkpoint" if saved else "weights", sources.identity(source))
    config, tokenizer = make_config(options, dataset, source), dataset.tokenizer
    if source is not None:
        tokenizer, notice = sources.common_tokenizer(source, dataset, options.data_dir)
        if notice and world.is_main:
            print_error(notice)
    dataset.check(config.block_size, config.vocab_size)
    model = make_model(replace(world, dp=dp), options, config, source, shard)
    rates, betas = (options.weight_decay, options.learning_rate), (options.beta1, options.beta2)
    optimizer = adamw(model.named_parameters(), *rates, betas)
    if saved is not None:
        checkpoint.load_optimizer(model, optimizer, saved, progress.optimizer_steps, world, group)
    rows = Rows.of(options, world.dp.rank, world.dp.size)
    own = shard or options.pp > 1  # gradients over dp are not DistributedDataParallel's
    wrapped = model if own else replicate(model, dp, DTYPES[options.dp_reduce_dtype])
    writes, resumed = world.is_main and not options.eval_only, options.init_from == "resume"
    old = directory.make_ready(out_dir, progress.iter_num, resumed) if writes else []
    run = Run(
        world, options, dataset, model, wrapped, optimizer, dp, rows, progress, replace(progress),
        out_dir, pick_dtype(options.dtype, world.device), tokenizer, old,
    )  # fmt: skip
    if options.pp > 1:
        from train.pipeline import Pipeline

        sizes = rows.micro_steps, rows.micro_rows, options.batch_size
        run.pipeline = Pipeline(model, replace(world, dp=dp), *sizes, run.autocast)
    if local:
        run.local = LocalSteps(model, groups, options)
        if saved is not None:
            run.local.load(model, saved, world)
    if source is not None and world.is_main:
        report_differences(run, source, before)
    return run


def make_model(
    world: World, options: TrainOptions, config: GPTConfig, source: sources.Source | None,
    shard: bool,
) -> TensorParallelGPT:  # fmt: skip
    """This rank's part of the model, with the source's weights or, without one, random ones."""
    size, tp = config.block_size, world.tp.size
    if options.sequence_parallel and size < tp:
        fault = f"block_size={size} is shorter than tp={tp}, some ranks would have no token"
        raise UserError(f"--sequence_parallel=True: {fault}. Use a --tp of at most {size}.")
    read = sources.reader(source, world.tp.rank, size) if source else None
    kind: type[Sharding] = Sharding
    if options.pp > 1:
        from train.pipeline import StageSharding as kind  # which imports half a second of PyTorch
    sharding = kind(world.dp, world.device, DTYPES[options.dp_reduce_dtype])
    schedule = sources.schedule_of(source or sources.Source(config, ""), options.sync, tp)
    model = TensorParallelGPT(
        config, world.tp, read, options.seed, world.device,
        stages=Stages.of(options, config, schedule, world.pp.rank),
        activation_checkpointing=options.activation_checkpointing,
        schedule=schedule, sequence_parallel=options.sequence_parallel,
        sharding=sharding if shard else None,
    )  # fmt: skip
    if options.compile:
        model.compile_blocks()
    return model


def make_config(
    options: TrainOptions, dataset: Dataset | None, source: sources.Source | None
) -> GPTConfig:
    """The source's sizes or, without one, those of the options. Without a dataset, GPT-2's ids."""
    if source is None:
        tokenizer = dataset.tokenizer if dataset else GPT2Tokenizer()
        vocab_size = 50304 if tokenizer.kind == "gpt2" else tokenizer.n_vocab  # nanoGPT's table
        sizes = {name: getattr(options, name) for name in SIZES}
        return GPTConfig(vocab_size=vocab_size, dropout=options.dropout, **sizes)
    # a shorter context is a part of the position table; a longer one does not exist
    block_size = min(options.block_size, source.config.block_size)
    return replace(source.config, dropout=options.dropout, block_size=block_size)


def report_differences(run: Run, source: sources.Source, before: dict[str, Any]) -> None:
    """Print options that do not apply to these weights; on resume (`before` has the options of the
    run so far) those that change the loss curve. Values in use count, not those asked for."""
    config = run.model.config
    for key in SIZES:
        asked, used = getattr(run.options, key), getattr(config, key)
        if asked not in (used, getattr(TrainOptions, key)):
            print_error(f"{key}={asked} is not used: the weights have {used}")
    if not before:
        return
    now = as_dict(run.options) | {"block_size": config.block_size, "dtype": dtype_name(run.dtype)}
    now |= {"sync": str(run.model.schedule)}
    before |= {"block_size": source.config.block_size}
    before |= {"sync": source.sync.schedule if source.sync else "all"}
    if before.get("dtype") == "auto":
        before["dtype"] = dtype_name(pick_dtype("auto", run.world.device))
    for key in sorted(before.keys() & now.keys() & SHAPES_THE_CURVE):
        if before[key] != now[key]:
            print_error(f"resume: {key} is now {now[key]!r}, it was {shown(before[key])}")


def set_up_heap(keep: bool) -> None:
    """Set what glibc does with freed memory. keep: for the next iteration, as to return large
    tensors to the kernel and to have their pages mapped again takes a tenth of a 124M model's
    iteration. Otherwise it returns large pieces at once: sharded over dp, whole parameters come and
    go with every layer and would leave holes in which little else fits."""
    libc = ctypes.CDLL(None)
    TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # M_* in malloc.h
    settings = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1} if keep else {MMAP_THRESHOLD: 2**18}
    for name, value in settings.items() if hasattr(libc, "gnu_get_libc_version") else ():
        libc.mallopt(name, value)

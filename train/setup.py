"""A training run before its first iteration: weights, optimizer, and how rows are dealt."""

import ctypes
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.errors import UserError, shown
from checkpoints import sources
from checkpoints.manifest import DTYPES
from cli.options import TrainOptions, as_dict
from model import GPTConfig, adamw
from parallel.data_parallel import Sharding, replicate
from plan.schedule import Schedule
from text.dataset import Dataset
from text.tokenizer import GPT2Tokenizer, Tokenizer
from tp_model import TensorParallelGPT
from train import checkpoint, directory
from train.checkpoint import Progress
from world.devices import pick_dtype
from world.mesh import World

GPT2_VOCAB = 50304  # nanoGPT's table for GPT-2's 50257 tokens
SIZES = ("n_layer", "n_head", "n_embd", "bias", "block_size")
# options that shape the loss curve: a resumed run reports which of them changed
SHAPES_THE_CURVE = {
    "dataset", "gradient_accumulation_steps", "batch_size", "block_size", "dropout", "seed", "sync",
    "learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters",
    "lr_decay_iters", "min_lr", "dtype",
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """How an iteration's rows are dealt: a dp rank takes neighbouring ones, in micro-batches.

    micro_steps, micro_rows: micro-batches of a rank in an iteration, and their size.
    """

    micro_steps: int
    micro_rows: int
    dp_rank: int

    @classmethod
    def of(cls, options: TrainOptions, dp_rank: int, dp: int) -> "Rows":
        total = options.gradient_accumulation_steps * options.batch_size
        if total % dp:
            raise UserError(
                f"an iteration has {total} rows (batch_size {options.batch_size} x "
                f"gradient_accumulation_steps {options.gradient_accumulation_steps}): "
                f"dp={dp} ranks cannot share them evenly."
            )
        own, most = total // dp, options.batch_size
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
    rows: Rows
    progress: Progress
    first: Progress  # at the start of this process
    out_dir: Path
    dtype: torch.dtype
    tokenizer: Tokenizer
    replaces: list[Path]  # checkpoints of an earlier run, deleted after the first save
    seconds: list[float] = field(default_factory=list)  # of each iteration
    skipped: float = 0.0  # the norm of the last gradient, if its update was skipped

    @property
    def tokens_per_iter(self) -> int:
        rows = self.rows.micro_steps * self.rows.micro_rows * self.world.dp.size
        return rows * self.model.config.block_size

    def autocast(self) -> Any:
        """Matrix products in the run's dtype; the rest (parameters, LayerNorm, loss) in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.dtype)

    def describe(self) -> str:
        w, c, schedule = self.world, self.model.config, self.model.schedule
        return (
            f"number of parameters: {self.model.get_num_params() / 1e6:.2f}M "
            f"({c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide)\n"
            f"world {w.size} = dp {w.dp.size} x tp {w.tp.size}, {w.comm}, {w.device.type}, "
            f"{str(self.dtype)[6:]}; {self.tokens_per_iter:,} tokens/iter = "
            f"{self.rows.micro_rows} seq x {c.block_size} x {self.rows.micro_steps} accum x "
            f"{w.dp.size} dp{', sharded' if self.model.sharding else ''}"
            f"{'' if schedule.is_plain else f'; sync points: {schedule}'}"
        )


def prepare(world: World, options: TrainOptions, dataset: Dataset) -> Run:
    """Everything before the first iteration. UserError if options, weights and data do not fit."""
    shard = options.dp_shard and world.dp.size > 1
    if world.device.type == "cpu":
        set_up_heap(keep=not shard)
    out_dir, progress = Path(options.out_dir), Progress(loss_scale=65536.0)
    saved, source, before = None, None, dict[str, Any]()
    if options.init_from == "resume":
        saved, progress, before = checkpoint.read_state(out_dir)
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
            print(notice, file=sys.stderr)
    dataset.check(config.block_size, config.vocab_size)
    model = make_model(world, options, config, source, shard)
    betas, device = (options.beta1, options.beta2), world.device
    rates = options.weight_decay, options.learning_rate
    optimizer = adamw(model.named_parameters(), *rates, betas, device.type)
    if saved is not None:
        checkpoint.load_optimizer(model, optimizer, saved, progress.optimizer_steps, world)
    wrapped = model if shard else replicate(model, world.dp, DTYPES[options.dp_reduce_dtype])
    rows = Rows.of(options, world.dp.rank, world.dp.size)
    old: list[Path] = []
    if world.is_main and not options.eval_only:
        old = directory.make_ready(out_dir, progress.iter_num, options.init_from == "resume")
    run = Run(
        world, options, dataset, model, wrapped, optimizer, rows, progress, replace(progress),
        out_dir, pick_dtype(options.dtype, device), tokenizer, old,
    )  # fmt: skip
    if source is not None and world.is_main:
        report_differences(run, source, before)
    return run


def make_model(
    world: World, options: TrainOptions, config: GPTConfig, source: sources.Source | None,
    shard: bool,
) -> TensorParallelGPT:  # fmt: skip
    """This rank's part of the model, with the source's weights or, without one, random ones."""
    if options.sequence_parallel and config.block_size < world.tp.size:
        raise UserError(
            f"--sequence_parallel=True: block_size={config.block_size} is shorter than "
            f"tp={world.tp.size}, some ranks would have no token. Use a --tp of at most "
            f"{config.block_size}."
        )
    reduce_dtype = DTYPES[options.dp_reduce_dtype]
    read = sources.reader(source, world.tp.rank, config.block_size) if source else None
    model = TensorParallelGPT(
        config, world.tp, read, options.seed, world.device,
        activation_checkpointing=options.activation_checkpointing,
        schedule=pick_schedule(options, config, source, world.tp.size),
        sequence_parallel=options.sequence_parallel,
        sharding=Sharding(world.dp, world.device, reduce_dtype) if shard else None,
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
        vocab_size = GPT2_VOCAB if tokenizer.kind == "gpt2" else tokenizer.n_vocab
        sizes = {name: getattr(options, name) for name in SIZES}
        return GPTConfig(vocab_size=vocab_size, dropout=options.dropout, **sizes)
    # a shorter context is a part of the position table; a longer one does not exist
    block_size = min(options.block_size, source.config.block_size)
    return replace(source.config, dropout=options.dropout, block_size=block_size)


def pick_schedule(
    options: TrainOptions, config: GPTConfig, source: sources.Source | None, tp: int
) -> Schedule:
    if source is not None:
        return sources.schedule_of(source, options.sync, tp)
    return Schedule.parse(options.sync or "all", config.n_layer)


def report_differences(run: Run, source: sources.Source, before: dict[str, Any]) -> None:
    """Print options that do not apply to these weights; on resume (`before` has the options of the
    run so far) those that change the loss curve. Values in use count, not those asked for."""
    config = run.model.config
    for key in SIZES:
        asked, used = getattr(run.options, key), getattr(config, key)
        if asked not in (used, getattr(TrainOptions, key)):
            print(f"{key}={asked} is not used: the weights have {used}", file=sys.stderr)
    if not before:
        return
    before |= {"block_size": source.config.block_size}
    before |= {"sync": source.sync.schedule if source.sync else "all"}
    if before.get("dtype") == "auto":
        before["dtype"] = str(pick_dtype("auto", run.world.device))[6:]
    now = as_dict(run.options) | {"block_size": config.block_size, "dtype": str(run.dtype)[6:]}
    now |= {"sync": str(run.model.schedule)}
    for key in sorted(before.keys() & now.keys() & SHAPES_THE_CURVE):
        if before[key] != now[key]:
            was = shown(before[key])
            print(f"resume: {key} is now {now[key]!r}, it was {was}", file=sys.stderr)


def set_up_heap(keep: bool) -> None:
    """Set what glibc does with freed memory. Other C libraries stay as they are.

    keep: it keeps the memory for the next iteration: to return large tensors to the kernel and to
    have their pages mapped again takes a tenth of a 124M model's iteration. Otherwise it returns
    large pieces at once: sharded over dp, whole parameters come and go with every layer and would
    leave holes in which little else fits.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
        if keep:
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        else:
            libc.mallopt(M_MMAP_THRESHOLD, 2**18)

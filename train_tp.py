"""Train a GPT on N ranks: from scratch, from pretrained weights, or on from a checkpoint. dp = world size / tp.

    torchrun --standalone --nproc_per_node=4 train_tp.py configs/train_gpt2.py --tp=2
"""

import ctypes
import json
import math
import mmap
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from base.errors import ReaderGone, Stopped, UserError, explaining_memory, printable, shown
from base.files import naming
from checkpoints.shards import DTYPES
from checkpoints.sources import Described, Source, common_tokenizer, identity, open_sizes, open_source, reader, schedule_of
from cli.grammar import parse
from cli.options import TrainOptions, as_dict
from model import GPTConfig, adamw
from parallel.collectives import all_reduce
from parallel.data_parallel import Sharding, last_only, replicate, rest
from parallel.ledger import Account, total
from parallel.parameters import local_part
from parallel.replicas import check_alike, checksum
from plan.schedule import Schedule
from report import report
from text.dataset import EVAL_STREAM, Dataset, batch, is_prepared
from text.tokenizer import GPT2Tokenizer, Tokenizer
from tp_model import TensorParallelGPT
from train import checkpoint as training
from train import directory, dry_run, gradients
from train.checkpoint import Progress, Saved, Saver
from train.directory import BEGUN, METRICS, after_restart
from world import entry, peaks
from world.devices import pick_dtype
from world.mesh import World
from world.watch import STOPS

GPT2_VOCAB = 50304  # nanoGPT's table for GPT-2's 50257 tokens
ORPHANED = 1000  # beside the numbers of signals: the launcher is gone
CURVE_POINTS = 200  # iterations of which a report has the loss, at most
# options whose change on resume a user should hear of
SHAPES_THE_CURVE = {
    "dataset", "gradient_accumulation_steps", "batch_size", "block_size", "dropout", "learning_rate", "weight_decay", "beta1",
    "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "seed", "dtype", "sync",
}  # fmt: skip


def main(world: World, options: TrainOptions) -> None:
    if world.is_main:
        report.check_place(options.report, "report")
    dataset = Dataset(Path(options.data_dir) / options.dataset)
    wandb = start_wandb(options) if world.is_main and options.wandb_log else None
    with directory.writing(world, options):
        run_in(world, after_restart(world, options), dataset, wandb)


def run_in(world: World, options: TrainOptions, dataset: Dataset, wandb: Any = None) -> None:
    with explaining_memory(lambda: dry_run.need(plans(options), world.size)):
        run = prepare(world, options, dataset)
        if world.is_main and not options.eval_only:
            (run.out_dir / BEGUN).write_text(world.launch.run)
        begun = time.perf_counter()
        train(run, wandb)
        world.synchronize()
    seconds = time.perf_counter() - begun
    done = run.progress.tokens_seen - run.first.tokens_seen
    timing = {"train_s": seconds, "tokens": done, "tokens_per_s": done / seconds}
    more: dict[str, Any] = {"best_val_loss": run.progress.best_val_loss}
    if world.is_main and not options.eval_only:
        more["loss_curve"] = loss_curve(run.out_dir / METRICS) if options.report else {}
    made = report.build("train_tp", world, run.model, world.ledger.snapshot(), timing, seconds, **more)
    made["utilisation"] = used(run, seconds).figures(world)
    if world.is_main:
        print(report.account_table(made))
        what = "evaluation" if options.eval_only else "training"
        print(peaks.text(made["utilisation"], what, str(run.dtype)[6:]))
        if options.report:
            report.write(options.report, made)


def start_wandb(options: TrainOptions) -> Any:
    """wandb's run, begun before anything else is: UserError where it cannot be."""
    try:
        import wandb

        out_dir = Path(options.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        project, name, config = options.wandb_project, options.wandb_run_name, as_dict(options)
        return wandb.init(project=project, name=name, config=config, dir=out_dir)
    except ImportError:
        raise UserError("--wandb_log=True needs wandb: pip install wandb") from None
    except Exception as error:  # its own kinds: no login, no network, a wrong project
        why = printable((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise UserError(
            f"wandb does not start: {why} WANDB_MODE=offline keeps the run in {out_dir}/wandb, to be sent later."
        ) from error


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


# --- what a run is made of ------------------------------------------------------------------------------------------


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
    decay, rate = options.weight_decay, options.learning_rate
    optimizer = adamw(model.named_parameters(), decay, rate, betas, world.device.type)
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


def make_config(options: TrainOptions, dataset: Dataset | None, source: Described | None) -> GPTConfig:
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


def cut_metrics(metrics: Path, iter_num: int) -> None:
    """Leave the lines of iterations before iter_num. The others are the last ones, and only those are read: there may be
    millions. So is one that a kill has left half written."""
    with open(metrics, "a+b" if iter_num else "w+b") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            while end:
                start = text.rfind(b"\n", 0, end - 1) + 1
                if text[end - 1 : end] == b"\n" and 0 <= iteration_of(text[start:end]) < iter_num:
                    break
                end = start
        file.truncate(end)


def iteration_of(line: str | bytes) -> int:
    """Of a line of metrics.jsonl; -1 for one that is none, such as a kill leaves half written."""
    try:
        number = json.loads(line)["iter"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return number if type(number) is int else -1


def loss_curve(metrics: Path) -> dict[str, list[Any]]:
    """What a report has of metrics.jsonl: the loss at CURVE_POINTS iterations or fewer, spread evenly, and all evaluations'."""
    with open(metrics if metrics.is_file() else os.devnull, "rb") as lines:
        read = [json.loads(line) for line in lines if iteration_of(line) >= 0]
    trained = [line for line in read if "loss" in line]
    trained = trained[:: max(1, -(-len(trained) // CURVE_POINTS))]
    measured = [line for line in read if "val_loss" in line]
    return {
        "iter": [line["iter"] for line in trained],
        "loss": [line["loss"] for line in trained],
        "val_iter": [line["iter"] for line in measured],
        "val_loss": [line["val_loss"] for line in measured],
    }


# --- the loop -------------------------------------------------------------------------------------------------------


class Signals:
    """A signal that asks the run to end, as a wish that the loop looks at between two iterations. Whoever insists on Ctrl-C
    after 2 s is obeyed at once; torchrun passes the first one on a moment after the terminal did."""

    def __init__(self) -> None:
        self.asked, self._since, self._before = 0, 0.0, dict[int, Any]()

    def __enter__(self) -> "Signals":
        for number in (*STOPS, signal.SIGINT):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() > self._since + 2:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = number, time.monotonic()


def train(run: Run, wandb: Any = None) -> None:
    """Iterate until max_iters, evaluating and saving in between. Every rank does all of it; rank 0 prints and writes."""
    options, progress, world = run.options, run.progress, run.world
    log, saver = Log(run, wandb), Saver(world, run.out_dir, options.keep_last, options.async_save, run.replaces)
    log.say(run.describe())
    if options.eval_only:  # there is nothing to save: Ctrl-C ends it at once
        with world.ledger.during(f"step {progress.iter_num}, evaluation"):
            log.evaluation(progress.iter_num, evaluate(run, options.eval_iters))
        log.close()
        return
    with Signals() as signals:
        while True:
            iter_num = progress.iter_num
            last = iter_num >= options.max_iters
            between(run, log, saver, last)
            if last:
                break
            before, started = world.ledger.snapshot(), time.perf_counter()
            lr = learning_rate(options, iter_num)
            with world.ledger.during(f"step {iter_num}"):
                loss, grad_norm = iterate(run, lr)
                wish = signals.asked or log.asked or ORPHANED * world.orphaned
                asked, busy = agree(world, (wish, saver.busy))
            seconds = time.perf_counter() - started
            run.seconds.append(seconds)
            check_finite(run, {"": loss})
            progress.iter_num += 1
            progress.tokens_seen += run.tokens_per_iter
            log.iteration(iter_num, loss, lr, grad_norm, seconds, world.ledger.since(before))
            with world.ledger.during(f"step {iter_num}, save"):
                log.saved(saver.poll(not busy))
            if asked:
                keep(run, log, saver, measured=False)
                log.saved(saver.finish())
                log.close()
                raise stopped(run, asked)
        with world.ledger.during(f"step {progress.iter_num}, save"):
            log.saved(saver.finish())
    log.close()


def between(run: Run, log: "Log", saver: Saver, last: bool) -> None:
    """What is due between two iterations: an evaluation, a checkpoint. last: the second one does not come."""
    options, progress, iter_num = run.options, run.progress, run.progress.iter_num
    moved = iter_num > run.first.iter_num
    if iter_num % options.eval_interval == 0 or last:
        with run.world.ledger.during(f"step {iter_num}, evaluation"):
            losses = evaluate(run, options.eval_iters)
        log.evaluation(iter_num, losses)
        check_finite(run, losses)
        better = losses["val"] < progress.best_val_loss
        progress.best_val_loss = losses["val"] if better else progress.best_val_loss
        if moved and (better or options.always_save_checkpoint):
            keep(run, log, saver)
    elif options.save_interval and iter_num % options.save_interval == 0 and moved:
        keep(run, log, saver, measured=False)


def stopped(run: Run, asked: int) -> Stopped:
    """What a run says that was told to end."""
    at, kept = run.progress.iter_num, directory.last_good(run.out_dir)
    why = "the launcher is gone" if asked == ORPHANED else signal.Signals(asked).name
    saved = f"saved {kept}. --init_from=resume goes on from there."
    if kept is None or directory.iteration(kept) < at:
        saved = f"not saved; last good checkpoint: {kept or 'none'}."
    return Stopped(f"{why}: stopped after {at} iterations, {saved}", 128 + (signal.SIGTERM if asked == ORPHANED else asked))


def iterate(run: Run, lr: float) -> tuple[float, float]:
    """One AdamW step over the iteration's rows. Returns (mean loss, norm of the full gradient), equal on all ranks."""
    options, world, progress = run.options, run.world, run.progress
    check, batches = replicas_are_due(run), list[Tensor]()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    scale = progress.loss_scale if run.dtype == torch.float16 else 1.0
    total = torch.zeros((), device=world.device)
    for micro in range(run.layout.micro_steps):
        # replicated activations: one dropout mask across tp, another for each dp rank and micro-batch
        torch.manual_seed(stream_seed(options.seed, progress.iter_num, micro, world.dp.rank))
        x, y = next_batch(run, run.layout.micro(micro), progress.iter_num)
        if check:
            batches += [checksum(x), checksum(y)]
        model = last_only(run.wrapped, micro == run.layout.micro_steps - 1)
        with run.autocast():
            _, loss = model(x, y)
        loss = loss / run.layout.micro_steps
        total += loss.detach()
        with world.ledger.recomputing():  # what a sharded model gathers again is backward's
            (loss * scale).backward()
    total = all_reduce(total, world.dp.at("data_parallel"), "step") / world.dp.size
    gradients.sum_partial_gradients(run.model)
    norm = gradients.grad_norm(run.model).item() / scale
    if check:
        check_replicas(run, torch.stack(batches))
    take_step(run, norm, scale)
    return total.item(), norm


def replicas_are_due(run: Run) -> bool:
    every, iter_num = run.options.check_replicas, run.progress.iter_num
    return every > 0 and iter_num % every == 0 and iter_num > run.first.iter_num


def check_replicas(run: Run, batches: Tensor) -> None:
    """DriftError where ranks of a tp group have computed on different tokens, or ranks differ in a parameter they share."""
    world, rules, step = run.world, run.model.split.rules, run.progress.iter_num
    held_here = {name: local_part(p)[0] for name, p in run.model.named_parameters()}
    replicated = {name: tensor for name, tensor in held_here.items() if rules[name].dim is None}
    check_alike({"batch": batches, **replicated}, world.tp.at("optimizer"), "tp ranks", step)
    if run.model.sharding is None:
        check_alike(held_here, world.dp.at("data_parallel"), "dp ranks", step)


def agree(world: World, said: tuple[int, ...]) -> list[int]:
    """The largest that any rank says of each of these, on all ranks."""
    heard = torch.tensor(said, dtype=torch.float32, device=world.device)
    for axis, block in ((world.tp, "optimizer"), (world.dp, "data_parallel")):
        heard = all_reduce(heard, axis.at(block), "step", op="max")
    return [int(number) for number in heard.tolist()]


def take_step(run: Run, grad_norm: float, scale: float) -> None:
    """Clip, and update unless the gradient overflowed. All ranks hold the same norm, so all decide alike."""
    options, progress = run.options, run.progress
    clip = options.grad_clip / (grad_norm + 1e-6) if options.grad_clip else 1.0
    factor = min(clip, 1.0) / scale
    if math.isfinite(grad_norm):
        if factor != 1.0:
            gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        run.optimizer.step()
        progress.optimizer_steps += 1
        run.skipped = 0.0
    elif run.dtype != torch.float16 or progress.loss_scale < 1.0:  # else it may be the scale that is too large
        run.skipped = grad_norm
    if run.dtype == torch.float16:  # halve the loss's scale after an overflow, double it after 2000 good steps
        good = math.isfinite(grad_norm)
        double = good and progress.optimizer_steps % 2000 == 0
        progress.loss_scale *= 2.0 if double else 1.0 if good else 0.5
    run.optimizer.zero_grad(set_to_none=True)


def stream_seed(seed: int, step: int, micro: int, dp_rank: int) -> int:
    """A seed for torch's default stream, of its own for each micro-batch: nothing of it need be saved to resume."""
    mixed = seed
    for part in (step, micro, dp_rank):
        mixed = (mixed * 6364136223846793005 + 2 * part + 1442695040888963407) % 2**63
    return mixed


def next_batch(run: Run, rows: range, step: int, split: str = "train", stream: int = 0) -> tuple[Tensor, Tensor]:
    tokens = run.dataset.train if split == "train" else run.dataset.val
    config = run.model.config
    x, y = batch(tokens, rows, config.block_size, run.options.seed, step, stream, config.vocab_size)
    if run.world.device.type == "cuda":
        return x.pin_memory().to(run.world.device, non_blocking=True), y.pin_memory().to(run.world.device, non_blocking=True)
    return x, y


def learning_rate(options: TrainOptions, iter_num: int) -> float:
    """Linear warm-up, then half a cosine from learning_rate down to min_lr, then min_lr."""
    if not options.decay_lr:
        return options.learning_rate
    if iter_num < options.warmup_iters:
        return options.learning_rate * (iter_num + 1) / (options.warmup_iters + 1)
    if iter_num >= options.lr_decay_iters:
        return options.min_lr
    done = (iter_num - options.warmup_iters) / (options.lr_decay_iters - options.warmup_iters)
    return options.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (options.learning_rate - options.min_lr)


def check_finite(run: Run, losses: dict[str, float]) -> None:
    """UserError where one is no number: no checkpoint is written of such weights. losses: by what they are of, if anything."""
    for of, loss in losses.items():
        if not math.isfinite(loss):
            kept, what = directory.last_good(run.out_dir), f"{of} loss".strip()
            where = f"last good checkpoint: {kept}" if kept else "no checkpoint yet"
            raise UserError(
                f"{what} is {loss} at iteration {run.progress.iter_num}; {where}. Lower --learning_rate or use "
                f"--dtype=float32, then --init_from=resume."
            )


@torch.no_grad()
def evaluate(run: Run, iters: int) -> dict[str, float]:
    """Mean loss of each split over so many batches, always the same ones; dp ranks share the batches."""
    world, model, n = run.world, run.model, run.options.batch_size
    losses = {}
    model.eval()
    for split in ("train", "val"):
        total = torch.zeros((), device=world.device)
        for first in range(0, iters, world.dp.size):
            k = first + world.dp.rank
            counts = k < iters
            if not counts and not model.sharding:
                break
            x, y = next_batch(run, range(k * n, (k + 1) * n), 0, split, EVAL_STREAM)
            with run.autocast():
                _, loss = model(x, y)  # where parameters are sharded over dp, all of that axis take part in each pass
            total += loss if counts else 0.0
        total = all_reduce(total, world.dp.at("data_parallel"), "step")
        losses[split] = total.item() / iters
    model.train()
    rest(model)
    return losses


def keep(run: Run, log: "Log", saver: Saver, measured: bool = True) -> None:
    """Save weights whose loss is a number. measured: an evaluation has just said so; else a batch of each split does."""
    if not measured:
        with run.world.ledger.during(f"step {run.progress.iter_num}, save"):
            check_finite(run, evaluate(run, 1))
    if run.skipped:
        log.say(f"not saved at iteration {run.progress.iter_num}: the norm of the gradient is {run.skipped}")
    else:
        log.saved(save(run, saver))


def save(run: Run, saver: Saver) -> list[Saved]:
    with run.world.ledger.during(f"step {run.progress.iter_num}, save"):
        return saver.save(run.model, run.optimizer, run.progress, run.tokenizer.to_json(), as_dict(run.options))


# --- what a run says ------------------------------------------------------------------------------------------------


def used(run: Run, seconds: float) -> peaks.Use:
    """What the median iteration asked of the machine; the evaluation that took `seconds`, where there is
    no other."""
    options, size = run.options, run.model.config.block_size
    if run.seconds:
        rate = run.tokens_per_iter / median(run.seconds)
    else:
        rate = 2 * options.eval_iters * options.batch_size * size / seconds
    return peaks.Use(rate * peaks.operations(run.model.split, size, bool(run.seconds)), run.dtype)


class Log:
    """metrics.jsonl, the terminal and, if asked, wandb: the same numbers. Silent on every rank but 0."""

    def __init__(self, run: Run, wandb: Any = None):
        self.run, self.options, self.wandb = run, run.options, wandb
        self.on = run.world.is_main
        show = self.on and self.options.progress and sys.stderr.isatty() and not self.options.eval_only
        self.bar = tqdm(total=self.options.max_iters, initial=run.progress.iter_num, desc="train", unit="it", disable=not show)
        self.losses: dict[str, float] = {}
        self.asked = 0  # SIGPIPE where nobody reads any more
        self.path = run.out_dir / METRICS if self.on and not self.options.eval_only else None

    def say(self, line: str) -> None:
        if self.on:
            self.bar.clear()
            try:
                print(line, flush=True)
            except ReaderGone:
                self.asked = signal.SIGPIPE
            except OSError as error:
                self.do_without(error)
            self.bar.refresh()

    def do_without(self, error: OSError) -> None:
        """A file of words about the run cannot be written: that is no reason to end it."""
        print(f"train_tp.py: {error.strerror}: {error.filename}. Training goes on without it.", file=sys.stderr, flush=True)

    def iteration(self, iter_num: int, loss: float, lr: float, grad_norm: float, seconds: float, account: Account) -> None:
        if not self.on:
            return
        rate = self.run.tokens_per_iter / seconds
        calls = all_reduces_per_layer(account, self.run)
        fraction = sum(tally.seconds for tally in account.values()) / seconds
        line = {
            "iter": iter_num,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": round(rate, 1),
            "all_reduce_per_layer": calls,
            "comm_fraction": round(fraction, 4),
        }
        if self.losses:
            line |= {"train_loss": self.losses["train"], "val_loss": self.losses["val"]}
            self.losses = {}
        self.write(line)
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if iter_num % self.options.log_interval == 0:
            self.say(
                f"iter {iter_num}: loss {loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.3f}, {rate:,.0f} tokens/s, "
                f"{fraction:.0%} in collectives"
            )

    def evaluation(self, iter_num: int, losses: dict[str, float]) -> None:
        self.losses = losses
        self.say(
            f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f} "
            f"(perplexity {math.exp(min(losses['val'], 700)):.2f})"
        )

    def saved(self, saves: list[Saved]) -> None:
        for made in saves:
            beside = f", written in {made.seconds:.1f} s beside it" if self.options.async_save else ""
            self.say(f"saved {made.path} ({made.stall:.2f} s{beside})")

    def write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            try:
                with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.path = None
                self.do_without(error)
        if self.wandb is not None:
            self.wandb.log({key: value for key, value in line.items() if key != "iter"}, step=line["iter"])

    def close(self) -> None:
        if self.losses:
            self.write({"iter": self.run.progress.iter_num, "train_loss": self.losses["train"], "val_loss": self.losses["val"]})
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


def all_reduces_per_layer(account: Account, run: Run) -> dict[str, float]:
    """All-reduces that one layer makes in a micro-batch's forward and backward pass."""
    inside = {entry: tally for entry, tally in account.items() if entry.layer is not None and entry.op == "all_reduce"}
    passes = run.model.config.n_layer * run.layout.micro_steps
    return {direction: total(inside, direction=direction).calls / passes for direction in ("forward", "backward")}


def command() -> tuple[entry.Main, TrainOptions]:
    """What the command line asks for. A dry run is done and ends here, before there is a world."""
    options = parse(TrainOptions, sys.argv[1:], "train_tp.py", entry.say_once)
    if options.dry_run:
        raise SystemExit(dry_run.show(plans(options)))
    return main, options


if __name__ == "__main__":
    entry.run_parsed(command, "train_tp.py")

"""The loop of a training run: iterations, evaluations, saves."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from cli.options import TrainOptions
from parallel.collectives import Axis, all_reduce
from parallel.data_parallel import last_only, rest
from parallel.parameters import local_part
from parallel.replicas import check_alike, checksum, make_alike
from plan.stages import TABLE
from text.dataset import EVAL_STREAM, batch
from train import directory, gradients
from train.checkpoint import Saver
from train.log import Log
from train.setup import Run
from train.signals import Signals, stopped
from world.mesh import World


def train(run: Run, wandb: Any = None) -> None:
    """Iterate until max_iters, evaluate and save in between. Raises Stopped after a signal."""
    options, progress, ledger = run.options, run.progress, run.world.ledger
    log, saver = Log(run, wandb), Saver(run, run.out_dir, options.async_save)
    log.print(run.describe())
    if options.eval_only:  # nothing to save: Ctrl-C ends it at once
        with ledger.during(f"step {progress.iter_num}, evaluation"):
            log.evaluation(progress.iter_num, evaluate(run, options.eval_iters))
        return log.close()
    asked, last = 0, False
    with Signals() as signals:
        while not asked and not last:
            last = progress.iter_num >= options.max_iters
            between(run, log, saver, last)
            asked = 0 if last else step(run, log, saver, signals)
        if asked:
            keep(run, log, saver, measured=False)
        with ledger.during(f"step {progress.iter_num}, save"):
            log.saved(saver.finish())
        log.close()
        if asked:
            raise stopped(run, asked)


def step(run: Run, log: Log, saver: Saver, signals: Signals) -> int:
    """One iteration, with local steps all up to the next averaging, and their lines in the log.
    Returns the signal that any rank has got, or 0."""
    world, progress, numbers, lines = run.world, run.progress, list[Any](), list[Any]()
    ask = lambda: (signals.number(log.asked, world.orphaned), saver.busy)  # noqa: E731
    while not lines or not run.averaged:
        at, before, started = progress.iter_num, world.ledger.snapshot(), time.perf_counter()
        lr = learning_rate(run.options, at)
        with world.ledger.during(f"step {at}"):
            numbers.append([*iterate(run, lr, ask), run.skipped])
            progress.iter_num += 1
            if run.local and run.averaged:
                numbers = run.local.agree(numbers)
                run.local.average()
        run.seconds.append(time.perf_counter() - started)
        lines.append((at, lr, run.seconds[-1], world.ledger.since(before)))
    progress.tokens_seen += run.tokens_per_iter * len(lines)
    for (at, lr, seconds, account), (loss, norm, *_) in zip(lines, numbers, strict=True):
        check_finite(run, {"": loss}, at)
        log.iteration(at, loss, lr, norm, account, seconds)
    *_, asked, busy, run.skipped = numbers[-1]
    with world.ledger.during(f"step {at}, save"):
        log.saved(saver.poll(not busy))
    return int(asked)


def between(run: Run, log: Log, saver: Saver, last: bool) -> None:
    """Evaluate and save if either is due before the next iteration. last: there is none."""
    options, progress, iter_num = run.options, run.progress, run.progress.iter_num
    moved = iter_num > run.first.iter_num
    if run.due(options.eval_interval) or last:
        with run.world.ledger.during(f"step {iter_num}, evaluation"):
            losses = evaluate(run, options.eval_iters)
        log.evaluation(iter_num, losses)
        check_finite(run, losses, iter_num)
        better = losses["val"] < progress.best_val_loss
        progress.best_val_loss = min(losses["val"], progress.best_val_loss)
        if moved and (better or options.always_save_checkpoint):
            keep(run, log, saver)
    elif run.due(options.save_interval) and moved:
        keep(run, log, saver, measured=False)


def iterate(run: Run, lr: float, ask: Callable[[], tuple[int, ...]] = tuple) -> tuple[Any, ...]:
    """One AdamW step. Returns (mean loss, norm of the full gradient, the largest answers of any
    rank to `ask`), equal on all ranks, with local steps on those of a dp group. The host waits for
    the device once, at the end."""
    options, world, iter_num = run.options, run.world, run.progress.iter_num
    check = run.due(options.check_replicas) and iter_num > run.first.iter_num
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    scale = run.progress.loss_scale if run.dtype == torch.float16 else 1.0
    total, batches = (accumulate if run.pipeline is None else pipelined)(run, scale)
    total = all_reduce(total, run.dp.at("data_parallel"), "step") / run.dp.size
    gradients.sum_partial_gradients(run.model)
    make_alike(run.model, run.dp)
    grad_norm = gradients.grad_norm(run.model, world.pp) / scale
    if check:
        check_replicas(run, torch.stack([checksum(batch) for batch in batches]))
    take_step(run, grad_norm, scale)
    numbers = torch.stack([total, grad_norm])
    if mine := ask():
        numbers = torch.cat([numbers, agreed(world, mine, run.dp)])
    mean, norm, *answers = numbers.tolist()
    note_step(run, norm)
    return mean, norm, *map(int, answers)


def seed_of(run: Run, micro: int, stage: int = 0) -> int:
    """Replicated activations: one dropout mask across tp, others for each dp rank, micro-batch and
    pipeline stage."""
    place = run.world.dp.rank + stage * run.world.dp.size
    return stream_seed(run.options.seed, run.progress.iter_num, micro, place)


def accumulate(run: Run, scale: float) -> tuple[Tensor, list[Tensor]]:
    """Gradients of an iteration, micro-batch by micro-batch. Returns (mean loss, token ids)."""
    total, batches = torch.zeros((), device=run.world.device), list[Tensor]()
    for micro in range(run.rows.micro_steps):
        torch.manual_seed(seed_of(run, micro))
        x, y = next_batch(run, run.rows.micro(micro), run.progress.iter_num)
        batches += [x, y]
        model = last_only(run.wrapped, micro == run.rows.micro_steps - 1)
        with run.autocast():
            _, loss = model(x, y)
        loss = loss / run.rows.micro_steps
        total += loss.detach()
        with run.world.ledger.recomputing():  # a sharded model gathers again in the backward pass
            (loss * scale).backward()
    return total, batches


def pipelined(run: Run, scale: float) -> tuple[Tensor, list[Tensor]]:
    """The same, all micro-batches at once, through the stages of a pipeline."""
    rows = range(run.rows.micro(0).start, run.rows.micro(run.rows.micro_steps - 1).stop)
    x, y = next_batch(run, rows, run.progress.iter_num)
    losses = run.pipeline.train(x, y, scale, partial(seed_of, run))
    return losses.mean(), [x, y]


def check_replicas(run: Run, batches: Tensor) -> None:
    """DriftError if a tp group computed on different tokens, or a shared parameter differs."""
    world, rules, iter_num = run.world, run.model.split.rules, run.progress.iter_num
    mine = {name: local_part(p)[0] for name, p in run.model.named_parameters()}
    shared = {name: tensor for name, tensor in mine.items() if rules[name].dim is None}
    check_alike({"batch": batches, **shared}, world.tp.at("optimizer"), "tp ranks", iter_num)
    if run.model.stages.shares_table:
        check_alike({TABLE: mine[TABLE]}, world.ends.at("optimizer"), "stages", iter_num)
    if run.model.sharding is None:
        check_alike(mine, world.dp.at("data_parallel"), "dp ranks", iter_num)


def agree(world: World, numbers: tuple[int, ...]) -> list[int]:
    """The maximum over all ranks of each number."""
    return [int(number) for number in agreed(world, numbers, world.dp).tolist()]


def agreed(world: World, numbers: tuple[int, ...], dp: Axis) -> Tensor:
    most = on_device(world, torch.tensor(numbers, dtype=torch.float32))
    for axis in (world.tp.at("optimizer"), world.pp.at("optimizer"), dp.at("data_parallel")):
        most = all_reduce(most, axis, "step", op="max")
    return most


def take_step(run: Run, grad_norm: Tensor, scale: float) -> None:
    """Clip and update on the device, unless the gradient overflowed: all ranks have the same norm.
    A fused optimizer divides by grad_scale and skips its step where found_inf is 1."""
    optimizer, most = run.optimizer, run.options.grad_clip
    clip = (most / (grad_norm + 1e-6)).clamp(max=1.0) if most else torch.ones_like(grad_norm)
    vars(optimizer).update(grad_scale=scale / clip, found_inf=1.0 - grad_norm.isfinite().float())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def note_step(run: Run, grad_norm: float) -> None:
    """Count a step that was taken, and set the next one's scale."""
    progress, half, good = run.progress, run.dtype == torch.float16, math.isfinite(grad_norm)
    if good:
        progress.optimizer_steps += 1
        run.skipped = 0.0
    elif not half or progress.loss_scale < 1.0:  # otherwise the scale may be too large
        run.skipped = grad_norm
    if half:  # halve the loss's scale after an overflow, double it after 2000 good steps
        double = good and progress.optimizer_steps % 2000 == 0
        progress.loss_scale *= 2.0 if double else 1.0 if good else 0.5


def stream_seed(seed: int, step: int, micro: int, dp_rank: int) -> int:
    """A seed of torch's default stream for each micro-batch: a resumed run needs no saved state."""
    for part in (step, micro, dp_rank):
        seed = (seed * 6364136223846793005 + 2 * part + 1442695040888963407) % 2**63
    return seed


def next_batch(
    run: Run, rows: range, step: int, split: str = "train", stream: int = 0
) -> tuple[Tensor, Tensor]:
    tokens, seed, c = getattr(run.dataset, split), run.options.seed, run.model.config
    x, y = batch(tokens, rows, c.block_size, seed, step, stream, c.vocab_size)
    return on_device(run.world, x), on_device(run.world, y)


def on_device(world: World, x: Tensor) -> Tensor:
    """x from the host's memory, without waiting for a GPU."""
    gpu = world.device.type == "cuda"
    return x.pin_memory().to(world.device, non_blocking=True) if gpu else x


def learning_rate(options: TrainOptions, iter_num: int) -> float:
    """Linear warm-up, then half a cosine from learning_rate down to min_lr, then min_lr."""
    if not options.decay_lr:
        return options.learning_rate
    if iter_num < options.warmup_iters:
        return options.learning_rate * (iter_num + 1) / (options.warmup_iters + 1)
    if iter_num >= options.lr_decay_iters:
        return options.min_lr
    done = (iter_num - options.warmup_iters) / (options.lr_decay_iters - options.warmup_iters)
    height = options.learning_rate - options.min_lr
    return options.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * height


def check_finite(run: Run, losses: dict[str, float], at: int) -> None:
    """UserError if a loss is not a number, before a checkpoint is written. Keys: the splits."""
    for split, loss in losses.items():
        if not math.isfinite(loss):
            kept = directory.last_good(run.out_dir)
            where = f"last good checkpoint: {kept}" if kept else "no checkpoint yet"
            fault = f"{f'{split} loss'.strip()} is {loss} at iteration {at}; {where}"
            advice = "Lower --learning_rate or use --dtype=float32, then --init_from=resume."
            raise UserError(f"{fault}. {advice}")


@torch.no_grad()
def evaluate(run: Run, iters: int) -> dict[str, float]:
    """Mean loss of each split over the same `iters` batches, which dp ranks share."""
    world, model, n = run.world, run.model, run.options.batch_size
    losses, many = {}, run.pipeline.eval_count if run.pipeline else 1  # batches at a time
    model.eval()
    for split in ("train", "val"):
        total = torch.zeros((), device=world.device)
        for k in range(world.dp.rank * many, iters + world.dp.rank * many, world.dp.size * many):
            count = max(0, min(iters - k, many))
            if not count and not model.sharding:  # a sharded pass needs all ranks of the axis
                break
            x, y = next_batch(run, range(k * n, (k + many) * n), 0, split, EVAL_STREAM)
            if run.pipeline:
                total += run.pipeline.losses(x, y)[:count].sum()
                continue
            with run.autocast():
                _, loss = model(x, y)
            total += loss if count else 0.0
        total = all_reduce(total, world.dp.at("data_parallel"), "step")
        losses[split] = total.item() / iters
    model.train()
    rest(model)
    return losses


def keep(run: Run, log: Log, saver: Saver, measured: bool = True) -> None:
    """Save, unless the last gradient was not finite. If no evaluation has just measured the loss,
    one batch of each split is checked first."""
    at = run.progress.iter_num
    with run.world.ledger.during(f"step {at}, save"):
        if not measured:
            check_finite(run, evaluate(run, 1), at)
        if run.skipped:
            log.print(f"not saved at iteration {at}: the norm of the gradient is {run.skipped}")
        else:
            log.saved(saver.save())

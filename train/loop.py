"""The loop of a training run: iterations, evaluations, saves, signals."""

import math
import signal
import time
from typing import Any

import torch
from torch import Tensor

from base.errors import Stopped, UserError
from cli.options import TrainOptions, as_dict
from parallel.collectives import all_reduce
from parallel.data_parallel import last_only, rest
from parallel.replicas import check_alike, checksum
from text.dataset import EVAL_STREAM, batch
from tp_model import held
from train import directory
from train.checkpoint import Saved, Saver
from train.log import Log
from train.setup import Run
from world.mesh import World
from world.watch import STOPS

ORPHANED = 1000  # beside the numbers of signals: the launcher is gone


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


def between(run: Run, log: Log, saver: Saver, last: bool) -> None:
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
    run.model.sum_partial_gradients()
    grad_norm = run.model.grad_norm().item() / scale
    if check:
        check_replicas(run, torch.stack(batches))
    take_step(run, grad_norm, scale)
    return total.item(), grad_norm


def replicas_are_due(run: Run) -> bool:
    every, iter_num = run.options.check_replicas, run.progress.iter_num
    return every > 0 and iter_num % every == 0 and iter_num > run.first.iter_num


def check_replicas(run: Run, batches: Tensor) -> None:
    """DriftError where ranks of a tp group have computed on different tokens, or ranks differ in a parameter they share."""
    world, rules, step = run.world, run.model.split.rules, run.progress.iter_num
    held_here = {name: held(p)[0] for name, p in run.model.named_parameters()}
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


def keep(run: Run, log: Log, saver: Saver, measured: bool = True) -> None:
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

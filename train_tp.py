"""Train a GPT on N ranks, from scratch, pretrained weights or a checkpoint. dp = world size / tp.

    torchrun --standalone --nproc_per_node=4 train_tp.py configs/train_gpt2.py --tp=2
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import base.quick_start  # noqa: F401
from base.errors import explaining_memory
from cli.grammar import parse
from cli.options import TrainOptions
from report import report
from text.dataset import Dataset
from train import directory, dry_run
from train.directory import BEGUN, METRICS, after_restart, loss_curve
from train.log import start_wandb
from train.loop import train
from train.setup import Run, prepare
from world import entry, peaks
from world.mesh import World


def main(world: World, options: TrainOptions) -> None:
    if world.is_main:
        report.check_place(options.report, "report")
    dataset = Dataset(Path(options.data_dir) / options.dataset)
    wandb = start_wandb(options) if world.is_main and options.wandb_log else None
    with directory.writing(world, options):
        options = after_restart(world, options)
        with explaining_memory(lambda: dry_run.need(options, world.size)):
            run = prepare(world, options, dataset)
            if world.is_main and not options.eval_only:
                (run.out_dir / BEGUN).write_text(world.launch.run)
            began = time.perf_counter()
            train(run, wandb)
            world.synchronize()
        finish(run, time.perf_counter() - began)


def finish(run: Run, seconds: float) -> None:
    """Print the account of the run, and write its report."""
    world, options, size = run.world, run.options, run.model.config.block_size
    done = run.progress.tokens_seen - run.first.tokens_seen
    timing = {"train_s": seconds, "tokens": done, "tokens_per_s": done / seconds}
    more: dict[str, Any] = {"best_val_loss": run.progress.best_val_loss}
    if world.is_main and not options.eval_only:
        more["loss_curve"] = loss_curve(run.out_dir / METRICS) if options.report else {}
    account = world.ledger.snapshot()
    made = report.build("train_tp", world, run.model, account, timing, seconds, **more)
    rate = 2 * options.eval_iters * options.batch_size * size / seconds  # tokens of an evaluation
    if run.seconds:
        rate = run.tokens_per_iter / median(run.seconds)
    operations = rate * peaks.operations(run.model.split, size, bool(run.seconds))
    made["utilisation"] = peaks.Use(operations, run.dtype).figures(world)
    if world.is_main:
        print(report.account_table(made))
        what = "evaluation" if options.eval_only else "training"
        print(peaks.text(made["utilisation"], what, str(run.dtype)[6:]))
        if options.report:
            report.write(options.report, made)


def command() -> tuple[entry.Main, TrainOptions]:
    """main and its options; a dry run ends here, before there is a world."""
    options = parse(TrainOptions, sys.argv[1:], "train_tp.py", entry.say_once)
    if options.dry_run:
        raise SystemExit(dry_run.show(options))
    return main, options


if __name__ == "__main__":
    entry.run_parsed(command, "train_tp.py")

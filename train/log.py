"""The log of a training run: on the terminal, in metrics.jsonl, to wandb."""

import json
import math
import signal
from pathlib import Path
from typing import Any

from tqdm import tqdm

from base.errors import ReaderGone, UserError, first_line, print_error, printable
from base.files import naming
from cli.options import TrainOptions, as_dict
from parallel.ledger import Account, total
from train.checkpoint import Saved
from train.directory import METRICS
from train.setup import Run
from world import peaks

# the names that nanoGPT gives to figures in wandb
NANOGPTS = {"iter": "iter", "train_loss": "train/loss", "val_loss": "val/loss", "lr": "lr"}

A100 = 312e12  # operations a second, of which nanoGPT's mfu is the share in percent


class Log:
    """Writes the same numbers to metrics.jsonl, the terminal and wandb. Only rank 0 writes.
    asked: SIGPIPE after standard output has lost its reader, else 0."""

    def __init__(self, run: Run, wandb: Any = None):
        self.run, self.options, self.wandb, self.asked = run, run.options, wandb, 0
        self.on = run.world.is_main
        trains = self.on and not self.options.eval_only
        self.bar = tqdm(
            total=self.options.max_iters, initial=run.progress.iter_num, desc="train", unit="it",
            # None: unless standard error is a terminal
            disable=None if trains and self.options.progress else True,
        )  # fmt: skip
        self.operations = 0.0  # a second, in the last iteration
        self.losses: dict[str, float] = {}  # of an evaluation, for the next line
        self.path = run.out_dir / METRICS if trains else None

    def print(self, line: str) -> None:
        if self.on:
            self.bar.clear()
            try:
                print(line, flush=True)
            except ReaderGone:
                self.asked = signal.SIGPIPE
            except OSError as error:
                self.warn(error)
            self.bar.refresh()

    def warn(self, error: OSError) -> None:
        """A log that cannot be written does not end the run."""
        fault = f"{error.strerror}: {error.filename}"
        print_error(f"train_tp.py: {fault}. Training goes on without it.")

    def iteration(self, at: int, loss: float, lr: float, norm: float, account: Account,
                  seconds: float) -> None:
        if not self.on:
            return
        run, ways = self.run, ("forward", "backward")
        rate, fraction = run.tokens_per_iter / seconds, total(account).seconds / seconds
        size = run.model.config.block_size
        self.operations = rate * peaks.operations(run.model.split, size, backward=True)
        own = sum(block is not None for block in run.model.blocks)  # layers of this rank's stages
        passes = own * run.rows.micro_steps  # of one layer
        layers = {entry: tally for entry, tally in account.items() if entry.layer is not None}
        calls = {way: total(layers, direction=way, op="all_reduce").calls for way in ways}
        self.write({
            "iter": at, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": round(rate, 1),
            "all_reduce_per_layer": {way: calls[way] / passes for way in ways},
            "comm_fraction": round(fraction, 4),
        })  # fmt: skip
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if at % self.options.log_interval == 0:
            line = f"iter {at}: loss {loss:.4f}, lr {lr:.2e}, grad norm {norm:.3f}, "
            self.print(f"{line}{rate:,.0f} tokens/s, {fraction:.0%} in collectives")

    def evaluation(self, at: int, losses: dict[str, float]) -> None:
        self.losses = {f"{split}_loss": loss for split, loss in losses.items()}
        line = f"step {at}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f} "
        self.print(f"{line}(perplexity {math.exp(min(losses['val'], 700)):.2f})")

    def saved(self, saves: list[Saved]) -> None:
        for save in saves:
            beside = f", written in {save.seconds:.1f} s beside it" * self.options.async_save
            self.print(f"saved {save.path} ({save.stall:.2f} s{beside})")

    def write(self, line: dict[str, Any]) -> None:
        """Append to metrics.jsonl; with the losses of an evaluation that no line has had."""
        line, self.losses = line | self.losses, {}
        if self.path is not None:
            try:
                with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.path = None
                self.warn(error)
        if self.wandb is not None:
            nanogpts = {NANOGPTS[key]: line[key] for key in NANOGPTS.keys() & line.keys()}
            nanogpts["mfu"] = 100 * self.operations / A100
            self.wandb.log(line | nanogpts, step=line.pop("iter"))

    def close(self) -> None:
        if self.losses:
            self.write({"iter": self.run.progress.iter_num})
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(options: TrainOptions) -> Any:
    """wandb's run. UserError if wandb is missing or does not start."""
    try:
        import wandb

        out_dir = Path(options.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        project, name, config = options.wandb_project, options.wandb_run_name, as_dict(options)
        return wandb.init(project=project, name=name, config=config, dir=out_dir)
    except ImportError:
        raise UserError("--wandb_log=True needs wandb: pip install wandb") from None
    except Exception as error:  # wandb's own kinds: no login, no network, a wrong project
        kept = f"keeps the run in {out_dir}/wandb, to be sent later."
        fault = f"wandb does not start: {printable(first_line(error), 200)}"
        raise UserError(f"{fault} WANDB_MODE=offline {kept}") from error

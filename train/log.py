"""What a training run says: on the terminal, in metrics.jsonl, to wandb."""

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from base.errors import ReaderGone, UserError, printable
from base.files import naming
from cli.options import TrainOptions, as_dict
from parallel.ledger import Account, total
from train.checkpoint import Saved
from train.directory import METRICS
from train.setup import Run


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

"""Exact loss and perplexity of a text: every token after the first is predicted once.

    torchrun --standalone --nproc_per_node=2 eval_tp.py --init_from=shards/gpt2-tp2 --text=book.txt
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from base.errors import UserError, explaining_memory
from base.files import read_text
from checkpoints.sources import Source, common_tokenizer, identity, open_for_inference, tokenizer_of
from cli.options import EvalOptions
from parallel.loss import vocab_parallel_cross_entropy
from report import report
from sample_tp import load, need
from text.dataset import Dataset
from tp_model import TensorParallelGPT
from world import peaks
from world.entry import run
from world.mesh import World

HEAD_ROWS = 1024


def main(world: World, options: EvalOptions) -> None:
    started = time.perf_counter()
    if world.is_main:
        report.check_place(options.report, "report")
    if bool(options.text) == bool(options.dataset):
        raise UserError("give what to measure: either --text=FILE or --dataset=NAME.")
    source = open_for_inference(options, (world.rank, world.size))
    world.agree("weights", identity(source))
    tokens, n_bytes = read_tokens(source, options)
    stride = options.stride or source.config.block_size
    if stride > source.config.block_size:
        raise UserError(f"--stride={stride} is more than block_size={source.config.block_size}: tokens would be left out.")
    with explaining_memory(lambda: need(world, source, options)):
        model = load(world, source, options)
    world.synchronize()
    load_s = time.perf_counter() - started
    started = time.perf_counter()
    with world.ledger.during("evaluation"), explaining_memory(lambda: need(world, source, options)):
        total, count = measure(model, tokens, stride, options.batch_size, show=world.is_main and sys.stderr.isatty())
    seconds = time.perf_counter() - started
    timing = {"load_s": load_s, "eval_s": seconds, "tokens_per_s": count / seconds}
    evaluation = figures(total, count, stride, n_bytes)
    made = report.build("eval_tp", world, model, world.ledger.snapshot(), timing, seconds, evaluation=evaluation)
    made["utilisation"] = used(model, len(tokens), stride, seconds).figures(world)
    if world.is_main:
        print(report.account_table(made), file=sys.stderr)
        shown = (f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value:,}" for key, value in evaluation.items())
        print(", ".join(shown))
        print(peaks.text(made["utilisation"], "evaluation", made["dtype"]), file=sys.stderr)
        if options.report:
            report.write(options.report, made)


def read_tokens(source: Source, options: EvalOptions) -> tuple[Tensor, int]:
    """The ids to measure, int64, and how many bytes of text the predicted ones stand for (0 if not known).

    Text is a document: "<|endoftext|>" written in it is text like any other, as where training data is prepared.
    """
    vocab_size, most = source.config.vocab_size, options.max_tokens or sys.maxsize
    n_bytes = 0
    if options.dataset:
        dataset = Dataset(Path(options.data_dir) / options.dataset)
        if not options.tokenizer:
            common_tokenizer(source, dataset, options.data_dir)
        dataset.check(1, vocab_size)
        file = dataset.train if options.split == "train" else dataset.val
        ids = torch.from_numpy(file[: min(most, len(file))].astype("int64"))
    else:
        tokenizer = tokenizer_of(source, options.tokenizer, options.data_dir)
        encoded = tokenizer.encode_ordinary(read_text(options.text))[:most]
        n_bytes = len(tokenizer.decode_bytes(encoded[1:]))
        ids = torch.tensor(encoded, dtype=torch.int64)
    what = options.text or options.dataset
    if len(ids) < 2:
        raise UserError(f"{what} has {len(ids)} tokens: at least 2 are needed to predict one.")
    if ids.max() >= vocab_size:
        raise UserError(f"{what} has token id {ids.max()}, the model's vocab_size is {vocab_size}: not its tokenizer?")
    return ids, n_bytes


def figures(total: float, count: int, stride: int, n_bytes: int) -> dict[str, float]:
    """What is reported of `count` tokens whose negative log-likelihoods add up to `total` nats."""
    loss = total / count
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss}: the model's weights are damaged, or too large for this precision (try --dtype=float32)."
        )
    evaluation = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": count, "stride": stride}
    return evaluation | ({"bits_per_byte": total / math.log(2) / n_bytes} if n_bytes else {})


def used(model: TensorParallelGPT, n: int, stride: int, seconds: float) -> peaks.Use:
    """What forward passes over n tokens asked of the machine."""
    lengths = [stop - start for start, stop, _ in windows(n, model.config.block_size, stride)]
    operations = sum(length * peaks.operations(model.split, length, False) for length in lengths)
    return peaks.Use(operations / seconds, next(model.parameters()).dtype)


def windows(n: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first): inputs are tokens [start, stop), and targets count from position `first` of the window on.

    Target i is token start + i + 1. Each of the tokens 1 ... n - 1 counts in exactly one window; from the second window
    on, each has at least block_size - stride tokens before it.
    """
    counted = 0  # targets so far: tokens 1 ... counted
    start = 0
    while counted < n - 1:
        stop = min(start + block_size, n - 1)
        yield start, stop, counted - start
        counted = stop
        start += stride


@torch.inference_mode()
def measure(model: TensorParallelGPT, tokens: Tensor, stride: int, batch_size: int, show: bool = False) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of tokens[1:] (nats, added up in float64) and their number."""
    every = list(windows(len(tokens), model.config.block_size, stride))
    total, count = 0.0, 0
    for i in tqdm(range(0, len(every), batch_size), desc="eval", unit="batch", disable=not show):
        idx, targets = fill(tokens, every[i : i + batch_size])
        counts = targets >= 0
        hidden = model.hidden(idx.to(model.device))[counts.to(model.device)]  # [n, C]: only what counts goes through the head
        total += summed_losses(model, hidden, targets[counts].to(model.device))
        count += int(counts.sum())
    return total, count


def fill(tokens: Tensor, batch: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64 of these windows; a target of -1 does not count. Padding is at the end of a row,
    where causal attention never looks back from."""
    width = max(stop - start for start, stop, _ in batch)
    idx = torch.zeros(len(batch), width, dtype=torch.int64)
    targets = torch.full((len(batch), width), -1, dtype=torch.int64)
    for row, (start, stop, first) in enumerate(batch):
        idx[row, : stop - start] = tokens[start:stop]
        targets[row, first : stop - start] = tokens[start + 1 + first : stop + 1]
    return idx, targets


def summed_losses(model: TensorParallelGPT, hidden: Tensor, targets: Tensor) -> float:
    """Sum of the losses of targets [n] after hidden states [n, C]. Logits exist for HEAD_ROWS of them at a time: those
    of a whole batch would be larger than the model."""
    losses = [
        vocab_parallel_cross_entropy(model.local_logits(x), y, model.vocab_lo, model.tp).double().sum()
        for x, y in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    ]
    return float(torch.stack(losses).sum())


if __name__ == "__main__":
    run(EvalOptions, main, "eval_tp.py")

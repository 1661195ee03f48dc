"""Exact loss and perplexity of a text: every token after the first is predicted once.

    torchrun --standalone --nproc_per_node=2 eval_tp.py --init_from=shards/gpt2-tp2 --text=book.txt
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import report
from checkpoints.sources import Source, open_source, tokenizer_of
from entry import run
from errors import UserError
from options import EvalOptions
from parallel.mesh import World
from sample_tp import load
from text.dataset import Dataset
from text.files import read_text
from tp_model import TensorParallelGPT


def main(world: World, options: EvalOptions) -> None:
    started = time.perf_counter()
    report.check_report(options.report)
    if bool(options.text) == bool(options.dataset):
        raise UserError("give what to measure: either --text=FILE or --dataset=NAME.")
    source = open_source(options.out_dir if options.init_from == "resume" else options.init_from, (world.rank, world.size))
    tokens, n_bytes = read_tokens(source, options)
    stride = options.stride or source.config.block_size
    if stride > source.config.block_size:
        raise UserError(f"--stride={stride} is more than block_size={source.config.block_size}: tokens would be left out.")
    model = load(world, source, options)
    load_s = time.perf_counter() - started
    started = time.perf_counter()
    total, count = measure(model, tokens, stride, options.batch_size, show=world.is_main and sys.stderr.isatty())
    world.synchronize()
    seconds = time.perf_counter() - started
    loss = total / count
    evaluation = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": count, "stride": stride}
    if n_bytes:
        evaluation["bits_per_byte"] = total / math.log(2) / n_bytes
    timing = {"load_s": load_s, "eval_s": seconds, "tokens_per_s": count / seconds}
    made = report.build("eval_tp", world, model, world.ledger.snapshot(), timing, seconds, evaluation=evaluation)
    if world.is_main:
        print(report.account_table(made), file=sys.stderr)
        print(", ".join(f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value:,}" for key, value in evaluation.items()))
        if options.report:
            report.write(options.report, made)


def read_tokens(source: Source, options: EvalOptions) -> tuple[torch.Tensor, int]:
    """The ids to measure, int64, and how many bytes of text the predicted ones stand for (0 if not known)."""
    vocab_size, most = source.config.vocab_size, options.max_tokens or sys.maxsize
    n_bytes = 0
    if options.dataset:
        dataset = Dataset(Path(options.data_dir) / options.dataset)
        dataset.check(1, vocab_size)
        file = dataset.train if options.split == "train" else dataset.val
        ids = torch.from_numpy(file[: min(most, len(file))].astype("int64"))
    else:
        tokenizer = tokenizer_of(source, options.tokenizer)
        encoded = tokenizer.encode(read_text(options.text))[:most]
        n_bytes = len(tokenizer.decode_bytes(encoded[1:]))
        ids = torch.tensor(encoded, dtype=torch.int64)
    if len(ids) < 2:
        raise UserError(f"{options.text or options.dataset} has {len(ids)} tokens: at least 2 are needed to predict one.")
    return ids, n_bytes


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
def measure(model: TensorParallelGPT, tokens: torch.Tensor, stride: int, batch_size: int, show: bool = False) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of tokens[1:] (nats, added up in float64) and their number."""
    n, size = len(tokens), model.config.block_size
    device = model.device
    total, count = 0.0, 0
    every = list(windows(n, size, stride))
    width = min(size, n - 1)
    for i in tqdm(range(0, len(every), batch_size), desc="eval", unit="batch", disable=not show):
        batch = every[i : i + batch_size]
        idx = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.full((len(batch), width), -1, dtype=torch.int64)
        for row, (start, stop, first) in enumerate(batch):
            idx[row, : stop - start] = tokens[start:stop]
            targets[row, first : stop - start] = tokens[start + 1 + first : stop + 1]
        losses = model.token_losses(idx.to(device), targets.to(device))
        total += losses.double().sum().item()
        count += int((targets >= 0).sum())
    return total, count


if __name__ == "__main__":
    run(EvalOptions, main, "eval_tp.py")

"""Exact loss and perplexity of a text: every token after the first is predicted once.

    torchrun --standalone --nproc_per_node=2 eval_tp.py --init_from=shards/gpt2-tp2 --text=book.txt
"""

import base.quick_start  # noqa: F401

# isort: split
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError, explaining_memory
from base.files import read_text
from checkpoints.sources import Source, common_tokenizer, identity, open_for_inference, tokenizer_of
from cli.options import EvalOptions
from inference.load import load, memory_needed
from inference.perplexity import measure, windows
from report import report
from text.dataset import Dataset
from world import peaks
from world.entry import run
from world.mesh import World


def main(world: World, options: EvalOptions) -> None:
    started = time.perf_counter()
    if world.is_main:
        report.check_place(options.report, "report")
    if bool(options.text) == bool(options.dataset):
        raise UserError("give what to measure: either --text=FILE or --dataset=NAME.")
    source = open_for_inference(options, (world.rank, world.size))
    world.agree("weights", identity(source))
    tokens, n_bytes = read_tokens(source, options)
    size = source.config.block_size
    stride = options.stride or size
    if stride > size:
        why = f"is more than block_size={size}: tokens would be left out."
        raise UserError(f"--stride={stride} {why}")
    with explaining_memory(lambda: memory_needed(world, source, options)):
        model = load(world, source, options)
        world.synchronize()
        load_s = time.perf_counter() - started
        started = time.perf_counter()
        with world.ledger.during("evaluation"):
            show = world.is_main and sys.stderr.isatty()
            total, count = measure(model, tokens, stride, options.batch_size, show, world.pp)
    seconds = time.perf_counter() - started
    timing = {"load_s": load_s, "eval_s": seconds, "tokens_per_s": count / seconds}
    evaluation, account = figures(total, count, stride, n_bytes), world.ledger.snapshot()
    made = report.build("eval_tp", world, model, account, timing, seconds, evaluation=evaluation)
    lengths = [stop - start for start, stop, _ in windows(len(tokens), size, stride)]
    operations = sum(length * peaks.operations(model.split, length, False) for length in lengths)
    use = peaks.Use(operations / seconds, next(model.parameters()).dtype)
    made["utilisation"] = use.figures(world)
    if world.is_main:
        print(report.account_table(made), file=sys.stderr)
        formats = {float: ",.6g", int: ","}
        print(", ".join(f"{name} {x:{formats[type(x)]}}" for name, x in evaluation.items()))
        print(peaks.text(made["utilisation"], "evaluation", made["dtype"]), file=sys.stderr)
        if options.report:
            report.write(options.report, made)


def read_tokens(source: Source, options: EvalOptions) -> tuple[Tensor, int]:
    """The ids to measure, int64, and the bytes of text that the predicted ones are (0 if unknown).
    "<|endoftext|>" in the text is text, as it is where training data is prepared."""
    vocab_size, most, n_bytes = source.config.vocab_size, options.max_tokens or sys.maxsize, 0
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
        fault = f"{what} has token id {ids.max()}, the model's vocab_size is {vocab_size}"
        raise UserError(f"{fault}: not its tokenizer?")
    return ids, n_bytes


def figures(total: float, count: int, stride: int, n_bytes: int) -> dict[str, float]:
    """The report's `evaluation`: `count` tokens have `total` nats of negative log-likelihood."""
    loss = total / count
    if not math.isfinite(loss):
        cause = "the model's weights are damaged, or too large for this precision"
        raise UserError(f"the loss is {loss}: {cause} (try --dtype=float32).")
    perplexity = math.exp(min(loss, 700))
    found = {"loss": loss, "perplexity": perplexity, "tokens": count, "stride": stride}
    return found | ({"bits_per_byte": total / math.log(2) / n_bytes} if n_bytes else {})


if __name__ == "__main__":
    run(EvalOptions, main, "eval_tp.py")

"""Generate text on N ranks.

    torchrun --standalone --nproc_per_node=2 sample_tp.py --init_from=shards/gpt2-tp2 --start="Once upon a time"
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import report
from checkpoints.sources import Source, open_source, reader, tokenizer_of
from entry import run
from errors import UserError
from generation import Generation, Listener, Sampling, generate
from options import SampleOptions
from parallel.mesh import World, pick_dtype
from parallel.partition import Partition
from shard_checkpoint import imbalance
from text.files import read_text
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT


def main(world: World, options: SampleOptions) -> None:
    started = time.perf_counter()
    report.check_report(options.report)
    source = open_source(options.out_dir if options.init_from == "resume" else options.init_from, (world.rank, world.size))
    tokenizer = tokenizer_of(source, options.tokenizer)
    texts = read_prompts(options.start)
    prompts = [tokenizer.encode(text) for text in texts]
    model = load(world, source, options)
    sampling = Sampling(
        n_tokens=tokenizer.n_vocab,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        seed=options.seed,
        overflow=options.overflow,
        kv_cache=options.kv_cache,
    )
    world.synchronize()
    load_s = time.perf_counter() - started
    if world.is_main:
        for notice in notices(world, source, model):
            print(notice, file=sys.stderr)
    with open(options.out, "w", encoding="utf-8") if options.out and world.is_main else nullcontext() as out:
        stage = Stage(texts, tokenizer, options, out)
        begun = time.perf_counter()
        result = generate(model, prompts, sampling, stage.hear)
        seconds = time.perf_counter() - begun
        if world.is_main:
            stage.close(result)
    finish(world, model, options, result, stage, load_s, seconds)


def load(world: World, source: Source, options: Any) -> TensorParallelGPT:
    """The model for inference: each rank reads its own part of the weights."""
    dtype = pick_dtype(options.dtype, world.device)
    model = TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank), device=world.device, dtype=dtype)
    model.eval()
    if options.compile:
        model.compile_blocks()
    return model


def read_prompts(start: list[str]) -> list[str]:
    """The prompts of --start: text, FILE:path (one prompt, whole), PROMPTS:path (one a line, empty lines left out)."""
    prompts: list[str] = []
    for spec in start:
        kind, _, path = spec.partition(":")
        if kind == "FILE":
            prompts.append(read_text(Path(path).expanduser()))
        elif kind == "PROMPTS":
            lines = [line for line in read_text(Path(path).expanduser()).splitlines() if line.strip()]
            if not lines:
                raise UserError(f"{path} has no prompt: write one a line.")
            prompts += lines
        else:
            prompts.append(spec)
    return prompts


def notices(world: World, source: Source, model: TensorParallelGPT) -> list[str]:
    """What a user would like to know before waiting: an uneven split, a reshard, a model that one device would hold."""
    lines = [imbalance(Partition.of(source.config, world.tp.size))]
    written = getattr(getattr(source, "manifest", None), "tp", world.tp.size)
    if written != world.tp.size:
        lines.append(f"the checkpoint is tp={written}, this run tp={world.tp.size}: resharded on load, no file changed.")
    if world.tp.size > 1 and world.device.type == "cuda":
        syncs = 2 * source.config.n_layer + 1
        size = model.split.count() * next(model.parameters()).element_size()
        lines.append(f"{source.description} ({size / 1e9:.1f} GB): tp={world.tp.size} makes {syncs} all-reduces a token.")
    return [line for line in lines if line]


class Stage:
    """Prints the rows in order: the first unfinished one live, the others when its turn comes. Rank 0's only."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, options: SampleOptions, out: IO[str] | None):
        self.options, self.out = options, out
        rows = len(texts) * options.num_samples
        self.prompts = [texts[row // options.num_samples] for row in range(rows)]
        self.pieces: list[list[str]] = [[] for _ in range(rows)]
        self.listeners = [Listener(tokenizer, options.stop, self.pieces[row].append) for row in range(rows)]
        self.live, self.shown = 0, False

    def hear(self, row: int, token: int) -> bool:
        ended = self.listeners[row].hear(token)
        if self.options.stream and row == self.live:
            self._flush()
        return ended

    def _flush(self) -> None:
        if not self.shown:
            print(self.prompts[self.live], end="")
            self.shown = True
        print("".join(self.pieces[self.live]), end="", flush=True)
        self.pieces[self.live].clear()

    def close(self, result: Generation) -> None:
        """Print what is left, and keep the samples in the file that --out names."""
        for row, listener in enumerate(self.listeners):
            text = listener.finish()
            self.live, self.shown = row, self.shown and row == self.live
            self._flush()
            print("\n---------------")
            if self.out is not None:
                made = result.rows[row]
                sample = {"prompt": self.prompts[row], "sample": made.sample, "text": text, "tokens": made.tokens[made.prompt_tokens :]}
                self.out.write(json.dumps(sample, ensure_ascii=False) + "\n")


def finish(
    world: World, model: TensorParallelGPT, options: SampleOptions, result: Generation, stage: Stage, load_s: float, seconds: float
) -> None:
    """The run's figures: a line on standard error, and the report if asked for."""
    timing = result.timing
    rate = timing.decode_tokens / timing.decode_s if timing.decode_s and timing.decode_tokens else 0.0
    figures = {
        "load_s": load_s,
        "time_to_first_token_s": timing.time_to_first_token_s,
        "prefill_s": timing.prefill_s,
        "decode_s": timing.decode_s,
        "decode_tokens": timing.decode_tokens,
        "decode_tokens_per_s": rate,
    }
    samples: list[dict[str, Any]] = []
    if world.is_main:
        for row, listener in zip(result.rows, stage.listeners, strict=True):
            new = row.tokens[row.prompt_tokens :]
            prompt = stage.prompts[len(samples)]
            samples.append({"prompt": prompt, "prompt_tokens": row.tokens[: row.prompt_tokens], "tokens": new, "text": listener.text})
    made = report.build("sample_tp", world, model, world.ledger.snapshot(), figures, seconds, timing.kv_cache_bytes, samples=samples)
    if not world.is_main:
        return
    if timing.slid:
        print(f"context full at {model.config.block_size} tokens: the window slid, each such token cost a full forward", file=sys.stderr)
    print(report.account_table(made), file=sys.stderr)
    print(f"{rate:.1f} tokens/s after a prefill of {timing.prefill_s:.3f} s; loaded in {load_s:.2f} s", file=sys.stderr)
    if options.report:
        report.write(options.report, made)


if __name__ == "__main__":
    run(SampleOptions, main, "sample_tp.py")

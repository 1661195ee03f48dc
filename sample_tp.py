"""Generate text on N ranks.

    torchrun --standalone --nproc_per_node=2 sample_tp.py --init_from=shards/gpt2-tp2 --prompt="Once upon a time"

Standard output has the text and nothing else; notices, the account and figures go to standard error.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import torch

from base.errors import ReaderGone, UserError, explaining_memory
from base.files import growing, naming, read_text
from base.processes import Exchange
from checkpoints.sources import Source, identity, open_for_inference, open_source, reader, schedule_of, tokenizer_of
from cli.options import SampleOptions
from inference.decoding import Decoder, decoder_for
from inference.generation import Generation, Listener, Row, Timing, check_prompts, generate
from inference.sampling import Sampling
from inference.speculation import Guesser, Ngrams, SmallModel, Speculation
from parallel.collectives import Axis
from parallel.ledger import Account
from parallel.quantized import quantize, read_weights
from plan.partition import Partition
from report import report
from report.html import nbytes
from shard_checkpoint import imbalance
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT
from world import peaks
from world.devices import pick_dtype
from world.entry import run
from world.mesh import World


def main(world: World, options: SampleOptions) -> None:
    started = time.perf_counter()
    if world.is_main:
        report.check_place(options.report, "report")
        report.check_place(options.out, "out")
    source = open_for_inference(options, (world.rank, world.size))
    world.agree("weights", identity(source))
    tokenizer = tokenizer_of(source, options.tokenizer)
    # files are read by one rank: the others may be on hosts that do not have them
    texts: list[str] = world.gather(read_prompts(options.start) if world.is_main else None)[0]
    prompts = encode(texts, tokenizer)
    sampling = how_to_sample(options, tokenizer)
    check_prompts(prompts, source.config.vocab_size, source.config.block_size, sampling)
    with explaining_memory(lambda: need(world, source, options)):
        model = load(world, source, options)
        draft = drafted(world, options, tokenizer, sampling)
    decoder = decoder_for(model)
    world.synchronize()
    load_s = time.perf_counter() - started
    if world.is_main:
        for notice in notices(world, source, model, decoder, tokenizer):
            print(notice, file=sys.stderr)
    with samples_file(options.out if world.is_main else "") as out:
        stage = Stage(texts, tokenizer, options, out)
        begun = time.perf_counter()
        try:
            rows = min(options.batch_size, len(texts) * options.num_samples)
            why = explaining_memory(lambda: need(world, source, options, rows))
            with world.ledger.during("sampling"), why:
                result = generate(model, prompts, sampling, stage, decoder, draft)
        finally:
            stage.leave()
        seconds = time.perf_counter() - begun
    if any(world.gather(stage.gone)):
        raise ReaderGone
    figures = {"load_s": load_s, **rates(result.timing)}
    samples = stage.samples(result) if world.is_main else []
    account, kv_cache_bytes = world.ledger.snapshot(), result.timing.kv_cache_bytes
    more = {"decoder": decoder.name, **per_token(world.ledger.forward_passes, account, result, draft), "samples": samples}
    made = report.build("sample_tp", world, model, account, figures, seconds, kv_cache_bytes, **more)
    made["utilisation"] = used(world, model, result, decoder).figures(world)
    if world.is_main:
        finish(options, made, result.timing.slid)


@contextmanager
def samples_file(path: str) -> Iterator[IO[str] | None]:
    """The file of --out, if there is one."""
    with naming(path), growing(path) if path else nullcontext() as out:
        yield out


def need(world: World, source: Source, options: Any, rows: int = 0) -> str:
    """For a run that has no memory left: what the weights take, and the keys and values of the rows."""
    split, dtype = Partition.of(source.config, world.tp.size), pick_dtype(options.dtype, world.device)
    weights = split.count(0) * (1 if options.quantize else dtype.itemsize)
    if options.quantize:  # tokens are looked up in a float table
        weights += split.local_vocab * split.n_embd * dtype.itemsize
    lo, hi = split.heads(0)
    cache = 2 * rows * split.n_layer * (hi - lo) * split.head_dim * split.block_size * dtype.itemsize
    takes = f"The weights take {weights / 1e9:.2f} GB on rank 0"
    if cache:
        takes += f", keys and values of {rows} rows at most {cache / 1e9:.2f} GB"
    if world.device.type == "cuda":
        has = torch.cuda.get_device_properties(world.device).total_memory
        takes += f"; its GPU has {has / 1e9:.2f} GB"
    return f"{takes}. Use more ranks, --quantize=int8 or a smaller --batch_size."


def how_to_sample(options: SampleOptions, tokenizer: Tokenizer) -> Sampling:
    return Sampling(
        n_tokens=tokenizer.n_vocab,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        seed=options.seed,
        overflow=options.overflow,
        kv_cache=options.kv_cache,
        batch_size=options.batch_size,
    )


def load(world: World, source: Source, options: Any) -> TensorParallelGPT:
    """The model for inference: each rank reads its own part of the weights."""
    model = TensorParallelGPT(
        source.config,
        world.tp,
        reader(source, world.tp.rank),
        device=world.device,
        dtype=pick_dtype(options.dtype, world.device),
        schedule=schedule_of(source, options.sync, world.tp.size),
        sequence_parallel=options.sequence_parallel,
    )
    return finished(model, options, world.gather)


def finished(model: TensorParallelGPT, options: Any, gather: Exchange) -> TensorParallelGPT:
    """Quantized and compiled, as the options say."""
    model.eval()
    if options.quantize:
        quantize(model, gather)
    if options.compile:
        model.compile_blocks()
    return model


def drafted(world: World, options: SampleOptions, tokenizer: Tokenizer, sampling: Sampling) -> Speculation | None:
    """Who guesses ahead. A small model is whole on every rank, on an axis of its own, along which nothing is said. UserError
    where its tokens are not those of the model."""
    if not options.draft:
        return None
    guesser: Guesser = Ngrams()
    if options.draft != "ngram":
        source = open_source(options.draft, (world.rank, world.size), "draft", also=("ngram",))
        world.agree("draft", identity(source))
        theirs = tokenizer_of(source, options.tokenizer)
        if theirs.to_json() != tokenizer.to_json() or source.config.vocab_size < tokenizer.n_vocab:
            raise UserError(
                f"--draft={options.draft} has another vocabulary: {theirs.kind} of {source.config.vocab_size} ids, the model "
                f"{tokenizer.kind} of {tokenizer.n_vocab}. Use a draft with the model's tokenizer, or --draft=ngram."
            )
        dtype = pick_dtype(options.dtype, world.device)
        model = TensorParallelGPT(source.config, Axis("tp"), reader(source, 0), device=world.device, dtype=dtype)
        guesser = SmallModel(finished(model, options, lambda mine: [mine]), sampling)
    return Speculation(guesser, options.draft_tokens)


def read_prompts(start: list[str]) -> list[str]:
    """The prompts of --start: text, FILE:path (one prompt, whole), PROMPTS:path (one a line, empty lines left out)."""
    prompts: list[str] = []
    for spec in start:
        if spec.startswith("FILE:"):
            prompts.append(read_text(spec.removeprefix("FILE:")))
        elif spec.startswith("PROMPTS:"):
            prompts += read_lines(Path(spec.removeprefix("PROMPTS:")))
        elif any("\ud800" <= char <= "\udfff" for char in spec):  # how Python passes on bytes that are not UTF-8
            raise UserError(f"--prompt={ascii(spec)[:60]} is not UTF-8 text.")
        else:
            prompts.append(spec)
    return prompts


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank. Not splitlines(): that also cuts at form feeds and the like, within a prompt."""
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path} has no prompt: write one a line.")
    return lines


def encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The prompts as ids. UserError where that is not possible, naming the prompt."""
    prompts = []
    for i, text in enumerate(texts, 1):
        try:
            prompts.append(tokenizer.encode(text))
        except UserError as error:
            raise UserError(f"prompt {i} ({text[:40]!r}): {error}") from error
        if not prompts[-1] and tokenizer.kind == "ids":
            raise UserError(
                f"prompt {i} is empty. The model's tokenizer is not known: give token ids, for example --prompt='5 17 3'."
                f" {tokenizer.note}".rstrip()
            )
    return prompts


def notices(
    world: World, source: Source, model: TensorParallelGPT, decoder: Decoder, tokenizer: Tokenizer
) -> list[str]:
    """What a user would like to know before waiting: an uneven split, a reshard, a model that one device would hold."""
    lines = [imbalance(Partition.of(source.config, world.tp.size)), tokenizer.note]
    written = getattr(getattr(source, "manifest", None), "tp", world.tp.size)
    if written != world.tp.size:
        lines.append(f"the checkpoint is tp={written}, this run tp={world.tp.size}: resharded on load, no file changed.")
    if not model.schedule.is_plain:
        points, plain = model.schedule.points, 2 * source.config.n_layer
        lines.append(f"ranks synchronise after {points} of {plain} sub-blocks (--sync={model.schedule}); --sync=all is exact.")
    if world.tp.size > 1 and world.device.type == "cuda":
        syncs = model.schedule.points + 1
        size = model.split.count() * next(model.parameters()).element_size()
        lines.append(f"{source.description} ({nbytes(size)}): tp={world.tp.size} makes {syncs} all-reduces a token.")
    if decoder.why:
        lines.append(f"each token is computed by torch, which is slower: {decoder.why}.")
    return [line for line in lines if line]


class Stage:
    """The audience: prints the rows in order, and writes each to the file of --out when its turn has come.

    With --stream the first row that is not through appears as it is written; a row that ends before its turn waits.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer, options: SampleOptions, out: IO[str] | None):
        self.texts, self.options, self.out = texts, options, out
        self.listeners = [Listener(tokenizer, options.stop) for _ in range(len(texts) * options.num_samples)]
        self.ended: dict[int, Row] = {}  # complete, and waiting for their turn
        self.turn = 0  # the number of the row that is printed now
        self.printed = 0  # characters of it that have been
        self.gone = False  # nobody reads, and nothing is kept: the rows end

    def hear(self, row: Row, token: int) -> bool:
        ended = self.listeners[row.number].hear(token)
        if self.options.stream and row.number == self.turn:
            self._print(row)
        return ended or self.gone

    def end(self, row: Row) -> None:
        self.listeners[row.number].finish()
        self.ended[row.number] = row
        while (done := self.ended.pop(self.turn, None)) is not None:
            self._print(done)
            self._say("\n---------------\n")
            self._keep(done)
            self.turn, self.printed = self.turn + 1, 0

    def _print(self, row: Row) -> None:
        """The prompt and what is final of the row's text, as far as it has not been printed."""
        listener = self.listeners[row.number]
        text = self.texts[row.prompt] + listener.text[: listener.final]
        self._say(text[self.printed :])
        self.printed = len(text)

    def _say(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except ReaderGone:
            self.gone = not (self.options.out or self.options.report)

    def leave(self) -> None:
        """Where a run is broken off within a row, what is said next starts on a line of its own."""
        if self.printed:
            with suppress(OSError):  # that it cannot be written may be what broke it off
                self._say("\n")

    def _keep(self, row: Row) -> None:
        if self.out is not None:
            sample = {
                "prompt": self.texts[row.prompt],
                "sample": row.sample,
                "text": self.listeners[row.number].text,
                "tokens": row.tokens[row.prompt_tokens :],
            }
            self.out.write(json.dumps(sample, ensure_ascii=False) + "\n")
            self.out.flush()

    def samples(self, result: Generation) -> list[dict[str, Any]]:
        """The report's list of samples."""
        return [
            {
                "prompt": self.texts[row.prompt],
                "prompt_tokens": row.tokens[: row.prompt_tokens],
                "tokens": row.tokens[row.prompt_tokens :],
                "text": listener.text,
            }
            for row, listener in zip(result.rows, self.listeners, strict=True)
        ]


def per_token(passes: int, account: Account, result: Generation, draft: Speculation | None) -> dict[str, Any]:
    """The report's `per_token`: passes of the model and calls of each op on its behalf (not the small ones by which ranks
    agree on tokens), over all tokens that were generated; and what became of a draft's guesses."""
    tokens = sum(row.new for row in result.rows)
    calls: dict[str, int] = {}
    for entry, tally in account.items():
        if entry.direction == "forward":
            calls[entry.op] = calls.get(entry.op, 0) + tally.calls
    figures = {"passes": passes} | calls
    made: dict[str, Any] = {"per_token": {"tokens": tokens} | {name: round(n / tokens, 6) for name, n in figures.items()}}
    if draft is not None:
        proposed, accepted = draft.proposed, draft.accepted
        rate = round(accepted / proposed, 6) if proposed else 0.0
        made["speculation"] = {"proposed": proposed, "accepted": accepted, "acceptance_rate": rate}
    return made


def used(world: World, model: TensorParallelGPT, result: Generation, decoder: Decoder) -> peaks.Use:
    """What decoding asked of the machine; reading the prompts, where each row got one token."""
    timing, rows, size = result.timing, result.rows, model.config.block_size
    dtype = next(model.parameters()).dtype
    if not timing.decode_steps:
        length = sum(row.prompt_tokens for row in rows) / len(rows)
        count = len({row.prompt for row in rows}) * length
        return peaks.Use(count * peaks.operations(model.split, length, False) / timing.prefill_s, dtype)
    seconds = timing.decode_s - decoder.capture_s
    length = sum(min(size, len(row.tokens) - row.new / 2) for row in rows) / len(rows)
    operations = timing.decode_tokens * peaks.operations(model.split, length, False) / seconds
    weights = read_weights(model)
    read = sum(world.gather(sum(w.nbytes for w in weights))) * timing.decode_steps / seconds
    return peaks.Use(operations, dtype, read, weights)


def rates(timing: Timing) -> dict[str, float]:
    return {
        "time_to_first_token_s": timing.time_to_first_token_s,
        "prefill_s": timing.prefill_s,
        "decode_s": timing.decode_s,
        "decode_tokens": timing.decode_tokens,
        "decode_tokens_per_s": timing.decode_tokens / timing.decode_s if timing.decode_tokens else 0.0,
    }


def finish(options: SampleOptions, made: dict[str, Any], slid: bool) -> None:
    """The run's figures on standard error, and the report if asked for."""
    timing = made["timing"]
    print(report.account_table(made), file=sys.stderr)
    if slid:
        size = made["model"]["block_size"]
        print(
            f"the context is full at block_size={size}: from there on each token cost a forward pass over {size} tokens "
            "(--overflow=stop ends samples there instead)",
            file=sys.stderr,
        )
    speed = f"{timing['decode_tokens_per_s']:.1f} tokens/s after a " if timing["decode_tokens"] else ""
    print(f"{speed}prefill of {timing['prefill_s']:.3f} s; loaded in {timing['load_s']:.2f} s", file=sys.stderr)
    print(said_per_token(options, made), file=sys.stderr)
    what = "decoding" if timing["decode_tokens"] else "reading the prompts"
    print(peaks.text(made["utilisation"], what, made["dtype"]), file=sys.stderr)
    if options.report:
        report.write(options.report, made)


def said_per_token(options: SampleOptions, made: dict[str, Any]) -> str:
    """How often the model ran and its ranks summed for a token, and how the draft did."""
    figures = made["per_token"]
    said = f"{figures['passes']:.2f} passes a token"
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        said += f", {figures[op]:.2f} {op.replace('_', '-')}s" if op in figures else ""
    if "speculation" in made:
        draft = made["speculation"]
        said += f"; draft {options.draft}: {draft['accepted']:,} of {draft['proposed']:,} guesses right"
        said += f" ({draft['acceptance_rate']:.0%})" if draft["proposed"] else ""
    return said


if __name__ == "__main__":
    run(SampleOptions, main, "sample_tp.py")

"""Generation, measured: the decode step, and the reading of a prompt."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError
from base.files import write_json
from bench.rounds import Bench, Round, collectives, column, compare, shown, spread
from checkpoints.convert import write_hf
from checkpoints.sources import open_source, tokenizer_of
from cli.options import (
    BenchDecodeOptions,
    BenchModelOptions,
    BenchPrefillOptions,
    BenchTextsOptions,
    SampleOptions,
)
from inference.decoders import TorchDecoder, decoder_for
from inference.generation import Generation
from inference.load import load, load_draft
from inference.prompts import check_prompts, encode, read_prompts
from inference.sampling import Sampling
from inference.speculation import Speculation
from model import GPTConfig, initial_tensor
from parallel.ledger import Ledger, total
from parallel.quantized import read_weights
from plan.link import ring_bytes
from plan.partition import Partition
from plan.schedule import Schedule
from text.tokenizer import GPT2Tokenizer, Tokenizer
from tp_model import TensorParallelGPT
from world import peaks
from world.mesh import World


def write_random(directory: Path, options: BenchModelOptions) -> None:
    """A directory in Hugging Face format with the weights of a fresh model."""
    sizes = (options.vocab_size, options.n_layer, options.n_head, options.n_embd)
    config = GPTConfig(1024, *sizes, activation="gelu_tanh")
    shapes = Partition.of(config, 1).shapes()
    directory.mkdir()
    write_hf(config, torch.float32, lambda name: initial_tensor(
        name, shapes[name], config.n_layer, options.seed), directory)
    # ctranslate2's converter wants a tokenizer: a word for each id
    words = [f"t{i}" for i in range(options.vocab_size - 1)] + ["<|endoftext|>"]
    write_json(directory / "vocab.json", {word: i for i, word in enumerate(words)})
    (directory / "merges.txt").write_text("#version: 0.2\n")


@dataclass
class Subject:
    """A model that generates n tokens after each prompt. draft: guesses ahead, if any."""

    model: TensorParallelGPT
    tokenizer: Tokenizer
    prompts: list[list[int]]
    n: int
    ledger: Ledger
    in_float32: Callable[[], TensorParallelGPT]  # loads the same weights once more
    draft: Speculation | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.model.config.vocab_size, temperature=0, max_new_tokens=self.n,
                        batch_size=len(self.prompts))

    def describe(self) -> dict[str, Any]:
        model = self.model.config.as_json() | {"parameters": self.model.split.count()}
        return {"model": model, "sync": str(self.model.schedule)}

    def measure(self, decoder: TorchDecoder, guess: bool = True) -> dict[str, Any]:
        """Generate. If n is 1, seconds and account to the first token, else the mean of the others.
        guess: with the draft."""
        draft, captured = self.draft if guess else None, decoder.capture_s
        before, started = self.ledger.snapshot(), time.perf_counter()
        made = Generation(self.model, self.prompts, self.sampling, decoder, draft)
        for i, _ in enumerate(made):
            if i == 0 and self.n > 1:  # the first tokens are there
                before = self.ledger.snapshot()
        seconds, n = time.perf_counter() - started, 1
        if self.n > 1:
            n = made.timing.decode_tokens
            seconds = made.timing.decode_s - (decoder.capture_s - captured)
        account = total(self.ledger.since(before))
        tokens = [token for row in made.rows for token in row.tokens[-self.n :]]
        return {"seconds": seconds / n, "tokens": tokens,
                "steps": made.timing.decode_steps / n, "share": account.seconds / seconds,
                "bytes": account.bytes / n, "calls": account.calls / n}

    def all_syncs(self) -> dict[str, Any]:
        """Measure with all sync points."""
        schedule = self.model.schedule
        self.model.set_schedule(Schedule.plain(self.model.config.n_layer))
        made = self.measure(decoder_for(self.model))
        self.model.set_schedule(schedule)
        return made


@contextmanager
def subject(world: World, options: BenchModelOptions, n: int,
            text: str = "", rows: int = 1) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """The model on these ranks, and the job of a contestant that does the same with its weights.
    text: the prompt, or FILE:path; default: random tokens. UserError if they do not fit."""
    with tempfile.TemporaryDirectory() as scratch:
        weights = world.gather(options.init_from or f"{scratch}/weights")[0]
        if not options.init_from and world.is_main:
            write_random(Path(weights), options)
        world.barrier()
        source = open_source(weights, (world.rank, world.size))
        size, vocab_size = source.config.block_size, source.config.vocab_size
        words = "gpt2" if vocab_size == GPT2Tokenizer.n_vocab else "ids"  # of random weights
        tokenizer = tokenizer_of(source, "" if options.init_from else words)
        prompts = [[(7 * i * i + 3 + row) % (vocab_size - 1) for i in range(options.prompt_tokens)]
                   for row in range(rows)]
        if text:
            prompts = encode(read_prompts([text]), tokenizer) * rows
            check_prompts(prompts, vocab_size, size, Sampling(vocab_size))
        if len(prompts[0]) + n > size:
            raise UserError(f"a prompt of {len(prompts[0])} tokens and {n} new ones do not fit "
                            f"block_size={size}.")
        job = {"weights": weights, "scratch": scratch, "prompts": prompts, "new_tokens": n,
               "quantize": options.quantize, "compile": options.compile}
        in_float32 = partial(load, world, source, replace(options, dtype="float32", quantize=""))
        yield Subject(load(world, source, options), tokenizer, prompts, n, world.ledger,
                      in_float32), job


def decode(world: World, options: BenchDecodeOptions) -> None:
    bench = Bench(world, options, ("hf", "ctranslate2", "llama_cpp", "one_rank", "float32",
                                  "all_syncs", "no_draft"))
    if "llama_cpp" in bench.names and options.batch_size > 1:
        raise UserError("--against=llama_cpp writes one text. Use --batch_size=1.")
    n, rows = options.new_tokens, options.batch_size
    with subject(world, options, n, options.prompt, rows) as (ours, job):
        names = ("dtype", "compile", "quantize", "draft", "draft_tokens")
        guess = SampleOptions(**{name: getattr(options, name) for name in names})
        ours.draft = load_draft(world, guess, ours.tokenizer, ours.sampling)
        decoder, weights = decoder_for(ours.model), read_weights(ours.model)
        read = sum(world.gather(sum(weight.nbytes for weight in weights)))
        dtype, length = next(ours.model.parameters()).dtype, len(ours.prompts[0]) + ours.n / 2
        needed = peaks.operations(ours.model.split, length, backward=False)

        def once() -> dict[str, Any]:
            """A step beside the machine's peaks, which change by the minute if others use it."""
            made, most = ours.measure(decoder), peaks.bandwidth(world, weights)
            rate, peak = read * made["steps"] / made["seconds"], peaks.arithmetic(world, dtype)
            return made | {"most": most, "rate": rate, "peak": peak, "mbu": rate / most,
                           "mfu": needed / made["seconds"] / peak}

        ours.measure(decoder)
        own = {"all_syncs": ours.all_syncs, "no_draft": lambda: ours.measure(decoder, guess=False)}
        if "float32" in bench.names:
            wide = replace(ours, model=ours.in_float32())
            own["float32"] = partial(wide.measure, decoder_for(wide.model))
        rounds = bench.against(once, job, **own)
    head = (f"decode of {n} tokens after {len(ours.prompts[0])}, batch {rows}, on {ranks(world)}, "
            f"{decoder.name} step{', int8' if options.quantize else ''}; sync points: ")
    figures, lines = decode_report(world, ours, rounds, options)
    figures |= {"decoder": decoder.name, "weight_bytes_read": read, "capture_s": decoder.capture_s}
    lines = [f"{head}{ours.model.schedule}", *lines, *same_tokens(rounds)]
    bench.finish("decode", ours.describe() | figures, lines)


def decode_report(world: World, ours: Subject, rounds: list[Round],
                  options: BenchDecodeOptions) -> tuple[dict[str, Any], list[str]]:
    names = {"read_bandwidth": "most", "share_of_bandwidth": "mbu", "share_of_arithmetic": "mfu",
             "share_in_collectives": "share"}
    figures: dict[str, Any] = {name: spread(column(rounds, key)) for name, key in names.items()}
    figures["calls_per_token"] = {name: r["calls"] for name, r in rounds[0].items() if "calls" in r}
    figures["parties"], lines = compare(rounds, "tokens/s", 1.0)
    rate, most, peak = (shown(column(rounds, key, 1e-9)) for key in ("rate", "most", "peak"))
    mbu, mfu = shown(column(rounds, "mbu"), ".0%"), shown(column(rounds, "mfu"), ".2%")
    lines += [
        f"weights read: {rate} GB/s, {mbu} (MBU) of {most} GB/s at which ranks read them alone",
        f"products: {mfu} of {peak} GFLOP/s (MFU)",
        f"{collectives(rounds, 'a step', ' a token')}, {sent(rounds, world)}"]
    if (draft := ours.draft) is not None:
        right, steps = draft.accepted / max(1, draft.proposed), rounds[0]["nanotp"]["steps"]
        lines.append(f"draft {options.draft}: {right:.0%} of its guesses right, {steps:.2f} steps "
                     "a token")
        figures["speculation"] = {"draft": options.draft, "draft_tokens": options.draft_tokens,
                                  "proposed": draft.proposed, "accepted": draft.accepted}
    return figures, lines


def prefill(world: World, options: BenchPrefillOptions) -> None:
    """From a prompt's tokens to the first new one."""
    bench, n = Bench(world, options, ("hf", "ctranslate2")), options.prompt_tokens
    with subject(world, options, 1) as (ours, job):
        once = partial(ours.measure, decoder_for(ours.model))
        once()
        rounds = bench.against(once, job)
    parties, lines = compare(rounds, "prompt tokens/s", n)
    time_ = shown(column(rounds, "seconds", 1e3))
    lines += [f"from a prompt of {n} tokens to the first new one: {time_} ms on {ranks(world)}",
              f"{collectives(rounds, 'the time', '')}, {sent(rounds, world)}"]
    figures = {"parties": parties, "share_in_collectives": spread(column(rounds, "share"))}
    bench.finish("prefill", ours.describe() | figures, lines + same_tokens(rounds))


def texts(world: World, options: BenchTextsOptions) -> None:
    """Prompts of 8 tokens and more, 16 new tokens and more of each, some ending sooner than others:
    the time until the last one has ended."""
    bench, longest = Bench(world, options, ("hf", "ctranslate2")), options.new_tokens
    with subject(world, options, longest, rows=options.texts) as (ours, job):
        draw = random.Random(options.seed).randint
        ours.prompts = [prompt[: draw(8, len(prompt))] for prompt in ours.prompts]
        lengths = [draw(16, longest) for _ in ours.prompts]
        sampling = replace(ours.sampling, batch_size=options.batch_size)
        decoder, n = decoder_for(ours.model), sum(lengths)

        def once() -> dict[str, Any]:
            started = time.perf_counter()
            made = Generation(ours.model, ours.prompts, sampling, decoder,
                              stops=lambda row, _: row.new + 1 == lengths[row.number])
            list(made)  # to the end
            found = [token for row in made.rows for token in row.tokens[row.prompt_tokens :]]
            return {"seconds": (time.perf_counter() - started) / n, "tokens": found}

        job |= {"prompts": ours.prompts, "lengths": lengths, "batch_size": options.batch_size}
        rounds = bench.against(once, job)
    parties, lines = compare(rounds, "tokens/s", 1.0)
    lines.insert(0, f"{options.texts} texts of {n:,} new tokens in all after prompts of 8 to "
                 f"{options.prompt_tokens}, {options.batch_size} at a time, on {ranks(world)}")
    bench.finish("texts", ours.describe() | {"parties": parties}, lines + same_tokens(rounds))


def same_tokens(rounds: list[Round]) -> list[str]:
    """How many of the tokens each party has chosen as nanoTP did."""
    first = {name: turn["tokens"] for name, turn in rounds[0].items()}
    ours = first.pop("nanotp")
    return [f"{name}: {sum(map(int.__eq__, ours, theirs))} of {len(ours)} tokens as ours"
            for name, theirs in first.items()]


def ranks(world: World) -> str:
    return f"{world.size} ranks of {torch.get_num_threads()} threads: {world.over}"


def sent(rounds: list[Round], world: World) -> str:
    return f"{ring_bytes(rounds[0]['nanotp']['bytes'], world.size):,.0f} sent by a ring"

"""Generation, measured: the decode step, the reading of a prompt, and the start of the program."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from base.errors import UserError
from base.files import write_json
from bench.contestants import DECODERS, PREFILLERS, ROOT
from bench.rounds import Bench, compare, plot_bars, shown, spread
from checkpoints.convert import split, write_hf
from checkpoints.sources import open_source, tokenizer_of
from cli.options import (
    BenchDecodeOptions,
    BenchModelOptions,
    BenchOptions,
    BenchPrefillOptions,
    BenchStartOptions,
    SampleOptions,
    SplitOptions,
)
from inference.decoding import Decoder, decoder_for
from inference.generation import generate
from inference.load import load, load_draft
from inference.prompts import check_prompts, encode, read_prompts
from inference.sampling import Sampling
from model import GPTConfig, KVCache, initial_tensor
from parallel.ledger import Account, total
from parallel.quantized import read_weights
from plan.cost import ring_bytes
from plan.partition import Partition
from plan.schedule import Schedule
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT
from world import peaks
from world.mesh import World


def write_random(directory: Path, options: BenchOptions) -> None:
    """A directory in Hugging Face format with weights as a fresh model has them."""
    config = GPTConfig(1024, options.vocab_size, options.n_layer, options.n_head, options.n_embd, activation="gelu_tanh")
    directory.mkdir()
    shapes = Partition.of(config, 1).shapes()
    write_hf(config, torch.float32, lambda name: initial_tensor(name, shapes[name], config.n_layer, options.seed), directory)
    # a contestant's converter asks for a tokenizer: one word for each id will do
    words = [f"t{i}" for i in range(options.vocab_size - 1)] + ["<|endoftext|>"]
    write_json(directory / "vocab.json", {word: i for i, word in enumerate(words)})
    (directory / "merges.txt").write_text("#version: 0.2\n")


@dataclass(frozen=True)
class Subject:
    """What is measured, and what a contestant is told so that it does the same. n: new tokens."""

    model: TensorParallelGPT
    options: SampleOptions
    tokenizer: Tokenizer
    prompt: list[int]
    n: int
    job: dict[str, Any]

    @property
    def sampling(self) -> Sampling:
        return Sampling(n_tokens=self.model.config.vocab_size, temperature=0, max_new_tokens=self.n)

    def describe(self) -> dict[str, Any]:
        model = asdict(self.model.config) | {"parameters": self.model.split.count()}
        return {"model": model, "sync": str(self.model.schedule)}


@contextmanager
def subject(world: World, options: BenchModelOptions, n: int, text: str = "") -> Iterator[Subject]:
    """The model on these ranks, from weights that the contestants read too. text: what the prompt says, or FILE:path; random
    tokens unless given. UserError where the tokens do not fit it."""
    with tempfile.TemporaryDirectory() as scratch:
        weights = world.gather(options.init_from or str(Path(scratch) / "weights"))[0]
        if not options.init_from and world.is_main:
            write_random(Path(weights), options)
        world.barrier()
        source = open_source(weights, (world.rank, world.size))
        size, vocab_size = source.config.block_size, source.config.vocab_size
        tokenizer = tokenizer_of(source)
        prompt = [(7 * i * i + 3) % (vocab_size - 1) for i in range(options.prompt_tokens)]
        if text:
            (prompt,) = encode(read_prompts([text]), tokenizer)
            check_prompts([prompt], vocab_size, size, Sampling(vocab_size))
        if len(prompt) + n > size:
            raise UserError(f"a prompt of {len(prompt)} tokens and {n} new ones do not fit block_size={size}.")
        names = ("device", "dtype", "compile", "quantize", "sync", "sequence_parallel")
        settings = SampleOptions(**{name: getattr(options, name) for name in names})
        model = load(world, source, settings)
        job = {"weights": weights, "scratch": scratch, "prompt": prompt, "new_tokens": n}
        job |= {"quantize": options.quantize, "compile": options.compile}
        yield Subject(model, settings, tokenizer, prompt, n, job)


def same_tokens(rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """How many of the tokens each contestant has chosen as nanoTP did."""
    tokens = {name: turn["tokens"] for name, turn in rounds[0].items()}
    ours = tokens.pop("nanotp")
    same = {name: sum(a == b for a, b in zip(ours, theirs, strict=False)) for name, theirs in tokens.items()}
    return [f"{name}: {count} of {len(ours)} tokens as ours" for name, count in same.items()]


# --- decode ---------------------------------------------------------------------------------------------------------


class FromFirstStep:
    """A decoder that counts its steps, and notes where the account stood before the first: reading the prompt is no part of
    decoding."""

    def __init__(self, decoder: Decoder, world: World):
        self.decoder, self.world, self.name, self.why = decoder, world, decoder.name, decoder.why
        self.before: Account | None = None
        self.steps, self.capture_s = 0, 0.0

    def logits(self, tokens: list[list[int]], cache: KVCache) -> torch.Tensor:
        if self.before is None:
            self.before = self.world.ledger.snapshot()
        self.steps += 1
        logits = self.decoder.logits(tokens, cache)
        self.capture_s = self.decoder.capture_s
        return logits


def decode(world: World, options: BenchDecodeOptions) -> None:
    bench = Bench(world, options, DECODERS, ("all_syncs", "no_draft"))
    with subject(world, options, options.new_tokens, options.prompt) as measured:
        model, n, schedule = measured.model, measured.n, measured.model.schedule
        guess = replace(measured.options, draft=options.draft, draft_tokens=options.draft_tokens)
        draft = load_draft(world, guess, measured.tokenizer, measured.sampling)
        decoder = FromFirstStep(decoder_for(model), world)
        plain = None
        if "all_syncs" in bench.names:
            model.set_schedule(Schedule.plain(model.config.n_layer))
            plain = decoder_for(model)
            model.set_schedule(schedule)
        weights = read_weights(model)
        read = sum(world.gather(sum(w.nbytes for w in weights)))
        length = len(measured.prompt) + n / 2
        needed = peaks.operations(model.split, length, backward=False)
        dtype = next(model.parameters()).dtype

        def step(record: bool = True, guess: bool = True) -> dict[str, Any]:
            decoder.before, decoder.steps, captured = None, 0, decoder.capture_s
            world.ledger.on = record
            result = generate(model, [measured.prompt], measured.sampling, decoder, draft if guess else None)
            world.ledger.on = True
            timing, said = result.timing, total(world.ledger.since(decoder.before or {}))
            count = timing.decode_tokens
            seconds = timing.decode_s - (decoder.capture_s - captured)
            made = {"seconds": seconds / count, "tokens": result.rows[0].tokens[-n:], "steps": decoder.steps / count}
            return made | {"collectives": said.seconds / count, "bytes": said.bytes / count, "calls": said.calls / count}

        def once() -> dict[str, Any]:
            made = step()
            # in the round: a shared machine's changes by the minute
            most = {"bandwidth": peaks.bandwidth(world, weights), "arithmetic": peaks.arithmetic(world, dtype)}
            return made | most

        def all_syncs() -> dict[str, Any]:
            model.set_schedule(Schedule.plain(model.config.n_layer))
            result = generate(model, [measured.prompt], measured.sampling, decoder=plain)
            model.set_schedule(schedule)
            seconds = result.timing.decode_s / result.timing.decode_tokens
            return {"seconds": seconds, "tokens": result.rows[0].tokens[-n:]}

        def no_draft() -> dict[str, Any]:
            return step(guess=False)

        step()
        others = {"all_syncs": all_syncs, "no_draft": no_draft}
        with bench.contestants(measured.job) as contestants:
            rounds = bench.rounds(once, contestants, **{name: others[name] for name in bench.own if name in bench.names})
        overhead = []
        for i in range(options.repeats if options.ledger else 0):  # each comes first every other time
            seconds = {record: step(record)["seconds"] for record in ((True, False) if i % 2 else (False, True))}
            overhead.append(seconds[True] / seconds[False])
    figures, lines = compare(rounds, "tokens/s", 1.0)
    ours = [turn["nanotp"] for turn in rounds]
    shares = [turn["collectives"] / turn["seconds"] for turn in ours]
    rates, bandwidths = [read * turn["steps"] / turn["seconds"] for turn in ours], [turn["bandwidth"] for turn in ours]
    used = [rate / most for rate, most in zip(rates, bandwidths, strict=True)]
    mfu = [needed / turn["seconds"] / turn["arithmetic"] for turn in ours]
    lines += [
        f"decode of {n} tokens after {len(measured.prompt)}, batch 1, on {world.size} ranks of {torch.get_num_threads()} "
        f"threads: {world.comm}, {decoder.name} step{', int8' if options.quantize else ''}; sync points: {schedule}",
        f"weights read: {shown([rate / 1e9 for rate in rates])} GB/s, {shown(used, '.0%')} (MBU) of what they are "
        f"read at alone, by all ranks at once, {shown([most / 1e9 for most in bandwidths])} GB/s",
        f"products: {shown(mfu, '.2%')} of {shown([turn['arithmetic'] / 1e9 for turn in ours])} GFLOP/s (MFU)",
        f"in collectives (rank 0's clock): {shown(shares, '.1%')} of a step; {ours[0]['calls']:.1f} calls and "
        f"{ours[0]['bytes']:,.0f} bytes a token, {ring_bytes(ours[0]['bytes'], world.size):,.0f} sent by a ring",
    ]
    if draft is not None:
        right = draft.accepted / max(1, draft.proposed)
        lines.append(f"draft {options.draft}: {right:.0%} of its guesses right, {ours[0]['steps']:.2f} steps a token")
    lines += same_tokens(rounds)
    if overhead:
        lines.append(f"with the account a step takes {shown(overhead, '.3f')} times as long as without")
    if world.is_main and options.plot:
        plot_bars(options.plot, f"GPT-2 {model.split.count() / 1e6:.0f}M, batch 1, {bench.threads} cores", "tokens/s", figures)
    more = {"read_bandwidth": spread(bandwidths), "weight_bytes_read": read, "share_of_bandwidth": spread(used)}
    more |= {"share_of_arithmetic": spread(mfu), "capture_s": decoder.capture_s}
    more |= {"share_in_collectives": spread(shares)} | ({"ledger_ratio": spread(overhead)} if overhead else {})
    more |= {"calls_per_token": {name: turn["calls"] for name, turn in rounds[0].items() if "calls" in turn}}
    if draft is not None:
        made = {"draft": options.draft, "draft_tokens": options.draft_tokens}
        more["speculation"] = made | {"proposed": draft.proposed, "accepted": draft.accepted}
    bench.finish("decode", {**measured.describe(), "decoder": decoder.name, "parties": figures, **more}, lines)


# --- prefill --------------------------------------------------------------------------------------------------------


def prefill(world: World, options: BenchPrefillOptions) -> None:
    """From a prompt's tokens to the first new one."""
    bench = Bench(world, options, PREFILLERS)
    with subject(world, options, 1) as measured:
        model, n = measured.model, options.prompt_tokens

        def once() -> dict[str, Any]:
            before, started = world.ledger.snapshot(), time.perf_counter()
            result = generate(model, [measured.prompt], measured.sampling)
            seconds = time.perf_counter() - started
            said = total(world.ledger.since(before))
            made = {"seconds": seconds, "tokens": result.rows[0].tokens[-1:], "collectives": said.seconds}
            return made | {"bytes": said.bytes, "calls": said.calls}

        once()
        with bench.contestants(measured.job) as contestants:
            rounds = bench.rounds(once, contestants)
    figures, lines = compare(rounds, "prompt tokens/s", n)
    ours = [turn["nanotp"] for turn in rounds]
    shares = [turn["collectives"] / turn["seconds"] for turn in ours]
    lines += [
        f"from a prompt of {n} tokens to the first new one: {shown([1e3 * turn['seconds'] for turn in ours])} ms on "
        f"{world.size} ranks of {torch.get_num_threads()} threads, {world.comm}",
        f"in collectives (rank 0's clock): {shown(shares, '.1%')}; {ours[0]['calls']} calls and {ours[0]['bytes']:,} bytes, "
        f"{ring_bytes(ours[0]['bytes'], world.size):,.0f} sent by a ring",
        *same_tokens(rounds),
    ]
    if world.is_main and options.plot:
        plot_bars(options.plot, f"reading a prompt of {n} tokens, {bench.threads} cores", "prompt tokens/s", figures)
    bench.finish("prefill", {**measured.describe(), "parties": figures, "share_in_collectives": spread(shares)}, lines)


# --- start ----------------------------------------------------------------------------------------------------------

# what no program of several ranks can do without: torch, and a group of them
BARE = "import torch, torch.distributed as d; d.init_process_group('gloo'); print(d.get_rank(), flush=True)"


def start(world: World, options: BenchStartOptions) -> None:
    """From `torchrun` to the first token, beside a torchrun whose ranks import torch, make a gloo group and print a word."""
    if world.size > 1:
        raise UserError("bench_tp.py start calls torchrun itself: start it with plain python.")
    bench = Bench(world, options, ())
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_random(place / "weights", options)
        (place / "bare.py").write_text(BARE)
        with redirect_stdout(sys.stderr):
            split(SplitOptions(init_from=str(place / "weights"), tp=options.ranks, out=str(place / "shards")))
        sample = [str(ROOT / "sample_tp.py"), f"--init_from={place / 'shards'}", "--prompt=5 17 3", "--tokenizer=ids"]
        programs = {"nanotp": [*sample, "--max_new_tokens=1"], "bare": [str(place / "bare.py")]}
        for words in programs.values():
            first_word(options.ranks, words)  # files are in memory from here on, and C is compiled
        turns = tqdm(range(options.repeats), desc="bench", unit="round", disable=not sys.stderr.isatty())
        rounds = [{name: {"seconds": first_word(options.ranks, words)} for name, words in programs.items()} for _ in turns]
    seconds = {name: [turn[name]["seconds"] for turn in rounds] for name in programs}
    ratios = [turn["nanotp"]["seconds"] / turn["bare"]["seconds"] for turn in rounds]
    lines = [
        f"torchrun of {options.ranks} ranks to the first token: {shown(seconds['nanotp'], '.2f')} s",
        f"torchrun of {options.ranks} ranks that import torch and make a gloo group: {shown(seconds['bare'], '.2f')} s",
        f"the first takes {shown(ratios, '.2f')} times as long",
    ]
    figures = {name: spread(values) for name, values in seconds.items()}
    bench.finish("start", {"ranks": options.ranks, "seconds": figures, "ratio": spread(ratios)}, lines)


def first_word(ranks: int, program: list[str]) -> float:
    """Seconds until a program that torchrun starts says something on standard output. UserError where it does not."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *program]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as run:
            assert run.stdout is not None
            word = run.stdout.read(1)
            seconds = time.perf_counter() - started
            run.stdout.read()
        if not word or run.returncode:
            said.seek(0)
            raise UserError(f"{program[0]} failed: {(said.read().strip().splitlines() or ['no message'])[-1][:200]}")
    return seconds

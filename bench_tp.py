"""Measure: how fast ranks decode and train, what they wait for, and how that compares, round by round, with what a user
would pick instead.

    torchrun --standalone --nproc_per_node=2 bench_tp.py decode --against=hf,ctranslate2,one_rank
    torchrun --standalone --nproc_per_node=2 bench_tp.py train --against=reference
    torchrun --standalone --nproc_per_node=2 bench_tp.py allreduce

A round is one turn of nanoTP and one of each contestant; ratios are taken within rounds. While one runs the others wait
without using a core. Figures are medians over the rounds, with the least and the most.
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import report
import train_tp
from benchmarks.contestants import DECODERS, TRAINERS, Contestant
from checkpoints.shards import TensorFile, write_json
from checkpoints.sources import is_conv1d, open_source
from decoding import Decoder, decoder_for
from entry import run_commands
from errors import UserError
from generation import Sampling, generate
from model import GPTConfig, KVCache, initial_tensor
from native.library import Unavailable
from options import BenchAllreduceOptions, BenchDecodeOptions, BenchOptions, BenchTrainOptions, SampleOptions, TrainOptions
from parallel.collectives import all_reduce
from parallel.ledger import Account, total
from parallel.mesh import World, make_axis
from parallel.partition import Partition
from parallel.quantized import weight_bytes
from sample_tp import load
from shard_checkpoint import hf_config
from text.dataset import Dataset, write_tokens

READ_BYTES = 1 << 28  # a rank's buffer for the measurement of bandwidth: larger than any cache


# --- figures --------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: list[float], form: str = ",.1f") -> str:
    s = spread(values)
    return f"{s['median']:{form}} ({s['min']:{form}} to {s['max']:{form}})"


def ring_bytes(nbytes: float, size: int) -> float:
    """What each rank sends in a ring all-reduce of a message of nbytes over `size` ranks: 2 (N - 1) / N of it."""
    return 2 * (size - 1) / size * nbytes


def machine() -> dict[str, Any]:
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = (line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(found, name)
    return {"cpu": name, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def read_bandwidth(world: World) -> float:
    """Bytes a second that all ranks together read from memory, each summing a buffer of its own; the best of a few."""
    buffer, passes, seconds = torch.ones(READ_BYTES // 4), 12, []
    for _ in range(4):
        world.barrier()
        started = time.perf_counter()
        for _ in range(passes):  # long beside the moment by which one rank leaves the barrier before another
            buffer.sum()
        seconds.append(max(world.gather(time.perf_counter() - started)))
    return world.size * passes * READ_BYTES / min(seconds)


class Bench:
    """Rounds of nanoTP and its contestants; rank 0 alone has contestants, and speaks."""

    def __init__(self, world: World, options: BenchOptions, known: tuple[str, ...]):
        self.world, self.options = world, options
        self.names = [name for name in options.against.split(",") if name]
        for name in self.names:
            if name not in known:
                raise UserError(f"--against={name} is not one of {', '.join(known)}.")
        if options.plot and world.is_main:
            report.check_place(options.plot, "plot")
            _pyplot()
        if world.is_main:
            report.check_place(options.report, "report")
        self.threads = world.size * torch.get_num_threads()

    @contextmanager
    def contestants(self, job: dict[str, Any]) -> Iterator[list[Contestant]]:
        """The contestants, loaded; on the other ranks none."""
        with ExitStack() as stack:
            found = []
            for name in self.names if self.world.is_main else []:
                contestant = Contestant({"kind": name, "threads": self.threads, **job})
                stack.callback(contestant.close)
                found.append(contestant)
            self.world.barrier()
            yield found

    def rounds(self, ours: Callable[[], dict[str, Any]], contestants: list[Contestant]) -> list[dict[str, dict[str, Any]]]:
        """For each round what each of the parties answered; the others than rank 0 get nanoTP's alone."""
        made = []
        show = self.world.is_main and sys.stderr.isatty()
        for _ in tqdm(range(self.options.repeats), desc="bench", unit="round", disable=not show):
            self.world.barrier()
            turn = {"nanotp": ours()}
            for contestant in contestants:
                turn[contestant.kind] = contestant.round()
            self.world.barrier()  # gloo's: those who wait here sleep
            made.append(turn)
        return made

    def finish(self, what: str, figures: dict[str, Any], lines: list[str]) -> None:
        if not self.world.is_main:
            return
        print("\n".join(lines))
        if self.options.report:
            world = {"world_size": self.world.size, "comm": self.world.comm, "device": self.world.device.type}
            made = {"entry": "bench_tp", "what": what, **world, "machine": machine(), "command": sys.argv, **figures}
            report.write(self.options.report, made)


def compare(rounds: list[dict[str, dict[str, Any]]], unit: str, per_round: float) -> tuple[dict[str, Any], list[str]]:
    """Rates of all parties (per_round / seconds), and within each round nanoTP's over each contestant's."""
    rates = {name: [per_round / turn[name]["seconds"] for turn in rounds] for name in rounds[0]}
    figures: dict[str, Any] = {name: {unit: spread(values), "rounds": values} for name, values in rates.items()}
    lines = [f"{'':<14} {unit:>28} {'nanoTP is so many times as fast':>34}"]
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["nanotp"], values, strict=True)]
        figures[name]["ratio"] = spread(ratios)
        lines.append(f"{name:<14} {shown(values):>28} {'' if name == 'nanotp' else shown(ratios, '.2f'):>34}")
    return figures, lines


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_bars(path: str, title: str, unit: str, figures: dict[str, Any]) -> None:
    """A bar for each party, with the spread of its rounds."""
    plt = _pyplot()
    names = list(figures)
    middles = [figures[name][unit]["median"] for name in names]
    low = [figures[name][unit]["median"] - figures[name][unit]["min"] for name in names]
    high = [figures[name][unit]["max"] - figures[name][unit]["median"] for name in names]
    figure, axes = plt.subplots(figsize=(7, 0.7 * len(names) + 1.4))
    bars = axes.barh(names, middles, xerr=[low, high], color=["#c44e52" if n == "nanotp" else "#8c9bb0" for n in names])
    axes.bar_label(bars, [f"{m:,.1f}" for m in middles], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel=unit, title=title)
    figure.tight_layout()
    figure.savefig(Path(path).expanduser(), dpi=120)


# --- decode ---------------------------------------------------------------------------------------------------------


def write_random(directory: Path, options: BenchOptions) -> None:
    """A directory in Hugging Face format with weights as a fresh model has them."""
    config = GPTConfig(1024, options.vocab_size, options.n_layer, options.n_head, options.n_embd, activation="gelu_tanh")
    directory.mkdir()
    shapes = Partition.of(config, 1).shapes()
    stored = {name: shape[::-1] if is_conv1d(name) else shape for name, shape in shapes.items()}
    file = TensorFile(directory / "model.safetensors", stored, torch.float32, metadata={"format": "pt"})
    for name, shape in shapes.items():
        tensor = initial_tensor(name, shape, config.n_layer, options.seed)
        file.write(name, tensor.t() if is_conv1d(name) else tensor)
    file.close()
    write_json(directory / "config.json", hf_config(config, "float32"))
    # a contestant's converter asks for a tokenizer: one word for each id will do
    words = [f"t{i}" for i in range(options.vocab_size - 1)] + ["<|endoftext|>"]
    write_json(directory / "vocab.json", {word: i for i, word in enumerate(words)})
    (directory / "merges.txt").write_text("#version: 0.2\n")


class FromFirstStep:
    """A decoder that notes where the account stood before its first step: reading the prompt is no part of decoding."""

    def __init__(self, decoder: Decoder, world: World):
        self.decoder, self.world, self.name, self.why = decoder, world, decoder.name, decoder.why
        self.before: Account | None = None

    def logits(self, tokens: list[int], cache: KVCache) -> torch.Tensor:
        if self.before is None:
            self.before = self.world.ledger.snapshot()
        return self.decoder.logits(tokens, cache)


def decode(world: World, options: BenchDecodeOptions) -> None:
    bench = Bench(world, options, DECODERS)
    with tempfile.TemporaryDirectory() as scratch:
        weights = world.gather(options.init_from or str(Path(scratch) / "weights"))[0]
        if not options.init_from and world.is_main:
            write_random(Path(weights), options)
        world.barrier()
        source = open_source(weights, (world.rank, world.size))
        prompt = [(7 * i * i + 3) % (source.config.vocab_size - 1) for i in range(options.prompt_tokens)]
        if options.prompt_tokens + options.new_tokens > source.config.block_size:
            raise UserError(
                f"prompt_tokens={options.prompt_tokens} and new_tokens={options.new_tokens} do not fit "
                f"block_size={source.config.block_size}."
            )
        settings = {name: getattr(options, name) for name in ("device", "dtype", "compile", "quantize")}
        model = load(world, source, SampleOptions(**settings))
        decoder = FromFirstStep(decoder_for(model), world)
        n = options.new_tokens
        sampling = Sampling(n_tokens=source.config.vocab_size, temperature=0, max_new_tokens=n)

        def once(record: bool = True) -> dict[str, Any]:
            decoder.before = None
            world.ledger.on = record
            result = generate(model, [prompt], sampling, decoder=decoder)
            world.ledger.on = True
            timing, said = result.timing, total(world.ledger.since(decoder.before or {}))
            step, steps = timing.decode_s / timing.decode_tokens, timing.decode_tokens
            made = {"seconds": step, "tokens": result.rows[0].tokens[-n:], "share": said.seconds / timing.decode_s}
            return made | {"prefill_s": timing.prefill_s, "bytes": said.bytes / steps, "calls": said.calls / steps}

        once()
        job = {"weights": weights, "scratch": scratch, "prompt": prompt, "new_tokens": n, "quantize": options.quantize}
        with bench.contestants(job) as contestants:
            rounds = bench.rounds(once, contestants)
        bandwidth = read_bandwidth(world)
        overhead = []
        for i in range(options.repeats if options.ledger else 0):  # each comes first every other time
            seconds = {record: once(record)["seconds"] for record in ((True, False) if i % 2 else (False, True))}
            overhead.append(seconds[True] / seconds[False])
        read = sum(world.gather(weight_bytes(model) - table_bytes(model)))
    figures, lines = compare(rounds, "tokens/s", 1.0)
    ours = [turn["nanotp"] for turn in rounds]
    rate, shares = statistics.median(1 / turn["seconds"] for turn in ours), [turn["share"] for turn in ours]
    lines += [
        f"decode of {n} tokens after {options.prompt_tokens}, batch 1, on {world.size} ranks of {torch.get_num_threads()} "
        f"threads: {world.comm}, {decoder.name} step{', int8' if options.quantize else ''}",
        f"weights read: {read * rate / 1e9:.1f} GB/s, {read * rate / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s that "
        f"all ranks together read",
        f"in collectives (rank 0's clock): {shown(shares, '.1%')} of a step; {ours[0]['calls']:.1f} calls and "
        f"{ours[0]['bytes']:,.0f} bytes a token, {ring_bytes(ours[0]['bytes'], world.size):,.0f} sent by a ring",
    ]
    for name in bench.names if world.is_main else []:
        same = sum(a == b for a, b in zip(ours[0]["tokens"], rounds[0][name]["tokens"], strict=False))
        lines.append(f"{name}: {same} of {n} tokens as ours")
    if overhead:
        lines.append(f"with the account a step takes {shown(overhead, '.3f')} times as long as without")
    if world.is_main and options.plot:
        plot_bars(options.plot, f"GPT-2 {model.split.count() / 1e6:.0f}M, batch 1, {bench.threads} cores", "tokens/s", figures)
    more = {"read_bandwidth": bandwidth, "weight_bytes_read": read, "share_in_collectives": spread(shares)}
    more |= {"ledger_ratio": spread(overhead)} if overhead else {}
    config = asdict(source.config) | {"parameters": model.split.count()}
    bench.finish("decode", {"model": config, "decoder": decoder.name, "parties": figures, **more}, lines)


def table_bytes(model: Any) -> int:
    """Bytes of this rank's weights that a decode step does not read: position rows, and the float table beside an int8 head."""
    wte, wpe = model.transformer.wte, model.transformer.wpe.weight
    skipped: int = wpe.numel() * wpe.element_size()
    if hasattr(wte, "int8"):
        skipped += wte.weight.numel() * wte.weight.element_size()
    return skipped


# --- train ----------------------------------------------------------------------------------------------------------


def train(world: World, options: BenchTrainOptions) -> None:
    bench = Bench(world, options, TRAINERS)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(world.gather(scratch)[0])
        if world.is_main:
            (place / "random").mkdir()
            ids = np.random.default_rng(options.seed).integers(options.vocab_size, size=200_000)
            for split in ("train", "val"):
                write_tokens(place / "random" / f"{split}.bin", ids, options.vocab_size)
        world.barrier()
        names = ("device", "dtype", "compile", "batch_size", "block_size", "n_layer", "n_head", "n_embd")
        settings = {name: getattr(options, name) for name in (*names, "activation_checkpointing", "tp")}
        settings |= {"data_dir": str(place), "dataset": "random", "out_dir": str(place / "out")}
        asked = TrainOptions(gradient_accumulation_steps=1, bias=True, **settings)
        run = train_tp.prepare(world, asked, Dataset(place / "random"))

        def once() -> dict[str, Any]:
            before, started = world.ledger.snapshot(), time.perf_counter()
            losses = []
            for _ in range(options.steps):
                losses.append(train_tp.iterate(run, 1e-4)[0])
                run.progress.iter_num += 1
            world.synchronize()
            seconds = time.perf_counter() - started
            account = total(world.ledger.since(before))
            made = {"seconds": seconds / options.steps, "losses": losses, "share": account.seconds / seconds}
            return made | {"bytes": account.bytes / options.steps, "calls": account.calls / options.steps}

        once()
        config = asdict(run.model.config)
        job = {"config": config, "dataset": str(place / "random"), "batch_size": options.batch_size, "steps": options.steps}
        with bench.contestants(job) as contestants:
            rounds = bench.rounds(once, contestants)
    tokens = options.batch_size * options.block_size
    figures, lines = compare(rounds, "tokens/s", tokens)
    ours = [turn["nanotp"] for turn in rounds]
    shares = [turn["share"] for turn in ours]
    lines += [
        f"training of {options.batch_size} x {options.block_size} tokens a step: dp {world.dp.size} x tp {world.tp.size}, "
        f"{torch.get_num_threads()} threads a rank, {world.comm}",
        f"in collectives (rank 0's clock): {shown(shares, '.1%')} of a step; {ours[0]['calls']:.1f} calls and "
        f"{ours[0]['bytes']:,.0f} bytes a step",
    ]
    if world.is_main and options.plot:
        plot_bars(options.plot, f"training, {options.batch_size} x {options.block_size} tokens a step", "tokens/s", figures)
    bench.finish("train", {"model": config, "parties": figures, "share_in_collectives": spread(shares)}, lines)


# --- allreduce ------------------------------------------------------------------------------------------------------


def allreduce(world: World, options: BenchAllreduceOptions) -> None:
    bench = Bench(world, options, ())
    if world.mesh is None:
        raise UserError("bench_tp.py allreduce needs ranks: torchrun --standalone --nproc_per_node=2 bench_tp.py allreduce")
    try:
        sizes = [int(word) for word in options.sizes.split(",")]
    except ValueError:
        raise UserError(f"--sizes={options.sizes} are not numbers of bytes with commas between.") from None
    axes = {}
    for comm in ("nccl",) if world.device.type == "cuda" else ("shm", "gloo"):
        try:
            axes[comm] = make_axis("tp", world.mesh, comm, world.ledger)
        except Unavailable as error:
            print(f"{comm}: {error}", file=sys.stderr)
    found: list[dict[str, Any]] = []
    for nbytes in sizes:
        message = torch.randn(max(1, nbytes // 4), device=world.device)
        calls = max(5, min(300, (1 << 24) // nbytes))
        times: dict[str, list[float]] = {comm: [] for comm in axes}
        for _ in range(options.repeats):
            for comm, axis in axes.items():
                world.barrier()
                for i in range(calls + 3):
                    started = time.perf_counter()
                    all_reduce(message, axis, "forward")
                    world.synchronize()
                    if i >= 3:
                        times[comm].append(time.perf_counter() - started)
        row = {comm: spread([1e6 * t for t in seconds]) for comm, seconds in times.items()}
        found.append({"bytes": nbytes, "us": row})
    lines = [f"all-reduce over {world.size} ranks of {torch.get_num_threads()} threads, float32; microseconds of a call"]
    lines.append(f"{'bytes':>12}" + "".join(f"{comm + ' median':>14}{'min':>10}{'bus GB/s':>10}" for comm in axes))
    for line in found:
        cells = ""
        for comm in axes:
            us = line["us"][comm]
            bus = ring_bytes(line["bytes"], world.size) / us["median"] / 1e3
            cells += f"{us['median']:>14,.1f}{us['min']:>10,.1f}{bus:>10.2f}"
        lines.append(f"{line['bytes']:>12,}{cells}")
    if world.is_main and options.plot:
        plt = _pyplot()
        figure, plane = plt.subplots(figsize=(7, 4))
        for comm in axes:
            plane.plot(sizes, [line["us"][comm]["median"] for line in found], marker="o", label=comm)
        plane.set(xscale="log", yscale="log", xlabel="bytes", ylabel="microseconds", title=f"all-reduce, {world.size} ranks")
        plane.legend()
        figure.tight_layout()
        figure.savefig(Path(options.plot).expanduser(), dpi=120)
    bench.finish("allreduce", {"sizes": found}, lines)


COMMANDS: dict[str, tuple[type[Any], Callable[[World, Any], None]]] = {
    "decode": (BenchDecodeOptions, decode),
    "train": (BenchTrainOptions, train),
    "allreduce": (BenchAllreduceOptions, allreduce),
}

if __name__ == "__main__":
    run_commands(COMMANDS, "bench_tp.py")

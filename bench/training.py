"""Training, measured: its iterations, and what a checkpoint costs."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.contestants import TRAINERS
from bench.rounds import Bench, compare, plot_bars, shown, spread
from checkpoints.huggingface import GPT2_TOKENS
from cli.options import BenchSaveOptions, BenchTrainOptions, TrainOptions
from parallel.ledger import total
from text.dataset import Dataset, write_tokens
from text.tokenizer import IdsTokenizer, write_tokenizer
from train.checkpoint import Saver
from train.loop import agree, iterate
from train.loop import save as save_run
from train.setup import Run, prepare
from world import peaks
from world.mesh import World


@contextmanager
def prepared(world: World, options: BenchTrainOptions | BenchSaveOptions, **more: Any) -> Iterator[tuple[Run, Path]]:
    """A run on random tokens that stands before its first iteration, and the directory that it is in."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(world.gather(scratch)[0])
        if world.is_main:
            (place / "random").mkdir()
            ids = np.random.default_rng(options.seed).integers(options.vocab_size, size=200_000)
            for split in ("train", "val"):
                write_tokens(place / "random" / f"{split}.bin", ids, options.vocab_size)
            if options.vocab_size != GPT2_TOKENS:  # else the table has nanoGPT's 50304 rows
                write_tokenizer(IdsTokenizer(options.vocab_size), place / "random")
        world.barrier()
        names = ("device", "dtype", "compile", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "tp")
        settings = {name: getattr(options, name) for name in names} | more
        settings |= {"data_dir": str(place), "dataset": "random", "out_dir": str(place / "out")}
        asked = TrainOptions(gradient_accumulation_steps=1, bias=True, **settings)
        yield prepare(world, asked, Dataset(place / "random")), place
        world.barrier()


def train(world: World, options: BenchTrainOptions) -> None:
    bench = Bench(world, options, TRAINERS)
    with prepared(world, options, activation_checkpointing=options.activation_checkpointing) as (run, place):

        def once() -> dict[str, Any]:
            before, started = world.ledger.snapshot(), time.perf_counter()
            losses = []
            for _ in range(options.steps):
                losses.append(iterate(run, 1e-4)[0])
                run.progress.iter_num += 1
            world.synchronize()
            seconds = time.perf_counter() - started
            account = total(world.ledger.since(before))
            made = {"seconds": seconds / options.steps, "losses": losses, "share": account.seconds / seconds}
            made |= {"bytes": account.bytes / options.steps, "calls": account.calls / options.steps}
            return made | {"arithmetic": peaks.arithmetic(world, run.dtype)}

        once()
        config = asdict(run.model.config)
        job = {"config": config, "dataset": str(place / "random"), "compile": options.compile}
        job |= {"batch_size": options.batch_size, "steps": options.steps}
        with bench.contestants(job) as contestants:
            rounds = bench.rounds(once, contestants)
    tokens = options.batch_size * options.block_size
    figures, lines = compare(rounds, "tokens/s", tokens)
    ours = [turn["nanotp"] for turn in rounds]
    shares = [turn["share"] for turn in ours]
    needed = tokens * peaks.operations(run.model.split, options.block_size, backward=True)
    mfu = [needed / turn["seconds"] / turn["arithmetic"] for turn in ours]
    lines += [
        f"training of {options.batch_size} x {options.block_size} tokens a step: dp {world.dp.size} x tp {world.tp.size}, "
        f"{torch.get_num_threads()} threads a rank, {world.comm}",
        f"in collectives (rank 0's clock): {shown(shares, '.1%')} of a step; {ours[0]['calls']:.1f} calls and "
        f"{ours[0]['bytes']:,.0f} bytes a step",
        f"products: {shown(mfu, '.1%')} of {shown([turn['arithmetic'] / 1e9 for turn in ours])} GFLOP/s (MFU)",
    ]
    if world.is_main and options.plot:
        plot_bars(options.plot, f"training, {options.batch_size} x {options.block_size} tokens a step", "tokens/s", figures)
    found = {"share_in_collectives": spread(shares), "share_of_arithmetic": spread(mfu)}
    bench.finish("train", {"model": config, "parties": figures, **found}, lines)


# --- saves ----------------------------------------------------------------------------------------------------------


def save(world: World, options: BenchSaveOptions) -> None:
    """For how long a run stands still for a checkpoint, in front and in the background."""
    bench = Bench(world, options, ())
    with prepared(world, options) as (run, place):
        savers = {kind: Saver(world, place / kind, 1, kind == "background") for kind in ("front", "background")}
        if world.is_main:
            for kind in savers:
                (place / kind).mkdir()

        def iterations(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                iterate(run, 1e-4)
                run.progress.iter_num += 1
            world.synchronize()
            return time.perf_counter() - started

        def saved(kind: str, usual: float) -> dict[str, Any]:
            """What a save costs: the seconds that it and the iterations beside it take, beyond what these usually take."""
            started, count = time.perf_counter(), 0
            ended = save_run(run, savers[kind])
            pause = time.perf_counter() - started
            while agree(world, (int(world.is_main and not ended),))[0]:
                iterations(1)
                count += 1
                ended = savers[kind].poll(not agree(world, (int(savers[kind].busy),))[0])
            seconds = time.perf_counter() - started
            return {"pause": pause, "stall": seconds - count * usual, "seconds": seconds, "iterations": count}

        iterations(2)
        for saver in savers.values():  # the first takes the memory
            save_run(run, saver)
            saver.finish()
        rounds: list[dict[str, Any]] = []
        for _ in range(options.repeats):
            usual = iterations(options.steps) / options.steps
            rounds.append({kind: saved(kind, usual) for kind in savers} | {"iteration": usual})
    front, background = ([turn[kind]["stall"] for turn in rounds] for kind in savers)
    ratios = [b / f for f, b in zip(front, background, strict=True)]
    parameters = run.model.split.count()
    figures = {"parameters": parameters, "bytes": 12 * parameters, "dp": world.dp.size, "tp": world.tp.size, "rounds": rounds}
    figures |= {"front_s": spread(front), "background_s": spread(background), "ratio": spread(ratios)}
    pauses, times = ([turn["background"][key] for turn in rounds] for key in ("pause", "seconds"))
    lines = [
        f"a checkpoint of {parameters / 1e6:.0f}M parameters, {12 * parameters / 1e9:.2f} GB; an iteration takes "
        f"{shown([turn['iteration'] for turn in rounds], '.2f')} s",
        f"in front          costs the run {shown(front, '.2f')} s",
        f"in the background {shown(background, '.2f')} s: at once {shown(pauses, '.2f')} s, the rest is what writing takes of "
        f"the processor; written after {shown(times, '.1f')} s",
        f"background over front: {shown(ratios, '.2f')}; what is at once: "
        f"{shown([p / f for p, f in zip(pauses, front, strict=True)], '.2f')}",
    ]
    bench.finish("save", figures, lines)

"""Training, measured: its iterations, and the time that a checkpoint takes."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.rounds import Bench, collectives, column, compare, shown, spread
from checkpoints.huggingface import GPT2_TOKENS
from cli.options import BenchSaveOptions, BenchTrainOptions, TrainOptions
from parallel.ledger import total
from text.dataset import Dataset, write_tokens
from text.tokenizer import IdsTokenizer, write_tokenizer
from train.checkpoint import Saver
from train.loop import agree, iterate
from train.setup import Run, prepare
from world import peaks
from world.mesh import World

SETTINGS = ("device", "dtype", "compile", "batch_size", "block_size", "n_layer", "n_head", "n_embd",
            "tp")


@contextmanager
def prepared(world: World, options: BenchTrainOptions | BenchSaveOptions,
             **more: Any) -> Iterator[tuple[Run, Path]]:
    """A run on random tokens before its first iteration, and the directory that it is in."""
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
        settings = {name: getattr(options, name) for name in SETTINGS}
        settings |= {"gradient_accumulation_steps": 1} | more
        asked = TrainOptions(bias=True, data_dir=str(place), dataset="random",
                             out_dir=str(place / "out"), **settings)
        yield prepare(world, asked, Dataset(place / "random")), place
        world.barrier()


def iterations(run: Run, count: int) -> tuple[float, list[float]]:
    """Their seconds, and the loss of each."""
    started, losses = time.perf_counter(), []
    for _ in range(count):
        losses.append(iterate(run, 1e-4)[0])
        run.progress.iter_num += 1
    run.world.synchronize()
    return time.perf_counter() - started, losses


def train(world: World, options: BenchTrainOptions) -> None:
    bench = Bench(world, options, ("reference",))
    tokens, count = options.batch_size * options.block_size, options.steps
    more = {"activation_checkpointing": options.activation_checkpointing}
    with prepared(world, options, **more) as (run, place):
        needed = tokens * peaks.operations(run.model.split, options.block_size, backward=True)

        def once() -> dict[str, Any]:
            before = world.ledger.snapshot()
            seconds, losses = iterations(run, count)
            account = total(world.ledger.since(before))
            arithmetic = peaks.arithmetic(world, run.dtype)
            return {"seconds": seconds / count, "losses": losses, "arithmetic": arithmetic,
                    "calls": account.calls / count, "bytes": account.bytes / count,
                    "share": account.seconds / seconds,
                    "mfu": count * needed / seconds / arithmetic}

        once()
        config = run.model.config.as_json()
        rounds = bench.against(once, {
            "config": config, "dataset": str(place / "random"), "compile": options.compile,
            "batch_size": options.batch_size, "steps": count})
    parties, lines = compare(rounds, "tokens/s", tokens)
    mfu, rates = column(rounds, "mfu"), shown(column(rounds, "arithmetic", 1e-9))
    lines += [
        f"training of {options.batch_size} x {options.block_size} tokens a step: dp "
        f"{world.dp.size} x tp {world.tp.size}, {torch.get_num_threads()} threads a rank, "
        f"{world.over}",
        collectives(rounds, "a step", " a step"),
        f"products: {shown(mfu, '.1%')} of {rates} GFLOP/s (MFU)"]
    bench.finish("train", {
        "model": config, "parties": parties, "share_of_arithmetic": spread(mfu),
        "share_in_collectives": spread(column(rounds, "share"))}, lines)


def save(world: World, options: BenchSaveOptions) -> None:
    """How long a run is stopped by a checkpoint, in front and in the background."""
    bench = Bench(world, options)
    rounds: list[dict[str, Any]] = []
    with prepared(world, options, keep_last=1) as (run, place):
        savers = {}
        for way in ("front", "background"):
            savers[way] = Saver(run, place / way, way == "background")
            if world.is_main:
                (place / way).mkdir()
        iterations(run, 2)
        for saver in savers.values():  # the first save allocates memory
            saver.save()
            saver.finish()
        for _ in range(options.repeats):
            usual = iterations(run, options.steps)[0] / options.steps
            found = {way: saved(saver, usual) for way, saver in savers.items()}
            rounds.append({"iteration": usual, **found})
    front, background = ([turn[way]["stall"] for turn in rounds] for way in savers)
    pauses, times = ([turn["background"][key] for turn in rounds] for key in ("pause", "seconds"))
    ratios, at_once = ([part / f for part, f in zip(parts, front, strict=True)]
                       for parts in (background, pauses))
    parameters, usual_s = run.model.split.count(), [turn["iteration"] for turn in rounds]
    lines = [
        f"a checkpoint of {parameters / 1e6:.0f}M parameters, {12 * parameters / 1e9:.2f} GB; "
        f"an iteration takes {shown(usual_s, '.2f')} s",
        f"in front          costs the run {shown(front, '.2f')} s",
        f"in the background {shown(background, '.2f')} s: at once {shown(pauses, '.2f')} s, "
        f"the rest is processor time that writing takes; written after {shown(times, '.1f')} s",
        f"background over front: {shown(ratios, '.2f')}; at once: {shown(at_once, '.2f')}"]
    bench.finish("save", {
        "parameters": parameters, "bytes": 12 * parameters, "rounds": rounds,
        "front_s": spread(front), "background_s": spread(background), "ratio": spread(ratios)},
        lines)


def saved(saver: Saver, usual: float) -> dict[str, Any]:
    """The cost of a save. stall: seconds of it and of the iterations beside it, less what these
    iterations usually take; pause: seconds before the first of them."""
    started, count, run = time.perf_counter(), 0, saver.run
    ended = saver.save()
    pause = time.perf_counter() - started
    while agree(run.world, (int(run.world.is_main and not ended),))[0]:
        iterations(run, 1)
        count += 1
        ended = saver.poll(not agree(run.world, (int(saver.busy),))[0])
    seconds = time.perf_counter() - started
    stall = seconds - count * usual
    return {"pause": pause, "stall": stall, "seconds": seconds, "iterations": count}

"""Training, measured."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_tp
from benchmarks.contestants import TRAINERS
from benchmarks.rounds import Bench, compare, plot_bars, shown, spread
from options import BenchTrainOptions, TrainOptions
from parallel.ledger import total
from parallel.mesh import World
from text.dataset import Dataset, write_tokens


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

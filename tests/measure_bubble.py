"""What the bubble of 1F1B costs: an iteration of m micro-batches over two stages beside (m + 1) / 2 m of one process's.

    python tests/measure_bubble.py [--rounds=5]

Two forked ranks of one thread on an idle machine of two cores or more. The model's head is small, so that the stages take
equally long. Exit status 1 where an iteration is more than 15 % off.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import faults
import torch
from ranks import run_ranks

from cli.options import TrainOptions
from text.dataset import Dataset
from train import loop, setup
from world.mesh import World

WITHIN = 0.15
SIZES: dict[str, Any] = {
    "dataset": "letters", "device": "cpu", "n_layer": 8, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 4,
    "tp": 1, "overwrite": True,
}  # fmt: skip


def seconds(world: World, settings: TrainOptions, rounds: int) -> float:
    """The median of some iterations."""
    run = setup.prepare(world, settings, Dataset(Path(settings.data_dir) / settings.dataset))
    found = []
    for _ in range(rounds + 1):
        world.barrier()
        start = time.perf_counter()
        loop.iterate(run, 1e-3)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def main(argv: list[str]) -> None:
    given = dict(word.removeprefix("--").split("=", 1) for word in argv)
    torch.set_num_threads(1)
    far = False
    with tempfile.TemporaryDirectory() as place:
        faults.prepare(Path(place))
        for m in (2, 4, 8):
            times = []
            for pp in (1, 2):
                out = str(Path(place) / f"out-{m}-{pp}")
                more = {"data_dir": f"{place}/data", "out_dir": out, "gradient_accumulation_steps": m, "pp": pp}
                settings = TrainOptions(**{**SIZES, **more})
                times.append(max(run_ranks(pp, seconds, settings, int(given.get("rounds", 5)), pp=pp, tp=1)))
            ideal = times[0] / 2 * (m + 1) / m
            far |= abs(times[1] / ideal - 1) > WITHIN
            print(f"m={m}: one process {times[0]:.3f} s, two stages {times[1]:.3f} s, (m + 1) / 2 m of one {ideal:.3f} s "
                  f"({times[1] / ideal - 1:+.0%})", flush=True)
    sys.exit(far)


if __name__ == "__main__":
    main(sys.argv[1:])

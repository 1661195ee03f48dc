"""Loading 124M shards: a rank's anonymous memory falls with tp. Each measurement is a process of its own."""

import json
import subprocess
from pathlib import Path

import pytest
from measure_split import write_model
from ranks import PYTHON

from model import GPTConfig
from shard_checkpoint import main

ROOT = Path(__file__).parent.parent
SMALL_GPT2 = GPTConfig(vocab_size=50257, activation="gelu_tanh")

LOAD = """
import json, sys, threading, time
sys.path.insert(0, {root!r})
import torch
from checkpoints.sources import open_source, reader
from parallel.collectives import Axis
from tp_model import TensorParallelGPT

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

base = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
rank, tp = {rank}, {tp}
source = open_source({shards!r}, (rank, tp))
model = TensorParallelGPT(source.config, Axis("tp", rank, tp), reader(source, rank))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([max(peak, anonymous()), base, weights]))
"""


def load(shards: Path, rank: int, tp: int) -> tuple[int, int, int]:
    """(peak anonymous bytes, those before loading, bytes of weights) of a fresh process that loads one rank's part."""
    script = LOAD.format(root=str(ROOT), shards=str(shards), rank=rank, tp=tp)
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
    peak, base, weights = json.loads(done.stdout)
    return peak, base, weights


@pytest.mark.slow
def test_a_rank_of_four_takes_less_than_half_the_memory_of_one(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", SMALL_GPT2)
    for tp in (1, 4):
        assert main(["split", f"--init_from={tmp_path / 'hf'}", f"--tp={tp}", f"--out={tmp_path / f'tp{tp}'}"]) == 0
    whole, _, _ = load(tmp_path / "tp1", 0, 1)
    for rank in (0, 3):
        peak, base, weights = load(tmp_path / "tp4", rank, 4)
        print(f"MB: tp 1 {whole / 1e6:.0f}; rank {rank} of 4 {peak / 1e6:.0f}, {base / 1e6:.0f} of it before the weights")
        assert peak < whole / 2
        assert peak - base < 1.6 * weights  # the weights, and one tensor on its way

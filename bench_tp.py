"""Measure: how fast ranks decode, read a prompt, train and start, what they wait for, and how that compares, round by round,
with what a user would pick instead.

    torchrun --standalone --nproc_per_node=2 bench_tp.py decode --against=hf,ctranslate2,one_rank
    torchrun --standalone --nproc_per_node=2 bench_tp.py prefill --against=hf,ctranslate2
    torchrun --standalone --nproc_per_node=2 bench_tp.py train --against=reference
    torchrun --standalone --nproc_per_node=2 bench_tp.py save
    torchrun --standalone --nproc_per_node=2 bench_tp.py allreduce
    torchrun --standalone --nproc_per_node=2 bench_tp.py block --part=layer --n_embd=768 --n_head=12 --tp=1,2,4,8
    python bench_tp.py start --ranks=2
    python bench_tp.py diagram --tp=2,4,8
    python bench_tp.py page --kept=run.json --report=run.html
    torchrun --standalone --nproc_per_node=2 bench_tp.py predict
    python bench_tp.py predict --hardware=all
"""

from collections.abc import Callable
from typing import Any

from bench.diagram import diagram, page
from bench.inference import decode, prefill, start
from bench.laboratory import block
from bench.messages import allreduce
from bench.prediction import predict
from bench.training import save, train
from cli.options import (
    BenchAllreduceOptions,
    BenchBlockOptions,
    BenchDecodeOptions,
    BenchDiagramOptions,
    BenchPageOptions,
    BenchPredictOptions,
    BenchPrefillOptions,
    BenchSaveOptions,
    BenchStartOptions,
    BenchTrainOptions,
)
from world.entry import run_commands
from world.mesh import World

COMMANDS: dict[str, tuple[type[Any], Callable[[World, Any], None]]] = {
    "decode": (BenchDecodeOptions, decode),
    "prefill": (BenchPrefillOptions, prefill),
    "train": (BenchTrainOptions, train),
    "save": (BenchSaveOptions, save),
    "allreduce": (BenchAllreduceOptions, allreduce),
    "block": (BenchBlockOptions, block),
    "start": (BenchStartOptions, start),
    "diagram": (BenchDiagramOptions, diagram),
    "page": (BenchPageOptions, page),
    "predict": (BenchPredictOptions, predict),
}

if __name__ == "__main__":
    run_commands(COMMANDS, "bench_tp.py")

"""Measure how fast ranks decode, read a prompt and train, and what they wait for; compare it, round
by round, with the programs that a user would pick instead.

    torchrun --standalone --nproc_per_node=2 bench_tp.py decode --against=hf,ctranslate2,one_rank
    torchrun --standalone --nproc_per_node=2 bench_tp.py block --part=layer --tp=1,2,4,8
    python bench_tp.py predict --hardware=all
"""

import base.quick_start  # noqa: F401
from bench.inference import decode, prefill, texts
from bench.laboratory import allreduce, block, diagram, page
from bench.predict import predict
from bench.training import save, train
from cli import options
from world.entry import Main, run_commands

COMMANDS: dict[str, tuple[type[options.RunOptions], Main]] = {
    "decode": (options.BenchDecodeOptions, decode), "train": (options.BenchTrainOptions, train),
    "texts": (options.BenchTextsOptions, texts),
    "prefill": (options.BenchPrefillOptions, prefill), "save": (options.BenchSaveOptions, save),
    "allreduce": (options.BenchAllreduceOptions, allreduce),
    "block": (options.BenchBlockOptions, block), "diagram": (options.BenchDiagramOptions, diagram),
    "page": (options.BenchPageOptions, page), "predict": (options.BenchPredictOptions, predict)}

if __name__ == "__main__":
    run_commands(COMMANDS, "bench_tp.py")

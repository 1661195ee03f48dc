"""What `train_tp.py --dry_run=True` says of a rank's memory beside what the rank then takes, layout by layout.

    python tests/measure_memory.py                     GPT-2 124M's sizes, about a minute a layout on two cores
    python tests/measure_memory.py --only=tp2,dp2 --out=memory.json
    python tests/measure_memory.py --sampled=gpt2-xl   instead: sample_tp.py in stages, --init_from=gpt2-xl

Each layout is trained for --iters iterations in fresh processes, on random tokens, with an evaluation before and a checkpoint
after, and the peak resident size (VmHWM) of the rank that had most is taken from the run's own report. The dry run is a
process of its own and knows the options only. Exit status 1 where one of them is more than 15 % off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from bench.rounds import machine  # noqa: E402
from text.dataset import write_tokens  # noqa: E402

WITHIN = 0.15
PARTS = ("parameters", "gradients", "optimizer", "activations", "temporary", "base")
VOCABULARY = 50257

# name: (ranks, options)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["--tp=2"]),
    "dp2": (2, ["--tp=1"]),
    "tp2-seq": (2, ["--tp=2", "--sequence_parallel=True"]),
    "tp2-ckpt": (2, ["--tp=2", "--activation_checkpointing=True"]),
    "tp2-bfloat16": (2, ["--tp=2", "--dtype=bfloat16"]),
    "one-batch8": (1, ["--batch_size=8"]),
    "one-accumulated": (1, ["--batch_size=2", "--gradient_accumulation_steps=2"]),
    "dp2-accumulated": (2, ["--tp=1", "--batch_size=1", "--gradient_accumulation_steps=4"]),
    "tp2-dropout": (2, ["--tp=2", "--dropout=0.1"]),
    "dp2-shard": (2, ["--tp=1", "--dp_shard=True"]),
    "dp2-shard-accumulated": (2, ["--tp=1", "--dp_shard=True", "--batch_size=1", "--gradient_accumulation_steps=4"]),
    "tp4": (4, ["--tp=4"]),
    "pp2": (2, ["--pp=2", "--batch_size=2", "--gradient_accumulation_steps=4"]),
    "pp2-gpipe": (2, ["--pp=2", "--pp_schedule=GPipe", "--batch_size=2", "--gradient_accumulation_steps=4"]),
}
COMMON = [
    "--device=cpu", "--dataset=random", "--batch_size=4", "--gradient_accumulation_steps=1", "--bias=True", "--eval_iters=1",
    "--eval_interval=1000", "--overwrite=True", "--progress=False",
]  # fmt: skip


def write_dataset(place: Path) -> None:
    (place / "random").mkdir()
    ids = np.random.default_rng(0).integers(VOCABULARY, size=20_000)
    for split in ("train", "val"):
        write_tokens(place / "random" / f"{split}.bin", ids, VOCABULARY)


def reported(command: list[str], path: Path) -> dict[str, Any]:
    """The report that a command writes to `path`."""
    done = subprocess.run([*command, f"--report={path}"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    made: dict[str, Any] = json.loads(path.read_text())
    return made


def measure(place: Path, ranks: int, words: list[str]) -> dict[str, Any]:
    """The dry run's figures of a layout, and the peak that was measured."""
    words = [*COMMON, f"--data_dir={place}", f"--out_dir={place / 'out'}", *words]
    dry = [sys.executable, "train_tp.py", *words, "--dry_run=True", f"--ranks={ranks}"]
    plan = reported(dry, place / "plan.json")["layouts"][0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    started = time.perf_counter()
    run = reported([*torchrun, "train_tp.py", *words], place / "run.json")
    peak = max(run["memory"]["peak_bytes_per_rank"])
    measured = {"measured_peak": peak, "comm": run["comm"], "seconds": round(time.perf_counter() - started, 1)}
    return {"ranks": ranks, "options": words[len(COMMON) + 2 :], "predicted": plan, **measured, "ratio": plan["peak"] / peak}


def sampled(source: str, place: Path) -> dict[str, Any]:
    """Peaks of sample_tp.py's ranks in 1, 2 and 4 stages, which read a source and write 8 tokens to each of 8 rows."""
    found: dict[str, Any] = {}
    words = ["sample_tp.py", f"--init_from={source}", "--device=cpu", "--dtype=float32", "--tokenizer=ids", "--prompt=7 8 9",
             "--num_samples=8", "--max_new_tokens=8"]
    print("stages    weights  peak of each rank, MB     the highest, of a process alone / stages")
    for pp in (1, 2, 4):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={pp}"]
        found[str(pp)] = made = reported([*torchrun, *words, f"--pp={pp}"], place / "sampled.json")["memory"]
        weights, peaks = (made[f"{what}_bytes_per_rank"] for what in ("weight", "peak"))
        alone = max(found["1"]["peak_bytes_per_rank"])
        each = " ".join(f"{peak / 1e6:,.0f}" for peak in peaks)
        print(f"{pp:<6}{max(weights) / 1e6:>11,.0f}  {each:<25} {max(peaks) * pp / alone:.3f}", flush=True)
    return found


def line(name: str, made: dict[str, Any]) -> str:
    plan = made["predicted"]
    figures = [plan[part] for part in PARTS] + [plan["peak"], made["measured_peak"]]
    return f"{name:<22}" + "".join(f"{figure / 1e6:>12,.0f}" for figure in figures) + f"{made['ratio']:>8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(LAYOUTS), help="layouts to measure, with commas between")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the checkpoints go, 1.5 GB at a time")
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--sampled", default="", help="weights that sample_tp.py reads in stages, instead of training")
    parser.add_argument("--out", default="", help="write the figures as JSON to this file")
    options = parser.parse_args()
    if options.sampled:
        with tempfile.TemporaryDirectory(prefix="measure-memory-", dir=options.dir) as scratch:
            made = {"entry": "measure_memory", "machine": machine(), "stages": sampled(options.sampled, Path(scratch))}
        if options.out:
            Path(options.out).write_text(json.dumps(made, indent=1) + "\n")
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("n_layer", "n_embd", "n_head", "block_size")]
    found = {}
    heads = [*PARTS[:-1], "process", "predicted", "measured"]
    print(f"{'MB':<22}" + "".join(f"{head:>12}" for head in heads) + f"{'ratio':>8}")
    for name in options.only.split(","):
        ranks, words = LAYOUTS[name]
        with tempfile.TemporaryDirectory(prefix="measure-memory-", dir=options.dir) as scratch:
            write_dataset(Path(scratch))
            found[name] = measure(Path(scratch), ranks, [*sizes, f"--max_iters={options.iters}", *words])
        print(line(name, found[name]), flush=True)
    if options.out:
        made = {"entry": "measure_memory", "command": sys.argv, "machine": machine(), "sizes": sizes, "layouts": found}
        Path(options.out).write_text(json.dumps(made, indent=1) + "\n")
    sys.exit(any(abs(made["ratio"] - 1) > WITHIN for made in found.values()))


if __name__ == "__main__":
    main()

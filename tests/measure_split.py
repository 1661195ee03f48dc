"""How long `shard_checkpoint.py split` takes beside `cp` of the same bytes, how much memory, and how fast `verify` reads.

    python tests/measure_split.py                      gpt2-xl's sizes: 6.2 GB to read and 6.2 GB to write, twice over
    python tests/measure_split.py --n_layer=4 --rounds=1        a quick look

Random weights in Hugging Face format are written to --dir, read once so that all runs begin with the same page cache, and
copied and split in turn. Before each run what the one before wrote is deleted and the disk's queue emptied (sync). `cp`
leaves its bytes in the page cache and split flushes them to the disk, so cp followed by a sync is shown as well. Memory is
the split's peak of RssAnon, read every 5 ms, above that of an interpreter that has imported torch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from checkpoints.convert import write_hf  # noqa: E402
from model import GPTConfig  # noqa: E402
from plan.partition import Partition  # noqa: E402

INTERVAL = 0.005


def write_model(directory: Path, config: GPTConfig) -> int:
    """A Hugging Face directory of random float32 weights; returns the bytes of model.safetensors."""
    directory.mkdir()
    shapes = Partition.of(config, 1).shapes()
    write_hf(config, torch.float32, lambda name: torch.rand(shapes[name]), directory)
    return (directory / "model.safetensors").stat().st_size


def anonymous(pid: int) -> int:
    """Bytes of a process's own memory now (mapped files not counted); 0 where it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def run(command: list[str]) -> tuple[float, int]:
    """(seconds, peak anonymous bytes) of a command."""
    peak, start = 0, time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return seconds, peak


def split_command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "shard_checkpoint.py"), *words]


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


@contextmanager
def scratch_directory(parent: str, need: int) -> Iterator[Path]:
    free = shutil.disk_usage(parent).free
    if free < need:
        raise SystemExit(f"{parent} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed: choose another --dir")
    with tempfile.TemporaryDirectory(prefix="measure-split-", dir=parent) as path:
        yield Path(path)


def measure(scratch: Path, config: GPTConfig, tp: int, rounds: int) -> dict[str, object]:
    size = write_model(scratch / "hf", config)
    source, copy, shards = scratch / "hf" / "model.safetensors", scratch / "copy", scratch / "shards"
    _, base = run([sys.executable, "-c", "import torch"])
    figures: dict[str, list[float]] = {"cp_s": [], "cp_sync_s": [], "split_s": [], "split_peak": [], "verify_s": []}
    for _ in range(rounds):
        os.sync()
        read_through(source)
        start = time.perf_counter()
        figures["cp_s"].append(run(["cp", str(source), str(copy)])[0])
        os.sync()
        figures["cp_sync_s"].append(time.perf_counter() - start)
        copy.unlink()
        os.sync()
        read_through(source)
        seconds, peak = run(split_command("split", f"--init_from={scratch / 'hf'}", f"--tp={tp}", f"--out={shards}"))
        figures["split_s"].append(seconds)
        figures["split_peak"].append(peak - base)
        figures["verify_s"].append(run(split_command("verify", f"--shards={shards}"))[0])
        shutil.rmtree(shards)
    return {"bytes": size, "tp": tp, "base_anonymous_bytes": base, **figures}


def table(made: dict[str, object], figures: dict[str, list[float]]) -> str:
    size = int(str(made["bytes"]))
    rows = [f"{size / 1e9:.2f} GB, tp {made['tp']}; source in the page cache; seconds of each round"]
    for name in ("cp_s", "cp_sync_s", "split_s", "verify_s"):
        rounds = "  ".join(f"{seconds:7.2f}" for seconds in figures[name])
        what, best = name.removesuffix("_s").replace("_", " + "), size / min(figures[name]) / 1e9
        rows.append(f"{what:>10}  {rounds}  best {best:.2f} GB/s")
    ratio = sum(figures["split_s"]) / sum(figures["cp_s"])
    rows.append(f"split takes {ratio:.2f} x cp, {sum(figures['split_s']) / sum(figures['cp_sync_s']):.2f} x cp + sync")
    rows.append(f"anonymous memory above an interpreter with torch: at most {max(figures['split_peak']) / 1e6:.0f} MB")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to write; needs three times the model's bytes")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--n_layer", type=int, default=48)
    options = parser.parse_args()
    config = GPTConfig(n_layer=options.n_layer, n_head=25, n_embd=1600, vocab_size=50257, activation="gelu_tanh")
    need = 3 * Partition.of(config, 1).count() * 4 + 10**9
    with scratch_directory(options.dir, need) as scratch:
        made = measure(scratch, config, options.tp, options.rounds)
    print(table(made, {key: value for key, value in made.items() if isinstance(value, list)}))
    print(json.dumps(made))


if __name__ == "__main__":
    main()

"""Split pretrained weights into per-rank shards, merge them back, verify them, show who owns what.

    python shard_checkpoint.py split   --init_from=gpt2-xl --tp=4 --out=shards/xl-tp4
    python shard_checkpoint.py merge   --shards=shards/xl-tp4 --out=gpt2-xl-again --format=hf
    python shard_checkpoint.py verify  --shards=shards/xl-tp4
    python shard_checkpoint.py inspect --shards=shards/xl-tp4
"""

import base.quick_start  # noqa: F401

# isort: split
import math
import sys
from typing import Any

import torch

from base.console import run
from base.numbers import nbytes
from checkpoints import convert
from checkpoints.manifest import TensorEntry
from checkpoints.sources import open_shards
from cli.grammar import parse_command
from cli.options import InspectOptions, MergeOptions, SplitOptions, VerifyOptions
from plan.partition import Partition
from plan.schedule import Schedule


def split(options: SplitOptions) -> None:
    made, note = convert.split(options)
    sizes = [f"{n / 1e6:,.1f} MB" if n >= 1e5 else nbytes(n) for _, n, _ in made.files]
    print(f"{options.out}: {made.source} in {made.tp} shards of {', '.join(sizes)} ({made.dtype})")
    for line in filter(None, (Partition.of(made.model, made.tp).imbalance(), note)):
        print(line)


def merge(options: MergeOptions) -> None:
    shards, form = convert.merge(options), options.format
    tp, made = shards.manifest.tp, shards.sync
    print(f"{options.out}: {shards.description}, merged from {tp} shards ({form})")
    if made is not None:
        schedule = f"--sync={made.schedule} on tp={made.tp}; {form} cannot say so."
        print(f"note: these weights were made for {schedule}")
    if form == "nanogpt" and shards.config.activation != "gelu":
        exact = "GELU; nanoGPT computes the exact one."
        print(f"note: these weights use the tanh approximation of {exact}")
    if form == "nanogpt" and (shards.tokenizer or {}).get("kind") == "hf":
        print("note: nanoGPT reads no Hugging Face tokenizer: its text will be GPT-2's tokens.")


def verify(options: VerifyOptions) -> None:
    """Check every byte, and each file's header, against the manifest."""
    shards = open_shards(options.shards)
    files, total = shards.manifest.files, 0
    shards.check_all_bytes(range(len(files)))
    for rank in range(len(files)):
        shards.file(rank)
    for name, size, _ in files:
        print(f"{name}  {size:>13,} bytes  sha256 ok")
        total += size
    whole = f"{len(files)} files, {len(shards.manifest.tensors)} tensors, {total:,} bytes"
    print(f"{shards.directory}: whole: {whole}")


def inspect(options: InspectOptions) -> None:
    """Print the manifest's split, which need not be the one that this program makes."""
    manifest = open_shards(options.shards).manifest
    tensors, config, made = manifest.tensors, manifest.model, manifest.sync
    tp, dtype = manifest.tp, manifest.dtype
    print(f"{options.shards}: {manifest.source or 'unnamed source'}, tp {tp}, {dtype}")
    sizes = ", ".join(f"{key} {value}" for key, value in config.as_json().items())
    print(f"model: {sizes}; {Partition.of(config, 1).count():,} parameters")
    if made is not None:
        points = Schedule.parse(made.schedule, config.n_layer).points
        where = f"{points} sync points in {config.n_layer} layers"
        print(f"made for --sync={made.schedule} on tp={made.tp} ranks: {where}")
    row = "{:>4} {:>9} {:>13} {:>15} {:>14} {:>14}".format
    print(row("rank", "heads", "MLP columns", "vocabulary", "parameters", "bytes"))
    width = config.n_embd // config.n_head
    for rank, (_, size, _) in enumerate(manifest.files):
        heads = _owned(tensors["transformer.h.0.attn.c_proj.weight"], 1, rank, width)
        columns = _owned(tensors["transformer.h.0.mlp.c_fc.weight"], 0, rank)
        vocabulary = _owned(tensors["transformer.wte.weight"], 0, rank)
        shapes = (entry.rule.local_shape(entry.shape, rank) for entry in tensors.values())
        count = sum(map(math.prod, shapes))
        print(row(rank, heads, columns, vocabulary, f"{count:,}", f"{size:,}"))
    print(f"{'tensor':<36} {'shape':>14} {'split':>12}")
    for name, entry in tensors.items():
        how = "replicated" if entry.rule.dim is None else f"dim {entry.rule.dim}"
        print(f"{name:<36} {' x '.join(map(str, entry.shape)):>14} {how:>12}")


def _owned(entry: TensorEntry, dim: int, rank: int, unit: int = 1) -> str:
    """The entries along `dim` that a rank owns, in units such as heads: 0-6, or 0-6,19-24."""
    runs = entry.rule.runs[rank] if entry.rule.dim == dim else [(0, entry.shape[dim])]
    return ",".join(f"{lo // unit}-{(hi - 1) // unit}" for lo, hi in runs if lo < hi)


COMMANDS: Any = {"split": (SplitOptions, split), "merge": (MergeOptions, merge),
                 "verify": (VerifyOptions, verify), "inspect": (InspectOptions, inspect)}


def main(argv: list[str]) -> int:
    """Run a command; the exit status."""
    prog, classes = "shard_checkpoint.py", {name: cls for name, (cls, _) in COMMANDS.items()}

    def parsed() -> tuple[Any, Any]:
        name, options = parse_command(classes, argv, prog)
        return COMMANDS[name][1], options

    torch.set_num_threads(1)  # each file has a thread here: torch's own would be in their way
    return run(parsed, prog)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

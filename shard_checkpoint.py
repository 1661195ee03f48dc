"""Split pretrained weights into per-rank shards, merge them back, verify them, show who owns what.

    python shard_checkpoint.py split   --init_from=gpt2-xl --tp=4 --out=shards/xl-tp4
    python shard_checkpoint.py merge   --shards=shards/xl-tp4 --out=gpt2-xl-again --format=hf
    python shard_checkpoint.py verify  --shards=shards/xl-tp4
    python shard_checkpoint.py inspect --shards=shards/xl-tp4
"""

import math
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from base.console import console
from base.errors import ReaderGone, UserError
from base.numbers import nbytes
from checkpoints import convert
from checkpoints.shards import TensorEntry
from cli.grammar import parse_command
from cli.options import EntryOptions, InspectOptions, MergeOptions, SplitOptions, VerifyOptions
from plan.partition import Partition
from plan.schedule import Schedule


def split(options: SplitOptions) -> None:
    manifest, note = convert.split(options)
    sizes = [f"{size / 1e6:,.1f} MB" if size >= 1e5 else nbytes(size) for _, size, _ in manifest.files]
    print(f"{options.out}: {manifest.source} in {options.tp} shards of {', '.join(sizes)} ({manifest.dtype})")
    for line in filter(None, (Partition.of(manifest.model, options.tp).imbalance(), note)):
        print(line)


def merge(options: MergeOptions) -> None:
    shards = convert.merge(options)
    manifest = shards.manifest
    print(f"{options.out}: {shards.description}, merged from {manifest.tp} shards ({options.format})")
    if (made := manifest.sync) is not None:
        print(f"note: these weights were made for --sync={made.schedule} on tp={made.tp}; {options.format} cannot say so.")
    if options.format == "nanogpt" and manifest.model.activation != "gelu":
        print("note: these weights use the tanh approximation of GELU; nanoGPT computes the exact one.")


def verify(options: VerifyOptions) -> None:
    shards = convert.verify(options.shards)
    files = shards.manifest.files
    for name, size, _ in files:
        print(f"{name}  {size:>13,} bytes  sha256 ok")
    total = sum(size for _, size, _ in files)
    print(f"{shards.directory}: whole: {len(files)} files, {len(shards.manifest.tensors)} tensors, {total:,} bytes")


def inspect(options: InspectOptions) -> None:
    """All of it as the manifest has it, which need not be as this program would split."""
    manifest = convert.open_shards(options.shards).manifest
    tensors, config = manifest.tensors, manifest.model
    print(f"{options.shards}: {manifest.source or 'unnamed source'}, tp {manifest.tp}, {manifest.dtype}")
    sizes = ", ".join(f"{key} {value}" for key, value in asdict(config).items())
    print(f"model: {sizes}; {Partition.of(config, 1).count():,} parameters")
    if (made := manifest.sync) is not None:
        points = Schedule.parse(made.schedule, config.n_layer).points
        print(f"made for --sync={made.schedule} on tp={made.tp} ranks: {points} sync points in {config.n_layer} layers")
    print(f"{'rank':>4} {'heads':>9} {'MLP columns':>13} {'vocabulary':>15} {'parameters':>14} {'bytes':>14}")
    for rank, (_, size, _) in enumerate(manifest.files):
        heads = _owned(tensors["transformer.h.0.attn.c_proj.weight"], 1, rank, config.n_embd // config.n_head)
        columns = _owned(tensors["transformer.h.0.mlp.c_fc.weight"], 0, rank)
        vocabulary = _owned(tensors["transformer.wte.weight"], 0, rank)
        count = sum(math.prod(entry.rule.local_shape(entry.shape, rank)) for entry in tensors.values())
        print(f"{rank:>4} {heads:>9} {columns:>13} {vocabulary:>15} {count:>14,} {size:>14,}")
    print(f"{'tensor':<36} {'shape':>14} {'split':>12}")
    for name, entry in tensors.items():
        how = "replicated" if entry.rule.dim is None else f"dim {entry.rule.dim}"
        print(f"{name:<36} {' x '.join(map(str, entry.shape)):>14} {how:>12}")


def _owned(entry: TensorEntry, dim: int, rank: int, unit: int = 1) -> str:
    """The entries along `dim` that a rank owns, in units such as heads: 0-6, or 0-6,19-24."""
    runs = entry.rule.runs[rank] if entry.rule.dim == dim else [(0, entry.shape[dim])]
    return ",".join(f"{lo // unit}-{(hi - 1) // unit}" for lo, hi in runs if lo < hi)


COMMANDS: dict[str, tuple[type[EntryOptions], Callable[[Any], None]]] = {
    "split": (SplitOptions, split),
    "merge": (MergeOptions, merge),
    "verify": (VerifyOptions, verify),
    "inspect": (InspectOptions, inspect),
}


def main(argv: list[str]) -> int:
    with console():
        return _main(argv)


def _main(argv: list[str]) -> int:
    options = None
    torch.set_num_threads(1)  # the threads here are one a file: torch's own would only stand in their way
    try:
        name, options = parse_command({name: cls for name, (cls, _) in COMMANDS.items()}, argv, "shard_checkpoint.py")
        COMMANDS[name][1](options)
        sys.stdout.flush()  # so that a reader who has gone is noticed here
        return 0
    except ReaderGone:  # `inspect | head`: whoever read has seen enough
        return 128 + signal.SIGPIPE  # as a program that SIGPIPE ends
    except UserError as error:
        if getattr(options, "debug", False):
            raise
        print(f"shard_checkpoint.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"shard_checkpoint.py: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("shard_checkpoint.py: stopped by Ctrl-C", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

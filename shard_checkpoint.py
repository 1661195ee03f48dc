"""Split pretrained weights into per-rank shards, merge them back, verify them, show who owns what.

    python shard_checkpoint.py split   --init_from=gpt2-xl --tp=4 --out=shards/xl-tp4
    python shard_checkpoint.py merge   --shards=shards/xl-tp4 --out=gpt2-xl-again --format=hf
    python shard_checkpoint.py verify  --shards=shards/xl-tp4
    python shard_checkpoint.py inspect --shards=shards/xl-tp4
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.shards import (
    DTYPES,
    MANIFEST,
    Manifest,
    ShardDirectory,
    TensorEntry,
    TensorFile,
    check_target,
    dtype_name,
    new_directory,
    read_manifest,
    shard_name,
    temporary_sibling,
    write_json,
)
from checkpoints.sources import ShardSource, Source, is_conv1d, latest_checkpoint, open_source, tokenizer_of
from errors import UserError
from model import GPTConfig
from options import EntryOptions, InspectOptions, MergeOptions, SplitOptions, VerifyOptions, parse_command
from parallel.partition import Partition, Rule


def split(options: SplitOptions) -> None:
    source = open_source(options.init_from)
    out = Path(options.out)
    dtype = source.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    check_target(out, options.force)
    partition = Partition.of(source.config, options.tp)
    _check_space(out, sum(partition.count(rank) for rank in range(options.tp)) * dtype.itemsize)
    with new_directory(out, options.force) as scratch:
        manifest = write_shards(source, partition, dtype, scratch)
        write_json(scratch / "tokenizer.json", tokenizer_of(source).to_json())
    sizes = [f"{size / 1e6:,.1f} MB" for _, size, _ in manifest.files]
    print(f"{out}: {source.description} in {options.tp} shards of {', '.join(sizes)} ({dtype_name(dtype)})")
    if note := imbalance(partition):
        print(note)


def imbalance(partition: Partition) -> str:
    """What an uneven split of heads costs, or "" where it is even."""
    heads = [hi - lo for lo, hi in map(partition.heads, range(partition.tp))]
    if min(heads) == max(heads):
        return ""
    extra = max(heads) * partition.tp / partition.n_head - 1
    return (
        f"tp={partition.tp} over {partition.n_head} heads: {','.join(map(str, heads))} "
        f"(busiest rank does {extra:.0%} more attention than an even split)."
    )


def write_shards(source: Source, partition: Partition, dtype: torch.dtype, directory: Path) -> Manifest:
    """Write every rank's file and the manifest into `directory`, one full tensor in memory at a time."""
    shapes, rules, ranks = partition.shapes(), partition.rules(), range(partition.tp)
    owned = {name: TensorEntry(shape, Rule(rules[name].dim, rules[name].runs)) for name, shape in shapes.items()}
    files = []
    for rank in ranks:
        local = {name: entry.rule.local_shape(entry.shape, rank) for name, entry in owned.items()}
        files.append(TensorFile(directory / shard_name(rank, partition.tp), local, dtype))
    with _progress("split", sum(f.total for f in files)) as bar:
        for name, entry in owned.items():
            for rank in ranks:
                runs = entry.rule.runs[rank] if entry.rule.runs else ()
                before = files[rank].bytes
                files[rank].write(name, source.read(name, entry.rule.dim, runs))
                bar.update(files[rank].bytes - before)
    written = tuple((shard_name(rank, partition.tp), *files[rank].close()) for rank in ranks)
    manifest = Manifest(source.config, partition.tp, dtype_name(dtype), source.description, written, owned)
    write_json(directory / MANIFEST, manifest.as_json())
    return manifest


def _progress(what: str, total: int) -> Any:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=not sys.stderr.isatty())


def _check_space(out: Path, need: int) -> None:
    place = next(parent for parent in Path(os.path.abspath(out)).parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(f"{out} needs {need / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free.")


def merge(options: MergeOptions) -> None:
    shards = open_shards(options.shards, everything=True)
    out = Path(options.out)
    check_target(out, options.force)
    _check_space(out, Partition.of(shards.config, 1).count() * shards.dtype.itemsize)
    if options.format == "hf":
        with new_directory(out, options.force) as scratch:
            write_hf(shards, scratch)
    else:
        write_nanogpt(shards, out)
        if shards.config.activation != "gelu":
            print("note: these weights use the tanh approximation of GELU; nanoGPT computes the exact one.")
    print(f"{out}: {shards.description}, merged from {shards.manifest.tp} shards ({options.format})")


def full_tensors(shards: ShardDirectory) -> Iterator[tuple[str, Tensor]]:
    for name in Partition.of(shards.config, 1).shapes():
        yield name, shards.read(name, None, ())


def write_hf(shards: ShardDirectory, directory: Path) -> None:
    """config.json and model.safetensors that GPT2LMHeadModel.from_pretrained loads with no key missing or left over.

    transformers' GPT-2 has every bias: a model without gets zeros. Linear weights turn to [in, out].
    """
    config = shards.config
    shapes = {}
    for name, shape in Partition.of(_with_bias(config), 1).shapes().items():
        shapes[name] = shape[::-1] if is_conv1d(name) else shape
    file = TensorFile(directory / "model.safetensors", shapes, shards.dtype, metadata={"format": "pt"})
    with _progress("merge", file.total) as bar:
        for name, shape in shapes.items():
            before = file.bytes
            if name in shards.manifest.tensors:
                tensor = shards.read(name, None, ())
                file.write(name, tensor.t() if is_conv1d(name) else tensor)
            else:
                file.write(name, torch.zeros(shape))
            bar.update(file.bytes - before)
    file.close()
    write_json(directory / "config.json", hf_config(config, shards.manifest.dtype))


def _with_bias(config: GPTConfig) -> GPTConfig:
    return GPTConfig(**{**asdict(config), "bias": True})


def hf_config(config: GPTConfig, dtype: str) -> dict[str, Any]:
    end = 50256 if config.vocab_size >= 50257 else None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": True,
        "dtype": dtype,
    }


def write_nanogpt(shards: ShardDirectory, out: Path) -> None:
    """A ckpt.pt with nanoGPT's keys and `model_args`. torch.save wants all tensors at once: memory is the model's."""
    config = asdict(shards.config)
    del config["activation"]
    state = dict(full_tensors(shards))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary_sibling(out)
    try:
        torch.save({"model": state, "model_args": config, "iter_num": 0, "best_val_loss": 1e9, "config": {}}, scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)


def open_shards(directory: str, everything: bool = False) -> ShardSource:
    """The shard directory, or the newest checkpoint of a training directory; `everything` checks each byte of it."""
    path = Path(directory)
    if (path / "latest").is_file():
        path = latest_checkpoint(path)
    return ShardSource(path, verify=(0, 1) if everything else None)


def verify(options: VerifyOptions) -> None:
    shards = open_shards(options.shards)
    total = 0
    for rank in range(shards.manifest.tp):
        name, size, _ = shards.manifest.files[rank]
        shards.check_bytes(rank)
        shards.check_header(rank)
        total += size
        print(f"{name}  {size:>13,} bytes  sha256 ok")
    print(f"{shards.directory}: whole: {shards.manifest.tp} files, {len(shards.manifest.tensors)} tensors, {total:,} bytes")


def inspect(options: InspectOptions) -> None:
    directory = Path(options.shards)
    manifest = read_manifest(latest_checkpoint(directory) if (directory / "latest").is_file() else directory)
    partition = Partition.of(manifest.model, manifest.tp)
    config = ", ".join(f"{key} {value}" for key, value in asdict(manifest.model).items())
    print(f"{options.shards}: {manifest.source or 'unnamed source'}, tp {manifest.tp}, {manifest.dtype}")
    print(f"model: {config}; {partition.count():,} parameters")
    print(f"{'rank':>4} {'heads':>9} {'MLP columns':>13} {'vocabulary':>15} {'parameters':>14} {'bytes':>14}")
    for rank, (_, size, _) in enumerate(manifest.files):
        owned = [f"{lo}-{hi - 1}" for lo, hi in (partition.heads(rank), partition.columns(rank), partition.vocabulary(rank))]
        print(f"{rank:>4} {owned[0]:>9} {owned[1]:>13} {owned[2]:>15} {partition.count(rank):>14,} {size:>14,}")
    print(f"{'tensor':<36} {'shape':>14} {'split':>12}")
    for name, entry in manifest.tensors.items():
        how = "replicated" if entry.rule.dim is None else f"dim {entry.rule.dim}"
        print(f"{name:<36} {' x '.join(map(str, entry.shape)):>14} {how:>12}")


COMMANDS: dict[str, tuple[type[EntryOptions], Callable[[Any], None]]] = {
    "split": (SplitOptions, split),
    "merge": (MergeOptions, merge),
    "verify": (VerifyOptions, verify),
    "inspect": (InspectOptions, inspect),
}


def main(argv: list[str]) -> int:
    options = None
    try:
        name, options = parse_command({name: cls for name, (cls, _) in COMMANDS.items()}, argv, "shard_checkpoint.py")
        COMMANDS[name][1](options)
        return 0
    except UserError as error:
        if getattr(options, "debug", False):
            raise
        print(f"shard_checkpoint.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"shard_checkpoint.py: {error.strerror}: {error.filename or 'while writing'}. Nothing was replaced.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("shard_checkpoint.py: stopped by Ctrl-C. Nothing was replaced.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Split weights into a shard directory, merge them back, and write the formats of other programs."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from base.errors import UserError
from base.numbers import nbytes
from checkpoints.huggingface import is_conv1d
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
    new_file,
    shard_name,
    write_json,
)
from checkpoints.sources import (
    LATEST,
    ShardSource,
    Source,
    check_belongs,
    latest_checkpoint,
    open_source,
    tokenizer_of,
)
from checkpoints.tensors import CARRIED, tokenizer_for
from cli.options import MergeOptions, SplitOptions
from model import GPTConfig
from plan.partition import Partition
from text.tokenizer import TOKENIZER_FILE

# the files that each command writes into a directory, and so may replace with --force
SHARD_FILES = r"shards\.json|tokenizer\.json|rank-\d+-of-\d+\.safetensors"
HF_FILES = r"config\.json|model\.safetensors"


def split(options: SplitOptions) -> tuple[Manifest, str]:
    """Write a shard directory of any source: (its manifest, a note on its tokenizer or "")."""
    out = place(options.out)
    check_target(out, options.force, SHARD_FILES)
    source = open_source(options.init_from, verify=(0, 1))
    dtype = source.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    partition = Partition.of(source.config, options.tp)
    tokenizer = tokenizer_of(source, options.tokenizer)
    check_belongs(tokenizer, source)
    _check_space(out, sum(partition.count(rank) for rank in range(options.tp)) * dtype.itemsize)
    with new_directory(out, options.force, SHARD_FILES) as scratch:
        manifest = write_shards(source, partition, dtype, scratch)
        write_json(scratch / TOKENIZER_FILE, tokenizer.to_json())
    return manifest, tokenizer.note


def place(path: str) -> Path:
    """Where an --out points, through links: what is replaced is a directory, not the link to it."""
    return Path(os.path.realpath(path))


def write_shards(source: Source, partition: Partition, dtype: torch.dtype, directory: Path) -> Manifest:
    """Write every rank's file and the manifest into `directory`: tensor after tensor, the ranks' parts at the same time."""
    ranks = range(partition.tp)
    owned = {name: TensorEntry(shape, rule.unpadded) for name, (shape, rule) in partition.table.items()}
    files = []
    for rank in ranks:
        local = {name: entry.rule.local_shape(entry.shape, rank) for name, entry in owned.items()}
        files.append(TensorFile(directory / shard_name(rank, partition.tp), local, dtype))

    def write(name: str, rank: int) -> None:
        rule = owned[name].rule
        files[rank].write(name, source.read(name, rule.dim, rule.runs_of(rank)))

    # converting, hashing and writing all let go of Python's lock
    with _progress("split", sum(f.total for f in files)) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in owned:
            before = sum(f.bytes for f in files)
            list(pool.map(write, [name] * partition.tp, ranks))
            bar.update(sum(f.bytes for f in files) - before)
        written = tuple((f.path.name, *closed) for f, closed in zip(files, pool.map(TensorFile.close, files), strict=True))
    manifest = Manifest(source.config, partition.tp, dtype_name(dtype), source.description, written, owned, source.sync)
    write_json(directory / MANIFEST, manifest.as_json())
    return manifest


def _progress(what: str, total: int) -> Any:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=not sys.stderr.isatty())


def _check_space(out: Path, need: int) -> None:
    parent = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(f"{out} needs {nbytes(need)} ({need:,} bytes), {parent} has {nbytes(free)} ({free:,} bytes) free.")


def merge(options: MergeOptions) -> ShardSource:
    """Write the full weights of a shard directory in another program's format."""
    out = place(options.out)
    if options.format == "hf":
        check_target(out, options.force, HF_FILES)
    elif out.is_dir():
        raise UserError(f"{out} is a directory: name the file to write, such as --out={out / 'ckpt.pt'}")
    elif out.exists() and not options.force:
        raise UserError(f"{out} exists. Choose another place, or replace it with --force.")
    shards = open_shards(options.shards)
    _check_space(out, Partition.of(shards.config, 1).count() * shards.dtype.itemsize)
    shards.check_all_bytes(range(shards.manifest.tp))
    if options.format == "hf":
        with new_directory(out, options.force, HF_FILES) as scratch:
            write_hf(shards.config, shards.dtype, lambda name: shards.read(name, None, ()), scratch, carried(shards))
    else:
        with new_file(out) as file:
            write_nanogpt(shards, file)
    return shards


def full_tensors(shards: ShardDirectory) -> Iterator[tuple[str, Tensor]]:
    for name in Partition.of(shards.config, 1).shapes():
        yield name, shards.read(name, None, ())


def carried(shards: ShardSource) -> dict[str, Any]:
    """What a merged checkpoint's settings say of a tokenizer that is known, where the vocabulary's
    size does not tell."""
    known = shards.tokenizer or {"kind": "ids"}
    return (
        {}
        if known["kind"] == "ids" or known == tokenizer_for(shards.config.vocab_size)
        else {CARRIED: known}
    )


def write_hf(
    config: GPTConfig,
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    directory: Path,
    more: dict[str, Any] | None = None,
) -> None:
    """config.json and model.safetensors that GPT2LMHeadModel.from_pretrained loads with no key missing or left over.

    read: gives each full tensor by its name. transformers' GPT-2 has every bias: a model without gets zeros. Linear weights
    turn to [in, out]. more: for config.json.
    """
    known, shapes = Partition.of(config, 1).shapes(), Partition.of(replace(config, bias=True), 1).shapes()
    stored = {name: shape[::-1] if is_conv1d(name) else shape for name, shape in shapes.items()}
    file = TensorFile(directory / "model.safetensors", stored, dtype, metadata={"format": "pt"})
    with _progress("merge", file.total) as bar:
        for name, shape in shapes.items():
            before = file.bytes
            tensor = read(name) if name in known else torch.zeros(shape)
            file.write(name, tensor.t() if is_conv1d(name) else tensor)
            bar.update(file.bytes - before)
    file.close()
    write_json(directory / "config.json", hf_config(config, dtype_name(dtype)) | (more or {}))


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


def write_nanogpt(shards: ShardSource, file: BinaryIO) -> None:
    """A ckpt.pt with nanoGPT's keys and `model_args`. torch.save wants all tensors at once: memory is the model's."""
    args = asdict(shards.config)
    # for our own reader: nanoGPT has but one activation, and takes the tokenizer from a dataset
    config = {"activation": args.pop("activation"), **carried(shards)}
    state = dict(full_tensors(shards))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save({"model": state, "model_args": args, "iter_num": 0, "best_val_loss": 1e9, "config": config}, file)


def open_shards(directory: str) -> ShardSource:
    """The shard directory, or the newest checkpoint of a training directory."""
    path = Path(directory)
    return ShardSource(latest_checkpoint(path) if (path / LATEST).is_file() else path)


def verify(directory: str) -> ShardSource:
    """Check every byte of a shard directory, and the header of each file, against the manifest."""
    shards = open_shards(directory)
    ranks = range(shards.manifest.tp)
    shards.check_all_bytes(ranks)
    for rank in ranks:
        shards.check_header(rank)
    return shards

"""Split weights into a shard directory, merge them back, write other programs' formats."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from base.errors import UserError
from base.files import check_target, naming, new_directory, new_file, remove_leftovers, write_json
from base.numbers import nbytes
from checkpoints.huggingface import GPT2_TOKENS, is_conv1d
from checkpoints.manifest import DTYPES, MANIFEST, Manifest, TensorEntry, dtype_name, shard_name
from checkpoints.shards import ShardSource
from checkpoints.sources import Source, check_belongs, open_shards, open_source, tokenizer_of
from checkpoints.tensor_file import TensorFile
from checkpoints.tensors import CARRIED, HEAD, TABLE, tokenizer_for
from cli.options import MergeOptions, SplitOptions
from model import GPTConfig
from plan.partition import Partition
from text.tokenizer import TOKENIZER_FILE

# the files that each command writes into a directory, and so may replace with --force
SHARD_FILES = r"shards\.json|tokenizer\.json|rank-\d+-of-\d+\.safetensors"
HF_FILES = r"config\.json|model\.safetensors"


def place(path: str) -> Path:
    """Where an --out points: through a link it is the directory that is replaced, not the link."""
    return Path(os.path.realpath(path))


def split(options: SplitOptions) -> tuple[Manifest, str]:
    """Write a shard directory of any source: (its manifest, a note on its tokenizer or "")."""
    out = place(options.out)
    check_target(out, options.force, SHARD_FILES)
    source = open_source(options.init_from, verify=(0, 1))
    dtype = source.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    partition = Partition.of(source.config, options.tp)
    tokenizer = tokenizer_of(source, options.tokenizer)
    check_belongs(tokenizer, source)
    _check_space(out, sum(map(partition.count, range(options.tp))) * dtype.itemsize)
    with new_directory(out, options.force, SHARD_FILES) as scratch:
        manifest = write_shards(source, partition, dtype, scratch)
        write_json(scratch / TOKENIZER_FILE, tokenizer.to_json())
    return manifest, tokenizer.note


def _check_space(out: Path, need: int) -> None:
    parent = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        needs, has = f"{nbytes(need)} ({need:,} bytes)", f"{nbytes(free)} ({free:,} bytes)"
        raise UserError(f"{out} needs {needs}, {parent} has {has} free.")


def write_shards(source: Source, partition: Partition, dtype: torch.dtype,
                 directory: Path) -> Manifest:  # fmt: skip
    """Write every rank's file and the manifest, tensor after tensor, the ranks at the same time."""
    ranks, table = range(partition.tp), partition.table
    owned = {name: TensorEntry(shape, rule.unpadded) for name, (shape, rule) in table.items()}
    files = []
    for rank in ranks:
        local = {name: entry.rule.local_shape(entry.shape, rank) for name, entry in owned.items()}
        files.append(TensorFile(directory / shard_name(rank, partition.tp), local, dtype))

    def write(name: str, rank: int) -> None:
        rule = owned[name].rule
        files[rank].write(name, source.read(name, rule.dim, rule.runs_of(rank)))

    # converting, hashing and writing all release Python's lock
    with _progress("split", files) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in owned:
            list(pool.map(write, [name] * partition.tp, ranks))
            bar.update(sum(file.bytes for file in files) - bar.n)
        closed = list(pool.map(TensorFile.close, files))
    written = tuple((file.path.name, *ends) for file, ends in zip(files, closed, strict=True))
    about = source.config, partition.tp, dtype_name(dtype), source.description
    manifest = Manifest(*about, written, owned, source.sync)
    write_json(directory / MANIFEST, manifest.as_json())
    return manifest


def _progress(what: str, files: list[TensorFile]) -> Any:
    total = sum(file.total for file in files)
    return tqdm(total=total, desc=what, disable=None, unit="B", unit_scale=True, unit_divisor=1000)


def merge(options: MergeOptions) -> ShardSource:
    """Write the full weights of a shard directory in another program's format."""
    out = place(options.out)
    if options.format == "hf":
        check_target(out, options.force, HF_FILES)
    elif out.is_dir():
        such = f"such as --out={out / 'ckpt.pt'}"
        raise UserError(f"{out} is a directory: name the file to write, {such}")
    elif not options.force:
        check_target(out, False, "")
    shards = open_shards(options.shards)
    _check_space(out, Partition.of(shards.config, 1).count() * shards.dtype.itemsize)
    shards.check_all_bytes(range(shards.manifest.tp))
    read = partial(shards.read, dim=None, runs=())
    if options.format == "hf":
        with new_directory(out, options.force, HF_FILES) as scratch:
            write_hf(shards.config, shards.dtype, read, scratch, _carried(shards))
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        with naming(out, ", so it was not written"), new_file(out) as file:
            _write_nanogpt(shards, read, file)
    return shards


def _carried(shards: ShardSource) -> dict[str, Any]:
    """The tokenizer, for a merged checkpoint's settings, unless the vocabulary's size tells it."""
    known = shards.tokenizer or {"kind": "ids"}
    by_size = known == tokenizer_for(shards.config.vocab_size, {})
    return {} if known["kind"] == "ids" or by_size else {CARRIED: known}


def write_hf(config: GPTConfig, dtype: torch.dtype, read: Callable[[str], Tensor], directory: Path,
             more: dict[str, Any] | None = None) -> None:  # fmt: skip
    """What GPT2LMHeadModel.from_pretrained loads with no key missing or left over. read: gives each
    full tensor by its name. transformers' GPT-2 has every bias: a model without gets zeros. Linear
    weights are transposed to [in, out]. more: for config.json."""
    known = Partition.of(config, 1).shapes()
    shapes = Partition.of(replace(config, bias=True), 1).shapes()
    stored = {name: shape[::-1] if is_conv1d(name) else shape for name, shape in shapes.items()}
    file = TensorFile(directory / "model.safetensors", stored, dtype, metadata={"format": "pt"})
    with _progress("merge", [file]) as bar:
        for name, shape in shapes.items():
            tensor = read(name) if name in known else torch.zeros(shape)
            file.write(name, tensor.t() if is_conv1d(name) else tensor)
            bar.update(file.bytes - bar.n)
    file.close()
    write_json(directory / "config.json", hf_config(config, dtype_name(dtype)) | (more or {}))


def hf_config(config: GPTConfig, dtype: str) -> dict[str, Any]:
    end = GPT2_TOKENS - 1 if config.vocab_size >= GPT2_TOKENS else None
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation],
        "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_ctx": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer,
        "n_head": config.n_head, "n_inner": None, "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": True, "dtype": dtype,
    }  # fmt: skip


def _write_nanogpt(shards: ShardSource, read: Callable[[str], Tensor], file: BinaryIO) -> None:
    """A ckpt.pt with nanoGPT's keys. torch.save wants all tensors at once: as much memory."""
    args = asdict(shards.config)
    # for our own reader: nanoGPT knows no activation, and has the tokenizer from a dataset
    config = {"activation": args.pop("activation"), **_carried(shards)}
    state = {name: read(name) for name in Partition.of(shards.config, 1).shapes()}
    state[HEAD] = state[TABLE]
    content = {"model": state, "model_args": args, "iter_num": 0, "best_val_loss": 1e9}
    try:
        torch.save(content | {"config": config}, file)
    except RuntimeError as error:  # it hides why a write failed
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None

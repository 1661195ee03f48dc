"""Split weights into a shard directory, merge them back, write other programs' formats."""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from base.errors import UserError, shown

from base.files import (  # isort: skip
    check_target, inside, naming, new_directory, new_file, read_json, remove_leftovers, write_json,
)
from base.numbers import nbytes
from checkpoints.huggingface import is_conv1d
from checkpoints.manifest import DTYPES, MANIFEST, Manifest, TensorEntry, dtype_name, shard_name
from checkpoints.nanogpt import parameter_orders
from checkpoints.shards import ShardDirectory, ShardSource
from checkpoints.sources import Source, check_belongs, open_shards, open_source, tokenizer_of
from checkpoints.tensor_file import TensorFile
from checkpoints.tensors import CARRIED, HEAD, MOMENTS, OPTIMIZER, STATE, TABLE
from cli.options import MergeOptions, SplitOptions
from model import VARIANTS, GPTConfig
from plan.partition import Partition
from text.hf_tokenizer import CONFIG, FILES, HFTokenizer, hf_files
from text.tokenizer import TOKENIZER_FILE, Tokenizer

# the files that each command writes into a directory, and so may replace with --force
SHARD_FILES = r"shards\.json|tokenizer\.json|rank-\d+-of-\d+\.safetensors"
HF_FILES = "|".join(map(re.escape, ("config.json", "model.safetensors", *FILES)))


def place(path: str) -> Path:
    """Where an --out points: through a link it is the directory that is replaced, not the link."""
    return Path(os.path.realpath(path))


def split(options: SplitOptions) -> tuple[Manifest, str]:
    """Write a shard directory of any source: (its manifest, a note on its tokenizer or "")."""
    out = place(options.out)
    check_target(out, options.force, SHARD_FILES)
    source = open_source(options.init_from, verify=(0, 1), drop_heads=options.drop_heads)
    dtype = source.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    partition = Partition.of(source.config, options.tp)
    tokenizer = tokenizer_of(source, options.tokenizer, options.data_dir)
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
    if options.format == "nanogpt":
        _check_nanogpt(shards.config)
    _check_space(out, Partition.of(shards.config, 1).count() * shards.dtype.itemsize)
    shards.check_all_bytes(range(shards.manifest.tp))
    read = partial(shards.read, dim=None, runs=())
    if options.format == "hf":
        with new_directory(out, options.force, HF_FILES) as scratch:
            tokenizer = tokenizer_of(shards)
            write_hf(shards.config, shards.dtype, read, scratch, tokenizer)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        with naming(out, ", so it was not written"), new_file(out) as file:
            _write_nanogpt(shards, read, file)
    return shards


def _check_nanogpt(config: GPTConfig) -> None:
    """UserError for what nanoGPT's model.py does not compute."""
    found = [f"{name}={shown(value)}" for name, value in config.as_json().items()
             if name in VARIANTS or (name == "activation" and "gelu" not in value)]
    if found:
        how = "Merge with --format=hf"
        raise UserError(f"nanoGPT's model.py knows no {' or '.join(found)}. {how}.")


def _carried(shards: ShardSource) -> dict[str, Any]:
    """The tokenizer, for the settings of a ckpt.pt, unless nanoGPT's rule tells it. Hugging Face's
    files would be more than such a file may hold."""
    known = shards.tokenizer or {"kind": "ids"}
    return {CARRIED: known} if known["kind"] == "char" else {}


def write_hf(config: GPTConfig, dtype: torch.dtype, read: Callable[[str], Tensor], directory: Path,
             tokenizer: Tokenizer | None = None) -> None:  # fmt: skip
    """What transformers loads with no key missing or left over, and its pipelines run. read: gives
    each full tensor by its name. transformers' GPT-2 has every bias: a model without gets zeros.
    Linear weights are transposed to [in, out]."""
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
    ends: dict[str, Any] = dict.fromkeys(CONFIG, tokenizer and tokenizer.eot)
    ends |= {"pad_token_id": None}
    ends |= tokenizer.config if isinstance(tokenizer, HFTokenizer) else {}
    made = hf_config(config, dtype_name(dtype)) | ends
    if tokenizer is not None and tokenizer.kind == "char":
        made[CARRIED] = tokenizer.to_json()
    write_json(directory / "config.json", made)
    if tokenizer is not None:
        files = {"generation_config.json": json.dumps(ends, indent=1)} | hf_files(tokenizer)
        for name, text in files.items():
            (directory / name).write_bytes(text.encode())


def hf_config(config: GPTConfig, dtype: str) -> dict[str, Any]:
    name = config.activation
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new" if name == "gelu_tanh" else name,
        "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_ctx": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer,
        "n_head": config.n_head, **{key: getattr(config, key) for key in VARIANTS},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "n_inner": config.n_inner or None, "dtype": dtype,
    }  # fmt: skip


def _write_nanogpt(shards: ShardSource, read: Callable[[str], Tensor], file: BinaryIO) -> None:
    """A ckpt.pt with nanoGPT's keys. torch.save wants all tensors at once: as much memory."""
    args = shards.config.as_json()
    # for our own reader: nanoGPT knows no activation, and has the tokenizer from a dataset
    ours = {"activation": args.pop("activation"), **_carried(shards)}
    state = {name: read(name) for name in Partition.of(shards.config, 1).shapes()}
    state[HEAD] = state[TABLE]
    content: dict[str, Any] = {"iter_num": 0, "best_val_loss": 1e9, "config": {}}
    content |= {"model": state, "model_args": args, **training_state(shards)}
    try:
        torch.save(content | {"config": content["config"] | ours}, file)
    except RuntimeError as error:  # it hides why a write failed
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def training_state(shards: ShardSource) -> dict[str, Any]:
    """What nanoGPT's resume reads beside the weights; {} of what is no training checkpoint."""
    if not (shards.directory / STATE).is_file():
        return {}
    stored = ShardDirectory(inside(shards.directory / OPTIMIZER))
    raw = read_json(shards.directory / STATE)
    shapes = Partition.of(shards.config, 1).shapes()
    stored.check_tensors({f"{m}.{name}": shape for m in MOMENTS for name, shape in shapes.items()})
    stored.check_all_bytes(range(stored.manifest.tp))
    try:
        progress, options = raw["progress"], raw["options"]
        steps = float(progress["optimizer_steps"])
        rates = {"lr": options["learning_rate"], "betas": (options["beta1"], options["beta2"])}
        decay = options["weight_decay"]
        found = {name: progress[name] for name in ("iter_num", "best_val_loss")}
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{shards.directory / STATE} is damaged or of another version.") from None
    groups = parameter_orders(shapes)[0]
    state: dict[int, Any] = {}
    for i, name in enumerate(name for group in groups for name in group):
        moments = {moment: stored.read(f"{moment}.{name}", None, ()) for moment in MOMENTS}
        state[i] = {"step": torch.tensor(steps), **moments}
    empty = [[torch.nn.Parameter(torch.empty(0)) for _ in group] for group in groups]
    each = zip(empty, (decay, 0.0), strict=True)
    pairs = [{"params": group, "weight_decay": rate} for group, rate in each]
    optimizer = torch.optim.AdamW(pairs, **rates)
    made = {"state": state if steps else {}, "param_groups": optimizer.state_dict()["param_groups"]}
    return {"optimizer": made, "config": options, **found}

"""shards.json, the manifest of a shard directory. Nothing in it is believed before it is checked: a
directory may come from anywhere."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError, printable, shown
from base.fields import Field, check_fields
from base.files import read_json
from model import GPTConfig
from plan.partition import Rule
from plan.schedule import Schedule

FORMAT_VERSION = 1
MANIFEST = "shards.json"
MAX_TP = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shard_name(rank: int, tp: int) -> str:
    return f"rank-{rank:02d}-of-{tp:02d}.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """A full tensor: its shape, and the runs of it that each rank owns."""

    shape: tuple[int, ...]
    rule: Rule

    def as_json(self) -> dict[str, Any]:
        split = None if self.rule.dim is None else {"dim": self.rule.dim, "ranges": self.rule.runs}
        return {"shape": self.shape, "split": split}


@dataclass(frozen=True)
class Sync:
    """The schedule of sync points (plan/schedule.py) that weights were made for, and on how many
    ranks. evidence: how well they do with it, for people: any JSON."""

    schedule: str
    tp: int
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """files: (name, bytes, sha256) of each rank's file. sync: None if the weights were made for no
    schedule in particular."""

    model: GPTConfig
    tp: int
    dtype: str
    source: str
    files: tuple[tuple[str, int, str], ...]
    tensors: dict[str, TensorEntry]
    sync: Sync | None = None

    def as_json(self) -> dict[str, Any]:
        made = self.sync
        sync = made and {"sync": made.schedule, "sync_tp": made.tp, "evidence": made.evidence}
        return {
            "format_version": FORMAT_VERSION, "model": asdict(self.model), "tp": self.tp,
            "dtype": self.dtype, "source": self.source, **(sync or {}),
            "files": [dict(zip(("name", "bytes", "sha256"), f, strict=True)) for f in self.files],
            "tensors": {name: entry.as_json() for name, entry in self.tensors.items()},
        }  # fmt: skip


# --- reading --------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53  # True is no count


def _is_shallow(value: Any, levels: int = 20) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


_SIZE = Field(int, lambda n: 0 < n < 2**31)
MODEL_FIELDS = {
    **dict.fromkeys(("block_size", "vocab_size", "n_head", "n_embd"), _SIZE),
    "n_layer": Field(int, lambda n: 0 < n < 10_000),  # a table of more would take long to make
    "dropout": Field(float, lambda p: 0 <= p < 1),
    "bias": Field(bool),
    "activation": Field(str, ("gelu", "gelu_tanh").__contains__, "{name}={value} is not known."),
}
_SCHEDULE = re.compile("[a-z0-9:, ]{1,100000}")
_RANKS = Field(int, lambda n: 1 <= n <= MAX_TP, "{name}={value} is not a number of ranks.")
FIELDS = {
    "format_version": Field(int, lambda n: 0 < n < 2**53, "format_version is missing."),
    "tp": _RANKS,
    "dtype": Field(str, DTYPES.__contains__, f"dtype {{value}} is not one of {', '.join(DTYPES)}."),
    "source": Field(str, fault="source {value} is not text."),
    "files": Field(list, fault="`files` is missing."),
    "tensors": Field(dict, fault="`tensors` is missing."),
}
SYNC_FIELDS = {
    "sync": Field(str, _SCHEDULE.fullmatch, "{name}={value} is not a schedule."),
    "sync_tp": _RANKS,
    "evidence": Field(dict, _is_shallow, "`evidence` is not an object, or nested too deep."),
}
FILE_FIELDS = {
    "bytes": Field(int, _is_count, "{name}={value} is not a size."),
    "sha256": Field(str, re.compile("[0-9a-f]{64}").fullmatch, "{name} is malformed."),
}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a shard directory. UserError names the file and the fault."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise UserError(f"{directory} is not a shard directory: it has no {MANIFEST}.")
    raw = read_json(path)
    try:
        return _manifest(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def _manifest(raw: Any) -> Manifest:
    _require(isinstance(raw, dict), "the manifest is not a JSON object.")
    missing = dict.fromkeys(FIELDS) | {"source": ""}
    version = raw.get("format_version")
    if _is_count(version) and version > FORMAT_VERSION:
        reads = f"newer than this program reads ({FORMAT_VERSION})"
        raise UserError(f"format {version} is {reads}. Update nanoTP.")
    found = check_fields(missing | raw, FIELDS, "")
    tp, model = found["tp"], config_from(raw.get("model"), "model.{}".format)
    tensors = {name: _tensor(name, entry, tp) for name, entry in found["tensors"].items()}
    _require(len(found["files"]) == tp, f"`files` does not list {tp} files, one a rank.")
    files = tuple(_file(rank, entry, tp) for rank, entry in enumerate(found["files"]))
    sync, source = None, printable(found["source"], 500)
    if "sync" in raw:
        made = check_fields({"sync_tp": 0, "evidence": {}} | raw, SYNC_FIELDS, "")
        Schedule.parse(made["sync"], model.n_layer)  # UserError if it is none of this model's
        sync = Sync(made["sync"], made["sync_tp"], made["evidence"])
    return Manifest(model, tp, found["dtype"], source, files, tensors, sync)


def config_from(raw: Any, label: Callable[[str], str]) -> GPTConfig:
    """A GPTConfig from untrusted values. UserError unless every field is there, of its type and in
    range; label: what the file calls a field."""
    config = GPTConfig(**check_fields(raw, MODEL_FIELDS, "the model's sizes are", label))
    fits = config.n_embd % config.n_head == 0
    _require(fits, f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads.")
    return config


def _file(rank: int, raw: Any, tp: int) -> tuple[str, int, str]:
    _require(isinstance(raw, dict), f"files[{rank}] is not an object.")
    name, found = shard_name(rank, tp), raw.get("name")
    # it can have no other name: nothing outside the directory is ever opened
    _require(found == name, f"files[{rank}] is {shown(found)}, expected {name!r}.")
    fields = check_fields(raw, FILE_FIELDS, "", f"{name}: {{}}".format)
    return name, fields["bytes"], fields["sha256"]


def _tensor(name: str, raw: Any, tp: int) -> TensorEntry:
    def need(good: object, fault: str) -> None:
        _require(good, f"tensor {name}{fault}")

    known = re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name)
    _require(known, f"tensor {shown(name)} is not a parameter's name.")
    has_both = isinstance(raw, dict) and {"shape", "split"} <= raw.keys()
    need(has_both, " has no shape or no split.")
    shape, split = raw["shape"], raw["split"]
    good = isinstance(shape, list) and len(shape) in (1, 2) and all(map(_is_count, shape))
    need(good, f": shape {shown(shape)} is not one or two sizes.")
    if split is None:
        return TensorEntry(tuple(shape), Rule())
    need(isinstance(split, dict), ": split is neither null nor an object.")
    dim, ranges = split.get("dim"), split.get("ranges")
    good = _is_count(dim) and dim < len(shape)
    need(good, f": dim {shown(dim)} is not one of its {len(shape)}.")
    good = isinstance(ranges, list) and len(ranges) == tp
    need(good, f": ranges are not one list for each of {tp} ranks.")
    size, edge = shape[dim], 0
    for owned in ranges:
        need(isinstance(owned, list), f": ranges {shown(owned)} are not a list.")
        for run in owned:
            good = isinstance(run, list) and len(run) == 2 and all(map(_is_count, run))
            good = good and run[0] <= run[1] <= size
            need(good, f": range {shown(run)} does not lie in [0, {size}].")
    for lo, hi in sorted(run for owned in ranges for run in owned if run[0] < run[1]):
        fault = "overlap" if lo < edge else "leave a gap"
        need(lo == edge, f": ranges {fault} at {min(lo, edge)}.")
        edge = hi
    need(edge == size, f": ranges end at {edge}, the tensor at {size}.")
    return TensorEntry(tuple(shape), Rule(dim, tuple(tuple(map(tuple, r)) for r in ranges)))

"""shards.json, the manifest of a shard directory, which may come from anywhere: all is checked."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from base.errors import UserError, in_file, printable, shown
from base.files import read_json
from model import ACTIVATIONS, VARIANTS, GPTConfig
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
    """files: (name, bytes, sha256) of each rank. sync: None if the weights were made for none."""

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
            "format_version": FORMAT_VERSION, "model": self.model.as_json(), "tp": self.tp,
            "dtype": self.dtype, "source": self.source, **(sync or {}),
            "files": [dict(zip(("name", "bytes", "sha256"), f, strict=True)) for f in self.files],
            "tensors": {name: entry.as_json() for name, entry in self.tensors.items()},
        }  # fmt: skip


# --- reading --------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a shard directory. UserError names the file and the fault."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise UserError(f"{directory} is not a shard directory: it has no {MANIFEST}.")
    raw = read_json(path)
    with in_file(path):
        return _manifest(raw)


def _need(condition: object, fault: str) -> None:
    if not condition:
        raise UserError(fault)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53  # True is no count


def _are_counts(value: Any, *lengths: int) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(_is_count, value))


def _is_shallow(value: Any, levels: int = 20) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


def _manifest(raw: Any) -> Manifest:
    _need(isinstance(raw, dict), "the manifest is not a JSON object.")
    version, dtype, source = raw.get("format_version"), raw.get("dtype"), raw.get("source", "")
    _need(_is_count(version) and version, "format_version is missing.")
    reads = f"newer than this program reads ({FORMAT_VERSION})"
    _need(version <= FORMAT_VERSION, f"format {version} is {reads}. Update nanoTP.")
    tp = _ranks("tp", raw.get("tp"))
    known = isinstance(dtype, str) and dtype in DTYPES
    _need(known, f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}.")
    _need(isinstance(source, str), f"source {shown(source)} is not text.")
    for name, kind in (("files", list), ("tensors", dict)):
        _need(isinstance(raw.get(name), kind), f"`{name}` is missing.")
    model = config_from(raw.get("model"), "model.{}".format)
    tensors = {name: _tensor(name, entry, tp) for name, entry in raw["tensors"].items()}
    _need(len(raw["files"]) == tp, f"`files` does not list {tp} files, one a rank.")
    files = tuple(_file(rank, entry, tp) for rank, entry in enumerate(raw["files"]))
    sync = _sync(raw, model.n_layer) if "sync" in raw else None
    return Manifest(model, tp, dtype, printable(source, 500), files, tensors, sync)


def _ranks(name: str, tp: Any) -> int:
    _need(_is_count(tp) and 1 <= tp <= MAX_TP, f"{name}={shown(tp)} is not a number of ranks.")
    return tp


def _sync(raw: dict[str, Any], n_layer: int) -> Sync:
    schedule, evidence = raw["sync"], raw.get("evidence", {})
    known = isinstance(schedule, str) and re.fullmatch("[a-z0-9:+, ]{1,100000}", schedule)
    _need(known, f"sync={shown(schedule)} is not a schedule.")
    flat = isinstance(evidence, dict) and _is_shallow(evidence)
    _need(flat, "`evidence` is not an object, or nested too deep.")
    tp = _ranks("sync_tp", raw.get("sync_tp", 0))
    Schedule.parse(schedule, n_layer)  # UserError if it is none of this model's
    return Sync(schedule, tp, evidence)


def config_from(raw: Any, label: Callable[[str], str]) -> GPTConfig:
    """A GPTConfig from untrusted values. UserError unless every field is there, of its type and in
    range; label: what the file calls a field."""
    _need(isinstance(raw, dict), "the model's sizes are not an object.")
    found = {}
    raw = {name: getattr(GPTConfig, name) for name in VARIANTS} | raw
    for name, kind in get_type_hints(GPTConfig).items():
        _need(name in raw, f"{label(name)} is missing.")
        value, what = raw[name], f"{label(name)}={shown(raw[name])} is"
        if kind is float and _is_count(value):
            value = float(value)
        _need(type(value) is kind, f"{what} not of type {kind.__name__}.")
        # a table of more layers would take long to make
        low = int(kind is int and name != "n_inner")
        high = 1 if kind is float else 10_000 if name == "n_layer" else 2**31
        _need(kind not in (int, float) or low <= value < high, f"{what} out of range.")
        _need(kind is not str or value in ACTIVATIONS, f"{what} not known.")
        found[name] = value
    config = GPTConfig(**found)
    fits = config.n_embd % config.n_head == 0
    _need(fits, f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads.")
    return config


def _file(rank: int, raw: Any, tp: int) -> tuple[str, int, str]:
    _need(isinstance(raw, dict), f"files[{rank}] is not an object.")
    name, size, sha256 = shard_name(rank, tp), raw.get("bytes"), raw.get("sha256")
    # it can have no other name: nothing outside the directory is ever opened
    found = raw.get("name")
    _need(found == name, f"files[{rank}] is {shown(found)}, expected {name!r}.")
    _need(_is_count(size), f"{name}: bytes={shown(size)} is not a size.")
    good = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
    _need(good, f"{name}: sha256 is malformed.")
    return name, size, sha256


def _tensor(name: str, raw: Any, tp: int) -> TensorEntry:
    known = re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name)
    _need(known, f"tensor {shown(name)} is not a parameter's name.")
    what = f"tensor {name}"
    has_both = isinstance(raw, dict) and {"shape", "split"} <= raw.keys()
    _need(has_both, f"{what} has no shape or no split.")
    shape, split = raw["shape"], raw["split"]
    _need(_are_counts(shape, 1, 2), f"{what}: shape {shown(shape)} is not one or two sizes.")
    if split is None:
        return TensorEntry(tuple(shape), Rule())
    _need(isinstance(split, dict), f"{what}: split is neither null nor an object.")
    dim, ranges = split.get("dim"), split.get("ranges")
    good = _is_count(dim) and dim < len(shape)
    _need(good, f"{what}: dim {shown(dim)} is not one of its {len(shape)}.")
    good = isinstance(ranges, list) and len(ranges) == tp
    _need(good, f"{what}: ranges are not one list for each of {tp} ranks.")
    size, edge = shape[dim], 0
    for owned in ranges:
        _need(isinstance(owned, list), f"{what}: ranges {shown(owned)} are not a list.")
        for run in owned:
            good = _are_counts(run, 2) and run[0] <= run[1] <= size
            _need(good, f"{what}: range {shown(run)} does not lie in [0, {size}].")
    for lo, hi in sorted(run for owned in ranges for run in owned if run[0] < run[1]):
        fault = "overlap" if lo < edge else "leave a gap"
        _need(lo == edge, f"{what}: ranges {fault} at {min(lo, edge)}.")
        edge = hi
    _need(edge == size, f"{what}: ranges end at {edge}, the tensor at {size}.")
    return TensorEntry(tuple(shape), Rule(dim, tuple(tuple(map(tuple, r)) for r in ranges)))

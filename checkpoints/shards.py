"""The shard directory: one safetensors file a rank, and a manifest from which the full tensors can be put together.

Reading never needs the writer's tp. Nothing in a manifest is believed before it is checked: a directory may come from
anywhere.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import UserError
from model import GPTConfig
from parallel.partition import Partition, Rule, Run

FORMAT_VERSION = 1
MANIFEST = "shards.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shard_name(rank: int, tp: int) -> str:
    return f"rank-{rank:02d}-of-{tp:02d}.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """One full tensor of a manifest: its shape and, unless every rank has the whole, who has which runs of it."""

    shape: tuple[int, ...]
    rule: Rule

    def as_json(self) -> dict[str, Any]:
        split = None if self.rule.dim is None else {"dim": self.rule.dim, "ranges": self.rule.runs}
        return {"shape": self.shape, "split": split}


@dataclass(frozen=True)
class Manifest:
    """What shards.json says. files: (name, bytes, sha256) of each rank's file."""

    model: GPTConfig
    tp: int
    dtype: str
    source: str
    files: tuple[tuple[str, int, str], ...]
    tensors: dict[str, TensorEntry]

    def as_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": asdict(self.model),
            "tp": self.tp,
            "dtype": self.dtype,
            "source": self.source,
            "files": [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in self.files],
            "tensors": {name: entry.as_json() for name, entry in self.tensors.items()},
        }


# --- reading a manifest ---------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest:
    """The checked manifest of a shard directory. UserError names the file and the fault."""
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{directory} is not a shard directory: it has no {MANIFEST}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({str(error)[:80]}).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return _parse(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _parse(raw: Any) -> Manifest:
    _require(isinstance(raw, dict), "the manifest is not a JSON object.")
    version = raw.get("format_version")
    _require(_is_count(version) and version > 0, "format_version is missing.")
    _require(version <= FORMAT_VERSION, f"format {version} is newer than this program reads ({FORMAT_VERSION}). Update nanoTP.")
    for key in ("model", "tp", "dtype", "files", "tensors"):
        _require(key in raw, f"`{key}` is missing.")
    tp, dtype = raw["tp"], raw["dtype"]
    _require(_is_count(tp) and 1 <= tp <= 4096, f"tp={tp!r} is not a number of ranks.")
    _require(dtype in DTYPES, f"dtype {str(dtype)[:40]!r} is not one of {', '.join(DTYPES)}.")
    model = parse_config(raw["model"])
    _require(isinstance(raw["tensors"], dict), "`tensors` is not an object.")
    tensors = {name: _parse_tensor(name, entry, tp) for name, entry in raw["tensors"].items()}
    return Manifest(model, tp, dtype, str(raw.get("source", ""))[:500], _parse_files(raw["files"], tp), tensors)


def parse_config(raw: Any) -> GPTConfig:
    """A GPTConfig from untrusted JSON; every field must be there, of its type and in range."""
    _require(isinstance(raw, dict), "`model` is not an object.")
    values: dict[str, Any] = {}
    for field in fields(GPTConfig):
        _require(field.name in raw, f"model.{field.name} is missing.")
        value = raw[field.name]
        kind = type(field.default)
        value = float(value) if kind is float and type(value) is int else value
        _require(type(value) is kind, f"model.{field.name}={str(value)[:40]!r} is not of type {kind.__name__}.")
        if kind is int:
            _require(0 < value < 2**31, f"model.{field.name}={value} is out of range.")
        values[field.name] = value
    config = GPTConfig(**values)
    _require(config.activation in ("gelu", "gelu_tanh"), f"model.activation={config.activation[:40]!r} is not known.")
    _require(0 <= config.dropout < 1, f"model.dropout={config.dropout} is out of range.")
    _require(config.n_layer <= 10_000, f"model.n_layer={config.n_layer} is out of range.")
    _require(config.n_embd % config.n_head == 0, f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads.")
    return config


def _parse_files(raw: Any, tp: int) -> tuple[tuple[str, int, str], ...]:
    _require(isinstance(raw, list) and len(raw) == tp, f"`files` does not list {tp} files, one a rank.")
    files = []
    for rank, entry in enumerate(raw):
        _require(isinstance(entry, dict), f"files[{rank}] is not an object.")
        name, size, sha256 = entry.get("name"), entry.get("bytes"), entry.get("sha256")
        # the one name it can have: nothing outside the directory is ever opened
        _require(name == shard_name(rank, tp), f"files[{rank}] is {str(name)[:60]!r}, expected {shard_name(rank, tp)!r}.")
        _require(_is_count(size), f"{name}: bytes={str(size)[:40]!r} is not a size.")
        _require(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None, f"{name}: sha256 is malformed.")
        files.append((name, size, sha256))
    return tuple(files)


def _parse_tensor(name: str, raw: Any, tp: int) -> TensorEntry:
    name = name[:100]
    _require(isinstance(raw, dict) and "shape" in raw and "split" in raw, f"tensor {name!r} has no shape or no split.")
    shape, split = raw["shape"], raw["split"]
    _require(isinstance(shape, list) and len(shape) in (1, 2) and all(map(_is_count, shape)), f"tensor {name!r}: bad shape.")
    if split is None:
        return TensorEntry(tuple(shape), Rule())
    _require(isinstance(split, dict), f"tensor {name!r}: split is neither null nor an object.")
    dim, ranges = split.get("dim"), split.get("ranges")
    _require(_is_count(dim) and dim < len(shape), f"tensor {name!r}: dim {str(dim)[:20]} is not one of its {len(shape)}.")
    _require(isinstance(ranges, list) and len(ranges) == tp, f"tensor {name!r}: ranges are not one list for each of {tp} ranks.")
    runs: list[tuple[Run, ...]] = []
    for owned in ranges:
        _require(isinstance(owned, list) and len(owned) <= 64, f"tensor {name!r}: ranges are malformed.")
        for run in owned:
            good = isinstance(run, list) and len(run) == 2 and all(map(_is_count, run)) and run[0] <= run[1] <= shape[dim]
            _require(good, f"tensor {name!r}: range {str(run)[:40]} does not lie in [0, {shape[dim]}].")
        runs.append(tuple((lo, hi) for lo, hi in owned))
    edge = 0
    for lo, hi in sorted(run for owned in runs for run in owned if run[0] < run[1]):
        _require(lo == edge, f"tensor {name!r}: ranges {'overlap' if lo < edge else 'leave a gap'} at {min(lo, edge)}.")
        edge = hi
    _require(edge == shape[dim], f"tensor {name!r}: ranges end at {edge}, the tensor at {shape[dim]}.")
    return TensorEntry(tuple(shape), Rule(dim, tuple(runs)))


# --- reading shards -------------------------------------------------------------------------------------------------


class ShardDirectory:
    """The tensors of a shard directory, read lazily and only where asked; a source of weights at any tp.

    Files are opened (sizes and headers checked against the manifest) when first read from.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.config, self.dtype = self.manifest.model, DTYPES[self.manifest.dtype]
        self.description = f"shards of {self.manifest.source}" if self.manifest.source else str(directory)
        self._open: dict[int, Any] = {}

    def check_model(self) -> None:
        """UserError unless the tensors are those of the manifest's model, neither more nor fewer."""
        expected = Partition.of(self.config, 1).shapes()
        for name in sorted(expected.keys() ^ self.manifest.tensors.keys()):
            fault = "is missing" if name in expected else "does not belong to the model"
            raise UserError(f"{self.directory / MANIFEST}: tensor {name[:100]!r} {fault}.")
        for name, shape in expected.items():
            found = self.manifest.tensors[name].shape
            _require(found == shape, f"{self.directory / MANIFEST}: tensor {name!r} has shape {found}, the model needs {shape}.")

    def check_bytes(self, rank: int) -> None:
        """Every byte of one rank's file against the manifest."""
        name, size, expected = self.manifest.files[rank]
        path = self._check_size(rank)
        found = sha256_of(path)
        _require(found == expected, f"{path} is damaged or from another split: sha256 {found[:12]}..., manifest {expected[:12]}...")

    def _check_size(self, rank: int) -> Path:
        name, size, _ = self.manifest.files[rank]
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing. The manifest lists {self.manifest.tp} files; split again or copy it back.")
        found = path.stat().st_size
        _require(found == size, f"{path} has {found} bytes, the manifest says {size}: truncated, or from another split.")
        return path

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self._check_size(rank)
            try:
                file = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a readable safetensors file ({str(error)[:100]}).") from None
            self._check_header(rank, path, file)
            self._open[rank] = file
        return self._open[rank]

    def check_header(self, rank: int) -> None:
        """Names, shapes and dtypes of one rank's file against the manifest."""
        self._file(rank)

    def _check_header(self, rank: int, path: Path, file: Any) -> None:
        found = set(file.keys())
        for name in sorted(found ^ self.manifest.tensors.keys()):
            raise UserError(f"{path}: tensor {name[:100]!r} {'is not in the manifest' if name in found else 'is missing'}.")
        code = _CODES[self.dtype]
        for name, entry in self.manifest.tensors.items():
            part, expected = file.get_slice(name), entry.rule.local_shape(entry.shape, rank)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            _require(shape == expected, f"{path}: tensor {name!r} has shape {shape}, the manifest says {expected}.")
            _require(dtype == code, f"{path}: tensor {name!r} is {dtype}, the manifest says {code}.")

    def read(self, name: str, dim: int | None, runs: Iterable[Run]) -> Tensor:
        """Runs of a full tensor along `dim`, one after the other; the whole tensor where dim is None."""
        entry = self.manifest.tensors[name]
        if dim is None:
            return self._assemble(name, entry, 0, [(0, entry.shape[0])])
        return self._assemble(name, entry, dim, list(runs))

    def _assemble(self, name: str, entry: TensorEntry, dim: int, runs: list[Run]) -> Tensor:
        if entry.rule.dim is None:
            return _cat([_narrow(self._file(0).get_slice(name), dim, lo, hi) for lo, hi in runs], dim)
        if entry.rule.dim != dim:
            whole = self._assemble(name, entry, entry.rule.dim, [(0, entry.shape[entry.rule.dim])])
            return _cat([whole.narrow(dim, lo, hi - lo) for lo, hi in runs], dim)
        parts = []
        for lo, hi in runs:
            for rank, start, stop in _locate(entry.rule, lo, hi):
                parts.append(_narrow(self._file(rank).get_slice(name), dim, start, stop))
        return _cat(parts, dim)


def _locate(rule: Rule, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """Where the entries [lo, hi) of a full tensor lie, in order: (rank, from, to) in that rank's part."""
    places = []
    for rank, owned in enumerate(rule.runs):
        base = 0
        for start, stop in owned:
            low, high = max(lo, start), min(hi, stop)
            if low < high:
                places.append((low, rank, base + low - start, base + high - start))
            base += stop - start
    for _, rank, first, last in sorted(places):
        yield rank, first, last


def _narrow(part: Any, dim: int, lo: int, hi: int) -> Tensor:
    """Entries [lo, hi) along dim of a safetensors slice, read from the file's mapping."""
    return part[(slice(None),) * dim + (slice(lo, hi),)]


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def sha256_of(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


# --- writing --------------------------------------------------------------------------------------------------------


class TensorFile:
    """Writes one safetensors file tensor by tensor: shapes are told first, then the data in the same order.

    Memory is that of one tensor. `close` flushes to the disk and gives (bytes, sha256).
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, metadata: dict[str, str] | None = None):
        self.path, self.dtype, self._left = path, dtype, list(shapes.items())
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, shape in shapes.items():
            size = dtype.itemsize
            for n in shape:
                size *= n
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        self.total = offset  # bytes of data, without the header
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as safetensors' own writer has it
        self._digest = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb", buffering=0)
        self.bytes = 0
        self._write(len(text).to_bytes(8, "little") + text)

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        while view:  # an unbuffered write may take less than it is given
            view = view[self._file.write(view) :]
        self._digest.update(data)
        self.bytes += len(data)

    def write(self, name: str, tensor: Tensor) -> None:
        expected, shape = self._left.pop(0)
        if (name, tuple(tensor.shape)) != (expected, shape):
            raise ValueError(f"{self.path}: {name} {list(tensor.shape)} comes where {expected} {list(shape)} was announced")
        tensor = tensor.detach().to("cpu", self.dtype).contiguous()
        if tensor.numel():
            self._write(tensor.view(torch.uint8).numpy().reshape(-1).data)

    def close(self) -> tuple[int, str]:
        if self._left:
            raise ValueError(f"{self.path}: {self._left[0][0]} was announced and not written")
        os.fsync(self._file.fileno())
        self._file.close()
        return self.bytes, self._digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def temporary_sibling(path: Path) -> Path:
    """Where `path` is written before it is renamed into place; a name that no two runs on a host share."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


@contextlib.contextmanager
def new_directory(path: Path, force: bool = False) -> Iterator[Path]:
    """A directory to fill that becomes `path` when the block ends, and vanishes if it fails: `path` is whole or absent.

    UserError where `path` exists, unless `force` and it holds what this program writes.
    """
    path = Path(os.path.abspath(path))
    check_target(path, force)
    scratch = temporary_sibling(path)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        publish(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def check_target(path: Path, force: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise UserError(f"{path} exists. Choose another place, or replace it with --force.")
    ours = path.is_dir() and (not any(path.iterdir()) or (path / MANIFEST).is_file() or (path / "config.json").is_file())
    if not ours:
        raise UserError(f"{path} exists and does not look like a shard or model directory: not replaced, even with --force.")


def publish(scratch: Path, path: Path) -> None:
    """Rename a finished directory into place; one that stood there goes only after."""
    sync_directory(scratch)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
        try:
            scratch.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old)
    else:
        scratch.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries: without this a rename may be lost with the power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The shard directory: one safetensors file a rank, and a manifest from which the full tensors can be put together.

Reading never needs the writer's tp. Nothing in a manifest is believed before it is checked: a directory may come from
anywhere.
"""

import contextlib
import ctypes
import glob
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from base.errors import UserError, printable, shown
from base.files import fetched, json_of, own_file, read_json
from base.processes import is_running
from model import GPTConfig
from plan.partition import Partition, Rule, Span
from plan.schedule import Schedule

FORMAT_VERSION = 1
MANIFEST = "shards.json"
MAX_TP = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER = 1 << 24  # bytes of a safetensors file's header: that of a model of 10,000 layers is as long
CHUNK = 1 << 20  # bytes written at a time: still in the processor's cache when they are hashed
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names


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
class Sync:
    """A schedule of sync points that weights were made for (plan/schedule.py), on how many ranks, and how that was found
    to do: the latter is for people, and may hold any JSON."""

    schedule: str
    tp: int
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What shards.json says. files: (name, bytes, sha256) of each rank's file. sync: None where nothing was said of it."""

    model: GPTConfig
    tp: int
    dtype: str
    source: str
    files: tuple[tuple[str, int, str], ...]
    tensors: dict[str, TensorEntry]
    sync: Sync | None = None

    def as_json(self) -> dict[str, Any]:
        sync = self.sync and {"sync": self.sync.schedule, "sync_tp": self.sync.tp, "evidence": self.sync.evidence}
        return {
            "format_version": FORMAT_VERSION,
            "model": asdict(self.model),
            "tp": self.tp,
            "dtype": self.dtype,
            "source": self.source,
            **(sync or {}),
            "files": [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in self.files],
            "tensors": {name: entry.as_json() for name, entry in self.tensors.items()},
        }


# --- reading a manifest ---------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest:
    """The checked manifest of a shard directory. UserError names the file and the fault."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise UserError(f"{directory} is not a shard directory: it has no {MANIFEST}.")
    raw = read_json(path)
    try:
        return _parse(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53  # True is no count


def _parse(raw: Any) -> Manifest:
    _require(isinstance(raw, dict), "the manifest is not a JSON object.")
    version = raw.get("format_version")
    _require(_is_count(version) and version > 0, "format_version is missing.")
    _require(version <= FORMAT_VERSION, f"format {version} is newer than this program reads ({FORMAT_VERSION}). Update nanoTP.")
    for key in ("model", "tp", "dtype", "files", "tensors"):
        _require(key in raw, f"`{key}` is missing.")
    tp, dtype, source = raw["tp"], raw["dtype"], raw.get("source", "")
    _require(_is_count(tp) and 1 <= tp <= MAX_TP, f"tp={shown(tp)} is not a number of ranks.")
    _require(isinstance(dtype, str) and dtype in DTYPES, f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}.")
    _require(isinstance(source, str), f"source {shown(source)} is not text.")
    model = config_from(raw["model"], "model.{}".format)
    _require(isinstance(raw["tensors"], dict), "`tensors` is not an object.")
    tensors = {name: _parse_tensor(name, entry, tp) for name, entry in raw["tensors"].items()}
    return Manifest(model, tp, dtype, printable(source, 500), _parse_files(raw["files"], tp), tensors, _parse_sync(raw, model))


def _parse_sync(raw: dict[str, Any], model: GPTConfig) -> Sync | None:
    if "sync" not in raw:
        return None
    text, tp, evidence = raw["sync"], raw.get("sync_tp", 0), raw.get("evidence", {})
    good = isinstance(text, str) and re.fullmatch("[a-z0-9:, ]{1,100000}", text)
    _require(bool(good), f"sync={shown(text)} is not a schedule.")
    _require(_is_count(tp) and 1 <= tp <= MAX_TP, f"sync_tp={shown(tp)} is not a number of ranks.")
    _require(isinstance(evidence, dict), "`evidence` is not an object.")
    _require(_is_shallow(evidence, 20), "`evidence` is nested too deep.")  # to be written again, for one
    Schedule.parse(text, model.n_layer)  # says what is wrong with it
    return Sync(text, tp, evidence)


def _is_shallow(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


def config_from(raw: Any, label: Callable[[str], str]) -> GPTConfig:
    """A GPTConfig from untrusted values: every field must be there, of its type and in range.

    label: what the file calls a field, for the messages of the UserErrors.
    """
    _require(isinstance(raw, dict), "the model's sizes are not an object.")
    values: dict[str, Any] = {}
    for size in fields(GPTConfig):
        _require(size.name in raw, f"{label(size.name)} is missing.")
        value, kind = raw[size.name], type(size.default)
        if kind is float and type(value) is int and value in (0, 1):
            value = float(value)
        _require(type(value) is kind, f"{label(size.name)}={shown(value)} is not of type {kind.__name__}.")
        limit = 10_000 if size.name == "n_layer" else 2**31  # a table of more layers would take long to make
        _require(kind is not int or 0 < value < limit, f"{label(size.name)}={shown(value)} is out of range.")
        values[size.name] = value
    config = GPTConfig(**values)
    _require(config.activation in ("gelu", "gelu_tanh"), f"{label('activation')}={shown(config.activation)} is not known.")
    _require(0 <= config.dropout < 1, f"{label('dropout')}={config.dropout} is out of range.")
    _require(config.n_embd % config.n_head == 0, f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads.")
    return config


def _parse_files(raw: Any, tp: int) -> tuple[tuple[str, int, str], ...]:
    _require(isinstance(raw, list) and len(raw) == tp, f"`files` does not list {tp} files, one a rank.")
    files = []
    for rank, entry in enumerate(raw):
        _require(isinstance(entry, dict), f"files[{rank}] is not an object.")
        name, size, sha256 = entry.get("name"), entry.get("bytes"), entry.get("sha256")
        # the one name it can have: nothing outside the directory is ever opened
        _require(name == shard_name(rank, tp), f"files[{rank}] is {shown(name)}, expected {shard_name(rank, tp)!r}.")
        _require(_is_count(size), f"{name}: bytes={shown(size)} is not a size.")
        _require(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None, f"{name}: sha256 is malformed.")
        files.append((name, size, sha256))
    return tuple(files)


def _parse_tensor(name: str, raw: Any, tp: int) -> TensorEntry:
    _require(re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name) is not None, f"tensor {shown(name)} is not a parameter's name.")
    _require(isinstance(raw, dict) and "shape" in raw and "split" in raw, f"tensor {name} has no shape or no split.")
    shape, split = raw["shape"], raw["split"]
    good = isinstance(shape, list) and len(shape) in (1, 2) and all(map(_is_count, shape))
    _require(good, f"tensor {name}: shape {shown(shape)} is not one or two sizes.")
    if split is None:
        return TensorEntry(tuple(shape), Rule())
    _require(isinstance(split, dict), f"tensor {name}: split is neither null nor an object.")
    dim, ranges = split.get("dim"), split.get("ranges")
    _require(_is_count(dim) and dim < len(shape), f"tensor {name}: dim {shown(dim)} is not one of its {len(shape)}.")
    _require(isinstance(ranges, list) and len(ranges) == tp, f"tensor {name}: ranges are not one list for each of {tp} ranks.")
    runs = tuple(_parse_runs(f"tensor {name}", owned, shape[dim]) for owned in ranges)
    _check_cover(f"tensor {name}", runs, shape[dim])
    return TensorEntry(tuple(shape), Rule(dim, runs))


def _parse_runs(what: str, raw: Any, size: int) -> tuple[Span, ...]:
    _require(isinstance(raw, list), f"{what}: ranges {shown(raw)} are not a list.")
    for run in raw:
        good = isinstance(run, list) and len(run) == 2 and all(map(_is_count, run)) and run[0] <= run[1] <= size
        _require(good, f"{what}: range {shown(run)} does not lie in [0, {size}].")
    return tuple((lo, hi) for lo, hi in raw)


def _check_cover(what: str, runs: tuple[tuple[Span, ...], ...], size: int) -> None:
    """UserError unless the runs of all ranks together cover [0, size) once."""
    edge = 0
    for lo, hi in sorted(run for owned in runs for run in owned if run[0] < run[1]):
        _require(lo == edge, f"{what}: ranges {'overlap' if lo < edge else 'leave a gap'} at {min(lo, edge)}.")
        edge = hi
    _require(edge == size, f"{what}: ranges end at {edge}, the tensor at {size}.")


# --- reading shards -------------------------------------------------------------------------------------------------


def open_tensors(path: Path) -> Any:
    """A safetensors file as safe_open opens it, tensors mapped and not read. UserError where it is not one, or a name stands
    in it twice: of two tensors of one name each reader may take another."""
    try:
        with open(own_file(path), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"a header of {size:,} bytes")
            json_of(file.read(size))
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:  # memory: a file too large to map
        raise UserError(f"{path} is not a readable safetensors file ({printable(str(error))}).") from None


class ShardDirectory:
    """The tensors of a shard directory, read lazily and only where asked; a source of weights at any tp.

    Files are opened (sizes and headers checked against the manifest) when first read from.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.config, self.dtype = self.manifest.model, DTYPES[self.manifest.dtype]
        self.description = self.manifest.source or str(directory)
        self._open: dict[int, Any] = {}

    def check_model(self) -> None:
        """UserError unless the tensors are those of the manifest's model, neither more nor fewer."""
        self.check_tensors(Partition.of(self.config, 1).shapes())

    def check_tensors(self, expected: dict[str, tuple[int, ...]]) -> None:
        """UserError unless the manifest's tensors have these names and shapes."""
        for name in sorted(expected.keys() ^ self.manifest.tensors.keys()):
            fault = "is missing" if name in expected else "does not belong to the model"
            raise UserError(f"{self.directory / MANIFEST}: tensor {name} {fault}.")
        for name, shape in expected.items():
            found = self.manifest.tensors[name].shape
            fault = f"has shape {list(found)}, the model needs {list(shape)}"
            _require(found == shape, f"{self.directory / MANIFEST}: tensor {name} {fault}.")

    def check_all_bytes(self, ranks: Iterable[int]) -> None:
        """`check_bytes` of several ranks' files, as many at a time as there are cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.check_bytes, ranks))

    def check_bytes(self, rank: int) -> None:
        """Every byte of one rank's file against the manifest."""
        expected = self.manifest.files[rank][2]
        path = self._check_size(rank)
        found = sha256_of(path)
        fault = f"sha256 {found[:12]}..., manifest {expected[:12]}..."
        _require(found == expected, f"{path} is damaged or from another split: {fault}")

    def _check_size(self, rank: int) -> Path:
        name, size, _ = self.manifest.files[rank]
        path = self.directory / name
        # a link may lead anywhere, and who unpacked the directory need not know
        _require(not path.is_symlink(), f"{path} is a symbolic link: a shard is a file of its directory. Put the file there.")
        if not path.is_file():
            raise UserError(f"{path} is missing. The manifest lists {self.manifest.tp} files; split again or copy it back.")
        found = fetched(path).stat().st_size
        _require(found == size, f"{path} has {found} bytes, the manifest says {size}: truncated, or from another split.")
        return path

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self._check_size(rank)
            file = open_tensors(path)
            self._check_header(rank, path, file)
            self._open[rank] = file
        return self._open[rank]

    def check_header(self, rank: int) -> None:
        """Names, shapes and dtypes of one rank's file against the manifest."""
        self._file(rank)

    def _check_header(self, rank: int, path: Path, file: Any) -> None:
        found = set(file.keys())
        for name in sorted(found ^ self.manifest.tensors.keys()):
            raise UserError(f"{path}: tensor {shown(name)} {'is not in the manifest' if name in found else 'is missing'}.")
        code = CODES[self.dtype]
        for name, entry in self.manifest.tensors.items():
            part, expected = file.get_slice(name), entry.rule.local_shape(entry.shape, rank)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            fault = f"is {dtype} {list(shape)}, the manifest says {code} {list(expected)}"
            _require((dtype, shape) == (code, expected), f"{path}: tensor {name} {fault}.")

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        """Runs of a full tensor along `dim`, one after the other; the whole tensor where dim is None."""
        entry = self.manifest.tensors[name]
        if dim is None:
            return self._assemble(name, entry, 0, [(0, entry.shape[0])])
        return self._assemble(name, entry, dim, list(runs))

    def _assemble(self, name: str, entry: TensorEntry, dim: int, runs: list[Span]) -> Tensor:
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

    What is not laid out as the file has it (transposed, of another dtype, on a GPU) passes through a buffer of about
    CHUNK bytes: memory does not grow with the tensors. `close` flushes to the disk and gives (bytes, sha256).
    """

    def __init__(
        self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, metadata: dict[str, str] | None = None
    ):
        self.path, self.dtype, self._left = path, dtype, list(shapes.items())
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, shape in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        self.total = offset  # bytes of data, without the header
        longest = max((math.prod(shape[1:]) for shape in shapes.values()), default=1)
        self._buffer = torch.empty(max(CHUNK // dtype.itemsize, longest), dtype=dtype)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as safetensors' own writer has it
        self._digest = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb", buffering=0)
        self.bytes = 0
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def _write(self, data: memoryview) -> None:
        while data:
            count = self._file.write(data[:CHUNK])  # an unbuffered write may take less than it is given
            self._digest.update(data[:count])
            self.bytes += count
            data = data[count:]

    def write(self, name: str, tensor: Tensor) -> None:
        expected, shape = self._left.pop(0)
        if (name, tuple(tensor.shape)) != (expected, shape):
            raise ValueError(f"{self.path}: {name} {list(tensor.shape)} comes where {expected} {list(shape)} was announced")
        for piece in self._as_in_file(tensor.detach()):
            self._write(piece.view(torch.uint8).numpy().data)

    def _as_in_file(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor in pieces along dim 0, each contiguous, in host memory and of the file's dtype."""
        if tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.dtype == self.dtype:
            yield tensor.flatten()
            return
        rows = self._buffer.numel() // max(1, math.prod(tensor.shape[1:]))
        for piece in tensor.split(rows):
            yield self._buffer[: piece.numel()].view(piece.shape).copy_(piece).flatten()

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


@contextlib.contextmanager
def new_directory(path: Path, force: bool, ours: str) -> Iterator[Path]:
    """A directory to fill that becomes `path` when the block ends, and vanishes if it fails: `path` is whole or absent.

    UserError where `path` exists, unless `force` and all that it holds is files whose names match `ours`.
    """
    check_target(path, force, ours)
    with _scratch(path) as scratch:
        scratch.mkdir()
        yield scratch
        check_target(path, force, ours)  # it may have come meanwhile
        publish(scratch, path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """The same for a file."""
    with _scratch(path) as scratch:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_directory(path.parent)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A free name beside `path` to write to; whatever stands there in the end is deleted. OSError names `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    scratch = path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    try:
        yield scratch
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides why a write failed
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"{cause.strerror}, so it was not written", str(path)) from error
    finally:
        _remove(scratch)


def _remove_leftovers(path: Path) -> None:
    """Delete what runs on this host that were killed left beside `path`."""
    pattern = f".{path.name}.tmp-{os.uname().nodename}-"
    for left in path.parent.glob(glob.escape(pattern) + "*"):
        pid = left.name.removeprefix(pattern)
        if re.fullmatch("[1-9][0-9]{0,9}", pid) and not is_running(int(pid)):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_target(path: Path, force: bool, ours: str) -> None:
    """UserError where `path` exists, unless `force` and all that it holds is files whose names match `ours`."""
    if not path.exists():
        return
    if not force:
        raise UserError(f"{path} exists. Choose another place, or replace it with --force.")
    if not path.is_dir():
        raise UserError(f"{path} exists and is not a directory: not replaced, even with --force.")
    for entry in sorted(path.iterdir()):
        if not (entry.is_file() and re.fullmatch(ours, entry.name)):
            foreign = f"{shown(entry.name)}, which this command does not write"
            raise UserError(f"{path} holds {foreign}: not replaced, even with --force.")


def publish(scratch: Path, path: Path) -> None:
    """Rename a finished directory into place; one that stood there goes only after."""
    sync_directory(scratch)
    if not path.exists():
        scratch.rename(path)
    elif not _swap(scratch, path):
        old = scratch.with_name(scratch.name + ".old")
        path.rename(old)
        try:
            scratch.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(scratch)
    sync_directory(path.parent)
    _remove(scratch)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two names in one step, so that neither is missing at any time; False where the system cannot."""
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def sync_directory(path: Path) -> None:
    """Flush a directory's entries: without this a rename may be lost with the power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Read the tensors of a shard directory, at any tp, whatever the writer's was."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from base.errors import UserError, shown
from base.files import fetched
from checkpoints.manifest import DTYPES, MANIFEST, read_manifest
from checkpoints.tensor_file import CODES, joined, open_tensors, runs_of
from checkpoints.tensors import Source, check_tensors
from plan.partition import Partition, Rule, Span
from text.tokenizer import TOKENIZER_FILE, read_tokenizer


class ShardDirectory:
    """A shard directory, of weights or of anything else. Its files are opened, and their sizes and
    headers checked against the manifest, when first read from."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.config, self.dtype = self.manifest.model, DTYPES[self.manifest.dtype]
        self.description = self.manifest.source or str(directory)
        self._open: dict[int, Any] = {}

    def check_tensors(self, expected: dict[str, tuple[int, ...]]) -> None:
        """UserError unless the manifest's tensors have exactly these names and shapes."""
        found = {name: list(entry.shape) for name, entry in self.manifest.tensors.items()}
        where, shapes = f"{self.directory / MANIFEST}", sorted(expected.items())
        check_tensors(found, {name: list(s) for name, s in shapes}, where, "the model needs")
        for name in sorted(found.keys() - expected.keys()):
            raise UserError(f"{where}: tensor {name} does not belong to the model.")

    def check_all_bytes(self, ranks: Iterable[int]) -> None:
        """`check_bytes` of several ranks' files, as many at a time as there are cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.check_bytes, ranks))

    def check_bytes(self, rank: int) -> None:
        """UserError unless a rank's file has the sha256 that the manifest says."""
        path, expected = self._sized(rank), self.manifest.files[rank][2]
        with open(path, "rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            fault = f"sha256 {found[:12]}..., manifest {expected[:12]}..."
            raise UserError(f"{path} is damaged or from another split: {fault}")

    def _sized(self, rank: int) -> Path:
        """A rank's file. UserError unless it is a file of the manifest's size."""
        name, size, _ = self.manifest.files[rank]
        path = self.directory / name
        if path.is_symlink():  # it may lead anywhere, and whoever unpacked it need not know
            fault = "is a symbolic link: a shard is a file of its directory"
            raise UserError(f"{path} {fault}. Put the file there.")
        if not path.is_file():
            lists = f"The manifest lists {self.manifest.tp} files"
            raise UserError(f"{path} is missing. {lists}; split again or copy it back.")
        found = fetched(path).stat().st_size
        if found != size:
            fault = f"has {found} bytes, the manifest says {size}"
            raise UserError(f"{path} {fault}: truncated, or from another split.")
        return path

    def file(self, rank: int) -> Any:
        """A rank's file, open. UserError unless its tensors are those of the manifest."""
        if rank not in self._open:
            path = self._sized(rank)
            file, entries = open_tensors(path), self.manifest.tensors
            names, code = set(file.keys()), CODES[self.dtype]
            for name in sorted(names ^ entries.keys()):
                fault = "is not in the manifest" if name in names else "is missing"
                raise UserError(f"{path}: tensor {shown(name)} {fault}.")
            expected, found = {}, {}
            for name, entry in entries.items():
                part = file.get_slice(name)
                found[name] = f"{part.get_dtype()} {part.get_shape()}"
                expected[name] = f"{code} {list(entry.rule.local_shape(entry.shape, rank))}"
            check_tensors(found, expected, str(path), "the manifest says", "is")
            self._open[rank] = file
        return self._open[rank]

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        """Runs of a full tensor along `dim`, concatenated; all of it if dim is None."""
        shape, rule = self.manifest.tensors[name].shape, self.manifest.tensors[name].rule
        if rule.dim is None:
            return runs_of(self.file(0).get_slice(name), dim, runs)
        if dim != rule.dim:
            return runs_of(self.read(name, rule.dim, [(0, shape[rule.dim])]), dim, runs)
        places = (place for lo, hi in runs for place in _locate(rule, lo, hi))
        return joined([runs_of(self.file(r).get_slice(name), dim, [run]) for r, run in places], dim)


def _locate(rule: Rule, lo: int, hi: int) -> list[tuple[int, Span]]:
    """Where the entries [lo, hi) of a full tensor lie, in order: (rank, run of its part)."""
    places = []
    for rank, owned in enumerate(rule.runs):
        base = 0
        for start, stop in owned:
            low, high = max(lo, start), min(hi, stop)
            if low < high:
                places.append((low, rank, (base + low - start, base + high - start)))
            base += stop - start
    return [(rank, run) for _, rank, run in sorted(places)]


class ShardSource(ShardDirectory, Source):
    """Shards of a model's weights. verify=(rank, size): check the bytes of this rank's share."""

    def __init__(self, directory: Path, verify: tuple[int, int] | None = None):
        super().__init__(directory)
        self.check_tensors(Partition.of(self.config, 1).shapes())
        if os.path.lexists(path := directory / TOKENIZER_FILE):
            self.tokenizer = read_tokenizer(path).to_json()
        self.sync, self.files = self.manifest.sync, [directory / MANIFEST]
        if verify is not None:
            self.check_all_bytes(range(verify[0], self.manifest.tp, verify[1]))

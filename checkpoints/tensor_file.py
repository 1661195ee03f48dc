"""A safetensors file, written tensor by tensor and opened without belief in what it says; and runs
of its tensors: contiguous ranges along one dimension, by which a rank's part is described."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from base.errors import UserError, printable
from base.files import json_of, own_file
from plan.partition import Rule, Span

MAX_HEADER = 1 << 24  # bytes: the header of a model of 10,000 layers is as long
CHUNK = 1 << 20  # bytes written at a time: still in the processor's cache when they are hashed
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names
Read = Callable[[str, Rule], Tensor]  # (name, its rule): the entries that this rank owns, unpadded


def runs_of(part: Any, dim: int | None, runs: Iterable[Span]) -> Tensor:
    """Runs along `dim`, concatenated, of a tensor or safetensors slice; all if dim is None."""
    if dim is None:
        return part[:]
    return joined([part[(slice(None),) * dim + (slice(lo, hi),)] for lo, hi in runs], dim)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def open_tensors(path: Path) -> Any:
    """A safetensors file as safe_open opens it, tensors mapped and not read. UserError if it is
    none, or a name stands in it twice: readers differ in which of the two they take."""
    try:
        with open(own_file(path), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"a header of {size:,} bytes")
            json_of(file.read(size))
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        fault = printable(str(error))  # MemoryError: it is too large to map
        raise UserError(f"{path} is not a readable safetensors file ({fault}).") from None


class TensorFile:
    """Writes a safetensors file: the shapes first, then the tensors in the same order. A tensor
    that is not contiguous, in host memory and of `dtype` passes through a buffer of about CHUNK
    bytes: memory does not grow with the tensors. `close` flushes to the disk."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype,
                 metadata: dict[str, str] | None = None):  # fmt: skip
        self.path, self.dtype, self._left = path, dtype, list(shapes.items())
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
        longest = max((math.prod(shape[1:]) for shape in shapes.values()), default=1)
        self._buffer = torch.empty(max(CHUNK // dtype.itemsize, longest), dtype=dtype)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as safetensors writes it
        self.total = 8 + len(text) + end  # bytes of the file
        self._digest, self.bytes = hashlib.sha256(), 0
        self._file: BinaryIO = open(path, "wb", buffering=0)
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def _write(self, data: memoryview) -> None:
        while data:
            count = self._file.write(data[:CHUNK])  # may be less than it was given
            self._digest.update(data[:count])
            self.bytes += count
            data = data[count:]

    def write(self, name: str, tensor: Tensor) -> None:
        expected, shape = self._left.pop(0)
        if (name, tuple(tensor.shape)) != (expected, shape):
            here, announced = f"{name} {list(tensor.shape)}", f"{expected} {list(shape)}"
            raise ValueError(f"{self.path}: {here} comes where {announced} was announced")
        for piece in self._as_in_file(tensor.detach()):
            self._write(piece.view(torch.uint8).numpy().data)

    def _as_in_file(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor in flat pieces along dim 0, contiguous, in host memory and of `dtype`."""
        if tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.dtype == self.dtype:
            yield tensor.flatten()
            return
        for piece in tensor.split(self._buffer.numel() // max(1, math.prod(tensor.shape[1:]))):
            yield self._buffer[: piece.numel()].view(piece.shape).copy_(piece).flatten()

    def close(self) -> tuple[int, str]:
        """(bytes, sha256) of the file."""
        if self._left:
            raise ValueError(f"{self.path}: {self._left[0][0]} was announced and not written")
        os.fsync(self._file.fileno())
        self._file.close()
        return self.bytes, self._digest.hexdigest()

"""Read the zip archive that torch.save writes: its pickle as data, its tensors mapped from the file.

torch.load(weights_only=True, mmap=True) maps whatever lies where the archive says that a record
begins, compressed or shorter than the tensor made of it, and unpickles calls and keys that take all
memory or all time. So the archive is read here, by zipfile and base/pickles.py.
"""

import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch
from torch import Tensor, UntypedStorage

from base.errors import shown
from base.pickles import Operations, PlainUnpickler, Refused

MAX_PICKLE = 1 << 20  # bytes: that of gpt2-xl with its optimizer's state has 200 KB
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


def read_archive(path: Path, verify: tuple[int, int] | None = None) -> Any:
    """The dicts, lists, numbers, strings and tensors that torch.save wrote, tensors mapped.

    verify=(rank, size): compare the checksums of the model's tensors too, each by one of `size`
    ranks. Raises pickles.Refused where the pickle holds more than data, and an error of some other
    kind where the file is damaged or no such archive.
    """
    with open(path, "rb") as file, ZipFile(file) as archive:
        entries, length = _checked_entries(archive), file.seek(0, 2)
        starts = _starts(file, archive, length)
        root = archive.filelist[0].filename.partition("/")[0]
        if entries[f"{root}/data.pkl"].file_size > MAX_PICKLE:
            raise BadZipFile(f"a pickle of more than {MAX_PICKLE:,} bytes")
        order = f"{root}/byteorder"
        swap = order in entries and archive.read(order) != sys.byteorder.encode()
        mapped = UntypedStorage.from_file(str(path), False, length)
        records = {
            name.removeprefix(f"{root}/data/"): mapped[start : start + entries[name].file_size]
            for name, start in starts.items() if name.startswith(f"{root}/data/")
        }  # fmt: skip
        whole = _TensorUnpickler(archive.read(f"{root}/data.pkl"), records, swap).load()
        if verify is not None and isinstance(whole, dict) and isinstance(whole.get("model"), dict):
            tensors = (value for value in whole["model"].values() if isinstance(value, Tensor))
            used = {t.untyped_storage().data_ptr() - mapped.data_ptr() for t in tensors}
            rank, size = verify
            for name in sorted(name for name in starts if starts[name] in used)[rank::size]:
                with archive.open(name) as record:
                    while record.read(1 << 20):  # raises BadZipFile at its end if it is damaged
                        pass
        return whole


def _checked_entries(archive: ZipFile) -> dict[str, ZipInfo]:
    """The records by name. BadZipFile unless they are stored as they are, in one folder, under
    names that differ in more than case (torch ignores it)."""
    entries = {entry.filename: entry for entry in archive.filelist}
    roots = {name.partition("/")[0] for name in entries}
    if len(roots) != 1 or len({name.lower() for name in entries}) != len(archive.filelist):
        raise BadZipFile("a name stands in it twice, or there are several folders")
    for name, entry in entries.items():
        if name != entry.orig_filename or not name.isascii() or not name.isprintable():
            raise BadZipFile(f"a record is called {shown(entry.orig_filename)}")
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not stored or entry.flag_bits & 1:
            raise BadZipFile(f"{shown(name)} is compressed or encrypted, which torch.save never does")
        entry.CRC = entry.CRC or None  # type: ignore[assignment]  # torch was told to write none
    return entries


def _starts(file: BinaryIO, archive: ZipFile, length: int) -> dict[str, int]:
    """Where the content of each record begins. BadZipFile unless the records fill the file from its
    first byte, none reaches into the next, and nothing follows the archive."""
    starts, edge = {}, 0
    ordered = sorted(archive.filelist, key=lambda entry: entry.header_offset)
    for entry in ordered:
        file.seek(entry.header_offset)
        signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
        starts[entry.filename] = entry.header_offset + 30 + name + extra
        if signature != b"PK\3\4" or entry.header_offset < edge:
            raise BadZipFile(f"{shown(entry.filename)} is cut short")
        edge = starts[entry.filename] + entry.file_size
    file.seek(-42, 2)
    locator, end = file.read(20), file.read(22)  # the former where a record of 64-bit sizes precedes
    whole = end.startswith(b"PK\5\6") and end.endswith(b"\0\0")
    if locator.startswith(b"PK\6\7"):
        whole = whole and int.from_bytes(locator[8:16], "little") == length - 98
    if not whole or ordered[0].header_offset or edge > archive.start_dir:
        raise BadZipFile("its beginning or end is not as torch.save writes it")
    return starts


class _Storage(NamedTuple):
    dtype: torch.dtype
    data: UntypedStorage


class _TensorUnpickler(PlainUnpickler):
    """Also makes the tensors that torch.save wrote. records: the bytes of each storage by its key;
    swap: they are in the other byte order."""

    dispatch = Operations(PlainUnpickler.dispatch)

    def __init__(self, raw: bytes, records: dict[str, UntypedStorage], swap: bool):
        super().__init__(io.BytesIO(raw))
        self.records, self.swap = records, set(records if swap else ())

    def find_class(self, module: str, name: str) -> Any:
        found = CALLS.get(f"{module}.{name}", STORAGES.get(name) if module == "torch" else None)
        return found or super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        what, dtype, key, device, count = pid
        if what != "storage" or not isinstance(dtype, torch.dtype) or type(count) is not int:
            raise Refused("it holds a storage that is none")
        size, record = count * dtype.itemsize, self.records.get(key) if type(key) is str else None
        if record is None or not 0 <= size <= record.nbytes():
            raise Refused(f"it holds a storage of {count} numbers that the file does not have")
        if key in self.swap:
            self.swap.remove(key)
            record.byteswap(dtype)
        return _Storage(dtype, record[:size])

    def load_binpersid(self) -> None:
        self.append(self.persistent_load(self.stack.pop()))

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or not any(function is call for call in CALLS.values()):
            raise Refused("it calls what makes no tensor")
        self.append(function(*arguments))

    def load_build(self) -> None:
        attributes, target = self.stack.pop(), self.stack[-1]
        # state_dict() adds this one to its OrderedDict; any other could replace a method of it
        if type(target) is not dict or type(attributes) is not dict or set(attributes) != {"_metadata"}:
            raise Refused("it sets attributes")

    dispatch[pickle.BINPERSID[0]], dispatch[pickle.REDUCE[0]] = load_binpersid, load_reduce
    dispatch[pickle.BUILD[0]] = load_build


def _tensor(storage: Any, offset: int, size: Any, stride: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise Refused("it calls what makes no tensor")
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Refused("it calls what makes no tensor")
    return tensor


def _ordered_dict() -> dict[str, Any]:
    return {}


# what torch.save names, by our own function for it. A seventh argument of _rebuild_tensor_v2 would
# be metadata: bits that say to negate or conjugate what is stored
CALLS = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
}

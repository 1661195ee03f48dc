"""Read the zip archive that torch.save writes: its pickle as data, its tensors mapped.

torch.load(weights_only=True, mmap=True) maps whatever lies where the archive says that a record
begins, compressed or shorter than the tensor made of it, and unpickles calls and keys that take all
memory or all time. So the archive is read here, by zipfile and base/pickles.py."""

import io
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, UntypedStorage

from base.errors import UserError, printable, shown
from base.files import beginning, fetched
from base.pickles import Foreign, Operations, PlainUnpickler, Refused

MAX_PICKLE = 1 << 20  # bytes: that of gpt2-xl with its optimizer's state has 200 KB
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool}  # fmt: skip


# how a file begins that torch.save did not write, as a regular expression, and what it is
BEGINNINGS = {
    rb"(?s:.{8}){":
        "a safetensors file: --init_from takes the directory that has it and config.json",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.":
        "torch's format from before version 1.6: load it with torch, save it again",
    b"\x80": "a pickle that torch.save did not write: save a dict of tensors with torch.save",
    b"GGUF": "a GGUF file, which is not read: --init_from takes the weights that it was made from",
    b"\x1f\x8b": "packed by gzip: unpack it first",
    b"\x89HDF": "an HDF5 file, as TensorFlow saves weights: save them with torch",
    b"<": "a web page: its address was that of a page about the file, not that of the file",
}  # fmt: skip
WITHOUT = ("Where it was made, save what is needed alone: "
           "torch.save({key: checkpoint[key] for key in ('model', 'model_args')}, 'ckpt.pt').")


def read_pt(path: Path, verify: tuple[int, int] | None = None) -> Any:
    """`read_archive` with one line of UserError for whatever is wrong with the file."""
    try:
        return read_archive(fetched(path), verify)
    except UserError:
        raise
    except Refused as error:
        reads = "only tensors, numbers, strings and lists and dicts of them are read"
        how = f" {WITHOUT}" if isinstance(error, Foreign) else ""
        fault = f"is refused: {error}; {reads} from a {path.name}.{how}"
        raise UserError(f"{path} {fault}") from None
    except Exception as error:  # zipfile and torch raise a dozen kinds for a broken file
        fault = f"{type(error).__name__}: {printable((str(error).splitlines() or [''])[0], 80)}"
        head = beginning(path)
        fault = next((what for how, what in BEGINNINGS.items() if re.match(how, head)), fault)
        raise UserError(f"{path} is not a readable {path.name} ({fault}).") from None


def read_archive(path: Path, verify: tuple[int, int] | None = None) -> Any:
    """The dicts, lists, numbers, strings and tensors that torch.save wrote, tensors mapped.
    verify=(rank, size): compare the checksums of the model's tensors too, each by one of `size`
    ranks. Raises pickles.Refused where the pickle holds more than data, and an error of some other
    kind where the file is damaged or no such archive."""
    with open(path, "rb") as file, ZipFile(file) as archive:
        starts = _starts(file, archive)
        root = archive.filelist[0].filename.partition("/")[0]
        pickled, order = archive.getinfo(f"{root}/data.pkl"), f"{root}/byteorder"
        if pickled.file_size > MAX_PICKLE:
            raise BadZipFile(f"a pickle of {pickled.file_size:,} bytes")
        swap = order in starts and archive.read(order) != sys.byteorder.encode()
        mapped = UntypedStorage.from_file(str(path), False, file.seek(0, 2))
        records = {}
        for name, start in starts.items():
            end = start + archive.getinfo(name).file_size
            records[name.removeprefix(f"{root}/data/")] = mapped[start:end]
        whole = _TensorUnpickler(archive.read(pickled), records, swap).load()
        if verify is not None and isinstance(whole, dict) and isinstance(whole.get("model"), dict):
            tensors = (value for value in whole["model"].values() if isinstance(value, Tensor))
            used = {t.untyped_storage().data_ptr() - mapped.data_ptr() for t in tensors}
            rank, size = verify
            for name in [name for name in starts if starts[name] in used][rank::size]:
                with archive.open(name) as record:
                    while record.read(1 << 20):  # at its end BadZipFile if it is damaged
                        pass
        return whole


def _starts(file: BinaryIO, archive: ZipFile) -> dict[str, int]:
    """Where the content of each record begins, in order. BadZipFile unless the records are stored
    as they are, in one folder, under names that differ in more than case (torch ignores it), and
    fill the file from its first byte to the archive's directory, each apart, and nothing follows
    that."""
    starts, edge = {}, 0
    entries = sorted(archive.filelist, key=lambda entry: entry.header_offset)
    for entry in entries:
        name, size, shows = entry.filename, entry.file_size, shown(entry.orig_filename)
        if name != entry.orig_filename or not name.isascii() or not name.isprintable():
            raise BadZipFile(f"a record is called {shows}")
        if entry.compress_type or entry.compress_size != size or entry.flag_bits & 1:
            raise BadZipFile(f"{shows} is compressed or encrypted, which torch.save never does")
        entry.CRC = entry.CRC or None  # type: ignore[assignment]  # 0: torch was told to write none
        file.seek(entry.header_offset)
        signature, name_size, extra = struct.unpack("<4s22xHH", file.read(30))
        starts[name] = entry.header_offset + 30 + name_size + extra
        if signature != b"PK\3\4" or entry.header_offset < edge:
            raise BadZipFile(f"{shows} is cut short")
        edge = starts[name] + size
    one_folder = len({name.partition("/")[0] for name in starts}) == 1
    if not one_folder or len({name.lower() for name in starts}) != len(entries):
        raise BadZipFile("a name stands in it twice, or there are several folders")
    length = file.seek(-42, 2) + 42
    locator, end = file.read(20), file.read()  # the former if there is a record of 64-bit sizes
    whole = end.startswith(b"PK\5\6") and end.endswith(b"\0\0")
    if locator.startswith(b"PK\6\7"):
        whole = whole and int.from_bytes(locator[8:16], "little") == length - 98
    if not whole or entries[0].header_offset or edge > archive.start_dir:
        raise BadZipFile("its beginning or end is not as torch.save writes it")
    return starts


class _Storage(NamedTuple):
    dtype: torch.dtype
    data: UntypedStorage


class _TensorUnpickler(PlainUnpickler):
    """Also makes tensors. records: the bytes of each storage; swap: in the other byte order."""

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

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        known = type(arguments) is tuple and any(function is call for call in CALLS.values())
        made = function(*arguments) if known else None
        if not isinstance(made, Tensor | dict):
            raise Refused("it calls what makes no tensor")
        self.append(made)

    def load_build(self) -> None:
        attributes, target = self.stack.pop(), self.stack[-1]
        # state_dict() adds this one to its OrderedDict; any other could replace a method of it
        dicts = type(target) is dict and type(attributes) is dict
        if not dicts or set(attributes) != {"_metadata"}:
            raise Refused("it sets attributes")

    dispatch[pickle.BINPERSID[0]] = pickle._Unpickler.dispatch[pickle.BINPERSID[0]]
    dispatch[pickle.REDUCE[0]], dispatch[pickle.BUILD[0]] = load_reduce, load_build


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any) -> Any:
    if not isinstance(storage, _Storage):
        return None
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)


# the names that torch.save writes. A seventh argument of _rebuild_tensor_v2 would be metadata: bits
# that say to negate or conjugate what is stored
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_parameter": lambda tensor, grad, hooks: tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
}

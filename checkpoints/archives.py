"""The zip archive that torch.save writes, looked through before torch maps it.

torch.load with mmap takes a record's place for its content: of a compressed record, or beyond the end of a short one, it
would read whatever lies there as numbers. And it unpacks the pickle whole, however large that says it is.
"""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile, ZipInfo

from base.errors import shown
from base.pickles import Opaque, outline

MAX_PICKLE = 1 << 20  # bytes: that of gpt2-xl with its optimizer's state has 200 KB


def check_archive(path: Path, verify: tuple[int, int] | None = None) -> None:
    """An error of some kind unless the file is what torch.save writes of dicts, lists, numbers, strings and tensors, and has
    all the bytes of each tensor; pickles.Refused where it asks for more than data.

    verify=(rank, size): the checksums of the model's tensors too, each by one of `size` ranks.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        _check_end(file, archive.start_dir)
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check_entries(archive.infolist())
        root = next(iter(entries)).partition("/")[0]
        pickle, prefix = entries[f"{root}/data.pkl"], f"{root}/data/"
        if pickle.file_size > MAX_PICKLE:
            raise BadZipFile(f"a pickle of {pickle.file_size:,} bytes")
        starts = _starts(file, archive.infolist(), archive.start_dir)
        records = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
        _check_sum(file, pickle, starts[pickle.filename])
        file.seek(starts[pickle.filename])
        whole = outline(file.read(pickle.file_size), {key: entry.file_size for key, entry in records.items()})
        model = whole.get("model") if isinstance(whole, dict) else None
        if verify is not None and isinstance(model, dict):
            rank, size = verify
            keys = sorted({value.key for value in model.values() if isinstance(value, Opaque)})
            for entry in (records[key] for key in keys[rank::size]):
                _check_sum(file, entry, starts[entry.filename])


def _check_end(file: BinaryIO, directory: int) -> None:
    """Python finds an archive's directory by its size, torch by its offset: these must agree, or torch would read another
    archive than is checked here."""
    length = file.seek(0, 2)
    file.seek(max(0, length - 98))
    tail = file.read().rjust(98, b"\0")
    locator, end = tail[56:76], tail[76:]
    offset = int.from_bytes(end[16:20], "little")
    if locator[:4] == b"PK\6\7":  # what is larger than 4 GB has a second record, just before
        offset = int.from_bytes(tail[48:56], "little")
        if tail[:4] != b"PK\6\6" or int.from_bytes(locator[8:16], "little") != length - 98:
            raise BadZipFile("its end is not as torch.save writes it")
    if end[:4] != b"PK\5\6" or end[20:] != b"\0\0" or offset != directory:
        raise BadZipFile("its end is not as torch.save writes it")


def _check_entries(entries: list[ZipInfo]) -> None:
    """Records are stored as they are, in one folder, under names that differ in more than case (torch ignores it)."""
    roots = {entry.filename.partition("/")[0] for entry in entries}
    names = {entry.filename.lower() for entry in entries}
    if len(roots) != 1 or len(names) != len(entries):
        raise BadZipFile("a name stands in it twice, or there are several folders")
    for entry in entries:
        if entry.filename != entry.orig_filename or not entry.filename.isascii() or not entry.filename.isprintable():
            raise BadZipFile(f"a record is called {shown(entry.orig_filename)}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise BadZipFile(f"{shown(entry.filename)} is compressed or encrypted, which torch.save never does")


def _starts(file: BinaryIO, entries: list[ZipInfo], directory: int) -> dict[str, int]:
    """Where the content of each record begins; none reaches into the next."""
    starts = {}
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    limits = [entry.header_offset for entry in ordered[1:]] + [directory]
    for entry, limit in zip(ordered, limits, strict=True):
        file.seek(entry.header_offset)
        signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
        start = entry.header_offset + 30 + name + extra
        if signature != b"PK\3\4" or start + entry.file_size > limit:
            raise BadZipFile(f"{shown(entry.filename)} is cut short")
        starts[entry.filename] = start
    return starts


def _check_sum(file: BinaryIO, entry: ZipInfo, start: int) -> None:
    """The record's CRC-32, unless torch was told to write none."""
    if entry.CRC == 0:
        return
    found, left = 0, entry.file_size
    file.seek(start)
    while left:
        content = file.read(min(left, 1 << 20))
        if not content:
            raise BadZipFile(f"{shown(entry.filename)} is cut short")
        found, left = zlib.crc32(content, found), left - len(content)
    if found != entry.CRC:
        raise BadZipFile(f"{shown(entry.filename)} is damaged: its checksum is another")

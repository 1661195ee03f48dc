"""Files from strangers, broken or made to do harm: each is refused by one line that names it, and nothing in it runs.

Every case is read by the functions that a run reads with, in a fork that may take little more memory and few seconds more.
"""

import collections
import copyreg
import decimal
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import traceback
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import alone
from safetensors.torch import save_file
from test_shards import CONFIG, FIRST, LN, WTE, load, write
from test_sources import gpt2, nanogpt

from base.errors import UserError
from base.files import SMALL, write_json
from base.pickles import Refused, plain
from checkpoints.archives import MAX_PICKLE, read_archive
from checkpoints.manifest import Manifest, TensorEntry, read_manifest
from checkpoints.sources import open_source, tokenizer_of
from checkpoints.tensor_file import MAX_HEADER, TensorFile
from fewer_syncs.scan import Perplexities
from model import GPTConfig, adamw
from plan.partition import Partition, Rule
from text.dataset import Dataset, write_tokens
from tp_model import TensorParallelGPT
from train import checkpoint as training
from world.mesh import World

ROOT = Path(__file__).parent.parent
MEMORY = 300 << 20  # bytes that a case may ask for beyond what the tests have
SECONDS = 5  # of computing; ten times as many of waiting
SECRET = "secret"  # what lies beside the directory, and is as good as the file that a link to it stands for
CANARY = "canary"  # what anything that ran would have made

Damage = Callable[[Path], None]


# --- what is damaged, and how a run reads it ------------------------------------------------------------------------


def make_shards(place: Path) -> None:
    write(place, 2)


def make_hf(place: Path) -> None:
    gpt2().save_pretrained(place)


def make_indexed(place: Path) -> None:
    """In two files, as large models are saved."""
    gpt2().save_pretrained(place, max_shard_size="30KB")


def make_nanogpt(place: Path) -> None:
    place.mkdir()
    torch.save(nanogpt(), place / "ckpt.pt")


def make_dataset(place: Path) -> None:
    place.mkdir()
    for name in ("train.bin", "val.bin"):
        write_tokens(place / name, np.arange(100) % 3, 3)
    (place / "tokenizer.json").write_text('{"kind": "char", "chars": ["a", "b", "c"]}')


def make_meta(place: Path) -> None:
    make_dataset(place)
    (place / "tokenizer.json").unlink()
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (place / "meta.pkl").write_bytes(pickle.dumps(meta))


def make_training(place: Path) -> None:
    """As a run on one rank leaves it."""
    step = place / "step-000007"
    weights = write(step, 1)
    entries = {f"{moment}.{name}": TensorEntry(tuple(full.shape), Rule()) for moment in training.MOMENTS
               for name, full in weights.full.items()}  # fmt: skip
    (step / "optimizer").mkdir()
    file = TensorFile(step / "optimizer" / ONLY, {name: entry.shape for name, entry in entries.items()}, torch.float32)
    for name in entries:
        file.write(name, weights.full[name.partition(".")[2]].abs())
    files = ((ONLY, *file.close()),)
    write_json(step / "optimizer" / "shards.json", Manifest(CONFIG, 1, "float32", "", files, entries).as_json())
    progress = vars(training.Progress(7, 3.5, 700, 7))
    write_json(step / "training.json", {"progress": progress, "options": {"seed": 1}})
    (place / "latest").write_text("step-000007\n")
    (place / "metrics.jsonl").write_text('{"iter": 6}\n{"it')


def make_vocabulary(place: Path) -> None:
    write(place, 2)
    (place / "tokenizer.json").unlink()
    (place / "vocab.json").write_text("{}")
    (place / "encoder.json").write_text("{}")


def make_scan(place: Path) -> None:
    place.mkdir()
    about = {"weights": "w", "text": hashlib.sha256(np.arange(40).tobytes()).hexdigest()[:16], "tokens": 40, "tp": 2}
    write_json(place / "scan.json", {"about": about, "perplexity": {"all": 4.0, "mlp": 5.0}})


ONLY = "rank-00-of-01.safetensors"
ALONE = cast(World, types.SimpleNamespace(rank=0, size=1, is_main=True, tp=types.SimpleNamespace(size=2), gather=lambda x: [x]))


def read_weights(place: Path) -> None:
    source = open_source(str(place), verify=(0, 1))
    tokenizer_of(source)
    for name in Partition.of(source.config, 1).shapes():
        source.read(name, None, ())


def read_dataset(place: Path) -> None:
    dataset = Dataset(place)
    dataset.check(8, dataset.tokenizer.n_vocab)


def read_training(place: Path) -> None:
    path, progress, _ = training.read_state(place)
    read_weights(path)
    model = TensorParallelGPT(CONFIG, alone())
    optimizer = adamw(model.named_parameters(), 0.1, 1e-3, (0.9, 0.95))
    training.load_optimizer(model, optimizer, path, progress.optimizer_steps, ALONE)


def read_vocabulary(place: Path) -> None:
    tokenizer_of(open_source(str(place)), choice=str(place)).encode("a")


def read_scan(place: Path) -> None:
    model = types.SimpleNamespace(config=types.SimpleNamespace(block_size=8, n_layer=2))
    known = Perplexities(ALONE, cast(Any, model), torch.arange(40), str(place / "scan.json"), 1, "w")
    assert known.known == {"all": 4.0, "mlp": 5.0}


KINDS: dict[str, tuple[Damage, Damage]] = {
    "shards": (make_shards, load),
    "hf": (make_hf, read_weights),
    "indexed": (make_indexed, read_weights),
    "nanogpt": (make_nanogpt, read_weights),
    "dataset": (make_dataset, read_dataset),
    "meta": (make_meta, read_dataset),
    "training": (make_training, read_training),
    "vocabulary": (make_vocabulary, read_vocabulary),
    "scan": (make_scan, read_scan),
}


# --- damage that any file can have ----------------------------------------------------------------------------------


def content(name: str, new: bytes | str) -> Damage:
    def damage(place: Path) -> None:
        (place / name).write_bytes(new.encode() if isinstance(new, str) else new)

    return damage


def changed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda d: content(name, change((d / name).read_bytes()))(d)


def gone(name: str) -> Damage:
    return lambda d: (d / name).unlink()


def pipe(name: str) -> Damage:
    """Who opens it waits for ever."""

    def damage(directory: Path) -> None:
        gone(name)(directory)
        os.mkfifo(directory / name)

    return damage


def directory(name: str) -> Damage:
    def damage(place: Path) -> None:
        gone(name)(place)
        (place / name).mkdir()

    return damage


def link_out(name: str) -> Damage:
    """To the very file, outside: all that is wrong is where it lies."""

    def damage(place: Path) -> None:
        shutil.move(place / name, place.parent / SECRET)
        (place / name).symlink_to(os.path.relpath(place.parent / SECRET, (place / name).parent))

    return damage


def link_to(name: str, target: str) -> Damage:
    def damage(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(target)

    return damage


def sparse(name: str, size: int) -> Damage:
    return lambda d: os.truncate(d / name, size)


ANY: dict[str, Callable[[str], Damage]] = {
    "empty": lambda name: content(name, b""),
    "a pipe": pipe,
    "a directory": directory,
    "a link out": link_out,
    "a link to a device": lambda name: link_to(name, "/dev/zero"),
    "a link to itself": lambda name: link_to(name, Path(name).name),
    "a terabyte": lambda name: sparse(name, 2**40),
}
# what is large is made when it is written: held, it would be mapped by each rank that any test forks
ANY_JSON: dict[str, Callable[[str], Damage]] = ANY | {
    "cut short": lambda name: changed(name, lambda raw: raw[: len(raw) // 2]),
    "not UTF-8": lambda name: changed(name, lambda raw: raw.replace(b'"', b'"\xff', 1)),
    "a pickle": lambda name: content(name, pickle.dumps(Run(os.system, "true"))),
    "deep": lambda name: content(name, "[" * 10**5 + "]" * 10**5),
    "deep objects": lambda name: content(name, '{"a":' * 10**5 + "1" + "}" * 10**5),
    "a list": lambda name: content(name, "[1]"),
    "null": lambda name: content(name, "null"),
    "a text": lambda name: content(name, '"model"'),
    "a key twice": lambda name: changed(name, lambda raw: first_key_twice(raw)),
    "NaN": lambda name: changed(name, lambda raw: raw.rstrip()[:-1] + b', "x": NaN}'),
    "minus infinity": lambda name: changed(name, lambda raw: raw.rstrip()[:-1] + b', "x": [-Infinity]}'),
    "beyond a float": lambda name: changed(name, lambda raw: raw.rstrip()[:-1] + b', "x": 1e999}'),
    "a long number": lambda name: changed(name, lambda raw: raw.rstrip()[:-1] + b', "x": ' + b"9" * 10**5 + b"}"),
    "more after the end": lambda name: changed(name, lambda raw: raw + b"{}"),
    "a value bomb": lambda name: changed(name, lambda _: b'{"x": [' + b'{"":0},' * (SMALL // 7 - 10) + b"{}]}"),
    "a list bomb": lambda name: changed(name, lambda _: b"[" + b"[]," * (SMALL // 3 - 10) + b"[]]"),
}


def first_key_twice(raw: bytes) -> bytes:
    found = json.loads(raw)
    key = next(iter(found))
    return json.dumps({key: found[key]})[:-1].encode() + b", " + raw.lstrip()[1:]


class Run:
    """Pickled, a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


# --- safetensors ----------------------------------------------------------------------------------------------------


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parts(raw: bytes) -> tuple[bytes, bytes]:
    start = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:start], raw[start:]


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A change of what a safetensors file says of its tensors; the data stay."""

    def changes(raw: bytes) -> bytes:
        text, data = parts(raw)
        said = json.loads(text)
        change(said)
        return joined(json.dumps(said).encode(), data)

    return changes


def tensors_of(said: dict[str, Any]) -> list[dict[str, Any]]:
    """From the first in the file to the last."""
    found = [entry for name, entry in said.items() if name != "__metadata__"]
    return sorted(found, key=lambda entry: entry["data_offsets"])


def set_first(**values: Any) -> Callable[[bytes], bytes]:
    return header(lambda said: tensors_of(said)[0].update(values))


def duplicate(raw: bytes) -> bytes:
    """A second tensor of the same name and place, of another dtype: readers differ in which they take."""
    text, data = parts(raw)
    name, entry = next((name, entry) for name, entry in json.loads(text).items() if name != "__metadata__")
    return joined(text.rstrip()[:-1] + f', {json.dumps(name)}: {json.dumps(entry | {"dtype": "I32"})}}}'.encode(), data)


def flip(position: int) -> Callable[[bytes], bytes]:
    def changes(raw: bytes) -> bytes:
        new = bytearray(raw)
        new[position] ^= 4
        return bytes(new)

    return changes


TENSOR_FILE: dict[str, Callable[[bytes], bytes]] = {
    "not safetensors": lambda raw: b"no tensors here",
    "a pickle": lambda raw: pickle.dumps(Run(os.system, "true")),
    "half of it": lambda raw: raw[: len(raw) // 2],
    "a byte less": lambda raw: raw[:-1],
    "a byte more": lambda raw: raw + b"\0",
    "header of 2^64 bytes": lambda raw: b"\xff" * 8 + raw[8:],
    "header of 99 MB": lambda raw: (99_000_000).to_bytes(8, "little") + raw[8:],
    "header of no bytes": lambda raw: bytes(8) + raw[8:],
    "header a list": lambda raw: joined(b"[]", parts(raw)[1]),
    "header deep": lambda raw: joined(b'{"a":' * 10**5, parts(raw)[1]),
    "header not UTF-8": lambda raw: joined(b'{"\xff": 1}', parts(raw)[1]),
    "header a bomb": lambda raw: joined(b'{"x":[' + b"[]," * (MAX_HEADER // 3 - 10) + b"[]]}", b""),
    "no tensors": lambda raw: joined(b"{}", b""),
    "a tensor twice": duplicate,
    "offsets beyond": header(lambda said: tensors_of(said)[-1].update(data_offsets=[0, 10**9])),
    "offsets of 2^63": header(lambda said: tensors_of(said)[-1].update(data_offsets=[2**63, 2**63 + 80])),
    "offsets negative": set_first(data_offsets=[-80, 0]),
    "offsets backwards": set_first(data_offsets=[80, 0]),
    "offsets of three": set_first(data_offsets=[0, 80, 160]),
    "offsets overlap": header(lambda said: tensors_of(said)[1].update(data_offsets=tensors_of(said)[0]["data_offsets"])),
    "a gap": lambda raw: header(lambda said: said.pop(next(name for name in said if name != "__metadata__")))(raw),
    "a shape that overflows": set_first(shape=[2**62, 16]),
    "a shape of 2^40": set_first(shape=[2**40]),
    "a shape negative": set_first(shape=[-1, -1310]),
    "a shape of floats": set_first(shape=[1.5]),
    "dtype F4": set_first(dtype="F4"),
    "dtype F6": set_first(dtype="F6_E2M3"),
    "dtype unknown": set_first(dtype="X99"),
    "dtype of the same size": set_first(dtype="I32"),
    "metadata of numbers": header(lambda said: said.update(__metadata__={"format": 3})),
}


def told(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Damage to a file of which its manifest knows, so that nothing but the file itself gives it away."""

    def damages(place: Path) -> None:
        changed(name, change)(place)
        manifest = (place / name).parent / "shards.json"
        raw, new = json.loads(manifest.read_text()), (place / name).read_bytes()
        raw["files"][0].update(bytes=len(new), sha256=hashlib.sha256(new).hexdigest())
        manifest.write_text(json.dumps(raw))

    return damages


# --- torch.save's archives ------------------------------------------------------------------------------------------


def entries(place: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(place / "ckpt.pt") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(change: Callable[[dict[str, bytes]], Any], method: int = zipfile.ZIP_STORED) -> Damage:
    """The records of a ckpt.pt, changed and packed anew."""

    def damage(place: Path) -> None:
        records = entries(place)
        change(records)
        with zipfile.ZipFile(place / "ckpt.pt", "w", method) as packed:
            for name, record in records.items():
                packed.writestr(name, record)

    return damage


def pickled(raw: bytes) -> Damage:
    """An archive with another pickle."""
    return archive(lambda records: records.update({"ckpt/data.pkl": raw}))


def zip_bytes(change: Callable[[bytearray, int], Any]) -> Damage:
    """Changed bytes of the archive; told where its directory begins."""

    def damage(place: Path) -> None:
        with zipfile.ZipFile(place / "ckpt.pt") as packed:
            start = packed.start_dir
        raw = bytearray((place / "ckpt.pt").read_bytes())
        new = change(raw, start)
        (place / "ckpt.pt").write_bytes(bytes(new if new is not None else raw))

    return damage


def put(position: int, value: bytes) -> Callable[[bytearray, int], None]:
    """Bytes of the directory's first entry."""

    def change(raw: bytearray, start: int) -> None:
        raw[start + position : start + position + len(value)] = value

    return change


def saved(change: Callable[[dict[str, Any]], Any], **options: Any) -> Damage:
    def damage(place: Path) -> None:
        raw = nanogpt()
        new = change(raw)
        torch.save(raw if new is None else new, place / "ckpt.pt", **options)

    return damage


def at_once(raw: dict[str, Any]) -> None:
    """Every tensor a view of one number: a file of 4 KB that claims a model of any size."""
    one = torch.zeros(1)
    raw["model"] = {name: one.expand(tensor.shape) for name, tensor in raw["model"].items()}


def large(raw: dict[str, Any]) -> None:
    config = GPTConfig(n_layer=9000, n_head=1, n_embd=2**16, vocab_size=2**20, block_size=2**20)
    raw["model_args"] = {key: value for key, value in config.as_json().items() if key != "activation"}
    raw["model_args"]["n_layer"] = 3
    at_once(raw)
    raw["model"] = {name: torch.zeros(1).expand(shape) for name, shape in
                    Partition.of(GPTConfig(**raw["model_args"]), 1).shapes().items()}  # fmt: skip


def nest(levels: int) -> bytes:
    """Operations that leave a tuple of 2^levels Nones, in a few bytes: to hash it or to print it takes for ever."""
    return b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(levels))


HEAD = b"\x80\x02"


KEY, COUNT = b"X\x01\x00\x00\x000", b"K\x14"


def storage(kind: bytes = b"Float", key: bytes = KEY, count: bytes = COUNT, device: bytes = b"cpu") -> bytes:
    """The operations of one storage, as torch.save has them."""
    device = b"X" + len(device).to_bytes(4, "little") + device
    return b"(X\x07\x00\x00\x00storagectorch\n%sStorage\n%s%s%stQ" % (kind, key, device, count)


def tensor(made_of: bytes, size: bytes = b"K\x14\x85", stride: bytes = b"K\x01\x85", more: bytes = b"") -> bytes:
    rest = b"K\x00%s%s\x89ccollections\nOrderedDict\n)R%s" % (size, stride, more)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(%s%stR" % (made_of, rest)


def with_more(raw: bytes, operations: bytes) -> bytes:
    """The pickle of a dict, with one more entry: all else is as it should be."""
    assert raw.endswith(b"u.")
    return raw[:-2] + b"X\x01\x00\x00\x00x" + operations + b"u."


def more_saved(operations: bytes) -> Damage:
    """A ckpt.pt with one more entry."""
    return archive(lambda records: records.update({"ckpt/data.pkl": with_more(records["ckpt/data.pkl"], operations)}))


class Shape(tuple[int, ...]):
    pass


CALLS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda canary: Run(os.system, f"touch {canary}"),
    "eval": lambda canary: Run(eval, f"open({str(canary)!r}, 'w')"),
    "exec": lambda canary: Run(exec, f"open({str(canary)!r}, 'w')"),
    "open": lambda canary: Run(open, str(canary), "w"),
    "import": lambda canary: Run(__import__, "antigravity"),
    "getattr": lambda canary: Run(getattr, "a", "join"),
    "subprocess": lambda canary: Run(subprocess.Popen, ["touch", str(canary)]),
    "pathlib": lambda canary: Run(pathlib.Path.touch, canary),
    "copyreg": lambda canary: Run(copyreg._reconstructor, Shape, tuple, ()),  # type: ignore[attr-defined]
    "partial": lambda canary: Run(functools.partial, os.system, f"touch {canary}"),
    "torch.load": lambda canary: Run(torch.load, str(canary)),
    "numpy scalar": lambda canary: np.float64(1.5),
    "numpy array": lambda canary: np.arange(3),
    "numpy load": lambda canary: Run(np.load, str(canary)),
    "bytearray": lambda canary: Run(bytearray, 10**12),
    "bytes": lambda canary: b"\xff" * 300,
    "a set": lambda canary: {1, 2},
    "a Counter": lambda canary: collections.Counter("abc"),
    "a defaultdict": lambda canary: collections.defaultdict(list),
    "complex": lambda canary: 1j,
    "decimal": lambda canary: decimal.Decimal("1e999999"),
    "range": lambda canary: range(10**12),
    "a class": lambda canary: Shape,
    "an object": lambda canary: types.SimpleNamespace(a=1),
    "an exception": lambda canary: ValueError("x"),
    "a torch module": lambda canary: torch.nn.Linear(2, 2),
    "torch.Size": lambda canary: torch.Size([2]),
    "a device": lambda canary: torch.device("cuda:7"),
    "a sparse tensor": lambda canary: torch.eye(3).to_sparse(),
    "a meta tensor": lambda canary: torch.empty(2**20, 2**20, device="meta"),
    "a conjugate": lambda canary: torch.ones(3, dtype=torch.complex64).conj(),
    "a negative": lambda canary: torch.ones(3, dtype=torch.complex64).conj().imag,
}


def called(name: str, where: str, **options: Any) -> Damage:
    """A ckpt.pt with a call at the top, among the settings, among the tensors or in the optimizer's state."""

    def damage(place: Path) -> None:
        call = CALLS[name](place.parent / CANARY)
        raw = nanogpt()
        content = {"top": call, "config": raw | {"config": call}, "optimizer": raw | {"optimizer": [call]},
                   "model": raw | {"model": raw["model"] | {"x": call}}}[where]  # fmt: skip
        torch.save(content, place / "ckpt.pt", **options)

    return damage


HOSTILE_PICKLES: dict[str, bytes] = {
    "nothing": b"",
    "a stop": b".",
    "no stop": HEAD + b"}",
    "a tower as a key": HEAD + b"}" + nest(60) + b"Ns.",
    "a tower as a storage's key": HEAD + tensor(storage(key=nest(60))) + b".",
    "a tower as attributes": HEAD + b"ccollections\nOrderedDict\n)R" + nest(60) + b"b.",
    "a list as a key": HEAD + b"}]Ns.",
    "a method in the way": HEAD + b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsNsb.",
    "attributes of a text": HEAD + b"X\x01\x00\x00\x00a}b.",
    "a text as a list": HEAD + b"X\x01\x00\x00\x00aNa.",
    "a dict as a list": HEAD + b"}(NNe.",
    "a pair short": HEAD + b"}(Nu.",
    "nothing to take": HEAD + b"s.",
    "a mark as a value": HEAD + b"(\x85.",
    "a mark remembered": HEAD + b"(q\x00h\x00.",
    "no mark": HEAD + b"}NNu.",
    "a memo of nothing": HEAD + b"j\xff\xff\xff\x7f.",
    "a call of a text": HEAD + b"X\x01\x00\x00\x00a)R.",
    "a call of a storage": HEAD + b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
    "a new storage": HEAD + b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85\x81.",
    "a new tensor": HEAD + b"ctorch\nTensor\nK\x05\x85\x81.",
    "a dict of arguments": HEAD + b"ccollections\nOrderedDict\n}R.",
    "a class by INST": HEAD + b"(ios\nsystem\n.",
    "a class by OBJ": HEAD + b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "a class by STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "a class by two numbers": b"\x80\x04K\x01K\x02\x93.",
    "a class by EXT1": HEAD + b"\x82\x01.",
    "a class with a line end": HEAD + b"cos\r\nsystem\n.",
    "a class of no module": HEAD + b"c\n\n.",
    "a class from below": HEAD + b"ctorch.serialization.os\nsystem\n.",
    "a class of NaN": HEAD + b"c__main__\n\xff\n.",
    "an id that is a text": HEAD + b"X\x01\x00\x00\x00aQ.",
    "an id that is a number": HEAD + b"K\x00Q.",
    "an id in a line": HEAD + b"Pos.system\n.",
    "a buffer": b"\x80\x05\x97.",
    "a bytearray of 2^62": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"a.",
    "a text of 2^62": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a.",
    "a text of 2^32": HEAD + b"X\xff\xff\xff\xffa.",
    "a number of 2^31 bytes": HEAD + b"\x8b\xff\xff\xff\x7fa.",
    "a number of 10^5 digits": HEAD + b"L" + b"9" * 10**5 + b"L\n.",
    "a negative length": HEAD + b"\x8b\xff\xff\xff\xff.",
    "an unknown operation": HEAD + b"\xf0.",
    "duplicates": HEAD + b"}" + b"2" * 1000 + b".",
    "a memo beyond all": HEAD + b"Nr\xff\xff\xff\xff0.",
    "lists without end": HEAD + b"(" + b"]" * (MAX_PICKLE - 100) + b"l.",
    "too long": HEAD + b"]" * (MAX_PICKLE + 1),
}
STORAGES: dict[str, bytes] = {
    "a storage beyond its record": tensor(storage(count=b"J\x00\x00\x01\x00"), b"J\x00\x00\x01\x00\x85"),
    "a storage of 2^62": tensor(storage(count=b"\x8a\x08" + (2**62).to_bytes(8, "little"))),
    "a storage of less than nothing": tensor(storage(count=b"J\xff\xff\xff\xff")),
    "a storage of a float": tensor(storage(count=b"G@\x14\x00\x00\x00\x00\x00\x00")),
    "a storage that is not there": tensor(storage(key=b"X\x02\x00\x00\x0099")),
    "a storage above": tensor(storage(key=b"X\x0b\x00\x00\x00../data.pkl")),
    "a storage of no kind": tensor(storage(kind=b"Untyped")),
    "a storage of quarters": tensor(storage(kind=b"QUInt4x2")),
    "a storage of five parts": b"(X\x07\x00\x00\x00storageNtQ",
    "a tensor beyond its storage": tensor(storage(), b"J\x00\x00\x00\x10\x85"),
    "a tensor of negative size": tensor(storage(), b"J\xff\xff\xff\xff\x85"),
    "a tensor with negative strides": tensor(storage(), stride=b"J\xff\xff\xff\xff\x85"),
    "a tensor with metadata": tensor(storage(), more=b"}X\x03\x00\x00\x00neg\x88s"),
    "a tensor of a tensor": tensor(tensor(storage())),
    "a tensor of a number": tensor(b"K\x01"),
}
ZIPS: dict[str, Damage] = {
    "half of it": changed("ckpt.pt", lambda raw: raw[: len(raw) // 2]),
    "a byte less": changed("ckpt.pt", lambda raw: raw[:-1]),
    "without its beginning": changed("ckpt.pt", lambda raw: raw[1000:]),
    "something before it": changed("ckpt.pt", lambda raw: b"#!/bin/sh\n" + raw),
    "something after it": changed("ckpt.pt", lambda raw: raw + b"\0"),
    "a comment": zip_bytes(lambda raw, start: raw[:-2] + b"\x04\x00text"),
    "a pickle alone": lambda d: content("ckpt.pt", pickle.dumps(nanogpt()["config"]))(d),
    "torch's old format": saved(lambda raw: None, _use_new_zipfile_serialization=False),
    "a safetensors file": lambda d: save_file({"a": torch.zeros(3)}, d / "ckpt.pt"),
    "another place of the directory": zip_bytes(lambda raw, start: raw[:-50] + (start + 1).to_bytes(8, "little") + raw[-42:]),
    "another size of the directory": zip_bytes(lambda raw, start: raw[:-58] + (10).to_bytes(8, "little") + raw[-50:]),
    "another end of the directory": zip_bytes(lambda raw, start: raw[:-34] + (start + 1).to_bytes(8, "little") + raw[-26:]),
    "another place, in 32 bits": lambda d: another_place(d),
    "encrypted": zip_bytes(put(8, b"\x01")),
    "a method unknown": zip_bytes(put(10, b"\x63")),
    "a size of 4 GB": zip_bytes(put(24, b"\xfe\xff\xff\xff")),
    "both sizes of 4 GB": zip_bytes(put(20, b"\xfe\xff\xff\xff" * 2)),
    "a place beyond": zip_bytes(put(42, b"\xfe\xff\xff\xff")),
    "a place within another": zip_bytes(put(42, b"\x50\x00\x00\x00")),
    "a local header overwritten": zip_bytes(lambda raw, start: raw.__setitem__(0, 0)),
    "a version unknown": zip_bytes(put(6, b"\xff")),
    "compressed": archive(lambda records: None, zipfile.ZIP_DEFLATED),
    "compressed by bzip2": archive(lambda records: None, zipfile.ZIP_BZIP2),
    "a pickle that unpacks to 64 MB": archive(
        lambda records: records.update({"ckpt/data.pkl": b"]" * (1 << 26)}), zipfile.ZIP_DEFLATED
    ),
    "no pickle": archive(lambda records: records.pop("ckpt/data.pkl")),
    "no record": archive(lambda records: records.pop("ckpt/data/3")),
    "a record cut short": archive(lambda records: records.update({"ckpt/data/3": records["ckpt/data/3"][:-4]})),
    "an empty record": archive(lambda records: records.update({"ckpt/data/0": b""})),
    "two folders": archive(lambda records: records.update({"other/data.pkl": records["ckpt/data.pkl"]})),
    "two records in one place": lambda d: overlay(d),
    "two cases": archive(lambda records: records.update({"ckpt/DATA.PKL": HEAD + b"N."})),
    "no folder": archive(lambda records: [records.update({name[5:]: records.pop(name)}) for name in list(records)]),
    "a name of control characters": archive(lambda records: records.update({"ckpt/a\x1b[2Jb": b""})),
    "a name beyond ASCII": archive(lambda records: records.update({"ckpt/dat\u00e4": b""})),
    "a bit of a tensor": lambda d: flip_in(d, "ckpt/data/0", 100),
    "a bit of the last tensor": lambda d: flip_in(d, "ckpt/data/20", 3),
    "a bit of the pickle": lambda d: flip_in(d, "ckpt/data.pkl", 300),
    "one number as all": saved(at_once),
    "one number as a terabyte": saved(large),
    "a tensor twice": saved(lambda raw: raw["model"].update({"_orig_mod." + LN: torch.ones(20)})),
    "a TorchScript archive": lambda d: save_script(d / "ckpt.pt"),
}  # fmt: skip


def save_script(path: Path) -> None:
    with warnings.catch_warnings():  # it is going out of use
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def overlay(place: Path) -> None:
    """One LayerNorm's weights for another's: as long, and of no checksum."""
    with zipfile.ZipFile(place / "ckpt.pt") as packed:
        start, infos = packed.start_dir, packed.infolist()
    same = [info for info in infos if info.file_size == 80][:2]
    raw = bytearray((place / "ckpt.pt").read_bytes())
    entry = raw.index(same[1].filename.encode(), start) - 46
    raw[entry + 16 : entry + 20] = bytes(4)
    raw[entry + 42 : entry + 46] = same[0].header_offset.to_bytes(4, "little")
    (place / "ckpt.pt").write_bytes(raw)


def another_place(place: Path) -> None:
    """In an archive that Python packed, which has no second record at its end as torch's have."""
    archive(lambda records: None)(place)
    zip_bytes(lambda raw, start: raw[:-6] + (start + 1).to_bytes(4, "little") + raw[-2:])(place)


def flip_in(place: Path, record: str, position: int) -> None:
    with zipfile.ZipFile(place / "ckpt.pt") as packed:
        start = packed.getinfo(record).header_offset
    raw = bytearray((place / "ckpt.pt").read_bytes())
    name, extra = struct.unpack("<HH", raw[start + 26 : start + 30])
    raw[start + 30 + name + extra + position] ^= 4
    (place / "ckpt.pt").write_bytes(raw)


# --- the cases ------------------------------------------------------------------------------------------------------

Case = tuple[str, Damage, str]  # kind, damage, the file that the message names
JSONS = [("shards", "shards.json"), ("shards", "tokenizer.json"), ("hf", "config.json"),
         ("indexed", "model.safetensors.index.json"), ("dataset", "tokenizer.json"), ("training", "step-000007/shards.json"),
         ("training", "step-000007/training.json"), ("training", "step-000007/optimizer/shards.json"),
         ("scan", "scan.json")]  # fmt: skip
PART = "model-00001-of-00002.safetensors"
TENSORS = [("shards", FIRST), ("hf", "model.safetensors"), ("indexed", PART), ("training", f"step-000007/optimizer/{ONLY}")]
OTHERS = [("nanogpt", "ckpt.pt"), ("dataset", "train.bin"), ("dataset", "val.bin"), ("meta", "meta.pkl"),
          ("training", "latest"), ("training", f"step-000007/{ONLY}")]  # fmt: skip
STATE, OPTIMIZER = "step-000007/training.json", "step-000007/optimizer"


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    def changes(raw: bytes) -> bytes:
        said = json.loads(raw)
        change(said)
        return json.dumps(said).encode()

    return changed(name, changes)


def progress(**values: Any) -> Damage:
    return edit(STATE, lambda said: said["progress"].update(values))


def manifest(change: Callable[[Any], Any]) -> Damage:
    return edit("shards.json", change)


def config(**values: Any) -> Damage:
    return edit("config.json", lambda said: said.update(values))


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return edit("model.safetensors.index.json", lambda said: change(said["weight_map"]))


def swapped(place: Path) -> None:
    """Two files of one split that have the same size, and each the other's place."""
    one, two = place / FIRST, place / FIRST.replace("00-", "01-", 1)
    two.write_bytes(one.read_bytes())


def of_another_model(place: Path) -> None:
    """An optimizer's state, whole in itself, of a model half as wide."""
    small = GPTConfig(**{**vars(CONFIG), "n_embd": 10})
    names = [(moment, name, shape) for moment in training.MOMENTS for name, shape in Partition.of(small, 1).shapes().items()]
    found = {f"{moment}.{name}": TensorEntry(shape, Rule()) for moment, name, shape in names}
    file = TensorFile(place / OPTIMIZER / ONLY, {name: entry.shape for name, entry in found.items()}, torch.float32)
    for name, entry in found.items():
        file.write(name, torch.zeros(entry.shape))
    files = ((ONLY, *file.close()),)
    write_json(place / OPTIMIZER / "shards.json", Manifest(CONFIG, 1, "float32", "", files, found).as_json())


def of_one_number(place: Path) -> None:
    """Moments of one number each, which would spread over any parameter they are copied to."""
    raw = read_manifest(place / OPTIMIZER)
    found = {name: TensorEntry((1,), Rule()) for name in raw.tensors}
    file = TensorFile(place / OPTIMIZER / ONLY, dict.fromkeys(found, (1,)), torch.float32)
    for name in found:
        file.write(name, torch.ones(1))
    files = ((ONLY, *file.close()),)
    write_json(place / OPTIMIZER / "shards.json", Manifest(CONFIG, 1, "float32", "", files, found).as_json())


def optimizer_of_weights(place: Path) -> None:
    for name in ("shards.json", ONLY):
        shutil.copy(place / "step-000007" / name, place / OPTIMIZER)


def optimizer_elsewhere(place: Path) -> None:
    shutil.move(place / OPTIMIZER, place.parent / SECRET)
    (place / OPTIMIZER).symlink_to(place.parent / SECRET)


def step_elsewhere(place: Path) -> None:
    shutil.move(place / "step-000007", place.parent / SECRET)
    (place / "step-000007").symlink_to(place.parent / SECRET)


def with_and_without_prefix(place: Path) -> None:
    tensors = {name: value.clone() for name, value in gpt2().state_dict().items() if "lm_head" not in name}
    tensors["wte.weight"] = torch.zeros(131, 20)
    save_file(tensors, place / "model.safetensors")


def with_head(place: Path, head: torch.Tensor) -> None:
    tensors = {name: value.clone() for name, value in gpt2().state_dict().items() if "lm_head" not in name}
    save_file(tensors | {"lm_head.weight": head}, place / "model.safetensors")


META = HEAD + b"}(X\x04\x00\x00\x00itos}K\x00X\x01\x00\x00\x00asu."


def meta(value: Any, protocol: int = 4) -> Damage:
    return content("meta.pkl", pickle.dumps(value, protocol))


SHARD_CASES: dict[str, Damage] = {
    "evidence too deep": manifest(lambda m: m.update(sync="mlp", sync_tp=2, evidence={"a": json.loads("[" * 300 + "]" * 300)})),
    "a schedule of 2^400": manifest(lambda m: m.update(sync="9" * 400 + "m", sync_tp=2)),
    "a schedule of 5000 digits": manifest(lambda m: m.update(sync="every:" + "9" * 5000, sync_tp=2)),
    "a sub-block of 5000 digits": manifest(lambda m: m.update(sync="9" * 5000 + "m", sync_tp=2)),
    "a schedule of Arabic digits": manifest(lambda m: m.update(sync="\u0661m", sync_tp=2)),
    "a schedule with a line end": manifest(lambda m: m.update(sync="0a,\n\x1b[2J", sync_tp=2)),
    "a long schedule": manifest(lambda m: m.update(sync="x," * 40_000, sync_tp=2)),
    "names of another tp": manifest(lambda m: [f.update(name=f["name"].replace("of-02", "of-03")) for f in m["files"]]),
    "a name above": manifest(lambda m: m["files"][0].update(name=f"../shards/{FIRST}")),
    "a name from the root": manifest(lambda m: m["files"][0].update(name="/dev/zero")),
    "a name with a null": manifest(lambda m: m["files"][0].update(name=FIRST + "\0")),
    "a size of one less": manifest(lambda m: m["files"][0].update(bytes=m["files"][0]["bytes"] - 1)),
    "ranges exchanged, uneven": manifest(lambda m: m["tensors"][WTE]["split"]["ranges"].reverse()),
    "another dimension": manifest(lambda m: m["tensors"]["transformer.h.0.attn.c_proj.weight"]["split"].update(dim=0)),
    "all is replicated": manifest(lambda m: m["tensors"][WTE].update(split=None)),
    "two tensors exchanged": manifest(lambda m: m["tensors"].update({LN: m["tensors"][WTE], WTE: m["tensors"][LN]})),
    "a million ranks": manifest(lambda m: m.update(tp=10**6)),
    "a million empty ranges": manifest(lambda m: m["tensors"][LN].update(split={"dim": 0, "ranges": [[[0, 0]] * 10**5, []]})),
    "a tokenizer of no kind": content("tokenizer.json", '{"kind": "bpe"}'),
    "a tokenizer of deep characters": content("tokenizer.json", '{"kind": "char", "chars": [' + "[" * 900 + "]" * 901 + "}"),
    "a tokenizer of long characters": content("tokenizer.json", json.dumps({"kind": "char", "chars": ["x\n" * 10**6]})),
    "a tokenizer of a character twice": content("tokenizer.json", '{"kind": "char", "chars": ["a", "a"]}'),
    "a tokenizer of half a character": content("tokenizer.json", '{"kind": "char", "chars": ["\\ud800"]}'),
    "a tokenizer of negative size": content("tokenizer.json", '{"kind": "ids", "n_vocab": -1}'),
    "a tokenizer of any size": content("tokenizer.json", '{"kind": "ids", "n_vocab": 1' + "0" * 4000 + "}"),
}
SHARD_FILE_CASES: dict[str, Damage] = {
    "two files of a split exchanged": swapped,
    "a bit in the middle": changed(FIRST, lambda raw: flip(len(raw) // 2)(raw)),
    "the last bit": changed(FIRST, flip(-1)),
    "a bit of the header": changed(FIRST, flip(20)),
    "a bit of the header, told": told(FIRST, flip(2)),
    "cut short": changed(FIRST, lambda raw: raw[:-8]),
    "longer": changed(FIRST, lambda raw: raw + bytes(8)),
    "zeros": changed(FIRST, lambda raw: bytes(len(raw))),
    "zeros, told": told(FIRST, lambda raw: bytes(len(raw))),
}
HF_CASES: dict[str, tuple[Damage, str]] = {
    "n_layer true": (config(n_layer=True), "config.json"),
    "n_layer a list": (config(n_layer=[2]), "config.json"),
    "n_layer 10^9": (config(n_layer=10**9), "config.json"),
    "n_head -5": (config(n_head=-5), "config.json"),
    "n_embd 2^31": (config(n_embd=2**31), "config.json"),
    "vocab_size a float": (config(vocab_size=131.0), "config.json"),
    "model_type a line": (config(model_type="gpt2\n"), "config.json"),
    "an activation of a megabyte": (config(activation_function="x" * 10**6), "config.json"),
    "n_inner deep": (config(n_inner=json.loads("[" * 900 + "]" * 900)), "config.json"),
    "epsilon a dict": (config(layer_norm_epsilon={}), "config.json"),
    "with and without the prefix": (with_and_without_prefix, ""),
    "a head of one number": (lambda d: with_head(d, torch.tensor(1.0)), "model.safetensors"),
    "a head of another width": (lambda d: with_head(d, torch.zeros(131, 21)), "model.safetensors"),
    "a head of numbers without a sign": (lambda d: with_head(d, torch.zeros(131, 20, dtype=torch.uint8)), ""),
    "a head of 8 bits": (lambda d: with_head(d, torch.zeros(131, 20).to(torch.float8_e4m3fn)), ""),
    "no weights": (gone("model.safetensors"), ""),
}
INDEX_CASES: dict[str, tuple[Damage, str]] = {
    "a file above": (index(lambda m: m.update({next(iter(m)): "../secret.safetensors"})), "model.safetensors.index.json"),
    "a file from the root": (index(lambda m: m.update({next(iter(m)): "/x.safetensors"})), "model.safetensors.index.json"),
    "a file that is a pickle": (index(lambda m: m.update({next(iter(m)): "x.bin"})), "model.safetensors.index.json"),
    "a file with a null": (index(lambda m: m.update({next(iter(m)): "x\0.safetensors"})), ""),
    "a file that is null": (index(lambda m: m.update({next(iter(m)): None})), "model.safetensors.index.json"),
    "a long name": (index(lambda m: m.update({next(iter(m)): "x" * 10**6 + ".safetensors"})), ""),
    "a file that is missing": (index(lambda m: m.update({next(iter(m)): "x.safetensors"})), "x.safetensors"),
    "a tensor in another file": (index(lambda m: m.update(dict.fromkeys(m, PART))), PART),
    "no tensors": (index(lambda m: m.clear()), ""),
}
TRAINING_CASES: dict[str, tuple[Damage, str]] = {
    "latest names what is above": (content("latest", "../secret"), "latest"),
    "latest names a dot": (content("latest", "."), "latest"),
    "latest names a null": (content("latest", "step-000007\0"), "latest"),
    "latest names another": (content("latest", "step-000008"), "latest"),
    "latest is a megabyte": (content("latest", "step-000007" + " " * 10**6), "latest"),
    "the step lies elsewhere": (step_elsewhere, "step-000007"),
    "the optimizer lies elsewhere": (optimizer_elsewhere, "optimizer"),
    "the optimizer is missing": (lambda d: shutil.rmtree(d / OPTIMIZER), "optimizer"),
    "the optimizer is the weights": (optimizer_of_weights, "shards.json"),
    "the optimizer is another model's": (of_another_model, "shards.json"),
    "the optimizer has one number": (of_one_number, "shards.json"),
    "the optimizer has another dtype": (edit(f"{OPTIMIZER}/shards.json", lambda m: m.update(dtype="float16")), ONLY),
    "a bit of the optimizer": (changed(f"{OPTIMIZER}/{ONLY}", flip(-5)), ONLY),
    "a bit of the weights": (changed(f"step-000007/{ONLY}", flip(-5)), ONLY),
    "metrics lead out": (link_out("metrics.jsonl"), "metrics.jsonl"),
    "metrics are a pipe": (pipe("metrics.jsonl"), "metrics.jsonl"),
    "what becomes latest leads out": (link_to(".latest.tmp", "../secret"), ".latest.tmp"),
    "what becomes a step leads out": (link_to(".step-000008.tmp", ".."), ".step-000008.tmp"),
    "no training.json": (gone(STATE), STATE),
    "no progress": (edit(STATE, lambda said: said.pop("progress")), STATE),
    "no options": (edit(STATE, lambda said: said.pop("options")), STATE),
    "options a list": (edit(STATE, lambda said: said.update(options=[])), STATE),
    "progress a list": (edit(STATE, lambda said: said.update(progress=[1, 2])), STATE),
    "progress of more": (progress(x=1), STATE),
    "iteration negative": (progress(iter_num=-1), STATE),
    "iteration true": (progress(iter_num=True), STATE),
    "iteration a float": (progress(iter_num=7.0), STATE),
    "iteration 10^400": (progress(iter_num=10**400), STATE),
    "iteration a text": (progress(iter_num="7"), STATE),
    "loss null": (progress(best_val_loss=None), STATE),
    "loss negative": (progress(best_val_loss=-1.0), STATE),
    "loss scale 0": (progress(loss_scale=0.0), STATE),
    "loss scale negative": (progress(loss_scale=-2.0), STATE),
    "steps negative": (progress(optimizer_steps=-7), STATE),
}
DATASET_CASES: dict[str, tuple[Damage, str]] = {
    "no train.bin": (gone("train.bin"), "train.bin"),
    "an odd size": (changed("train.bin", lambda raw: raw[:-1]), "train.bin"),
    "too short": (changed("val.bin", lambda raw: raw[:16]), "val.bin"),
    "an id beyond": (changed("train.bin", lambda raw: raw[:-2] + b"\x03\x00"), "train.bin"),
    "the largest id": (changed("val.bin", lambda raw: b"\xff\xff" + raw[2:]), "val.bin"),
    "more tokens than ids": (content("tokenizer.json", '{"kind": "ids", "n_vocab": 65537}'), "tokenizer.json"),
    "2^31 tokens": (content("tokenizer.json", '{"kind": "ids", "n_vocab": 2147483647}'), "tokenizer.json"),
    "no characters": (content("tokenizer.json", '{"kind": "char", "chars": []}'), "tokenizer.json"),
    "characters a text": (content("tokenizer.json", '{"kind": "char", "chars": "abc"}'), "tokenizer.json"),
    "characters of a dict": (content("tokenizer.json", '{"kind": "char", "chars": [{}]}'), "tokenizer.json"),
}
META_CASES: dict[str, Damage] = {
    "a list": meta([1]),
    "true in protocol 0": meta({"itos": {0: "a"}, "x": True}, 0),
    "a tuple as a key": meta({"itos": {0: "a"}, "x": {(1,): 2}}),
    "a float as a key": meta({"itos": {0.0: "a"}}),
    "true as a key": meta({"itos": {False: "a"}}),
    "a list as a character": meta({"itos": {0: ["a"]}}),
    "a size that is true": meta({"vocab_size": True}),
    "a size of 0": meta({"vocab_size": 0}),
    "a negative size": meta({"vocab_size": -3}),
    "a size that is a float": meta({"vocab_size": 3.0}),
    "a size beyond uint16": meta({"vocab_size": 65537}),
    "a size of 2^4000": meta({"vocab_size": 2**4000}),
    "a size, and characters that are none": meta({"vocab_size": 3, "itos": ["a", "b", "c"]}),
    "bytes": meta({"itos": {0: b"a"}}),
    "no characters": meta({"itos": {}}),
    "a gap": meta({"itos": {0: "a", 2: "b"}}),
    "two characters": meta({"itos": {0: "ab"}}),
    "a character twice": meta({"itos": {0: "a", 1: "a"}}),
    "half a character": meta({"itos": {0: "\ud800"}}),
    "itos a text": meta({"itos": "ab"}),
    "itos itself": content("meta.pkl", HEAD + b"}q\x00X\x04\x00\x00\x00itosh\x00s."),
    "cut short": changed("meta.pkl", lambda raw: raw[:-5]),
    "not a pickle": content("meta.pkl", b"vocab"),
}
SCAN_CASES: dict[str, Damage] = {
    "a perplexity of 0": edit("scan.json", lambda said: said["perplexity"].update(all=0.0)),
    "a perplexity below 1": edit("scan.json", lambda said: said["perplexity"].update(all=0.5)),
    "a negative perplexity": edit("scan.json", lambda said: said["perplexity"].update(all=-4.0)),
    "a perplexity that is true": edit("scan.json", lambda said: said["perplexity"].update(all=True)),
    "a perplexity that is a text": edit("scan.json", lambda said: said["perplexity"].update(all="4.0")),
    "perplexities a list": edit("scan.json", lambda said: said.update(perplexity=[4.0])),
    "of another text": edit("scan.json", lambda said: said["about"].update(text="0")),
}
VOCABULARY_CASES: dict[str, Damage] = {
    "another encoder.json": content("encoder.json", '{"a": 0}'),
    "encoder.json a terabyte": sparse("encoder.json", 2**40),
    "encoder.json leads out": link_out("encoder.json"),
}


def cases() -> Iterator[tuple[str, Case]]:
    for kind, name in JSONS:
        for what, made in ANY_JSON.items():
            yield f"{kind}/{name}: {what}", (kind, made(name), name)
    for kind, name in TENSORS:
        for what, made in ANY.items():
            yield f"{kind}/{name}: {what}", (kind, made(name), name)
        for what, change in TENSOR_FILE.items():
            damage = told(name, change) if kind in ("shards", "training") else changed(name, change)
            of_all = what in ("no tensors", "a gap", "dtype of the same size") and "model" in name
            yield f"{kind}/{name}: {what}", (kind, damage, "" if of_all else Path(name).name)
    for kind, name in OTHERS:
        for what, made in ANY.items():
            if (kind, what) != ("dataset", "a terabyte"):  # which is no harm: test_a_dataset_of_a_terabyte_is_read
                yield f"{kind}/{name}: {what}", (kind, made(name), name)
    for what, damage in SHARD_CASES.items():
        at_reading = what in ("a size of one less", "ranges exchanged, uneven", "another dimension", "all is replicated")
        file = "rank-0" if at_reading else "tokenizer.json" if "tokenizer" in what else "shards.json"
        yield f"shards: {what}", ("shards", damage, file)
    for what, damage in SHARD_FILE_CASES.items():
        yield f"shards: {what}", ("shards", damage, "rank-0")
    tables = {"hf": HF_CASES, "indexed": INDEX_CASES, "training": TRAINING_CASES, "dataset": DATASET_CASES}
    for kind, table in tables.items():
        for what, (damage, file) in table.items():
            yield f"{kind}: {what}", (kind, damage, file)
    for what, damage in ZIPS.items():
        yield f"ckpt.pt: {what}", ("nanogpt", damage, "ckpt.pt")
    for what, raw in HOSTILE_PICKLES.items():
        yield f"ckpt.pt: {what}", ("nanogpt", pickled(raw), "ckpt.pt")
        yield f"meta.pkl: {what}", ("meta", content("meta.pkl", raw), "meta.pkl")
        if raw.startswith(HEAD) and raw.endswith(b"."):
            inner = raw[2:-1]
            yield f"ckpt.pt: {what}, beside what is right", ("nanogpt", more_saved(inner), "ckpt.pt")
            yield f"meta.pkl: {what}, beside what is right", ("meta", content("meta.pkl", with_more(META, inner)), "meta.pkl")
    for what, raw in STORAGES.items():
        yield f"ckpt.pt: {what}", ("nanogpt", more_saved(raw), "ckpt.pt")
    for what in CALLS:
        for where in ("top", "config", "model", "optimizer"):
            yield f"ckpt.pt: {what}, {where}", ("nanogpt", called(what, where), "ckpt.pt")
        yield f"ckpt.pt: {what}, in protocol 4", ("nanogpt", called(what, "config", pickle_protocol=4), "ckpt.pt")
    for what in CALLS:
        for protocol in (0, 2, 4):
            yield f"meta.pkl: {what}, protocol {protocol}", ("meta", called_in_meta(what, protocol), "meta.pkl")
    for what, damage in META_CASES.items():
        yield f"meta.pkl: {what}", ("meta", damage, "meta.pkl")
    for what, damage in SCAN_CASES.items():
        yield f"scan: {what}", ("scan", damage, "scan.json")
    for what, damage in VOCABULARY_CASES.items():
        yield f"vocabulary: {what}", ("vocabulary", damage, "encoder.json")


def called_in_meta(name: str, protocol: int) -> Damage:
    def damage(place: Path) -> None:
        value = CALLS[name](place.parent / CANARY)
        (place / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "x": value}, protocol))

    return damage


CASES = list(cases())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of each kind, as it should be."""
    place = tmp_path_factory.mktemp("good")
    for kind, (make, _) in KINDS.items():
        make(place / kind)
    return place


class Reader:
    """A fork that reads what it is told to, one after the other, within the limits. One that they end is replaced."""

    def __init__(self) -> None:
        self.pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=self._serve, args=(there,), daemon=True)
        self.process.start()
        there.close()

    @staticmethod
    def _serve(pipe: Any) -> None:
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        while True:
            kind, place = pipe.recv()
            with open("/proc/self/statm") as sizes:
                most = int(sizes.read().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            signal.alarm(10 * SECONDS)  # for one that waits
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # for one that works; of its own time, whatever else runs here
            try:
                KINDS[kind][1](place)
                answer = "", ""
            except BaseException as error:
                answer = type(error).__name__, str(error) if isinstance(error, UserError) else traceback.format_exc()
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            pipe.send(answer)

    def refusal(self, kind: str, place: Path) -> str:
        """The message of the UserError that reading ends in, "" where it ends in none; AssertionError for any other end."""
        self.pipe.send((kind, place))
        try:
            error, said = self.pipe.recv()
        except EOFError:
            self.process.join()
            status = self.process.exitcode
            self.__init__()  # type: ignore[misc]
            raise AssertionError(f"the reader ended with status {status}") from None
        assert error in ("", "UserError"), said
        return cast(str, said)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.process.kill()
    made.process.join()


def test_there_are_many_cases() -> None:
    names = [name for name, _ in CASES]
    assert len(names) == len(set(names)) >= 200, [name for name, n in collections.Counter(names).items() if n > 1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_whole_is_read(good: Path, reader: Reader, tmp_path: Path, kind: str) -> None:
    """Within the same limits: a case is refused for what is wrong with it."""
    place = Path(shutil.copytree(good / kind, tmp_path / kind))
    said = reader.refusal(kind, place)
    assert "encoder.json is not GPT-2's" in said if kind == "vocabulary" else said == ""


@pytest.mark.parametrize(("kind", "damage", "file"), [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_refused(good: Path, reader: Reader, tmp_path: Path, kind: str, damage: Damage, file: str) -> None:
    place = Path(shutil.copytree(good / kind, tmp_path / kind))
    damage(place)
    said = reader.refusal(kind, place)
    assert said, "it was read"
    assert said.isprintable() and len(said) < 600 + len(str(place)), said
    assert str(place) in said and file in said.replace(str(place.parent), ""), said
    assert not (tmp_path / CANARY).exists(), "it ran"


def test_a_dataset_of_a_terabyte_is_read(good: Path, reader: Reader, tmp_path: Path) -> None:
    """Within the same limits: no more of it is read than a run looks at."""
    place = Path(shutil.copytree(good / "dataset", tmp_path / "dataset"))
    for name in ("train.bin", "val.bin"):
        sparse(name, 2**40)(place)
    assert reader.refusal("dataset", place) == ""


def test_a_link_within_and_the_hubs_links_are_followed(good: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(good / "hf", tmp_path / "hf"))
    (place / "config.json").rename(place / "sizes.json")
    (place / "config.json").symlink_to("sizes.json")
    read_weights(place)
    snapshot = tmp_path / "models--x" / "snapshots" / "1"
    shutil.copytree(good / "hf", snapshot.parent.parent / "blobs")
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    read_weights(snapshot)
    (tmp_path / "link").symlink_to(place)  # a user's own, who names it
    read_weights(tmp_path / "link")


# --- any damage at all ----------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["float16", "../x", "gelu", FIRST, 2**53, 2**63, 1e308]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)  # fmt: skip
PROPERTY = settings(
    max_examples=120, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def mutated(data: st.DataObject, value: Any) -> Any:
    """The value with one to three of its places, at any depth, filled with junk, with another of its values, or left out."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and data.draw(st.integers(0, 5)):
                node = node[key]
                continue
            what = data.draw(st.integers(0, 3))
            if what == 0:
                del node[key]
            elif what == 1:
                node[key] = node[data.draw(st.sampled_from(keys))]
            else:
                node[key] = data.draw(JUNK)
            break
    return value


def stored(raw: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by its specification and numpy."""
    text, content = parts(raw)
    return {
        name: np.frombuffer(content[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in json.loads(text).items() if name != "__metadata__"
    }  # fmt: skip


def rebuilt(place: Path) -> dict[str, np.ndarray]:
    """The full tensors of a shard directory, by docs/formats.md and numpy."""
    said = json.loads((place / "shards.json").read_text())
    full = {name: np.empty(entry["shape"], "<f4") for name, entry in said["tensors"].items()}
    for rank, file in enumerate(said["files"]):
        for name, part in stored((place / file["name"]).read_bytes()).items():
            split = said["tensors"][name]["split"] or {"dim": 0, "ranges": [[[0, len(full[name])]]] * said["tp"]}
            index = np.concatenate([np.arange(*run) for run in split["ranges"][rank]] or [np.arange(0)])
            full[name][(slice(None),) * split["dim"] + (index,)] = part
    return full


def check_reads(place: Path, expected: Callable[[], dict[str, np.ndarray]]) -> None:
    """A UserError of one line, or exactly the tensors that are expected."""
    try:
        source = open_source(str(place), verify=(0, 1))
        found = {name: source.read(name, None, ()) for name in Partition.of(source.config, 1).shapes()}
    except UserError as error:
        assert str(error).startswith(str(place)) and str(error).isprintable() and len(str(error)) < 700
        return
    right = expected()
    assert found.keys() == right.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), right[name]), name


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(good / kind, tmp_path / kind, dirs_exist_ok=True))


@PROPERTY
@given(data=st.data())
def test_any_manifest_is_refused_or_true(copy: Callable[[str], Path], data: st.DataObject) -> None:
    place = copy("shards")
    damaged = mutated(data, json.loads((place / "shards.json").read_text()))
    (place / "shards.json").write_text(json.dumps(damaged))
    check_reads(place, lambda: rebuilt(place))


@PROPERTY
@given(data=st.data())
def test_any_header_of_a_shard_is_refused_or_true(copy: Callable[[str], Path], data: st.DataObject) -> None:
    place = copy("shards")

    def change(raw: bytes) -> bytes:
        text, content = parts(raw)
        return joined(json.dumps(mutated(data, json.loads(text))).encode(), content)

    told(FIRST, change)(place)
    check_reads(place, lambda: rebuilt(place))


@PROPERTY
@given(data=st.data())
def test_any_header_of_a_hugging_face_file_is_refused_or_true(copy: Callable[[str], Path], data: st.DataObject) -> None:
    place = copy("hf")
    text, content = parts((place / "model.safetensors").read_bytes())
    damaged = mutated(data, json.loads(text))
    (place / "model.safetensors").write_bytes(joined(json.dumps(damaged).encode(), content))
    check_reads(place, lambda: turned(stored((place / "model.safetensors").read_bytes())))


def turned(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under our names, linear weights as [out, in]."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    named = {"transformer." + name.removeprefix("transformer."): value for name, value in tensors.items()}
    return {name: value.T if name.endswith(linear) else value for name, value in named.items()}


@PROPERTY
@given(place_of=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_of_a_header_are_refused_or_true(copy: Callable[[str], Path], place_of: list[tuple[int, int]]) -> None:
    place = copy("shards")

    def change(raw: bytes) -> bytes:
        new = bytearray(raw)
        for position, value in place_of:
            new[position % (8 + int.from_bytes(raw[:8], "little"))] = value
        return bytes(new)

    told(FIRST, change)(place)
    check_reads(place, lambda: rebuilt(place))


@PROPERTY
@given(data=st.data())
def test_any_training_state_is_refused_or_true(copy: Callable[[str], Path], data: st.DataObject) -> None:
    place = copy("training")
    damaged = mutated(data, json.loads((place / STATE).read_text()))
    (place / STATE).write_text(json.dumps(damaged))
    try:
        _, progress, options = training.read_state(place)
    except UserError as error:
        assert str(place / STATE) in str(error) and str(error).isprintable()
        return
    assert vars(progress) == vars(training.Progress()) | damaged["progress"] and options == damaged["options"]


@settings(PROPERTY, max_examples=400)
@given(
    text=st.dictionaries(st.sampled_from(["itos", "x"]), st.dictionaries(st.integers(-1, 300), st.text("abc", max_size=2))),
    protocol=st.integers(0, 5),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
)
def test_any_pickle_is_refused_or_what_it_stands_for(text: Any, protocol: int, changes: list[tuple[int, int]]) -> None:
    """What Python's own unpickler, which may import nothing here, makes of the same bytes."""
    raw = bytearray(pickle.dumps(text, protocol))
    for position, value in changes:
        raw[position % len(raw)] = value
    try:
        found = plain(bytes(raw))
    except Refused as error:
        assert changes and str(error).isprintable()
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle._Unpickler, "find_class", None)
        try:
            expected = pickle._loads(bytes(raw))  # type: ignore[attr-defined]
        except ValueError as error:
            assert "protocol" in str(error)  # of a number that nobody has given out: the operations are the same
            return
        assert repr(found) == repr(expected)  # one that holds itself cannot be compared


def test_what_torch_saves_is_read(good: Path) -> None:
    found, expected = read_archive(good / "nanogpt" / "ckpt.pt"), nanogpt()
    assert found.keys() == expected.keys() and found["model"].keys() == expected["model"].keys()
    assert found["config"] == expected["config"] and found["model_args"] == expected["model_args"]


# --- by the commands ------------------------------------------------------------------------------------------------


def command(*words: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "damage", "words", "says"),
    [
        ("shards", told(FIRST, duplicate), ["shard_checkpoint.py", "verify", "--shards="], "a key stands twice"),
        ("nanogpt", called("os.system", "config"), ["sample_tp.py", "--device=cpu", "--init_from="], "it names posix.system"),
        ("indexed", pipe(PART), ["sample_tp.py", "--device=cpu", "--init_from="], f"{PART} is not a file."),
    ],
    ids=["verify", "sample from a ckpt.pt", "sample from an index"],
)
def test_commands_end_in_one_line(
    good: Path, tmp_path: Path, kind: str, damage: Damage, words: list[str], says: str
) -> None:
    place = Path(shutil.copytree(good / kind, tmp_path / kind))
    damage(place)
    done = command(*words[:-1], words[-1] + str(place))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{words[0]}: {place}") and says in done.stderr
    assert not (tmp_path / CANARY).exists()

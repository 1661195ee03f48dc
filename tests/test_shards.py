"""Shard directories: what is written, that any tp reads it, that a write is whole or not at all, that no bad input passes."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from base import files as files_module
from base.errors import UserError
from base.files import write_json
from checkpoints.convert import write_shards
from checkpoints.manifest import DTYPES, Manifest, Sync, TensorEntry, read_manifest
from checkpoints.shards import ShardDirectory, ShardSource
from checkpoints.sources import Source
from checkpoints.tensor_file import CHUNK, TensorFile
from model import GPTConfig
from plan.partition import Partition, Rule, Span
from shard_checkpoint import main

CONFIG = GPTConfig(n_layer=2, n_head=5, n_embd=20, vocab_size=131, block_size=16)
TPS = range(1, 6)


class Weights(Source):
    """Random full tensors as a source of weights."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        self.config, self.dtype, self.description = config, torch.float32, "random"
        self.tokenizer: dict[str, Any] | None = None
        self.dataset: str | None = None
        self.sync: Sync | None = None
        stream = torch.Generator().manual_seed(seed)
        shapes = Partition.of(config, 1).shapes()
        self.full = {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        return self.full[name] if dim is None else take(self.full[name], dim, runs)


def take(full: Tensor, dim: int, runs: Iterable[Span]) -> Tensor:
    """Runs of a tensor along dim, by numpy."""
    index = [i for lo, hi in runs for i in range(lo, hi)]
    return torch.from_numpy(np.take(full.numpy(), index, axis=dim))


def write(
    directory: Path,
    tp: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sync: Sync | None = None,
) -> Weights:
    weights = Weights(GPTConfig(**{**vars(CONFIG), "bias": bias}), seed)
    weights.sync = sync
    directory.mkdir(parents=True)
    write_shards(weights, Partition.of(weights.config, tp), dtype, directory)
    write_json(directory / "tokenizer.json", {"kind": "ids", "n_vocab": CONFIG.vocab_size})
    return weights


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# --- one file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_safetensors_own_reader_reads_what_tensor_file_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Views of every kind, one larger than the writer's buffer, rows longer than it, an empty one."""
    base = torch.randn(700, 1000)
    tensors = {
        "plain": base[:3],
        "transposed": base.t(),
        "columns": base[:, 100:333],
        "vector": base[:, 0],
        "other dtype": base[:5].to(torch.float16).double(),
        "long row": base.flatten().repeat(2).reshape(2, -1)[:, 1:],
        "empty": base[:0],
    }
    assert base.nbytes > CHUNK / 2 and tensors["long row"][0].nbytes > CHUNK
    file = TensorFile(tmp_path / "x", {name: tuple(t.shape) for name, t in tensors.items()}, dtype, metadata={"format": "pt"})
    for name, tensor in tensors.items():
        file.write(name, tensor)
    size, sha256 = file.close()
    content = (tmp_path / "x").read_bytes()
    assert (size, sha256) == (len(content), hashlib.sha256(content).hexdigest())
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor.to(dtype)), name


def test_tensor_file_wants_what_was_announced(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x", {"a": (2, 3), "b": (1,)}, torch.float32)
    with pytest.raises(ValueError, match=r"a \[3, 2\] comes where a \[2, 3\] was announced"):
        file.write("a", torch.zeros(3, 2))
    file = TensorFile(tmp_path / "x", {"a": (2, 3), "b": (1,)}, torch.float32)
    file.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="b was announced and not written"):
        file.close()


def test_an_argument_is_not_written_to(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4, requires_grad=True)
    before = tensor.detach().clone()
    file = TensorFile(tmp_path / "x", {"a": (4, 6)}, torch.bfloat16)
    file.write("a", tensor.t())
    file.close()
    assert torch.equal(tensor, before)


# --- one directory, any tp ------------------------------------------------------------------------------------------


def test_a_schedule_stays_with_its_weights(tmp_path: Path, capsys: Any) -> None:
    """Through a split to another tp as well: what it was made for has not changed."""
    write(tmp_path / "d", 2, sync=Sync("mlp", 2, {"found": [1, 2.5]}))
    raw = json.loads((tmp_path / "d" / "shards.json").read_text())
    assert (raw["sync"], raw["sync_tp"], raw["evidence"]) == ("mlp", 2, {"found": [1, 2.5]})
    assert main(["split", f"--init_from={tmp_path / 'd'}", "--tp=3", f"--out={tmp_path / 'e'}"]) == 0
    assert read_manifest(tmp_path / "e").sync == read_manifest(tmp_path / "d").sync == Sync("mlp", 2, {"found": [1, 2.5]})
    assert main(["inspect", f"--shards={tmp_path / 'e'}"]) == 0
    assert main(["merge", f"--shards={tmp_path / 'e'}", f"--out={tmp_path / 'hf'}"]) == 0
    said = capsys.readouterr().out
    assert "made for --sync=mlp on tp=2 ranks: 2 sync points in 2 layers" in said
    assert "note: these weights were made for --sync=mlp on tp=2; hf cannot say so." in said


def test_manifest_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "d", 3)
    manifest = read_manifest(tmp_path / "d")
    raw = json.loads((tmp_path / "d" / "shards.json").read_text())
    assert raw == json.loads(json.dumps(manifest.as_json()))
    assert (raw["format_version"], raw["tp"], raw["dtype"], raw["source"]) == (1, 3, "float32", "random")
    assert raw["model"] == CONFIG.as_json()
    assert raw["tensors"]["transformer.wte.weight"] == {
        "shape": [131, 20],
        "split": {"dim": 0, "ranges": [[[0, 44]], [[44, 88]], [[88, 131]]]},
    }
    assert raw["tensors"]["transformer.ln_f.bias"] == {"shape": [20], "split": None}
    content = {name: sha256 for name, sha256 in digests(tmp_path / "d").items() if name.startswith("rank-")}
    assert {entry["name"]: entry["sha256"] for entry in raw["files"]} == content
    assert [entry["bytes"] for entry in raw["files"]] == [(tmp_path / "d" / name).stat().st_size for name in content]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("written", TPS)
def test_any_tp_reads_its_part(tmp_path: Path, written: int, bias: bool) -> None:
    weights = write(tmp_path / "d", written, bias)
    source = ShardSource(tmp_path / "d", verify=(0, 1))
    assert source.config == weights.config
    for tp in TPS:
        for name, rule in Partition.of(weights.config, tp).rules.items():
            for rank in range(tp):
                runs = rule.runs[rank] if rule.runs else ()
                assert torch.equal(source.read(name, rule.dim, runs), weights.read(name, rule.dim, runs)), (tp, name, rank)


@pytest.mark.parametrize("written", TPS)
def test_any_runs_of_any_tensor(tmp_path: Path, written: int) -> None:
    """Along either dimension, across ranks, overlapping, in any order."""
    weights, chance = write(tmp_path / "d", written), random.Random(written)
    source = ShardDirectory(tmp_path / "d")
    for name, full in weights.full.items():
        for dim in range(full.dim()):
            edges = [sorted(chance.choices(range(full.shape[dim] + 1), k=2)) for _ in range(4)]
            runs = [(lo, hi) for lo, hi in edges if lo < hi] or [(0, 1)]
            assert torch.equal(source.read(name, dim, runs), take(full, dim, runs)), (name, dim, runs)


def test_a_split_that_is_not_ours(tmp_path: Path) -> None:
    """What the manifest says counts: other dimensions, interleaved and empty runs, in files that safetensors wrote."""
    weights = Weights(CONFIG)
    entries, parts = {}, cast(list[dict[str, Tensor]], [{}, {}])
    for name, full in weights.full.items():
        dim, size = full.dim() - 1, full.shape[-1]
        runs: tuple[tuple[Span, ...], ...] = (((3, 5), (0, 2), (7, size)), ((5, 5), (2, 3), (5, 7)))
        entries[name] = TensorEntry(tuple(full.shape), Rule() if "ln_" in name else Rule(dim, runs))
        for rank in range(2):
            parts[rank][name] = full if "ln_" in name else take(full, dim, runs[rank])
    files = []
    for rank in range(2):
        path = tmp_path / f"rank-{rank:02d}-of-02.safetensors"
        save_file(parts[rank], path)
        files.append((path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()))
    write_json(tmp_path / "shards.json", Manifest(CONFIG, 2, "float32", "", tuple(files), entries).as_json())
    source = ShardSource(tmp_path, verify=(0, 1))
    for tp in (1, 3):
        for name, rule in Partition.of(CONFIG, tp).rules.items():
            for rank in range(tp):
                runs_here = rule.runs[rank] if rule.runs else ()
                assert torch.equal(source.read(name, rule.dim, runs_here), weights.read(name, rule.dim, runs_here)), name
    assert main(["inspect", f"--shards={tmp_path}"]) == 0


@pytest.mark.parametrize("tp", [1, 4])
def test_plain_python_rebuilds_the_tensors(tmp_path: Path, tp: int) -> None:
    """With json, numpy and the format's page: nothing of this project."""
    weights = write(tmp_path / "d", tp)

    manifest = json.loads((tmp_path / "d" / "shards.json").read_text())
    full = {name: np.empty(entry["shape"], "<f4") for name, entry in manifest["tensors"].items()}
    for rank, file in enumerate(manifest["files"]):
        data = (tmp_path / "d" / file["name"]).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, part in json.loads(data[8:start]).items():
            lo, hi = part["data_offsets"]
            here = np.frombuffer(data[start + lo : start + hi], "<f4").reshape(part["shape"])
            split = manifest["tensors"][name]["split"] or {"dim": 0, "ranges": [[[0, len(full[name])]]] * manifest["tp"]}
            index = np.concatenate([np.arange(*run) for run in split["ranges"][rank]])
            full[name][(slice(None),) * split["dim"] + (index,)] = here

    assert full.keys() == weights.full.keys()
    assert all(np.array_equal(full[name], weights.full[name].numpy()) for name in full)


@pytest.mark.parametrize("bias", [True, False])
def test_split_merge_split_is_bitwise(tmp_path: Path, bias: bool) -> None:
    """Over all pairs of tp: straight from shards to shards, and by way of a merged checkpoint."""

    def files(name: str) -> dict[str, str]:
        return {file: sha256 for file, sha256 in digests(tmp_path / name).items() if file.startswith("rank-")}

    for tp in TPS:
        write(tmp_path / f"first-{tp}", tp, bias)
    whole = []
    for tp in TPS:
        merged = tmp_path / f"merged-{tp}.pt"
        assert main(["merge", f"--shards={tmp_path / f'first-{tp}'}", f"--out={merged}", "--format=nanogpt"]) == 0
        whole.append(hashlib.sha256(b"".join(map(bits, torch.load(merged)["model"].values()))).hexdigest())
        for again in TPS:
            for source in (merged, tmp_path / f"first-{tp}"):
                out = f"{source.stem}-as-{again}"
                assert main(["split", f"--init_from={source}", f"--tp={again}", f"--out={tmp_path / out}"]) == 0
                assert len(files(out)) == again
                assert files(out) == files(f"first-{again}"), (tp, again, source)
    assert len(set(whole)) == 1


# --- whole or not at all --------------------------------------------------------------------------------------------


def in_child(body: Callable[[], int]) -> tuple[int, str]:
    """Run in a fork; (its exit status, or minus the signal that ended it; what it wrote to standard error)."""
    reader, writer = os.pipe()

    def run() -> None:
        sys.stderr = open(writer, "w", buffering=1)
        status = 99
        try:
            status = body()
        except BaseException:
            traceback.print_exc()
        os._exit(status)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode, text


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Path, list[str], dict[str, str], dict[str, str]]]:
    """(old directory, the words that replace it, its files, the files that will replace them)."""
    write(tmp_path / "source", 2, seed=1)
    words = ["split", f"--init_from={tmp_path / 'source'}", "--tp=3", "--force"]
    assert main([*words, f"--out={tmp_path / 'expected'}"]) == 0
    write(tmp_path / "here" / "old", 5)
    path = tmp_path / "here" / "old"
    yield path, [*words, f"--out={path}"], digests(path), digests(tmp_path / "expected")


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "two renames"])
def test_a_kill_at_any_moment_leaves_a_whole_directory(two: Any, swap: bool) -> None:
    """SIGKILL at the first flush to the disk, at the second, ... : the old directory stands, then the new one."""
    path, words, old, new = two
    seen = []
    for moment in range(1, 50):

        def run(moment: int = moment) -> int:
            moments = iter(range(1, 50))
            fsync = os.fsync

            def dying(handle: int) -> None:
                if next(moments) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                fsync(handle)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", dying)
                if not swap:
                    patch.setattr(files_module, "_swap", lambda a, b: False)
                return main(words)

        status, text = in_child(run)
        seen.append(digests(path))
        assert seen[-1] in (old, new)
        if status == 0:
            break
        assert (status, text) == (-signal.SIGKILL, "")
        if seen[-1] == new:
            shutil.rmtree(path)
            write(path, 5)
            assert digests(path) == old
    assert status == 0 and len(seen) > 6
    assert old in seen[:-1] and new in seen[:-1]  # it was killed before and after the exchange
    assert [entry.name for entry in path.parent.iterdir()] == ["old"]  # what the killed ones left has gone


def test_a_failed_rename_puts_the_old_directory_back(two: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path, words, old, _ = two
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == path and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files_module, "_swap", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", failing)
    assert main(words) == 1
    assert capsys.readouterr().err == f"shard_checkpoint.py: {path}: Input/output error, so it was not written\n"
    assert digests(path) == old
    assert [entry.name for entry in path.parent.iterdir()] == ["old"]


def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "a" / "in a").mkdir(parents=True)
    (tmp_path / "b" / "in b").mkdir(parents=True)
    if not files_module._swap(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system cannot")
    assert (tmp_path / "b" / "in a").is_dir() and (tmp_path / "a" / "in b").is_dir()
    assert not files_module._swap(tmp_path / "a", tmp_path / "missing")


def test_leftovers_of_the_living_stay(two: Any) -> None:
    path, words, _, new = two
    host = os.uname().nodename
    alive, elsewhere = path.parent / f".old.tmp-{host}-{os.getppid()}", path.parent / ".old.tmp-other.host-1"
    other = path.parent / f".older.tmp-{host}-99999999"  # not a leftover of `old`
    for directory in (alive, elsewhere, other):
        directory.mkdir()
    assert main(words) == 0
    assert digests(path) == new
    assert alive.is_dir() and elsewhere.is_dir() and other.is_dir()


@pytest.mark.parametrize("limit", [0, 100, 9000])
def test_disk_full_leaves_the_old_directory(two: Any, limit: int) -> None:
    """No file may grow beyond `limit` bytes: a write fails, as on a full disk, in a header or in data."""
    path, words, old, _ = two

    def run() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return main(words)

    assert in_child(run) == (1, f"shard_checkpoint.py: {path}: File too large, so it was not written\n")
    assert digests(path) == old
    assert [entry.name for entry in path.parent.iterdir()] == ["old"]


@pytest.mark.parametrize("form", ["hf", "nanogpt"])
@pytest.mark.parametrize("limit", [0, 7000, 40000])
def test_disk_full_while_merging(tmp_path: Path, form: str, limit: int) -> None:
    write(tmp_path / "shards", 2)
    out = tmp_path / "here" / "out"
    words = ["merge", f"--shards={tmp_path / 'shards'}", f"--out={out}", f"--format={form}", "--force"]
    assert main(words) == 0
    old = digests(out.parent)

    def run() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return main(words)

    assert in_child(run) == (1, f"shard_checkpoint.py: {out}: File too large, so it was not written\n")
    assert digests(out.parent) == old
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_no_space_left(two: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path, words, old, _ = two
    write_piece, pieces = TensorFile._write, iter(range(100))

    def full(self: TensorFile, data: memoryview) -> None:
        if next(pieces) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_piece(self, data)

    monkeypatch.setattr(TensorFile, "_write", full)
    assert main(words) == 1
    assert capsys.readouterr().err == f"shard_checkpoint.py: {path}: No space left on device, so it was not written\n"
    assert digests(path) == old
    assert [entry.name for entry in path.parent.iterdir()] == ["old"]


def test_too_little_space_is_said_before_any_work(two: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path, words, old, _ = two
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{path} needs 57.2 KB (57,200 bytes), {path.parent} has 1 KB (1,000 bytes) free.\n" in said
    assert digests(path) == old


# --- bad input ------------------------------------------------------------------------------------------------------

FIRST = "rank-00-of-02.safetensors"
WTE, LN = "transformer.wte.weight", "transformer.ln_f.weight"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "shards"
    write(path, 2)
    return path


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "bad"))


def edit(change: Callable[[Any], Any]) -> Damage:
    """Change what the manifest says; `change` returns a new content or None for the one it was given."""

    def damage(directory: Path) -> None:
        raw = json.loads((directory / "shards.json").read_text())
        new = change(raw)
        (directory / "shards.json").write_text(json.dumps(raw if new is None else new))

    return damage


def put(*keys: Any) -> Damage:
    """put("model", "n_head", 3): set one entry of the manifest."""
    *path, key, value = keys

    def change(raw: Any) -> None:
        for step in path:
            raw = raw[step]
        raw[key] = value

    return edit(change)


def add(**entries: Any) -> Damage:
    return edit(lambda raw: raw.update(entries))


def drop(*path: Any) -> Damage:
    def change(raw: Any) -> None:
        for step in path[:-1]:
            raw = raw[step]
        del raw[path[-1]]

    return edit(change)


def text(content: str | bytes) -> Damage:
    def damage(directory: Path) -> None:
        (directory / "shards.json").write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def ranges(*runs: Any) -> Damage:
    return put("tensors", WTE, "split", "ranges", list(runs))


MANIFESTS: dict[str, tuple[Damage, str]] = {
    "empty": (text(""), "not valid JSON"),
    "cut short": (lambda d: text((d / "shards.json").read_bytes()[:3000])(d), "not valid JSON"),
    "not UTF-8": (text(b'{"tp": "\xff"}'), "not valid JSON"),
    "a list": (text("[]"), "the manifest is not a JSON object"),
    "deep": (text("[" * 100_000 + "]" * 100_000), "not valid JSON"),
    "deep, but not too deep to read": (put("tp", json.loads("[" * 900 + "]" * 900)), "is not a number of ranks"),
    "long number": (text('{"format_version": ' + "9" * 5000 + "}"), "not valid JSON"),
    "a key twice": (
        lambda d: text((d / "shards.json").read_text().replace('"tp": 2,', '"tp": 2, "tp": 2,'))(d),
        "a key stands twice",
    ),
    "a tensor twice": (
        lambda d: text((d / "shards.json").read_text().replace('"transformer.wpe.weight"', '"transformer.wte.weight"'))(d),
        "a key stands twice",
    ),
    "newer": (put("format_version", 2), "format 2 is newer than this program reads (1). Update nanoTP."),
    "no version": (drop("format_version"), "format_version is missing"),
    "version true": (put("format_version", True), "format_version is missing"),
    "version 0": (put("format_version", 0), "format_version is missing"),
    "no files": (drop("files"), "`files` is missing"),
    "no tensors": (drop("tensors"), "`tensors` is missing"),
    "tp true": (put("tp", True), "tp=True is not a number of ranks"),
    "tp negative": (put("tp", -1), "tp=-1 is not a number of ranks"),
    "tp huge": (put("tp", 10**18), "is not a number of ranks"),
    "tp NaN": (put("tp", float("nan")), "not valid JSON (NaN is no number)"),
    "tp more than files": (put("tp", 3), "ranges are not one list for each of 3 ranks"),
    "sync": (put("sync", "9m"), "sync_tp=0 is not a number of ranks"),
    "sync_tp": (add(sync="mlp", sync_tp=True), "sync_tp=True is not a number of ranks"),
    "sync for another model": (add(sync="9m", sync_tp=2), "there is no sub-block 9m, the model has 2 layers"),
    "sync a list": (add(sync=["mlp"], sync_tp=2), "sync=['mlp'] is not a schedule"),
    "evidence": (add(sync="mlp", sync_tp=2, evidence=5), "`evidence` is not an object"),
    "dtype": (put("dtype", "float64"), "dtype 'float64' is not one of float32, bfloat16, float16"),
    "dtype a list": (put("dtype", ["float32"]), "dtype ['float32'] is not one of"),
    "source a number": (put("source", 3), "source 3 is not text"),
    "model null": (put("model", None), "the model's sizes are not an object"),
    "no n_head": (drop("model", "n_head"), "model.n_head is missing"),
    "n_head true": (put("model", "n_head", True), "model.n_head=True is not of type int"),
    "n_head 0": (put("model", "n_head", 0), "model.n_head=0 is out of range"),
    "n_head 3": (put("model", "n_head", 3), "n_embd=20 does not divide into n_head=3 heads"),
    "n_embd a float": (put("model", "n_embd", 20.0), "model.n_embd=20.0 is not of type int"),
    "vocabulary too large": (put("model", "vocab_size", 2**31), "model.vocab_size=2147483648 is out of range"),
    "n_layer huge": (put("model", "n_layer", 10**15), "model.n_layer=1000000000000000 is out of range"),
    "n_layer large": (put("model", "n_layer", 9999), "tensor transformer.h.10.attn.c_attn.bias is missing"),
    "a layer less": (put("model", "n_layer", 1), "tensor transformer.h.1.attn.c_attn.bias does not belong to the model"),
    "no bias": (put("model", "bias", False), "does not belong to the model"),
    "bias 1": (put("model", "bias", 1), "model.bias=1 is not of type bool"),
    "dropout NaN": (put("model", "dropout", float("nan")), "not valid JSON (NaN is no number)"),
    "dropout infinite": (put("model", "dropout", float("inf")), "not valid JSON (Infinity is no number)"),
    "dropout long": (put("model", "dropout", 10**4000), "is not of type float"),
    "activation": (put("model", "activation", "tanh"), "model.activation='tanh' is not known"),
    "another vocabulary": (put("model", "vocab_size", 132), f"tensor {WTE} has shape [131, 20], the model needs [132, 20]"),
    "another block size": (put("model", "block_size", 17), "wpe.weight has shape [16, 20], the model needs [17, 20]"),
    "files of another tp": (put("files", 0, "name", "rank-00-of-03.safetensors"), "expected 'rank-00-of-02.safetensors'"),
    "files in another order": (edit(lambda raw: raw["files"].reverse()), "files[0] is 'rank-01-of-02.safetensors'"),
    "one file twice": (put("files", 1, "name", FIRST), "files[1] is 'rank-00-of-02.safetensors'"),
    "file above": (put("files", 0, "name", "../rank-00-of-02.safetensors"), "expected 'rank-00-of-02.safetensors'"),
    "file elsewhere": (put("files", 0, "name", "/etc/passwd"), "files[0] is '/etc/passwd'"),
    "file without a name": (drop("files", 0, "name"), "files[0] is None"),
    "file null": (put("files", 0, None), "files[0] is not an object"),
    "bytes negative": (put("files", 0, "bytes", -1), "bytes=-1 is not a size"),
    "bytes true": (put("files", 0, "bytes", True), "bytes=True is not a size"),
    "sha256 short": (put("files", 0, "sha256", "abc"), "sha256 is malformed"),
    "sha256 upper case": (put("files", 0, "sha256", "A" * 64), "sha256 is malformed"),
    "sha256 with a line end": (put("files", 0, "sha256", "a" * 64 + "\n"), "sha256 is malformed"),
    "tensor null": (put("tensors", WTE, None), f"tensor {WTE} has no shape or no split"),
    "tensor missing": (drop("tensors", WTE), f"tensor {WTE} is missing"),
    "tensor too many": (put("tensors", "x", {"shape": [1], "split": None}), "tensor x does not belong to the model"),
    "name with a line end": (put("tensors", "x\ny", {"shape": [1], "split": None}), r"tensor 'x\ny' is not a parameter's name"),
    "name a path": (put("tensors", "../x", {"shape": [1], "split": None}), "tensor '../x' is not a parameter's name"),
    "name long": (put("tensors", "x" * 10**6, {"shape": [1], "split": None}), "is not a parameter's name"),
    "shape empty": (put("tensors", LN, "shape", []), f"tensor {LN}: shape [] is not one or two sizes"),
    "shape negative": (put("tensors", LN, "shape", [-20]), f"tensor {LN}: shape [-20] is not one or two sizes"),
    "shape huge": (put("tensors", LN, "shape", [2**60]), "is not one or two sizes"),
    "shape large": (put("tensors", LN, "shape", [2**50]), "the model needs [20]"),
    "shape of floats": (put("tensors", LN, "shape", [20.0]), "is not one or two sizes"),
    "shape of three": (put("tensors", LN, "shape", [20, 1, 1]), "is not one or two sizes"),
    "split a number": (put("tensors", WTE, "split", 0), "split is neither null nor an object"),
    "dim 2": (put("tensors", WTE, "split", "dim", 2), "dim 2 is not one of its 2"),
    "dim negative": (put("tensors", WTE, "split", "dim", -1), "dim -1 is not one of its 2"),
    "dim false": (put("tensors", WTE, "split", "dim", False), "dim False is not one of its 2"),
    "dim null": (put("tensors", WTE, "split", "dim", None), "dim None is not one of its 2"),
    "ranges of one rank": (ranges([[0, 131]]), "ranges are not one list for each of 2 ranks"),
    "ranges overlap": (ranges([[0, 66]], [[65, 131]]), "ranges overlap at 65"),
    "ranges twice": (ranges([[0, 131]], [[0, 131]]), "ranges overlap at 0"),
    "ranges with a gap": (ranges([[0, 60]], [[66, 131]]), "ranges leave a gap at 60"),
    "ranges that start late": (ranges([[1, 66]], [[66, 131]]), "ranges leave a gap at 0"),
    "ranges that end early": (ranges([[0, 66]], [[66, 130]]), "ranges end at 130, the tensor at 131"),
    "ranges beyond": (ranges([[0, 66]], [[66, 132]]), "range [66, 132] does not lie in [0, 131]"),
    "ranges huge": (ranges([[0, 66]], [[66, 2**62]]), "does not lie in [0, 131]"),
    "ranges backwards": (ranges([[66, 0]], [[66, 131]]), "range [66, 0] does not lie in [0, 131]"),
    "ranges negative": (ranges([[-1, 66]], [[66, 131]]), "range [-1, 66] does not lie in [0, 131]"),
    "ranges of booleans": (ranges([[False, True]], [[1, 131]]), "range [False, True] does not lie in [0, 131]"),
    "ranges of NaN": (ranges([[0, float("nan")]], [[66, 131]]), "not valid JSON (NaN is no number)"),
    "ranges of one number": (ranges([[0]], [[66, 131]]), "range [0] does not lie in [0, 131]"),
    "ranges flat": (ranges([0, 66], [66, 131]), "range 0 does not lie in [0, 131]"),
    "ranges null": (ranges(None, [[0, 131]]), "ranges None are not a list"),
}  # fmt: skip


def refused(read: Callable[[], object]) -> str:
    """The message of the UserError that reading ends in, checked to be one short line, soon said."""
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        read()
    assert time.perf_counter() - start < 5
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 600
    return message


def load(directory: Path) -> None:
    """As a run on two ranks loads a model: each checks its share of the bytes, then reads its part."""
    sources = [ShardSource(directory, verify=(rank, 2)) for rank in range(2)]
    for rank, source in enumerate(sources):
        for name, rule in Partition.of(source.config, 2).rules.items():
            source.read(name, rule.dim, rule.runs[rank] if rule.runs else ())


def one_line(capsys: Any, *words: str) -> str:
    """The only line that a command which fails says, without the program's name."""
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return cast(str, said.err).removeprefix("shard_checkpoint.py: ").rstrip("\n")


def test_the_copy_is_good(bad: Path, capsys: Any) -> None:
    load(bad)
    assert main(["verify", f"--shards={bad}"]) == 0
    assert f"{bad}: whole: 2 files, 28 tensors," in capsys.readouterr().out


@pytest.mark.parametrize(("damage", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_bad_manifests(bad: Path, capsys: Any, damage: Damage, message: str) -> None:
    damage(bad)
    said = refused(lambda: load(bad))
    assert said.startswith(f"{bad / 'shards.json'}") and message in said
    assert one_line(capsys, "verify", f"--shards={bad}") == said
    assert one_line(capsys, "inspect", f"--shards={bad}") == said


def test_no_manifest(tmp_path: Path, capsys: Any) -> None:
    assert refused(lambda: load(tmp_path)) == f"{tmp_path} is not a shard directory: it has no shards.json."
    assert refused(lambda: load(tmp_path / "nowhere")).startswith(f"{tmp_path / 'nowhere'} is not a shard directory")
    os.mkfifo(tmp_path / "shards.json")  # read, it would wait for ever
    assert refused(lambda: load(tmp_path)) == f"{tmp_path / 'shards.json'} is not a file."


def flip(directory: Path) -> None:
    content = bytearray((directory / FIRST).read_bytes())
    content[-100] ^= 1
    (directory / FIRST).write_bytes(content)


def header(change: Callable[[dict[str, Any]], Any], tell: bool = True) -> Damage:
    """Change the header of a rank's file; with `tell`, the manifest knows (so that only what is said in it is wrong)."""

    def damage(directory: Path) -> None:
        content = (directory / FIRST).read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        raw = json.loads(content[8:start])
        new = change(raw)
        text = json.dumps(raw if new is None else new).encode()
        replace(directory, len(text).to_bytes(8, "little") + text + content[start:])

    return damage


def replace(directory: Path, content: bytes) -> None:
    """Another rank-00 file, of which the manifest knows."""
    (directory / FIRST).write_bytes(content)
    tell(directory)


def tell(directory: Path) -> None:
    content = (directory / FIRST).read_bytes()
    put("files", 0, "bytes", len(content))(directory)
    put("files", 0, "sha256", hashlib.sha256(content).hexdigest())(directory)


def half(directory: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(directory / FIRST).items()}
    save_file(tensors, directory / FIRST)
    tell(directory)


def another_split(directory: Path) -> None:
    """A file of the same name, size and header, of another model."""
    write(directory.parent / "another", 2, seed=1)
    assert (directory.parent / "another" / FIRST).stat().st_size == (directory / FIRST).stat().st_size
    shutil.copy(directory.parent / "another" / FIRST, directory / FIRST)


def link_outside(directory: Path) -> None:
    shutil.move(directory / FIRST, directory.parent / "elsewhere")
    (directory / FIRST).symlink_to(directory.parent / "elsewhere")


def a_pipe(directory: Path) -> None:
    (directory / FIRST).unlink()
    os.mkfifo(directory / FIRST)


def a_directory(directory: Path) -> None:
    (directory / FIRST).unlink()
    (directory / FIRST).mkdir()


FILES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda d: (d / FIRST).unlink(), "is missing. The manifest lists 2 files; split again or copy it back."),
    "truncated": (lambda d: os.truncate(d / FIRST, 5000), "has 5000 bytes, the manifest says"),
    "empty": (lambda d: os.truncate(d / FIRST, 0), "has 0 bytes, the manifest says"),
    "longer": (lambda d: os.truncate(d / FIRST, 10**6), "has 1000000 bytes, the manifest says"),
    "one bit": (flip, "is damaged or from another split: sha256 "),
    "another model's": (another_split, "is damaged or from another split: sha256 "),
    "another rank's": (lambda d: replace(d, (d / FIRST.replace("00-", "01-", 1)).read_bytes()), "the manifest says F32"),
    "a link": (link_outside, "is a symbolic link"),
    "a pipe": (a_pipe, "is missing"),
    "a directory": (a_directory, "is missing"),
    "not safetensors": (lambda d: replace(d, b"no tensors here"), "is not a readable safetensors file"),
    "a pickle": (lambda d: replace(d, b"\x80\x04cos\nsystem\n."), "is not a readable safetensors file"),
    "header length huge": (lambda d: replace(d, b"\xff" * 8 + b"{}"), "is not a readable safetensors file"),
    "header length beyond": (lambda d: replace(d, (10**6).to_bytes(8, "little") + b"{}"), "is not a readable safetensors file"),
    "header no object": (header(lambda raw: []), "is not a readable safetensors file"),
    "offsets beyond": (header(lambda raw: raw[LN].update(data_offsets=[0, 10**9])), "is not a readable safetensors file"),
    "offsets huge": (header(lambda raw: raw[LN].update(data_offsets=[0, 2**64])), "is not a readable safetensors file"),
    "offsets negative": (header(lambda raw: raw[LN].update(data_offsets=[-80, 0])), "is not a readable safetensors file"),
    "offsets overlap": (
        header(lambda raw: raw[LN].update(data_offsets=raw["transformer.ln_f.bias"]["data_offsets"])),
        "is not a readable safetensors file",
    ),
    "shape larger than its bytes": (header(lambda raw: raw[LN].update(shape=[2**40])), "is not a readable safetensors file"),
    "shape overflows": (header(lambda raw: raw[LN].update(shape=[2**62, 16])), "is not a readable safetensors file"),
    "shape of as many": (header(lambda raw: raw[LN].update(shape=[4, 5])), "is F32 [4, 5], the manifest says F32 [20]"),
    "dtype of as many": (header(lambda raw: raw[LN].update(dtype="I32")), "is I32 [20], the manifest says F32 [20]"),
    "all another dtype": (half, "is F16 "),
    "tensor missing": (header(lambda raw: raw.update(x=raw.pop(LN))), f"tensor {LN!r} is missing"),
    "tensor too many": (
        header(lambda raw: raw.update({"a\nb": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
        "tensor 'a\\nb' is not in the manifest",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_bad_files(bad: Path, capsys: Any, damage: Damage, message: str) -> None:
    """Loading and verify refuse alike."""
    damage(bad)
    for said in (refused(lambda: load(bad)), one_line(capsys, "verify", f"--shards={bad}")):
        assert said.startswith(f"{bad / FIRST}") and message in said


@pytest.mark.parametrize("name", ["missing", "one bit", "another model's"])
def test_nothing_is_made_of_damaged_shards(bad: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    """Split and merge read each byte before they write one: damage is not passed on under a fresh sha256."""
    FILES[name][0](bad)
    out = tmp_path / "out"
    merge = ["merge", f"--shards={bad}"]
    for words in (["split", f"--init_from={bad}"], [*merge, "--format=hf"], [*merge, "--format=nanogpt"]):
        assert FILES[name][1] in one_line(capsys, *words, f"--out={out}")
        assert not out.exists()


def test_any_damage_to_a_manifest_ends_in_one_line(bad: Path) -> None:
    """Junk in any place of it, 600 times: refused, or harmless."""
    chance, raw = random.Random(0), json.loads((bad / "shards.json").read_text())
    junk: list[Any] = [None, True, -1, 0, 1, 2**53, 2**80, 1.5, float("nan"), "", "x\ny", "../x", [], [[0, 1]], {}, {"a": 1}]
    passed = 0
    for _ in range(600):
        damaged = json.loads(json.dumps(raw))
        node: Any = damaged
        holder: Any = None
        while isinstance(node, dict | list) and node and (holder is None or chance.random() < 0.8):
            holder, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = holder[key]
        holder[key] = chance.choice(junk)
        (bad / "shards.json").write_text(json.dumps(damaged))
        try:
            load(bad)
            passed += 1
        except UserError as error:
            assert str(error).startswith(str(bad)) and "\n" not in str(error)
    assert passed < 60  # `source`, the dropout, a value replaced by itself


def test_any_damage_to_a_file_ends_in_one_line(bad: Path) -> None:
    """Junk in the bytes of the header, of which the manifest knows: what reads the file must bear it."""
    chance, content = random.Random(0), (bad / FIRST).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 3])):
            damaged[chance.randrange(start)] = chance.choice([0, 34, 44, 48, 57, 91, 123, 125, 255, chance.randrange(256)])
        replace(bad, bytes(damaged))
        with contextlib.suppress(UserError):
            load(bad)


def test_terminal_codes_in_the_source_are_not_passed_on(bad: Path, capsys: Any) -> None:
    put("source", "a\x1b[2Jb\ud800\nc")(bad)
    assert main(["inspect", f"--shards={bad}"]) == 0
    assert capsys.readouterr().out.startswith(f"{bad}: a?[2Jb??c, tp 2, float32\n")

"""Checkpoints of a training run: OUT_DIR/step-000500/ is a shard directory with the optimizer's state beside the weights.

    step-000500/shards.json, rank-*.safetensors, tokenizer.json     the weights: any command reads them
    step-000500/optimizer/shards.json, rank-*.safetensors           AdamW's moments, split as their parameters are
    step-000500/training.json                                       iteration, best loss, options

Every rank writes what it owns; the directory gets its name when all have finished, and `latest` (directory.py) moves after
that.
"""

import collections
import contextlib
import itertools
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from base.files import inside, read_json
from checkpoints.shards import (
    MANIFEST,
    Manifest,
    ShardDirectory,
    Sync,
    TensorEntry,
    TensorFile,
    dtype_name,
    publish,
    read_manifest,
    shard_name,
    sync_directory,
    write_json,
)
from checkpoints.sources import latest_checkpoint, reader
from plan.partition import Partition, Rule
from text.tokenizer import TOKENIZER_FILE
from tp_model import TensorParallelGPT
from train.directory import has_checkpoints, iteration, point, remove, steps
from world.mesh import World

STATE, OPTIMIZER = "training.json", "optimizer"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Where a run stands between two iterations. optimizer_steps: AdamW's count, for its bias correction."""

    iter_num: int = 0
    best_val_loss: float = 1e9
    tokens_seen: int = 0
    optimizer_steps: int = 0
    loss_scale: float = 1.0


# --- saving ---------------------------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]  # of what this tp rank owns, in the order of the model's parameters
Files = list[tuple[str, int, str]]  # (name, bytes, sha256) of what a rank wrote: its weights, its moments


@dataclass(frozen=True)
class Saved:
    """A finished save. stall: seconds for which the run stood still; seconds: from its beginning to its end."""

    path: Path
    stall: float
    seconds: float


class Saver:
    """Saves a run's checkpoints; every rank has one and makes the same calls. The first dp group writes.

    In the background a save copies what it writes to host memory that it keeps (12 bytes a parameter of this tp rank: the run
    goes on when the copy is there), and a thread hashes and writes it. `poll`, called between two iterations, names the
    directory once all ranks are done. A write that failed raises on the rank that it failed on, in the next call.
    """

    def __init__(self, world: World, out_dir: Path, keep_last: int, background: bool, replaces: list[Path] | None = None):
        self.world, self.out_dir, self.keep_last, self.background = world, out_dir, keep_last, background
        self._replaces = replaces or []  # of an earlier run: they go when the first checkpoint is whole
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copies: dict[str, Tensor] = {}
        self._writing: Future[Files] | None = None
        self._publishing: Future[Path] | None = None
        self._describe: Callable[[list[Files]], Path] | None = None  # the last part of the save that is under way
        self._began = self._stall = 0.0

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing; once no rank is, every rank's `poll` is told so."""
        return self._writing is not None and not self._writing.done()

    @torch.no_grad()
    def save(
        self,
        model: TensorParallelGPT,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        tokenizer: dict[str, Any],
        options: dict[str, Any],
    ) -> list[Saved]:
        """Begin to write step-N, and end it too unless in the background. Gives the saves that ended meanwhile."""
        ended = self.finish()
        self._began = time.perf_counter()
        path = self.out_dir / f"step-{progress.iter_num:06d}"
        scratch = self.out_dir / f".{path.name}.{os.urandom(4).hex()}.tmp"
        if self.world.is_main:
            (scratch / OPTIMIZER).mkdir(parents=True)
        # a name that no other save has: a rank of a run that has just been killed may still be writing
        scratch = self.world.gather(scratch)[0]
        # what the manifests say is of this moment, not of when they are written
        state = {"progress": dict(vars(progress)), "options": options}
        self._describe = partial(_finish, model, tokenizer, state, scratch, path, self.keep_last, self._replaces)
        tensors, shapes = _tensors(model, optimizer), _shapes(model)
        path_of_rank = scratch / shard_name(model.tp.rank, model.tp.size)
        if self.background:
            copies = self._copied(tensors)
            if copies:
                self._writing = self._thread.submit(_write_calmly, copies, shapes, path_of_rank)
            else:
                self._writing = _done([])
            self._stall = time.perf_counter() - self._began
            return ended
        if self.world.dp.rank == 0:
            self._writing = _done(_write_both(tensors, shapes, path_of_rank))
        else:
            collections.deque(tensors, 0)  # its part of the messages by which a rank gets all of a tensor
            self._writing = _done([])
        return ended + self.finish()

    def _copied(self, tensors: Iterator[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The tensors as they are now, in host memory that is taken once."""
        keep = self.world.dp.rank == 0
        for name, tensor in tensors:
            if keep:
                if name not in self._copies:
                    self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name].copy_(tensor, non_blocking=tensor.is_cuda)
        self.world.synchronize()
        return list(self._copies.items())

    def poll(self, all_wrote: bool) -> list[Saved]:
        """Go on with a save in the background. all_wrote: that no rank is `busy`; all ranks say the same."""
        if self._writing is not None and all_wrote:
            self._publish()
        if self._publishing is not None and self._publishing.done():
            return self._ended()
        return []

    def finish(self) -> list[Saved]:
        """Wait until what was begun is written, and named."""
        before = time.perf_counter()
        if self._writing is not None:
            self._publish()
        made = self._ended() if self._publishing is not None else []
        self.world.barrier()
        if made and self.background:
            made = [replace(made[0], stall=made[0].stall + time.perf_counter() - before)]
        return made

    def _publish(self) -> None:
        """All ranks' files are there: rank 0 writes what describes them, and gives the directory its name."""
        assert self._writing is not None and self._describe is not None
        files, self._writing = self.world.gather(self._writing.result()), None
        if self.world.is_main:
            self._publishing = self._thread.submit(self._describe, [pair for pair in files if pair])

    def _ended(self) -> list[Saved]:
        assert self._publishing is not None
        path, self._publishing = self._publishing.result(), None
        seconds = time.perf_counter() - self._began
        return [Saved(path, self._stall if self.background else seconds, seconds)]


def _done(files: Files) -> Future[Files]:
    made: Future[Files] = Future()
    made.set_result(files)
    return made


def _tensors(model: TensorParallelGPT, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What is saved of this tp rank, one after the other: weights, then moments. Where parameters are sharded over dp all ranks
    of that axis go through this together, and one tensor at a time is whole."""
    for name, p in model.named_parameters():
        yield name, model.parts.owned(name, p)
    for moment in MOMENTS:
        for name, p in model.named_parameters():
            value = optimizer.state[p][moment] if p in optimizer.state else torch.zeros_like(p)
            yield f"{moment}.{name}", model.parts.owned(name, value)


def _write_calmly(tensors: list[tuple[str, Tensor]], shapes: Shapes, path: Path) -> Files:
    """`_write_both` in a thread that leaves the processor to the run where both want it."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # of a thread, as Linux has it
    return _write_both(iter(tensors), shapes, path)


def _write_both(tensors: Iterator[tuple[str, Tensor]], shapes: Shapes, path: Path) -> Files:
    """Write a tp rank's two files: `path`, and the one of that name beside it for the moments."""
    moments = {f"{moment}.{name}": shape for moment in MOMENTS for name, shape in shapes.items()}
    return [_write(tensors, shapes, path), _write(tensors, moments, path.parent / OPTIMIZER / path.name)]


def _write(tensors: Iterator[tuple[str, Tensor]], shapes: Shapes, path: Path) -> tuple[str, int, str]:
    """Write the next len(shapes) of the tensors into one file: (its name, bytes, sha256)."""
    try:
        file = TensorFile(path, shapes, torch.float32)
        for name, tensor in itertools.islice(tensors, len(shapes)):
            file.write(name, tensor)
        return path.name, *file.close()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, so the checkpoint was not written", str(path)) from error


def _finish(
    model: TensorParallelGPT,
    tokenizer: dict[str, Any],
    state: dict[str, Any],
    scratch: Path,
    path: Path,
    keep_last: int,
    replaces: list[Path],
    files: list[Files],
) -> Path:
    """The last part of a save, on one rank: from here on the directory is there, and then `latest` names it."""
    _write_manifests(model, files, scratch, f"training, iteration {state['progress']['iter_num']}")
    write_json(scratch / TOKENIZER_FILE, tokenizer)
    write_json(scratch / STATE, state)
    sync_directory(scratch / OPTIMIZER)
    publish(scratch, path)
    point(path, replaces)
    # one that is of a later iteration stems from a run that went further: it is not this run's to count
    before = [old for old in steps(path.parent) if iteration(old) < iteration(path)]
    for old in before[: len(before) - keep_last + 1] if keep_last else []:
        remove(old)
    return path


def export(
    world: World, model: TensorParallelGPT, path: Path, source: str, tokenizer: dict[str, Any], sync: Sync
) -> None:
    """Write a model as a shard directory, which replaces what stands at `path`; every rank calls this."""
    scratch = path.with_name(f".{path.name}.tmp")
    if world.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    world.barrier()
    weights = ((name, model.parts.owned(name, p)) for name, p in model.named_parameters())
    path_of_rank = scratch / shard_name(model.tp.rank, model.tp.size)
    files = world.gather(_write(weights, _shapes(model), path_of_rank) if world.dp.rank == 0 else None)
    if world.is_main:
        entries = _entries(model)
        ranks = tuple(file for file in files if file is not None)
        manifest = Manifest(model.config, model.tp.size, dtype_name(torch.float32), source, ranks, entries, sync)
        write_json(scratch / MANIFEST, manifest.as_json())
        write_json(scratch / TOKENIZER_FILE, tokenizer)
        publish(scratch, path)
    world.barrier()


def _shapes(model: TensorParallelGPT) -> Shapes:
    entries = _entries(model)
    return {name: entries[name].rule.local_shape(entries[name].shape, model.tp.rank) for name, _ in model.named_parameters()}


def _entries(model: TensorParallelGPT) -> dict[str, TensorEntry]:
    shapes, rules = model.split.shapes(), model.split.rules
    return {name: TensorEntry(shape, Rule(rules[name].dim, rules[name].runs)) for name, shape in shapes.items()}


def _write_manifests(model: TensorParallelGPT, files: list[Any], scratch: Path, source: str) -> None:
    entries = _entries(model)
    moments = {f"{moment}.{name}": entry for moment in MOMENTS for name, entry in entries.items()}
    sync = None if model.schedule.is_plain else Sync(str(model.schedule), model.tp.size)
    parts = ((scratch, entries, 0), (scratch / OPTIMIZER, moments, 1))
    for directory, tensors, which in parts:
        ranks = tuple(pair[which] for pair in files)
        manifest = Manifest(model.config, model.tp.size, dtype_name(torch.float32), source, ranks, tensors, sync)
        write_json(directory / MANIFEST, manifest.as_json())


def _instead(out_dir: Path) -> str:
    """What works with a directory that no run can be resumed from."""
    if (out_dir / STATE).is_file():
        return (
            f"It is one itself: --out_dir={out_dir.resolve().parent} goes on from the newest there."
        )
    for name, what in (
        ("ckpt.pt", "nanoGPT's ckpt.pt"),
        (MANIFEST, "shards"),
        ("config.json", "a Hugging Face model"),
    ):
        if (out_dir / name).is_file():
            new = f"--init_from={out_dir} with another --out_dir starts from its weights"
            return f"It has {what}, without an optimizer's state that is read: {new}."
    return "Start with --init_from=scratch, or name its out_dir."


def read_state(out_dir: Path) -> tuple[Path, Progress, dict[str, Any]]:
    """(checkpoint, where its run stood, its options) of the newest checkpoint. UserError where there is none."""
    if not has_checkpoints(out_dir):
        raise UserError(f"{out_dir} has no checkpoint to resume. {_instead(out_dir)}")
    for entry in out_dir.iterdir():  # what this run is about to write to; `latest` and its like lead nowhere else
        ours = re.match(r"\.?(metrics|latest|step-|begun|lock)", entry.name)
        if ours and not (inside(entry).is_file() or entry.is_dir()):
            raise UserError(f"{entry} is neither a file nor a directory.")
    path = latest_checkpoint(out_dir)
    raw = read_json(path / STATE)
    try:
        progress = Progress(**raw["progress"])
        good = all(type(getattr(progress, name)) in (type(value), int) for name, value in vars(Progress()).items())
        good = good and all(0 <= value < (2**53 if type(value) is int else math.inf) for value in vars(progress).values())
        if not good or progress.loss_scale == 0 or not isinstance(raw["options"], dict):
            raise TypeError
    except (TypeError, KeyError):
        raise UserError(f"{path / STATE} is damaged or of another version.") from None
    return path, progress, raw["options"]


def load_optimizer(
    model: TensorParallelGPT, optimizer: torch.optim.Optimizer, path: Path, optimizer_steps: int, world: World
) -> None:
    """Give the optimizer its moments back, at this run's tp and block_size, whatever wrote them."""
    if optimizer_steps == 0:
        return
    shards = ShardDirectory(inside(path / OPTIMIZER))
    shapes = Partition.of(read_manifest(path).model, 1).shapes()
    shards.check_tensors({f"{moment}.{name}": shape for moment in MOMENTS for name, shape in shapes.items()})
    for i in range(world.rank, shards.manifest.tp, world.size):
        shards.check_bytes(i)
    rules, names = model.split.rules, {p: name for name, p in model.named_parameters()}
    read = reader(shards, model.tp.rank, model.config.block_size)
    state, index = {}, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[p]
            moments = {}
            for moment in MOMENTS:
                value = torch.zeros_like(p)
                model.parts.store(name, value, read(f"{moment}.{name}", rules[name]))
                moments[moment] = value
            state[index] = {"step": torch.tensor(float(optimizer_steps)), **moments}
            index += 1
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

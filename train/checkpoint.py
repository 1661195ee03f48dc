"""Checkpoints of a training run. OUT_DIR/step-000500/ is a shard directory with more in it:

    shards.json, rank-*.safetensors, tokenizer.json   the weights, which any command reads
    optimizer/shards.json, rank-*.safetensors         AdamW's moments, split like the parameters
    training.json                                     iteration, best loss, options

With local steps (train/local_steps.py) dp groups differ in AdamW's moments, and the weights are
those of an averaging:

    optimizer-1/, optimizer-2/ ...                    the moments of the other groups
    outer/                                            the outer momentum

Every rank writes what it owns. With pipeline stages the manifest describes a split over pp x tp
ranks, most of which own nothing of a tensor, so every command reads it. The directory gets its name
when all have finished; after that, `latest` (train/directory.py) names it.
"""

import collections
import contextlib
import itertools
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from base.errors import UserError
from base.files import inside, own_file, publish, read_json, sync_directory, write_json
from checkpoints.manifest import MANIFEST, Manifest, Sync, TensorEntry, read_manifest, shard_name
from checkpoints.nanogpt import NanoGPTCheckpoint
from checkpoints.shards import ShardDirectory
from checkpoints.sources import latest_checkpoint, reader
from checkpoints.tensor_file import TensorFile
from checkpoints.tensors import MOMENTS, OPTIMIZER, STATE, Source
from cli.options import as_dict
from plan.partition import Partition
from text.tokenizer import TOKENIZER_FILE
from tp_model import TensorParallelGPT
from train.directory import has_checkpoints, iteration, point, remove, steps
from world.mesh import World

if TYPE_CHECKING:
    from train.setup import Run

PREFIXES = tuple(f"{moment}." for moment in MOMENTS)  # of the names in an optimizer's file
# directory of a file: a file has all parameters once for each prefix
Layout = dict[str, tuple[str, ...]]
WEIGHTS: Layout = {"": ("",)}
CHECKPOINT = WEIGHTS | {OPTIMIZER: PREFIXES}
OUTER, MOMENTUM = "outer", "momentum."


@dataclass
class Progress:
    """The state of a run between two iterations. optimizer_steps: for AdamW's bias correction."""

    iter_num: int = 0
    best_val_loss: float = 1e9
    tokens_seen: int = 0
    optimizer_steps: int = 0
    loss_scale: float = 1.0


# --- saving -------------------------------------------------------------------------------------

Files = list[tuple[str, int, str]]  # a rank's, in a Layout's order: name, bytes, sha256
Tensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Saved:
    """A finished save. stall: seconds for which the run stood still; seconds: start to end."""

    path: Path
    stall: float
    seconds: float


def _calmly() -> None:
    """Leave the processor to the run if this thread and the run both want it."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Saver:
    """Saves a run's checkpoints. Every rank has one and makes the same calls; the first dp rank of
    each group writes (without local steps there is one group). layouts: what each group writes.

    In the background, `save` copies the tensors to host memory that it keeps (12 bytes a parameter
    of this tp rank) and a thread hashes and writes them; `poll`, called between two iterations,
    names the directory once all ranks are done. A failed write raises in the next call.
    """

    def __init__(self, run: "Run", out_dir: Path, background: bool):
        self.run, self.world, self.out_dir, self.background = run, run.world, out_dir, background
        self._thread = ThreadPoolExecutor(1, "checkpoint", _calmly)
        self._copies: dict[str, Tensor] = {}
        self._writing: Future[Files] | None = None
        self._publishing: Future[Path] | None = None
        self._completion: Callable[[list[Files]], Path]  # of the save under way
        self._began = self._stall = 0.0
        own = {OUTER: (MOMENTUM,)} if run.local and run.local.outer else {}
        others = range(1, run.world.dp.size // run.dp.size)
        self.layouts: list[Layout] = [CHECKPOINT | own]
        self.layouts += [{f"{OPTIMIZER}-{group}": PREFIXES} for group in others]
        group, place = divmod(run.world.dp.rank, run.dp.size)
        self.layout, self._writes = self.layouts[group], place == 0
        self._each = _place(run.model)[1] * run.dp.size  # ranks of a group

    @property
    def busy(self) -> bool:
        """True while this rank writes."""
        return self._writing is not None and not self._writing.done()

    @torch.no_grad()
    def save(self) -> list[Saved]:
        """Begin to write step-N; not in the background, end it too. Returns the finished saves."""
        ended, run, model = self.finish(), self.run, self.run.model
        self._began = time.perf_counter()
        path = self.out_dir / f"step-{run.progress.iter_num:06d}"
        scratch = self.out_dir / f".{path.name}.{os.urandom(4).hex()}.tmp"
        for part in {*itertools.chain(*self.layouts)} if self.world.is_main else ():
            (scratch / part).mkdir(parents=True, exist_ok=True)
        # a fresh name: a rank of a run that was just killed may still be writing
        said = self.world.gather((scratch, {**vars(run.progress)}))  # as of now
        scratch, groups = said[0][0], [progress for _, progress in said[:: self._each]]
        state = {"progress": groups[0], "options": as_dict(run.options)}
        if run.local:
            state["groups"] = groups[1:]
        self._completion = partial(self._complete, state, scratch, path)
        outer = run.local.outer if run.local else None
        tensors: Tensors = _tensors(model, self.layout, run.optimizer, outer)
        write: Callable[[Tensors], Any] = partial(_write, model, scratch, self.layout)
        if not self._writes:  # only takes part in the messages that make tensors whole
            write = partial(collections.deque, maxlen=0)
        if self.background:
            self._writing = self._thread.submit(write, self._copied(tensors))
        else:
            files = write(tensors)
            self._writing = self._thread.submit(lambda: files)
        self._stall = time.perf_counter() - self._began
        return ended if self.background else ended + self.finish()

    def _copied(self, tensors: Tensors) -> Tensors:
        """Copies of the tensors in host memory that is allocated once; none if nothing is written
        of them."""
        for name, tensor in tensors:
            if self._writes:
                gpu = tensor.is_cuda
                if (copy := self._copies.get(name)) is None:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=gpu)
                self._copies[name] = copy.copy_(tensor, non_blocking=gpu)
        self.world.synchronize()
        return self._copies.items()

    def poll(self, all_wrote: bool, wait: bool = False) -> list[Saved]:
        """Go on with the save under way, if any. all_wrote: no rank is `busy`; the same on all
        ranks. Rank 0 then describes the files and names the directory. wait: until it has."""
        if all_wrote and self._writing is not None:
            files, self._writing = self.world.gather(self._writing.result()), None
            if self.world.is_main:
                self._publishing = self._thread.submit(self._completion, files)
        if self._publishing is None or not (wait or self._publishing.done()):
            return []
        path, self._publishing = self._publishing.result(), None
        return [Saved(path, self._stall, time.perf_counter() - self._began)]

    def finish(self) -> list[Saved]:
        """Wait until the save under way, if any, is written and named."""
        before = time.perf_counter()
        saves = self.poll(True, wait=True)
        self.world.barrier()
        waited = time.perf_counter() - before
        return [replace(save, stall=save.stall + waited) for save in saves]

    def _complete(
        self, state: dict[str, Any], scratch: Path, path: Path, files: list[Files]
    ) -> Path:
        """The end of a save, on one rank: name the directory, update `latest`, delete old steps."""
        model, keep = self.run.model, self.run.options.keep_last
        source = f"training, iteration {state['progress']['iter_num']}"
        sync = None if model.schedule.is_plain else Sync(str(model.schedule), model.tp.size)
        tokenizer = self.run.tokenizer.to_json()
        count = _place(model)[1]
        for group, layout in enumerate(self.layouts):
            mine = files[group * self._each :][:count]
            _describe(model, scratch, layout, mine, source, tokenizer, sync)
            for part in layout:
                sync_directory(scratch / part)
        write_json(scratch / STATE, state)
        publish(scratch, path)
        point(path, self.run.replaces)
        # one of a later iteration stems from a run that went further, and does not count here
        before = [old for old in steps(path.parent) if iteration(old) < iteration(path)]
        for old in before[: len(before) - keep + 1] if keep else []:
            remove(old)
        return path


def _tensors(
    model: TensorParallelGPT, layout: Layout, optimizer: torch.optim.Optimizer | None = None,
    outer: Any = None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """This rank's part of all tensors of a layout: weights, moments, the outer momentum. Of those
    of other stages it is empty. Sharded over dp, all ranks of that axis iterate together, and one
    tensor at a time is whole."""
    number, _ = _place(model)
    state: Any = optimizer.state if optimizer else {}
    parameters = dict(model.named_parameters())
    for prefix in itertools.chain(*layout.values()):
        for name, entry in _entries(model, ("",)).items():
            shape = entry.rule.local_shape(entry.shape, number)
            if 0 in shape:
                yield prefix + name, torch.empty(shape)
                continue
            value: Any = (outer if prefix == MOMENTUM else parameters)[name]
            if prefix in PREFIXES:
                kept = state.get(value, {})
                value = kept[prefix[:-1]] if kept else torch.zeros_like(value)
            yield prefix + name, model.parts.owned(name, value)


def _place(model: TensorParallelGPT) -> tuple[int, int]:
    """(the number of this rank's file, the number of files)"""
    stages, tp = model.stages, model.tp
    return stages.rank * tp.size + tp.rank, stages.pp * tp.size


def _entries(model: TensorParallelGPT, prefixes: tuple[str, ...]) -> dict[str, TensorEntry]:
    """The tensors of a file: the parameters once for each prefix."""
    return {
        prefix + name: TensorEntry(shape, model.stages.rule(name, shape, rule, model.tp.size))
        for prefix in prefixes for name, (shape, rule) in model.split.table.items()
    }  # fmt: skip


def _write(model: TensorParallelGPT, directory: Path, layout: Layout, tensors: Tensors) -> Files:
    """Write this rank's files of a layout."""
    rest, (rank, count), files = iter(tensors), _place(model), []
    for part, prefixes in layout.items():
        path = directory / part / shard_name(rank, count)
        entries = _entries(model, prefixes).items()
        shapes = {name: entry.rule.local_shape(entry.shape, rank) for name, entry in entries}
        try:
            file = TensorFile(path, shapes, torch.float32)
            for name, tensor in itertools.islice(rest, len(shapes)):
                file.write(name, tensor)
            files.append((path.name, *file.close()))
        except OSError as error:
            why = f"{error.strerror}, so the checkpoint was not written"
            raise OSError(error.errno, why, str(path)) from error
    return files


def _describe(
    model: TensorParallelGPT, directory: Path, layout: Layout, files: Iterable[Files], source: str,
    tokenizer: dict[str, Any], sync: Sync | None,
) -> None:  # fmt: skip
    """Write what stands beside the files that the ranks have written."""
    about = model.config, _place(model)[1], "float32", source
    for (part, prefixes), written in zip(layout.items(), zip(*files, strict=True), strict=True):
        manifest = Manifest(*about, written, _entries(model, prefixes), sync)
        write_json(directory / part / MANIFEST, manifest.as_json())
    write_json(directory / TOKENIZER_FILE, tokenizer)


def export(
    world: World, model: TensorParallelGPT, path: Path, source: str, tokenizer: dict[str, Any],
    sync: Sync,
) -> None:  # fmt: skip
    """Write a model as a shard directory in place of `path`; every rank calls this."""
    scratch = path.with_name(f".{path.name}.tmp")
    if world.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    world.barrier()
    mine = world.dp.rank == 0
    tensors = _tensors(model, WEIGHTS)
    files = world.gather(_write(model, scratch, WEIGHTS, tensors) if mine else None)
    if world.is_main:
        _describe(model, scratch, WEIGHTS, filter(None, files), source, tokenizer, sync)
        publish(scratch, path)
    world.barrier()


# --- resuming -----------------------------------------------------------------------------------


def _instead(out_dir: Path) -> str:
    """Advice for a directory without a checkpoint to resume."""
    if (out_dir / STATE).is_file():
        parent = out_dir.resolve().parent
        return f"It is one itself: --out_dir={parent} goes on from the newest there."
    for name, kind in {MANIFEST: "shards", "config.json": "a Hugging Face model"}.items():
        if (out_dir / name).is_file():
            new = f"--init_from={out_dir} with another --out_dir starts from its weights"
            return f"It has {kind}, without an optimizer's state that is read: {new}."
    return "Start with --init_from=scratch, or name its out_dir."


def number_of(group: int, path: Path) -> int:
    """Whose optimizer state a dp group takes from a checkpoint: its own if that is there."""
    return group % (1 + len(list(path.glob(f"{OPTIMIZER}-*"))))


def read_state(out_dir: Path, group: int = 0) -> tuple[Path, Progress, dict[str, Any]]:
    """(path, progress, options) of the newest checkpoint, or of nanoGPT's ckpt.pt where there is no
    other. UserError if there is none. group: of dp, with local steps."""
    if not has_checkpoints(out_dir) and (out_dir / "ckpt.pt").is_file():
        return nanogpt_state(own_file(out_dir / "ckpt.pt"))
    if not has_checkpoints(out_dir):
        raise UserError(f"{out_dir} has no checkpoint to resume. {_instead(out_dir)}")
    for entry in out_dir.iterdir():  # the run will write to these: none may lead elsewhere
        ours = entry.name.lstrip(".").startswith(("metrics", "latest", "step-", "begun", "lock"))
        if ours and not (inside(entry).is_file() or entry.is_dir()):
            raise UserError(f"{entry} is neither a file nor a directory.")
    path = latest_checkpoint(out_dir)
    raw = read_json(path / STATE)
    try:
        number = number_of(group, path)
        groups = [raw["progress"], *raw.get("groups", ())]
        progress, options = Progress(**groups[number]), raw["options"]
        for name, default in vars(Progress()).items():
            value = getattr(progress, name)
            most = 2**53 if type(value) is int else float("inf")
            if type(value) not in (type(default), int) or not 0 <= value < most:
                raise TypeError
        if progress.loss_scale == 0 or not isinstance(options, dict):
            raise TypeError
    except (TypeError, LookupError):
        raise UserError(f"{path / STATE} is damaged or of another version.") from None
    return path, progress, options


def nanogpt_state(path: Path) -> tuple[Path, Progress, dict[str, Any]]:
    """The same of a ckpt.pt."""
    source = NanoGPTCheckpoint(path)
    raw: dict[str, Any] = source.raw
    steps = source.optimizer_steps()
    best: Any
    at, best, options = raw.get("iter_num"), raw.get("best_val_loss"), raw.get("config")
    try:
        best = float(best)  # a tensor, where nanoGPT has saved one
    except (TypeError, ValueError, RuntimeError):
        best = math.nan
    if type(at) is not int or at < 0 or math.isnan(best):
        raise UserError(f"{path} does not say its iteration and its best loss.")
    return path, Progress(at, best, 0, steps), options if isinstance(options, dict) else {}


def moments_of(path: Path, world: World, group: int = 0) -> Source | ShardDirectory:
    """AdamW's moments in a checkpoint, checked, as exp_avg.NAME and exp_avg_sq.NAME."""
    if path.is_file():
        source = NanoGPTCheckpoint(path)
        source.optimizer_steps()
        return source
    number = number_of(group, path)
    return checked(path, f"{OPTIMIZER}-{number}" if number else OPTIMIZER, PREFIXES, world)


def checked(path: Path, part: str, prefixes: tuple[str, ...], world: World) -> ShardDirectory:
    """A directory of a checkpoint that has all parameters once for each prefix. This rank checks
    its share of the bytes."""
    stored = ShardDirectory(inside(path / part))
    shapes = Partition.of(read_manifest(path).model, 1).shapes()
    stored.check_tensors({p + name: shapes[name] for p in prefixes for name in shapes})
    several = any(path.glob(f"{OPTIMIZER}-*"))  # then each group reads its own
    ranks = world.size // world.dp.size if several else world.size
    for i in range(world.rank % ranks, stored.manifest.tp, ranks):
        stored.check_bytes(i)
    return stored


def load_optimizer(
    model: TensorParallelGPT, optimizer: torch.optim.Optimizer, path: Path, optimizer_steps: int,
    world: World, group: int = 0,
) -> None:  # fmt: skip
    """Load AdamW's moments, at this run's tp and block_size, from a checkpoint of any other. group:
    of dp, with local steps."""
    if optimizer_steps == 0:
        return
    stored = moments_of(path, world, group)
    names, made = {p: name for name, p in model.named_parameters()}, optimizer.state_dict()
    read = reader(stored, model.tp.rank, model.config.block_size)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        moments = {moment: torch.zeros_like(p) for moment in MOMENTS}
        for moment, value in moments.items():
            rule = model.split.rules[names[p]]
            model.parts.store(names[p], value, read(f"{moment}.{names[p]}", rule))
        made["state"][i] = {"step": torch.tensor(float(optimizer_steps)), **moments}
    optimizer.load_state_dict(made)

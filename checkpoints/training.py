"""Checkpoints of a training run: OUT_DIR/step-000500/ is a shard directory with the optimizer's state beside the weights.

    step-000500/shards.json, rank-*.safetensors, tokenizer.json     the weights: any command reads them
    step-000500/optimizer/shards.json, rank-*.safetensors           AdamW's moments, split as their parameters are
    step-000500/training.json                                       iteration, best loss, options
    latest                                                          the name of the newest whole checkpoint

Every rank writes what it owns; the directory gets its name when all have finished, and `latest` moves after that.
"""

import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    write_json,
)
from checkpoints.sources import LATEST, latest_checkpoint
from errors import UserError
from parallel.mesh import World
from parallel.partition import Partition, Rule
from text.files import inside, read_json
from text.tokenizer import TOKENIZER_FILE
from tp_model import TensorParallelGPT

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


def has_checkpoints(out_dir: Path) -> bool:
    return os.path.lexists(out_dir / LATEST)


def steps(out_dir: Path) -> list[Path]:
    return sorted(path for path in out_dir.glob("step-*") if path.is_dir())


def delete_checkpoints(out_dir: Path) -> None:
    """Forget an earlier run; `latest` goes first, so that nothing ever names a directory that is half gone."""
    (out_dir / LATEST).unlink(missing_ok=True)
    for path in steps(out_dir):
        shutil.rmtree(path)


def save(
    world: World,
    model: TensorParallelGPT,
    optimizer: torch.optim.Optimizer,
    out_dir: Path,
    progress: Progress,
    tokenizer: dict[str, Any],
    options: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write step-N and point `latest` at it; every rank calls this, the first dp group writes. Returns the directory."""
    path = out_dir / f"step-{progress.iter_num:06d}"
    scratch = out_dir / f".{path.name}.tmp"
    if world.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / OPTIMIZER).mkdir(parents=True)
    world.barrier()
    written = None
    if world.dp.rank == 0:
        written = (_write_weights(model, scratch), _write_moments(model, optimizer, scratch / OPTIMIZER))
    files = [pair for pair in world.gather(written) if pair is not None]
    if world.is_main:
        _write_manifests(model, files, scratch, f"training, iteration {progress.iter_num}")
        write_json(scratch / TOKENIZER_FILE, tokenizer)
        write_json(scratch / STATE, {"progress": vars(progress), "options": options})
        publish(scratch, path)
        _point(out_dir, path.name)
        if keep_last:
            for old in steps(out_dir)[:-keep_last]:
                shutil.rmtree(old)
    world.barrier()
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
    files = world.gather(_write_weights(model, scratch) if world.dp.rank == 0 else None)
    if world.is_main:
        entries = _entries(model)
        ranks = tuple(file for file in files if file is not None)
        manifest = Manifest(model.config, model.tp.size, dtype_name(torch.float32), source, ranks, entries, sync)
        write_json(scratch / MANIFEST, manifest.as_json())
        write_json(scratch / TOKENIZER_FILE, tokenizer)
        publish(scratch, path)
    world.barrier()


def _entries(model: TensorParallelGPT) -> dict[str, TensorEntry]:
    shapes, rules = model.split.shapes(), model.split.rules()
    return {name: TensorEntry(shape, Rule(rules[name].dim, rules[name].runs)) for name, shape in shapes.items()}


def _write_weights(model: TensorParallelGPT, directory: Path) -> tuple[str, int, str]:
    tensors = {name: model.owned(name, p) for name, p in model.named_parameters()}
    return _write(tensors, directory / shard_name(model.tp.rank, model.tp.size))


def _write_moments(model: TensorParallelGPT, optimizer: torch.optim.Optimizer, directory: Path) -> tuple[str, int, str]:
    tensors = {}
    for moment in MOMENTS:
        for name, p in model.named_parameters():
            value = optimizer.state[p][moment] if p in optimizer.state else torch.zeros_like(p)
            tensors[f"{moment}.{name}"] = model.owned(name, value)
    return _write(tensors, directory / shard_name(model.tp.rank, model.tp.size))


def _write(tensors: dict[str, torch.Tensor], path: Path) -> tuple[str, int, str]:
    file = TensorFile(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, torch.float32)
    for name, tensor in tensors.items():
        file.write(name, tensor)
    return path.name, *file.close()


def _write_manifests(model: TensorParallelGPT, files: list[Any], scratch: Path, source: str) -> None:
    entries = _entries(model)
    moments = {f"{moment}.{name}": entry for moment in MOMENTS for name, entry in entries.items()}
    sync = None if model.schedule.is_plain else Sync(str(model.schedule), model.tp.size)
    parts = ((scratch, entries, 0), (scratch / OPTIMIZER, moments, 1))
    for directory, tensors, which in parts:
        ranks = tuple(pair[which] for pair in files)
        manifest = Manifest(model.config, model.tp.size, dtype_name(torch.float32), source, ranks, tensors, sync)
        write_json(directory / MANIFEST, manifest.as_json())


def _point(out_dir: Path, name: str) -> None:
    scratch = out_dir / f".{LATEST}.tmp"
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(out_dir / LATEST)


def read_state(out_dir: Path) -> tuple[Path, Progress, dict[str, Any]]:
    """(checkpoint, where its run stood, its options) of the newest checkpoint. UserError where there is none."""
    if not has_checkpoints(out_dir):
        raise UserError(f"{out_dir} has no checkpoint to resume. Start with --init_from=scratch, or name its out_dir.")
    for entry in out_dir.iterdir():  # what this run is about to write to; `latest` and its like lead nowhere else
        ours = re.match(rf"metrics\.jsonl|\.?{LATEST}|\.?step-", entry.name)
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
    """Give the optimizer its moments back, at this run's tp, whatever tp wrote them."""
    if optimizer_steps == 0:
        return
    shards = ShardDirectory(inside(path / OPTIMIZER))
    shapes = Partition.of(read_manifest(path).model, 1).shapes()
    shards.check_tensors({f"{moment}.{name}": shape for moment in MOMENTS for name, shape in shapes.items()})
    for i in range(world.rank, shards.manifest.tp, world.size):
        shards.check_bytes(i)
    rules, names = model.split.rules(), {p: name for name, p in model.named_parameters()}
    state, index = {}, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[p]
            rule = rules[name]
            moments = {}
            for moment in MOMENTS:
                full_name = f"{moment}.{name}"
                value = torch.zeros_like(p)
                owned = shards.read(full_name, rule.dim, rule.runs[model.tp.rank] if rule.runs else ())
                model.owned(name, value).copy_(owned)
                moments[moment] = value
            state[index] = {"step": torch.tensor(float(optimizer_steps)), **moments}
            index += 1
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

"""Weights as nanoGPT saves them: ckpt.pt."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError, printable
from base.files import beginning, fetched
from base.pickles import Foreign, Refused
from checkpoints.archives import check_archive
from checkpoints.runs import runs_of
from checkpoints.shards import Sync, config_from
from checkpoints.tensors import (
    HEAD,
    TABLE,
    by_plain_name,
    check_all_used,
    check_tied,
    common_dtype,
    tokenizer_for,
)
from model import GPTConfig
from plan.partition import Partition, Span

# how a file begins that is none of torch.save's, and what it is
BEGINNINGS = (
    (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "torch's format from before version 1.6: load it with torch, save it again",
    ),
    (b"\x80", "a pickle that torch.save did not write: save a dict of tensors with torch.save"),
    (
        b"GGUF",
        "a GGUF file, which is not read: --init_from takes the weights that it was made from",
    ),
    (b"\x1f\x8b", "packed by gzip: unpack it first"),
    (b"\x89HDF", "an HDF5 file, as TensorFlow saves weights: save them with torch"),
    (b"<", "a web page: its address was that of a page about the file, not that of the file"),
)
WITHOUT = (
    "Where it was made, save what is needed alone: "
    "torch.save({key: checkpoint[key] for key in ('model', 'model_args')}, 'ckpt.pt')."
)
BARE = (
    "It holds tensors alone, such as transformers' pytorch_model.bin does: name a directory that "
    "save_pretrained(...) wrote, or save {'model': ..., 'model_args': {...}}."
)


def another_format(path: Path) -> str:
    """What a file is that is no archive of torch.save's, "" where that cannot be seen."""
    head = beginning(path)
    if head[8:9] == b"{":
        return "a safetensors file: --init_from takes the directory that has it and config.json"
    return next((what for begins, what in BEGINNINGS if head.startswith(begins)), "")


def _is_state(raw: Any) -> bool:
    """Whether a file holds a model's tensors and nothing about them."""
    state = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    return isinstance(state, dict) and any(isinstance(value, Tensor) for value in state.values())


class NanoGPTCheckpoint:
    """A nanoGPT ckpt.pt, mapped from the file: {"model": state dict, "model_args": {...}, "config": {...}, ...}."""

    sync: Sync | None = None

    def __init__(self, path: Path, verify: tuple[int, int] | None = None):
        self.path, self.description = path, str(path)
        raw = self._load(verify)
        state = by_plain_name(
            ((str(name), value) for name, value in raw["model"].items()), str(path)
        )
        settings = raw["config"] if isinstance(raw.get("config"), dict) else {}
        # nanoGPT's model_args know no activation (it is always the exact GELU): a checkpoint that `merge` wrote says it in
        # `config`, where nanoGPT does not look. Before they knew `bias`, every model had them
        defaults = {
            "dropout": 0.0,
            "activation": settings.get("activation", "gelu"),
            "bias": "transformer.ln_f.bias" in state,
        }
        self.config = self._config(defaults | raw["model_args"])
        self.tensors = self._check(state)
        self.dtype = common_dtype(
            {name: tensor.dtype for name, tensor in self.tensors.items()}, str(path)
        )
        dataset = settings.get("dataset")
        self.dataset = dataset if isinstance(dataset, str) and dataset.replace("_", "").replace("-", "").isalnum() else None
        self.tokenizer = tokenizer_for(self.config.vocab_size, settings)

    def _load(self, verify: tuple[int, int] | None) -> dict[str, Any]:
        try:
            check_archive(fetched(self.path), verify)
            raw = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except UserError:
            raise
        except Refused as error:
            reads = "only tensors, numbers, strings and lists and dicts of them are read from a ckpt.pt"
            how = f" {WITHOUT}" if isinstance(error, Foreign) else ""
            raise UserError(f"{self.path} is refused: {error}; {reads}.{how}") from None
        except Exception as error:  # torch.load raises a dozen kinds for a broken file
            fault = f"{type(error).__name__}: {printable((str(error).splitlines() or [''])[0], 80)}"
            fault = another_format(self.path) or fault
            raise UserError(f"{self.path} is not a readable ckpt.pt ({fault}).") from None
        missing = [
            key
            for key in ("model", "model_args")
            if not isinstance(raw, dict) or not isinstance(raw.get(key), dict)
        ]
        if missing:
            lacks = f"{self.path} is not a nanoGPT checkpoint: it lacks `model` or `model_args`."
            raise UserError(lacks + (f" {BARE}" if "model" in missing and _is_state(raw) else ""))
        return raw

    def _config(self, args: dict[str, Any]) -> GPTConfig:
        try:
            return config_from(args, "model_args.{}".format)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _check(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The model's own tensors among the state's."""
        shapes = Partition.of(self.config, 1).shapes()
        head = {HEAD: shapes[TABLE]} if HEAD in state else {}
        for name, shape in (shapes | head).items():
            tensor = state.get(name)
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise UserError(f"{self.path}: tensor {name} is missing.")
            if tuple(tensor.shape) != shape:
                raise UserError(f"{self.path}: tensor {name} has shape {list(tensor.shape)}, model_args say {list(shape)}.")

        def shape_of(name: str) -> tuple[int, ...]:
            return tuple(getattr(state[name], "shape", (0,)))

        check_all_used(state, shapes | head, self.config.n_layer, shape_of, str(self.path))
        if head:
            check_tied(state[HEAD], state[TABLE], str(self.path))
        found = {name: state[name] for name in shapes}
        if sum(tensor.nbytes for tensor in found.values()) > self.path.stat().st_size:  # one number can pose as many
            raise UserError(f"{self.path}: its tensors claim more bytes than the file has.")
        return found

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        return runs_of(self.tensors[name], dim, runs)

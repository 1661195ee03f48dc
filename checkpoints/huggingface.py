"""Weights as transformers saves GPT-2: config.json and model.safetensors, here or on the hub."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from base.errors import UserError, printable, shown
from base.files import read_json
from checkpoints.runs import runs_of
from checkpoints.shards import CODES, Sync, config_from, open_tensors
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

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def hub_name(spec: str) -> str:
    """The short name of the hub's model that `spec` names, with or without its owner, or ""."""
    return next((name for name, full in HUB.items() if spec in (name, full)), "")


def from_hub(name: str) -> Path:
    """The local copy of a hub model, downloaded if need be: the one place of the program that uses the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    for repository in (HUB[name], name):  # the short name is where older caches have it
        try:
            path = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
            if (path / "config.json").is_file() and any(file.is_file() for file in path.glob("model*.safetensors")):
                return path
        except LocalEntryNotFoundError:
            continue
    try:
        return Path(snapshot_download(HUB[name], allow_patterns=patterns))
    except Exception as error:  # requests, httpx and the hub's own errors differ by version: all mean "not to be had"
        reason = type(error).__name__
    raise UserError(
        f"{name} is not in the local Hugging Face cache and the hub cannot be reached ({reason}). "
        f"A directory with config.json and model.safetensors works too: --init_from=/path/to/{name}"
    )


class HuggingFaceDirectory:
    """A directory with config.json and model.safetensors (or several files and an index), as transformers saves GPT-2.

    transformers keeps the linear weights as [in, out] (Conv1D); here they are [out, in].
    """

    dataset: str | None = None
    sync: Sync | None = None

    def __init__(self, directory: Path, description: str = ""):
        self.directory = directory
        self.description = description or str(directory)
        self._files: dict[Path, Any] = {}
        raw = read_json(directory / "config.json")
        self.config = config_from_hf(raw, directory / "config.json")
        self._where = self._locate()
        self.tokenizer = tokenizer_for(self.config.vocab_size, raw)
        self.dtype = self._check()

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """nanoGPT's name -> (file, its name in that file)."""
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        if os.path.lexists(single):
            pairs = self._within(single)
        elif os.path.lexists(index):
            weight_map = read_json(index)
            weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map.")
            for name in weight_map.values():
                if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name):
                    raise UserError(f"{index}: {shown(name)} is not a safetensors file of this directory.")
            pairs = [(key, (self.directory / name, key)) for key, name in weight_map.items()]
        else:
            hint = " Save the model again with save_pretrained(...)." if list(self.directory.glob("*.bin")) else ""
            raise UserError(f"{self.directory} has config.json but no model.safetensors.{hint}")
        return by_plain_name(pairs, str(self.directory))

    def _within(self, path: Path) -> list[tuple[str, tuple[Path, str]]]:
        """The tensors of a file. Of several that are the same, safetensors' save_model keeps one and
        names the others in the metadata."""
        keys, said = set(self._open(path).keys()), self._open(path).metadata() or {}
        same = {alias: key for alias, key in said.items() if key in keys and alias not in keys}
        return [(name, (path, key)) for name, key in ({key: key for key in keys} | same).items()]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = open_tensors(path)
        return self._files[path]

    def _slice(self, name: str) -> Any:
        file, key = self._where[name]
        try:
            return self._open(file).get_slice(key)
        except SafetensorError:
            raise UserError(f"{file}: tensor {key} is missing, though the index names it.") from None

    def _check(self) -> torch.dtype:
        dtypes, shapes = {}, Partition.of(self.config, 1).shapes()
        if HEAD in self._where:
            shapes[HEAD] = shapes[TABLE]
        for name, shape in shapes.items():
            if name not in self._where:
                fault = "is missing: these are not the weights of config.json's GPT-2"
                raise UserError(f"{self.directory}: tensor {name} {fault}.")
            part = self._slice(name)
            expected = shape[::-1] if is_conv1d(name) else shape
            if tuple(part.get_shape()) != expected:
                fault = f"has shape {part.get_shape()}, config.json says {list(expected)}"
                raise UserError(f"{self._where[name][0]}: tensor {name} {fault}.")
            dtypes[name] = _DTYPE_OF_CODE.get(part.get_dtype(), part.get_dtype())
        self._check_no_more(shapes)
        dtype = common_dtype(dtypes, str(self.directory))
        if HEAD in self._where and self._where[HEAD] != self._where[TABLE]:
            check_tied(self._slice(HEAD)[:], self._slice(TABLE)[:], str(self.directory))
        return dtype

    def _check_no_more(self, shapes: dict[str, tuple[int, ...]]) -> None:
        def shape_of(name: str) -> tuple[int, ...]:
            return tuple(self._slice(name).get_shape())

        check_all_used(self._where, shapes, self.config.n_layer, shape_of, str(self.directory))
        known = set(self._where.values())
        for path, file in self._files.items():
            for key in file.keys():  # noqa: SIM118 - it is no dict
                if (path, key) not in known:
                    raise UserError(
                        f"{path}: tensor {printable(key)} is not in the index. Save the model again."
                    )

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        part = self._slice(name)
        if not is_conv1d(name):
            return runs_of(part, dim, runs)
        return runs_of(part, None if dim is None else 1 - dim, runs).t()


def is_conv1d(name: str) -> bool:
    """Whether transformers keeps this weight as [in, out], the transpose of ours."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


_DTYPE_OF_CODE = {code: dtype for dtype, code in CODES.items()}
_GELU_OF_HF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_HF_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def config_from_hf(raw: Any, where: Path) -> GPTConfig:
    """GPTConfig of a Hugging Face config.json; UserError for anything that would be computed differently here."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "gpt2":
        raise UserError(f"{where}: model_type is {shown(kind)}, nanoTP reads gpt2.")
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # transformers' defaults
    values = {key: raw.get(key, default) for key, default in sizes.items()}
    for key, expected in _HF_FIXED.items():
        if raw.get(key, expected) != expected:
            raise UserError(f"{where}: {key}={shown(raw[key])}, only {expected} is supported.")
    activation = raw.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _GELU_OF_HF:
        raise UserError(f"{where}: activation_function={shown(activation)} is not one of {', '.join(_GELU_OF_HF)}.")
    values |= {"block_size": values.pop("n_positions"), "dropout": 0.0, "bias": True, "activation": _GELU_OF_HF[activation]}
    try:
        config = config_from(values, lambda name: {"block_size": "n_positions"}.get(name, name))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        fault = f"n_inner={shown(raw['n_inner'])} is not 4 x n_embd={config.n_embd}"
        raise UserError(f"{where}: {fault}, the only MLP width supported.")
    return config

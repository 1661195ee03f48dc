"""Weights as transformers saves GPT-2: config.json and model.safetensors, here or on the hub."""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from base.errors import UserError, in_file, printable, shown
from base.files import read_json
from checkpoints.manifest import config_from
from checkpoints.tensor_file import CODES, open_tensors, runs_of
from checkpoints.tensors import Source, by_plain_name, check_weights, tokenizer_for
from model import GPTConfig
from plan.partition import Span

GPT2_TOKENS = 50257
# (layers, heads, width) of the hub's models, as their config.json has them
HUB_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
             "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}  # fmt: skip
OWNER = "openai-community/"
DTYPE_OF_CODE = {code: dtype for dtype, code in CODES.items()}


def hub_name(spec: str) -> str:
    """The short name of the hub's model that `spec` names, with or without its owner, or ""."""
    name = spec.removeprefix(OWNER)
    return name if name in HUB_SIZES else ""


def from_hub(name: str) -> Path:
    """The local copy of a hub model, downloaded if need be: nothing else here uses the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["config.json", "model.safetensors*", "model-*.safetensors"]
    for repository in (OWNER + name, name):  # older caches have it under the short name
        with contextlib.suppress(LocalEntryNotFoundError):
            found = snapshot_download(repository, allow_patterns=patterns, local_files_only=True)
            weights = Path(found).glob("model*.safetensors")
            if Path(found, "config.json").is_file() and any(file.is_file() for file in weights):
                return Path(found)
    try:
        return Path(snapshot_download(OWNER + name, allow_patterns=patterns))
    except Exception as error:  # of requests, httpx or the hub, by version: it is not to be had
        fault = f"and the hub cannot be reached ({type(error).__name__})"
    works = "A directory with config.json and model.safetensors works too"
    fault = f"is not in the local Hugging Face cache {fault}"
    raise UserError(f"{name} {fault}. {works}: --init_from=/path/to/{name}")


class HuggingFaceDirectory(Source):
    """config.json, and model.safetensors or several files and an index. In them linear weights are
    [in, out] (transformers' Conv1D); `read` gives [out, in]."""

    def __init__(self, directory: Path, description: str = ""):
        self.directory, self.description = directory, description or str(directory)
        self._open: dict[Path, Any] = {}
        settings = read_json(directory / "config.json")
        with in_file(directory / "config.json"):
            self.config = config_from_hf(settings)
        self._where = by_plain_name(self._locate().items(), str(directory))
        self.tokenizer = tokenizer_for(self.config.vocab_size, settings)
        self._paths = {name: path for name, (path, _) in self._where.items()}
        self.files = sorted({directory / "config.json", *self._paths.values()})
        self.dtype = self._check()

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """Of each tensor its file and its name there."""
        index, single = (self.directory / f"model.safetensors{end}" for end in (".index.json", ""))
        if os.path.lexists(single):
            file = self._file(single)
            keys, settings = set(file.keys()), file.metadata() or {}
            # of several tensors that are one, save_model keeps one and names the others here
            names = settings | dict(zip(keys, keys, strict=True))
            return {name: (single, key) for name, key in names.items() if key in keys}
        if not os.path.lexists(index):
            old = any(self.directory.glob("*.bin"))
            hint = " Save the model again with save_pretrained(...)." if old else ""
            raise UserError(f"{self.directory} has config.json but no model.safetensors.{hint}")
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map.")
        for name in weight_map.values():
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name):
                fault = "is not a safetensors file of this directory"
                raise UserError(f"{index}: {shown(name)} {fault}.")
        return {key: (self.directory / name, key) for key, name in weight_map.items()}

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_tensors(path)
        return self._open[path]

    def _slice(self, name: str) -> Any:
        path, key = self._where[name]
        try:
            return self._file(path).get_slice(key)
        except SafetensorError:
            missing = f"tensor {key} is missing, though the index names it"
            raise UserError(f"{path}: {missing}.") from None

    def _check(self) -> torch.dtype:
        """The weights' dtype. UserError unless the tensors are those of config.json's model."""
        found = {}
        for name in self._where:
            part = self._slice(name)
            shape, code = part.get_shape(), part.get_dtype()
            found[name] = shape[:: -1 if is_conv1d(name) else 1], DTYPE_OF_CODE.get(code, code)
        about = str(self.directory), "config.json says", lambda name: self._slice(name)[:]
        dtype = check_weights(found, self.config, *about, self._paths)
        known = set(self._where.values())
        for path, file in self._open.items():
            for key in file.keys():  # noqa: SIM118 - it is no dict
                if (path, key) not in known:
                    fault = "is not in the index. Save the model again"
                    raise UserError(f"{path}: tensor {printable(key)} {fault}.")
        return dtype

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        part = self._slice(name)
        if not is_conv1d(name):
            return runs_of(part, dim, runs)
        return runs_of(part, None if dim is None else 1 - dim, runs).t()


def is_conv1d(name: str) -> bool:
    """Whether transformers keeps this weight as [in, out], the transpose of ours."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


_GELU_OF_HF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_HF_FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "tie_word_embeddings": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}  # fmt: skip
_HF_DEFAULTS = {"vocab_size": GPT2_TOKENS, "n_positions": 1024, "n_embd": 768, "n_layer": 12,
                "n_head": 12, "activation_function": "gelu_new"}  # fmt: skip


def config_from_hf(raw: Any) -> GPTConfig:
    """The GPTConfig of a config.json. UserError for anything that would be computed differently."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "gpt2":
        raise UserError(f"model_type is {shown(kind)}, nanoTP reads gpt2.")
    for key, expected in _HF_FIXED.items():
        if raw.get(key, expected) != expected:
            raise UserError(f"{key}={shown(raw[key])}, only {expected} is supported.")
    values = {key: raw.get(key, default) for key, default in _HF_DEFAULTS.items()}
    name, values["block_size"] = values.pop("activation_function"), values.pop("n_positions")
    if not isinstance(name, str) or name not in _GELU_OF_HF:
        known = ", ".join(_GELU_OF_HF)
        raise UserError(f"activation_function={shown(name)} is not one of {known}.")
    values |= {"dropout": 0.0, "bias": True, "activation": _GELU_OF_HF[name]}
    config = config_from(values, lambda key: "n_positions" if key == "block_size" else key)
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        fault = f"n_inner={shown(raw['n_inner'])} is not 4 x n_embd={config.n_embd}"
        raise UserError(f"{fault}, the only MLP width supported.")
    return config

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
from base.files import own_file, read_json
from checkpoints.archives import read_pt
from checkpoints.manifest import config_from
from checkpoints.tensor_file import CODES, open_tensors, runs_of
from checkpoints.tensors import CARRIED, Source, by_plain_name, check_weights
from model import VARIANTS, GPTConfig
from plan.partition import Span
from text.hf_tokenizer import CONFIG, FILES, tokenizer_files

GPT2_TOKENS = 50257
# (layers, heads, width) of the hub's models, as their config.json has them
HUB_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
             "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}  # fmt: skip
OWNER = "openai-community/"
# of GPT2ForSequenceClassification, ...TokenClassification, ...QuestionAnswering, DoubleHeads
OTHER_HEADS = tuple(f"transformer.{name}." for name in (
    "score", "classifier", "qa_outputs", "multiple_choice_head"))  # fmt: skip
DTYPE_OF_CODE = {code: dtype for dtype, code in CODES.items()}


def hub_name(spec: str) -> str:
    """The short name of the OpenAI model that `spec` names, with or without its owner, or ""."""
    name = spec.removeprefix(OWNER)
    return name if name in HUB_SIZES else ""


def is_repository(spec: str) -> bool:
    """Whether this may be OWNER/NAME of the hub."""
    return bool(re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", spec))


def from_hub(name: str) -> Path:
    """The local copy of a hub model, downloaded if need be: nothing else here uses the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["config.json", "model*.safetensors*", "pytorch_model*.bin*", *FILES]
    named = name if "/" in name else OWNER + name
    for repository in dict.fromkeys((named, name)):  # older caches have it under the short name
        with contextlib.suppress(LocalEntryNotFoundError):
            found = snapshot_download(repository, allow_patterns=patterns, local_files_only=True)
            weights = [*Path(found).glob("model*.safetensors"), *Path(found).glob("pytorch_m*.bin")]
            if Path(found, "config.json").is_file() and any(file.is_file() for file in weights):
                return Path(found)
    try:
        return Path(snapshot_download(named, allow_patterns=patterns))
    except Exception as error:  # of requests, httpx or the hub, by version: it is not to be had
        fault = f"and the hub cannot be reached ({type(error).__name__})"
    works = "A directory with config.json and model.safetensors works too"
    fault = f"is not in the local Hugging Face cache {fault}"
    raise UserError(f"{name} {fault}. {works}: --init_from=/path/to/{name.rpartition('/')[2]}")


class HuggingFaceDirectory(Source):
    """config.json, and model.safetensors or pytorch_model.bin, or several files and an index. Their
    linear weights are [in, out] (transformers' Conv1D); `read` gives [out, in]. drop_heads: leave
    out the heads of models that classify."""

    def __init__(self, directory: Path, description: str = "", drop_heads: bool = False):
        self.directory, self.description = directory, description or str(directory)
        self._open: dict[Path, Any] = {}
        settings = read_json(directory / "config.json")
        with in_file(directory / "config.json"):
            self.config = config_from_hf(settings)
        self._where = by_plain_name(self._locate().items(), str(directory))
        self.tokenizer = settings.get(CARRIED) or self._tokenizer(settings)
        self._paths = {name: path for name, (path, _) in self._where.items()}
        self.files = sorted({directory / "config.json", *self._paths.values()})
        self.dtype = self._check(drop_heads)

    def _tokenizer(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The directory's own; without one GPT-2's, of a model with the sizes of OpenAI's."""
        if files := tokenizer_files(self.directory):
            config = {name: settings[name] for name in CONFIG if name in settings}
            return {"kind": "hf", "files": files, "config": config}
        c = self.config
        known = (c.n_layer, c.n_head, c.n_embd) in HUB_SIZES.values()
        openais = known and (c.vocab_size, c.block_size) == (GPT2_TOKENS, 1024)
        return {"kind": "gpt2"} if openais else None

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """Of each tensor its file and its name there: safetensors, else what torch.save wrote."""
        for stem in ("model.safetensors", "pytorch_model.bin"):
            single, index = self.directory / stem, self.directory / f"{stem}.index.json"
            if os.path.lexists(single):
                file = self._file(single)
                keys, settings = set(file.keys()), {} if isinstance(file, dict) else file.metadata()
                # of several tensors that are one, save_model keeps one and names the others here
                names = (settings or {}) | dict(zip(keys, keys, strict=True))
                return {name: (single, key) for name, key in names.items() if key in keys}
            if os.path.lexists(index):
                return self._indexed(index)
        others = any(self.directory.glob("*_model.*"))  # TensorFlow's or Flax's
        hint = " Save the model again with save_pretrained(...)." * others
        raise UserError(f"{self.directory} has config.json but no model.safetensors.{hint}")

    def _indexed(self, index: Path) -> dict[str, tuple[Path, str]]:
        content, ending = read_json(index), index.name.split(".")[1]
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map.")
        for name in weight_map.values():
            if not isinstance(name, str) or not re.fullmatch(rf"\w[\w.-]{{0,200}}\.{ending}", name):
                fault = f"is not a {ending} file of this directory"
                raise UserError(f"{index}: {shown(name)} {fault}.")
        return {key: (self.directory / name, key) for key, name in weight_map.items()}

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            is_bin = path.suffix == ".bin"
            self._open[path] = read_pt(own_file(path)) if is_bin else open_tensors(path)
            if is_bin and not isinstance(self._open[path], dict):
                raise UserError(f"{path} holds no tensors by name.")
        return self._open[path]

    def _slice(self, name: str) -> Any:
        path, key = self._where[name]
        file = self._file(path)
        try:
            return file[key] if isinstance(file, dict) else file.get_slice(key)
        except (SafetensorError, KeyError):
            missing = f"tensor {key} is missing, though the index names it"
            raise UserError(f"{path}: {missing}.") from None

    def _check(self, drop_heads: bool) -> torch.dtype:
        """The weights' dtype. UserError unless the tensors are those of config.json's model."""
        found: dict[str, tuple[Any, Any]] = {}
        for name in self._where:
            if drop_heads and name.startswith(OTHER_HEADS):
                continue
            part, turn = self._slice(name), -1 if is_conv1d(name) else 1
            if isinstance(part, Tensor):
                found[name] = list(part.shape)[::turn], part.dtype
            elif hasattr(part, "get_shape"):
                code = part.get_dtype()
                found[name] = part.get_shape()[::turn], DTYPE_OF_CODE.get(code, code)
            else:
                found[name] = None, None
        if head := next((name for name in found if name.startswith(OTHER_HEADS)), ""):
            name = head.removeprefix("transformer.")
            fault = f"tensor {name} is a head that nanoTP does not compute"
            how = "shard_checkpoint.py split --drop_heads=True writes shards without it"
            raise UserError(f"{self.directory}: {fault}: {how}.")
        about = str(self.directory), "config.json says", lambda name: self._slice(name)[:]
        dtype = check_weights(found, self.config, *about, self._paths)
        known = set(self._where.values())
        for path, file in self._open.items():
            for key in file.keys():  # noqa: SIM118 - it is no dict
                if (path, key) not in known:
                    fault = "is not in the index. Save the model again"
                    raise UserError(f"{path}: tensor {printable(str(key))} {fault}.")
        return dtype

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        part = self._slice(name)
        if not is_conv1d(name):
            return runs_of(part, dim, runs)
        return runs_of(part, None if dim is None else 1 - dim, runs).t()


def is_conv1d(name: str) -> bool:
    """Whether transformers keeps this weight as [in, out], the transpose of ours."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


ACTIVATION_OF_HF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu",
                    "relu": "relu", "silu": "silu", "swish": "silu"}  # fmt: skip
_HF_DEFAULTS = {"vocab_size": GPT2_TOKENS, "n_positions": 1024, "n_embd": 768, "n_layer": 12,
                "n_head": 12, "activation_function": "gelu_new"}  # fmt: skip


def config_from_hf(raw: Any) -> GPTConfig:
    """The GPTConfig of a config.json. UserError for anything that would be computed differently."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "gpt2":
        raise UserError(f"model_type is {shown(kind)}, nanoTP reads gpt2.")
    if raw.get("add_cross_attention", False) is not False:
        raise UserError("add_cross_attention=true: nanoTP reads decoders without an encoder.")
    values = {key: raw.get(key, default) for key, default in _HF_DEFAULTS.items()}
    name, values["block_size"] = values.pop("activation_function"), values.pop("n_positions")
    if not isinstance(name, str) or name not in ACTIVATION_OF_HF:
        known = ", ".join(ACTIVATION_OF_HF)
        raise UserError(f"activation_function={shown(name)} is not one of {known}.")
    values |= {"dropout": 0.0, "bias": True, "activation": ACTIVATION_OF_HF[name]}
    values |= {key: raw[key] for key in VARIANTS if raw.get(key) is not None}
    return config_from(values, lambda key: "n_positions" if key == "block_size" else key)

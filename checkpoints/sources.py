"""Where weights are read from: the hub, a Hugging Face directory, a nanoGPT ckpt.pt, a shard or training directory.

Every source gives any part of any full tensor in nanoGPT's names and orientation, so a rank reads only what it owns,
at whatever tp. Nothing here executes what a file says: safetensors, JSON, and torch.load with weights_only of an archive
that has been looked through.
"""

import difflib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoints.archives import check_archive
from checkpoints.shards import CODES, DTYPES, MANIFEST, ShardDirectory, Sync, config_from, open_tensors
from errors import UserError, printable, shown
from model import GPTConfig
from parallel.partition import Partition, Rule, Run
from parallel.schedule import Schedule
from text.dataset import Dataset, is_prepared
from text.files import inside, own_file, read_json, read_small
from text.pickles import Refused
from text.tokenizer import TOKENIZER_FILE, GPT2Tokenizer, IdsTokenizer, Tokenizer, read_tokenizer, tokenizer_from_json
from tp_model import Read

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
# what their config.json says: layers, heads, width
HUB_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
LATEST = "latest"  # the file of a training directory that names its newest whole checkpoint
GPT2_TOKENS = 50257


class Described(Protocol):
    """config: the model's. description: for people. sync: the schedule of sync points that the weights were made for, None
    where they were for none in particular."""

    config: GPTConfig
    description: str
    sync: Sync | None


@dataclass
class Sizes:
    """A model of which no more is known."""

    config: GPTConfig
    description: str
    sync: Sync | None = None


class Source(Described, Protocol):
    """dtype: of the stored weights. tokenizer: what tokenizer.json should say, or None where the source does not tell;
    dataset: nanoGPT's hint for it."""

    dtype: torch.dtype
    tokenizer: dict[str, Any] | None
    dataset: str | None

    def read(self, name: str, dim: int | None, runs: Iterable[Run]) -> Tensor:
        """Runs of a full tensor along dim, one after the other; the whole where dim is None. May be a view of a file."""
        ...


def tokenizer_of(source: Source, choice: str = "", data_dir: str = "data") -> Tokenizer:
    """The tokenizer for these weights: the user's `choice` (a directory, gpt2 or ids), else what the source says.

    A nanoGPT checkpoint names only its dataset, whose directory has the characters. Where nothing tells, text is token
    ids (ids), which is always true of the weights.
    """
    if choice == "gpt2":
        return GPT2Tokenizer()
    if choice == "ids":
        return IdsTokenizer(source.config.vocab_size)
    if choice:
        path = Path(choice).expanduser()
        if (path / TOKENIZER_FILE).is_file():
            return read_tokenizer(path / TOKENIZER_FILE)
        if (path / "vocab.json").is_file() or (path / "encoder.json").is_file():
            return GPT2Tokenizer(path)
        raise UserError(f"--tokenizer={choice} is neither gpt2, ids, nor a directory with {TOKENIZER_FILE} or encoder.json.")
    if source.dataset and is_prepared(Path(data_dir) / source.dataset):
        tokenizer = Dataset(Path(data_dir) / source.dataset).tokenizer
    elif source.tokenizer is not None:
        tokenizer = tokenizer_from_json(source.tokenizer, source.description)
    else:
        tokenizer = IdsTokenizer(source.config.vocab_size)
    if tokenizer.n_vocab > source.config.vocab_size:
        raise UserError(
            f"the tokenizer ({tokenizer.kind}) knows {tokenizer.n_vocab} ids, the model's vocab_size is "
            f"{source.config.vocab_size}: they do not belong together. Name the right one with --tokenizer."
        )
    return tokenizer


def schedule_of(source: Described, text: str, tp: int) -> Schedule:
    """The schedule that --sync=`text` asks for; where it is "", the one that the weights were made for, or plain Megatron's.

    UserError where that is for another tp: what a rank sees between two sync points, and what was repaired, depends on it.
    """
    made = source.sync
    if not text and made is not None and made.tp != tp and made.schedule != "all":
        raise UserError(
            f"{source.description} was made for --sync={made.schedule} on tp={made.tp} ranks, and this run has tp={tp}. Start "
            f"{made.tp} ranks, or synchronise after every sub-block with --sync=all."
        )
    return Schedule.parse(text or (made.schedule if made else "all"), source.config.n_layer)


def reader(source: Source, rank: int) -> Read:
    """How TensorParallelGPT reads its parameters from a source."""

    def read(name: str, rule: Rule) -> Tensor:
        return source.read(name, rule.dim, rule.runs[rank] if rule.runs else ())

    return read


def open_source(
    spec: str, verify: tuple[int, int] | None = None, option: str = "init_from", also: tuple[str, ...] = ()
) -> Source:
    """The source that an `--init_from` names. verify=(rank, size) checks this rank's share of a shard directory's bytes.

    option: what the user wrote the name behind, and also: what else may stand there, for the UserError where it is no source.
    """
    if spec in HUB:
        return HuggingFaceDirectory(_from_hub(spec), description=spec)
    path = Path(os.path.expanduser(spec))  # Path.expanduser fails where there is no such user
    if path.is_file():
        return NanoGPTCheckpoint(path, verify)
    if os.path.lexists(path / LATEST):  # whatever stands there: what is wrong with it is said when it is read
        path = latest_checkpoint(path)
    if os.path.lexists(path / MANIFEST):
        return ShardSource(path, verify)
    if os.path.lexists(path / "config.json"):
        return HuggingFaceDirectory(path)
    if os.path.lexists(path / "ckpt.pt"):
        return NanoGPTCheckpoint(own_file(path / "ckpt.pt"), verify)
    if path.is_dir():
        raise UserError(
            f"--{option}={spec} is a directory without weights: no {MANIFEST} (shards), config.json (Hugging Face), "
            f"ckpt.pt (nanoGPT) or {LATEST} (training)."
        )
    names = [*HUB, *also]
    near = difflib.get_close_matches(spec, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"--{option}={spec} is neither a file, a directory nor one of {', '.join(names)}.{hint}")


def open_sizes(spec: str) -> Described:
    """What an `--init_from` names, as far as it can be known without its weights: of a hub's model no file is read."""
    if spec in HUB_SIZES:
        n_layer, n_head, n_embd = HUB_SIZES[spec]
        return Sizes(GPTConfig(1024, GPT2_TOKENS, n_layer, n_head, n_embd, activation="gelu_tanh"), spec)
    return open_source(spec)


def identity(source: Source) -> str:
    """What tells whether two ranks read the same weights: where from, and a hash of the manifest, which has every file's; else
    of each file's size and both ends."""
    if isinstance(source, ShardSource):
        paths = [source.directory / MANIFEST]
    elif isinstance(source, HuggingFaceDirectory):
        paths = sorted({file for file, _ in source._where.values()} | {source.directory / "config.json"})
    else:
        paths = [source.path] if isinstance(source, NanoGPTCheckpoint) else []
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size} ".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return f"{source.description} ({digest.hexdigest()[:12]})"


def latest_checkpoint(directory: Path) -> Path:
    """The newest whole checkpoint of a training directory."""
    name = read_small(directory / LATEST, 1000).decode(errors="replace").strip()
    if not re.fullmatch(r"\w[\w.-]{0,100}", name) or not os.path.lexists(directory / name / MANIFEST):
        raise UserError(f"{directory / LATEST} names {shown(name)}, which is not a checkpoint in {directory}.")
    return inside(directory / name)


class ShardSource(ShardDirectory):
    """A shard directory as a source. Its files are checked byte by byte as they are opened for a run, each by one rank."""

    dataset: str | None = None
    tokenizer: dict[str, Any] | None

    def __init__(self, directory: Path, verify: tuple[int, int] | None = None):
        super().__init__(directory)
        self.check_model()
        path = directory / "tokenizer.json"
        self.tokenizer = None
        if os.path.lexists(path):
            self.tokenizer = read_tokenizer(path).to_json()
        self.sync = self.manifest.sync
        if verify is not None:
            rank, size = verify
            self.check_all_bytes(range(rank, self.manifest.tp, size))


def _common_dtype(tensors: Mapping[str, torch.dtype], where: str) -> torch.dtype:
    """The dtype that holds the values of all tensors; UserError naming one whose dtype is not read."""
    for name, dtype in tensors.items():
        if dtype not in DTYPES.values():
            raise UserError(f"{where}: tensor {name} is {dtype}; {', '.join(DTYPES)} are read.")
    return functools.reduce(torch.promote_types, tensors.values())


def _check_tied(head: Tensor, table: Tensor, where: str) -> None:
    """UserError where a stored lm_head.weight is not the embedding table: here they are one."""
    same = head.data_ptr() == table.data_ptr() or head.dtype == table.dtype and torch.equal(head, table)
    if not same:
        raise UserError(f"{where}: lm_head.weight differs from wte.weight; only a head tied to the embedding is supported.")


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def _from_hub(name: str) -> Path:
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
        self.config = config_from_hf(read_json(directory / "config.json"), directory / "config.json")
        self._where = self._locate()
        self.tokenizer = {"kind": "gpt2"} if self.config.vocab_size >= GPT2_TOKENS else None
        self.dtype = self._check()

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """nanoGPT's name -> (file, its name in that file)."""
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        if os.path.lexists(single):
            pairs = [(key, single) for key in list(self._open(single).keys())]
        elif os.path.lexists(index):
            weight_map = read_json(index)
            weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map.")
            for name in weight_map.values():
                if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name):
                    raise UserError(f"{index}: {shown(name)} is not a safetensors file of this directory.")
            pairs = [(key, self.directory / name) for key, name in weight_map.items()]
        else:
            hint = " Save the model again with save_pretrained(...)." if list(self.directory.glob("*.bin")) else ""
            raise UserError(f"{self.directory} has config.json but no model.safetensors.{hint}")
        # GPT2Model saves without the prefix that GPT2LMHeadModel saves with
        found = {"transformer." + key.removeprefix("transformer."): (file, key) for key, file in pairs}
        if len(found) < len(pairs):
            raise UserError(f"{self.directory}: a tensor stands there with and without the prefix `transformer.`.")
        return found

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
        head = "transformer.lm_head.weight"  # as `_locate` names it
        if head in self._where:
            shapes[head] = shapes["transformer.wte.weight"]
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
        dtype = _common_dtype(dtypes, str(self.directory))
        if head in self._where:
            _check_tied(self._slice(head)[:], self._slice("transformer.wte.weight")[:], str(self.directory))
        return dtype

    def read(self, name: str, dim: int | None, runs: Iterable[Run]) -> Tensor:
        part = self._slice(name)
        if not is_conv1d(name):
            return _runs_of(part, dim, runs)
        return _runs_of(part, None if dim is None else 1 - dim, runs).t()


def _runs_of(part: Any, dim: int | None, runs: Iterable[Run]) -> Tensor:
    """Runs along dim of a safetensors slice or a tensor."""
    if dim is None:
        return part[:]
    pieces = [part[(slice(None),) * dim + (slice(lo, hi),)] for lo, hi in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


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


# --- nanoGPT --------------------------------------------------------------------------------------------------------


class NanoGPTCheckpoint:
    """A nanoGPT ckpt.pt, mapped from the file: {"model": state dict, "model_args": {...}, "config": {...}, ...}."""

    sync: Sync | None = None

    def __init__(self, path: Path, verify: tuple[int, int] | None = None):
        self.path, self.description = path, str(path)
        raw = self._load(verify)
        # a compiled model's names carry a prefix
        pairs = [(str(name).removeprefix("_orig_mod."), value) for name, value in raw["model"].items()]
        state = dict(pairs)
        if len(state) < len(pairs):
            raise UserError(f"{path}: a tensor stands there with and without the prefix `_orig_mod.`.")
        settings = raw["config"] if isinstance(raw.get("config"), dict) else {}
        self.config = self._config(raw["model_args"], settings)
        self.tensors = self._check(state)
        self.dtype = _common_dtype({name: tensor.dtype for name, tensor in self.tensors.items()}, str(path))
        dataset = settings.get("dataset")
        self.dataset = dataset if isinstance(dataset, str) and dataset.replace("_", "").replace("-", "").isalnum() else None
        self.tokenizer = {"kind": "gpt2"} if self.config.vocab_size >= GPT2_TOKENS else None

    def _load(self, verify: tuple[int, int] | None) -> dict[str, Any]:
        try:
            check_archive(self.path, verify)
            raw = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except Refused as error:
            reads = "only tensors, numbers, strings and lists and dicts of them are read from a ckpt.pt"
            raise UserError(f"{self.path} is refused: {error}; {reads}.") from None
        except Exception as error:  # torch.load raises a dozen kinds for a broken file
            fault = f"{type(error).__name__}: {printable((str(error).splitlines() or [''])[0], 80)}"
            raise UserError(f"{self.path} is not a readable ckpt.pt ({fault}).") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict) or not isinstance(raw.get("model_args"), dict):
            raise UserError(f"{self.path} is not a nanoGPT checkpoint: it lacks `model` or `model_args`.")
        return raw

    def _config(self, args: dict[str, Any], settings: dict[str, Any]) -> GPTConfig:
        # nanoGPT's model_args know no activation (it is always the exact GELU): a checkpoint that `merge` wrote says it in
        # `config`, where nanoGPT does not look
        defaults = {"dropout": 0.0, "activation": settings.get("activation", "gelu")}
        try:
            return config_from(defaults | args, "model_args.{}".format)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _check(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The model's own tensors among the state's."""
        shapes = Partition.of(self.config, 1).shapes()
        head = {"lm_head.weight": shapes["transformer.wte.weight"]} if "lm_head.weight" in state else {}
        for name, shape in (shapes | head).items():
            tensor = state.get(name)
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise UserError(f"{self.path}: tensor {name} is missing.")
            if tuple(tensor.shape) != shape:
                raise UserError(f"{self.path}: tensor {name} has shape {list(tensor.shape)}, model_args say {list(shape)}.")
        if head:
            _check_tied(state["lm_head.weight"], state["transformer.wte.weight"], str(self.path))
        found = {name: state[name] for name in shapes}
        if sum(tensor.nbytes for tensor in found.values()) > self.path.stat().st_size:  # one number can pose as many
            raise UserError(f"{self.path}: its tensors claim more bytes than the file has.")
        return found

    def read(self, name: str, dim: int | None, runs: Iterable[Run]) -> Tensor:
        return _runs_of(self.tensors[name], dim, runs)

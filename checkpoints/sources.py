"""Where weights are read from: the hub, a Hugging Face directory, a nanoGPT ckpt.pt, a shard or training directory.

Every source gives any part of any full tensor in nanoGPT's names and orientation, so a rank reads only what it owns,
at whatever tp. Nothing executes what a file says: safetensors, JSON, and torch.load with weights_only of an archive that has
been looked through.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from base.errors import UserError, shown
from base.files import inside, own_file, read_small
from checkpoints.huggingface import HUB, HuggingFaceDirectory, from_hub, hub_name
from checkpoints.nanogpt import NanoGPTCheckpoint
from checkpoints.runs import Read
from checkpoints.shards import MANIFEST, ShardDirectory, Sync
from model import GPTConfig
from plan.partition import Rule, Span
from plan.schedule import Schedule
from text.dataset import Dataset, is_prepared
from text.tokenizer import TOKENIZER_FILE, GPT2Tokenizer, IdsTokenizer, Tokenizer, read_tokenizer, tokenizer_from_json

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

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        """Runs of a full tensor along dim, one after the other; the whole where dim is None. May be a view of a file."""
        ...


def tokenizer_of(source: Source, choice: str = "", data_dir: str = "data") -> Tokenizer:
    """The tokenizer for these weights: the user's `choice` (a directory, gpt2 or ids), else what the source says.

    A nanoGPT checkpoint names only its dataset, whose directory has the characters. Where nothing tells, text is token
    ids (ids), which is always true of the weights.
    """
    if choice == "ids":
        return IdsTokenizer(source.config.vocab_size)
    if choice:
        return _chosen_tokenizer(choice)
    if source.dataset and is_prepared(Path(data_dir) / source.dataset):
        tokenizer = Dataset(Path(data_dir) / source.dataset).tokenizer
    elif source.tokenizer is not None:
        tokenizer = tokenizer_from_json(source.tokenizer, source.description)
    else:
        note = (
            f"{_missed(source, data_dir)}: text is token ids. --tokenizer=DIR names its directory."
        )
        tokenizer = IdsTokenizer(source.config.vocab_size, note if source.dataset else "")
    check_belongs(tokenizer, source)
    return tokenizer


def _chosen_tokenizer(choice: str) -> Tokenizer:
    """That of a directory, or gpt2. Hugging Face's directories have another tokenizer.json."""
    path = Path(choice)
    if choice == "gpt2":
        return GPT2Tokenizer()
    if (path / "vocab.json").is_file() or (path / "encoder.json").is_file():
        return GPT2Tokenizer(path)
    if (path / TOKENIZER_FILE).is_file():
        return read_tokenizer(path / TOKENIZER_FILE)
    if (path / "meta.pkl").is_file():
        return Dataset(path).tokenizer
    raise UserError(
        f"--tokenizer={choice} is neither gpt2, ids, nor a directory with {TOKENIZER_FILE}, meta.pkl "
        "or encoder.json."
    )


def _missed(source: Source, data_dir: str) -> str:
    trained = f"{source.description} was trained on the dataset {source.dataset}"
    return f"{trained}, which is not in {data_dir}"


def check_belongs(tokenizer: Tokenizer, source: Source) -> None:
    if tokenizer.n_vocab > source.config.vocab_size:
        raise UserError(
            f"the tokenizer ({tokenizer.kind}) knows {tokenizer.n_vocab} ids, the model's vocab_size is "
            f"{source.config.vocab_size}: they do not belong together. Name the right one with --tokenizer."
        )


def common_tokenizer(source: Source, dataset: Dataset, data_dir: str) -> tuple[Tokenizer, str]:
    """What the tokens of weights and of a dataset are, as far as either tells, and a notice where the
    weights' own dataset is missed. UserError where they are known to be others: the loss would only
    look wrong."""
    theirs, here = tokenizer_of(source, data_dir=data_dir), dataset.tokenizer
    if theirs.kind == "ids":  # nobody knows
        notice = (
            f"{_missed(source, data_dir)}: its tokens are taken to be those of {dataset.directory}."
        )
        notice = notice if theirs.note else ""
        return (here if here.n_vocab <= source.config.vocab_size else theirs), notice
    if here.kind != "ids" and theirs.to_json() != here.to_json():
        raise UserError(
            f"{source.description} was trained on {theirs.kind} tokens, the dataset's tokenizer is "
            f"another ({here.kind}, {here.n_vocab} tokens). Prepare the dataset with the model's."
        )
    return theirs, ""


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


def reader(source: Source | ShardDirectory, rank: int, block_size: int = 0) -> Read:
    """How TensorParallelGPT reads its parameters, or their moments, from a source. block_size: of the
    position table, where the model has no more of it than that."""

    def read(name: str, rule: Rule) -> Tensor:
        if block_size and name.endswith("transformer.wpe.weight"):
            return source.read(name, 0, [(0, block_size)])
        return source.read(name, rule.dim, rule.runs_of(rank))

    return read


def open_source(
    spec: str, verify: tuple[int, int] | None = None, option: str = "init_from", also: tuple[str, ...] = ()
) -> Source:
    """The source that an `--init_from` names. verify=(rank, size) checks this rank's share of a shard directory's bytes.

    option: what the user wrote the name behind, and also: what else may stand there, for the UserError where it is no source.
    """
    if name := hub_name(spec):
        return HuggingFaceDirectory(from_hub(name), description=name)
    path = Path(spec)
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
    near = difflib.get_close_matches(spec, [*names, *HUB.values()], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"--{option}={spec} is neither a file, a directory nor one of {', '.join(names)}.{hint}")


def open_for_inference(options: Any, verify: tuple[int, int]) -> Source:
    """The source that the options of sample_tp.py or eval_tp.py name."""
    if options.init_from == "resume":
        return open_source(options.out_dir, verify, "out_dir")
    return open_source(options.init_from, verify, also=("resume",))


def open_sizes(spec: str) -> Described:
    """What an `--init_from` names, as far as it can be known without its weights: of a hub's model no file is read."""
    if name := hub_name(spec):
        n_layer, n_head, n_embd = HUB_SIZES[name]
        return Sizes(
            GPTConfig(1024, GPT2_TOKENS, n_layer, n_head, n_embd, activation="gelu_tanh"), name
        )
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

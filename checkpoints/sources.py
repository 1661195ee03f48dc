"""Where weights come from: the hub, a Hugging Face directory, a ckpt.pt, shards, a training run.

Every source gives any part of any full tensor in nanoGPT's names and orientation, so that a rank
reads only what it owns, at whatever tp. Nothing executes what a file says."""

import difflib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from base.errors import UserError, shown
from base.files import inside, own_file, read_small

from checkpoints.huggingface import (  # isort: skip
    HUB_SIZES, OWNER, HuggingFaceDirectory, from_hub, hub_name, is_repository,
)
from checkpoints.manifest import MANIFEST
from checkpoints.nanogpt import NanoGPTCheckpoint
from checkpoints.shards import ShardDirectory, ShardSource
from checkpoints.tensor_file import Read
from checkpoints.tensors import Source
from model import GPTConfig
from plan.partition import Rule
from plan.schedule import Schedule
from text.dataset import Dataset, is_prepared
from text.hf_tokenizer import HFTokenizer, tokenizer_files

from text.tokenizer import (  # isort: skip
    TOKENIZER_FILE, GPT2Tokenizer, IdsTokenizer, Tokenizer, read_tokenizer, tokenizer_from_json,
)

TOKENIZERS = ("--tokenizer=DIR names a directory with its tokenizer.json, vocab.json and "
              "merges.txt, or meta.pkl; --tokenizer=gpt2 is GPT-2's.")
LATEST = "latest"  # the file of a training directory that names its newest whole checkpoint


# --- opening --------------------------------------------------------------------------------------


def open_source(spec: str, verify: tuple[int, int] | None = None, option: str = "init_from",
                also: tuple[str, ...] = (), drop_heads: bool = False) -> Source:  # fmt: skip
    """The source that an `--init_from` names. verify=(rank, size): check this rank's share of the
    bytes. For the UserError, option: the one that names it, also: what else that may name."""
    if name := hub_name(spec):
        return HuggingFaceDirectory(from_hub(name), name)
    path = Path(spec)
    if path.is_file():
        return NanoGPTCheckpoint(path, verify)
    if os.path.lexists(path / LATEST):
        path = latest_checkpoint(path)
    if os.path.lexists(path / MANIFEST):
        return ShardSource(path, verify)
    if os.path.lexists(path / "config.json"):
        return HuggingFaceDirectory(path, drop_heads=drop_heads)
    if os.path.lexists(path / "ckpt.pt"):
        return NanoGPTCheckpoint(own_file(path / "ckpt.pt"), verify)
    if path.is_dir():
        kinds = f"config.json (Hugging Face), ckpt.pt (nanoGPT) or {LATEST} (training)"
        fault = f"is a directory without weights: no {MANIFEST} (shards), {kinds}"
        raise UserError(f"--{option}={spec} {fault}.")
    if is_repository(spec) and not Path(spec).parent.is_dir() and not spec.startswith(OWNER):
        return HuggingFaceDirectory(from_hub(spec), spec, drop_heads)
    names = [*HUB_SIZES, *also]
    near = difflib.get_close_matches(spec, [*names, *(OWNER + name for name in HUB_SIZES)], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    fault = f"is neither a file, a directory nor one of {', '.join(names)}"
    raise UserError(f"--{option}={spec} {fault}.{hint}")


def open_for_inference(options: Any, verify: tuple[int, int]) -> Source:
    """The source that the options of sample_tp.py or eval_tp.py name."""
    if options.init_from == "resume":
        return open_source(options.out_dir, verify, "out_dir")
    return open_source(options.init_from, verify, also=("resume",))


def open_sizes(spec: str) -> Source:
    """The source that an `--init_from` names; of a hub's model no file is read."""
    if name := hub_name(spec):
        sizes = 1024, GPT2Tokenizer.n_vocab, *HUB_SIZES[name]
        return Source(GPTConfig(*sizes, activation="gelu_tanh"), name)
    return open_source(spec)


def open_shards(directory: str) -> ShardSource:
    """The shard directory, or the newest checkpoint of a training directory."""
    path = Path(directory)
    return ShardSource(latest_checkpoint(path) if (path / LATEST).is_file() else path)


def latest_checkpoint(directory: Path) -> Path:
    """The newest whole checkpoint of a training directory."""
    name = read_small(directory / LATEST, 1000).decode(errors="replace").strip()
    known = re.fullmatch(r"\w[\w.-]{0,100}", name)
    if not known or not os.path.lexists(directory / name / MANIFEST):
        fault = f"names {shown(name)}, which is not a checkpoint in {directory}"
        raise UserError(f"{directory / LATEST} {fault}.")
    return inside(directory / name)


def identity(source: Source) -> str:
    """Equal on two ranks if they read the same weights: the description, and a hash of size and
    both ends of each file, or of the manifest, which has every file's sha256."""
    digest = hashlib.sha256()
    for path in source.files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size} ".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return f"{source.description} ({digest.hexdigest()[:12]})"


# --- use ------------------------------------------------------------------------------------------


def reader(source: Source | ShardDirectory, rank: int, block_size: int = 0) -> Read:
    """How TensorParallelGPT reads its parameters, or their moments, from a source. block_size: rows
    of the position table, if the model has fewer than the source."""

    def read(name: str, rule: Rule) -> Tensor:
        if block_size and name.endswith("transformer.wpe.weight"):
            return source.read(name, 0, [(0, block_size)])
        return source.read(name, rule.dim, rule.runs_of(rank))

    return read


def schedule_of(source: Source, text: str, tp: int) -> Schedule:
    """The schedule of --sync=`text`; if that is "", the one that the weights were made for, or all
    sync points. UserError if they were made for another tp: what a rank sees between two sync
    points, and what was repaired, depends on it."""
    made = source.sync
    if not text and made is not None and made.tp != tp and made.schedule != "all":
        here = f"this run has tp={tp}. Start {made.tp} ranks, or synchronise after every sub-block"
        there = f"was made for --sync={made.schedule} on tp={made.tp} ranks"
        raise UserError(f"{source.description} {there}, and {here} with --sync=all.")
    return Schedule.parse(text or (made.schedule if made else "all"), source.config.n_layer)


def tokenizer_of(source: Source, choice: str = "", data_dir: str = "data") -> Tokenizer:
    """The tokenizer for these weights: the user's `choice` (a directory, gpt2 or ids), else the
    source's. A nanoGPT checkpoint names only its dataset, whose directory has the characters. If
    none is known, text is token ids (ids)."""
    if choice == "ids":
        return IdsTokenizer(source.config.vocab_size)
    if choice:
        return _chosen_tokenizer(choice)
    if source.dataset and is_prepared(Path(data_dir) / source.dataset):
        tokenizer = Dataset(Path(data_dir) / source.dataset).tokenizer
    elif source.tokenizer is not None:
        tokenizer = tokenizer_from_json(source.tokenizer, source.description)
    else:
        note = f"{source.description} has no tokenizer: text is token ids. {TOKENIZERS}"
        if source.dataset:
            how = "text is token ids. --tokenizer=DIR names its directory."
            note = f"{_missed(source, data_dir)}: {how}"
        tokenizer = IdsTokenizer(source.config.vocab_size, note)
    check_belongs(tokenizer, source)
    return tokenizer


def _chosen_tokenizer(choice: str) -> Tokenizer:
    """That of a directory, ours, Hugging Face's, OpenAI's or nanoGPT's, or gpt2."""
    path = Path(choice)
    if choice == "gpt2":
        return GPT2Tokenizer()
    if (path / TOKENIZER_FILE).is_file():
        return read_tokenizer(path / TOKENIZER_FILE)
    if files := tokenizer_files(path):
        return HFTokenizer(files, choice)
    if (path / "vocab.json").is_file() or (path / "encoder.json").is_file():
        return GPT2Tokenizer(path)
    if (path / "meta.pkl").is_file():
        return Dataset(path).tokenizer
    needs = f"nor a directory with {TOKENIZER_FILE}, meta.pkl or encoder.json"
    raise UserError(f"--tokenizer={choice} is neither gpt2, ids, {needs}.")


def _missed(source: Source, data_dir: str) -> str:
    trained = f"{source.description} was trained on the dataset {source.dataset}"
    return f"{trained}, which is not in {data_dir}"


def check_belongs(tokenizer: Tokenizer, source: Source) -> None:
    """UserError if the tokenizer has more ids than the model."""
    if tokenizer.n_vocab > source.config.vocab_size:
        model = f"the model's vocab_size is {source.config.vocab_size}: they do not belong together"
        knows = f"the tokenizer ({tokenizer.kind}) knows {tokenizer.n_vocab} ids"
        raise UserError(f"{knows}, {model}. Name the right one with --tokenizer.")


def common_tokenizer(source: Source, dataset: Dataset, data_dir: str) -> tuple[Tokenizer, str]:
    """(the tokenizer of weights and a dataset, as far as either is known; a notice if the weights'
    own dataset is not there). UserError if they are known to differ: the loss would only look
    wrong."""
    theirs, ours = tokenizer_of(source, data_dir=data_dir), dataset.tokenizer
    if theirs.kind == "ids":
        taken = f"its tokens are taken to be those of {dataset.directory}."
        notice = f"{_missed(source, data_dir)}: {taken}" if theirs.note else ""
        return (ours if ours.n_vocab <= source.config.vocab_size else theirs), notice
    if ours.kind != "ids" and not theirs.reads(ours):
        another = f"the dataset's tokenizer is another ({ours.kind}, {ours.n_vocab} tokens)"
        fault = f"was trained on {theirs.kind} tokens, {another}"
        raise UserError(f"{source.description} {fault}. Prepare the dataset with the model's.")
    return theirs, ""

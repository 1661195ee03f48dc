"""Datasets as nanoGPT stores them: DIR/train.bin and DIR/val.bin, little-endian uint16 token ids.

tokenizer.json or nanoGPT's meta.pkl beside them has the vocabulary. Without either it is GPT-2's.
"""

from __future__ import annotations

import codecs
import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from base.errors import UserError, as_user_error
from base.files import beginning, fetched, inside, read_small, replacing
from base.pickles import Refused, plain

from text.tokenizer import (  # isort: skip
    TOKENIZER_FILE, CharTokenizer, GPT2Tokenizer, IdsTokenizer, Tokenizer, read_tokenizer,
    write_tokenizer,
)

if TYPE_CHECKING:
    import torch

TOKEN_DTYPE = np.dtype("<u2")
MAX_TOKEN_ID = 65535
CHECKED_TOKENS = 1 << 27  # of a file, before a run: a quarter of a gigabyte, a tenth of a second
MAX_META = 1 << 20  # bytes of a meta.pkl: one of 30,000 characters has 600 KB
META_WORKS = ('A meta.pkl of {"vocab_size": n} alone works: text is then the ids; or '
              "tokenizer.json beside it, which goes first.")  # fmt: skip
LOOKED_AT = 1 << 16  # bytes at a file's beginning that tell its format
RAW_IDS = "ids.astype('uint16').tofile(FILE) writes token ids and nothing else"
SCAN_TOKENS = 1 << 22  # ids looked at at once by Dataset.check: 8 MB

# they share no random numbers: evaluating more often leaves the training data as it was
TRAIN_STREAM, EVAL_STREAM = 0, 1


class TokenFile:
    """A file of token ids: len(tokens), tokens[lo:hi] -> uint16 array. It is read, not mapped: if a
    mapped file is truncated, SIGBUS kills the process. Raises UserError if the file is missing,
    unreadable, empty, of another format, or truncated later."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with as_user_error(f"read {path}"):
            try:
                size = inside(self.path).stat().st_size
                if size == 0:
                    raise UserError(f"{path} is empty: prepare the dataset again")
                _check_format(self.path)
                if size % TOKEN_DTYPE.itemsize:
                    fault = f"has an odd size ({size} bytes), so it holds no uint16 token ids"
                    raise UserError(f"{path} {fault}: prepare it again")
                self._file = open(self.path, "rb", buffering=0)
            except FileNotFoundError:
                raise UserError(f"{path} is missing: {_how_to_prepare(self.path.parent)}") from None
        self._count = size // TOKEN_DTYPE.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> NDArray[np.uint16]:
        lo, hi, _ = part.indices(self._count)
        ids = np.empty(max(0, hi - lo), TOKEN_DTYPE)
        left, at = ids.view(np.uint8).data, lo * TOKEN_DTYPE.itemsize
        while left:
            with as_user_error(f"read {self.path}"):
                count = os.preadv(self._file.fileno(), [left], at)
            if count == 0:
                fault = f"has become shorter than its {self._count} tokens since the run began"
                how = "prepare it again, and not while a run reads it"
                raise UserError(f"{self.path} {fault}: {how}")
            left, at = left[count:], at + count
        return ids


def _check_format(path: Path) -> None:
    """Raises UserError if the file's beginning is not uint16 ids. Read as uint16, another format
    gives wrong ids, most of them within GPT-2's vocabulary."""
    head = beginning(fetched(path), LOOKED_AT)
    if head.startswith(b"\x93NUMPY"):
        how = f"np.load({path.name!r}).astype('uint16').tofile({path.name!r})"
        fault = "has the header of a .npy file, which is no ids"
        raise UserError(f"{path} {fault}: {how} leaves it out")
    if head.startswith(b"PK\3\4"):
        raise UserError(f"{path} is an archive, such as np.savez or torch.save writes: {RAW_IDS}")
    for dtype in ("int64", "uint32"):
        if _looks_wider(head, np.dtype(dtype).itemsize // TOKEN_DTYPE.itemsize):
            how = f"np.fromfile({path.name!r}, '{dtype}').astype('uint16').tofile({path.name!r})"
            raise UserError(f"{path} holds ids as {dtype}, not as uint16: {how} turns it into that")
    # UTF-8, whose last character may be cut, without the zero bytes that small ids have
    with contextlib.suppress(UnicodeDecodeError):
        if len(head) >= 64 and "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head):
            raise UserError(f"{path} is text, not token ids: {_how_to_prepare(path.parent)}")


def _looks_wider(head: bytes, wide: int) -> bool:
    """True for integers of `wide` times 16 bits: below 65536 all but their first 16 bits are 0.
    Small ids with a separator 0 after each look the same, but have no 0 elsewhere."""
    rows = np.frombuffer(head[: len(head) // 8 * 8], TOKEN_DTYPE).reshape(-1, wide)
    first = rows[:, 0]
    if len(rows) < 16 or rows[:, 1:].any() or np.count_nonzero(first) <= len(rows) // 2:
        return False
    return bool(first.max() > 255 or not first.all())


def is_prepared(directory: Path) -> bool:
    """True if a file here defines the ids; a prepare.py alone does not."""
    return any((directory / name).is_file() for name in (TOKENIZER_FILE, "meta.pkl", "train.bin"))


class Dataset:
    """A dataset directory, UserError if there is none; its files are opened when first used."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            known = _known_beside(self.directory)
            raise UserError(f"there is no dataset directory {directory}{known}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if os.path.lexists(path := self.directory / TOKENIZER_FILE):
            tokenizer = read_tokenizer(path)
        elif os.path.lexists(path := self.directory / "meta.pkl"):
            tokenizer = _tokenizer_of_meta(path)
        else:
            tokenizer = GPT2Tokenizer()
        if tokenizer.n_vocab > MAX_TOKEN_ID + 1:  # a model would be made for so many
            most = f"a dataset's ids are uint16, at most {MAX_TOKEN_ID + 1}"
            raise UserError(f"{path} has {tokenizer.n_vocab} tokens: {most}")
        return tokenizer

    @cached_property
    def train(self) -> TokenFile:
        return TokenFile(self.directory / "train.bin")

    @cached_property
    def val(self) -> TokenFile:
        return TokenFile(self.directory / "val.bin")

    def check(self, block_size: int, vocab_size: int) -> None:
        """Raises UserError unless both splits have a batch and all their ids are below vocab_size.
        Reads up to CHECKED_TOKENS of each file: otherwise an id that is too large ends a run late,
        on a GPU by an assertion without a name. `batch` checks the rest as it is drawn."""
        for tokens in (self.train, self.val):
            number_of_starts(tokens, block_size)
            most = 0 if vocab_size > MAX_TOKEN_ID else min(len(tokens), CHECKED_TOKENS)
            for lo in range(0, most, SCAN_TOKENS):
                _check_ids(tokens, tokens[lo : lo + SCAN_TOKENS], lo, vocab_size)


def number_of_starts(tokens: TokenFile, block_size: int) -> int:
    """The number of windows of block_size + 1 ids (inputs, and targets one further): at least 1."""
    if len(tokens) <= block_size:
        needs = f"block_size {block_size} needs at least {block_size + 1}"
        how = "lower --block_size or prepare a longer text"
        raise UserError(f"{tokens.path} holds {len(tokens)} tokens, and {needs}: {how}")
    return len(tokens) - block_size


def _check_ids(tokens: TokenFile, ids: NDArray[Any], position: int, vocab_size: int) -> None:
    """UserError if one of the ids at this position of a file is outside the model's vocabulary."""
    if ids.max() >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        fault = f"is outside the model's vocabulary (vocab_size {vocab_size})"
        why = "the dataset was prepared with another tokenizer than the model's"
        what = f"token id {ids[at]} at position {position + at}"
        raise UserError(f"{tokens.path}: {what} {fault}: {why}")


def batch(tokens: TokenFile, rows: range, block_size: int, seed: int, step: int,
          stream: int = TRAIN_STREAM, vocab_size: int = MAX_TOKEN_ID + 1,
          ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Inputs x and targets y, int64 [len(rows), block_size], of these rows of a step's batch. Row
    i's start depends on (seed, stream, step, i) only, so the global batch is the same however its
    rows are dealt to data-parallel ranks. Raises UserError for an id outside vocab_size."""
    import torch

    starts = number_of_starts(tokens, block_size)
    windows = np.empty((len(rows), block_size + 1), dtype=np.int64)
    for window, row in zip(windows, rows, strict=True):
        start = row_start(starts, seed, step, row, stream)
        window[:] = tokens[start : start + block_size + 1]
        _check_ids(tokens, window, start, vocab_size)
    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def row_start(starts: int, seed: int, step: int, row: int, stream: int = TRAIN_STREAM) -> int:
    """A start in [0, starts) from a counter-based generator: to resume, nothing is replayed.
    Philox's key is (seed, stream), its counter (0, row, step, 0), 64 bits each."""
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    random = np.random.Philox(key=key, counter=np.array([0, row, step, 0], dtype=np.uint64))
    # 64 random bits: the remainder's bias is below starts / 2**64
    return int(random.random_raw()) % starts


class TokenWriter:
    """Appends ids to an open file of tokens; `count` ids are written so far."""

    def __init__(self, file: BinaryIO, name: str, n_vocab: int):
        self._file, self._name, self._n_vocab, self.count = file, name, n_vocab, 0

    def append(self, ids: Iterable[int]) -> None:
        """Write the ids. Raises UserError at the first that cannot be stored."""
        array = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, dtype=np.int64)
        wrong = np.flatnonzero((array < 0) | (array >= min(self._n_vocab, MAX_TOKEN_ID + 1)))
        if wrong.size:
            first, at = int(array[wrong[0]]), self.count + int(wrong[0])
            why = f"the tokenizer's ids are 0 to {self._n_vocab - 1}"
            if first > MAX_TOKEN_ID:
                most = f"uint16 holds ids up to {MAX_TOKEN_ID}"
                why = f"{most}; use a tokenizer with no more than those"
            what = f"token id {first} at position {at} cannot be written to {self._name}"
            raise UserError(f"{what}: {why}")
        self._file.write(array.astype(TOKEN_DTYPE).tobytes())
        # a disk that is full is noticed before any file of the dataset is replaced
        self._file.flush()
        self.count += array.size


@contextlib.contextmanager
def token_writer(path: str | Path, n_vocab: int) -> Iterator[TokenWriter]:
    """A TokenWriter whose file appears as `path` if the block ends well. UserError if empty."""
    with replacing(path) as file:
        writer = TokenWriter(file, str(path), n_vocab)
        yield writer
        if writer.count == 0:
            raise UserError(f"there are no tokens to write to {path}: the text is too short")


def write_tokens(path: str | Path, ids: Iterable[int], n_vocab: int) -> None:
    """Write a .bin file whole, or not at all. Raises UserError as TokenWriter does."""
    with token_writer(path, n_vocab) as writer:
        writer.append(ids)


@contextlib.contextmanager
def new_dataset(directory: Path, tokenizer: Tokenizer) -> Iterator[list[TokenWriter]]:
    """Writers of train.bin and val.bin. An earlier dataset goes when the new one is complete."""
    make_directory(directory)
    files = (token_writer(directory / name, tokenizer.n_vocab) for name in ("train.bin", "val.bin"))
    with next(files) as train, next(files) as val:
        yield [train, val]
        write_tokenizer(tokenizer, directory)


def make_directory(directory: Path) -> None:
    with as_user_error(f"make the directory {directory}"):
        directory.mkdir(parents=True, exist_ok=True)


def split_and_write(directory: Path, text: str, tokenizer: Tokenizer) -> None:
    """Write train.bin, val.bin (the text's last tenth) and tokenizer.json, and print the counts."""
    cut = int(len(text) * 0.9)
    if not 0 < cut < len(text):
        fault = f"a text of {len(text)} characters is too short to be split"
        raise UserError(f"{fault}: give a longer one")
    ids = tokenizer.encode_ordinary(text[:cut]), tokenizer.encode_ordinary(text[cut:])
    with new_dataset(directory, tokenizer) as (train, val):
        train.append(ids[0])
        val.append(ids[1])
    made = f"{len(text):,} characters; {tokenizer.kind} vocabulary of {tokenizer.n_vocab:,}"
    print(f"{directory}: {made}; train {train.count:,} tokens, val {val.count:,} tokens")


def _how_to_prepare(directory: Path) -> str:
    if (script := directory / "prepare.py").exists():
        return f"run `python {script}` first"
    such = "such as data/shakespeare_char/prepare.py makes"
    return f"a dataset is a directory with train.bin and val.bin, {such}"


def _known_beside(directory: Path) -> str:
    """'; there are: A, B': the datasets beside this one, for a mistyped name."""
    with contextlib.suppress(OSError):
        marks = ("prepare.py", "train.bin")
        near = sorted(directory.parent.iterdir())
        beside = [d.name for d in near if any((d / mark).exists() for mark in marks)]
        if beside:
            return f"; there are: {', '.join(beside)}"
    return ": make it, with train.bin and val.bin in it"


def _tokenizer_of_meta(path: Path) -> Tokenizer:
    """The vocabulary of nanoGPT's meta.pkl: {"itos": {0: "\\n", 1: " ", ...}, ...}. With vocab_size
    alone, which is all that nanoGPT's training needs, text is the ids."""
    try:
        meta = plain(read_small(path, MAX_META))
    except Refused as error:
        kinds = "only dict, str and int, list, tuple, float, bool and None are read from a pickle"
        raise UserError(f"{path} is refused: {error}; {kinds}. {META_WORKS}") from None
    meta = meta if isinstance(meta, dict) else {}
    itos, n_vocab = meta.get("itos"), meta.get("vocab_size")
    if "itos" not in meta and type(n_vocab) is int and 0 < n_vocab < 2**31:
        return IdsTokenizer(n_vocab)
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))):
        fault = 'has no character vocabulary: "itos" should map 0, 1, 2, ... to characters'
        raise UserError(f"{path} {fault}. {META_WORKS}")
    try:
        return CharTokenizer([itos[i] for i in range(len(itos))])
    except UserError as error:
        raise UserError(f"{path}: {error}. {META_WORKS}") from None

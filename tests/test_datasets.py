"""Token files, batches, and the scripts that prepare them."""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import UserError
from text import dataset as module
from text.dataset import Dataset, TokenFile, TokenWriter, batch, row_start, split_and_write, token_writer, write_tokens
from text.prepare import shakespeare_options
from text.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tokens(tmp_path) -> TokenFile:
    """1000 ids, id i at position i."""
    write_tokens(tmp_path / "train.bin", range(1000), 1000)
    return TokenFile(tmp_path / "train.bin")


def make_dataset(directory: Path, train=range(50), val=range(20)) -> Dataset:
    np.array(train, dtype="<u2").tofile(directory / "train.bin")
    np.array(val, dtype="<u2").tofile(directory / "val.bin")
    return Dataset(directory)


# --- files of tokens ---


def test_file_is_little_endian_uint16_without_header(tmp_path):
    write_tokens(tmp_path / "a.bin", [1, 258, 65535], 65536)
    assert (tmp_path / "a.bin").read_bytes() == b"\x01\x00\x02\x01\xff\xff"
    tokens = TokenFile(tmp_path / "a.bin")
    assert len(tokens) == 3 and tokens[1:].tolist() == [258, 65535] and tokens[:].dtype == np.uint16


@pytest.mark.parametrize("as_type", [list, iter, np.array, torch.tensor])
def test_ids_in_any_form(tmp_path, as_type):
    write_tokens(tmp_path / "a.bin", as_type([3, 1, 2]), 4)
    assert TokenFile(tmp_path / "a.bin")[:].tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("ids", "n_vocab", "message"),
    [
        ([1, 65536], 100_000, "token id 65536 at position 1 .*uint16 holds ids up to 65535"),
        ([-1], 100, "token id -1 at position 0 .*ids are 0 to 99"),
        ([5, 6, 100], 100, "token id 100 at position 2 .*ids are 0 to 99"),
        ([], 100, "no tokens"),
    ],
)
def test_ids_that_cannot_be_stored(tmp_path, ids, n_vocab, message):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old!")
    with pytest.raises(UserError, match=message):
        write_tokens(path, ids, n_vocab)
    assert path.read_bytes() == b"old!"
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_appending_is_as_writing_at_once(tmp_path):
    with token_writer(tmp_path / "a.bin", 10) as writer:
        writer.append([1, 2])
        writer.append(np.array([3], dtype=np.uint16))
        assert not (tmp_path / "a.bin").exists()
    assert writer.count == 3 and TokenFile(tmp_path / "a.bin")[:].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="position 2 "), token_writer(tmp_path / "a.bin", 10) as writer:
        writer.append([1])
        writer.append([2, 10])


def test_an_open_file_survives_being_replaced(tokens):
    write_tokens(tokens.path, [7], 8)
    assert tokens[998:].tolist() == [998, 999]


def test_an_open_file_that_gets_shorter_is_an_error(tokens):
    os.truncate(tokens.path, 1001)  # within a token
    assert tokens[:500].tolist() == list(range(500)) and tokens[3:3].tolist() == []
    with pytest.raises(UserError, match="train.bin has become shorter than its 1000 tokens since the run began"):
        tokens[490:510]


def test_an_earlier_dataset_is_there_until_there_is_another(tmp_path, monkeypatch):
    split_and_write(tmp_path, "abc" * 100, CharTokenizer(["a", "b", "c"]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    append, said = TokenWriter.append, []

    def full(writer, ids):
        said.append(writer)
        if len(said) == 2:
            raise OSError(28, "No space left on device")
        append(writer, ids)

    monkeypatch.setattr(TokenWriter, "append", full)
    with pytest.raises(UserError, match="val.bin: No space left on device"):
        split_and_write(tmp_path, "xyz" * 50, CharTokenizer(["x", "y", "z"]))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_writing_where_one_cannot(tmp_path):
    with pytest.raises(UserError, match="cannot write .*a.bin: No such file or directory"):
        write_tokens(tmp_path / "none" / "a.bin", [1], 2)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"abc", "odd size .3 bytes.")])
def test_broken_token_files(tmp_path, content, message):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"train.bin .*{message}"):
        TokenFile(tmp_path / "train.bin")


def random_ids(n=500, n_vocab=50257):
    return np.random.default_rng(0).integers(0, n_vocab, n)


@pytest.mark.parametrize("n_vocab", [50257, 256, 8])
@pytest.mark.parametrize("dtype", ["uint32", "int64", "int32", "uint64"])
def test_ids_of_another_width(tmp_path, dtype, n_vocab):
    """The message says how to turn them into uint16, and what it says works."""
    ids, path = random_ids(n_vocab=n_vocab).astype(dtype), tmp_path / "train.bin"
    ids.tofile(path)
    kind = {4: "uint32", 8: "int64"}[ids.itemsize]
    with pytest.raises(UserError, match=f"train.bin holds ids as {kind}, not as uint16: ") as error:
        TokenFile(path)
    how = str(error.value).partition("not as uint16: ")[2].removesuffix(" turns it into that")
    exec(how.replace("'train.bin'", repr(str(path))), {"np": np})
    assert np.array_equal(TokenFile(path)[:], ids)


def test_other_formats_under_the_name_of_a_token_file(tmp_path):
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        np.save(file, random_ids().astype("<u2"))
    with pytest.raises(UserError, match=r"train.bin has the header of a .npy file.*: np.load"):
        TokenFile(path)
    np.savez(tmp_path / "a.npz", random_ids())
    (tmp_path / "a.npz").rename(path)
    with pytest.raises(UserError, match="train.bin is an archive"):
        TokenFile(path)
    torch.save(torch.tensor(random_ids()), path)
    with pytest.raises(UserError, match="train.bin is an archive"):
        TokenFile(path)
    for text in ("Before we proceed any further, hear me speak.\n" * 20, "до того как мы начнём \r\n" * 4000):
        raw = text.encode()
        path.write_bytes(raw[: len(raw) // 2 * 2])
        with pytest.raises(UserError, match="train.bin is text, not token ids: a dataset is"):
            TokenFile(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(UserError, match="train.bin is a git-lfs pointer"):
        TokenFile(path)


@pytest.mark.parametrize("ids", [
    [0] * 100, [7, 0, 0, 0] * 4, [0] * 90 + [7] + [0] * 9, list(range(100)), [0, 7] * 50, [1] * 1000, [50256, 0, 0] * 50,
    random_ids(20_000), random_ids(20_000, 65), [0x2020] * 31, [1, 0, 2, 0] * 100, [1, 0, 0, 0, 2, 0, 0, 0] * 100,
], ids=str)  # fmt: skip
def test_ids_that_only_look_like_another_format(tmp_path, ids):
    write_tokens(tmp_path / "a.bin", list(ids), 65536)
    assert TokenFile(tmp_path / "a.bin")[:].tolist() == list(ids)


def test_missing_token_file_names_its_script(tmp_path):
    with pytest.raises(UserError, match="val.bin is missing: a dataset is a directory with"):
        TokenFile(tmp_path / "val.bin")
    (tmp_path / "prepare.py").touch()
    with pytest.raises(UserError, match=r"val.bin is missing: run `python .*prepare.py` first"):
        TokenFile(tmp_path / "val.bin")
    with pytest.raises(UserError, match="cannot read"):
        TokenFile(tmp_path)


# --- datasets ---


def test_missing_dataset_names_its_neighbours(tmp_path):
    (tmp_path / "poems").mkdir()
    with pytest.raises(UserError, match="no dataset directory .*peoms: make it"):
        Dataset(tmp_path / "peoms")
    (tmp_path / "poems" / "train.bin").touch()
    with pytest.raises(UserError, match="no dataset directory .*peoms; there are: poems"):
        Dataset(tmp_path / "peoms")


def test_tokenizer_beside_the_tokens(tmp_path):
    def kind():
        return Dataset(tmp_path).tokenizer.to_json()

    assert kind() == {"kind": "gpt2"}
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert kind() == {"kind": "char", "chars": ["a", "b"]}
    (tmp_path / "tokenizer.json").write_text('{"kind": "char", "chars": ["x"]}')
    assert kind() == {"kind": "char", "chars": ["x"]}


class Touch:
    """Unpickled by anyone careless, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("more", [["a"], 1.5, True, None, (1, 2), {"x": [1.5, (None, [True])]}])
def test_meta_with_other_data_beside_the_vocabulary(tmp_path, more):
    make_dataset(tmp_path, train=[0, 1] * 20, val=[0, 1] * 10)
    meta = {"itos": {0: "a", 1: "b"}, "more": more}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert Dataset(tmp_path).tokenizer.to_json() == {"kind": "char", "chars": ["a", "b"]}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "more": more}))
    dataset = Dataset(tmp_path)
    assert dataset.tokenizer.to_json() == {"kind": "ids", "n_vocab": 2}
    dataset.check(8, dataset.tokenizer.n_vocab)


@pytest.mark.parametrize("meta", [{"vocab_size": np.int64(5)}, {"vocab_size": 5, "itos": {0: "ab"}}, {"vocab_size": 5.0},
                                  {"vocab_size": 5, "itos": ["a"]}])  # fmt: skip
def test_meta_that_is_not_read_says_what_works(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=r'meta.pkl.*A meta.pkl of {"vocab_size": n} alone works.*tokenizer.json'):
        _ = Dataset(tmp_path).tokenizer
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 5}))
    assert Dataset(tmp_path).tokenizer.n_vocab == 5


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_meta_is_refused_and_not_run(tmp_path, protocol):
    made = tmp_path / "made"
    hostile = pickle.dumps({"itos": {0: "a"}, "more": Touch(made)}, protocol=protocol)
    pickle.loads(hostile)
    assert made.exists(), "the test's own pickle does nothing"
    made.unlink()
    (tmp_path / "meta.pkl").write_bytes(hostile)
    with pytest.raises(UserError, match="meta.pkl is refused: it names .*only dict, str and int"):
        _ = Dataset(tmp_path).tokenizer
    assert not made.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        pickle.dumps([1]),
        pickle.dumps({}),
        pickle.dumps({"itos": "ab"}),
        pickle.dumps({"itos": {0: "a", 2: "b"}}),
        pickle.dumps({"itos": {0: "a", 1: "bc"}}),
        pickle.dumps({"itos": {0: "a", 1: 7}}),
        b"\x80\x04Pid.",  # a persistent id
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"cos\nsystem\n(S'true'\ntR.",  # GLOBAL, REDUCE
    ],
)
def test_broken_meta_is_refused(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match="meta.pkl"):
        _ = Dataset(tmp_path).tokenizer


def test_check_passes_at_the_limits(tmp_path):
    make_dataset(tmp_path).check(block_size=19, vocab_size=50)


def test_check_finds_short_splits(tmp_path):
    with pytest.raises(UserError, match="val.bin holds 20 tokens, and block_size 20 needs at least 21"):
        make_dataset(tmp_path).check(block_size=20, vocab_size=50)


def test_check_finds_ids_outside_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SCAN_TOKENS", 8)  # so that the position is in the third part looked at
    dataset = make_dataset(tmp_path, val=[0] * 18 + [50, 99])
    with pytest.raises(UserError, match=r"val.bin: token id 50 at position 18 .*\(vocab_size 50\)"):
        dataset.check(block_size=4, vocab_size=50)
    dataset.check(block_size=4, vocab_size=100)


# --- batches ---


def test_targets_are_the_inputs_one_further(tokens):
    x, y = batch(tokens, range(6), block_size=16, seed=1337, step=3)
    assert x.shape == y.shape == (6, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(16))  # the file counts, so each row does
    assert torch.equal(y, x + 1)
    assert x.is_contiguous() and y.is_contiguous()


@pytest.mark.parametrize("ranks", [2, 3, 5, 12])
def test_rows_do_not_depend_on_how_they_are_dealt(tokens, ranks):
    whole = batch(tokens, range(12), 8, seed=1, step=5)
    dealt = [batch(tokens, range(12)[rank::ranks], 8, seed=1, step=5) for rank in range(ranks)]
    for full, part in zip(whole, zip(*dealt, strict=True), strict=True):
        for rank in range(ranks):
            assert torch.equal(full[rank::ranks], part[rank])
    assert batch(tokens, range(4, 4), 8, seed=1, step=5)[0].shape == (0, 8)


def test_row_start_depends_on_each_of_its_numbers():
    points = [
        (seed, step, row, stream)
        for seed in (0, 1, -1, 2**32 + 1)
        for step in (0, 1, 10**9)
        for row in (0, 1, 7)
        for stream in (0, 1)
    ]
    assert len({row_start(2**40, *point) for point in points}) == len(points)


def test_row_start_is_the_same_everywhere():
    """The first word of Philox 4x64-10 at counter (1, row, step, 0), key (1337, stream), as an implementation of
    Random123's definition in plain integers gave it; a change would silently change the data of every training run."""
    golden = {(0, 0): 720011, (0, 1): 141151, (1, 0): 283791, (10**9, 479): 743352}
    assert {(step, row): row_start(1_003_598, 1337, step, row) for step, row in golden} == golden


def test_row_start_is_uniform_and_reaches_both_ends(tmp_path):
    counts = np.bincount([row_start(10, 7, step, row) for step in range(100) for row in range(50)], minlength=10)
    assert len(counts) == 10 and abs(counts - 500).max() < 5 * (5000 * 0.1 * 0.9) ** 0.5
    write_tokens(tmp_path / "a.bin", range(6), 6)
    x, y = batch(TokenFile(tmp_path / "a.bin"), range(200), block_size=4, seed=0, step=0)
    assert set(x[:, 0].tolist()) == {0, 1} and y.max() == 5


def test_batch_of_a_file_that_is_just_long_enough(tmp_path):
    write_tokens(tmp_path / "a.bin", range(5), 6)
    tokens = TokenFile(tmp_path / "a.bin")
    assert batch(tokens, range(1), block_size=4, seed=0, step=0)[1].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(UserError, match="holds 5 tokens, and block_size 5 needs at least 6"):
        batch(tokens, range(1), block_size=5, seed=0, step=0)


# --- preparing ---


def test_split_and_write(tmp_path, capsys):
    text = "the quick brown fox " * 10
    split_and_write(tmp_path / "made" / "here", text, CharTokenizer.of_text(text))
    dataset = Dataset(tmp_path / "made" / "here")
    assert dataset.tokenizer.decode(dataset.train[:]) == text[:180]
    assert dataset.tokenizer.decode(dataset.val[:]) == text[180:]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "train 180 tokens, val 20 tokens" in out
    with pytest.raises(UserError, match="1 characters is too short"):
        split_and_write(tmp_path, "a", CharTokenizer(["a"]))


def prepare(name: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    """Run data/NAME/prepare.py from elsewhere, with a network that answers nothing."""
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "HTTPS_PROXY": nowhere, "https_proxy": nowhere, "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "", "no_proxy": ""}
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), f"--out={tmp_path / 'out'}", *options]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)


def prepared(result: subprocess.CompletedProcess, tmp_path: Path) -> tuple[Dataset, str]:
    """The dataset and its whole text."""
    assert result.returncode == 0, result.stderr
    dataset = Dataset(tmp_path / "out")
    return dataset, "".join(dataset.tokenizer.decode(split[:]) for split in (dataset.train, dataset.val))


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_prepare_shakespeare(tmp_path, name):
    text = "First Citizen:\r\nBefore we proceed — “hear me” 😀\n" * 20
    (tmp_path / "in.txt").write_bytes(text.encode())
    dataset, written = prepared(prepare(name, tmp_path, "--input=in.txt"), tmp_path)
    assert written == text.replace("\r\n", "\n")  # as nanoGPT reads it
    assert dataset.tokenizer.kind == {"shakespeare_char": "char", "shakespeare": "gpt2"}[name]


def test_prepare_python_docs(tmp_path):
    dataset, written = prepared(prepare("python_docs", tmp_path), tmp_path)
    assert dataset.tokenizer.kind == "char"
    assert len(written) > 300_000 and 'The "assert" statement' in written


@pytest.mark.skipif(find_spec("datasets") is None, reason="needs the datasets package")
def test_prepare_openwebtext_from_a_local_file(tmp_path):
    texts = [f"Document {i}: 😀 <|endoftext|>" for i in range(30)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    result = prepare("openwebtext", tmp_path, "--input=in.jsonl", "--num_proc=1")
    dataset, _ = prepared(result, tmp_path)
    documents = np.split(ids := np.concatenate([dataset.train[:], dataset.val[:]]), np.flatnonzero(ids == 50256) + 1)
    assert documents.pop().size == 0  # each document ends with the end-of-text token, the last one too
    assert sorted(dataset.tokenizer.decode(ids[:-1]) for ids in documents) == sorted(texts)
    assert (dataset.val[:] == 50256).sum() == 1


def test_prepare_uses_an_earlier_download(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "input.txt").write_text("kept from before")
    assert prepared(prepare("shakespeare_char", tmp_path), tmp_path)[1] == "kept from before"


def test_a_home_directory_in_the_options_of_a_prepare_script(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out=~/x", "--input=~/in.txt"])
    options = shakespeare_options("", __file__)
    assert (str(options.out), str(options.input)) == ("/home/ada/x", "/home/ada/in.txt")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, ["--input=none.txt"], "cannot read none.txt: No such file or directory"),
        (b"", ["--input=in.txt"], "in.txt is empty"),
        (b"abc\xffdef", ["--input=in.txt"], "in.txt is not UTF-8 text (byte 3 "),
        (None, [], "pass a text with --input=FILE"),
    ],
)
def test_prepare_ends_in_one_line(tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    result = prepare("shakespeare_char", tmp_path, *options)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_id_beyond_the_part_checked_before_a_run_is_found_when_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("text.dataset.CHECKED_TOKENS", 16)
    monkeypatch.setattr("text.dataset.SCAN_TOKENS", 16)
    ids = np.zeros(100, dtype="<u2")
    ids[90] = 7
    for name in ("train.bin", "val.bin"):
        ids.tofile(tmp_path / name)
    dataset = Dataset(tmp_path)
    dataset.check(8, 5)  # the first tokens are fine
    with pytest.raises(UserError, match=r"token id 7 at position 90 is outside the model's vocabulary \(vocab_size 5\)"):
        batch(dataset.train, range(64), 8, 0, 0, vocab_size=5)

"""Tokenizers of Hugging Face directories: transformers' ids and text, through split, merge and a pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_sample_tp import alone, sample
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline

import shard_checkpoint
from base.errors import UserError
from checkpoints.sources import open_source, tokenizer_of
from inference.output import stop_token
from text.hf_tokenizer import FILES, HFTokenizer, hf_files, tokenizer_files
from text.tokenizer import CharTokenizer, GPT2Tokenizer, tokenizer_from_json
from world.mesh import World

TEXTS = (
    "Der Zug fährt über die Brücke.\n\n<|user|> Wohin?  ", "a", " naïve 日本語 🙂\t!", "<|endoftext|>x<sep>y  <sep> z",
    "12 345",
)
LEARNED = ["Der Zug fährt über die Brücke, und über den Fluss.", "Wohin fährt der Zug? 12 345", "日本語 🙂 naïve"] * 20


def bpe() -> Any:
    """A byte-level BPE of its own, with a special and two ordinary added tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(LEARNED, trainer)
    made.add_tokens(["<sep>", AddedToken("<|user|>", lstrip=True)])
    return made


def with_bos() -> Any:
    made = bpe()
    made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return made


def unigram() -> Any:
    """No byte-level one: spaces are a sign of their own, and a character may be several bytes' tokens."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "<|endoftext|>"], unk_token="<unk>")
    made.train_from_iterator(LEARNED, trainer)
    return made


KINDS = {"bpe": bpe, "bos": with_bos, "unigram": unigram}


def lay_out(directory: Path, kind: str) -> Any:
    """A model with this tokenizer, as transformers saves them."""
    made = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    made.save_pretrained(directory)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_positions": 48}
    ends = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(made) + 5, **sizes, **ends)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
        model.transformer.wte.weight[len(made) :] = 0  # rows that stand for no token
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    lay_out(directory, request.param)
    return directory


def check_alike(ours: Any, theirs: Any) -> None:
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)


def test_ids_and_text_are_transformers(saved: Path) -> None:
    ours, theirs = tokenizer_of(open_source(str(saved))), AutoTokenizer.from_pretrained(saved)
    assert (ours.kind, ours.eot, ours.n_vocab) == ("hf", theirs.eos_token_id, len(theirs))
    check_alike(ours, theirs)
    assert ours.encode_ordinary("<|endoftext|>") != [ours.eot]  # a document's text is text


def test_vocab_and_merges_alone(tmp_path: Path) -> None:
    """As older directories have it: the files of a GPT2Tokenizer, tokens added later beside them."""
    made = bpe()
    made.model.save(str(tmp_path))
    known = made.get_vocab_size(with_added_tokens=False)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<sep>": known, "<|user|>": known + 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    ours, theirs = HFTokenizer(tokenizer_files(tmp_path), "here"), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eot == theirs.eos_token_id == 0
    check_alike(ours, theirs)


def test_split_merge_and_a_pipeline_of_the_result(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, again = tmp_path / "shards", tmp_path / "again"
    assert shard_checkpoint.main(["split", f"--init_from={saved}", "--tp=2", f"--out={shards}"]) == 0
    assert shard_checkpoint.main(["merge", f"--shards={shards}", f"--out={again}"]) == 0
    to_nanogpt = ["merge", f"--shards={shards}", f"--out={tmp_path / 'ckpt.pt'}", "--format=nanogpt"]
    assert shard_checkpoint.main(to_nanogpt) == 0
    assert "note: nanoGPT reads no Hugging Face tokenizer: its text will be GPT-2's tokens." in capsys.readouterr().out
    for name in FILES:
        if (saved / name).exists():
            assert (again / name).read_bytes() == (saved / name).read_bytes(), name
    texts = []
    for directory in (saved, again):
        write = pipeline("text-generation", model=str(directory), device="cpu")
        texts.append(write("Der Zug", max_new_tokens=12, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1] and len(texts[0]) > len("Der Zug")
    first, last = (json.loads((directory / "config.json").read_text()) for directory in (saved, again))
    assert all(first.get(name) == last.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"))


def test_gpt2s_and_characters_as_hugging_faces_files(tmp_path: Path) -> None:
    pairs: list[tuple[Any, Any]] = [(GPT2Tokenizer(), TEXTS), (CharTokenizer.of_text("ab é\n"), ["a\nb é", "  b"])]
    for ours, texts in pairs:
        directory = tmp_path / ours.kind
        directory.mkdir()
        for name, text in hf_files(ours).items():
            (directory / name).write_text(text)
        theirs = AutoTokenizer.from_pretrained(directory)
        for text in texts:
            ids = ours.encode(text)
            assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == ours.decode(ids)
        assert theirs.eos_token_id == ours.eot


def test_a_vocabulary_as_large_as_gpt2s_is_not_taken_for_it(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(vocab_size=50260, **sizes)).save_pretrained(tmp_path)
    found = tokenizer_of(open_source(str(tmp_path)))
    assert found.kind == "ids" and "--tokenizer=DIR names a directory with its tokenizer.json" in found.note
    assert tokenizer_of(open_source(str(tmp_path)), "gpt2").kind == "gpt2"


# --- what is no tokenizer -------------------------------------------------------------------------------------------

BAD: dict[str, Any] = {
    "no JSON": "{", "a list": "[]", "nothing": "{}", "nested": "[" * 5000, "twice": '{"model": 1, "model": 2}',
    "another model": '{"model": {"type": "WordPiece", "vocab": 5}}', "not UTF-8": b"\xff\xfe",
    "ids of no size": json.dumps({"model": {"type": "BPE", "vocab": {"a": 2**70}, "merges": []}}),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_tokenizer_is_refused_by_one_line(what: str, tmp_path: Path) -> None:
    content = BAD[what]
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        HFTokenizer(tokenizer_files(tmp_path), str(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("files", [{"../evil": ""}, {"tokenizer.json": 5}, {}, {"vocab.json": "{}"}], ids=str)
def test_files_that_are_none_of_a_tokenizers(files: Any) -> None:
    with pytest.raises(UserError, match="^shards: "):
        tokenizer_from_json({"kind": "hf", "files": files}, "shards:")


def test_ids_beyond_the_models_rows_are_refused(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(vocab_size=9, **sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^the tokenizer \(hf\) knows \d+ ids, the model's vocab_size is 9"):
        tokenizer_of(open_source(str(tmp_path)))


# --- text -----------------------------------------------------------------------------------------------------------


def _written(world: World, saved: Path, *words: str) -> str:
    return sample(world, saved, "--prompt=Der Zug <|user|>", "--temperature=0", "--max_new_tokens=12", *words)[0]


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_greedy_text_is_transformers_with_and_without_an_end(saved: Path, tp: int) -> None:
    theirs, model = AutoTokenizer.from_pretrained(saved), GPT2LMHeadModel.from_pretrained(saved)
    idx = theirs("Der Zug <|user|>", return_tensors="pt")["input_ids"]
    fixed: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": idx * 0 + 1}
    made = model.generate(idx, **fixed, eos_token_id=None)[0, idx.shape[1] :].tolist()
    text = "Der Zug <|user|>" + theirs.decode(made)
    assert run_ranks(tp, _written, saved)[0] == f"{text}\n---------------\n"
    end = made[5]
    until = model.generate(idx, **fixed, eos_token_id=end)[0, idx.shape[1] :].tolist()
    assert len(until) < 12
    ended = "Der Zug <|user|>" + theirs.decode(until[:-1])  # the token itself is no text
    assert run_ranks(tp, _written, saved, f"--stop_token={end}")[0] == f"{ended}\n---------------\n"


@pytest.mark.parametrize("choice", ["end", "-1", "99999", "1.5"])
def test_a_stop_token_that_is_none(saved: Path, choice: str) -> None:
    with pytest.raises(UserError, match=f"--stop_token={choice} is neither eos nor an id below"):
        sample(alone(), saved, f"--stop_token={choice}")
    with pytest.raises(UserError, match="the tokenizer has no token that ends a text"):
        stop_token(CharTokenizer(["a"]), "eos")

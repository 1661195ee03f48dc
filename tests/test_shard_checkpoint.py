"""shard_checkpoint.py as a command: what merge gives back to transformers and nanoGPT, and how the command behaves."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from test_shards import CONFIG, digests, write
from test_sources import gpt2, nanogpt
from torch import Tensor
from transformers import GPT2LMHeadModel

from base.errors import UserError
from checkpoints.convert import write_hf
from checkpoints.shards import ShardSource
from checkpoints.sources import open_source
from checkpoints.tensor_file import TensorFile
from model import GPT, GPTConfig
from plan.partition import Partition
from shard_checkpoint import main
from text.tokenizer import GPT2Tokenizer

ROOT = Path(__file__).parent.parent


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def one_line(capsys: Any, *words: Any) -> str:
    """The only line that a command which fails says, without the program's name."""
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return cast(str, said.err).removeprefix("shard_checkpoint.py: ").rstrip("\n")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What transformers warns of: it loads over a missing tensor with no more than a warning."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def from_pretrained(path: Path) -> GPT2LMHeadModel:
    """transformers' model, loaded with no key missing, left over or of another shape."""
    model, info = GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


# --- merge: back to transformers and nanoGPT ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_to_shards_and_back(tmp_path: Path, warnings: list[str], dtype: torch.dtype) -> None:
    """Every bit of every tensor, the same logits, and a file like the one that transformers saved."""
    original = gpt2(dtype=dtype).eval()
    original.save_pretrained(tmp_path / "hf")
    assert run("split", "--init_from", tmp_path / "hf", "--tp=3", "--out", tmp_path / "shards") == 0
    assert run("merge", "--shards", tmp_path / "shards", "--out", tmp_path / "again", "--format=hf") == 0
    again = from_pretrained(tmp_path / "again")
    assert warnings == []
    assert again.dtype == dtype and again.config.activation_function == "gelu_new"
    expected = original.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    ids = torch.randint(131, (2, 16))
    assert torch.equal(again(ids).logits, original(ids).logits)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert theirs.keys() == ours.keys() and all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def test_half_precision_on_the_way(tmp_path: Path) -> None:
    original = gpt2()
    original.save_pretrained(tmp_path / "hf")
    assert run("split", f"--init_from={tmp_path / 'hf'}", "--tp=2", f"--out={tmp_path / 's'}", "--dtype=bfloat16") == 0
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 'again'}") == 0
    again = from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name].to(tensor.dtype)) for name, tensor in original.bfloat16().state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_to_transformers(tmp_path: Path, warnings: list[str], bias: bool) -> None:
    """nanoGPT's own models compute the exact GELU and may have no biases: transformers must compute the same."""
    config = replace(CONFIG, bias=bias)
    model = GPT(config, seed=4).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # far enough from 0 for the two GELUs to differ
    torch.save(nanogpt(config, model=model.state_dict()), tmp_path / "ckpt.pt")
    assert run("split", f"--init_from={tmp_path / 'ckpt.pt'}", "--tp=4", f"--out={tmp_path / 's'}") == 0
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 'hf'}") == 0
    theirs = from_pretrained(tmp_path / "hf")
    assert warnings == [] and theirs.config.activation_function == "gelu"
    ids = torch.randint(131, (2, 16))
    with torch.no_grad():
        expected, _ = model(ids, ids)
        found = theirs(ids).logits
        tanh, _ = with_activation(model, "gelu_tanh")(ids, ids)
    assert (found - expected).abs().max() < 1e-5
    assert (found - tanh).abs().max() > 1e-4  # so that the line above tells one from the other


def with_activation(model: GPT, activation: str) -> GPT:
    other = GPT(replace(model.config, activation=activation)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_to_shards_and_back(tmp_path: Path, bias: bool) -> None:
    """The keys that nanoGPT's `GPT(GPTConfig(**checkpoint["model_args"])).load_state_dict(checkpoint["model"])` takes."""
    config = replace(CONFIG, bias=bias, dropout=0.1)
    raw = nanogpt(config)
    torch.save(raw, tmp_path / "ckpt.pt")
    assert run("split", f"--init_from={tmp_path / 'ckpt.pt'}", "--tp=3", f"--out={tmp_path / 's'}") == 0
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 'a' / 'b' / 'again.pt'}", "--format=nanogpt") == 0
    again = torch.load(tmp_path / "a" / "b" / "again.pt", weights_only=True)
    assert again["model"].keys() == raw["model"].keys()
    assert all(torch.equal(tensor, raw["model"][name]) for name, tensor in again["model"].items())
    assert again["model"]["lm_head.weight"].data_ptr() == again["model"]["transformer.wte.weight"].data_ptr()
    assert again["model_args"] == raw["model_args"]
    assert set(again["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert again.keys() == {"model", "model_args", "iter_num", "best_val_loss", "config"}
    stored = sum(tensor.nbytes for name, tensor in again["model"].items() if name != "lm_head.weight")
    assert (tmp_path / "a" / "b" / "again.pt").stat().st_size < stored + 20_000  # views would drag whole storages along


def test_the_activation_survives_nanogpts_format(tmp_path: Path, capsys: Any) -> None:
    """nanoGPT has no word for it, so the user is told; our own reader finds it."""
    gpt2().save_pretrained(tmp_path / "hf")
    assert run("split", f"--init_from={tmp_path / 'hf'}", "--tp=2", f"--out={tmp_path / 's'}") == 0
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 'x.pt'}", "--format=nanogpt") == 0
    assert "note: these weights use the tanh approximation of GELU; nanoGPT computes the exact one." in capsys.readouterr().out
    source = open_source(str(tmp_path / "x.pt"))
    assert source.config.activation == "gelu_tanh"
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 'again'}") == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["activation_function"] == "gelu_new"


def test_gpt2s_end_of_text_is_named(tmp_path: Path) -> None:
    config, made = GPTConfig(16, 50257, 1, 1, 4), tmp_path / "made"
    made.mkdir()
    write_hf(config, torch.float32, GPT(config).get_parameter, made, GPT2Tokenizer())
    for name in ("config.json", "generation_config.json"):
        assert json.loads((made / name).read_text())["eos_token_id"] == 50256



# --- what the commands say ------------------------------------------------------------------------------------------


def test_split_verify_inspect_merge(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the dataset that the checkpoint names has not been prepared
    torch.save(nanogpt(), tmp_path / "ckpt.pt")
    assert run("split", f"--init_from={tmp_path / 'ckpt.pt'}", "--tp=2", f"--out={tmp_path / 's'}") == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 's'}: {tmp_path / 'ckpt.pt'} in 2 shards of 31.3 KB, 28.6 KB (float32)\n"
        "tp=2 over 5 heads: 3,2 (busiest rank does 20% more attention than an even split).\n"
        f"{tmp_path / 'ckpt.pt'} was trained on the dataset shakespeare_char, which is not in data: text is token ids. "
        "--tokenizer=DIR names its directory.\n"
    )
    assert json.loads((tmp_path / "s" / "tokenizer.json").read_text()) == {"kind": "ids", "n_vocab": 131}
    sizes = [(tmp_path / "s" / f"rank-0{rank}-of-02.safetensors").stat().st_size for rank in range(2)]
    assert run("verify", f"--shards={tmp_path / 's'}") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"rank-00-of-02.safetensors  {sizes[0]:>13,} bytes  sha256 ok",
        f"rank-01-of-02.safetensors  {sizes[1]:>13,} bytes  sha256 ok",
        f"{tmp_path / 's'}: whole: 2 files, 28 tensors, {sum(sizes):,} bytes",
    ]
    assert run("inspect", f"--shards={tmp_path / 's'}") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    split = Partition.of(CONFIG, 2)
    assert lines[3] == ["0", "0-2", "0-39", "0-65", f"{split.count(0):,}", f"{sizes[0]:,}"]
    assert lines[4] == ["1", "3-4", "40-79", "66-130", f"{split.count(1):,}", f"{sizes[1]:,}"]
    assert ["transformer.h.1.attn.c_attn.weight", "60", "x", "20", "dim", "0"] in lines
    assert ["transformer.wpe.weight", "16", "x", "20", "replicated"] in lines
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 'hf'}") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}: {tmp_path / 'ckpt.pt'}, merged from 2 shards (hf)\n"


@pytest.mark.parametrize("to", ["hf", "nanogpt"])
def test_the_tokenizer_goes_with_the_weights(tmp_path: Path, capsys: Any, to: str) -> None:
    """From a dataset's meta.pkl into shards, into another format and back; transformers reads what carries it."""
    itos = dict(enumerate(map(chr, range(40, 171))))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 131, "itos": itos}))
    torch.save(nanogpt(), tmp_path / "ckpt.pt")
    words = [f"--init_from={tmp_path / 'ckpt.pt'}", "--tp=2", f"--tokenizer={tmp_path / 'data'}"]
    assert run("split", *words, f"--out={tmp_path / 's'}") == 0
    assert "trained on the dataset" not in capsys.readouterr().out
    merged = tmp_path / ("hf" if to == "hf" else "merged.pt")
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={merged}", f"--format={to}") == 0
    assert run("split", f"--init_from={merged}", "--tp=3", f"--out={tmp_path / 'again'}") == 0
    known = {"kind": "char", "chars": list(itos.values())}
    for name in ("s", "again"):
        assert json.loads((tmp_path / name / "tokenizer.json").read_text()) == known
    if to == "hf":
        _, told = GPT2LMHeadModel.from_pretrained(merged, output_loading_info=True)
        assert not any(told.values())


def test_a_tokenizer_that_does_not_belong_is_not_written(tmp_path: Path, capsys: Any) -> None:
    torch.save(nanogpt(), tmp_path / "ckpt.pt")
    assert run("split", f"--init_from={tmp_path / 'ckpt.pt'}", f"--out={tmp_path / 's'}", "--tokenizer=gpt2") == 2
    assert "the tokenizer (gpt2) knows 50257 ids, the model's vocab_size is 131" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_imbalance() -> None:
    def note(n_head: int, tp: int) -> str:
        return Partition(1, n_head, 4 * n_head, 100, 8, True, tp).imbalance()

    assert note(25, 4) == "tp=4 over 25 heads: 7,6,6,6 (busiest rank does 12% more attention than an even split)."
    assert note(25, 8).startswith("tp=8 over 25 heads: 4,3,3,3,3,3,3,3 (busiest rank does 28% more")
    assert note(25, 5) == note(12, 4) == note(3, 1) == ""


def test_help(capsys: Any) -> None:
    for words in (["--help"], ["split", "--help"], ["merge", "-h"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("usage: python shard_checkpoint.py")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "shard_checkpoint.py needs a command: split, merge, verify or inspect"),
        (["splt"], "unknown command 'splt'. Did you mean split?"),
        (["split", "--init_form=gpt2"], "unknown option --init_form. Did you mean --init_from?"),
        (["split", "--init_from=gpt2"], "--out is required"),
        (["split", "--init_from=gpt2", "--out=x", "--tp=two"], "--tp expects a whole number, got 'two'"),
        (["split", "--init_from=gpt2", "--out=x", "--tp=0"], "--tp must be at least 1, got 0"),
        (["merge", "--shards=x", "--out=y", "--format=gguf"], "--format must be hf or nanogpt, got 'gguf'"),
        (["verify", "--shards=/nowhere"], "/nowhere is not a shard directory: it has no shards.json."),
        (["split", "--init_from=/nowhere", "--out=/nowhere/x"], "--init_from=/nowhere is neither a file, a directory nor"),
    ],
)
def test_mistakes(capsys: Any, words: list[str], message: str) -> None:
    assert one_line(capsys, *words).startswith(message)


def test_more_ranks_than_heads(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    said = one_line(capsys, "split", f"--init_from={tmp_path / 's'}", "--tp=6", f"--out={tmp_path / 'out'}")
    assert said.startswith("tp=6 is more than n_head=5: some ranks would hold no head. Use a tp between 1 and 5")
    assert not (tmp_path / "out").exists()


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run("verify", "--shards=/nowhere", "--debug=True")


# --- what is replaced, and what is not ------------------------------------------------------------------------------


def test_an_existing_directory_is_replaced_only_by_force(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    write(tmp_path / "old", 3, seed=1)
    old = digests(tmp_path / "old")
    words = ["split", f"--init_from={tmp_path / 's'}", "--tp=1", f"--out={tmp_path / 'old'}"]
    assert one_line(capsys, *words) == f"{tmp_path / 'old'} exists. Choose another place, or replace it with --force."
    assert digests(tmp_path / "old") == old
    assert run(*words, "--force") == 0
    assert ShardSource(tmp_path / "old", verify=(0, 1)).manifest.tp == 1


@pytest.mark.parametrize("kind", ["hf", "notes", "nested", "a file", "training", "shards and more"])
def test_what_is_not_shards_is_never_replaced(tmp_path: Path, capsys: Any, kind: str) -> None:
    write(tmp_path / "s", 2)
    place = tmp_path / "place"
    if kind == "hf":
        gpt2().save_pretrained(place)
    elif kind == "a file":
        place.write_text("mine")
    elif kind == "nested":  # a directory that bears the name of one of our files
        (place / "shards.json" / "precious").mkdir(parents=True)
    elif kind == "training":
        write(place / "step-000100", 2)
        (place / "latest").write_text("step-000100")
    elif kind == "shards and more":
        write(place, 2)
        (place / "README.md").write_text("mine")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    before = digests(tmp_path)
    capsys.readouterr()  # what transformers says while it saves
    for words in (
        ["split", f"--init_from={tmp_path / 's'}", "--tp=1", f"--out={place}", "--force"],
        ["merge", f"--shards={tmp_path / 's'}", f"--out={place}", "--format=hf", "--force"],
    ):
        if kind == "hf":
            (place / "README.md").write_text("mine")  # without it, merge may replace what it could have written
            before = digests(tmp_path)
        assert one_line(capsys, *words).endswith("not replaced, even with --force.")
        assert digests(tmp_path) == before
    if place.is_dir():
        said = one_line(capsys, "merge", f"--shards={tmp_path / 's'}", f"--out={place}", "--format=nanogpt", "--force")
        assert said == f"{place} is a directory: name the file to write, such as --out={place / 'ckpt.pt'}"
        assert digests(tmp_path) == before


def test_merged_files_are_replaced_by_force(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    for form, out in (("hf", tmp_path / "hf"), ("nanogpt", tmp_path / "ckpt.pt")):
        words = ["merge", f"--shards={tmp_path / 's'}", f"--out={out}", f"--format={form}"]
        assert run(*words) == 0
        capsys.readouterr()
        assert one_line(capsys, *words) == f"{out} exists. Choose another place, or replace it with --force."
        assert run(*words, "--force") == 0
        assert open_source(str(out)).config == CONFIG
        capsys.readouterr()
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "hf", "s"]


def test_a_directory_split_onto_itself(tmp_path: Path) -> None:
    """In place, at another tp: the files it is read from stand until the new ones do."""
    weights = write(tmp_path / "s", 2)
    for tp in (3, 5, 5):
        assert run("split", f"--init_from={tmp_path / 's'}", f"--tp={tp}", f"--out={tmp_path / 's'}", "--force") == 0
        source = ShardSource(tmp_path / "s", verify=(0, 1))
        assert source.manifest.tp == tp
        assert all(torch.equal(source.read(name, None, ()), full) for name, full in weights.full.items())
    assert os.listdir(tmp_path) == ["s"]


def test_a_directory_merged_onto_itself(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    before = digests(tmp_path)
    for form in ("hf", "nanogpt"):
        one_line(capsys, "merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 's'}", f"--format={form}", "--force")
        assert digests(tmp_path) == before


@pytest.mark.parametrize("out", ["new", "new/", "./new/.", "a/b/c", "link/new", "~/new"])
def test_spellings_of_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    write(tmp_path / "s", 2)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "real"))
    assert run("split", "--init_from=s", "--tp=1", f"--out={out}") == 0
    assert run("verify", f"--shards={out}") == 0
    assert not (tmp_path / "~").exists()
    assert not list(tmp_path.rglob(".*"))  # nothing temporary is left


def test_the_place_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "exists" in one_line(capsys, "split", "--init_from=../s", "--tp=3", "--out=.")
    assert run("split", "--init_from=../s", "--tp=3", "--out=.", "--force") == 0
    monkeypatch.chdir(tmp_path)
    assert ShardSource(tmp_path / "here", verify=(0, 1)).manifest.tp == 3


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "s", 2)
    write(tmp_path / "real", 3)
    (tmp_path / "link").symlink_to("real")
    assert run("split", f"--init_from={tmp_path / 's'}", "--tp=1", f"--out={tmp_path / 'link'}", "--force") == 0
    assert (tmp_path / "link").is_symlink() and ShardSource(tmp_path / "real").manifest.tp == 1


def test_a_place_that_cannot_be(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    (tmp_path / "file").write_text("mine")
    assert run("split", f"--init_from={tmp_path / 's'}", "--tp=1", f"--out={tmp_path / 'file' / 'x'}") == 1
    assert capsys.readouterr().err in [
        f"shard_checkpoint.py: {tmp_path / 'file'}: {why}\n" for why in ("File exists", "Not a directory")
    ]
    assert (tmp_path / "file").read_text() == "mine"


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    calls = iter(range(100))

    def interrupted(self: TensorFile, name: str, tensor: Tensor) -> None:
        if next(calls) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(TensorFile, "write", interrupted)
    assert run("split", f"--init_from={tmp_path / 's'}", "--tp=1", f"--out={tmp_path / 'out'}") == 130
    assert capsys.readouterr().err == "shard_checkpoint.py: stopped by Ctrl-C\n"
    assert os.listdir(tmp_path) == ["s"]


# --- the terminal ---------------------------------------------------------------------------------------------------


def test_progress_is_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write(tmp_path / "s", 2)
    assert run("split", f"--init_from={tmp_path / 's'}", "--tp=1", f"--out={tmp_path / 'a'}") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("split", f"--init_from={tmp_path / 's'}", "--tp=1", f"--out={tmp_path / 'b'}") == 0
    bar = capsys.readouterr().err
    assert "split: 100%" in bar and "B/s" in bar
    assert run("merge", f"--shards={tmp_path / 's'}", f"--out={tmp_path / 'c'}") == 0
    assert "merge: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_reader_who_has_seen_enough(tmp_path: Path, command: str) -> None:
    """`inspect | head`: no complaint, and the status of a program that SIGPIPE ended."""
    write(tmp_path / "s", 2)
    line = f"{sys.executable} shard_checkpoint.py {command} --shards={tmp_path / 's'} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run([shutil.which("bash") or "bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_module_is_quiet_when_imported(tmp_path: Path, capsys: Any) -> None:
    assert run("inspect", f"--shards={write_and_name(tmp_path)}") == 0
    assert capsys.readouterr().err == ""


def write_and_name(tmp_path: Path) -> Path:
    write(tmp_path / "s", 1)
    return tmp_path / "s"

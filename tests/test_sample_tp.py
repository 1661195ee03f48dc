"""sample_tp.py: what it prints, keeps and reports, and the mistakes it names."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import sample_tp
from base.errors import UserError
from cli.grammar import parse
from cli.options import SampleOptions
from inference import output
from inference.prompts import read_prompts
from parallel.collectives import Axis
from parallel.ledger import Ledger
from text.tokenizer import GPT2Tokenizer
from world.mesh import World

ROOT = Path(__file__).parent.parent
LINE = "\n---------------\n"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in Hugging Face format, as transformers saves it: GPT-2's vocabulary, a context of 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_head=3, n_embd=24, n_layer=2, n_positions=32))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 0, 0.05 if "bias" in name else 1.0 if "ln_" in name or "wpe" in name else 0.3)
    directory = tmp_path_factory.mktemp("weights")
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"nanotp_tokenizer": {"kind": "gpt2"}}))
    return directory


@pytest.fixture(scope="session")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 257 ids that no tokenizer is known for."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("unknown")
    GPT2LMHeadModel(GPT2Config(n_head=3, n_embd=24, n_layer=1, n_positions=32, vocab_size=257)).save_pretrained(directory)
    return directory


def alone() -> World:
    """The world of plain python: one rank."""
    ledger = Ledger()
    return World(0, 1, torch.device("cpu"), "none", Axis("tp", ledger=ledger), Axis("dp", ledger=ledger), ledger)


class Pieces(io.StringIO):
    """Standard output that remembers what was written between two flushes: what a user sees appear at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def flush(self) -> None:
        seen = self.getvalue()[len("".join(self.pieces)) :]
        if seen:
            self.pieces.append(seen)


def sample(world: World, weights: Path, *words: str) -> tuple[str, str, list[str]]:
    """(standard output, standard error, the pieces in which the former came) of one rank of a run."""
    options = parse(SampleOptions, [f"--init_from={weights}", "--device=cpu", "--max_new_tokens=8", *words], "sample_tp.py")
    out, err = Pieces(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        sample_tp.main(world, options)
        sys.stdout.flush()
    return out.getvalue(), err.getvalue(), out.pieces


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


MANY = ("--prompt=One", "--prompt=Two two two", "--prompt=語", "--num_samples=2")


def test_standard_output_is_the_samples_in_order(weights: Path, tmp_path: Path) -> None:
    out, err, _ = sample(alone(), weights, *MANY, f"--out={tmp_path / 'o.jsonl'}", f"--report={tmp_path / 'r.json'}")
    kept, report = lines_of(tmp_path / "o.jsonl"), json.loads((tmp_path / "r.json").read_text())
    assert [(line["prompt"], line["sample"]) for line in kept] == [(p, i) for p in ("One", "Two two two", "語") for i in (0, 1)]
    assert out == "".join(line["prompt"] + line["text"] + LINE for line in kept)
    assert len({line["text"] for line in kept}) == 6
    tokenizer = GPT2Tokenizer()
    for line, row in zip(kept, report["samples"], strict=True):
        assert len(line["tokens"]) == 8 and line["text"] == tokenizer.decode(line["tokens"])
        prompt_tokens = tokenizer.encode(line["prompt"])
        assert row == {key: line[key] for key in ("prompt", "tokens", "text")} | {"prompt_tokens": prompt_tokens}
    assert "sample_tp: world 1" in err and "tokens/s after a prefill of" in err


def a_stop_text(weights: Path) -> str:
    """The last character of the first row's third token and the first of its fourth."""
    tokenizer = GPT2Tokenizer()
    first = sample(alone(), weights, *MANY)[0].split(LINE)[0].removeprefix("One")
    tokens = tokenizer.encode(first)
    assert len(tokens) >= 4
    return tokenizer.decode(tokens[2:3])[-2:] + tokenizer.decode(tokens[3:4])[:2]


@pytest.mark.parametrize("stopped", [False, True])
def test_how_it_is_printed_and_grouped_changes_no_character(weights: Path, tmp_path: Path, stopped: bool) -> None:
    words = list(MANY) + ([f"--stop={a_stop_text(weights)}"] if stopped else [])
    ways = [[], ["--stream=False"], ["--batch_size=1"], ["--batch_size=4", "--stream=False"], ["--kv_cache=False"]]
    results = []
    for i, way in enumerate(ways):
        path = tmp_path / f"{i}.jsonl"
        out, _, _ = sample(alone(), weights, *words, *way, f"--out={path}")
        results.append((out, path.read_text()))
    assert results == [results[0]] * len(ways)
    texts = [line["text"] for line in lines_of(tmp_path / "0.jsonl")]
    if stopped:
        stop = words[-1].removeprefix("--stop=")
        assert not any(stop in text for text in texts)
        lengths = [len(line["tokens"]) for line in lines_of(tmp_path / "0.jsonl")]
        assert lengths[0] < 8 and max(lengths) == 8  # the first row has ended early, others have not


def test_text_streams_in_whole_characters(weights: Path) -> None:
    out, _, pieces = sample(alone(), weights, *MANY, "--max_new_tokens=30", "--temperature=3", "--top_k=0")
    assert "".join(pieces) == out
    assert pieces[0].startswith("One") and len(pieces) > 30  # the first row comes token by token
    assert "\ufffd" in out  # a random model writes broken UTF-8, too
    _, _, at_once = sample(alone(), weights, *MANY, "--stream=False")
    assert len(at_once) <= 2 * 6


def test_the_next_row_goes_live_when_the_first_is_through(weights: Path) -> None:
    words = [f"--stop={a_stop_text(weights)}", *MANY]
    _, _, pieces = sample(alone(), weights, *words)
    end = pieces.index(LINE)
    assert end <= 4
    first_of_second = pieces[end + 1]
    assert first_of_second.startswith("One") and LINE not in first_of_second and pieces[end + 2] != LINE


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_two_ranks_print_what_one_prints_once(weights: Path, tmp_path: Path) -> None:
    expected, _, _ = sample(alone(), weights, *MANY)
    (out, err, _), (silent, nothing, _) = run_ranks(2, sample, weights, *MANY)
    assert out == expected and (silent, nothing) == ("", "")
    assert "tp=2 over 3 heads: 2,1" in err and "sampling" in err


def _file_of_one(world: World, weights: Path, path: Path) -> str:
    """Only the first rank's host has the file."""
    return sample(world, weights, f"--prompt=PROMPTS:{path if world.rank == 0 else path / 'no'}")[0]


def test_only_the_first_rank_reads_prompt_files(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("One\n\n  \nTwo\n")
    out, silent = run_ranks(2, _file_of_one, weights, path)
    assert out == sample(alone(), weights, "--prompt=One", "--prompt=Two")[0] and silent == ""


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_from_files(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("a\x0cb\u2028c\r\n\r\n \t\nd e \n".encode())
    assert read_prompts(["x", f"PROMPTS:{path}", f"FILE:{path}", "FILE", "a:b"]) == [
        "x", "a\x0cb\u2028c", "d e ", "a\x0cb\u2028c\n\n \t\nd e \n", "FILE", "a:b"
    ]  # fmt: skip


def files(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("missing", "empty", "binary", "blank", "long")}
    made["empty"].write_bytes(b"")
    made["binary"].write_bytes(b"abc\xff\xfe")
    made["blank"].write_bytes(b"\n \n\t\n")
    made["long"].write_text("one " * 40)
    return made


@pytest.mark.parametrize("words, message", [
    (["--prompt="], "prompt 1 has no token: give it at least one to go on from"),
    (["--prompt=a", "--prompt="], "prompt 2 has no token"),
    (["--prompt=FILE:{missing}"], "cannot read {missing}: No such file or directory"),
    (["--prompt=FILE:{dir}"], "cannot read {dir}: Is a directory"),
    (["--prompt=FILE:{empty}"], "{empty} is empty"),
    (["--prompt=FILE:{binary}"], "{binary} is not UTF-8 text (byte 3 cannot be decoded)"),
    (["--prompt=PROMPTS:{missing}"], "cannot read {missing}: No such file or directory"),
    (["--prompt=PROMPTS:{binary}"], "{binary} is not UTF-8 text"),
    (["--prompt=PROMPTS:{blank}"], "{blank} has no prompt: write one a line."),
    (["--prompt=caf\udce9"], "--prompt='caf\\udce9' is not UTF-8 text."),
    (["--prompt=FILE:{long}", "--overflow=stop"], "prompt 1 has 41 tokens, block_size is 32. Shorten it"),
    (["--prompt=a", "--overflow=error", "--max_new_tokens=32"], "Ask for 31, or use --overflow=slide."),
    (["--out={dir}"], "--out={dir} is a directory: name a file in it."),
    (["--out={dir}/no/where"], "--out={dir}/no/where: the directory {dir}/no does not exist."),
    (["--report={dir}"], "--report={dir} is a directory: name a file in it."),
    (["--report={empty}/x"], "--report={empty}/x: the directory {empty} does not exist."),
    (["--tokenizer=ids", "--prompt=5 50257"], "prompt 1 ('5 50257'): token id 50257 is outside"),
    (["--tokenizer=ids", "--prompt=hello"], "prompt 1 ('hello'): the model's tokenizer is not known"),
])  # fmt: skip
def test_mistakes_are_said_in_one_line_before_the_weights_are_read(
    weights: Path, tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_tp, "load", lambda *args: pytest.fail("the weights were read first"))
    names = {"dir": tmp_path, **files(tmp_path)}
    with pytest.raises(UserError) as error:
        sample(alone(), weights, *(word.format(**names) for word in words))
    assert message.format(**names) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_takes_ids(unknown: Path) -> None:
    with pytest.raises(UserError, match="prompt 1 is empty. The model's tokenizer is not known: give token ids, for example"):
        sample(alone(), unknown)
    out, _, _ = sample(alone(), unknown, "--prompt=5 17 3")
    ids = out.removesuffix(LINE).split()
    assert ids[:3] == ["5", "17", "3"] and len(ids) == 11 and all(0 <= int(i) < 257 for i in ids)
    with pytest.raises(UserError, match="prompt 1 has token id 15496, the model's vocab_size is 257: not its tokenizer?"):
        sample(alone(), unknown, "--tokenizer=gpt2", "--prompt=Hello")


# --- how a run ends -------------------------------------------------------------------------------------------------


def test_what_was_finished_is_kept_when_a_run_is_broken_off(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = output.Output.show

    def interrupted(self: Any, row: Any) -> None:
        if row.number == 2 and row.new == 3:
            raise KeyboardInterrupt
        show(self, row)

    monkeypatch.setattr(output.Output, "show", interrupted)
    path, out = tmp_path / "o.jsonl", io.StringIO()
    options = parse(SampleOptions, [f"--init_from={weights}", "--device=cpu", "--max_new_tokens=8", *MANY,
                                    "--batch_size=1", f"--out={path}"], "sample_tp.py")  # fmt: skip
    with redirect_stdout(out), redirect_stderr(io.StringIO()), pytest.raises(KeyboardInterrupt):
        sample_tp.main(alone(), options)
    assert len(lines_of(path)) == 2
    path.write_text("earlier\n")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), pytest.raises(KeyboardInterrupt):
        sample_tp.main(alone(), options)
    assert path.read_text() == "earlier\n" and len(lines_of(tmp_path / "o.jsonl.part")) == 2
    monkeypatch.undo()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        sample_tp.main(alone(), options)
    assert len(lines_of(path)) == 6 and [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]
    assert out.getvalue().count(LINE) == 2 and out.getvalue().endswith("\n")  # the message has a line of its own


def test_a_sliding_context_is_mentioned(weights: Path) -> None:
    _, err, _ = sample(alone(), weights, "--prompt=One", "--max_new_tokens=40")
    assert "the context is full at block_size=32" in err
    _, err, _ = sample(alone(), weights, "--prompt=One", "--max_new_tokens=40", "--overflow=stop")
    assert "the context is full" not in err


# --- as a user starts it --------------------------------------------------------------------------------------------


def start(command: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.slow
def test_torchrun_prints_what_plain_python_prints(weights: Path) -> None:
    words = ["sample_tp.py", f"--init_from={weights}", "--device=cpu", "--max_new_tokens=12", *MANY]
    plain, two = start([sys.executable], *words), start(TORCHRUN, *words)
    assert (plain.returncode, two.returncode) == (0, 0), plain.stderr + two.stderr
    assert plain.stdout == two.stdout and plain.stdout.count(LINE) == 6


@pytest.mark.slow
def test_a_mistyped_option_is_one_line_of_ours() -> None:
    done = start(TORCHRUN, "sample_tp.py", "--temprature=1")
    ours = [line for line in done.stderr.splitlines() if line.startswith("sample_tp.py:")]
    assert ours == ["sample_tp.py: unknown option --temprature. Did you mean --temperature? (sample_tp.py --help lists all)"]
    assert done.returncode != 0 and done.stdout == ""

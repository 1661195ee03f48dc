"""eval_tp.py: every token counted once, at any stride, batch and tp; against transformers in double precision."""

import json
import math
import pickle
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from test_sample_tp import alone
from test_sources import nanogpt

import eval_tp
from base.errors import UserError
from checkpoints.sources import open_source, reader
from cli.grammar import parse
from cli.options import EvalOptions
from inference import perplexity
from inference.perplexity import measure, windows
from text.dataset import write_tokens
from tp_model import TensorParallelGPT
from world.mesh import World

SIZE = 16
VOCAB = 101


@given(n=st.integers(2, 100), block_size=st.integers(1, 20), part=st.floats(0, 1))
def test_windows_count_every_token_after_the_first_once(n: int, block_size: int, part: float) -> None:
    stride = 1 + int(part * (block_size - 1))
    counted: list[int] = []
    for i, (start, stop, first) in enumerate(windows(n, block_size, stride)):
        assert 0 < stop - start <= block_size and 0 <= first < stop - start and stop <= n - 1
        assert i == 0 or first >= min(block_size - stride, stop - start - 1)  # so much context at least
        counted += range(start + 1 + first, stop + 1)
    assert counted == list(range(1, n))


def test_a_dataset_of_other_tokens_is_not_measured(tmp_path: Path) -> None:
    """Unless --tokenizer says that they are the same."""
    torch.save(nanogpt() | {"config": {"dataset": "poems"}}, tmp_path / "ckpt.pt")
    for name, first in (("poems", "a"), ("others", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: first, 1: "c"}}))
        write_tokens(tmp_path / name / "train.bin", [0, 1] * 20, 2)
        write_tokens(tmp_path / name / "val.bin", [0, 1] * 20, 2)
    source = open_source(str(tmp_path))

    def read(dataset: str, tokenizer: str = "") -> int:
        options = EvalOptions(dataset=dataset, data_dir=str(tmp_path), tokenizer=tokenizer)
        return len(eval_tp.read_tokens(source, options)[0])

    assert read("poems") == 40 and read("others", tokenizer="ids") == 40
    with pytest.raises(UserError, match="was trained on char tokens, the dataset's tokenizer is another"):
        read("others")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_head=3, n_embd=24, n_layer=2, n_positions=SIZE, vocab_size=VOCAB))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    directory = tmp_path_factory.mktemp("weights")
    model.save_pretrained(directory)
    return directory


def expected(weights: Path, tokens: torch.Tensor, stride: int) -> float:
    """The sum of the negative log-likelihoods by transformers in float64: a forward pass for each token that counts."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(weights).double().eval()
    total, counted, start = 0.0, 0, 0
    with torch.no_grad():
        while counted < len(tokens) - 1:
            stop = min(start + SIZE, len(tokens) - 1)
            for i in range(counted, stop):  # token i + 1, after those from `start` on
                logits = model(tokens[None, start : i + 1]).logits[0, -1]
                total -= logits.log_softmax(0)[tokens[i + 1]].item()
            counted, start = stop, start + stride
    return total


def _measure(world: World, weights: Path, tokens: torch.Tensor, stride: int, batch_size: int) -> tuple[float, int]:
    source = open_source(str(weights))
    model = TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank)).eval()
    return measure(model, tokens, stride, batch_size)


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("n, stride, batch_size", [(2, 16, 8), (17, 16, 1), (50, 16, 3), (50, 5, 4), (33, 1, 100)])
def test_against_transformers_in_double_precision(weights: Path, tp: int, n: int, stride: int, batch_size: int) -> None:
    tokens = torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n))
    for total, count in run_ranks(tp, _measure, weights, tokens, stride, batch_size):
        assert count == n - 1
        assert total == pytest.approx(expected(weights, tokens, stride), rel=2e-6)


def test_the_head_takes_any_number_of_rows_at_a_time(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(60) % VOCAB
    whole, _ = _measure(alone(), weights, tokens, 7, 4)
    monkeypatch.setattr(perplexity, "HEAD_ROWS", 5)
    assert _measure(alone(), weights, tokens, 7, 4)[0] == pytest.approx(whole, rel=1e-7)


def evaluate(world: World, weights: Path, *words: str) -> tuple[str, str]:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        eval_tp.main(world, parse(EvalOptions, [f"--init_from={weights}", "--device=cpu", *words], "eval_tp.py"))
    return out.getvalue(), err.getvalue()


def test_a_text_of_ids_and_its_report(weights: Path, tmp_path: Path) -> None:
    ids = [(7 * i * i) % VOCAB for i in range(40)]
    (tmp_path / "text").write_text(" ".join(map(str, ids)))
    path = tmp_path / "report.json"
    out, err = evaluate(alone(), weights, f"--text={tmp_path / 'text'}", "--stride=8", f"--report={path}")
    made = json.loads(path.read_text())
    figures = made["evaluation"]
    loss = expected(weights, torch.tensor(ids), 8) / 39
    assert figures["tokens"] == 39 and figures["stride"] == 8
    assert figures["loss"] == pytest.approx(loss, rel=2e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert out.startswith(f"loss {figures['loss']:.6g}, perplexity ") and out.count("\n") == 1
    assert made["entry"] == "eval_tp" and made["timing"]["tokens_per_s"] > 0
    assert "nothing is communicated" in err


def _two(world: World, weights: Path, words: list[str]) -> tuple[str, str]:
    return evaluate(world, weights, *words)


def test_two_ranks_measure_a_dataset_and_one_speaks(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    for split, n in (("train", 30), ("val", 50)):
        write_tokens(tmp_path / "ours" / f"{split}.bin", [(3 * i) % VOCAB for i in range(n)], VOCAB)
    words = ["--dataset=ours", f"--data_dir={tmp_path}", "--max_tokens=41"]
    (out, err), others = run_ranks(2, _two, weights, words)
    assert others == ("", "")
    tokens = torch.tensor([(3 * i) % VOCAB for i in range(41)])
    loss = expected(weights, tokens, SIZE) / 40
    assert float(out.split()[1].rstrip(",")) == pytest.approx(loss, rel=1e-5) and "tokens 40" in out
    assert "embedding" in err and "all_reduce" in err


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "either --text=FILE or --dataset=NAME"),
        (["--text={a}", "--dataset=b"], "either --text=FILE or --dataset=NAME"),
        (["--text={a}", "--stride=17"], "--stride=17 is more than block_size=16: tokens would be left out"),
        (["--text={short}"], "has 1 tokens: at least 2 are needed to predict one"),
        (["--text={beyond}"], "101"),
        (["--text=/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset=b", "--data_dir=/nowhere"], "there is no dataset directory /nowhere/b"),
        (["--text={a}", "--report=/nowhere/r.json"], "--report=/nowhere/r.json: the directory /nowhere does not exist"),
    ],
)
def test_mistakes(weights: Path, tmp_path: Path, words: list[str], message: str) -> None:
    contents = {"a": "1 2 3", "short": "5", "beyond": "5 101"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    places: dict[str, Any] = {name: tmp_path / name for name in contents}
    with pytest.raises(UserError) as caught:
        evaluate(alone(), weights, *(word.format(**places) for word in words))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_give_no_perplexity(weights: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(weights)
    torch.nn.init.constant_(model.transformer.h[1].mlp.c_fc.weight, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "text").write_text("1 2 3")
    with pytest.raises(UserError, match="the loss is nan: the model's weights are damaged"):
        evaluate(alone(), tmp_path / "broken", f"--text={tmp_path / 'text'}")

"""Speculative decoding writes what plain decoding writes, in fewer passes: with either draft, however it is sampled, split,
grouped, stopped or scheduled, and though a rank's draft is out of its mind."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import alone, run_ranks
from test_decoding import Reruns
from test_generation import PROMPTS, SMALL, Ends, reference, split
from torch import Tensor

import sample_tp
from base.files import write_json
from checkpoints.convert import split as split_source
from cli.grammar import parse
from cli.options import SampleOptions, SplitOptions
from inference.cuda_graphs import GraphDecoder
from inference.decoders import TorchDecoder
from inference.generation import Generation, generate
from inference.native_decoder import NativeDecoder
from inference.sampling import Row, Sampling
from inference.speculation import Guesser, Ngrams, Pace, SmallModel, Speculation
from model import GPT, GPTConfig
from parallel.parameters import take
from parallel.quantized import quantize
from plan.schedule import Schedule
from tp_model import TensorParallelGPT
from world.mesh import World

CONFIG = replace(SMALL, block_size=64)
TINY = GPTConfig(block_size=24, vocab_size=523, n_layer=1, n_head=2, n_embd=16)  # a draft that cannot hold the whole text
GREEDY = Sampling(n_tokens=523, temperature=0.0, max_new_tokens=40)
DRAWN = Sampling(n_tokens=523, temperature=0.7, top_k=20, max_new_tokens=24, seed=5)


def prompts(count: int) -> list[list[int]]:
    """Of many lengths; every other one says the same again and again, which is what look-up lives on."""
    stream = torch.Generator().manual_seed(7)
    plain = [torch.randint(523, (1 + i,), generator=stream).tolist() for i in range(count)]
    return [tokens * 3 if i % 2 else tokens for i, tokens in enumerate(plain)]


def drafts(model: GPT, sampling: Sampling) -> dict[str, Speculation | None]:
    """No draft, look-up, the model itself, and a small one that knows nothing of it."""
    guessers: dict[str, Guesser] = {
        "ngram": Ngrams(longest=3, shortest=1),
        "itself": SmallModel(split(model, alone()), sampling),
        "tiny": SmallModel(split(reference(TINY, seed=9), alone()), sampling),
    }
    return {"none": None} | {name: Speculation(guesser, 5) for name, guesser in guessers.items()}


def written(
    model: TensorParallelGPT, draft: Any, sampling: Sampling, prompts: list[list[int]], ends: Ends | None = None
) -> list[list[int]]:
    decoder = TorchDecoder(model) if model.sequence_parallel else None  # the native step does not split a pass
    if ends is None:
        rows = generate(model, prompts, sampling, decoder, draft).rows
    else:
        generation = Generation(model, prompts, sampling, decoder, draft, ends.stops)
        for row in generation:
            if row.ended:
                ends.end(row)
        rows = generation.rows
    return [row.tokens[row.prompt_tokens :] for row in rows]


def _both(world: World, sampling: Sampling, change: str, count: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """What is written with each draft, how many of its guesses were right, and passes."""
    model = reference(CONFIG)
    here = split(model, world.tp)
    if change == "int8":
        quantize(here, world.gather)
    elif change == "sequence":
        full = dict(model.named_parameters())
        here = TensorParallelGPT(
            CONFIG, world.tp, lambda name, rule: take(full[name].detach(), rule, world.tp.rank), sequence_parallel=True
        ).eval()
    elif change:
        here.set_schedule(Schedule.parse(change, CONFIG.n_layer))
    texts, right, passes = {}, {}, {}
    for name, draft in drafts(model, sampling).items():
        before = world.ledger.forward_passes
        texts[name] = written(here, draft, sampling, prompts(count))
        passes[name] = world.ledger.forward_passes - before
        if draft is not None:
            right[name] = (draft.accepted, draft.proposed)
    return texts, right, passes


SHORTER = replace(GREEDY, max_new_tokens=14)
WAYS = {
    "greedy": (GREEDY, "", 20),
    "drawn": (DRAWN, "", 20),
    "one by one": (replace(SHORTER, batch_size=1), "", 4),
    "in threes": (replace(SHORTER, batch_size=3), "", 8),
    "without a cache": (replace(SHORTER, kv_cache=False), "", 6),
    "to the end": (replace(GREEDY, overflow="stop", max_new_tokens=100), "", 6),
    "sliding": (replace(GREEDY, max_new_tokens=70), "", 4),
    "drawn from all": (replace(DRAWN, top_k=0, num_samples=2), "", 6),
    "drawn from few": (replace(DRAWN, top_p=0.7, temperature=1.3), "", 6),
    "int8": (SHORTER, "int8", 8),
    "int8, drawn": (replace(DRAWN, max_new_tokens=14), "int8", 8),
    "once a layer": (SHORTER, "mlp", 8),
    "delayed": (SHORTER, "delay:1", 8),
    "the sequence split": (SHORTER, "sequence", 6),
    "once in two layers, drawn": (replace(DRAWN, max_new_tokens=14), "every:2", 8),
}


@pytest.mark.parametrize("way, tp", [*((way, 2) for way in WAYS), ("greedy", 1), ("drawn", 1), ("greedy", 3), ("int8", 3)])
def test_the_text_is_the_same_with_any_draft(way: str, tp: int) -> None:
    sampling, change, count = WAYS[way]
    for texts, right, passes in run_ranks(tp, _both, sampling, change, count):
        for name in ("ngram", "itself", "tiny"):
            assert texts[name] == texts["none"], name
            assert passes[name] <= passes["none"]
        accepted, proposed = right["itself"]
        if not change and sampling.kv_cache:  # the draft is the model, but for the schedule and the rounding
            assert accepted == proposed > 0 and passes["itself"] < passes["none"]
        assert right["tiny"][1] > 0 and right["ngram"][1] > 0


def test_stop_ends_a_row_among_its_guesses() -> None:
    model = reference(CONFIG, seed=2)
    here, lasts = split(model, alone()), {0: 20, 1: 1, 3: 5}
    plain, guessed = Ends(lasts), Later(lasts)
    expected = written(here, None, GREEDY, PROMPTS, plain)
    for draft in list(drafts(model, GREEDY).values())[1:]:
        guessed = Later(lasts)
        assert written(here, draft, GREEDY, PROMPTS, guessed) == expected
        assert [len(row) for row in expected] == [20, 1, 40, 5]
        assert guessed.heard == plain.heard and sorted(guessed.order) == sorted(plain.order)


class Later(Ends):
    """Hears a row's tokens before they are in it."""

    def stops(self, row: Row, token: int) -> bool:
        self.heard.setdefault(row.number, []).append(token)
        return len(self.heard[row.number]) == self.lasts.get(row.number)


# --- the distribution -----------------------------------------------------------------------------------------------

DICE = GPTConfig(block_size=8, vocab_size=6, n_layer=1, n_head=2, n_embd=8)
THROWS = 7000  # of three tokens each


def shares(model: GPT, temperature: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Probability of every three tokens after token 0, [6, 6, 6], by double precision."""
    model = model.double()
    joint = np.zeros((6, 6, 6))
    with torch.no_grad():
        for a in range(6):
            for b in range(6):
                rows = [model(torch.tensor([text]))[0][0, -1] for text in ([0], [0, a], [0, a, b])]
                one, two, three = (torch.softmax(row / temperature, 0).numpy() for row in rows)
                joint[a, b] = one[a] * two[b] * three
    return joint


def p_value(counts: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Of Pearson's chi-square, by the incomplete gamma function."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.size - 1) / 2), torch.tensor(float(statistic) / 2)))


def throws(draft: Speculation | None, sampling: Sampling) -> np.ndarray[Any, Any]:
    here = split(reference(DICE, seed=4), alone())
    counts = Counter(tuple(row) for row in written(here, draft, sampling, [[0]]))
    return np.array([[[counts[a, b, c] for c in range(6)] for b in range(6)] for a in range(6)])


def _believed(sampling: Sampling) -> np.ndarray[Any, Any]:
    """What would be counted if a row took its guesses unseen: the second token is the draft's."""
    model = reference(DICE, seed=4)
    here, draft = split(model, alone()), SmallModel(split(reference(DICE, seed=5), alone()), sampling)
    rows = generate(here, [[0]], replace(sampling, max_new_tokens=1)).rows
    draft.begin(len(rows), 3)
    with torch.inference_mode():
        guesses = draft.guess(rows, [1] * len(rows))
    for row, guess in zip(rows, guesses, strict=True):
        row.tokens += guess
    lasts = generate(here, [row.tokens for row in rows], replace(sampling, max_new_tokens=1, num_samples=1)).rows
    counts = Counter(tuple(row.tokens[1:]) for row in lasts)
    return np.array([[[counts[a, b, c] for c in range(6)] for b in range(6)] for a in range(6)])


def test_what_is_drawn_has_the_models_distribution() -> None:
    """21,000 draws with a draft that is another model, two thirds of them where it may guess."""
    sampling = Sampling(6, temperature=1.2, top_k=0, max_new_tokens=3, num_samples=THROWS, batch_size=1000, seed=11)
    expected = THROWS * shares(reference(DICE, seed=4), 1.2)
    draft = Speculation(SmallModel(split(reference(DICE, seed=5), alone()), sampling), 2)
    counts = throws(draft, sampling)
    assert counts.sum() == THROWS and 0.1 < draft.accepted / draft.proposed < 0.9
    print(f"p = {p_value(counts, expected):.3f}; {draft.accepted} of {draft.proposed} guesses right")
    assert p_value(counts, expected) > 0.01
    assert p_value(throws(None, replace(sampling, temperature=1.05)), expected) < 1e-4  # it sees a slightly wrong distribution
    assert p_value(_believed(sampling), expected) < 1e-9  # and guesses that are believed


# --- in fewer passes ------------------------------------------------------------------------------------------------


def _counted(world: World) -> tuple[float, float]:
    """All-reduces of the model for each token that is written, without a draft and with look-up."""
    here, found = TensorParallelGPT(CONFIG, world.tp).eval(), []  # a fresh model says its last token again and again
    for draft in (None, Speculation(Ngrams(), 5)):
        before = world.ledger.snapshot()
        rows = generate(here, [[5, 17, 9]], GREEDY, None, draft).rows
        told = world.ledger.since(before)
        found.append(sum(tally.calls for entry, tally in told.items() if entry.op == "all_reduce") / rows[0].new)
    return found[0], found[1]


def test_repetitive_text_takes_less_than_half_of_the_all_reduces() -> None:
    for plain, guessed in run_ranks(2, _counted):
        assert plain == 2 * CONFIG.n_layer + 1
        assert guessed <= 0.5 * plain
        print(f"all-reduces a token: {plain:.2f} plain, {guessed:.2f} with look-up")


# --- a rank that is out of its mind ---------------------------------------------------------------------------------


class Contrary(Ngrams):
    """A guesser that says something else than the one it asks."""

    def __init__(self, guesser: Any):
        self.guesser = guesser

    def begin(self, rows: int, longest: int) -> None:
        self.guesser.begin(rows, longest)

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        return [[(token + 1) % 523 for token in guess] for guess in self.guesser.guess(rows, room)]


def _contrary(world: World, who: int) -> tuple[list[list[int]], list[list[int]], int]:
    model = reference(CONFIG)
    here, guesser = split(model, world.tp), SmallModel(split(model, alone()), GREEDY)
    draft = Speculation(Contrary(guesser) if world.rank == who else guesser, 4)
    return written(here, None, GREEDY, prompts(6)), written(here, draft, GREEDY, prompts(6)), draft.accepted


@pytest.mark.parametrize("who", [0, 1, 2])
def test_guesses_on_which_ranks_differ_are_not_used(who: int) -> None:
    for plain, guessed, accepted in run_ranks(3, _contrary, who):
        assert guessed == plain and accepted == 0


# --- several tokens of a row at once --------------------------------------------------------------------------------


def _at_once(world: World, int8: bool, kind: Any) -> tuple[Tensor, Tensor]:
    """Logits of five tokens of each of three rows, read together and one by one."""
    here = split(reference(CONFIG), world.tp)
    if int8:
        quantize(here, world.gather)
    found = []
    news = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]
    for size in (5, 1):
        decoder = kind(here)
        cache = decoder.new_cache(3, 30)
        with torch.inference_mode():
            decoder.logits(torch.arange(36).view(3, 12).tolist(), cache)
            cache.advance([12, 3, 7])
            parts = []
            for at in range(0, 5, size):
                parts.append(decoder.logits([new[at : at + size] for new in news], cache).unflatten(0, (3, size)).clone())
                cache.advance([n + size for n in cache.lengths])
        found.append(torch.cat(parts, dim=1))
    return found[0], found[1]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_native_step_reads_several_tokens_to_the_same_bits(tp: int, int8: bool) -> None:
    for together, apart in run_ranks(tp, _at_once, int8, NativeDecoder):
        assert together.shape[:2] == (3, 5) and torch.equal(together, apart)
    for (together, _), (torchs, _) in zip(
        run_ranks(tp, _at_once, int8, NativeDecoder), run_ranks(tp, _at_once, int8, TorchDecoder), strict=True
    ):
        assert (together - torchs).abs().max() < 2e-5 * torchs.abs().max()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_captured_step_reads_several_tokens(tp: int) -> None:
    for together, apart in run_ranks(tp, _at_once, False, lambda model: GraphDecoder(model, Reruns())):
        assert (together - apart).abs().max() < 1e-5 * apart.abs().max()


# --- guessers -------------------------------------------------------------------------------------------------------


def row(tokens: list[int]) -> Row:
    return Row(0, 0, 0, tokens, 1)


def test_look_up_goes_on_as_the_text_did() -> None:
    assert Ngrams().guess([row([1, 2, 3, 4, 5, 1, 2])], [4]) == [[3, 4, 5, 1]]
    assert Ngrams().guess([row([7, 8, 7, 8])], [5]) == [[7, 8, 7, 8, 7]]  # past the end of the text
    assert Ngrams().guess([row([1, 2, 9, 3, 1, 2, 8, 1, 2])], [1]) == [[8]]  # as it did the last time
    assert Ngrams().guess([row([9, 1, 2, 5, 3, 1, 2, 6, 9, 1, 2])], [1]) == [[5]]  # after the longest run that is alike
    assert Ngrams().guess([row([1, 2, 3, 4])], [4]) == Ngrams().guess([row([1])], [4]) == [[]]
    assert Ngrams().guess([row([1, 1]), row([1, 1, 1])], [0, 2]) == [[], [1, 1]]
    growing, guesser = row([1, 2, 3, 1]), Ngrams()
    assert guesser.guess([growing], [2]) == [[]]
    growing.tokens += [2, 3, 1, 2]
    assert guesser.guess([growing], [2]) == [[3, 1]]
    guesser.begin(1, 9)
    assert guesser.guess([row([5, 6])], [3]) == [[]]  # another group's row of the same number


def test_the_pace_follows_what_was_right() -> None:
    pace = Pace(8)
    assert pace.ask() == 8
    pace.learn(8, 2, 8)
    assert pace.ask() == 3
    pace.learn(3, 3, 8)
    assert pace.ask() == 6
    pace.learn(0, 0, 8)
    assert pace.ask() == 6
    asked = []
    for _ in range(20):  # never right: ever longer pauses, up to a limit
        pace.learn(pace.reach, 0, 8)
        waited = 0
        while not pace.ask():
            waited += 1
        asked.append(waited)
    assert asked[:4] == [0, 1, 2, 3] and asked[-1] == 8
    pace.learn(1, 1, 8)
    assert pace.ask() == 2


# --- the entry ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories: a model, a smaller one, one of another vocabulary, one of other characters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    made: dict[str, Path] = {}
    for name, layers, vocab in (("model", 3, 101), ("small", 1, 101), ("other", 1, 103)):
        made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(layers)
        config = GPT2Config(n_head=3, n_embd=24, n_layer=layers, n_positions=32, vocab_size=vocab)
        model: Any = GPT2LMHeadModel(config)
        model.save_pretrained(made[name])
    made["letters"] = tmp_path_factory.mktemp("letters") / "shards"
    split_source(SplitOptions(init_from=str(made["small"]), tp=1, out=str(made["letters"])))
    write_json(made["letters"] / "tokenizer.json", {"kind": "char", "chars": [chr(33 + i) for i in range(90)]})
    return made


def _sampled(world: World, words: list[str]) -> None:
    sample_tp.main(world, parse(SampleOptions, ["--device=cpu", "--stream=False", *words], "sample_tp.py"))


def test_the_report_says_what_a_token_took(weights: dict[str, Path], tmp_path: Path) -> None:
    words = [f"--init_from={weights['model']}", "--prompt=1 2 3", "--max_new_tokens=20", "--temperature=0", "--num_samples=2"]
    made = {}
    for draft in ("", "ngram", str(weights["model"]), str(weights["small"])):
        run_ranks(2, _sampled, [*words, f"--draft={draft}", f"--report={tmp_path / 'r.json'}"])
        made[draft] = json.loads((tmp_path / "r.json").read_text())
    plain = made.pop("")
    assert "speculation" not in plain and plain["per_token"] == {"tokens": 40, "passes": 0.5, "all_reduce": 3.5}
    for draft, report in made.items():
        assert [sample["tokens"] for sample in report["samples"]] == [sample["tokens"] for sample in plain["samples"]]
        said = report["speculation"]
        assert said["acceptance_rate"] == pytest.approx(said["accepted"] / said["proposed"], abs=1e-6)
        assert report["per_token"]["all_reduce"] == pytest.approx(7 * report["comm_account"]["forward_passes"] / 40)
        assert set(report["comm_account"]["other"]) == set(plain["comm_account"]["other"])  # a draft says nothing
        if draft == str(weights["model"]):
            assert said["acceptance_rate"] == 1 and report["per_token"]["all_reduce"] <= 0.5 * plain["per_token"]["all_reduce"]


@pytest.mark.parametrize("draft, message", [
    ("other", "has another vocabulary: ids of 103 ids, the model ids of 101. Use a draft with the model's tokenizer"),
    ("letters", "has another vocabulary: char of 101 ids, the model ids of 101."),
])  # fmt: skip
def test_a_draft_of_another_vocabulary_is_refused(weights: dict[str, Path], draft: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, _sampled, [f"--init_from={weights['model']}", "--prompt=1 2 3", f"--draft={weights[draft]}"])


def test_a_draft_that_is_nowhere(weights: dict[str, Path]) -> None:
    message = r"--draft=ngramm is neither a file, a directory nor one of .* Did you mean ngram\?"
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, _sampled, [f"--init_from={weights['model']}", "--prompt=1 2 3", "--draft=ngramm"])


def test_guesses_never_outgrow_the_context(weights: dict[str, Path], tmp_path: Path) -> None:
    """More tokens are guessed than there is room for: in the context, in the draft's, among the tokens asked for."""
    words = [f"--init_from={weights['model']}", "--prompt=1 2 3 1 2 3", "--temperature=0", "--draft_tokens=100"]
    texts = []
    for more in (["--overflow=stop", "--max_new_tokens=90"], ["--overflow=error", "--max_new_tokens=26"]):
        for draft in ("", "ngram", str(weights["small"])):
            run_ranks(1, _sampled, [*words, *more, f"--draft={draft}", f"--report={tmp_path / 'r.json'}"])
            texts.append(json.loads((tmp_path / "r.json").read_text())["samples"][0]["tokens"])
    assert all(text == texts[0] for text in texts) and len(texts[0]) == 26

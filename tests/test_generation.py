"""Generation against transformers, against model.py's uncached reference, and against itself at other sizes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ranks import alone, run_ranks

from base.errors import UserError
from checkpoints.sources import open_source, reader
from inference import generation
from inference.decoders import TorchDecoder
from inference.generation import Generation, generate
from inference.native_decoder import NativeDecoder
from inference.output import RowText
from inference.prompts import check_prompts
from inference.sampling import Row, Sampling, candidates, choose, likeliest, noise
from model import GPT, GPTConfig, KVCache
from parallel.collectives import Axis
from parallel.parameters import take
from plan.partition import Rule, spans
from text.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer
from tp_model import TensorParallelGPT
from world.mesh import World

SMALL = GPTConfig(block_size=16, vocab_size=523, n_layer=2, n_head=5, n_embd=40)
PROMPTS = [[7], list(range(100, 116)), [3, 1, 4, 1, 5, 9, 2, 6], list(range(40, 63))]  # shorter, equal, shorter, longer
GREEDY = Sampling(n_tokens=523, temperature=0.0, max_new_tokens=34)
DRAWN = Sampling(n_tokens=523, temperature=0.8, top_k=200, max_new_tokens=16, seed=3)


def reference(config: GPTConfig = SMALL, seed: int = 3) -> GPT:
    """A GPT in which everything matters: as initialised, attention hardly does and the tied table repeats its input."""
    model = GPT(config).eval()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.05 if "bias" in name else 1.0 if "ln_" in name or "wpe" in name else 0.3, generator=stream)
    return model


def split(model: GPT, tp: Axis) -> TensorParallelGPT:
    """This rank's part of the reference."""
    full = dict(model.named_parameters())

    def read(name: str, rule: Rule) -> torch.Tensor:
        return take(full[name].detach(), rule, tp.rank)

    return TensorParallelGPT(model.config, tp, read).eval()


def new_tokens(model: TensorParallelGPT, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    return [row.tokens[row.prompt_tokens :] for row in generate(model, prompts, sampling).rows]


def on_ranks(world: World, model: GPT, prompts: list[list[int]], samplings: list[Sampling]) -> list[list[list[int]]]:
    here = split(model, world.tp)
    return [new_tokens(here, prompts, sampling) for sampling in samplings]


# --- transformers ---------------------------------------------------------------------------------------------------

HF = [(3, 24, 50257), (4, 32, 257), (5, 40, 50257), (12, 48, 50257), (25, 100, 257)]  # heads, width, vocabulary
HF_LENGTHS = (5, 30, 17)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[list[int]], list[torch.Tensor], list[list[int]]]]:
    """For each model: its directory, prompts, transformers' logits for each, its 64 greedy tokens after each."""
    from transformers import GPT2Config, GPT2LMHeadModel

    made = []
    for heads, width, vocab in HF:
        torch.manual_seed(100 + heads)
        model = GPT2LMHeadModel(
            GPT2Config(n_head=heads, n_embd=width, n_layer=2, vocab_size=vocab, n_positions=96, bos_token_id=0, eos_token_id=0)
        ).eval()
        for name, p in model.named_parameters():
            torch.nn.init.normal_(p, 0, 0.05 if "bias" in name else 1.0 if "ln_" in name or "wpe" in name else 0.3)
        directory = tmp_path_factory.mktemp("hf")
        model.save_pretrained(directory)
        ids = [torch.randint(1, vocab, (1, length)) for length in HF_LENGTHS]
        with torch.no_grad():
            logits = [model(x).logits[0] for x in ids]
            ends = [model.generate(x, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0) for x in ids]
        greedy = [end[0, x.shape[1] :].tolist() for end, x in zip(ends, ids, strict=True)]
        made.append((directory, [x[0].tolist() for x in ids], logits, greedy))
    return made


def _like_transformers(world: World, saved: Any, n: int) -> list[tuple[float, list[list[int]]]]:
    results = []
    for directory, prompts, logits, _ in saved:
        source = open_source(str(directory))
        if source.config.n_head < world.tp.size:
            continue
        model = TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank)).eval()
        worst = 0.0
        with torch.no_grad():
            for prompt, expected in zip(prompts, logits, strict=True):
                mine = model.gather_logits(model.local_logits(model.hidden(torch.tensor([prompt]))))[0]
                worst = max(worst, (mine - expected).abs().max().item())
        greedy = Sampling(n_tokens=source.config.vocab_size, temperature=0.0, max_new_tokens=n)
        results.append((worst, new_tokens(model, prompts, greedy)))
    return results


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5])
def test_a_batch_is_what_transformers_writes_one_by_one(saved: Any, tp: int) -> None:
    fit = [greedy for (heads, _, _), (_, _, _, greedy) in zip(HF, saved, strict=True) if heads >= tp]
    n = 64 if tp < 3 else 8  # more ranks take their time on 2 cores; test_transformers.py gives it to them
    for results in run_ranks(tp, _like_transformers, saved, n):
        for greedy, (worst, mine) in zip(fit, results, strict=True):
            assert worst <= 1e-4
            assert mine == [row[:n] for row in greedy]
            assert len({token for row in greedy for token in row}) > 20  # a text, not one token again and again
        print(f"tp {tp}: largest difference of a logit {max(worst for worst, _ in results):.1e}")


# --- nanoGPT's window -----------------------------------------------------------------------------------------------


def nanogpt(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens without a cache: the last block_size tokens count."""
    return model.generate(torch.tensor([prompt]), n, temperature=0.0, use_cache=False)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_sliding_is_nanogpts_to_the_token(tp: int) -> None:
    model = reference()
    samplings = [GREEDY]
    if tp == 1:
        samplings += [replace(GREEDY, kv_cache=False), replace(GREEDY, batch_size=1), replace(GREEDY, batch_size=3)]
    expected = [nanogpt(model, prompt, 34) for prompt in PROMPTS]  # 34 new tokens in a context of 16
    assert min(len(set(row)) for row in expected) > 5
    for results in run_ranks(tp, on_ranks, model, PROMPTS, samplings):
        assert results == [expected] * len(samplings)


def test_the_references_own_cache_changes_nothing() -> None:
    model = reference()
    for prompt in PROMPTS:
        idx = torch.tensor([prompt, prompt[::-1]])
        assert torch.equal(model.generate(idx, 40, 0.0), model.generate(idx, 40, 0.0, use_cache=False))
        draws = [
            model.generate(idx, 40, 0.8, 50, use_cache, torch.Generator().manual_seed(5)) for use_cache in (True, False)
        ]
        assert torch.equal(*draws)


def test_overflow_stop_ends_a_row_at_block_size() -> None:
    model = reference()
    rows = generate(split(model, alone()), [[7], PROMPTS[2]], replace(GREEDY, overflow="stop")).rows
    assert [len(row.tokens) for row in rows] == [16, 16] and all(row.ended for row in rows)
    for row, prompt in zip(rows, ([7], PROMPTS[2]), strict=True):
        assert row.tokens[row.prompt_tokens :] == nanogpt(model, prompt, 16 - len(prompt))


def test_overflow_error_leaves_what_fits_alone() -> None:
    model = reference()
    exact = replace(GREEDY, overflow="error", max_new_tokens=8)
    assert new_tokens(split(model, alone()), [PROMPTS[2]], exact) == [nanogpt(model, PROMPTS[2], 8)]


@pytest.mark.parametrize("prompts, change, message", [
    ([], {}, "there is no prompt: give --prompt, and a prompt file with at least one line."),
    ([[1], []], {}, "prompt 2 has no token: give it at least one to go on from, for example --prompt=$'\\n'."),
    ([[1, 523]], {}, "prompt 1 has token id 523, the model's vocab_size is 523: not its tokenizer?"),
    ([[-1]], {}, "prompt 1 has token id -1, the model's vocab_size is 523: not its tokenizer?"),
    ([[1] * 16], {"overflow": "stop"}, "prompt 1 has 16 tokens, block_size is 16. Shorten it, or use --overflow=slide."),
    ([[1] * 17], {"overflow": "error"}, "prompt 1 has 17 tokens, block_size is 16. Shorten it, or use --overflow=slide."),
    ([[1] * 16], {"overflow": "error"},
     "prompt 1 has 16 tokens, with max_new_tokens=34 it outgrows block_size=16. Use --overflow=slide."),
    ([[1] * 9], {"overflow": "error", "max_new_tokens": 8},
     "prompt 1 has 9 tokens, with max_new_tokens=8 it outgrows block_size=16. Ask for 7, or use --overflow=slide."),
])  # fmt: skip
def test_prompts_that_cannot_be_continued(prompts: list[list[int]], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_prompts(prompts, 523, 16, replace(GREEDY, **change))
    assert str(error.value) == message


# --- the same text, however it is split and grouped -----------------------------------------------------------------

SHORT = [PROMPTS[0], PROMPTS[2]]  # these do not slide here; that is tested above
KEPT = [(200, 1.0), (5, 1.0), (0, 1.0), (200, 0.9), (5, 0.9), (0, 0.9)]  # top_k, top_p


@pytest.fixture(scope="module")
def drawn() -> tuple[GPT, list[Sampling], list[list[list[int]]]]:
    """The model, ways to sample from it, and what one rank draws."""
    model = reference(seed=2)
    samplings = [replace(DRAWN, top_k=k, top_p=p, num_samples=4, max_new_tokens=8) for k, p in KEPT]
    here = split(model, alone())
    return model, samplings, [new_tokens(here, SHORT, sampling) for sampling in samplings]


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_the_text_does_not_depend_on_tp(drawn: Any, tp: int) -> None:
    model, samplings, expected = drawn
    for results in run_ranks(tp, on_ranks, model, SHORT, samplings):
        assert results == expected


def test_the_ways_to_sample_differ(drawn: Any) -> None:
    model, samplings, expected = drawn
    assert len({str(rows) for rows in expected}) >= 5
    here = split(model, alone())
    for change in ({"seed": 4}, {"temperature": 2.0}, {"temperature": 0.0}):
        assert new_tokens(here, SHORT, replace(samplings[0], **change)) != expected[0]
    greedy = new_tokens(here, PROMPTS, replace(DRAWN, temperature=0.0))
    assert greedy == new_tokens(here, PROMPTS, replace(DRAWN, top_k=1)) == new_tokens(here, PROMPTS, replace(DRAWN, top_p=1e-9))
    assert new_tokens(here, PROMPTS, replace(DRAWN, top_k=5000)) == new_tokens(here, PROMPTS, replace(DRAWN, top_k=0))


def _grouped(world: World, model: GPT) -> list[list[list[int]]]:
    here = split(model, world.tp)
    many = replace(DRAWN, num_samples=3, max_new_tokens=10)
    together = [new_tokens(here, PROMPTS, replace(many, batch_size=size)) for size in (1, 5, 12)]
    apart = [tokens for prompt in PROMPTS for tokens in new_tokens(here, [prompt], many)]
    return [apart, *together]


@pytest.mark.parametrize("tp", [1, 2])
def test_the_text_does_not_depend_on_the_company(tp: int) -> None:
    for apart, *together in run_ranks(tp, _grouped, reference(seed=2)):
        assert len(apart) == 12 and len({str(row) for row in apart}) == 12
        assert all(rows == apart for rows in together)


def test_the_first_samples_are_the_same_however_many_are_drawn() -> None:
    here = split(reference(seed=2), alone())
    one, five = (new_tokens(here, PROMPTS[:1], replace(DRAWN, num_samples=n)) for n in (1, 5))
    assert five[:1] == one and len({str(row) for row in five}) == 5
    assert new_tokens(here, PROMPTS[:1], replace(DRAWN, seed=4)) != one


def test_a_group_is_never_larger_than_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    here = split(reference(), alone())
    shapes: list[tuple[int, ...]] = []
    hidden = here.hidden

    def noted(idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        shapes.append(tuple(idx.shape))
        return hidden(idx, cache)

    monkeypatch.setattr(here, "hidden", noted)
    sampling = replace(DRAWN, num_samples=2, batch_size=4, max_new_tokens=3)
    result = generate(here, [[5]] * 7, sampling, decoder=TorchDecoder(here))
    groups = [(2, 1), (4, 1), (4, 1)] * 3 + [(1, 1), (2, 1), (2, 1)]  # each prompt is read once for its two samples
    assert shapes == groups
    per_row = 2 * 2 * 4 * 40 * 4  # k and v, layers, the prompt and 3 tokens, n_embd, float32
    assert result.timing.kv_cache_bytes == 4 * per_row


class Ends:
    """Ends row i after lasts[i] tokens, and notes the order of things."""

    def __init__(self, lasts: dict[int, int]):
        self.lasts, self.heard, self.order = lasts, dict[int, list[int]](), list[int]()

    def stops(self, row: Row, token: int) -> bool:
        assert row.new == len(self.heard.setdefault(row.number, []))
        self.heard[row.number].append(token)
        return len(self.heard[row.number]) == self.lasts.get(row.number)

    def end(self, row: Row) -> None:
        assert row.ended and row.tokens[row.prompt_tokens :] == self.heard[row.number]
        self.order.append(row.number)


def _some_end_early(world: World, model: GPT) -> tuple[list[list[int]], list[int]]:
    ends = Ends({0: 20, 1: 1, 3: 5})
    generation = Generation(split(model, world.tp), PROMPTS, replace(DRAWN, max_new_tokens=24), stops=ends.stops)
    for row in generation:
        if row.ended and world.rank == 0:
            ends.end(row)
    return [row.tokens[row.prompt_tokens :] for row in generation.rows], ends.order


@pytest.mark.parametrize("tp", [1, 3])
def test_rows_end_one_by_one(tp: int) -> None:
    model = reference(seed=2)
    whole = new_tokens(split(model, alone()), PROMPTS, replace(DRAWN, max_new_tokens=24))
    first, *others = run_ranks(tp, _some_end_early, model)
    for rows, _ in (first, *others):
        assert [len(row) for row in rows] == [20, 1, 24, 5]
        assert rows == [full[: len(row)] for row, full in zip(rows, whole, strict=True)]
    assert first[1] == [1, 3, 0, 2]  # rank 0 heard them end
    assert all(order == [] for _, order in others)  # and nobody else did


APART = [[5, 9], [7], [3, 1, 4, 1], [2, 7, 1], [8]]
LENGTHS = [2, 7, 3, 4, 1]  # new tokens


def _in_two_rows(world: World, kind: Any, samples: int) -> tuple[list[list[int]], int, int]:
    """The texts, the passes, and the most rows of a pass."""
    here = split(reference(seed=2), world.tp)
    decoder, prompts = kind(here), APART[: 5 // samples]
    logits, most = decoder.logits, list[int]()

    def noted(new: list[list[int]], *rest: Any) -> torch.Tensor:
        most.append(len(new))
        return logits(new, *rest)

    decoder.logits = noted
    ends = lambda row, token: row.new + 1 == LENGTHS[row.number]  # noqa: E731
    sampling = replace(DRAWN, batch_size=2, num_samples=samples)
    made = Generation(here, prompts, sampling, decoder, stops=ends)
    for _ in made:
        pass
    return [row.tokens[row.prompt_tokens :] for row in made.rows], len(most), max(most)


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("kind", [NativeDecoder, TorchDecoder])
def test_a_row_that_ends_makes_room_for_the_next_at_once(kind: Any, samples: int) -> None:
    """Rows of 2, 3 and 4 tokens, then one of 7 and one of 1: 9 steps, where groups of two take 12."""
    whole = run_ranks(1, _in_two_rows, kind, samples)[0][0]
    for texts, steps, most in run_ranks(2, _in_two_rows, kind, samples):
        assert texts == whole and [len(text) for text in texts] == LENGTHS
        assert (steps, most) == (9, 2)
    if samples == 1:
        here = split(reference(seed=2), alone())
        apart = [new_tokens(here, [prompt], DRAWN)[0] for prompt in APART]
        assert whole == [text[:n] for text, n in zip(apart, LENGTHS, strict=True)]


# --- ids that must not be drawn -------------------------------------------------------------------------------------


def _beyond(world: World, config: GPTConfig, n_tokens: int) -> list[list[int]]:
    """Tokens drawn where every id beyond n_tokens has by far the largest logit, and padding rows larger ones still."""
    model = TensorParallelGPT(config, world.tp).eval()
    local_logits = model.local_logits

    def rigged(x: torch.Tensor) -> torch.Tensor:
        logits = local_logits(x)
        logits[:, max(0, n_tokens - model.vocab_lo) :] += 1e4
        return logits

    model.local_logits = rigged  # type: ignore[method-assign]
    with torch.no_grad():
        model.transformer.wte.weight[model.vocab_hi - model.vocab_lo :] = 1e4
    ways = [(0.0, 1, 1.0), (0.8, 200, 1.0), (5.0, 0, 1.0), (5.0, 7, 0.9)]
    sampling = Sampling(n_tokens, max_new_tokens=3, num_samples=5)
    drawn = [new_tokens(model, [[1, 2]], replace(sampling, temperature=t, top_k=k, top_p=p)) for t, k, p in ways]
    return [row for rows in drawn for row in rows]


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_ids_beyond_the_tokenizer_are_never_drawn(tp: int) -> None:
    # with 30 of 101 ids known, at tp 4 two ranks know none; 50304 rows for 50257 tokens are nanoGPT's
    for vocab_size, n_tokens in ((101, 30), (101, 1), (50304, 50257)):
        config = GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=4, n_embd=8)
        first, *others = run_ranks(tp, _beyond, config, n_tokens)
        assert all(0 <= token < n_tokens for row in first for token in row)
        assert all(rows == first for rows in others)
        if n_tokens > 1:
            assert len({token for row in first for token in row}) > 10


def test_padding_rows_change_no_token() -> None:
    model = reference(seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plan.partition.VOCAB_MULTIPLE", 512)
        padded = TensorParallelGPT(SMALL, alone()).eval()
    padded.load(lambda name, rule: take(dict(model.named_parameters())[name].detach(), rule, 0))
    with torch.no_grad():
        padded.transformer.wte.weight[523:] = 1e4
    plain = split(model, alone())
    for sampling in (GREEDY, DRAWN, replace(DRAWN, top_k=0)):
        assert new_tokens(padded, PROMPTS, sampling) == new_tokens(plain, PROMPTS, sampling)


def test_logits_that_are_no_numbers_are_said_to_be() -> None:
    model = split(reference(), alone())
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    for sampling in (GREEDY, DRAWN, replace(DRAWN, top_k=0)):
        with pytest.raises(UserError, match="logits are not finite numbers.*--dtype=float32"):
            new_tokens(model, PROMPTS, sampling)


# --- the draw -------------------------------------------------------------------------------------------------------

LOGITS = np.array([2.0, 1.5, 1.4, 0.3, -0.2, 0.9, -3.0, 1.1, 0.0, -1.0, 1.9, 0.4], dtype=np.float32)
DRAWS = 20_000


def expected_shares(temperature: float, top_k: int, top_p: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each token's probability, in float64, with transformers deciding which tokens are kept."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.tensor(LOGITS, dtype=torch.float64).unsqueeze(0) / temperature
    ids = torch.zeros(1, 1, dtype=torch.int64)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


def chi_square(counts: Any, shares: Any) -> tuple[float, float]:
    """(statistic, what it exceeds by chance once in a million), the latter by Wilson and Hilferty's approximation."""
    kept = shares > 0
    assert counts[~kept].sum() == 0, "a token was drawn that should have been left out"
    expected = shares[kept] * counts.sum()
    df = int(kept.sum()) - 1
    limit = df * (1 - 2 / (9 * df) + 4.7534 * math.sqrt(2 / (9 * df))) ** 3
    return float(((counts[kept] - expected) ** 2 / expected).sum()), limit


def draw(sampling: Sampling, coordinates: list[tuple[int, int, int]]) -> Any:
    """How often each of the 12 tokens is chosen, with the numbers of these (seed, sample, position)."""
    order = np.random.default_rng(0).permutation(12)  # as if ranks had brought them in some order
    ids = order.astype(np.int32)
    counts = np.zeros(12, dtype=np.int64)
    for where in coordinates:
        seed, sample, position = where
        counts[choose(LOGITS[order], ids, replace(sampling, seed=seed), sample, position)] += 1
    return counts


ALONG = {
    "positions": [(1337, 0, i) for i in range(DRAWS)],
    "samples": [(1337, i, 0) for i in range(DRAWS)],
    "seeds": [(i, 0, 0) for i in range(DRAWS)],
    "rows of a text": [(2**62 + 5, i // 200, i % 200) for i in range(DRAWS)],
}


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("temperature, top_k, top_p", [(0.8, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.9), (0.8, 8, 0.7)])
def test_tokens_come_as_often_as_they_should(along: str, temperature: float, top_k: int, top_p: float) -> None:
    if along != "positions" and temperature != 0.8:
        return  # one way through the other coordinates is enough
    sampling = Sampling(12, temperature=temperature, top_k=top_k, top_p=top_p)
    statistic, limit = chi_square(draw(sampling, ALONG[along]), expected_shares(temperature, top_k, top_p))
    print(f"{statistic:.1f} of {limit:.1f}")
    assert statistic < limit


def test_the_chi_square_test_sees_a_wrong_temperature() -> None:
    counts = draw(Sampling(12, temperature=0.8, top_k=0), ALONG["positions"])
    statistic, limit = chi_square(counts, expected_shares(0.9, 0, 1.0))
    assert statistic > 2 * limit


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(0.5, 3, 1.0), (1.0, 0, 0.5), (2.0, 0, 0.97), (1.0, 6, 0.3), (1.0, 0, 1e-6)]
)
def test_the_kept_tokens_are_transformers(temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(12, temperature=temperature, top_k=top_k, top_p=top_p)
    seen = {choose(LOGITS, np.arange(12, dtype=np.int32), sampling, 0, position) for position in range(3000)}
    assert seen == set(np.flatnonzero(expected_shares(temperature, top_k, top_p)).tolist())


def total_variation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.abs(a - b).sum() / 2)


def softmax(values: NDArray[np.float32]) -> NDArray[np.float64]:
    p = np.exp(values.astype(np.float64))
    return p / p.sum()


@pytest.mark.parametrize("apart", [0.1, 0.5, 1.5])
def test_two_models_draw_alike_as_often_as_the_paper_says(apart: float) -> None:
    """Daliri, Musco, Suresh: at least (1 - d) / (1 + d) of the time, and no two can more often than 1 - d."""
    rng, ids, draws = np.random.default_rng(4), np.arange(50, dtype=np.int32), 4000
    one = rng.normal(size=50).astype(np.float32) * 2
    other = one + rng.normal(size=50).astype(np.float32) * apart
    d = total_variation(softmax(one), softmax(other))
    sampling = Sampling(50, temperature=1.0, top_k=0)
    alike = sum(choose(one, ids, sampling, 0, i) == choose(other, ids, sampling, 0, i) for i in range(draws)) / draws
    slack = 4 * (0.25 / draws) ** 0.5
    assert (1 - d) / (1 + d) - slack < alike < 1 - d + slack
    print(f"distance {d:.2f}: alike {alike:.2f}")


def test_a_tokens_noise_depends_on_no_other_token() -> None:
    ids = np.array([50256, 3, 0, 17], dtype=np.int32)
    whole = noise(5, 2, 9, np.arange(50257, dtype=np.int32))
    assert np.array_equal(noise(5, 2, 9, ids), whole[ids])
    assert abs(whole.mean() - 0.5772156649) < 0.02 and abs(whole.var() - math.pi**2 / 6) < 0.05  # Gumbel's
    for other in ((6, 2, 9), (5, 3, 9), (5, 2, 10)):
        assert abs(np.corrcoef(whole, noise(*other, np.arange(50257, dtype=np.int32)))[0, 1]) < 0.02


def test_minus_infinity_is_never_drawn() -> None:
    values = np.array([-np.inf, 0.0, -np.inf, -np.inf], dtype=np.float32)
    for position in range(50):
        for temperature in (0.0, 1e-9, 1.0, 100.0):
            sampling = Sampling(4, temperature=temperature, top_k=3)
            assert choose(values, np.arange(4, dtype=np.int32), sampling, 0, position) == 1


def test_candidates_stay_where_the_logits_are() -> None:
    """They travel as all else on the axis does: between GPUs, not through their hosts."""
    logits, sampling = torch.empty(3, 40, device="meta"), Sampling(n_tokens=40, top_k=8)
    assert candidates(logits, 0, 80, sampling, 2).device.type == "meta"


# --- candidates -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_likeliest_are_those_of_a_stable_sort(levels: list[int], k: int, seed: int) -> None:
    scale = [1.0, 1e-40, 3e38, float("inf")][seed % 4]  # ordinary, denormal, huge, and both infinities
    logits = torch.tensor([[level * scale if level else -0.0 for level in levels]])
    k = min(k, len(levels))
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(likeliest(logits, k), order)


@given(st.lists(st.integers(-4, 4), min_size=5, max_size=60), st.integers(0, 12), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equal_logits_are_chosen_alike_at_every_tp(levels: list[int], top_k: int, at: int) -> None:
    """Half precision makes many equal logits: the split of the vocabulary must not decide between them."""
    logits = torch.tensor([levels], dtype=torch.bfloat16)
    n = len(levels)
    for temperature in (0.0, 0.9):
        sampling = Sampling(n - 1, temperature=temperature, top_k=top_k, top_p=0.95)
        picks = set()
        for tp in range(1, 6):
            parts = torch.stack([candidates(logits[:, lo:hi], lo, n, sampling, tp) for lo, hi in spans(n, tp)])
            bits, ids = parts[:, :, 0].transpose(0, 1).flatten(1).numpy()
            picks.add(choose(bits.view(np.float32), ids, sampling, 0, at))
        assert len(picks) == 1


# --- agreement ------------------------------------------------------------------------------------------------------


def _nobody_hears(x: torch.Tensor, axis: Axis, direction: str, source: int = 0) -> torch.Tensor:
    x[:, 0] = 1  # a token for each row, whichever
    return x


def _faulty(world: World, model: GPT, deaf: bool) -> list[list[int]]:
    """Tokens where rank 1's device computes a little wrong, and, if deaf, no rank hears what another has chosen."""
    if deaf:
        generation.broadcast = _nobody_hears
    here = split(model, world.tp)
    if world.rank == 1:
        local_logits, hidden = here.local_logits, here.hidden
        noise = torch.Generator().manual_seed(0)
        here.hidden = lambda *args: hidden(*args).clone().add_(0.05)  # type: ignore[method-assign]
        here.local_logits = lambda x: local_logits(x) + torch.randn(  # type: ignore[method-assign]
            len(x), here.vocab_hi - here.vocab_lo, generator=noise
        )
    rows = generate(here, PROMPTS, DRAWN, TorchDecoder(here)).rows
    return [row.tokens[row.prompt_tokens :] for row in rows]


def test_ranks_agree_though_one_of_them_computes_something_else() -> None:
    model = reference(seed=2)
    results = run_ranks(3, _faulty, model, False)
    assert results[0] == results[1] == results[2]
    assert results[0] != new_tokens(split(model, alone()), PROMPTS, DRAWN)  # the fault was real
    apart = run_ranks(3, _faulty, model, True)
    assert apart[0] != apart[1]  # what this test would see if ranks did not tell each other


# --- the text of a row ---------------------------------------------------------------------------------------------------


def listen(tokenizer: Tokenizer, tokens: list[int], stop: str) -> tuple[str, bool, list[str]]:
    """(the text, whether it ended by the stop text, what was final after each token and at the end)."""
    row, finals = RowText(tokenizer, stop), []
    ended = False
    for token in tokens:
        ended = row.push(token)
        finals.append(row.text[: row.final])
        if ended:
            break
    text = row.finish()
    return text, ended, [*finals, row.text[: row.final]]


def check_listening(tokenizer: Tokenizer, tokens: list[int], whole: str, stop: str) -> None:
    text, ended, finals = listen(tokenizer, tokens, stop)
    at = whole.find(stop) if stop else -1
    assert (text, ended) == ((whole[:at], True) if at >= 0 else (whole, False))
    assert all(b.startswith(a) for a, b in zip(finals, finals[1:], strict=False))  # nothing is ever taken back
    assert finals[-1] == text


BPE = GPT2Tokenizer()
TEXTS = st.text(alphabet="ab\n é語😀", max_size=30)


@given(TEXTS, st.text(alphabet="ab\n é語😀", max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stop_and_stream_by_bpe(whole: str, stop: str) -> None:
    check_listening(BPE, BPE.encode(whole), whole, stop)
    unmerged = [token for char in whole for token in BPE.encode(char)]  # each emoji is three tokens, none of them a character
    check_listening(BPE, unmerged, whole, stop)


@given(TEXTS, st.text(alphabet="ab\n", min_size=1, max_size=5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stop_by_characters(whole: str, stop: str) -> None:
    tokenizer = CharTokenizer(list("ab\n é語😀"))
    check_listening(tokenizer, tokenizer.encode(whole), whole, stop)


def test_a_piece_is_never_half_a_character() -> None:
    tokens = BPE.encode("🦉 says 語")
    _, _, finals = listen(BPE, tokens, "")
    assert len(tokens) > 5 and not any("\ufffd" in final for final in finals)
    cut, _, finals = listen(BPE, tokens[:1], "")  # the owl's first bytes alone
    assert finals[0] == "" and cut == BPE.decode(tokens[:1]) == "\ufffd"


class Bytes(Tokenizer):
    """A tokenizer whose tokens are any bytes."""

    kind, eot, n_vocab = "bytes", None, 3

    def __init__(self, *table: bytes):
        self.table = table

    def decode_bytes(self, ids: Any) -> bytes:
        return b"".join(self.table[i] for i in ids)


def test_what_was_held_back_is_released() -> None:
    tokens: Callable[..., Any] = Bytes
    assert listen(tokens(b"x##", b"#", b"y"), [0, 2], "###") == ("x##y", False, ["x", "x##y", "x##y"])
    assert listen(tokens(b"x##", b"#", b"y"), [0], "###") == ("x##", False, ["x", "x##"])
    assert listen(tokens(b"x##", b"#", b"y"), [0, 1, 2], "###") == ("x", True, ["x", "x", "x"])
    assert listen(tokens(b"a", b"aab"), [0, 0, 1], "aab") == ("aa", True, ["", "", "aa", "aa"])


def test_half_a_character_after_the_stop_text_is_left_out() -> None:
    tokenizer: Any = Bytes("one.é".encode()[:-1], b"\xa9")
    assert listen(tokenizer, [0, 1], ".") == ("one", True, ["one", "one"])

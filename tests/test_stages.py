"""Text by pipeline stages: the same at every layout, what is sent, what a rank holds, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_generation import DRAWN, GREEDY, PROMPTS, reference
from test_sample_tp import weights  # noqa: F401

import eval_tp
import sample_tp
from base.errors import UserError
from cli.grammar import parse
from cli.options import EvalOptions, SampleOptions
from inference.packed import pack
from inference.pipeline import StageDecoder, generation_for
from inference.sampling import Sampling
from inference.speculation import Ngrams, Speculation
from model import GPT, GPTConfig
from parallel.ledger import total
from parallel.parameters import take
from parallel.quantized import quantize
from parallel.ring import Ring
from plan.partition import Partition, Rule
from plan.stages import Stages
from tp_model import TensorParallelGPT
from world.mesh import World, sizes

DEEP = GPTConfig(block_size=16, vocab_size=523, n_layer=5, n_head=5, n_embd=40)


def stage(model: GPT, world: World, **how: Any) -> TensorParallelGPT:
    """This rank's part of the reference."""
    full = dict(model.named_parameters()) | {"transformer.wte.weight": model.lm_head.weight}

    def read(name: str, rule: Rule) -> torch.Tensor:
        return take(full[name].detach(), rule, world.tp.rank)

    stages = Stages.over(model.config, world.pp.size, world.pp.rank)
    return TensorParallelGPT(model.config, world.tp, read, stages=stages, **how).eval()


def _texts(world: World, model: GPT, samplings: list[Sampling], by_torch: bool) -> list[list[list[int]]]:
    here, found = stage(model, world), []
    for sampling in samplings:
        kind, decoder = generation_for(here, world.pp, False)
        if by_torch and world.pp.size > 1:
            decoder = StageDecoder(here, Ring(world.pp))
        made = kind(here, PROMPTS, sampling, decoder)
        for _ in made:
            pass
        found.append([row.tokens[row.prompt_tokens :] for row in made.rows])
    return found


SAMPLINGS = [GREEDY, DRAWN, replace(DRAWN, num_samples=3, batch_size=5, max_new_tokens=6), replace(DRAWN, batch_size=1)]


@pytest.fixture(scope="module")
def whole() -> tuple[GPT, Any]:
    model = reference(DEEP)
    return model, run_ranks(1, _texts, model, SAMPLINGS, False)[0]


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("pp, tp", [(2, 1), (3, 1), (2, 2)])
def test_the_text_does_not_depend_on_the_stages(whole: Any, pp: int, tp: int, by_torch: bool) -> None:
    model, expected = whole
    for found in run_ranks(pp * tp, _texts, model, SAMPLINGS, by_torch, pp=pp, tp=tp):
        assert found == expected


# --- other ways to write --------------------------------------------------------------------------------------------


def _variant(world: World, model: GPT, what: str) -> tuple[list[list[int]], int]:
    """The texts, and how many guesses were right."""
    here, tp = stage(model, world, sequence_parallel=what == "sequence"), world.tp
    here.to(getattr(torch, what) if "float" in what else torch.float32)
    if what == "int8":
        ends = here.stages.has_first, here.stages.has_last
        quantize(here, lambda mine: world.gather(mine)[world.rank - tp.rank :][: tp.size], ends)
    pack(here)
    draft = Speculation(Ngrams(), 4) if what == "draft" else None
    kind, decoder = generation_for(here, world.pp, False)
    again = [[1, 2, 3, 1, 2, 3, 1, 2], [9], [4, 4, 4, 4, 4], [8, 9, 8, 9, 8], [5]]
    lasts = {0: 3, 2: 1, 3: 9} if what == "ends" else {}
    stops = lambda row, token: row.new + 1 == lasts.get(row.number)  # noqa: E731
    sampling = replace(GREEDY, batch_size=3, max_new_tokens=24, temperature=0.0 if what == "draft" else 0.8)
    made = kind(here, again, sampling, decoder, draft, stops)
    for _ in made:
        pass
    return [row.tokens for row in made.rows], made.draft.accepted if made.draft else 0


@pytest.mark.parametrize("what", ["int8", "bfloat16", "float16", "draft", "ends", "sequence"])
def test_other_ways_to_write_are_the_same_too(what: str) -> None:
    model = GPT(DEEP).eval() if what == "draft" else reference(DEEP, seed=2)  # as initialised it repeats itself
    expected, right = run_ranks(1, _variant, model, what)[0]
    assert what != "draft" or right > 10
    for pp, tp in ((2, 1), (3, 1), (2, 2)):
        for found, accepted in run_ranks(pp * tp, _variant, model, what, pp=pp, tp=tp):
            assert found == expected and (accepted > 10) == (what == "draft")


# --- what is sent ---------------------------------------------------------------------------------------------------


def _sent(world: World, model: GPT, silent: str) -> tuple[dict[Any, tuple[int, int]], int, list[list[int]]]:
    send = Ring.send

    def sent(ring: Ring, x: torch.Tensor, direction: str = "forward") -> None:
        if silent == f"{x.dtype}":
            x = x.clone()
            x[..., 1 if x.dtype == torch.int64 else 0 :] = 0  # a choice begins with how many tokens it has
        send(ring, x, direction)

    Ring.send = sent  # type: ignore[method-assign, assignment]
    here = stage(model, world)
    kind, decoder = generation_for(here, world.pp, False)
    made = kind(here, [[1, 2], [3, 4], [5, 6]], replace(GREEDY, max_new_tokens=5), decoder)
    for _ in made:
        pass
    account = world.ledger.snapshot()
    lines = {
        (way, op): total(account, block="pipeline", direction=way, op=op)
        for way in ("forward", "step") for op in ("send", "recv")
    }  # fmt: skip
    return ({key: (t.calls, t.bytes) for key, t in lines.items()}, world.ledger.forward_passes,
            [row.tokens for row in made.rows])


@pytest.mark.parametrize("pp, tp", [(2, 1), (3, 1), (2, 2)])
def test_what_stages_send_for_a_text(pp: int, tp: int) -> None:
    """Each group makes 5 passes; the first reads 2 tokens a row, the others one."""
    stream = 3 * (2 + 4) * DEEP.n_embd * 4  # rows x tokens x width x float32
    candidates, choices = 3 * 5 * tp * 2 * 4, 3 * 5 * 2 * 8  # the best id and its logit; count and token
    passes = pp * 5
    for rank, (sent, made, _) in enumerate(run_ranks(pp * tp, _sent, reference(DEEP), "", pp=pp, tp=tp)):
        first, last = rank < tp, rank >= (pp - 1) * tp
        assert made == passes
        assert sent["forward", "recv"] == ((0, 0) if first else (passes, stream))
        assert sent["forward", "send"] == ((0, 0) if last else (passes, stream))
        assert sent["step", "send"] == (passes, candidates if last else choices)
        assert sent["step", "recv"] == (passes, candidates if first else choices)


@pytest.mark.parametrize("silent", ["torch.float32", "torch.int32", "torch.int64"])
def test_each_message_of_a_text_is_needed(silent: str) -> None:
    expected, found = (
        [text for _, _, text in run_ranks(2, _sent, reference(DEEP), which, pp=2, tp=1)] for which in ("", silent)
    )
    assert expected != found


def _held(world: World, model: GPT) -> tuple[int, int]:
    here = stage(model, world)
    numbers = sum(p.numel() for p in here.parameters())
    pack(here)
    kind, decoder = generation_for(here, world.pp, False)
    return numbers, decoder.new_cache(4, 16).nbytes


def test_a_stage_holds_its_layers_alone() -> None:
    model, split = reference(DEEP), Partition.of(DEEP, 1)
    caches = [run_ranks(1, _held, model)[0][1]]
    for rank, (numbers, cache) in enumerate(run_ranks(3, _held, model, pp=3, tp=1)):
        stages = Stages.over(DEEP, 3, rank)
        own = split.count(0, filter(stages.holds, split.table))
        padding = (split.local_vocab - DEEP.vocab_size) * DEEP.n_embd * (rank != 1)
        assert numbers == own + padding < 0.6 * split.count()
        assert cache == caches[0] * (1, 3, 1)[rank] // 5


# --- the commands ---------------------------------------------------------------------------------------------------


def _run(world: World, kind: Any, main: Any, words: list[str]) -> None:
    main(world, parse(kind, words, "x"))


def test_the_commands_take_stages(weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    words = [f"--init_from={weights}", "--device=cpu"]
    text, said = tmp_path / "text", []
    text.write_text("One two three, and so on to the end of a window. " * 9)
    for pp, tp in ((1, 1), (2, 1), (2, 2)):
        for draft in ("", str(weights)):
            run_ranks(pp * tp, _run, SampleOptions, sample_tp.main, [*words, f"--pp={pp}", "--max_new_tokens=9",
                      "--prompt=One", "--prompt=Two or", "--num_samples=3", f"--draft={draft}"], pp=pp, tp=tp)
        run_ranks(pp * tp, _run, EvalOptions, eval_tp.main, [*words, f"--pp={pp}", f"--text={text}", "--batch_size=2"],
                  pp=pp, tp=tp)
        shown = capfd.readouterr()
        said.append(shown.out)
        assert pp == 1 or f"world {pp * tp} = dp 1 x pp 2 x tp {tp}" in shown.err
    assert said[0] == said[1] == said[2] and "perplexity" in said[0]


@pytest.mark.parametrize("words, message", [
    (["--pp=3"], "--pp=3: 3 stages are more than n_layer=2. Use a --pp of at most 2."),
    (["--pp=2", "--sync=every:2"], "--pp=2 together with --sync=every:2, where a stage ends between sync points: use one"),
    (["--pp=2", "--sync=delay:1"], "--pp=2 together with --sync=delay:1, where a stage ends between sync points: use one"),
    (["--pp=2", "--kernels=True"], "--pp=2 together with --kernels=True: use one of them."),
])  # fmt: skip
def test_what_stages_cannot_sample(weights: Path, words: list[str], message: str) -> None:  # noqa: F811
    pp = int(words[0][-1])
    with pytest.raises(AssertionError, match=re.escape(f"UserError: {message}")):
        run_ranks(pp, _run, SampleOptions, sample_tp.main, [f"--init_from={weights}", "--device=cpu", *words], pp=pp, tp=1)


def test_worlds_that_are_no_pipelines() -> None:
    with pytest.raises(UserError, match="world size 5 cannot be split into pipelines of 2 x 2 ranks .* Start 4 or 8 proc"):
        sizes(5, 0, "sample_tp.py", 2)

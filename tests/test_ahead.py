"""Tokens that are chosen on the device, with the host one step behind: the same text as by the host, from steps that are
captured once, and one wait a token. What is captured and replayed runs on the CPU here, see test_decoding.Reruns."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import alone, run_ranks
from test_decoding import ODD, Reruns, reference, split
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from base.errors import UserError
from inference import ahead
from inference.ahead import Ahead, draw, noise
from inference.cuda_graphs import GraphDecoder
from inference.decoders import TorchDecoder
from inference.generation import Generation
from inference.sampling import Row, Sampling, choose, noise_start
from inference.sampling import noise as noise_of_one
from parallel.collectives import Axis
from world.mesh import World

BASE = Sampling(ODD.vocab_size, max_new_tokens=12, seed=3)
WAYS = {
    "drawn": BASE,
    "greedy, two samples": replace(BASE, temperature=0, num_samples=2),
    "nucleus, ends when full": replace(BASE, top_p=0.7, max_new_tokens=30, overflow="stop", batch_size=2),
    "slides": replace(BASE, top_k=5, max_new_tokens=30),
    "one token": replace(BASE, max_new_tokens=1),
    "two tokens": replace(BASE, max_new_tokens=2),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], [[9, 8] * 15, [7]]


def written(world: World, is_ahead: bool, sampling: Sampling, every: int) -> list[Any]:
    """Of each group of prompts: the tokens, whether the rows have ended, on rank 0 also the order in which they grew, and
    how many tokens were decoded. every: rank 0 ends a row with a token that this divides; 0: with none."""
    model = split(reference(ODD), world.tp)
    decoder = GraphDecoder(model, Reruns()) if is_ahead else TorchDecoder(model)
    found = []
    for prompts in PROMPTS:
        made = Generation(
            model, prompts, sampling, decoder, stops=lambda row, token: bool(every) and token % every == 0
        )
        grown = [(row.number, row.new) for row in made]
        rows = [(row.tokens, row.ended) for row in made.rows]
        found.append((rows, grown if world.rank == 0 else None, made.timing.decode_tokens))
    return found


@pytest.mark.parametrize("every", [0, 5], ids=["to the end", "stopped"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tp", [1, 3])
def test_the_text_is_that_of_the_host(tp: int, way: str, every: int) -> None:
    ours = run_ranks(tp, written, True, WAYS[way], every)
    hosts = run_ranks(tp, written, False, WAYS[way], every)
    if every and WAYS[way].batch_size < 3:  # the host knows one step earlier that the next row may begin
        hosts, ours = ([[rows for rows, _, _ in mine] for mine in each] for each in (hosts, ours))
        assert ours == hosts
        return
    assert ours == hosts
    assert all([rows for rows, _, _ in mine] == [rows for rows, _, _ in ours[0]] for mine in ours)


def _alone(world: World, op: str) -> list[Any]:
    """One kind of message is left out: each rank hears itself alone."""

    def gathered(x: Tensor, axis: Axis, direction: str) -> Tensor:
        return torch.stack([x] * axis.size)

    def kept(x: Tensor, axis: Axis, direction: str, source: int = 0) -> Tensor:
        return x

    if op == "all_gather":
        ahead.all_gather = gathered
    if op == "broadcast":
        ahead.broadcast = kept
    return [rows for rows, _, _ in written(world, True, BASE, 5)]


@pytest.mark.parametrize("op", ["all_gather", "broadcast"])
def test_every_message_of_a_choice_is_needed(op: str) -> None:
    """Without the gather the text is another. Without the broadcast nobody hears that rank 0 has ended a row: it leaves
    while the others go on, and its next message is another than theirs."""
    right = run_ranks(3, _alone, "")
    if op == "all_gather":
        assert run_ranks(3, _alone, op) != right
    else:
        with pytest.raises(AssertionError, match="brought another message"):
            run_ranks(3, _alone, op)


@given(st.integers(0, 2**32), st.sampled_from(["ties", "plain"]), st.integers(1, 60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_device_draws_what_the_host_draws(seed: int, kind: str, n: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(3, n)) * 3).astype(np.float32)
    values = (np.round(values * 2) / 2).astype(np.float32) if kind == "ties" else values
    ids = np.stack([rng.permutation(50257)[:n] for _ in range(3)]).astype(np.int32)
    for temperature, top_k, top_p in ((0.8, 200, 1.0), (0.0, 0, 1.0), (1.3, 0, 0.9), (1.0, 7, 0.5)):
        sampling = Sampling(50257, temperature, top_k, top_p, seed=seed)
        start = torch.tensor([noise_start(seed, i, 4).view(np.int64)[0] for i in range(3)])
        drawn = draw(torch.from_numpy(values), torch.from_numpy(ids), start, sampling)
        assert drawn.tolist() == [choose(values[i], ids[i], sampling, i, 4) for i in range(3)]


def test_the_devices_noise_is_the_hosts() -> None:
    ids = np.arange(50257, dtype=np.int32)
    start = torch.from_numpy(noise_start(2**62 + 1, 3, 5).view(np.int64))
    found = noise(start, torch.from_numpy(ids).long().unsqueeze(0))[0].numpy()
    assert np.allclose(found, noise_of_one(2**62 + 1, 3, 5, ids), rtol=1e-14, atol=1e-14)


def test_logits_that_are_no_numbers_end_the_run() -> None:
    model = split(reference(ODD), alone())
    made = iter(Generation(model, [[1, 2]], BASE, GraphDecoder(model, Reruns())))
    next(made)
    with torch.inference_mode():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(UserError, match="the model's logits are not finite numbers"):
        list(made)


def test_steps_are_captured_once_for_all_prompts_and_rows() -> None:
    """Rows that end are masked; other prompts, and other numbers of tokens, take the same places in memory."""
    model, capture = split(reference(ODD), alone()), Reruns()
    decoder = GraphDecoder(model, capture)
    for prompts in ([[1, 2, 3], [4], [5, 6]], [[7], [8, 9], [1]], [[3] * 20, [4], [5]]):
        for _ in Generation(model, prompts, BASE, decoder, stops=lambda row, token: row.new == 2 * row.number + 1):
            pass
    assert len(capture.captured) == 1
    places = {cache.kv[0].data_ptr() for cache in decoder._places.values()}
    Generation(model, [[1]], BASE, decoder).__iter__().__next__()
    assert {cache.kv[0].data_ptr() for cache in decoder._places.values()} == places


def test_more_rows_than_there_are_places_for() -> None:
    model, capture = split(reference(ODD), alone()), Reruns()
    decoder = GraphDecoder(model, capture)
    for rows in (1, 3, 2):
        made = Generation(model, [[1 + i] for i in range(rows)], BASE, decoder)
        plain = Generation(model, [[1 + i] for i in range(rows)], BASE, TorchDecoder(model))
        assert [row.new for row in made][-1] == [row.new for row in plain][-1] == 12
        assert [row.tokens for row in made.rows] == [row.tokens for row in plain.rows]
    assert len(capture.captured) == 3 and len(decoder._steps) == 2  # those of the first places are gone


class Waits(TorchDispatchMode):
    """Operations for which a GPU's host waits: reading a number, and copies to or from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if any(part in name for part in ("_local_scalar_dense", "_to_copy", "nonzero", "masked_select", "unique")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_host_waits_once_a_token_and_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = split(reference(ODD), alone()), list[str]()
    launch, collect = Ahead.launch, Ahead.collect

    def launched(self: Ahead, *args: Any) -> None:
        with Waits() as waits:
            launch(self, *args)
        assert not [name for name in waits.found if "_local_scalar_dense" in name or "nonzero" in name], waits.found
        order.append("launch")

    def collected(self: Ahead) -> Any:
        order.append("wait")
        return collect(self)

    monkeypatch.setattr(Ahead, "launch", launched)
    monkeypatch.setattr(Ahead, "collect", collected)
    rows: list[Row] = list(Generation(model, [[1, 2]], BASE, GraphDecoder(model, Reruns())))
    steps = BASE.max_new_tokens - 1
    assert rows[-1].new == BASE.max_new_tokens and order.count("wait") == order.count("launch") == steps
    assert order == ["launch", *["launch", "wait"] * (steps - 1), "wait"]


def _without_the_compiler(world: World, is_ahead: bool) -> int:
    for name in [name for name in sys.modules if name.startswith("torch._dynamo")]:
        del sys.modules[name]
    sys.modules["torch._dynamo"] = None  # type: ignore[assignment]
    return len(written(world, is_ahead, WAYS["drawn"], 0))


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_text_needs_no_compiler(is_ahead: bool) -> None:
    """Importing it takes seconds, before the first token."""
    assert run_ranks(2, _without_the_compiler, is_ahead) == [len(PROMPTS)] * 2

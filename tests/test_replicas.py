"""Drift: a bit that differs where ranks should hold the same is found, and named."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from parallel.replicas import DriftError, check_alike, checksum
from world.mesh import World

WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int64: torch.int64, torch.uint8: torch.uint8}


@pytest.mark.parametrize("dtype", list(WORDS))
def test_a_checksum_sees_every_bit_and_every_place(dtype: torch.dtype) -> None:
    x = torch.arange(1, 41).to(dtype).view(5, 8)
    before = int(checksum(x))
    for i in range(40):
        for bit in range(8 * dtype.itemsize):
            other = x.clone()
            other.view(WORDS[dtype]).view(-1)[i] ^= torch.tensor(1 << bit if bit < 63 else -1 << 63).to(WORDS[dtype])
            assert int(checksum(other)) != before, (i, bit)
    assert before not in (int(checksum(x.t())), int(checksum(x.flatten().roll(1))), int(checksum(x.flip(0))))
    whole = sum(int(word) * (2 * i + 1) for i, word in enumerate(x.view(WORDS[dtype]).flatten().tolist()))
    assert (before - whole) % 2**64 == 0
    assert before == int(checksum(x.clone())) == int(checksum(x.t().contiguous().t()))


def _alike(world: World, tensors: list[dict[str, Tensor]]) -> tuple[str, int, int]:
    said = ""
    try:
        check_alike(tensors[world.rank], world.tp.at("optimizer"), "tp ranks", 500)
    except DriftError as error:
        said = str(error)
    (tally,) = world.ledger.snapshot().values() if world.ledger.tallies else [None]
    return said, tally.calls if tally else 0, tally.bytes if tally else 0


@pytest.mark.parametrize("size", [2, 3])
def test_what_differs_is_named_with_ranks_and_step(size: int) -> None:
    name = "transformer.h.3.ln_1.weight"

    def made(change: float = 0.0, token: int = 4) -> dict[str, Any]:
        return {"batch": torch.tensor([3, token]), "transformer.wpe.weight": torch.ones(5, 4), name: torch.ones(4) + change}

    assert run_ranks(size, _alike, [made()] * size) == [("", 1, 24)] * size
    ranks = run_ranks(size, _alike, [made()] * (size - 1) + [made(3e-4)])
    line = f"replicated parameter {name} differs between tp ranks 0 and {size - 1} (max 3e-04) at step 500."
    assert [said for said, _, _ in ranks] == [line] * size
    ranks = run_ranks(size, _alike, [made()] + [made(token=5)] * (size - 1))
    said = ranks[0][0]
    assert said.startswith("batch mismatch at step 500 between tp ranks 0 (")
    assert said.endswith("). Ranks of a tp group must see the same data.")
    assert all(theirs == said for theirs, _, _ in ranks)


def test_long_tensors_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(1000.0)
    whole = int(checksum(x))
    monkeypatch.setattr("parallel.replicas.AT_ONCE", 7)
    assert int(checksum(x)) == whole


def test_one_rank_and_no_tensors_say_nothing() -> None:
    assert run_ranks(1, _alike, [{"a": torch.ones(1)}]) == [("", 0, 0)]
    assert run_ranks(2, _alike, [{}, {}]) == [("", 0, 0)] * 2

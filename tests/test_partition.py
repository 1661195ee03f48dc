"""The split as arithmetic: every entry has one owner, heads stay whole, nothing has to divide."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from base.errors import UserError
from model import GPT, GPTConfig
from plan.partition import Partition, Rule, Span, round_up, spans

SIZES: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 5,
    "n_embd": 20,
    "vocab_size": 131,
    "block_size": 16,
    "bias": True,
}
GPT2_SIZES: dict[str, Any] = {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "vocab_size": 50257,
    "block_size": 1024,
    "bias": True,
}


def partition(tp: int, **changes: Any) -> Partition:
    return Partition(**{**SIZES, **changes}, tp=tp)


def sizes(runs: list[Span]) -> list[int]:
    return [hi - lo for lo, hi in runs]


def heads(n_head: int, tp: int) -> list[int]:
    split = partition(tp, n_head=n_head, n_embd=4 * n_head)
    return sizes([split.heads(rank) for rank in range(tp)])


# --- spans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", range(1, 10))
def test_spans_tile_the_range_as_evenly_as_can_be(parts: int) -> None:
    for n in [*range(40), 50257, 50304]:
        runs = spans(n, parts)
        assert [i for lo, hi in runs for i in range(lo, hi)] == list(range(n))
        assert len(runs) == parts
        assert sizes(runs) == [
            len(part) for part in torch.empty(n).tensor_split(parts)
        ]  # the longer ones come first


def test_spans_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot split 5 over 0 parts"):
        spans(5, 0)


def test_round_up() -> None:
    assert [round_up(n, 64) for n in (1, 63, 64, 65, 50257)] == [64, 64, 64, 128, 50304]


def test_heads_of_the_models_that_do_not_divide() -> None:
    assert heads(25, 2) == [13, 12]
    assert heads(25, 4) == [7, 6, 6, 6]
    assert heads(25, 8) == [4, 3, 3, 3, 3, 3, 3, 3]
    assert heads(20, 3) == [7, 7, 6]
    assert heads(5, 5) == [1, 1, 1, 1, 1]


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tp", range(1, 6))
def test_every_entry_has_one_owner(tp: int, bias: bool) -> None:
    split = partition(tp, bias=bias)
    rules = split.rules
    assert list(rules) == list(split.shapes())
    for name, shape in split.shapes().items():
        rule = rules[name]
        if rule.dim is None:
            assert rule == Rule() and rule.local_shape(shape, 0) == shape
            continue
        owners = Counter(i for runs in rule.runs for lo, hi in runs for i in range(lo, hi))
        assert len(rule.runs) == tp
        assert owners == Counter(range(shape[rule.dim])), name
        for rank in range(tp):
            assert rule.owned(rank) == sum(sizes(list(rule.runs[rank]))) > 0


@pytest.mark.parametrize("tp", range(1, 6))
def test_what_is_split_and_what_is_not(tp: int) -> None:
    dims = {
        name.removeprefix("transformer.").replace("h.1.", "h.0."): rule.dim
        for name, rule in partition(tp).rules.items()
    }
    assert dims == {
        "wte.weight": 0,
        "wpe.weight": None,
        "h.0.ln_1.weight": None,
        "h.0.ln_1.bias": None,
        "h.0.attn.c_attn.weight": 0,
        "h.0.attn.c_attn.bias": 0,
        "h.0.attn.c_proj.weight": 1,
        "h.0.attn.c_proj.bias": None,
        "h.0.ln_2.weight": None,
        "h.0.ln_2.bias": None,
        "h.0.mlp.c_fc.weight": 0,
        "h.0.mlp.c_fc.bias": 0,
        "h.0.mlp.c_proj.weight": 1,
        "h.0.mlp.c_proj.bias": None,
        "ln_f.weight": None,
        "ln_f.bias": None,
    }


def test_qkv_runs_by_hand() -> None:
    """5 heads of 4 channels over 2 ranks: heads 0-2 and 3-4, the same heads in q [0, 20), k [20,
    40) and v [40, 60)."""
    rule = partition(2).rules["transformer.h.1.attn.c_attn.weight"]
    assert rule.runs == (((0, 12), (20, 32), (40, 52)), ((12, 20), (32, 40), (52, 60)))
    assert partition(2).rules["transformer.h.1.attn.c_proj.weight"].runs == (
        ((0, 12),),
        ((12, 20),),
    )


@pytest.mark.parametrize("tp", range(1, 6))
def test_a_head_is_whole_on_its_rank(tp: int) -> None:
    """Its rows of q, of k and of v, and the columns of c_proj that read it: without them attention
    would mix heads."""
    split = partition(tp)
    rules = split.rules
    qkv, proj = (
        rules["transformer.h.0.attn.c_attn.weight"],
        rules["transformer.h.0.attn.c_proj.weight"],
    )
    for rank in range(tp):
        rows = [i for lo, hi in qkv.runs[rank] for i in range(lo, hi)]
        columns = [i for lo, hi in proj.runs[rank] for i in range(lo, hi)]
        assert rows == [part * split.n_embd + channel for part in range(3) for channel in columns]
        assert len(columns) % split.head_dim == 0 and columns[0] % split.head_dim == 0


@pytest.mark.parametrize("tp", range(1, 6))
def test_the_table_in_memory_is_padded_alike_on_all_ranks(tp: int) -> None:
    split = Partition(**GPT2_SIZES, tp=tp)
    for rank in range(tp):
        lo, hi = split.vocabulary(rank)
        local = split.local_shapes(rank)["transformer.wte.weight"]
        assert local == (split.local_vocab, 768)
        assert split.local_vocab % 64 == 0 and hi - lo <= split.local_vocab < hi - lo + 65


# --- counts and names, against model.py and transformers ------------------------------------------


def test_gpt2_has_124439808_parameters() -> None:
    assert Partition(**GPT2_SIZES, tp=1).count() == 124_439_808
    xl = {**GPT2_SIZES, "n_layer": 48, "n_head": 25, "n_embd": 1600}
    assert Partition(**xl, tp=8).count() == 1_557_611_200


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tp", range(1, 6))
def test_the_ranks_own_the_full_count_once(tp: int, bias: bool) -> None:
    """Each rank's count is that of the parts it holds; what is replicated is held tp times."""
    split = partition(tp, bias=bias)
    whole = dict(GPT(GPTConfig(**{**SIZES, "bias": bias})).named_parameters())
    everywhere = ("ln_1", "ln_2", "ln_f", "wpe", "c_proj.bias")
    replicated = sum(
        p.numel() for name, p in whole.items() if any(part in name for part in everywhere)
    )
    assert split.count() == sum(p.numel() for p in whole.values())
    assert sum(split.count(rank) for rank in range(tp)) == split.count() + (tp - 1) * replicated


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_are_those_of_the_model(bias: bool) -> None:
    model = GPT(GPTConfig(**{**SIZES, "bias": bias}))
    assert partition(3, bias=bias).shapes() == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }


def test_names_are_nanogpts() -> None:
    """nanoGPT took its names from transformers (Conv1D weights are transposed there)."""
    with torch.device("meta"):
        state = GPT2LMHeadModel(GPT2Config()).state_dict()
    assert state.pop("lm_head.weight").shape == state["transformer.wte.weight"].shape
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    expected = {
        name: tuple(t.shape[::-1] if name.endswith(conv1d) else t.shape)
        for name, t in state.items()
    }
    assert Partition(**GPT2_SIZES, tp=1).shapes() == expected
    assert sum(t.numel() for t in state.values()) == 124_439_808


def test_of_reads_a_config() -> None:
    config = GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=3, n_embd=12, bias=False)
    assert Partition.of(config, 2) == Partition(1, 3, 12, 100, 8, False, 2)


# --- what cannot be split -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "changes", "message"),
    [
        (
            26,
            {"n_head": 25, "n_embd": 100},
            "tp=26 is more than n_head=25: some ranks would hold no head. "
            "Use a tp between 1 and 25 (even splits: 1, 5, 25).",
        ),
        (
            32,
            {"n_head": 12, "n_embd": 48},
            "tp=32 is more than n_head=12: some ranks would hold no head. "
            "Use a tp between 1 and 12 (even splits: 1, 2, 3, 4, 6, 12).",
        ),
        (0, {}, "tp=0: the tensor-parallel size is at least 1."),
        (-1, {}, "tp=-1: the tensor-parallel size is at least 1."),
        (4, {"vocab_size": 3}, "tp=4 is more than vocab_size=3: some ranks would hold no row."),
        (1, {"n_head": 3}, "n_embd=20 does not divide into n_head=3 heads. Use n_embd=18 or 21."),
        (
            1,
            {"n_head": 12, "n_embd": 7},
            "n_embd=7 does not divide into n_head=12 heads. Use n_embd=12.",
        ),
    ],
)
def test_messages(tp: int, changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as refused:
        partition(tp, **changes)
    assert str(refused.value) == message

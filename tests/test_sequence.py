"""Sequence parallelism: the same numbers, twice as many but halved messages, and a residual stream that is split."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import alone, run_ranks
from test_decoding import reference
from test_shm import carrier, message
from test_tp_model import data, deaf
from torch import Tensor

from base.errors import UserError
from bench.strategies import kept_bytes
from inference.decoders import TorchDecoder
from inference.generation import generate
from inference.sampling import Sampling
from model import GPTConfig
from parallel.collectives import GroupTransport, Transport
from parallel.ledger import total
from parallel.parameters import take
from parallel.quantized import quantize
from parallel.regions import WHOLE, SplitTokens, own_dropout
from parallel.shm import SLOT_BYTES
from plan.partition import spans
from plan.schedule import Schedule
from tp_model import Stream, TensorParallelGPT
from train import gradients
from world.mesh import World

CONFIG = GPTConfig(block_size=11, vocab_size=67, n_layer=2, n_head=5, n_embd=20)  # 11 tokens and 5 heads over 2, 3, 4 ranks
PLAIN = replace(CONFIG, bias=False, activation="gelu_tanh")


# --- the messages ---------------------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1), (2, 4, 3), (3, 7, 5), (1, 1000, 3), (5, 3, 2049), (1, 2, SLOT_BYTES // 4), (3, 5, SLOT_BYTES // 8 + 1),
    (2 * SLOT_BYTES // 32, 7, 8),
]  # fmt: skip  some with fewer tokens than ranks, some larger than a slot, with parts that begin and end anywhere in it


def transport_of(world: World, kind: str) -> Transport:
    assert isinstance(world.tp.transport, GroupTransport)
    if kind == "shm":
        return carrier(world)
    # what is written for nccl runs over gloo as well
    return replace(world.tp.transport, name=kind)


def _moved(world: World, kind: str, dtype: torch.dtype) -> tuple[bool, float, bool]:
    """(bits of the all-reduce, largest relative error otherwise, parts come back whole and inputs stay) over all shapes."""
    transport, same, error, whole = transport_of(world, kind), True, 0.0, True
    for shape in SHAPES:
        mine = message(world.rank, shape, dtype)
        before = mine.clone()
        lo, hi = spans(shape[1], world.size)[world.rank]
        part, expected = transport.reduce_scatter(mine), transport.all_reduce(mine, "sum")
        own = expected[:, lo:hi]
        same &= torch.equal(part, own) and part.untyped_storage().nbytes() == own.numel() * own.element_size()
        error = max(error, ((part - own).double().norm() / expected.double().norm()).item())
        whole &= torch.equal(mine, before) and torch.equal(transport.gather_tokens(own, shape[1]), expected)
        whole &= own.untyped_storage().nbytes() == expected.untyped_storage().nbytes()  # a view went in, not a copy
    return same, error, whole


@pytest.mark.parametrize("kind, dtype", [
    ("shm", torch.float32), ("shm", torch.bfloat16), ("shm", torch.float64), ("gloo", torch.float32), ("gloo", torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_have_the_bits_of_an_all_reduce(size: int, kind: str, dtype: torch.dtype) -> None:
    assert run_ranks(size, _moved, kind, dtype, comm="gloo") == [(True, 0.0, True)] * size


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_parts_are_padded_where_equal_ones_are_wanted(size: int) -> None:
    for _, error, whole in run_ranks(size, _moved, "nccl", torch.float32, comm="gloo"):
        assert error < 1e-6 and whole


def _any_type(world: World) -> list[Tensor]:
    transport, found = carrier(world), []
    for dtype in (torch.int64, torch.float16, torch.bool, torch.int8):
        lo, hi = spans(5, world.size)[world.rank]
        found.append(transport.gather_tokens((torch.arange(30).view(2, 5, 3) % 2).to(dtype)[:, lo:hi], 5))
    return found


def test_gathering_moves_any_type() -> None:
    for found in run_ranks(3, _any_type):
        for whole in found:
            assert torch.equal(whole, (torch.arange(30).view(2, 5, 3) % 2).to(whole.dtype))


def _different(world: World) -> str:
    transport = carrier(world)
    try:
        transport.gather_tokens(torch.zeros(1, 2, 3 + world.rank), 4)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_ranks_that_bring_different_parts_are_told() -> None:
    assert run_ranks(2, _different)[0] == "rank 1 of the group brought another message than rank 0"


# --- the model ------------------------------------------------------------------------------------------------------


def split(
    world: World, config: GPTConfig, dtype: torch.dtype = torch.float32, keep_gathered: bool = False, **how: Any
) -> TensorParallelGPT:
    state = dict(reference(config).named_parameters())
    how = {"sequence_parallel": True} | how
    model = TensorParallelGPT(
        config, world.tp, lambda name, rule: take(state[name].detach(), rule, world.tp.rank), dtype=dtype, **how
    )
    if keep_gathered and model.sequence_parallel:
        model.region = lambda T: SplitTokens(T, keep=True)  # type: ignore[method-assign]
    return model


Dropped = tuple[str, str, str] | tuple[str, str, str, int] | None


def worst_error(
    world: World, config: GPTConfig, dtype: torch.dtype, dropped: Dropped, how: dict[str, Any]
) -> tuple[float, str]:
    """Largest relative error of logits, loss, gradient norm and any gradient against model.py in float64, and where."""
    if dropped:
        deaf(*dropped)
    idx, targets = data(config)
    expected = reference(config).double()
    logits, _ = expected(idx, targets)  # its own loss is a float32
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    model = split(world, config, dtype, **how)
    with torch.no_grad():
        last, evaluated = model(idx)[0], model(idx, targets)[1]
    _, ours = model(idx, targets)
    assert last is not None and ours is not None and evaluated is not None
    ours.backward()
    gradients.sum_partial_gradients(model)
    whole = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.norm() for grad in whole.values()]).norm().item()
    errors = {
        "logits": ((last[:, 0] - logits[:, -1]).norm() / logits[:, -1].norm()).item(),
        "loss": abs(ours.item() / loss.item() - 1),
        "loss without gradients": abs(evaluated.item() / loss.item() - 1),
        # a float32
        "gradient norm": abs(gradients.grad_norm(model).item() / norm - 1) if dtype == torch.float32 or dropped else 0.0,
    }
    rules = model.split.rules
    for name, p in model.named_parameters():
        assert p.grad is not None
        part = take(whole[name], rules[name], world.tp.rank)
        scale = whole[name] if ".c_attn.bias" in name else part  # a key's bias has no gradient but for rounding
        errors[name] = ((model.parts.owned(name, p.grad) - part).norm() / scale.norm()).item()
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


WAYS: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}, {"keep_gathered": True}]


@pytest.mark.parametrize("how", WAYS, ids=["plain", "recomputed", "kept"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_forward_and_every_gradient_are_the_references(tp: int, how: dict[str, Any]) -> None:
    for config in (CONFIG, PLAIN):
        for rank in run_ranks(tp, worst_error, config, torch.float64, None, how):
            assert rank[0] < 1e-9, rank


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_float32(tp: int) -> None:
    for rank in run_ranks(tp, worst_error, CONFIG, torch.float32, None, {}):
        assert rank[0] < 2e-5, rank


COLLECTIVES: list[tuple[Any, ...]] = [
    *((block, *rest) for block in ("attention", "mlp") for rest in (
        ("forward", "all_gather"), ("forward", "reduce_scatter"), ("backward", "reduce_scatter"),
        ("backward", "all_gather", 0), ("backward", "all_gather", 1),  # of the output's gradient, and of the input again
    )),
    ("embedding", "forward", "reduce_scatter"), ("embedding", "backward", "all_gather"),
    ("head", "forward", "all_gather"), ("head", "backward", "reduce_scatter"), ("loss", "forward", "all_gather"),
    ("optimizer", "step", "all_reduce", 0), ("optimizer", "step", "all_reduce", 1),  # of the partial gradients, and the norm
]  # fmt: skip


@pytest.mark.parametrize("dropped", COLLECTIVES, ids=lambda dropped: "-".join(map(str, dropped)))
def test_every_collective_is_needed(dropped: Any) -> None:
    assert max(rank[0] for rank in run_ranks(2, worst_error, CONFIG, torch.float32, dropped, {})) > 1e-3


def test_a_parameter_left_out_of_the_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients.partial_gradients
    layers = ("h.1.ln_1.weight", "h.0.ln_2.bias", "h.1.attn.c_proj.bias", "h.0.mlp.c_proj.bias")
    for left_out in ("wpe.weight", *layers, "ln_f.bias"):

        def without(model: TensorParallelGPT, left_out: str = left_out) -> list[torch.nn.Parameter]:
            gone = {id(p) for name, p in model.named_parameters() if name == f"transformer.{left_out}"}
            return [p for p in whole(model) if id(p) not in gone]

        monkeypatch.setattr(gradients, "partial_gradients", without)
        assert max(run_ranks(2, worst_error, CONFIG, torch.float64, None, {}))[1] == f"transformer.{left_out}"


def _through_hidden(world: World) -> float:
    """Largest relative error of a replicated gradient that came through `hidden` and `local_logits`, which sums it by f."""
    idx, _ = data(CONFIG)
    weights = torch.randn(*idx.shape, CONFIG.vocab_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, model = reference(CONFIG).double(), split(world, CONFIG, torch.float64)
    (expected.lm_head(expected.hidden(idx)) * weights).sum().backward()
    (model.local_logits(model.hidden(idx)) * weights[..., model.vocab_lo : model.vocab_hi]).sum().backward()
    gradients.sum_partial_gradients(model)
    theirs = dict(expected.named_parameters())
    errors = [
        ((p.grad - theirs[name].grad).norm() / theirs[name].grad.norm()).item()  # type: ignore[operator, union-attr]
        for name, p in model.named_parameters() if model.split.rules[name].dim is None
    ]  # fmt: skip
    return max(errors)


def test_gradients_that_come_another_way() -> None:
    assert max(run_ranks(3, _through_hidden)) < 1e-9


def _one_rank(world: World) -> bool:
    idx, targets = data(CONFIG)
    here, there = (split(world, CONFIG, sequence_parallel=on) for on in (True, False))
    same = torch.equal(here.hidden(idx), there.hidden(idx))
    return same and not gradients.partial_gradients(here) and not here.sequence_parallel


def test_on_one_rank_it_is_nothing() -> None:
    assert run_ranks(1, _one_rank) == [True]


# --- what is said ---------------------------------------------------------------------------------------------------


def _account(world: World, how: dict[str, Any]) -> tuple[dict[str, tuple[int, int]], int, int]:
    idx, targets = data(CONFIG)
    model = split(world, CONFIG, **how)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _, loss = model(idx, targets)
        assert loss is not None
        loss.backward()
        gradients.sum_partial_gradients(model)
    told = {f"{e.layer} {e.block} {e.direction} {e.op}": (t.calls, t.bytes) for e, t in world.ledger.tallies.items()}
    # over gloo a reduce-scatter is an all-reduce of which a rank keeps its part
    seen = sum(event.count for event in profile.key_averages() if event.key in ("gloo:all_reduce", "gloo:all_gather"))
    return told, seen, sum(p.numel() for p in gradients.partial_gradients(model))


@pytest.mark.parametrize("tp", [2, 3])
def test_the_account_is_the_papers_and_the_profilers(tp: int) -> None:
    one = 3 * CONFIG.block_size * CONFIG.n_embd * 4  # B x T x C float32, whatever a rank's part of it
    for keep in (False, True):
        told, seen, numel = run_ranks(tp, _account, {"keep_gathered": keep}, comm="gloo")[tp - 1]
        assert seen == sum(calls for calls, _ in told.values())
        expected: dict[str, tuple[int, int]] = {}
        for at in (f"{layer} {block}" for layer in (0, 1) for block in ("attention", "mlp")):
            for way in ("forward", "backward"):
                expected |= {f"{at} {way} all_gather": (1, one), f"{at} {way} reduce_scatter": (1, one)}
            expected[f"{at} backward all_gather"] = (1, one) if keep else (2, 2 * one)
        expected |= {"None embedding forward reduce_scatter": (1, one), "None embedding backward all_gather": (1, one)}
        expected |= {"None head forward all_gather": (1, one), "None head backward reduce_scatter": (1, one)}
        expected |= {"None loss forward all_gather": (1, 3 * 3 * CONFIG.block_size * 4)}
        expected |= {"None optimizer step all_reduce": (1, 4 * numel)}
        assert told == expected
        for way, calls in (("forward", 4), ("backward", 4 if keep else 6)):
            assert sum(n for at, (n, _) in told.items() if at.startswith("0 ") and f" {way} " in at) == calls


def test_recomputed_messages_are_accounted_to_the_backward_pass() -> None:
    how = ({"activation_checkpointing": on} for on in (False, True))
    (plain, *_), (again, seen, _) = (run_ranks(2, _account, each, comm="gloo")[0] for each in how)
    assert seen == sum(calls for calls, _ in again.values())
    assert again["0 attention forward all_gather"] == plain["0 attention forward all_gather"]
    assert again["0 attention backward all_gather"][0] == 3 and again["0 attention backward reduce_scatter"][0] == 2


# --- dropout --------------------------------------------------------------------------------------------------------

DROPPED = replace(CONFIG, dropout=0.3)


def _masks(world: World) -> tuple[Tensor, float, list[Tensor]]:
    """This rank's mask; the loss; the gradients of replicated parameters."""
    idx, targets = data(DROPPED)
    torch.manual_seed(5)
    mask = own_dropout(torch.ones(1, 50, 40), 0.3, world.tp)
    model = split(world, DROPPED)
    _, loss = model(idx, targets)
    assert loss is not None
    loss.backward()
    gradients.sum_partial_gradients(model)
    found = [p.grad for p in gradients.partial_gradients(model) if p.grad is not None]
    return mask, loss.item(), found


def test_masks_are_each_ranks_own_and_leave_ranks_in_agreement() -> None:
    (mask, loss, gradients), *others = run_ranks(3, _masks)
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)
    for other_mask, other_loss, other_gradients in others:
        assert not torch.equal(mask, other_mask) and loss == other_loss
        assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


def _slope(world: World, how: dict[str, Any]) -> tuple[float, float]:
    """The loss's slope along a random direction of all parameters: by the gradient, and by two losses under the same masks."""
    idx, targets = data(DROPPED)
    model = split(world, DROPPED, torch.float64, **how)

    def loss() -> Tensor:
        torch.manual_seed(3)
        found = model(idx, targets)[1]
        assert found is not None
        return found

    loss().backward()
    gradients.sum_partial_gradients(model)
    rules, directions, along = model.split.rules, [], torch.zeros(2, dtype=torch.float64)  # sharded; replicated
    for i, (name, p) in enumerate(model.named_parameters()):
        assert p.grad is not None
        sharded = rules[name].dim is not None
        generator = torch.Generator().manual_seed(100 * i + (world.rank if sharded else 50))
        directions.append(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        along[0 if sharded else 1] += (p.grad * directions[-1]).sum()
    assert world.tp.transport is not None
    slope = world.tp.transport.all_reduce(along[:1], "sum").item() + along[1].item()
    losses, step = [], 1e-5
    with torch.no_grad():
        for sign in (1, -2):
            for p, direction in zip(model.parameters(), directions, strict=True):
                p.add_(direction, alpha=sign * step)
            losses.append(loss().item())
    return slope, (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("how", WAYS, ids=["plain", "recomputed", "kept"])
def test_gradients_under_dropout_are_the_losss_slope(how: dict[str, Any]) -> None:
    for slope, measured in run_ranks(3, _slope, how):
        assert slope == pytest.approx(measured, rel=1e-6)


# --- compiled, and in half precision --------------------------------------------------------------------------------


def _compiled(world: World, config: GPTConfig) -> tuple[float, dict[str, int]]:
    idx, targets = data(config)
    model = split(world, config)
    model.compile_blocks()
    for _ in range(2):
        before = world.ledger.snapshot()
        model.zero_grad()
        torch.manual_seed(3)
        _, loss = model(idx, targets)
        assert loss is not None
        loss.backward()
    gradients.sum_partial_gradients(model)
    return gradients.grad_norm(model).item(), {
        op: total(world.ledger.since(before), layer=1, op=op).calls for op in ("all_gather", "reduce_scatter")
    }


def _eager_norm(world: World, config: GPTConfig) -> float:
    idx, targets = data(config)
    model = split(world, config)
    torch.manual_seed(3)
    _, loss = model(idx, targets)
    assert loss is not None
    loss.backward()
    gradients.sum_partial_gradients(model)
    return gradients.grad_norm(model).item()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_and_account() -> None:
    norm, calls = run_ranks(2, _compiled, DROPPED)[0]
    assert norm == pytest.approx(run_ranks(2, _eager_norm, DROPPED)[0], rel=1e-5)
    assert calls == {"all_gather": 6, "reduce_scatter": 4}


def _half(world: World) -> tuple[float, int]:
    idx, targets = data(CONFIG)
    losses = []
    for on in (True, False):
        model = split(world, CONFIG, sequence_parallel=on)
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = model(idx, targets)
        assert loss is not None
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    gathered = total(world.ledger.tallies, layer=0, block="mlp", direction="forward", op="all_gather")
    return losses[0] / losses[1] - 1, gathered.bytes


def test_under_autocast_messages_are_halved() -> None:
    for error, nbytes in run_ranks(2, _half):
        assert abs(error) < 1e-3 and nbytes == 3 * CONFIG.block_size * CONFIG.n_embd * 2


# --- sampling -------------------------------------------------------------------------------------------------------


def _sampled(world: World, on: bool, int8: bool) -> tuple[list[list[int]], dict[str, int]]:
    model = split(world, CONFIG, sequence_parallel=on).eval()
    if int8:
        quantize(model, world.gather)
    prompts = [[5, 17, 3, 44, 2, 8, 66], [1, 9, 9, 30], [60]]
    sampling = Sampling(n_tokens=67, max_new_tokens=6, temperature=0.8, top_k=20, seed=3)
    decoder = TorchDecoder(model)
    rows = generate(model, prompts, sampling, decoder).rows
    calls = {e.op: total(world.ledger.tallies, block="attention", op=e.op).calls for e in world.ledger.tallies}
    generate(model, [[7]], sampling, decoder)
    again = {e.op: total(world.ledger.tallies, block="attention", op=e.op).calls - calls[e.op] for e in world.ledger.tallies}
    assert again.get("reduce_scatter", 0) == 0  # one token is not split
    return [row.tokens for row in rows], calls


@pytest.mark.parametrize("int8", [False, True])
def test_a_prompt_is_split_and_a_step_is_not(int8: bool) -> None:
    """The text reaches beyond block_size: windows that slide are computed whole, and split too."""
    plain, split_ = (run_ranks(3, _sampled, on, int8) for on in (False, True))
    assert all(text == plain[0][0] for text, _ in (*plain, *split_))
    calls = split_[0][1]
    slid = calls["reduce_scatter"] // 2 - 1  # passes over whole windows after the first
    assert slid > 0 and calls["all_gather"] == calls["reduce_scatter"]
    assert calls["all_reduce"] + calls["reduce_scatter"] == plain[0][1]["all_reduce"]


# --- errors ---------------------------------------------------------------------------------------------------------


def _refused(world: World) -> list[str]:
    said = []
    with pytest.raises(UserError) as caught:
        split(world, CONFIG, schedule=Schedule.parse("mlp", 2))
    said.append(str(caught.value))
    short, model = torch.zeros(1, 2, dtype=torch.int64), split(world, CONFIG)
    with pytest.raises(ValueError) as wrong:
        model(short, short)
    said.append(str(wrong.value))
    with torch.no_grad():
        assert model(short, short)[1] is not None  # no gradient is summed: the plain way is right
    assert split(world, CONFIG, schedule=Schedule.plain(2)).sequence_parallel
    return said


def test_what_does_not_go_together_is_refused() -> None:
    for schedule, short in run_ranks(3, _refused):
        assert schedule == "--sequence_parallel=True together with --sync=mlp: use one of them."
        assert short == "2 tokens cannot be split over 3 ranks to learn from them"
    TensorParallelGPT(CONFIG, alone(), schedule=Schedule.parse("mlp", 2), sequence_parallel=True)  # one rank is alone


# --- memory ---------------------------------------------------------------------------------------------------------


def kept(world: World, config: GPTConfig, rows: int, sequence: bool, keep: bool) -> int:
    """Bytes that one layer keeps for its backward pass, each storage once, parameters not counted."""
    model = TensorParallelGPT(config, world.tp, sequence_parallel=sequence)
    lo, hi = spans(config.block_size, world.size)[world.rank] if sequence else (0, config.block_size)
    x = torch.randn(rows, hi - lo, config.n_embd, requires_grad=True)
    region = SplitTokens(config.block_size, keep) if sequence and world.size > 1 else WHOLE
    return kept_bytes(model, lambda: model.transformer.h[0](Stream(x, region)))


def formula(config: GPTConfig, rows: int, tp: int, sequence: bool, keep: bool) -> tuple[float, float]:
    """(all bytes that a layer keeps, those that the paper counts), after arXiv 2205.05198, section 4.

    In units of B x T x C elements the paper has, for half precision and masks of one byte, that is in units of sbh bytes:

        term                        paper   here, x 4 bytes      where it is split
        input of each LayerNorm     2 x 2   2 x 1                by tokens, with sequence parallelism only
        input of c_attn and c_fc    2 x 2   2 x 1                by tokens, with sequence parallelism only (not if it is kept)
        residual dropout masks      2 x 1   2 x 1 if dropout     by tokens, with sequence parallelism only
        q, k, v                     6       3                    by heads
        attention itself            5as/h   3as/h if dropout     by heads
        input of c_proj             2       1                    by heads
        input of GELU               8       4                    by columns
        input of mlp.c_proj         8       4                    by columns
        sum                         34      16, 18 with dropout

    so that none, tp, tp + sequence are 34, 10 + 24/t, 34/t there and 16, 4 + 12/t, 16/t here (18, 6 + 12/t, 18/t). The ratios
    differ because this is measured on a CPU in float32: torch's dropout keeps its mask there as floats, not as bytes (on a GPU
    as bytes), and without dropout there is none. Attention without dropout is a flash kernel that keeps no probabilities: the
    paper's 5as/h is gone, as where it recomputes them. With dropout torch's CPU has no such kernel and keeps three matrices
    [T, T] a head: the probabilities, the mask and their product (the paper's 5 bytes: 2 + 1 + 2).

    What the paper leaves out as small is in the first figure: a mean and a deviation a token in each LayerNorm, and the flash
    kernel's logarithm of a sum a head and token.
    """
    B, T, C, H = rows, config.block_size, config.n_embd, config.n_head
    drop, t = config.dropout > 0, tp if sequence else 1
    stream = 2 + 2 * drop
    inputs = 2.0 if keep else 2 / t
    columns = 3 + 1 + 4 + 4 + (3 * H * T / C if drop else 0)
    large = stream / t + inputs + columns / tp
    small = 4 / C / t + (0 if drop else H / C / tp)
    return (large + small) * B * T * C * 4, large * B * T * C * 4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_keeps_what_the_paper_says(dropout: float) -> None:
    config, rows = GPTConfig(block_size=48, vocab_size=67, n_layer=1, n_head=8, n_embd=96, dropout=dropout), 3
    found, counted = {}, {}
    for tp, sequence, keep in ((1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 1, 1), (4, 0, 0), (4, 1, 0), (4, 1, 1)):
        ranks = run_ranks(tp, kept, config, rows, bool(sequence), bool(keep))
        whole, large = formula(config, rows, tp, bool(sequence), bool(keep))
        assert ranks == [whole] * tp  # to the byte
        found[tp, sequence, keep], counted[tp, sequence, keep] = ranks[0], large
    for tp in (2, 4):
        for keep in (0, 1):
            for other in ((tp, 0, 0), (1, 0, 0)):
                ratio, papers = (of[tp, 1, keep] / of[other] for of in (found, counted))
                print(f"dropout {dropout}, tp {tp}, keep_gathered {keep}: {ratio:.4f} of {other[:1]}, formula {papers:.4f}")
                assert ratio == pytest.approx(papers, rel=0.1)


def test_what_stands_for_dropout_and_attention_is_torchs() -> None:
    """The formula's terms, seen by themselves: a float mask on a CPU, and no [T, T] from attention without dropout."""
    seen: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    x = torch.ones(4, requires_grad=True)
    q = torch.randn(1, 2, 64, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.dropout(x, 0.5)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert seen[0].dtype == torch.float32 and seen[0].shape == x.shape
    assert all(tensor.shape[-2:] != (64, 64) for tensor in seen)

"""Packed weights: the product against double precision for every kind of weight, on every width of
register; models of 16 bits against the float32 model of the rounded weights."""

import ctypes
from collections.abc import Iterator
from platform import machine
from typing import Any

import pytest
import torch
from ranks import alone, run_ranks
from test_generation import DRAWN, GREEDY, PROMPTS, new_tokens, reference
from torch import Tensor

from base.native import load
from inference.packed import SOURCES, Packed, pack
from model import GPT
from parallel.parameters import take
from parallel.quantized import quantize, read_weights
from tp_model import TensorParallelGPT
from world.mesh import World

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
# as the processor has it, and narrower
WIDTHS = ["", "-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-fma -mno-f16c"][: 3 if machine() == "x86_64" else 1]


@pytest.fixture(scope="module", params=WIDTHS)
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", f"cc {request.param}")
        yield load(*SOURCES)


def weights(kind: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (20 * torch.randn(shape, generator=generator)).to(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (131, 65), (64, 3100)])
def test_a_product_is_the_formula_and_its_rows_are_those_of_one(library: Any, kind: torch.dtype, shape: Any) -> None:
    w, bias = weights(kind, *shape), torch.randn(shape[0])
    scale = torch.rand(shape[0], 1) + 0.5 if kind == torch.int8 else None
    packed = Packed(library, w, scale)
    x = torch.randn(100, shape[1])
    exact = w.double() if scale is None else w.double() * scale.double()
    right, bound = x.double() @ exact.T + bias, x.double().abs() @ exact.abs().T + bias.abs()
    alone_ = torch.cat([packed.product(row, bias) for row in x.split(1)])
    assert ((alone_ - right).abs() <= 2e-6 * bound).all()
    for rows in (2, 5, 6, 7, 13, 100):
        assert torch.equal(packed.product(x[:rows], bias), alone_[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero_and_what_is_not_finite_stays_so(library: Any, kind: torch.dtype) -> None:
    x = torch.zeros(4, 33)
    x[1, 32], x[2, 0], x[3, 7] = torch.nan, torch.inf, -1e-40  # the last one is subnormal
    y = Packed(library, weights(kind, 70, 33)).product(x)
    assert not y[0].any() and y[1].isnan().all() and not y[2].isfinite().any()
    assert y[3].isfinite().all() and y[3].abs().max() < 1e-30


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up_exactly_and_are_zero_where_others_have_them(library: Any, kind: torch.dtype) -> None:
    w = weights(kind, 70, 33)
    found = Packed(library, w).rows(torch.tensor([[5, 74], [4, 75], [40, 6]]), 5)
    zero = torch.zeros(33)
    right = [torch.stack([w[0].float(), w[69].float()]), torch.stack([zero, zero]), torch.stack([w[35].float(), w[1].float()])]
    assert torch.equal(found, torch.stack(right))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened_exactly(library: Any, kind: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(kind).view(-1, 64)
    found = Packed(library, every).rows(torch.arange(1024), 0)
    right = every.float()
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.nan_to_num(7).view(torch.int32), right.nan_to_num(7).view(torch.int32))


def _made(model: GPT, world: World, dtype: torch.dtype) -> TensorParallelGPT:
    full = dict(model.named_parameters())
    return TensorParallelGPT(
        model.config, world.tp, lambda name, rule: take(full[name].detach(), rule, world.tp.rank), dtype=dtype
    ).eval()


def _texts(world: World, dtype: torch.dtype, rounded: bool) -> list[list[list[int]]]:
    model = reference(seed=2)
    if rounded:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    here = _made(model, world, torch.float32 if rounded else dtype)
    return [new_tokens(here, PROMPTS, sampling) for sampling in (GREEDY, DRAWN)]


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_write_what_float32_writes_with_the_rounded_weights(dtype: torch.dtype, tp: int) -> None:
    ours = run_ranks(tp, _texts, dtype, False)
    assert ours == run_ranks(tp, _texts, dtype, True)
    assert ours[0] == run_ranks(1, _texts, dtype, False)[0]  # at every tp
    if dtype == torch.bfloat16:  # float16's rounding is too fine to show in these texts
        assert ours[0] != run_ranks(1, _texts, torch.float32, False)[0]


@pytest.mark.parametrize("int8", [False, True])
def test_a_packed_models_modules_compute_the_same(int8: bool) -> None:
    """Evaluation runs them; on the packed weights, which have freed the others."""
    world = World(0, 1, torch.device("cpu"), "none", alone(), alone(), alone().ledger)
    model, idx = _made(reference(seed=2), world, torch.float32), torch.tensor([PROMPTS[1]])
    if int8:
        quantize(model, lambda mine: [mine])
    before = sum(w.nbytes for w in read_weights(model))
    with torch.inference_mode():
        right = model.local_logits(model.hidden(idx))
        pack(model)
        found = model.local_logits(model.hidden(idx))
    assert (found - right).abs().max() < 2e-5 * right.abs().max()
    assert not any(hasattr(layer, "weight") for layer in model.modules() if type(layer).__name__.endswith("ParallelLinear"))
    # outputs fill panels; the table has no padding to a multiple of 64 now
    assert 0.9 * before < sum(w.nbytes for w in read_weights(model)) < 2.5 * before

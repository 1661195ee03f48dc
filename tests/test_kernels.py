"""The decode step's Triton kernels: run by Triton's interpreter, compiled for GPUs that are not here, and run on one that is.

Triton asks whether to interpret when it is imported, which torch's compiler does, too: conftest.py has said yes before, where
there is no GPU. What compiles kernels is a process of its own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import product as every
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import alone, run_ranks
from test_ahead import PROMPTS
from test_decoding import ODD, STEPS, Reruns, expected, reference, split, steps
from test_tp_model import deaf
from torch import Tensor

from base.errors import UserError
from inference.ahead import FixedCache
from inference.cuda_graphs import GraphDecoder
from inference.decoders import TorchDecoder, decoder_for
from inference.generation import Generation
from inference.sampling import Sampling
from model import ACTIVATIONS, GPTConfig, LayerNorm
from parallel.quantized import quantize
from plan.partition import Partition
from plan.schedule import Schedule
from tp_model import TensorParallelGPT
from world.mesh import World

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# the error that a sum in float32 has beside the largest number: the interpreter cuts bfloat16 where a GPU rounds it
DTYPES = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def interpreted() -> Any:
    """The kernels, interpreted; in large blocks, as an interpreter takes its time for each program."""
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted beside a GPU")
    from inference import kernels

    kernels.blocks = lambda rows, C, itemsize: (256, 128, 4)
    return kernels


def near(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == right.shape
    assert (found.double() - right).abs().max() <= DTYPES[dtype] * right.abs().max()


# --- one kernel ------------------------------------------------------------------------------------------------------


def check_product(kernels: Any, device: str, C: int, outputs: int, rows: int, dtype: torch.dtype, way: Any, cut: Any) -> None:
    norm_of, more_too, biased, activation = way
    stream = torch.Generator().manual_seed(C + rows)
    drawn = lambda *shape: torch.randn(shape, generator=stream).to(device, dtype)  # noqa: E731
    x, weight, bias = 3 * drawn(rows, C) + 2, drawn(outputs, C) / C**0.5, drawn(outputs) if biased else None
    more, norm = drawn(rows, C) if more_too else None, None
    if norm_of != "none":
        norm = LayerNorm(C, norm_of == "shifted").to(device, dtype)
        for parameter in norm.parameters():
            parameter.data = drawn(C)
    with torch.inference_mode():
        found, total = kernels.product(x, weight, bias, norm, more, activation, cut)
        near(total, x.double() if more is None else x.double() + more.double(), dtype)
        right = total.double() if norm is None else norm.double()(total.double())
        right = F.linear(right, weight.double(), None if bias is None else bias.double())
    near(found, ACTIVATIONS[activation](right) if activation else right, dtype)


def check_products(kernels: Any, device: str) -> None:
    ways = list(every(("none", "plain", "shifted"), (False, True), (False, True), ("", "gelu", "gelu_tanh")))
    ways = [way for way in ways if way[0] != "none" or not way[1]]  # only a norm comes after a sum
    for dtype in DTYPES:
        for i, way in enumerate(ways):
            C, outputs = ((37, 21), (64, 5), (16, 33))[i % 3]
            check_product(kernels, device, C, outputs, 1 + (i + i // 5) % 5, dtype, way, (16, 16, 4))
        # as it is cut on a GPU, several times the block of a row
        check_product(kernels, device, 1600, 10, 1, dtype, ("shifted", True, True, "gelu_tanh"), (4, 512, 4))
        check_product(kernels, device, 2100, 3, 8, dtype, ("none", False, True, ""), (2, 1024, 4))


def check_attend(kernels: Any, device: str, heads: int, D: int, size: int, span: int, dtype: torch.dtype) -> None:
    """Every length, several rows at once. What is beyond a row's length is no number, so nobody has looked at it."""
    stream = torch.Generator().manual_seed(D)
    for first in range(0, size, 5):
        lengths = torch.arange(first, min(first + 5, size)).flip(0).to(device)
        rows = len(lengths)
        qkv = torch.randn(rows, 3 * heads, D, generator=stream).to(device, dtype)
        kv = torch.randn(rows, 2 * heads, size, D, generator=stream).to(device, dtype)
        at = torch.arange(size, device=device)
        kv.masked_fill_((at >= lengths[:, None])[:, None, :, None], float("nan"))
        q, new = qkv.split([heads, 2 * heads], dim=1)
        wanted = kv.clone()
        wanted[torch.arange(rows), :, lengths] = new
        found = kernels.attend(qkv.flatten(1), kv, lengths, span)
        assert torch.equal(kv.nan_to_num(7.0), wanted.nan_to_num(7.0))
        for row, length in enumerate(lengths.tolist()):
            k, v = wanted[row, :, : length + 1].double().chunk(2)
            right = F.scaled_dot_product_attention(q[row, :, None].double(), k, v)
            near(found[row], right.flatten(), dtype)


def check_attention(kernels: Any, device: str) -> None:
    for dtype in DTYPES:
        check_attend(kernels, device, 1, 16, 7, 4, dtype)  # two splits, the last one short
    check_attend(kernels, device, 3, 5, 19, 8, torch.float32)
    check_attend(kernels, device, 2, 13, 5, 8, torch.float32)  # one split


def _one_kernel(world: World, check: Any) -> None:
    check(interpreted(), "cpu")


@pytest.mark.parametrize("check", [check_products, check_attention])
def test_each_kernel_is_its_formula(check: Any) -> None:
    run_ranks(1, _one_kernel, check)


# --- a step, a text ---------------------------------------------------------------------------------------------------


def _steps(world: World, config: GPTConfig, rows: int) -> Any:
    kernels = interpreted()
    return steps(world, config, lambda model: GraphDecoder(model, Reruns(), kernels.hidden), rows)


TWO = replace(ODD, n_layer=2, n_head=3, n_embd=39)  # an interpreter takes its time for each row and head


@pytest.mark.parametrize("tp, rows, config", [(1, 1, replace(TWO, bias=False, activation="gelu")), (2, 3, TWO)])
def test_a_steps_logits_are_double_precisions_and_its_account_is_torchs(tp: int, rows: int, config: GPTConfig) -> None:
    ranks, plain = run_ranks(tp, _steps, config, rows), run_ranks(tp, steps, config, TorchDecoder, rows)
    for i, right in enumerate(expected(config, rows)):
        found = torch.cat([logits[i] for logits, _, _ in ranks], dim=1)
        assert found.shape == right.shape and (found - right).abs().max() < 1e-5 * right.abs().max()
    for (_, told, passes), (_, right_told, right_passes) in zip(ranks, plain, strict=True):
        assert told == right_told and passes == right_passes == STEPS


SMALL = replace(TWO, block_size=24, n_layer=1)


def _text(world: World, by_kernels: bool) -> list[list[int]]:
    sampling = Sampling(ODD.vocab_size, temperature=0, max_new_tokens=6)
    model = split(reference(SMALL), world.tp)
    decoder = GraphDecoder(model, Reruns(), interpreted().hidden) if by_kernels else TorchDecoder(model)
    made = Generation(model, PROMPTS[0], sampling, decoder)
    assert list(made)
    return [row.tokens for row in made.rows]


def test_a_text_is_the_plain_one() -> None:
    assert run_ranks(2, _text, True) == run_ranks(2, _text, False)


def _deaf(world: World, block: str) -> Tensor:
    """Logits of a step in which one kind of all-reduce is left out."""
    kernels, model = interpreted(), split(reference(SMALL), world.tp)
    cache = model.new_cache(1)
    with torch.inference_mode():
        model.hidden(torch.tensor([[1, 2, 3]]), cache)
        cache.advance([3])
        deaf(block, "forward", "all_reduce")
        return GraphDecoder(model, Reruns(), kernels.hidden).logits([[4]], cache).clone()


@pytest.mark.parametrize("block", ["none", "embedding", "attention", "mlp"])
def test_every_all_reduce_is_needed(block: str) -> None:
    with torch.no_grad():
        right = reference(SMALL)(torch.tensor([[1, 2, 3, 4]]))[0][:, -1]
    error = (torch.cat(run_ranks(2, _deaf, block), dim=1) - right).abs().max() / right.abs().max()
    assert error < 1e-5 if block == "none" else error > 1e-2


def _more(world: World) -> None:
    """More tokens or rows than the kernels are for are the model's own, to the bit."""
    kernels, model = interpreted(), split(reference(SMALL), world.tp)
    kernels.product = None
    with torch.inference_mode():
        for rows, T in ((1, 2), (kernels.MOST_ROWS + 1, 1)):
            cache = FixedCache(model.new_cache(rows), torch.zeros(rows, dtype=torch.int64))
            tokens = torch.arange(rows * T).view(rows, T)
            assert torch.equal(kernels.hidden(model, tokens, cache), model.hidden(tokens, cache))


def test_more_tokens_or_rows_are_torchs() -> None:
    run_ranks(1, _more)


# --- the switch -------------------------------------------------------------------------------------------------------


def _refused(world: World) -> list[str]:
    said, model, quantized = list[str](), *(split(reference(SMALL), world.tp) for _ in range(2))
    quantize(quantized, world.gather)
    quantized.schedule = Schedule.parse("mlp", 1)
    decoder_for(model)
    assert "inference.kernels" not in sys.modules  # off by default, and then nothing imports it
    with pytest.raises(UserError) as refused:
        decoder_for(model, kernels=True)
    said.append(str(refused.value))
    from inference.kernels import unusable

    type(model).device = property(lambda self: torch.device("cuda"))  # type: ignore[method-assign, assignment]
    said.append(unusable(model))
    model.schedule = Schedule.parse("mlp", 1)
    said.append(unusable(model))
    said.append(unusable(quantized))
    model.tp.__dict__["transport"] = SimpleNamespace(name="gloo")
    with pytest.raises(UserError, match="over gloo messages go through the host"):
        decoder_for(model, kernels=True)
    return said


def test_where_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = run_ranks(1, _refused)
    assert said == [
        "--kernels=True: they run on a GPU, not on cpu. Leave it out.",
        "",
        "they skip no sync point, and sync=mlp",
        "they read no 8-bit matrices",
    ]
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"--kernels=True: they need triton \(.*\)\. Leave it out\."):
        decoder_for(split(reference(SMALL), alone()), kernels=True)


# --- GPUs -------------------------------------------------------------------------------------------------------------


class Target:
    """In the place of a GPU's driver."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(capability: int, n_head: int, rows: int) -> list[tuple[str, str]]:
    """The name and PTX of each launch of a step, compiled and not run."""
    from triton.runtime.driver import driver

    from inference import kernels

    driver.set_active(Target(capability))
    made, launched = list[tuple[str, str]](), kernels._launched

    class Compiler:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def compile(*args: Any, **options: Any) -> None:
                asm = self.kernel.warmup(*args, grid=grid, **options).asm
                made.append((self.kernel.__name__, asm["ptx"]))

            return compile

    def dependent(x: Tensor, warps: int) -> Any:
        return capability >= 90, launched(x, warps)[1] | ({"launch_pdl": True} if capability >= 90 else {})

    for name in ("_product", "_attend", "_merge"):
        setattr(kernels, name, Compiler(getattr(kernels, name)))
    kernels._launched = dependent
    config = GPTConfig(256, 256, 2, n_head, 64 * n_head, activation="gelu_tanh")
    shapes = Partition.of(config, 1).shapes()
    model = TensorParallelGPT(config, alone(), lambda name, rule: torch.zeros(shapes[name]), dtype=torch.bfloat16).eval()
    at = torch.zeros(rows, dtype=torch.int64)
    with torch.inference_mode():
        kernels.hidden(model, at.unsqueeze(1), FixedCache(model.new_cache(rows), at))
    return made


@pytest.mark.parametrize("capability, n_head, rows", [(80, 2, 3), (90, 25, 1)])
def test_they_compile_for_a_gpu(capability: int, n_head: int, rows: int, tmp_path: Path) -> None:
    """In bfloat16, for the newer GPU in gpt2-xl's shapes: weights are read 16 bytes at a time, before a kernel waits."""
    paths = [str(tests := Path(__file__).parent), str(tests.parent)]
    call = f"test_kernels.compiled({capability}, {n_head}, {rows})"
    code = f"import json, sys; sys.path[:0] = {paths}; import test_kernels; print(json.dumps({call}))"
    own = {"PATH": os.environ["PATH"], "TRITON_CACHE_DIR": str(tmp_path)}
    made = json.loads(subprocess.run([sys.executable, "-I", "-c", code], env=own, stdout=-1, check=True).stdout)
    assert [name for name, _ in made] == 2 * ["_product", "_attend", "_merge", "_product", "_product", "_product"]
    for name, ptx in made:
        order = re.findall(r"ld\.global\.v4|griddepcontrol\.\w+|ld\.global|st\.global", ptx)
        if capability >= 90:
            waits = order.index("griddepcontrol.wait")
            assert order[waits + 1] == "griddepcontrol.launch_dependents" and "st.global" not in order[:waits]
            assert (order[0] == "ld.global.v4") == (name == "_product")
        assert ("griddepcontrol.wait" in order) == (capability >= 90)


@pytest.mark.gpu(1)
def test_on_a_gpu() -> None:
    from inference import kernels

    check_products(kernels, "cuda")
    check_attention(kernels, "cuda")
    for config, rows in every((ODD, replace(ODD, bias=False)), (1, 3)):
        device, axis = torch.device("cuda", 0), alone()
        world = World(0, 1, device, "none", axis, alone(), axis.ledger)
        found, told, passes = steps(world, config, lambda model: GraphDecoder(model, hidden=kernels.hidden), rows)
        assert not told and passes == STEPS
        for logits, right in zip(found, expected(config, rows), strict=True):
            assert (logits.cpu() - right).abs().max() < 1e-4 * right.abs().max()

"""int8 weights against their formula in double precision: layers, whole models at several tp, and the native step."""

import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from ranks import alone, in_panels, run_ranks
from test_tp_model import deaf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import eval_tp
import sample_tp
from base.errors import UserError
from cli.grammar import parse
from cli.options import EvalOptions, SampleOptions, TrainOptions
from inference.generation import generate
from inference.sampling import Sampling
from model import GPT, GPTConfig
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.quantized import Int8Weight, quantize
from plan.partition import spans
from tp_model import TensorParallelGPT
from world.mesh import World

SMALL = GPTConfig(block_size=16, vocab_size=131, n_layer=2, n_head=5, n_embd=20)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(1))]


def rounded(w: Tensor) -> Tensor:
    """q s of every row, float64: what an int8 weight stands for."""
    scale = w.float().abs().amax(1, keepdim=True) / 127
    scale[scale == 0] = 1
    return (w.float() / scale).round().double() * scale.double()


def int8(w: Tensor) -> Int8Weight:
    return Int8Weight(w, w.abs().amax(1))


@pytest.mark.parametrize("shape", [(1, 1), (11, 7), (64, 100), (30, 513)])
def test_a_product_is_the_formula_to_nearly_float32(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(shape), torch.randn(3, 4, shape[1])
    w[0] *= 1000
    x[1, 2] = 0
    x[2] *= torch.logspace(-6, 6, 4).unsqueeze(1)
    x[0, 0, 0] = 50  # one channel far larger than the others
    y, what = int8(w).product(x), rounded(w)
    bound = 1e-6 * F.linear(x.double().abs(), what.abs())  # float32's own rounding
    assert ((y - F.linear(x.double(), what)).abs() <= bound).all()
    assert not y[1, 2].any()


@pytest.mark.parametrize("device", DEVICES)
def test_every_weight_is_off_by_half_a_step_at_most(device: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 33) * torch.logspace(-4, 4, 40).unsqueeze(1)
    w[7] = 0
    # the identity reads the weights out
    seen = Int8Weight(w.to(device), w.abs().amax(1).to(device)).product(torch.eye(33, device=device)).T.cpu()
    scale = w.abs().amax(1, keepdim=True) / 127
    assert ((seen - w).abs() <= scale / 2 * (1 + 1e-4)).all()
    steps = (seen / scale)[scale[:, 0] > 0]
    assert ((steps - steps.round()).abs() < 1e-3).all()
    assert steps.abs().amax(1).round().eq(127).all()  # and all of the range is used


class Launches(TorchDispatchMode):
    """Counts operations, each of which is a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(part in str(func) for part in ("view", "slice", "split", "t.default", "detach"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_a_few_launches_where_each_costs_time(dtype: torch.dtype) -> None:
    """A layer of gpt2-xl and its head, on a device that is no CPU: one cast and one product for each
    piece, at most 64M numbers; thousands of pieces made a token wait for its launches."""
    shapes = [(4800, 1600), (1600, 1600), (6400, 1600), (1600, 6400), (50304, 1600)]
    counts = []
    for shape in shapes:
        weight = int8(torch.empty(shape, device="meta"))
        x = torch.empty(1, shape[1], device="meta", dtype=dtype)
        with Launches() as launches:
            y = weight.product(x)
        assert y.shape == (1, shape[0]) and y.dtype == dtype
        counts.append(launches.count)
    assert max(counts[:4]) <= 4 and counts[4] <= 8


def test_a_sum_beyond_float16_is_none_once_it_is_scaled() -> None:
    w, x = torch.full((3, 4096), 0.01), torch.ones(1, 4096, dtype=torch.float16)
    assert torch.finfo(torch.float16).max < 127 * 4096
    torch.testing.assert_close(int8(w).product(x).float(), torch.full((1, 3), 40.96), rtol=1e-3, atol=0)


class Pair(nn.Module):
    def __init__(self, world: World, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor):
        super().__init__()
        lo, hi = spans(len(w1), world.size)[world.tp.rank]
        self.column = ColumnParallelLinear(w1.shape[1], hi - lo, True, world.tp)
        self.row = RowParallelLinear(len(w1), hi - lo, len(w2), True, world.tp)
        values = {"column.weight": w1[lo:hi], "column.bias": b1[lo:hi], "row.weight": w2[:, lo:hi], "row.bias": b2}
        self.load_state_dict(values)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.row(torch.tanh(self.column(x)))
        return y


def _pair(world: World) -> None:
    torch.manual_seed(0)
    x, w1, b1, w2, b2 = (torch.randn(shape) for shape in ((3, 5, 7), (11, 7), (11,), (6, 11), (6,)))
    w2[:, 10] *= 5  # the largest of every row are the last rank's
    pair = Pair(world, w1, b1, w2, b2)
    quantize(pair, world.gather)
    kept = x.clone()
    y = pair(x)
    hidden = torch.tanh(F.linear(x.double(), rounded(w1), b1.double()))
    torch.testing.assert_close(y.double(), F.linear(hidden, rounded(w2), b2.double()), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)
    calls = {(e.direction, e.op): (t.calls, t.bytes) for e, t in world.ledger.tallies.items()}
    assert calls == ({} if world.size == 1 else {("forward", "all_reduce"): (1, 3 * 5 * 6 * 4)})
    with pytest.raises(ValueError, match="ColumnParallelLinear expects inputs of width 7, got 6"):
        pair(x[..., :6])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_column_then_row_is_the_formula(size: int) -> None:
    run_ranks(size, _pair)


def reference(config: GPTConfig) -> GPT:
    """model.py in double precision with the matrices rounded; the head is, the table it is tied to is not."""
    model = GPT(config).double()
    model.lm_head.weight = nn.Parameter(rounded(model.transformer.wte.weight.detach().float()))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(rounded(module.weight))
    return model


def tokens(config: GPTConfig) -> Tensor:
    return torch.randint(config.vocab_size, (3, config.block_size), generator=torch.Generator().manual_seed(0))


def _error(world: World, config: GPTConfig, dropped: tuple[str, str, str] | None, agree: bool) -> tuple[float, float]:
    """The largest error of a logit, against the rounded weights in double precision and against the float model."""
    model = TensorParallelGPT(config, world.tp).eval()
    idx = tokens(config)
    plain = model(idx)[0]
    quantize(model, world.gather if agree else lambda mine: [mine])
    if dropped:
        deaf(*dropped)
    logits, exact = model(idx)[0], reference(config)(idx)[0]
    spread = exact.std()
    return ((logits - exact).abs().max() / spread).item(), ((logits - plain).abs().max() / spread).item()


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, bias=False, activation="gelu_tanh")], ids=["bias", "plain"])
def test_logits_are_those_of_the_rounded_weights_at_every_tp(tp: int, config: GPTConfig) -> None:
    for exact, plain in run_ranks(tp, _error, config, None, True):
        assert exact < 2e-5
        assert 1e-3 < plain < 5e-2  # close to the float model's, and not the float model's


@pytest.mark.parametrize("block", ["attention", "mlp", "embedding"])
def test_every_all_reduce_is_needed(block: str) -> None:
    assert max(run_ranks(2, _error, SMALL, (block, "forward", "all_reduce"), True))[0] > 1e-3


def test_the_agreement_on_scales_is_needed() -> None:
    assert max(run_ranks(2, _error, SMALL, None, False))[0] > 1e-3


def _texts(world: World) -> list[list[int]]:
    model = TensorParallelGPT(SMALL, world.tp).eval()
    quantize(model, world.gather)
    sampling = Sampling(n_tokens=131, max_new_tokens=20, num_samples=2, overflow="slide")
    return [row.tokens for row in generate(model, [[1, 2, 3], [7], [5, 6, 7, 8, 9]], sampling).rows]


def test_the_text_does_not_depend_on_tp_with_a_cache_that_slides() -> None:
    one, *others = [run_ranks(tp, _texts)[0] for tp in (1, 2, 3)]
    assert all(other == one for other in others)
    assert len({token for row in one for token in row}) > 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_head=3, n_embd=24, n_layer=2, n_positions=16, vocab_size=101))
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.3)
    directory = tmp_path_factory.mktemp("weights")
    model.save_pretrained(directory)
    return directory


def _entries(world: World, weights: Path, path: Path, words: list[str]) -> None:
    common = [f"--init_from={weights}", "--device=cpu", *words]
    asked = ["--prompt=1 2 3", "--max_new_tokens=6", f"--report={path / 'sample.json'}"]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        sample_tp.main(world, parse(SampleOptions, [*common, *asked], "sample_tp.py"))
        text = [f"--text={path / 'text'}", f"--report={path / 'eval.json'}"]
        eval_tp.main(world, parse(EvalOptions, [*common, *text], "eval_tp.py"))


def told(made: dict[str, Any]) -> Any:
    """The account without seconds, which no two runs share."""
    if not isinstance(made, dict):
        return made
    return {key: told(value) for key, value in made.items() if key not in ("seconds", "fraction_of_time")} | (
        {"layers": [told(layer) for layer in made["layers"]]} if "layers" in made else {}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_commands_take_it_and_the_account_is_unchanged(weights: Path, tmp_path: Path, dtype: str) -> None:
    made: list[dict[str, Any]] = []
    for words in ([], ["--quantize=int8"]):
        (tmp_path / "text").write_text(" ".join(str((7 * i * i) % 101) for i in range(60)))
        run_ranks(2, _entries, weights, tmp_path, [f"--dtype={dtype}", *words])
        made.append({name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sample", "eval")})
    plain, small = made
    for name in ("sample", "eval"):
        assert (plain[name]["quantize"], small[name]["quantize"]) == ("", "int8")
        assert plain[name]["dtype"] == small[name]["dtype"] == dtype
        assert told(plain[name]["comm_account"]) == told(small[name]["comm_account"])
        assert plain[name]["comm_account"]["total"]["calls"] > 0
    assert small["eval"]["evaluation"]["loss"] == pytest.approx(plain["eval"]["evaluation"]["loss"], rel=0.02)
    assert small["eval"]["evaluation"]["loss"] != plain["eval"]["evaluation"]["loss"]
    # 2 and 1 heads of 8, 48 hidden units, 24 wide: a byte an entry, 4 a row's scale; outputs fill panels
    width = {"float32": 4, "bfloat16": 2}[dtype]
    for rank, (heads, rows) in enumerate(((2, 51), (1, 50))):
        outputs, inputs = (3 * 8 * heads, 24, 48, 24), (24, 8 * heads, 24, 48)
        entries = 2 * sum(in_panels(a) * b for a, b in zip(outputs, inputs, strict=True))
        saved = entries * (width - 1) - 2 * 4 * sum(outputs) - in_panels(rows) * 24 - 4 * rows  # beside the float table
        before, after = (run["sample"]["memory"]["weight_bytes_per_rank"][rank] for run in (plain, small))
        assert before - after == saved


def test_what_cannot_be_is_said_in_words() -> None:
    with pytest.raises(UserError, match="quantize"):
        parse(TrainOptions, ["--quantize=int8"], "train_tp.py")
    refused: list[Callable[[], Any]] = [lambda: parse(SampleOptions, ["--quantize=int4"], "sample_tp.py")]
    for call in refused:
        with pytest.raises(UserError, match="int8"):
            call()


def test_a_quantized_model_does_not_pretend_to_train() -> None:
    model = TensorParallelGPT(SMALL, alone())
    quantize(model, lambda mine: [mine])
    idx = tokens(SMALL)
    loss = model(idx, idx)[1]
    assert loss is not None
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()

"""The native decode step and the one of a CUDA graph: double precision's logits, torch's account, and torch where they
cannot run. What is captured and replayed runs on the CPU here; the capture itself is tested where there is a GPU."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import alone, run_ranks
from test_entry import launch, spoken
from test_tp_model import deaf
from torch import Tensor

from inference.cuda_graphs import CudaGraphs, GraphDecoder, Replay
from inference.decoders import TorchDecoder, decoder_for
from inference.native_decoder import NativeDecoder
from model import GPT, GPTConfig
from parallel import collectives
from parallel.ledger import Tally
from parallel.parameters import take
from parallel.quantized import quantize
from tp_model import TensorParallelGPT
from world.mesh import World

# widths that are no multiple of a vector's, heads that do not divide evenly
ODD = GPTConfig(block_size=40, vocab_size=131, n_layer=3, n_head=5, n_embd=65, activation="gelu_tanh")
WIDE = GPTConfig(block_size=160, vocab_size=257, n_layer=2, n_head=3, n_embd=192)
CONFIGS = {"odd": ODD, "wide": WIDE, "no bias": replace(WIDE, bias=False, n_layer=1)}
LENGTHS = [7, 1, 20]
STEPS = 4


def reference(config: GPTConfig) -> GPT:
    """Weights at which every part of the step matters."""
    model = GPT(config, seed=5).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.15 if p.dim() == 2 else 0.4))
    return model


def split(model: GPT, tp: Any) -> TensorParallelGPT:
    state: dict[str, Tensor] = dict(model.named_parameters())
    state["transformer.wte.weight"] = model.lm_head.weight
    return TensorParallelGPT(model.config, tp, lambda name, rule: take(state[name].detach(), rule, tp.rank)).eval()


def texts(config: GPTConfig, rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = [LENGTHS[i % len(LENGTHS)] + STEPS for i in range(rows)]
    return [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


class Reruns(CudaGraphs):
    """In the place of CUDA graphs: a replay is a run, into the same memory. So is the run before a capture.

    ended: what the GPU would say of a replay's end. timed: replays whose seconds were asked for.
    """

    def __init__(self, ended: bool = True):
        self.ended, self.timed, self.captured = ended, 0, list[Any]()

    def __call__(self, step: Callable[[], Any]) -> tuple[Replay, Any]:
        self.captured.append(step)
        step()
        out = step()
        if not isinstance(out, Tensor):
            return lambda: (step(), lambda: self.ended)[1], out
        kept = out.clone()
        return lambda: (kept.copy_(step()), lambda: self.ended)[1], kept

    def seconds(self, replay: Replay) -> float:
        self.timed += 1
        began = time.perf_counter()
        replay()
        return time.perf_counter() - began


def graphed(model: TensorParallelGPT) -> GraphDecoder:
    return GraphDecoder(model, Reruns())


def steps(
    world: World, config: GPTConfig, kind: Any, rows: int, int8: bool = False
) -> tuple[list[Tensor], dict[Any, tuple[int, int]], int]:
    """This rank's logits at each of a few steps after prompts of different lengths, and what the steps are accounted as."""
    model = split(reference(config), world.tp).to(world.device)
    if int8:
        quantize(model, world.gather)
    decoder = kind(model)
    prompts = texts(config, rows)
    cache = decoder.new_cache(rows, config.block_size)
    with torch.inference_mode():
        decoder.logits([p[:-STEPS] for p in prompts], cache)
        cache.advance([len(p) - STEPS for p in prompts])
        before, passes, logits = world.ledger.snapshot(), world.ledger.forward_passes, []
        for i in range(STEPS):
            logits.append(decoder.logits([[p[i - STEPS]] for p in prompts], cache).clone())
            cache.advance([n + 1 for n in cache.lengths])
    told = {(e.layer, e.block, e.direction, e.op): (t.calls, t.bytes) for e, t in world.ledger.since(before).items()}
    return logits, told, world.ledger.forward_passes - passes


def expected(config: GPTConfig, rows: int) -> list[Tensor]:
    """The same logits by model.py in float64, without a cache."""
    model = reference(config).double()
    with torch.no_grad():
        return [
            torch.cat([model(torch.tensor([p[: len(p) - STEPS + i + 1]]))[0][:, -1] for p in texts(config, rows)])
            for i in range(STEPS)
        ]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_double_precisions(name: str, tp: int, rows: int) -> None:
    config = CONFIGS[name]
    ranks = run_ranks(tp, steps, config, NativeDecoder, rows)
    for i, right in enumerate(expected(config, rows)):
        found = torch.cat([logits[i] for logits, _, _ in ranks], dim=1)
        assert found.shape == right.shape and right.std() > 0.5
        assert (found - right).abs().max() < 2e-5 * right.abs().max()


@pytest.mark.parametrize("tp", [1, 3])
def test_int8_logits_are_those_of_the_quantized_model(tp: int) -> None:
    native = run_ranks(tp, steps, WIDE, NativeDecoder, 2, True)
    plain = run_ranks(tp, steps, WIDE, TorchDecoder, 2, True)
    floats = run_ranks(tp, steps, WIDE, NativeDecoder, 2)
    for (found, told, _), (right, expected_told, _), (float_logits, _, _) in zip(native, plain, floats, strict=True):
        assert told == expected_told
        for logits, theirs, unquantized in zip(found, right, float_logits, strict=True):
            assert (logits - theirs).abs().max() < 2e-5 * theirs.abs().max()
            assert (logits - unquantized).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("kind", [NativeDecoder, graphed])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_account_is_that_of_torch(tp: int, kind: Any) -> None:
    found = run_ranks(tp, steps, ODD, kind, 3)
    plain = run_ranks(tp, steps, ODD, TorchDecoder, 3)
    for (_, told, passes), (_, expected_told, expected_passes) in zip(found, plain, strict=True):
        assert told == expected_told and passes == expected_passes == STEPS
        assert sum(calls for calls, _ in told.values()) == (0 if tp == 1 else STEPS * (2 * ODD.n_layer + 1))


def _deaf(world: World, block: str) -> Tensor:
    """Logits of a step in which one kind of all-reduce is left out."""
    decoder = NativeDecoder(split(reference(WIDE), world.tp))
    cache = decoder.new_cache(1, 10)
    with torch.inference_mode():
        decoder.logits([[1, 2, 3]], cache)
        cache.advance([3])
        deaf(block, "forward", "all_reduce")
        return decoder.logits([[4]], cache).clone()


@pytest.mark.parametrize("block", ["embedding", "attention", "mlp"])
def test_every_all_reduce_is_needed(block: str) -> None:
    with torch.no_grad():
        right = reference(WIDE)(torch.tensor([[1, 2, 3, 4]]))[0][:, -1]
    assert (torch.cat(run_ranks(2, _deaf, "none"), dim=1) - right).abs().max() < 1e-4 * right.abs().max()
    assert (torch.cat(run_ranks(2, _deaf, block), dim=1) - right).abs().max() > 1e-2 * right.abs().max()


def _texts_at_once(world: World, config: GPTConfig, rows: int, int8: bool) -> list[bool]:
    """Whether each of a pass's rows, some of which begin and some go on, is what it is alone."""
    model = split(reference(config), world.tp)
    if int8:
        quantize(model, world.gather)
    decoder, prompts, size = NativeDecoder(model), texts(config, rows), config.block_size
    begun = list(range(0, rows, 2))
    with torch.inference_mode():
        cache = decoder.new_cache(rows, size)
        decoder.logits([prompts[i][:3] if i in begun else prompts[i][:1] for i in range(rows)], cache)
        cache.advance([3 if i in begun else 0 for i in range(rows)])
        new = [prompts[i][3:] if i in begun else prompts[i] for i in range(rows)]
        together, found = decoder.logits(new, cache, [1] * rows).clone(), []
        for prompt, logits in zip(prompts, together, strict=True):
            one = decoder.logits([prompt], decoder.new_cache(1, size), [1])
            found.append(torch.equal(logits, one[0]))
    return found


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [2, 7, 30])
def test_a_text_is_the_same_to_the_bit_beside_any_others(rows: int, int8: bool) -> None:
    for config in (ODD, WIDE):
        for same in run_ranks(2, _texts_at_once, config, rows, int8):
            assert same == [True] * rows


def test_what_is_not_a_number_reaches_the_logits() -> None:
    for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.bias", "transformer.ln_f.weight"):
        model = split(reference(ODD), alone())
        with torch.inference_mode():
            dict(model.named_parameters())[name].view(-1)[3] = float("nan")
            assert (decoder := NativeDecoder(model)).logits([[1]], decoder.new_cache(1, 4)).isnan().any()


def test_large_numbers_stay_numbers() -> None:
    """Scores of hundreds and inputs to the GELU beyond what e^x can hold."""
    model = reference(WIDE)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(60)  # type: ignore[union-attr, operator]
        model.transformer.h[1].mlp.c_fc.weight.mul_(60)  # type: ignore[union-attr, operator]
        right = model.double()(torch.tensor([[9, 8, 7]]))[0][:, -1]
    decoder = NativeDecoder(split(model.float(), alone()))
    cache = decoder.new_cache(1, 3)
    with torch.inference_mode():
        decoder.logits([[9, 8]], cache)
        cache.advance([2])
        assert (decoder.logits([[7]], cache) - right).abs().max() < 1e-3 * right.abs().max()


def test_a_full_cache_is_refused() -> None:
    for kind in (TorchDecoder, graphed, NativeDecoder):
        decoder: Any = kind(split(reference(ODD), alone()))
        cache = decoder.new_cache(2, ODD.block_size)
        cache.advance([1, 39])
        with pytest.raises(ValueError, match="39 tokens are in the cache, 2 more do not fit its 40"):
            decoder.logits([[1, 2], [1, 2]], cache)


def test_where_torch_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = split(reference(ODD), alone())
    assert decoder_for(model).name == "native"
    assert decoder_for(TensorParallelGPT(ODD, alone(), dtype=torch.bfloat16)).name == "native"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert (decoder_for(model).name, decoder_for(model).why) == ("torch", "")
    monkeypatch.undo()
    monkeypatch.setenv("CC", "false")
    model = split(reference(ODD), alone())  # the other one is packed, and has its library
    assert (decoder_for(model).name, decoder_for(model).why) == ("torch", "false failed: no message")


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tp", [1, 3])
def test_a_fixed_steps_logits_are_double_precisions(tp: int, rows: int) -> None:
    ranks = run_ranks(tp, steps, ODD, graphed, rows)
    for i, right in enumerate(expected(ODD, rows)):
        found = torch.cat([logits[i] for logits, _, _ in ranks], dim=1)
        assert found.shape == right.shape and (found - right).abs().max() < 1e-5 * right.abs().max()


def test_a_fixed_steps_logits_are_torchs_bits_where_the_cache_is_as_long_as_the_text() -> None:
    """There torch's own step attends to the whole cache under the same mask."""
    model, logits, caches = split(reference(ODD), alone()), [], []
    for kind in (TorchDecoder, graphed):
        decoder: Any = kind(model)
        cache = model.new_cache(2, size=5)
        with torch.inference_mode():
            decoder.logits([[1, 2, 3, 4], [5, 6]], cache)
            cache.advance([4, 2])
            logits.append(decoder.logits([[9], [8]], cache))
        caches.append(torch.stack(cache.kv))
    assert torch.equal(*logits) and torch.equal(*caches)


def _traced(world: World) -> tuple[list[Tensor], Any, int]:
    """Steps of blocks that dynamo has traced; the compiler behind it is another matter."""
    decoders = []

    def compiled(model: TensorParallelGPT) -> GraphDecoder:
        for block in model.transformer.h:
            block.compile(backend="eager")
        decoders.append(graphed(model))
        return decoders[0]

    result = steps(world, ODD, compiled, 3)
    return result


@pytest.mark.slow
def test_compiled_blocks_take_the_fixed_cache() -> None:
    for (found, *account), (right, *expected_account) in zip(
        run_ranks(2, _traced), run_ranks(2, steps, ODD, graphed, 3), strict=True
    ):
        assert all(torch.equal(*pair) for pair in zip(found, right, strict=True)) and account == expected_account


def test_what_is_told_aside_counts_when_it_is_repeated() -> None:
    axis = collectives.Axis("tp").at("mlp", 3)
    ledger, message = axis.ledger, torch.ones(5)
    ledger.on = False
    with ledger.recording() as recording:
        axis.account("all_reduce", "forward", message, lambda: None)
        ledger.forward_passes += 2
    assert not ledger.on and ledger.forward_passes == 0 and not ledger.since({})
    recording.calls[0].seconds = 0.25
    ledger.replay(recording, bool)
    assert ledger.forward_passes == 2 and not ledger.since({})  # off
    ledger.on = True
    ledger.replay(recording, bool)
    axis.account("all_reduce", "forward", message, lambda: None)
    ledger.replay(recording, bool)
    (tally,) = ledger.since({}).values()
    assert (tally.calls, tally.bytes, ledger.forward_passes) == (3, 60, 6)
    assert 0.5 < tally.seconds < 0.6 and ledger.replayed == Tally(2, 40, 0.5)


def _replays(world: World) -> tuple[dict[Any, float], float, int, int]:
    """Seconds of each line of the account after a step's first replay, and of all repeated calls; graphs
    that were captured, and timed."""
    model, capture = split(reference(ODD), world.tp), Reruns()
    cache = model.new_cache(1)
    with torch.inference_mode():
        model.hidden(torch.tensor([[1, 2, 3]]), cache)
        cache.advance([3])
        before = world.ledger.snapshot()
        GraphDecoder(model, capture).logits([[4]], cache)
    lines = {(e.layer, e.block): t.seconds for e, t in world.ledger.since(before).items()}
    return lines, world.ledger.replayed.seconds, len(capture.captured), capture.timed


def test_a_replays_messages_are_timed_once_by_themselves() -> None:
    for lines, repeated, captured, timed in run_ranks(2, _replays):
        assert len(lines) == 2 * ODD.n_layer + 1 and (captured, timed) == (2, 1)
        assert all(0 < seconds == pytest.approx(repeated / len(lines)) for seconds in lines.values())


def test_an_event_that_has_not_happened_is_waited_for() -> None:
    """As CUDA's: it tells no time before the stream has got there."""

    class Event:
        happened = False

        def synchronize(self) -> None:
            self.happened = True

        def elapsed_time(self, end: "Event") -> float:
            if not end.happened:
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
            return 1500.0

    ledger, event = collectives.Ledger(), Event()
    ledger.record(tally := Tally(), 8, collectives._GpuTime(event, event))  # type: ignore[arg-type]
    ledger.settle()
    assert tally.seconds == 1.5


def test_no_clock_is_read_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    message: Any = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert collectives.elapsed(collectives.clock(message), message) == 0.0


@pytest.mark.parametrize(
    "device, compiled, comm, name",
    [
        ("cuda", True, None, "cuda graph"),
        ("cuda", True, "nccl", "cuda graph"),
        ("cuda", True, "symmetric memory", "cuda graph"),
        ("cuda", True, "gloo", "torch"),
        ("cuda", False, None, "cuda graph"),
        ("cpu", True, None, "torch"),
    ],
)
def test_where_a_cuda_graph_takes_the_steps(
    device: str, compiled: bool, comm: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tp = SimpleNamespace(transport=comm and SimpleNamespace(name=comm))
    model: Any = SimpleNamespace(device=torch.device(device), compiled=compiled, tp=tp)
    cudnn: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    decoder = decoder_for(model)
    assert cudnn == ([False] if device == "cuda" else [])  # it would plan anew for every token
    why = "over gloo messages go through the host, so a step cannot be a CUDA graph" if comm == "gloo" else ""
    assert (decoder.name, decoder.why) == (name, why)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_replays_on_every_gpu(rows: int, compiled: bool) -> None:
    def kind(model: TensorParallelGPT) -> GraphDecoder:
        if compiled:
            model.compile_blocks()
        return GraphDecoder(model)

    for index in range(torch.cuda.device_count()):
        device, axis = torch.device("cuda", index), alone()
        with torch.cuda.device(device):
            world = World(0, 1, device, "none", axis, alone(), axis.ledger)
            found, told, passes = steps(world, WIDE, kind, rows)
        assert not told and passes == STEPS
        for logits, right in zip(found, expected(WIDE, rows), strict=True):
            assert (logits.cpu() - right).abs().max() < 1e-4 * right.abs().max()


def _replayed(world: World, options: Any) -> None:
    """Replays give torch's logits and account, and the logits of all ranks make up double precision's."""
    found, told, passes = steps(world, WIDE, GraphDecoder, 3)
    plain, expected_told, expected_passes = steps(world, WIDE, TorchDecoder, 3)
    assert told == expected_told and passes == expected_passes == STEPS
    for each in (found, plain):
        for i, right in enumerate(expected(WIDE, 3)):
            logits = torch.cat([part[i].cpu() for part in world.gather(each)], dim=1)
            assert (logits - right).abs().max() < 1e-4 * right.abs().max()
    print("replayed", file=sys.stderr, flush=True)


@pytest.mark.gpu(2)
def test_replays_over_all_gpus(tmp_path: Path) -> None:
    ranks = min(torch.cuda.device_count(), WIDE.n_head)
    said = spoken(launch(ranks, _replayed, tmp_path, ["--device=cuda", "--comm=nccl"], seconds=120, start="spawn"))
    assert said.count("replayed\n") == ranks, said

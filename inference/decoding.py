"""The decode step: local logits of one more token, or of a few, for every row whose past is in a KV cache.

`TorchDecoder` runs the model. `GraphDecoder` lets a GPU repeat one run of it, which spares the host launching a few hundred
kernels a token. `NativeDecoder` runs the same step on one CPU core through inference/decode.c, for the few rows at which a step
is reading the weights once; the collectives are the model's, and stand in `_after` between its calls.
"""

import ctypes
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from base.native import Unavailable, load
from model import KVCache, LayerNorm
from parallel.collectives import Axis, all_reduce
from parallel.ledger import Recording
from tp_model import TensorParallelGPT

R = TypeVar("R")

MOST_TOKENS = 16  # with more, a matrix product that works in blocks is faster than a pass over the weights


class Decoder(Protocol):
    """How a step is computed. name: for the report; why: see TorchDecoder; capture_s: seconds spent so
    far on what later steps need, and no part of their speed."""

    name: str
    why: str
    capture_s: float

    def logits(self, tokens: list[list[int]], cache: KVCache) -> Tensor:
        """tokens: the T newest of each row of the cache, which holds all before them. Local logits [rows, T, v] after each,
        which the next call may overwrite; the tokens' keys and values are in the cache then, and `cache.advance` is the
        caller's. ValueError where they do not fit the cache."""
        ...


class TorchDecoder:
    """why: what kept the other one from being used, "" where it would not have been."""

    name, capture_s = "torch", 0.0

    def __init__(self, model: TensorParallelGPT, why: str = ""):
        self.model, self.why = model, why

    def logits(self, tokens: list[list[int]], cache: KVCache) -> Tensor:
        return self.model.local_logits(self.model.hidden(torch.tensor(tokens, device=self.model.device), cache))


def decoder_for(model: TensorParallelGPT) -> Decoder:
    """On a GPU, for a compiled model, a CUDA graph where messages stay on the GPUs. On a CPU the native one where it can run:
    float32, one thread a rank, nothing compiled by torch."""
    weight, transport = model.transformer.wpe.weight, model.tp.transport
    if weight.device.type == "cuda":
        # the fastest kernel, but cuDNN plans it anew for every cache length: half a second for every token
        torch.backends.cuda.enable_cudnn_sdp(False)
    if weight.device.type == "cuda" and model.compiled:
        if transport is not None and transport.name == "gloo":
            return TorchDecoder(model, why="over gloo messages go through the host, so a step cannot be a CUDA graph")
        return GraphDecoder(model)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.get_num_threads() != 1 or model.compiled:
        return TorchDecoder(model)
    try:
        return NativeDecoder(model)
    except Unavailable as error:
        return TorchDecoder(model, why=str(error))


def _check_room(cache: KVCache, T: int) -> None:
    if max(cache.lengths) + T > cache.size:
        raise ValueError(f"{max(cache.lengths)} tokens are in the cache, {T} more do not fit its {cache.size}")


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


# runs a graph; what it gives tells whether the GPU has come to the graph's end
Replay = Callable[[], Callable[[], bool]]


class Capture(Protocol):
    """What makes a CUDA graph of a function without arguments."""

    def __call__(self, step: Callable[[], R]) -> tuple[Replay, R]:
        """(what does the same as `step`; what `step` has returned, which every replay writes anew)"""
        ...

    def seconds(self, replay: Replay) -> float:
        """What the GPU takes for it."""
        ...


class CudaGraphs:
    """CUDA graphs on the current device. All are captured on one stream: cuBLAS keeps memory for each."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def __call__(self, step: Callable[[], R]) -> tuple[Replay, R]:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            step()  # what happens on a first run only (compiling, setting libraries up) cannot be captured
        here.wait_stream(self._stream)
        # thread_local: nccl's watchdog, a thread of its own, may look at its events meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Callable[[], bool]:
            graph.replay()
            end = torch.cuda.Event()
            end.record()
            return end.query

        return replay, out

    def seconds(self, replay: Replay) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000.0


class FixedCache(KVCache):
    """The keys and values of another cache, for passes that differ in nothing but what device memory holds.

    at: tokens each row has, [rows] int64 on the device; the caller sets it before a pass. Every pass attends to the whole
    cache under a mask, so no shape depends on a length; there is room for its tokens, and nobody asks whether.
    """

    def __init__(self, cache: KVCache, at: Tensor):
        self.k, self.v, self.size, self.at = cache.k, cache.v, cache.size, at

    def begin(self, T: int) -> Tensor:
        device = self.at.device
        self.layer, self.uniform, self.causal, self.stop = 0, False, False, self.size
        self.positions = self.at.unsqueeze(1) + torch.arange(T, device=device)
        self.mask = (torch.arange(self.size, device=device) <= self.positions.unsqueeze(-1)).unsqueeze(1)  # [rows, 1, T, size]
        return self.positions


class FixedStep:
    """A decode step of T tokens a row as a function of nothing: its tokens and lengths are in device memory, where `fill`
    puts them.

    Running it does not account its collectives, but collects them in `recording`.
    """

    recording: Recording

    def __init__(self, model: TensorParallelGPT, cache: KVCache, T: int):
        self.model = model
        self.inputs = torch.empty(1 + T, len(cache.lengths), dtype=torch.int64, device=model.device)
        self.cache = FixedCache(cache, self.inputs[0])

    def fill(self, tokens: list[list[int]], lengths: list[int]) -> None:
        self.inputs.copy_(torch.tensor([lengths, *zip(*tokens, strict=True)]))  # one message to the device

    def __call__(self) -> Tensor:
        with self.model.tp.ledger.recording() as self.recording:
            return self.model.local_logits(self.model.hidden(self.inputs[1:].T, self.cache))


class GraphDecoder:
    """The model's step, captured once for each cache as a CUDA graph and replayed for every token.

    A cache stands for its number of rows and the memory they are in: rows that leave make a new one (KVCache.rows), which
    is captured anew, as is a step of another number of tokens. A graph is gone with its cache (at the end nccl would wait for
    one that is not). capture: how it is made, for tests without a GPU. capture_s: seconds spent on that so far.
    The account counts every replay's calls, bytes and forward pass, and neither the run before the capture nor the capture.
    No clock runs inside a graph: the seconds of its calls are those of a graph of the same messages alone, timed once.
    Ranks capture and replay alike, as they step alike.
    """

    name, why = "cuda graph", ""

    def __init__(self, model: TensorParallelGPT, capture: Capture | None = None):
        self.model, self.capture, self.capture_s = model, capture or CudaGraphs(), 0.0
        self._steps: weakref.WeakKeyDictionary[KVCache, dict[int, tuple[FixedStep, Replay, Tensor]]]
        self._steps = weakref.WeakKeyDictionary()

    def logits(self, tokens: list[list[int]], cache: KVCache) -> Tensor:
        T = len(tokens[0])
        _check_room(cache, T)
        steps = self._steps.setdefault(cache, {})
        if T not in steps:
            steps[T] = self._captured(FixedStep(self.model, cache, T), tokens, cache.lengths)
        step, replay, out = steps[T]
        step.fill(tokens, cache.lengths)
        self.model.tp.ledger.replay(step.recording, replay())
        return out

    def _captured(
        self, step: FixedStep, tokens: list[list[int]], lengths: list[int]
    ) -> tuple[FixedStep, Replay, Tensor]:
        began = time.perf_counter()
        step.fill(tokens, lengths)  # what runs for the capture writes the cache where the replay will
        replay, out = self.capture(step)
        for size in sorted({made.call[1] for made in step.recording.calls}):
            alike = [made for made in step.recording.calls if made.call[1] == size]
            again, _ = self.capture(lambda alike=alike: [made.again() for made in alike])  # type: ignore[misc]
            again()  # the timed one begins when all ranks have come to it
            seconds = self.capture.seconds(again) / len(alike)
            for made in alike:
                made.seconds = seconds
                del made.again  # it keeps the memory of its message
        self.capture_s += time.perf_counter() - began
        return step, replay, out


# --- inference/decode.c ---------------------------------------------------------------------------------------------

SOURCE = Path(__file__).with_name("decode.c")
_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("factor", _pointer), ("bias", _pointer), ("outputs", _int), ("inputs", _int)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("bias", _pointer)]


class _Block(ctypes.Structure):
    _fields_ = [
        ("ln_1", _Norm),
        ("c_attn", _Linear),
        ("c_proj", _Linear),
        ("ln_2", _Norm),
        ("c_fc", _Linear),
        ("c_proj_mlp", _Linear),
    ]


class _State(ctypes.Structure):
    _fields_ = [
        ("C", _int),
        ("h", _int),
        ("D", _int),
        ("rows", _int),
        ("T", _int),
        ("size", _int),
        ("activation", _int),
        ("x", _pointer),
        ("here", _pointer),
        ("partial", _pointer),
        ("work", _pointer),
        ("lengths", _pointer),
    ]


def _address(tensor: Tensor | None) -> int | None:
    """NULL for None. The tensor must outlive the address: parameters do, and what `_Rows` holds."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(f"a contiguous tensor is needed, this one has strides {tensor.stride()}")
    return tensor.data_ptr()


def _linear(layer: Any, with_bias: bool = True) -> _Linear:
    """Of a sharded layer, or of the embedding as the head; quantized or not."""
    bias = layer.bias if with_bias else None
    if (int8 := getattr(layer, "int8", None)) is not None:
        return _Linear(_address(int8.q), _address(int8.scale), _address(bias), *int8.q.shape)
    return _Linear(_address(layer.weight), None, _address(bias), *layer.weight.shape)


def _norm(layer: LayerNorm) -> _Norm:
    return _Norm(_address(layer.weight), _address(layer.bias))


class _Rows:
    """What a step of so many rows of the stream works in: T tokens of each row of a cache that has room for `size`."""

    def __init__(self, model: TensorParallelGPT, rows: int, T: int, size: int):
        split, rank = model.split, model.tp.rank
        C, D = model.config.n_embd, split.head_dim
        h, m = (hi - lo for lo, hi in (split.heads(rank), split.columns(rank)))
        self.x, self.here, self.partial, self.out = torch.empty(4, rows, C)
        self.arrived = self.out  # the sum over the ranks, for as long as the next sub-block needs it
        self.logits = torch.empty(rows, model.vocab_hi - model.vocab_lo)
        self.ids: Any = (_int * rows)()
        self.lengths: Any = (_int * rows)()
        self.work = torch.empty(rows * (C + max(4 * h * D, m)) + size)
        activation = ("gelu", "gelu_tanh").index(model.config.activation)
        places = *map(_address, (self.x, self.here, self.partial, self.work)), ctypes.addressof(self.lengths)
        self.state = _State(C, h, D, rows, T, size, activation, *places)


class _Point(NamedTuple):
    """What follows a sub-block. first: the one before it was followed by a sync point; bias: the address of what is added
    once to the stream then, or, where ranks do not synchronise, of this sub-block's own."""

    axis: Axis
    sync: bool
    first: bool
    bias: int | None


class NativeDecoder:
    """decode.c on this rank's float32 or int8 weights, which it reads in place. A step of more than MOST_TOKENS tokens goes to
    torch."""

    name, why, capture_s = "native", "", 0.0

    def __init__(self, model: TensorParallelGPT):
        self.model, self.torch = model, TorchDecoder(model)
        library = load(SOURCE)
        self._embed = _function(library.nanotp_embed, 1, 1, 0, 0, 1, 1, 1)
        self._attention = _function(library.nanotp_attention, *[1] * 7)
        self._mlp = _function(library.nanotp_mlp, *[1] * 5)
        self._head = _function(library.nanotp_head, *[1] * 6)
        self._go_on = _function(library.nanotp_go_on, 1, 1, 1, 0)
        self._bring = _function(library.nanotp_bring, 1, 1)
        transformer: Any = model.transformer  # its blocks are in a ModuleList, which does not tell their type
        self._blocks, self._biases = [], list[Tensor | None]()  # the latter are kept for their addresses
        points = iter(self._points())
        for block in transformer.h:
            attn, mlp = block.attn, block.mlp
            c_attn, c_fc = _linear(attn.c_attn), _linear(mlp.c_fc)
            # a row-parallel layer's bias is added once, with what arrives
            c_proj, c_proj_mlp = _linear(attn.c_proj, False), _linear(mlp.c_proj, False)
            made = _Block(_norm(block.ln_1), c_attn, c_proj, _norm(block.ln_2), c_fc, c_proj_mlp)
            self._blocks.append((made, ctypes.addressof(made), next(points), next(points)))
        self._ln_f = _norm(transformer.ln_f)
        self._head_table = _linear(transformer.wte, False)
        self._head_table.outputs = model.vocab_hi - model.vocab_lo  # the rest is padding
        table: Any = transformer.wte
        self._embedding = table.axis, table.weight.data_ptr(), table.lo, table.hi, _address(transformer.wpe.weight)
        self._rows: _Rows | None = None

    def _points(self) -> Iterator[_Point]:
        """What follows each sub-block of the schedule."""
        for run in self.model.schedule.runs():
            passed = None  # the sum of the run's biases
            for i, (layer, kind) in enumerate(run):
                block: Any = self.model.transformer.h[layer]
                c_proj = (block.attn if kind == "attention" else block.mlp).c_proj
                own, last = None if c_proj.bias is None else c_proj.bias.detach(), i == len(run) - 1
                passed = own if passed is None or own is None else passed + own
                bias = passed if last else own
                self._biases.append(bias)
                yield _Point(c_proj.axis, last, i == 0, _address(bias))

    def _after(self, point: _Point, rows: _Rows) -> tuple[int | None, int | None]:
        """The addresses of what arrives from all ranks after a sub-block, and of the biases that are added with it. (None,
        None) between sync points: nothing is said, the rank goes on with what it has itself."""
        if not point.sync:
            self._go_on(ctypes.addressof(rows.state), rows.out.data_ptr(), point.bias, point.first)
            return None, None
        if not point.first:
            self._bring(ctypes.addressof(rows.state), rows.out.data_ptr())
        rows.arrived = all_reduce(rows.out, point.axis, "forward")
        return rows.arrived.data_ptr(), point.bias

    def logits(self, tokens: list[list[int]], cache: KVCache) -> Tensor:
        T = len(tokens[0])
        n = len(tokens) * T
        if n > MOST_TOKENS:
            return self.torch.logits(tokens, cache)
        _check_room(cache, T)
        model, rows = self.model, self._rows
        if rows is None or (rows.state.rows, rows.state.T, rows.state.size) != (n, T, cache.size):
            rows = self._rows = _Rows(model, n, T, cache.size)
        rows.ids[:] = [token for row in tokens for token in row]
        rows.lengths[:] = [length + t for length in cache.lengths for t in range(T)]
        model.tp.ledger.forward_passes += 1
        state, out_at = ctypes.addressof(rows.state), rows.out.data_ptr()
        embedding, *table = self._embedding
        self._embed(state, *table, ctypes.addressof(rows.ids), out_at)
        rows.arrived = all_reduce(rows.out, embedding, "forward")
        came: tuple[int | None, int | None] = rows.arrived.data_ptr(), None
        for (_, block, after_attention, after_mlp), k, v in zip(self._blocks, cache.k, cache.v, strict=True):
            self._attention(state, block, *came, k.data_ptr(), v.data_ptr(), out_at)
            came = self._after(after_attention, rows)
            self._mlp(state, block, *came, out_at)
            came = self._after(after_mlp, rows)
        ln_f, head = ctypes.addressof(self._ln_f), ctypes.addressof(self._head_table)
        self._head(state, ln_f, head, *came, rows.logits.data_ptr())
        return rows.logits.view(len(tokens), T, -1)


def _function(function: Any, *is_pointer: int) -> Callable[..., None]:
    """A function of the library with its parameters' types; it returns nothing."""
    function.argtypes = [_pointer if pointer else _int for pointer in is_pointer]
    function.restype = None
    return function

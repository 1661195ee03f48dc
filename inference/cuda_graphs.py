"""A decode step as a CUDA graph: captured once, then replayed for every token, which saves the host
some hundred kernel launches a token."""

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inference.ahead import Ahead, ChoosingStep, FixedCache, Hidden
from inference.decoders import TorchDecoder
from inference.sampling import Sampling
from model import KVCache
from parallel.ledger import Recording
from tp_model import TensorParallelGPT

# Launches a graph, and returns a function that tells whether the GPU has finished it
Replay = Callable[[], Callable[[], bool]]


class CudaGraphs:
    """Captures CUDA graphs on the current device, all on one stream: each costs cuBLAS memory."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def __call__(self, step: Callable[[], Any]) -> tuple[Replay, Any]:
        """A replay of `step`, and the result of `step`, which every replay overwrites."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()  # a first run compiles and sets libraries up, which cannot be captured
        current.wait_stream(self._stream)
        # thread_local: nccl's watchdog thread may query its events meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Callable[[], bool]:
            graph.replay()
            end = torch.cuda.Event()
            end.record()
            return end.query

        return replay, out

    def seconds(self, replay: Replay) -> float:
        """The GPU's time for one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000.0


class FixedStep:
    """A decode step without arguments, which can be captured: `fill` writes the tokens and lengths
    into fixed device memory. Its collectives and forward pass are collected in `recording`."""

    recording: Recording

    def __init__(self, model: TensorParallelGPT, cache: KVCache, T: int, hidden: Hidden):
        shape, self.hidden = (1 + T, len(cache.lengths)), hidden
        self.model, self.inputs = model, torch.empty(shape, dtype=torch.int64, device=model.device)
        self.cache = FixedCache(cache, self.inputs[0])

    def fill(self, tokens: list[list[int]], lengths: list[int]) -> None:
        # one copy from the host
        self.inputs.copy_(torch.tensor([lengths, *zip(*tokens, strict=True)]))

    def __call__(self) -> Tensor:
        with self.model.tp.ledger.recording() as self.recording:
            x = self.hidden(self.model, self.inputs[1:].T, self.cache)
            return self.model.local_logits(x)


class GraphDecoder(TorchDecoder):
    """Captures each step once, and replays it for every token of every prompt.

    Captured steps read keys and values at fixed places, which `new_cache` returns: one set for each
    size (a power of two), and fewer rows take the first of them. So one Generation runs at a time.
    The graphs end with the decoder: nccl would wait for them at exit. The account counts replays,
    not captures. No clock can run within a graph: a call's seconds are those of a graph of the same
    messages alone, timed once. Ranks capture and replay in the same order. capture: for tests
    without a GPU. hidden: TensorParallelGPT's own unless given.
    """

    why = ""

    def __init__(
        self, model: TensorParallelGPT, capture: CudaGraphs | None = None,
        hidden: Hidden = TensorParallelGPT.hidden,
    ):  # fmt: skip
        self.model, self.hidden = model, hidden
        self.name = "cuda graph" + ", Triton kernels" * (hidden is not TensorParallelGPT.hidden)
        self.capture, self.capture_s = capture or CudaGraphs(), 0.0
        self._places: dict[int, KVCache] = {}  # by size
        self._steps: dict[Any, tuple[Any, Replay, Tensor]] = {}

    def new_cache(self, rows: int, size: int) -> KVCache:
        size = min(self.model.config.block_size, max(128, 1 << (size - 1).bit_length()))
        places = self._places.get(size)
        if places is None or len(places.lengths) < rows:
            self._steps = {key: step for key, step in self._steps.items() if key[1] != size}
            places = self._places[size] = self.model.new_cache(rows, size)
        return places.part(0, rows)

    def _go_on(self, new: list[list[int]], cache: KVCache, places: list[tuple[int, int]]) -> Tensor:
        T = len(new[0])
        cache.check(max(cache.lengths), T)
        key = cache.kv[0].data_ptr(), cache.size, len(new), T
        if key not in self._steps:
            step = FixedStep(self.model, cache, T, self.hidden)
            step.fill(new, cache.lengths)  # a capture's runs write the cache as the replay will
            self._steps[key] = (step, *self._captured(step))
        step, replay, out = self._steps[key]
        step.fill(new, cache.lengths)
        self.model.tp.ledger.replay(step.recording, replay())
        if T == 1:
            return out[:, 0]
        return out[torch.tensor(places, device=out.device).unbind(1)]

    def ahead(self, newest: list[int], cache: KVCache, sampling: Sampling) -> Ahead:
        """newest: the newest token of each row, which is not in the cache."""
        key = cache.kv[0].data_ptr(), cache.size, len(newest), sampling
        state = torch.tensor([newest, cache.lengths])
        if key not in self._steps:
            step = ChoosingStep(self.model, cache, sampling, self.hidden)
            step.state.copy_(state)
            self._steps[key] = (step, *self._captured(step))
        step, replay, out = self._steps[key]
        step.state.copy_(state)
        return Ahead(step, replay, out)

    def _captured(self, step: Any) -> tuple[Replay, Tensor]:
        began = time.perf_counter()
        replay, out = self.capture(step)
        for nbytes in sorted({call.call[1] for call in step.recording.calls}):
            alike = [call for call in step.recording.calls if call.call[1] == nbytes]
            messages, _ = self.capture(lambda: [call.again() for call in alike])  # noqa: B023
            messages()  # ranks that finished this one begin the timed one together
            seconds = self.capture.seconds(messages) / len(alike)
            for call in alike:
                call.seconds = seconds
                del call.again  # it holds the memory of its message
        self.capture_s += time.perf_counter() - began
        return replay, out

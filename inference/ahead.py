"""Decoding with the choice of tokens on the device, and the host one step behind.

A step reads each row's newest token, chooses the next one and leaves it where the next step reads
it. So the host can launch a step before it knows what the last one chose. It sends with each step
what it knows beforehand: the numbers of the noise, and which rows have ended meanwhile.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.sampling import Sampling, candidates, noise_start, ranked
from model import KVCache, Past
from parallel.collectives import Axis, all_gather, broadcast
from parallel.ledger import Recording
from tp_model import TensorParallelGPT


class FixedCache(KVCache):
    """The keys and values of `cache` for passes of fixed shapes, which attend to all of it under a
    mask. at: the rows' lengths, [rows] int64 on the device, which the caller sets before a pass."""

    def __init__(self, cache: KVCache, at: Tensor):
        self.kv, self.size, self.at = cache.kv, cache.size, at

    def begin(self, T: int) -> Tensor:
        self.positions = self.at.unsqueeze(1) + torch.arange(T, device=self.at.device)
        return self.positions

    def past(self, layer: int) -> Past:
        if layer == 0:  # kernels.py needs no mask, and calls only `begin`
            device, dtype = self.at.device, self.kv[0].dtype
            hidden = torch.arange(self.size, device=device) > self.positions.unsqueeze(-1)
            # numbers, as attention would turn every layer's bools into them: [rows, 1, T, size]
            mask = hidden.to(dtype).masked_fill(hidden, float("-inf")).unsqueeze(1)
            rows = torch.arange(len(self.at), device=device).unsqueeze(1)
            self._pass = rows, self.positions, 0, self.size, mask, False
        return super().past(layer)


# what TensorParallelGPT.hidden computes of [rows, T] tokens
Hidden = Callable[[TensorParallelGPT, Tensor, FixedCache], Tensor]


class ChoosingStep:
    """A decode step without arguments, which can be captured. Its calls go to `recording`.

    state: [2, rows] int64, the newest tokens, and how many are in the cache before them. controls:
    [2, rows] int64 from the host: the start of each row's noise (`noise_start`), and 0 or, on rank
    0, the number of new tokens with which it has ended the row. Returns [rows, 2] int64, rank 0's
    (controls[1], the next token, -1 if the logits are not finite).
    """

    recording: Recording

    def __init__(
        self, model: TensorParallelGPT, cache: KVCache, sampling: Sampling, hidden: Hidden
    ):
        self.model, self.sampling, self.hidden = model, sampling, hidden
        shape = 2, 2, len(cache.lengths)
        self.state, self.controls = torch.zeros(shape, dtype=torch.int64, device=model.device)
        self.cache = FixedCache(cache, self.state[1])

    def __call__(self) -> Tensor:
        model, (tokens, lengths), (start, ended) = self.model, self.state, self.controls
        axis = model.tp.at("sampling")
        with model.tp.ledger.recording() as self.recording:
            logits = model.local_logits(self.hidden(model, tokens.unsqueeze(1), self.cache))[:, 0]
            vocab_size = model.config.vocab_size
            best = candidates(logits, model.vocab_lo, vocab_size, self.sampling, axis.size)
            chosen = _agreed(best, start, ended, self.sampling, axis)
        tokens.copy_(chosen[:, 1].clamp(min=0))
        lengths.add_(1).clamp_(max=self.cache.size - 1)  # a row that has ended may not outgrow it
        return chosen


def _agreed(best: Tensor, start: Tensor, ended: Tensor, sampling: Sampling, axis: Axis) -> Tensor:
    """best: [2, rows, k] int32, see `candidates`."""
    everyone = all_gather(best, axis, "step")  # [tp, 2, rows, k]
    bits, ids = everyone.permute(1, 2, 0, 3).flatten(2)  # [rows, tp * k] each
    token = draw(bits.view(torch.float32), ids, start, sampling)
    return broadcast(torch.stack([ended, token], dim=1), axis, "step")


def draw(values: Tensor, ids: Tensor, start: Tensor, sampling: Sampling) -> Tensor:
    """What sampling.choose computes, for all rows, on their device and without waiting for it.
    values: [rows, n] float32, the logits of the tokens `ids` [rows, n]. start: [rows] int64."""
    k = 1 if sampling.temperature == 0 else min(sampling.top_k or values.shape[1], values.shape[1])
    order = ranked(values, ids, k)
    values, ids = values.gather(1, order), ids.gather(1, order).long()
    picked = torch.zeros_like(order[:, :1])
    if sampling.temperature:
        z = values.double()
        z = (z - z[:, :1]) / sampling.temperature
        if sampling.top_p < 1.0:
            p = z.softmax(dim=-1)
            z = z.masked_fill(p.cumsum(-1) - p >= sampling.top_p, float("-inf"))
        picked = (z + noise(start, ids)).argmax(dim=-1, keepdim=True)
    return ids.gather(1, picked)[:, 0].masked_fill(~values[:, 0].isfinite(), -1)


def noise(start: Tensor, ids: Tensor) -> Tensor:
    """sampling.noise [rows, n] from int64, which wraps around as uint64 does."""
    shifted = lambda x, n: (x >> n) & ((1 << (64 - n)) - 1)  # noqa: E731
    x = start.unsqueeze(1) + (ids + 1) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    u = (shifted(x ^ shifted(x, 31), 12).double() + 0.5) * 2.0**-52
    return -(-u.log()).log()


class Ahead:
    """Steps of one group of rows: `launch` starts one, `collect` waits for the oldest, of at most
    two under way. Only `collect` waits for the device."""

    def __init__(self, step: ChoosingStep, replay: Callable[[], Callable[[], bool]], out: Tensor):
        self.step, self.replay, self.out, self.launched = step, replay, out, 0
        gpu = out.is_cuda
        shape = 2, *step.controls.shape
        self._sent = torch.empty(shape, dtype=torch.int64, pin_memory=gpu)
        self._chosen = torch.empty((2, *out.shape), dtype=torch.int64, pin_memory=gpu)
        self._under_way: deque[tuple[Tensor, Any]] = deque()

    def launch(self, places: list[tuple[int, int]], ended: list[int]) -> None:
        """places: (sample, position) of each row's next token. ended: see ChoosingStep."""
        sent, chosen = self._sent[self.launched % 2], self._chosen[self.launched % 2]
        sampling = self.step.sampling
        starts = [0] * len(places)
        if sampling.temperature:
            starts = [int(noise_start(sampling.seed, *at).view("int64")[0]) for at in places]
        sent.copy_(torch.tensor([starts, ended]))
        self.step.controls.copy_(sent, non_blocking=True)
        self.step.model.tp.ledger.replay(self.step.recording, self.replay())
        chosen.copy_(self.out, non_blocking=True)
        if (event := torch.cuda.Event() if chosen.is_pinned() else None) is not None:
            event.record()
        self._under_way.append((chosen, event))
        self.launched += 1

    def collect(self) -> list[list[int]]:
        chosen, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        found: list[list[int]] = chosen.tolist()
        return found

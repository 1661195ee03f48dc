"""A pass: local logits after the newest tokens of rows that are in a KV cache.

`TorchDecoder` runs the model. `GraphDecoder` (cuda_graphs.py) repeats one run of it as a CUDA
graph. `NativeDecoder` (native_decoder.py) runs it in C on one CPU core. The collectives are the
same with each.
"""

import torch
from torch import Tensor

from base.errors import Unavailable, UserError
from inference.ahead import Hidden
from inference.packed import suits
from model import KVCache
from tp_model import TensorParallelGPT


def decoder_for(model: TensorParallelGPT, kernels: bool = False) -> "TorchDecoder":
    """The fastest decoder for this model, device and transport. kernels: one with those of
    kernels.py, or a UserError."""
    from inference.cuda_graphs import GraphDecoder  # which import this file
    from inference.native_decoder import NativeDecoder

    device, transport = model.device, model.tp.transport
    hidden = _with_kernels(model) if kernels else TensorParallelGPT.hidden
    if device.type == "cuda":
        # cuDNN's kernel is the fastest, but planned anew for each cache length: 0.5 s a token
        torch.backends.cuda.enable_cudnn_sdp(False)
        if transport is not None and transport.name == "gloo":
            why = "over gloo messages go through the host, so a step cannot be a CUDA graph"
            return TorchDecoder(model, why)
        return GraphDecoder(model, hidden=hidden)
    if not suits(model):
        return TorchDecoder(model)
    if model.sequence_parallel:
        return TorchDecoder(model, "--sequence_parallel=True splits the tokens of prompts")
    try:
        return NativeDecoder(model)
    except Unavailable as error:
        return TorchDecoder(model, str(error))


def _with_kernels(model: TensorParallelGPT) -> Hidden:
    transport = model.tp.transport
    try:
        from inference.kernels import hidden, unusable

        why = unusable(model)
    except ImportError as error:
        why = f"they need triton ({error})"
    if transport is not None and transport.name == "gloo":
        why = "they are in a CUDA graph, and over gloo messages go through the host"
    if why:
        raise UserError(f"--kernels=True: {why}. Leave it out.")
    return hidden


class TorchDecoder:
    """Runs the model as it is. The others extend it. name: for the report. why: the reason a faster
    one is not used, or "". capture_s: seconds so far that prepared steps, left out of their speed.
    """

    name, capture_s = "torch", 0.0

    def __init__(self, model: TensorParallelGPT, why: str = ""):
        self.model, self.why = model, why

    def new_cache(self, rows: int, size: int) -> KVCache:
        """An empty cache of this many rows of `size` tokens, for this decoder."""
        return self.model.new_cache(rows, size)

    def logits(self, new: list[list[int]], cache: KVCache,
               counts: list[int] | None = None) -> Tensor:
        """Local logits [sum of counts, v] after the last counts[i] new tokens of each row: after
        all unless given. new[i] follows row i of the cache; rows of which the cache has nothing
        come last. The caller advances the cache. The next call may overwrite the result.
        ValueError if the cache has no room."""
        n, lengths = len(new), cache.lengths
        begun = sum(length > 0 for length in lengths)
        counts = counts or [len(tokens) for tokens in new]
        parts = [run(_padded(new[lo:hi]), cache.part(lo, hi), _places(new[lo:hi], counts[lo:hi]))
                 for run, lo, hi in ((self._go_on, 0, begun), (self._read, begun, n)) if lo < hi]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, new: list[list[int]], cache: KVCache, places: list[tuple[int, int]]) -> Tensor:
        """Local logits [places, v] at (row, column) of `new` [rows, T]."""
        device = self.model.device
        hidden = self.model.hidden(torch.tensor(new, device=device), cache)  # [rows, T, C]
        return self.model.local_logits(hidden[torch.tensor(places, device=device).unbind(1)])

    _go_on = _read  # after earlier tokens


def _padded(new: list[list[int]]) -> list[list[int]]:
    """Padding on the right is not attended to, and is overwritten in the cache later."""
    longest = max(map(len, new))
    return [tokens + [0] * (longest - len(tokens)) for tokens in new]


def _places(new: list[list[int]], counts: list[int]) -> list[tuple[int, int]]:
    """(row, column) of the last counts[i] of each row's tokens."""
    each = enumerate(zip(map(len, new), counts, strict=True))
    return [(i, at) for i, (end, count) in each for at in range(end - count, end)]

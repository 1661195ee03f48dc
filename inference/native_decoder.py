"""The decode step of one CPU thread and at most MOST_TOKENS tokens, in C (decode.c): what lies
between two collectives, on the rank's float32 or int8 weights in place. They are called here."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from base.native import load
from inference.decoders import TorchDecoder
from model import ACTIVATIONS, KVCache, LayerNorm
from parallel.collectives import Axis, all_reduce
from parallel.flight import Away
from tp_model import TensorParallelGPT

MOST_TOKENS = 16  # for more, a blocked matrix product is faster than a pass over the weights
SOURCE = Path(__file__).with_name("decode.c")
FUNCTIONS = {  # of decode.c, with their parameters: see _fields
    "embed": "state* table* lo hi wpe* ids* out*",
    "attention": "state* block* arrived* bias* kv* out*",
    "mlp": "state* block* arrived* bias* out*",
    "keep": "state* out* bias* first",
    "join": "state* arrived* bias* own* count",
    "add_kept": "state* out*",
    "head": "state* ln_f* table* arrived* bias* logits*",
}


def _fields(names: str) -> list[tuple[str, Any]]:
    """The names and types of a structure's or function's fields: * marks a pointer, else int64."""
    return [(name.rstrip("*"), ctypes.c_void_p if name.endswith("*") else ctypes.c_int64)
            for name in names.split()]


class _Linear(ctypes.Structure):
    _fields_ = _fields("weight* factor* bias* outputs inputs")


class _Norm(ctypes.Structure):
    _fields_ = _fields("weight* bias*")


class _Block(ctypes.Structure):
    _fields_ = [("ln_1", _Norm), ("c_attn", _Linear), ("c_proj", _Linear),
                ("ln_2", _Norm), ("c_fc", _Linear), ("c_proj_mlp", _Linear),
                ("scale", ctypes.c_float)]


class _State(ctypes.Structure):
    _fields_ = [*_fields("C h D rows T size activation x* here* partial* work* lengths*"),
                ("epsilon", ctypes.c_float)]


def _address(tensor: Tensor | None) -> int | None:
    """NULL for None. The caller keeps the tensor, which is contiguous, while C uses the address."""
    return None if tensor is None else tensor.data_ptr()


def _linear(layer: Any, with_bias: bool = True) -> _Linear:
    """Of a sharded layer, quantized or not, or of the embedding table as the head."""
    bias = _address(layer.bias) if with_bias else None
    if (int8 := layer.int8) is not None:
        return _Linear(_address(int8.q), _address(int8.scale), bias, *int8.q.shape)
    return _Linear(_address(layer.weight), None, bias, *layer.weight.shape)


def _norm(layer: LayerNorm) -> _Norm:
    return _Norm(_address(layer.weight), _address(layer.bias))


class _Buffers:
    """The memory of a step of n tokens, T for each row of a cache of `size`."""

    def __init__(self, model: TensorParallelGPT, n: int, T: int, size: int):
        C, D, rank = model.config.n_embd, model.split.head_dim, model.tp.rank
        h, m = (hi - lo for lo, hi in (model.split.heads(rank), model.split.columns(rank)))
        self.x, self.here, self.partial, self.out = torch.empty(4, n, C)
        self.arrived = self.out  # keeps an all-reduce's result while C reads it
        self.logits = torch.empty(n, model.vocab_hi - model.vocab_lo)
        self.ids: Any = (ctypes.c_int64 * n)()
        self.lengths: Any = (ctypes.c_int64 * n)()
        self.work = torch.empty(n * (C + max(4 * h * D, m)) + size)
        activation = list(ACTIVATIONS).index(model.config.activation)
        places = map(_address, (self.x, self.here, self.partial, self.work))
        lengths = ctypes.addressof(self.lengths)
        epsilon = model.config.layer_norm_epsilon
        self.away = Away(model.schedule)
        self.state = _State(C, h, D, n, T, size, activation, *places, lengths, epsilon)


class _After(NamedTuple):
    """What follows a sub-block. first: it is the first since the last sync point. bias: an address;
    at a sync point of the sum of all biases since the last one, else of this sub-block's own, as
    always under a delay."""

    n: int
    axis: Axis
    sync: bool
    first: bool
    bias: int | None


class NativeDecoder(TorchDecoder):
    name = "native"

    def __init__(self, model: TensorParallelGPT):
        super().__init__(model)
        library, self._call = load(SOURCE), dict[str, Any]()
        for name, parameters in FUNCTIONS.items():
            function = self._call[name] = getattr(library, f"nanotp_{name}")
            function.argtypes = [kind for _, kind in _fields(parameters)]
            function.restype = None
        transformer: Any = model.transformer
        self._blocks, self._biases = [], list[Tensor | None]()  # C has the biases' addresses
        after = iter(self._after_sub_blocks())
        for block in transformer.h:
            attn, mlp = block.attn, block.mlp
            # a row-parallel layer's bias is added once, to the sum
            made = _Block(_norm(block.ln_1), _linear(attn.c_attn), _linear(attn.c_proj, False),
                          _norm(block.ln_2), _linear(mlp.c_fc), _linear(mlp.c_proj, False),
                          attn.factor / attn.head_dim**0.5)
            self._blocks.append((made, ctypes.addressof(made), next(after), next(after)))
        self._ln_f, table, head = _norm(transformer.ln_f), transformer.wte, model.head
        self._head_table = _linear(head, False)
        self._head_table.outputs = model.vocab_hi - model.vocab_lo  # without the padding
        wpe = _address(transformer.wpe.weight)
        self._embedding = table.axis, table.weight.data_ptr(), table.lo, table.hi, wpe
        self._buffers: _Buffers | None = None

    def _after_sub_blocks(self) -> Iterator[_After]:
        for run in self.model.schedule.stretches():
            total = None  # of the run's biases
            for i, (layer, kind) in enumerate(run):
                block: Any = self.model.transformer.h[layer]
                c_proj = (block.attn if kind == "attention" else block.mlp).c_proj
                own = None if c_proj.bias is None else c_proj.bias.detach()
                total = own if total is None or own is None else total + own
                sync, n = i == len(run) - 1, len(self._biases)
                summed = sync and not self.model.schedule.delay
                self._biases.append(total if summed else own)
                yield _After(n, c_proj.axis, sync, i == 0, _address(self._biases[-1]))

    def logits(self, tokens: list[list[int]], cache: KVCache) -> Tensor:
        T = len(tokens[0])
        if (n := len(tokens) * T) > MOST_TOKENS:
            return super().logits(tokens, cache)
        cache.check(T)
        model, call, b = self.model, self._call, self._buffers
        if b is None or (b.state.rows, b.state.T, b.state.size) != (n, T, cache.size):
            b = self._buffers = _Buffers(model, n, T, cache.size)
        b.ids[:] = [token for row in tokens for token in row]
        b.lengths[:] = [length + t for length in cache.lengths for t in range(T)]
        model.tp.ledger.forward_passes += 1
        state, out = ctypes.addressof(b.state), b.out.data_ptr()
        axis, *table = self._embedding
        b.away = Away(model.schedule)
        call["embed"](state, *table, ctypes.addressof(b.ids), out)
        b.arrived = all_reduce(b.out, axis, "forward")
        arrived: tuple[int | None, int | None] = b.arrived.data_ptr(), None
        for (_, block, attention, mlp), kv in zip(self._blocks, cache.kv, strict=True):
            call["attention"](state, block, *arrived, kv.data_ptr(), out)
            arrived = self._arrived(attention, b)
            call["mlp"](state, block, *arrived, out)
            arrived = self._arrived(mlp, b)
        ln_f, head = ctypes.addressof(self._ln_f), ctypes.addressof(self._head_table)
        call["head"](state, ln_f, head, *arrived, b.logits.data_ptr())
        return b.logits.view(len(tokens), T, -1)

    def _arrived(self, after: _After, b: _Buffers) -> tuple[int | None, int | None]:
        """The addresses of the ranks' sum and of its bias, or NULLs between sync points."""
        state, out = ctypes.addressof(b.state), b.out.data_ptr()
        if self.model.schedule.delay:
            self._join(after, b)
            return None, None
        if not after.sync:
            self._call["keep"](state, out, after.bias, after.first)
            return None, None
        if not after.first:
            self._call["add_kept"](state, out)
        b.arrived = all_reduce(b.out, after.axis, "forward")
        return b.arrived.data_ptr(), after.bias

    def _join(self, after: _After, b: _Buffers) -> None:
        """Go on under a delay: what is due joins, what is under way is read as well."""
        join, state, bias = self._call["join"], ctypes.addressof(b.state), after.bias
        b.away.start(after.n, b.out.clone(), after.axis)
        totals: list[Tensor | None] = [*b.away.due(after.n + 1)]
        *earlier, last = totals or [None]
        for total in earlier:
            join(state, _address(total), None, None, 0)
        places = (ctypes.c_void_p * len(b.away.own))(*map(_address, b.away.own.values()))
        join(state, _address(last), bias, ctypes.addressof(places), len(places))

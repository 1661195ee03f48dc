"""A pass of one CPU thread in C (decode.c): what lies between two collectives, on the rank's packed
weights. The collectives are called here."""

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.decoders import TorchDecoder
from inference.packed import Linear, address, digits, fields, pack
from model import ACTIVATIONS, KVCache, LayerNorm
from parallel.collectives import Axis, all_reduce
from parallel.flight import Away
from parallel.ring import Ring
from tp_model import TensorParallelGPT

FUNCTIONS = {  # of decode.c, with their parameters: see `fields`
    "begin": "state* wpe*",
    "rows": "table* ids* count lo out*",
    "attention": "state* block* arrived* bias* cache* out*",
    "mlp": "state* block* arrived* bias* out*",
    "keep": "state* out* bias* first",
    "join": "state* arrived* bias* own* count",
    "add_kept": "state* out*",
    "head": "state* ln_f* table* arrived* bias* wanted* count logits*",
}


class _Norm(ctypes.Structure):
    _fields_ = fields("weight* bias*")


class _Block(ctypes.Structure):
    _fields_ = [("ln_1", _Norm), ("c_attn", Linear), ("c_proj", Linear),
                ("ln_2", _Norm), ("c_fc", Linear), ("c_proj_mlp", Linear),
                ("scale", ctypes.c_float)]


class _State(ctypes.Structure):
    _fields_ = [*fields("C h D rows size x* here* partial* work* digits* positions* slots*"),
                ("epsilon", ctypes.c_float)]


def _norm(layer: LayerNorm) -> _Norm:
    return _Norm(address(layer.weight), address(layer.bias))


class NativeCache(KVCache):
    """Keys and values as decode.c has them. layers: [rows, numbers] each, of which a row has the
    heads' values [h, size, D], then their keys in panels [h, panels, D, panel]."""

    def __init__(self, layers: list[Tensor], size: int, h: int, D: int, panel: int):
        self.kv, self.size, self.lengths, at = layers, size, [0] * len(layers[0]), h * size * D
        self._values = [layer[:, :at].unflatten(1, (h, size, D)) for layer in layers]
        self._keys = [layer[:, at:].unflatten(1, (h, -1, D * panel)) for layer in layers]
        self._panel = panel

    def copy(self, row: int, source: int, tokens: int) -> None:
        for parts, n in (self._values, tokens), (self._keys, -(-tokens // self._panel)):
            for part in parts:
                part[row, :, :n] = part[source, :, :n]


class _Buffers:
    """The memory of a pass over n tokens that wants the logits of some of them."""

    def __init__(self, model: TensorParallelGPT, n: int, wanted: int, size: int, library: Any):
        C, D, rank = model.config.n_embd, model.split.head_dim, model.tp.rank
        h, m = (hi - lo for lo, hi in (model.split.heads(rank), model.split.columns(rank)))
        self.key = n, wanted, size
        self.x, self.here, self.partial, self.out = torch.empty(4, n, C)
        self.arrived = self.out  # keeps an all-reduce's result while C reads it
        columns = model.vocab_hi - model.vocab_lo if model.stages.has_last else 0
        self.logits = torch.empty(wanted, columns)
        self.ids, self.positions, self.slots = torch.empty(3, n, dtype=torch.int64)
        self.wanted = torch.empty(wanted, dtype=torch.int64)
        self.work = torch.empty(library.nanotp_work(*map(ctypes.c_int64, (C, h * D, m, n, size))))
        self.digits = digits(library, n, max(C, h * D, m))
        places = map(address, (self.x, self.here, self.partial, self.work, self.digits,
                               self.positions, self.slots))
        self.state = _State(C, h, D, n, size, *places, model.config.layer_norm_epsilon)
        self.away: Away | None = None  # under a delay


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
    """ring: joins this stage to the others of a pipeline; only the last one has logits."""

    name = "native"

    def __init__(self, model: TensorParallelGPT, ring: Ring | None = None):
        super().__init__(model)
        self.ring = ring
        self._library, self._call = pack(model), dict[str, Any]()
        for name, parameters in FUNCTIONS.items():
            function = self._call[name] = getattr(self._library, f"nanotp_{name}")
            function.argtypes = [kind for _, kind in fields(parameters)]
            function.restype = None
        self._library.nanotp_work.restype = self._library.nanotp_slot.restype = ctypes.c_int64
        transformer: Any = model.transformer
        self._blocks, self._biases = [], list[Tensor | None]()  # C has the biases' addresses
        after = iter(self._after_sub_blocks())
        activation = 1 + list(ACTIVATIONS).index(model.config.activation)
        for block in filter(None, transformer.h):
            attn, mlp = block.attn, block.mlp
            # a row-parallel layer's bias is added once, to the sum
            made = _Block(_norm(block.ln_1), attn.c_attn.stored.linear(attn.c_attn.bias),
                          attn.c_proj.stored.linear(), _norm(block.ln_2),
                          mlp.c_fc.stored.linear(mlp.c_fc.bias, activation),
                          mlp.c_proj.stored.linear(), attn.factor / attn.head_dim**0.5)
            self._blocks.append((made, ctypes.addressof(made), next(after), next(after)))
        if model.stages.has_first:
            self._table, self._wpe = transformer.wte.table.linear(), address(transformer.wpe.weight)
        if model.stages.has_last:
            self._ln_f, self._head = _norm(transformer.ln_f), model.head.stored.linear()
        self._buffers: _Buffers | None = None

    def _after_sub_blocks(self) -> Iterator[_After]:
        for run in self.model.schedule.stretches():
            total = None  # of the run's biases
            for i, (layer, kind) in enumerate(run):
                block: Any = self.model.transformer.h[layer]
                if block is None:  # of another stage
                    continue
                c_proj = (block.attn if kind == "attention" else block.mlp).c_proj
                own = None if c_proj.bias is None else c_proj.bias.detach()
                total = own if total is None or own is None else total + own
                sync, n = i == len(run) - 1, len(self._biases)
                summed = sync and not self.model.schedule.delay
                self._biases.append(total if summed else own)
                yield _After(n, c_proj.axis, sync, i == 0, address(self._biases[-1]))

    def new_cache(self, rows: int, size: int) -> KVCache:
        (lo, hi), D = self.model.split.heads(self.model.tp.rank), self.model.split.head_dim
        numbers = self._library.nanotp_slot(*map(ctypes.c_int64, (hi - lo, D, size)))
        layers = [torch.empty(rows, numbers) for _ in self._blocks]
        return NativeCache(layers, size, hi - lo, D, self._library.nanotp_panel())

    def logits(self, new: list[list[int]], cache: KVCache,
               counts: list[int] | None = None) -> Tensor:
        model, call, n = self.model, self._call, sum(map(len, new))
        wanted = n if counts is None else sum(counts)
        b = self._buffers
        if b is None or b.key != (n, wanted, cache.size):
            b = self._buffers = _Buffers(model, n, wanted, cache.size, self._library)
        self._fill(b, new, cache, counts)
        model.tp.ledger.forward_passes += 1
        state, out = ctypes.addressof(b.state), b.out.data_ptr()
        b.away = Away(model.schedule) if model.schedule.delay else None
        arrived: tuple[int | None, int | None] = None, None
        if self.ring is not None and not model.stages.has_first:
            b.here.copy_(b.x.copy_(self.ring.receive(b.x)))
        else:
            table, axis = ctypes.addressof(self._table), model.transformer.wte.axis
            call["rows"](table, b.ids.data_ptr(), n, model.vocab_lo, out)
            b.arrived = all_reduce(b.out, axis, "forward")
            call["begin"](state, self._wpe)
            arrived = b.arrived.data_ptr(), None
        for (_, block, attention, mlp), kv in zip(self._blocks, cache.kv, strict=True):
            call["attention"](state, block, *arrived, kv.data_ptr(), out)
            arrived = self._arrived(attention, b)
            call["mlp"](state, block, *arrived, out)
            arrived = self._arrived(mlp, b)
        if self.ring is not None and not model.stages.has_last:
            call["join"](state, *arrived, None, 0)
            self.ring.send(b.x)
            return b.logits
        ln_f, head = ctypes.addressof(self._ln_f), ctypes.addressof(self._head)
        call["head"](state, ln_f, head, *arrived, b.wanted.data_ptr(), wanted, b.logits.data_ptr())
        return b.logits

    def _fill(self, b: _Buffers, new: list[list[int]], cache: KVCache,
              counts: list[int] | None) -> None:
        """Where each token of a pass belongs, and which ones' logits it returns."""
        ids, positions, slots, wanted = list[int](), list[int](), list[int](), list[int]()
        for i, (tokens, length) in enumerate(zip(new, cache.lengths, strict=True)):
            cache.check(length, len(tokens))
            ids += tokens
            positions += range(length, length + len(tokens))
            slots += [i] * len(tokens)
            count = len(tokens) if counts is None else counts[i]
            wanted += range(len(ids) - count, len(ids))
        for place, numbers in ((b.ids, ids), (b.positions, positions), (b.slots, slots),
                               (b.wanted, wanted)):
            place.copy_(torch.tensor(numbers))

    def _arrived(self, after: _After, b: _Buffers) -> tuple[int | None, int | None]:
        """The addresses of the ranks' sum and of its bias, or NULLs between sync points."""
        state, out = ctypes.addressof(b.state), b.out.data_ptr()
        if b.away is not None:
            self._join(after, b.away, b)
            return None, None
        if not after.sync:
            self._call["keep"](state, out, after.bias, after.first)
            return None, None
        if not after.first:
            self._call["add_kept"](state, out)
        b.arrived = all_reduce(b.out, after.axis, "forward")
        return b.arrived.data_ptr(), after.bias

    def _join(self, after: _After, away: Away, b: _Buffers) -> None:
        """Go on under a delay: what is due joins, what is under way is read as well."""
        join, state, bias = self._call["join"], ctypes.addressof(b.state), after.bias
        away.start(after.n, b.out.clone(), after.axis)
        totals: list[Tensor | None] = [*away.due(after.n + 1)]
        *earlier, last = totals or [None]
        for total in earlier:
            join(state, address(total), None, None, 0)
        places = (ctypes.c_void_p * len(away.own))(*map(address, away.own.values()))
        join(state, address(last), bias, ctypes.addressof(places), len(places))

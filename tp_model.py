"""TensorParallelGPT: model.py with attention, MLP, embedding, head and loss split over the ranks of one axis.

The classes stand in the same order and their parameters have the same names as in model.py: the difference between the
two files is the lesson. Every rank runs the same code on the same tokens; what differs is which heads, columns and
vocabulary rows it holds. A layer's forward pass says two things to the other ranks: one all-reduce after the attention
heads, one after the MLP's columns. A schedule (plan/schedule.py) may leave some of them out. With sequence_parallel
the residual stream and its LayerNorms are split too, by tokens: a layer gathers before its columns and scatters after them.

Shapes: B batch, T tokens, t of them this rank's, C = n_embd, h = this rank's heads, D = head width, m = this rank's MLP
columns.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from base.errors import UserError
from checkpoints.runs import Read
from model import GPTConfig, KVCache, LayerNorm, adamw, attend, gelu, initial_tensor
from parallel.collectives import Axis, all_gather, all_reduce
from parallel.graphs import outside_graphs
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, f, g, gather, share
from parallel.loss import vocab_parallel_head_loss
from plan.messages import partial_gradients
from plan.partition import Partition, Rule, Span, spans
from plan.schedule import Schedule, SubBlock

if TYPE_CHECKING:
    from parallel.data_parallel import Sharding


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int, keep_gathered: bool = False):
        super().__init__()
        lo, hi = split.heads(tp.rank)
        self.local_n_head, self.head_dim = hi - lo, split.head_dim
        width = self.local_n_head * self.head_dim
        here = tp.at("attention", layer)
        self.c_attn = ColumnParallelLinear(config.n_embd, 3 * width, config.bias, here, keep_gathered)
        self.c_proj = RowParallelLinear(config.n_embd, width, config.n_embd, config.bias, here)
        self.tp, self.dropout = here, config.dropout

    def forward(self, x: Tensor, cache: KVCache | None = None, tokens: int = 0) -> Tensor:
        """x [B, T, C]; or with tokens = T [B, t, C], this rank's tokens, as the output then is."""
        y = self.c_proj(self.heads(self.c_attn(x, tokens), cache), tokens)  # all-reduce; all-gather and reduce-scatter
        return drop(y, self.dropout if self.training else 0.0, self.tp, tokens)

    def partial(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """This rank's addend of the output, without c_proj's bias: nothing is said."""
        return self.c_proj.partial(self.heads(self.c_attn.local(x), cache))

    def heads(self, qkv: Tensor, cache: KVCache | None) -> Tensor:
        """What this rank's heads make of their queries, keys and values [B, T, 3 * h * D]: [B, T, h * D]."""
        B, T, _ = qkv.shape
        h = self.local_n_head
        q, k, v = qkv.view(B, T, 3 * h, self.head_dim).transpose(1, 2).split(h, dim=1)  # [B, h, T, D]
        if cache is not None:
            k, v = remember(cache, k, v)
        if self.training and self.dropout > 0:
            return attend_with_own_dropout(q, k, v, cache, self.dropout, self.tp)
        return attend(q, k, v, cache, 0.0)


@outside_graphs  # its sizes change with every token: traced, it would be compiled again and again
def remember(cache: KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return cache.update(k, v)


@outside_graphs
def attend_with_own_dropout(q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, dropout: float, tp: Axis) -> Tensor:
    """Attention whose dropout mask is this rank's own: its heads are not the other ranks' heads.

    Replicated activations are dropped by torch's default stream, which all ranks of a tp group seed alike. A seed drawn
    from that stream (so that activation checkpointing repeats it), moved by the rank, starts the sharded one.
    """
    with own_stream(q.device, tp):
        return attend(q, k, v, cache, dropout)


@outside_graphs
def drop_own(x: Tensor, dropout: float, tp: Axis) -> Tensor:
    """Dropout whose mask is this rank's own: its tokens are not the other ranks' tokens."""
    with own_stream(x.device, tp):
        return F.dropout(x, dropout)


def drop(x: Tensor, dropout: float, tp: Axis, tokens: int) -> Tensor:
    """Dropout of the residual stream."""
    return drop_own(x, dropout, tp) if tokens and dropout > 0 else F.dropout(x, dropout)


@contextmanager
def own_stream(device: torch.device, tp: Axis) -> Iterator[None]:
    """Within, torch's default stream is this rank's alone."""
    seed = int(torch.randint(2**62, ()).item()) + tp.rank
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int, keep_gathered: bool = False):
        super().__init__()
        lo, hi = split.columns(tp.rank)
        here = tp.at("mlp", layer)
        self.c_fc = ColumnParallelLinear(config.n_embd, hi - lo, config.bias, here, keep_gathered)
        self.c_proj = RowParallelLinear(split.n_hidden, hi - lo, config.n_embd, config.bias, here)
        self.activation, self.dropout = config.activation, config.dropout

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        # [B, T, m] -> all-reduce -> [B, T, C]; or [B, t, C] -> all-gather -> [B, T, m] -> reduce-scatter -> [B, t, C]
        y = self.c_proj(gelu(self.c_fc(x, tokens), self.activation), tokens)
        return drop(y, self.dropout if self.training else 0.0, self.c_proj.axis, tokens)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's addend of the output, without c_proj's bias: nothing is said."""
        return self.c_proj.partial(gelu(self.c_fc.local(x), self.activation))


class Stream(NamedTuple):
    """The residual stream on one rank. At a sync point it is x, and the same on all ranks, or (sequence_parallel) each has its
    own tokens of it. Between two, a rank goes on with what it knows: x, its own partial outputs since then, and the biases of
    the sub-blocks passed."""

    x: Tensor  # [B, T, C] or [B, t, C], as of the last sync point
    here: Tensor | None = None  # [B, T, C], x + partial + biases; None at a sync point
    partial: Tensor | None = None  # [B, T, C], the sum of this rank's own outputs
    biases: Tensor | None = None  # [C] or [B, T, C], to be added once, when ranks agree; None too where there are none


class Block(nn.Module):
    """syncs: whether the ranks synchronise after its attention, and after its MLP."""

    def __init__(
        self, config: GPTConfig, split: Partition, tp: Axis, layer: int, syncs: tuple[bool, bool], keep_gathered: bool = False
    ):
        super().__init__()
        self.syncs = syncs
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, split, tp, layer, keep_gathered)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config, split, tp, layer, keep_gathered)

    def forward(self, s: Stream, cache: KVCache | None = None, tokens: int = 0) -> Stream:
        return self.after_mlp(self.after_attention(s, cache, tokens), tokens)

    def after_attention(self, s: Stream, cache: KVCache | None = None, tokens: int = 0) -> Stream:
        if s.here is None and self.syncs[0]:
            return Stream(s.x + self.attn(self.ln_1(s.x), cache, tokens))
        here = s.here if s.here is not None else f(s.x, self.attn.tp)
        return go_on(s, here, self.attn.partial(self.ln_1(here), cache), self.attn, self.syncs[0])

    def after_mlp(self, s: Stream, tokens: int = 0) -> Stream:
        if s.here is None and self.syncs[1]:
            return Stream(s.x + self.mlp(self.ln_2(s.x), tokens))
        here = s.here if s.here is not None else f(s.x, self.mlp.c_proj.axis)
        return go_on(s, here, self.mlp.partial(self.ln_2(here)), self.mlp, self.syncs[1])


def go_on(s: Stream, here: Tensor, y: Tensor, body: CausalSelfAttention | MLP, sync: bool) -> Stream:
    """The stream after a sub-block that stands in a run of several between two sync points.

    here: what this rank went into it with, [B, T, C]; y: its partial output, without c_proj's bias. Every contribution
    reaches the stream exactly, once; what is approximate is only what a rank sees before the others' have arrived.
    """
    bias: Tensor | None = body.c_proj.bias
    axis = body.c_proj.axis
    if body.training and body.dropout > 0:  # the mask is the same on all ranks: a sum of dropped parts is the dropped sum
        mask = F.dropout(torch.ones_like(y), body.dropout)
        y, bias = y * mask, None if bias is None else bias * mask
    partial = y if s.partial is None else s.partial + y
    if sync:
        update = g(partial, axis)  # all-reduce
        for biases in (s.biases, bias):
            update = update if biases is None else update + biases
        return Stream(s.x + update)
    if bias is None:
        return Stream(s.x, here + y, partial)
    # its gradient: what comes through `here` differs from rank to rank, what comes through the sync point does not
    later = share(bias, axis)
    return Stream(s.x, here + (y + bias), partial, later if s.biases is None else s.biases + later)


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, schedule: Schedule, keep_gathered: bool):
        super().__init__()
        lo, hi = split.vocabulary(tp.rank)
        here = tp.at("embedding")
        self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd, lo, hi, split.local_vocab, here)
        # from_pretrained, because nn.Embedding would draw numbers that are then thrown away
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), freeze=False)
        syncs = zip(schedule.syncs[::2], schedule.syncs[1::2], strict=True)
        self.h = nn.ModuleList(Block(config, split, tp, layer, both, keep_gathered) for layer, both in enumerate(syncs))
        self.ln_f = LayerNorm(config.n_embd, config.bias)


class TensorParallelGPT(nn.Module):
    """One rank's part of a GPT.

    tp: the axis it is split over. read: called once a parameter with its name and rule, returns this rank's entries of
    it; without one the parameters are drawn from `seed`, as model.py draws them. Memory is taken once, for local shapes.
    schedule: after which sub-blocks ranks synchronise; after every one unless given, and on one rank, which is alone.
    sequence_parallel: split the residual stream over the sequence as well (UserError with another schedule; on one rank it
    is nothing). A pass over fewer tokens than ranks is made without. keep_gathered: see ColumnParallelLinear.
    sharding: deal the parameters over the dp axis as well, for training (parallel/data_parallel.py).
    """

    def __init__(
        self,
        config: GPTConfig,
        tp: Axis,
        read: Read | None = None,
        seed: int = 1337,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        activation_checkpointing: bool = False,
        schedule: Schedule | None = None,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        sharding: "Sharding | None" = None,
    ):
        super().__init__()
        self.config, self.tp, self.activation_checkpointing = config, tp, activation_checkpointing
        self.compiled = False
        self.split = split = Partition.of(config, tp.size)
        self.vocab_lo, self.vocab_hi = split.vocabulary(tp.rank)
        self.schedule = schedule if schedule is not None and tp.size > 1 else Schedule.plain(config.n_layer)
        self.sequence_parallel = sequence_parallel and tp.size > 1
        if self.sequence_parallel and not self.schedule.is_plain:
            raise UserError(f"--sequence_parallel=True together with --sync={self.schedule}: use one of them.")
        self.sharding = sharding
        with torch.device("meta" if sharding else device), default_dtype(dtype):
            self.transformer = Transformer(config, split, tp, self.schedule, keep_gathered)
        if sharding:
            sharding.apply(self, self.transformer.h)
            self.to_empty(device=device)  # of a rank's part only: nothing of full size was ever there
        self.load(read or self._draw(seed))

    def _draw(self, seed: int) -> Read:
        """Every rank draws each full tensor from the same stream and keeps its slice."""
        shapes = self.split.shapes()

        def read(name: str, rule: Rule) -> Tensor:
            full = initial_tensor(name, shapes[name], self.config.n_layer, seed)
            return take(full, rule, self.tp.rank)

        return read

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Fill every parameter from `read`. The tied head is the embedding table itself: there is no second copy."""
        rules = self.split.rules
        for name, parameter in self.named_parameters():
            self.put(name, parameter, read(name, rules[name]))

    @torch.no_grad()
    def put(self, name: str, tensor: Tensor, given: Tensor) -> None:
        """Store what this tp rank owns of a parameter into it, or into optimizer state of its shape."""
        owned = self._owned_rows(name, tensor)
        if (owned, *tensor.shape[1:]) != tuple(given.shape):
            raise ValueError(
                f"{name}: rank {self.tp.rank} holds {[owned, *tensor.shape[1:]]}, was given {list(given.shape)}"
            )
        local, (lo, hi) = held(tensor)
        own = given[lo:hi]
        local[: len(own)].copy_(own)
        local[len(own) :].zero_()  # padding rows, where there are any

    def owned(self, name: str, tensor: Tensor) -> Tensor:
        """What this tp rank owns of a parameter, or of optimizer state of its shape: all but the padding. Where it is sharded
        over dp all ranks of that axis call this, and get all of it."""
        full = whole(tensor, self.sharding.dp) if self.sharding else tensor
        return full[: self._owned_rows(name, tensor)]

    def _owned_rows(self, name: str, tensor: Tensor) -> int:
        rule = self.split.rules[name]
        return tensor.shape[0] if rule.rows is None else rule.owned(self.tp.rank)

    def set_schedule(self, schedule: Schedule) -> None:
        """Other sync points from the next pass on; alike on all ranks, and not once blocks are compiled."""
        self.schedule = schedule if self.tp.size > 1 else Schedule.plain(self.config.n_layer)
        blocks: Any = self.transformer.h
        for layer, block in enumerate(blocks):
            block.syncs = self.schedule.syncs[2 * layer : 2 * layer + 2]

    @property
    def device(self) -> torch.device:
        return self.transformer.wpe.weight.device

    def compile_blocks(self) -> None:
        """torch.compile each block in place. The graph breaks at the collectives: what is between two is one graph."""
        self.compiled = True
        outside_graphs.take_effect()
        for block in self.transformer.h:
            block.compile()

    def own_tokens(self, T: int) -> int:
        """T where a pass over T tokens is split over the sequence, else 0."""
        return T if self.sequence_parallel and self.tp.size <= T else 0

    def embed(self, idx: Tensor, cache: KVCache | None = None) -> Stream:
        """The stream of tokens idx [B, T] before the first layer."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}")
        positions = torch.arange(T, device=idx.device).unsqueeze(0) if cache is None else cache.begin(T)
        self.tp.ledger.forward_passes += 1
        tokens = self.own_tokens(T)
        if tokens:
            lo, hi = spans(T, self.tp.size)[self.tp.rank]
            positions = positions[:, lo:hi]
        x = self.transformer.wte(idx, tokens) + self.transformer.wpe(positions)  # all-reduce; reduce-scatter
        return Stream(drop(x, self.config.dropout if self.training else 0.0, self.tp, tokens))

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The final hidden state [B, T, C], equal on all ranks, of tokens idx [B, T]; with a cache, idx follows it."""
        x, tokens = self._own_hidden(idx, cache)
        return gather(x, self.tp.at("head"), tokens, whole=True) if tokens else x

    def _own_hidden(self, idx: Tensor, cache: KVCache | None) -> tuple[Tensor, int]:
        """(the final hidden state of this rank's tokens [B, t, C], T), or, in a pass that is not split, (of all of them, 0)."""
        s, tokens = self.embed(idx, cache), self.own_tokens(idx.shape[1])
        for block in self.transformer.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                s = checkpoint(block, s, None, tokens, use_reentrant=False, context_fn=self._repeat)
            else:
                s = block(s, cache, tokens)
        return self.transformer.ln_f(s.x), tokens

    def through(self, s: Stream, run: Iterable[SubBlock]) -> Stream:
        """The stream after these sub-blocks, one after the other."""
        blocks: Any = self.transformer.h
        for layer, kind in run:
            s = blocks[layer].after_attention(s) if kind == "attention" else blocks[layer].after_mlp(s)
        return s

    def _repeat(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed block's first and second forward pass: the second belongs to the backward pass."""
        return nullcontext(), self.tp.ledger.recomputing()

    def local_logits(self, x: Tensor) -> Tensor:
        """This rank's columns of the logits, [..., vocab_hi - vocab_lo], of hidden states x [..., C]."""
        return self.transformer.wte.logits(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx [B, T] -> (logits, loss), as model.py's, with one difference: next to a loss there are no logits, because
        nothing ever gathers them; not even a rank's own exist all at once. Without targets: the last position's logits
        [B, 1, V] on every rank, and None."""
        if targets is None:
            return self.gather_logits(self.local_logits(self.hidden(idx, cache)[:, -1:])), None
        x, tokens = self._own_hidden(idx, None)
        if self.sequence_parallel and not tokens and torch.is_grad_enabled():
            raise ValueError(f"{idx.shape[1]} tokens cannot be split over {self.tp.size} ranks to learn from them")
        if tokens:
            x = gather(x, self.tp.at("head"), tokens)
        table, rows = self.transformer.wte.weight, (self.vocab_lo, self.vocab_hi)
        loss = vocab_parallel_head_loss(x.flatten(0, 1), table, targets.flatten(), *rows, self.tp, entered=tokens > 0)
        return None, loss / (targets >= 0).sum()

    def gather_logits(self, local: Tensor) -> Tensor:
        """All vocabulary columns [..., V] from every rank's own [..., vocab_hi - vocab_lo]."""
        widest = -(-self.config.vocab_size // self.tp.size)
        parts = all_gather(F.pad(local, (0, widest - local.shape[-1])), self.tp.at("head"), "forward")
        widths = [hi - lo for lo, hi in map(self.split.vocabulary, range(self.tp.size))]
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def new_cache(self, batch: int, size: int | None = None) -> KVCache:
        """A KV cache for this rank's heads, for rows of at most `size` tokens (block_size unless given)."""
        lo, hi = self.split.heads(self.tp.rank)
        table = self.transformer.wpe.weight
        size = self.config.block_size if size is None else size
        return KVCache(self.config.n_layer, batch, hi - lo, size, self.split.head_dim, table.device, table.dtype)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters of the full model, as nanoGPT counts them (without the position table)."""
        wpe = self.config.block_size * self.config.n_embd
        return self.split.count() - (wpe if non_embedding else 0)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        return adamw(self.named_parameters(), weight_decay, learning_rate, betas, device_type)

    def partial_gradients(self) -> list[nn.Parameter]:
        """The replicated parameters of which, after a backward pass, a rank has only a part of the gradient."""
        names = partial_gradients(self.split, self.schedule, self.sequence_parallel)
        return list(map(self.get_parameter, names))

    def sum_partial_gradients(self) -> None:
        """Make them whole: one all-reduce, between the last backward pass and the use of the gradients. Plain Megatron has
        none, and does nothing here."""
        sum_gradients(self.partial_gradients(), self.tp.at("optimizer"))

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of the full model's gradient, float32, equal on all ranks: one all-reduce, and one over dp where it is
        sharded over that.

        A sharded parameter's squares add up over the ranks; a replicated one's gradient is the same on every rank and
        counts once. Padding rows have no gradient.
        """
        rules = self.split.rules
        shared: list[Tensor] = []
        own: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                norm = torch.linalg.vector_norm(held(parameter.grad)[0].float())
                (shared if rules[name].dim is None else own).append(norm)
        squares = [torch.stack(norms).square().sum() if norms else torch.zeros(()) for norms in (shared, own)]
        everywhere = all_reduce(squares[1].to(squares[0].device), self.tp.at("optimizer"), "step")
        square = squares[0] + everywhere
        if self.sharding:
            square = all_reduce(square, self.sharding.dp.at("optimizer"), "step")
        return square.sqrt()


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Sum the gradients of these over the ranks, in place: one all-reduce, or none where there are no gradients."""
    gradients = [held(parameter.grad)[0] for parameter in parameters if parameter.grad is not None]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        whole = all_reduce(flat, axis, "step").split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, whole, strict=True):
            gradient.copy_(summed.view_as(gradient))


# A tensor that is sharded over dp is a DTensor. It is told by what it has: to import the class takes as long as the rest of a
# start, and most runs have none.


def held(tensor: Any) -> tuple[Tensor, Span]:
    """(what this rank stores of a tensor, which rows of it these are): all of it, unless it is sharded over dp."""
    if not hasattr(tensor, "to_local"):
        return tensor, (0, tensor.shape[0])
    n, dp = tensor.shape[0], tensor.device_mesh.size()
    most = -(-n // dp)  # torch.chunk's rule
    lo = min(most * tensor.device_mesh.get_local_rank(), n)
    return tensor.to_local(), (lo, min(lo + most, n))


def whole(tensor: Any, dp: Axis) -> Tensor:
    """All rows of a tensor that is sharded over dp: one all-gather, which all ranks of that axis call."""
    local, (lo, hi) = held(tensor)
    part = local.new_zeros(-(-tensor.shape[0] // dp.size), *tensor.shape[1:])  # all bring as much as the first
    part[: hi - lo] = local
    return all_gather(part, dp.at("data_parallel"), "step").flatten(0, 1)[: tensor.shape[0]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What torch.empty and its like make within. (Shapes on the meta device would do without, but torch answers for that
    device in Python, and imports half a second of it.)"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def take(full: Tensor, rule: Rule, rank: int) -> Tensor:
    """The runs of a full tensor that `rank` owns, as a tensor of their own."""
    if rule.dim is None:
        return full
    return torch.cat([full.narrow(rule.dim, lo, hi - lo) for lo, hi in rule.runs[rank]], dim=rule.dim)

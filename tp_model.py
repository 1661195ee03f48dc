"""TensorParallelGPT: model.py with attention, MLP, embedding, head and loss split over the ranks of
one axis.

Classes and parameters have the names and the order of model.py: the difference between the two
files is the lesson. Every rank runs the same code on the same tokens, with its own heads, MLP
columns and vocabulary rows. A layer sends two messages: one all-reduce after the attention heads,
one after the MLP's columns. A schedule (plan/schedule.py) may drop some of them. The `region` of a
pass (parallel/regions.py) says whether every rank has all tokens of the residual stream or, with
sequence_parallel, its own: a layer then gathers tokens before its columns, and scatters sums after.

Shapes: B batch, T tokens, t of them this rank's, C = n_embd, h = this rank's heads, D = head width,
m = this rank's MLP columns.
"""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from base.errors import UserError
from checkpoints.tensor_file import Read
from model import ACTIVATIONS, GPTConfig, KVCache, LayerNorm, Past, attend, initial_tensor
from parallel.collectives import Axis, all_gather
from parallel.flight import Flight, contribution, masked
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.loss import vocab_parallel_head_loss
from parallel.operators import attend_with_own_dropout
from parallel.parameters import Parts, take
from parallel.regions import WHOLE, Region, SplitTokens, divide_gradient, f, g
from plan.partition import Partition, Rule, Span, spans
from plan.schedule import Schedule, SubBlock
from plan.stages import Stages

if TYPE_CHECKING:
    from parallel.data_parallel import Sharding


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int):
        super().__init__()
        lo, hi = split.heads(tp.rank)
        self.local_n_head, self.head_dim = hi - lo, split.head_dim
        width = self.local_n_head * self.head_dim
        self.axis = tp.at("attention", layer)
        self.c_attn = ColumnParallelLinear(config.n_embd, 3 * width, config.bias, self.axis)
        sizes = config.n_embd, width, config.n_embd
        self.c_proj = RowParallelLinear(*sizes, config.bias, self.axis)
        self.dropout, self.factor = config.dropout, config.attention_factor(layer)

    def forward(self, x: Tensor, past: Past | None = None, region: Region = WHOLE) -> Tensor:
        """x [B, T, C] -> [B, T, C], or with split tokens [B, t, C] -> [B, t, C]."""
        y = self.c_proj(self.heads(self.c_attn(x, region), past), region)
        return region.dropout(y, self.dropout if self.training else 0.0, self.axis)

    def partial(self, x: Tensor, past: Past | None = None) -> Tensor:
        """This rank's addend of the output, without c_proj's bias. No collective."""
        return self.c_proj.partial(self.heads(self.c_attn.local(x), past))

    def heads(self, qkv: Tensor, past: Past | None) -> Tensor:
        """This rank's queries, keys and values [B, T, 3 * h * D] -> its heads [B, T, h * D]."""
        B, T, _ = qkv.shape
        h = self.local_n_head
        qkv = qkv.view(B, T, 3 * h, self.head_dim).transpose(1, 2)  # [B, 3 * h, T, D]
        q, kv = qkv.split([h, 2 * h], dim=1)
        q = q if self.factor == 1 else q * self.factor
        k, v = kv.chunk(2, dim=1) if past is None else past.update(kv)
        if self.training and self.dropout > 0:
            return attend_with_own_dropout(q, k, v, self.dropout, self.axis)
        return attend(q, k, v, past, 0.0)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int):
        super().__init__()
        lo, hi = split.columns(tp.rank)
        self.axis = tp.at("mlp", layer)
        self.c_fc = ColumnParallelLinear(config.n_embd, hi - lo, config.bias, self.axis)
        sizes = split.n_hidden, hi - lo, config.n_embd
        self.c_proj = RowParallelLinear(*sizes, config.bias, self.axis)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x: Tensor, region: Region = WHOLE) -> Tensor:
        # [B, T, C] -> [B, T, m] -> all-reduce -> [B, T, C], or with split tokens
        # [B, t, C] -> all-gather -> [B, T, m] -> reduce-scatter -> [B, t, C]
        y = self.c_proj(self.activation(self.c_fc(x, region)), region)
        return region.dropout(y, self.dropout if self.training else 0.0, self.axis)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's addend of the output, without c_proj's bias. No collective."""
        return self.c_proj.partial(self.activation(self.c_fc.local(x)))


class Stream(NamedTuple):
    """The residual stream on one rank. At a sync point it is x alone. Between two, a rank goes on
    with `here`: its own partial outputs, and the biases of the sub-blocks passed, on top of x."""

    x: Tensor  # as of the last sync point, [B, T, C]; or this rank's tokens [B, t, C]
    region: Region = WHOLE
    here: Tensor | None = None  # [B, T, C], x + partial + biases; None at a sync point
    partial: Tensor | None = None  # [B, T, C], the sum of this rank's own outputs
    biases: Tensor | None = None  # [C] or [B, T, C], added once, at the next sync point
    flight: Flight | None = None  # under a delay it holds all, and x is that of the embeddings


class Block(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int,
                 syncs: tuple[bool, bool] = (True, True)):
        super().__init__()
        self.syncs = syncs  # after the attention, after the MLP
        norm = config.n_embd, config.bias, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(*norm)
        self.attn = CausalSelfAttention(config, split, tp, layer)
        self.ln_2 = LayerNorm(*norm)
        self.mlp = MLP(config, split, tp, layer)

    def forward(self, s: Stream, past: Past | None = None) -> Stream:
        return self.after_mlp(self.after_attention(s, past))

    def after_attention(self, s: Stream, past: Past | None = None) -> Stream:
        return after(s, self.ln_1, self.attn, self.syncs[0], past)

    def after_mlp(self, s: Stream) -> Stream:
        return after(s, self.ln_2, self.mlp, self.syncs[1])


def after(s: Stream, norm: LayerNorm, body: Any, sync: bool, *past: Past | None) -> Stream:
    """The stream after a sub-block, `body`. In a run of several without sync points in between
    every contribution reaches the stream once and exactly. Only the input of the sub-blocks before
    the next sync point is approximate, as the others' contributions have not arrived."""
    if s.flight is not None:
        y = s.flight.run(norm, body, s.flight.enter(body.axis), *past)
        s.flight.leave(*masked(body, y, body.c_proj.bias), body.axis)
        return s
    if s.here is None and sync:
        return Stream(s.x + body(norm(s.x), *past, region=s.region), s.region)
    here = f(s.x, body.axis) if s.here is None else s.here
    y, bias = masked(body, contribution(norm, body, here, *past), body.c_proj.bias)
    partial = y if s.partial is None else s.partial + y
    if sync:
        update = g(partial, body.axis)  # all-reduce
        for biases in (s.biases, bias):
            update = update if biases is None else update + biases
        return Stream(s.x + update)
    if bias is None:
        return Stream(s.x, WHOLE, here + y, partial)
    # Its gradient through `here` differs between ranks; through the sync point it does not.
    later = divide_gradient(bias, body.axis)
    biases = later if s.biases is None else s.biases + later
    return Stream(s.x, WHOLE, here + (y + bias), partial, biases)


def embedding(config: GPTConfig, split: Partition, tp: Axis) -> VocabParallelEmbedding:
    sizes = config.vocab_size, config.n_embd, *split.vocabulary(tp.rank), split.local_vocab
    return VocabParallelEmbedding(*sizes, tp.at("embedding"))


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis):
        super().__init__()
        self.wte = embedding(config, split, tp)
        # of an empty tensor: drawing numbers on the meta device imports torch's compiler
        positions = torch.empty(config.block_size, config.n_embd)
        self.wpe = nn.Embedding.from_pretrained(positions, freeze=False)
        self.h = nn.ModuleList(Block(config, split, tp, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias, config.layer_norm_epsilon)


class TensorParallelGPT(nn.Module):
    """One rank's part of a GPT.

    tp: the axis it is split over. read: called with each parameter's name and rule, returns this
    rank's part of it; without it parameters are drawn from `seed`, as in model.py. schedule: after
    which sub-blocks ranks synchronise: every one unless given. sequence_parallel: split the
    residual stream by tokens, of passes with as many tokens as ranks; UserError if the schedule
    drops sync points. Neither has an effect on one rank. sharding: split parameters over dp, too.
    stages: of a pipeline; the model then has this rank's modules, and None for the others.
    """

    def __init__(self, config: GPTConfig, tp: Axis, read: Read | None = None, seed: int = 1337,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 activation_checkpointing: bool = False, schedule: Schedule | None = None,
                 sequence_parallel: bool = False, sharding: "Sharding | None" = None,
                 stages: Stages | None = None):
        super().__init__()
        self.config, self.tp, self.sharding = config, tp, sharding
        self.stages, self.compiled = stages or Stages(config.n_layer), False
        self.dtype, self.contribution = dtype, cast(Any, contribution)  # dtype: of the weights
        self.activation_checkpointing = activation_checkpointing
        self.split = split = Partition.of(config, tp.size)
        self.parts = Parts(split.rules, tp.rank, sharding.dp if sharding else None)
        self.vocab_lo, self.vocab_hi = split.vocabulary(tp.rank)
        self.sequence_parallel = sequence_parallel and tp.size > 1
        with torch.device("meta"):
            self.transformer = Transformer(config, split, tp).to(dtype)
            if not config.tie_word_embeddings:
                self.lm_head = embedding(config, split, tp).to(dtype)
        for path in {name.rpartition(".")[0] for name in self.split.table}:
            path = re.sub(r"(\.h\.\d+).*", r"\1", path)  # of the whole block
            if not self.stages.holds(f"{path}.weight"):
                parent, _, name = path.rpartition(".")
                setattr(self.get_submodule(parent), name, None)
        self.set_schedule(schedule or Schedule.plain(config.n_layer))
        if self.sequence_parallel and not self.schedule.is_plain:
            both = f"--sequence_parallel=True together with --sync={schedule}"
            raise UserError(f"{both}: use one of them.")
        if sharding and self.schedule.delay:
            raise UserError(f"--dp_shard=True together with --sync={schedule}: use one of them.")
        if sharding:
            sharding.apply(self, self.transformer.h)
        # this rank's part: nothing is ever there in full. empty_like imports sympy, for 0.3 s
        self._apply(lambda p: torch.empty_like(p, device=device) if sharding
                    else torch.empty(p.shape, dtype=p.dtype, device=device))
        self.load(read or partial(self._drawn, seed))

    def _drawn(self, seed: int, name: str, rule: Rule) -> Tensor:
        """Every rank draws each full tensor from the same stream and keeps its part."""
        full = initial_tensor(name, self.split.table[name][0], self.config.n_layer, seed)
        return take(full, rule, self.tp.rank)

    def load(self, read: Read) -> None:
        """Fill every parameter from `read`."""
        for name, parameter in self.named_parameters():
            self.parts.store(name, parameter, read(name, self.split.rules[name]))

    def set_schedule(self, schedule: Schedule) -> None:
        """Other sync points from the next pass on, the same on all ranks, in uncompiled blocks."""
        self.schedule = schedule if self.tp.size > 1 else Schedule.plain(self.config.n_layer)
        for layer, block in enumerate(self.blocks):
            if block is not None:
                block.syncs = self.schedule.syncs[2 * layer : 2 * layer + 2]

    def compile_blocks(self, tuned: bool = False) -> None:
        """torch.compile each block in place; all blocks share one graph. tuned: take longer, for
        kernels that read one row's weights faster."""
        self.compiled = True
        torch._dynamo.config.optimize_ddp = False  # it cuts blocks where DDP's buckets end
        options: Any = {"coordinate_descent_tuning": tuned}
        self.contribution = torch.compile(contribution, options=options)
        for block in filter(None, self.blocks if not self.schedule.delay else ()):
            block.compile(options=options)

    @property
    def head(self) -> VocabParallelEmbedding:
        """Whose rows the logits are products with: the embedding table, if it is tied."""
        return self.transformer.wte if self.config.tie_word_embeddings else self.lm_head

    @property
    def blocks(self) -> Any:
        return self.transformer.h

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def region(self, T: int) -> Region:
        """How a pass over T tokens holds the residual stream."""
        return SplitTokens(T) if self.sequence_parallel and self.tp.size <= T else WHOLE

    def embed(self, idx: Tensor, cache: KVCache | None = None) -> Stream:
        """The stream of tokens idx [B, T] before the first layer."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}")
        positions = cache.begin(T) if cache else torch.arange(T, device=idx.device).unsqueeze(0)
        self.tp.ledger.forward_passes += 1
        if (region := self.region(T)) is not WHOLE:
            lo, hi = spans(T, self.tp.size)[self.tp.rank]
            positions = positions[:, lo:hi]
        x = self.transformer.wte(idx, region) + self.transformer.wpe(positions)
        dropout = self.config.dropout if self.training else 0.0
        return Stream(region.dropout(x, dropout, self.tp), region)

    def _final(self, idx: Tensor, cache: KVCache | None) -> Stream:
        """The stream after the last layer and its LayerNorm."""
        s = self.embed(idx, cache)
        if self.schedule.delay:
            return Stream(self.transformer.ln_f(self._fly(s.x, cache)))
        s = self.layers(s, (0, self.config.n_layer), cache)
        return Stream(self.transformer.ln_f(s.x), s.region)

    def layers(self, s: Stream, span: Span, cache: KVCache | None = None) -> Stream:
        """The stream after the layers [lo, hi)."""
        for i, block in list(enumerate(self.blocks))[slice(*span)]:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # forward calls of the second pass are accounted to the backward pass
                contexts = lambda: (nullcontext(), self.tp.ledger.recomputing())  # noqa: E731
                s = checkpoint(block, s, use_reentrant=False, context_fn=contexts)
            else:
                s = block(s, cache.past(i) if cache else None)
        return s

    def _fly(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """The stream after the last layer under a delay. x: of the embeddings."""
        run: Any = self.contribution
        if self.activation_checkpointing and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        s = Stream(x, flight=(flight := Flight(x, self.schedule, run)))
        for i, block in enumerate(self.blocks):
            block(s, cache.past(i) if cache else None)
        return flight.land()

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The final hidden state [B, T, C], equal on all ranks, of tokens idx [B, T]; with a cache,
        idx follows it."""
        s = self._final(idx, cache)
        if s.region is WHOLE:
            return s.x
        # f of `local_logits` sums the gradient, and so does this one
        return divide_gradient(f(s.x, self.tp.at("head"), s.region), self.tp)

    def through(self, s: Stream, run: Iterable[SubBlock]) -> Stream:
        """The stream after these sub-blocks."""
        for layer, kind in run:
            block = self.blocks[layer]
            s = block.after_attention(s) if kind == "attention" else block.after_mlp(s)
        return s

    def local_logits(self, x: Tensor) -> Tensor:
        """Hidden states x [..., C] -> this rank's columns of the logits, [..., hi - lo]."""
        return self.head.logits(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor | None, Tensor | None]:
        """idx [B, T] -> (logits, loss), as in model.py. But with targets there are no logits: they
        are never gathered, and not even a rank's own exist all at once."""
        if targets is None:
            return self.gather_logits(self.local_logits(self.hidden(idx, cache)[:, -1:])), None
        return None, self.loss(self._final(idx, None), targets)

    def loss(self, s: Stream, targets: Tensor) -> Tensor:
        """The mean loss of targets [B, T], from the stream after ln_f."""
        if self.sequence_parallel and s.region is WHOLE and torch.is_grad_enabled():
            which = f"{targets.shape[1]} tokens cannot be split over {self.tp.size} ranks"
            raise ValueError(f"{which} to learn from them")
        mine = self.head.weight, targets, self.vocab_lo, self.vocab_hi
        how = self.tp, s.region, self.compiled, self.stages.kind.splits
        return vocab_parallel_head_loss(s.x, *mine, *how) / (targets >= 0).sum()

    def gather_logits(self, local: Tensor) -> Tensor:
        """Every rank's columns [..., hi - lo] -> all columns [..., V], on every rank."""
        ends = [hi - lo for lo, hi in map(self.split.vocabulary, range(self.tp.size))]
        padded = F.pad(local, (0, max(ends) - local.shape[-1]))
        parts = zip(all_gather(padded, self.tp.at("head"), "forward"), ends, strict=True)
        return torch.cat([part[..., :width] for part, width in parts], dim=-1)

    def new_cache(self, batch: int, size: int | None = None) -> KVCache:
        """A KV cache for this rank's heads and rows of `size` tokens (block_size unless given)."""
        (lo, hi), c = self.split.heads(self.tp.rank), self.config
        shape = batch, 2 * (hi - lo), size or c.block_size, self.split.head_dim
        return KVCache.like(self.transformer.wpe.weight, c.n_layer, *shape)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Of the full model, as in model.py."""
        wpe = self.config.block_size * self.config.n_embd
        return self.split.count() - (wpe if non_embedding else 0)

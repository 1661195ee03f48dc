"""TensorParallelGPT: model.py with attention, MLP, embedding, head and loss split over the ranks of one axis.

The classes stand in the same order and their parameters have the same names as in model.py: the difference between the
two files is the lesson. Every rank runs the same code on the same tokens; what differs is which heads, columns and
vocabulary rows it holds. A layer's forward pass says two things to the other ranks: one all-reduce after the attention
heads, one after the MLP's columns.

Shapes: B batch, T tokens, C = n_embd, h = this rank's heads, D = head width, m = this rank's MLP columns.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import GPTConfig, KVCache, LayerNorm, adamw, attend, gelu, initial_tensor
from parallel.collectives import Axis, all_gather, all_reduce
from parallel.graphs import outside_graphs
from parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from parallel.loss import vocab_parallel_head_loss
from parallel.partition import VOCAB_MULTIPLE, Partition, Rule

Read = Callable[[str, Rule], Tensor]  # the entries of one tensor that this rank owns, without padding


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int):
        super().__init__()
        lo, hi = split.heads(tp.rank)
        self.local_n_head, self.head_dim = hi - lo, split.head_dim
        width = self.local_n_head * self.head_dim
        here = tp.at("attention", layer)
        self.c_attn = ColumnParallelLinear(config.n_embd, 3 * width, config.bias, here)
        self.c_proj = RowParallelLinear(config.n_embd, width, config.n_embd, config.bias, here)
        self.tp, self.dropout = here, config.dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, _ = x.shape
        h = self.local_n_head
        q, k, v = self.c_attn(x).view(B, T, 3 * h, self.head_dim).transpose(1, 2).split(h, dim=1)  # [B, h, T, D]
        if cache is not None:
            k, v = remember(cache, k, v)
        if self.training and self.dropout > 0:
            y = attend_with_own_dropout(q, k, v, cache, self.dropout, self.tp)
        else:
            y = attend(q, k, v, cache, 0.0)  # [B, T, h * D]
        y = self.c_proj(y)  # all-reduce
        return F.dropout(y, self.dropout, self.training)


@outside_graphs  # its sizes change with every token: traced, it would be compiled again and again
def remember(cache: KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return cache.update(k, v)


@outside_graphs
def attend_with_own_dropout(q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, dropout: float, tp: Axis) -> Tensor:
    """Attention whose dropout mask is this rank's own: its heads are not the other ranks' heads.

    Replicated activations are dropped by torch's default stream, which all ranks of a tp group seed alike. A seed drawn
    from that stream (so that activation checkpointing repeats it), moved by the rank, starts the sharded one.
    """
    seed = int(torch.randint(2**62, ()).item()) + tp.rank
    devices = [q.device] if q.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return attend(q, k, v, cache, dropout)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int):
        super().__init__()
        lo, hi = split.columns(tp.rank)
        here = tp.at("mlp", layer)
        self.c_fc = ColumnParallelLinear(config.n_embd, hi - lo, config.bias, here)
        self.c_proj = RowParallelLinear(split.n_hidden, hi - lo, config.n_embd, config.bias, here)
        self.activation, self.dropout = config.activation, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(gelu(self.c_fc(x), self.activation))  # [B, T, m] -> all-reduce -> [B, T, C]
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, split, tp, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config, split, tp, layer)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig, split: Partition, tp: Axis):
        super().__init__()
        lo, hi = split.vocabulary(tp.rank)
        here = tp.at("embedding")
        self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd, lo, hi, split.local_vocab, here)
        # from_pretrained, because nn.Embedding would draw numbers that are then thrown away
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), freeze=False)
        self.h = nn.ModuleList(Block(config, split, tp, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias)


class TensorParallelGPT(nn.Module):
    """One rank's part of a GPT.

    tp: the axis it is split over. read: called once a parameter with its name and rule, returns this rank's entries of
    it; without one the parameters are drawn from `seed`, as model.py draws them. Memory is taken once, for local shapes.
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
        vocab_multiple: int = VOCAB_MULTIPLE,
    ):
        super().__init__()
        self.config, self.tp, self.activation_checkpointing = config, tp, activation_checkpointing
        self.compiled = False
        self.split = split = Partition.of(config, tp.size, vocab_multiple)
        self.vocab_lo, self.vocab_hi = split.vocabulary(tp.rank)
        with torch.device(device), default_dtype(dtype):
            self.transformer = Transformer(config, split, tp)
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
        rules = self.split.rules()
        for name, parameter in self.named_parameters():
            given = read(name, rules[name])
            parameter.zero_()  # padding rows, where there are any, stay zero
            owned = self.owned(name, parameter)
            if owned.shape != given.shape:
                raise ValueError(f"{name}: rank {self.tp.rank} holds {list(owned.shape)}, was given {list(given.shape)}")
            owned.copy_(given)

    def owned(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a local tensor (a parameter, or optimizer state of its shape) that is not padding."""
        rule = self.split.rules()[name]
        return tensor if rule.rows is None else tensor[: rule.owned(self.tp.rank)]

    @property
    def device(self) -> torch.device:
        return self.transformer.wpe.weight.device

    def compile_blocks(self) -> None:
        """torch.compile each block in place. The graph breaks at the collectives: what is between two is one graph."""
        self.compiled = True
        outside_graphs.take_effect()
        for block in self.transformer.h:
            block.compile()

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The final hidden state [B, T, C], equal on all ranks, of tokens idx [B, T]; with a cache, idx follows it."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}")
        positions = torch.arange(T, device=idx.device).unsqueeze(0) if cache is None else cache.begin(T)
        self.tp.ledger.forward_passes += 1
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # all-reduce
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, context_fn=self._repeat)
            else:
                x = block(x, cache)
        return self.transformer.ln_f(x)

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
        x, table = self.hidden(idx).flatten(0, 1), self.transformer.wte.weight
        loss = vocab_parallel_head_loss(x, table, targets.flatten(), self.vocab_lo, self.vocab_hi, self.tp)
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

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of the full model's gradient, float32, equal on all ranks: one all-reduce.

        A sharded parameter's squares add up over the ranks; a replicated one's gradient is the same on every rank and
        counts once. Padding rows have no gradient.
        """
        rules = self.split.rules()
        shared: list[Tensor] = []
        own: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                (shared if rules[name].dim is None else own).append(torch.linalg.vector_norm(parameter.grad.float()))
        squares = [torch.stack(norms).square().sum() if norms else torch.zeros(()) for norms in (shared, own)]
        everywhere = all_reduce(squares[1].to(squares[0].device), self.tp.at("optimizer"), "step")
        return (squares[0] + everywhere).sqrt()


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

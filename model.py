"""The reference: a GPT-2 on one device, in nanoGPT's names. It knows nothing of processes. Read
this file first.

Shapes: B batch, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model. `activation` and all below it are not nanoGPT's. OpenAI's weights were
    trained with the tanh approximation of GELU (gelu_tanh), nanoGPT trains with the exact one
    (gelu). VARIANTS are fields of Hugging Face's config.json; n_inner 0 stands for 4 C."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu"
    n_inner: int = 0
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    @property
    def n_hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.n_inner or 4 * self.n_embd

    def as_json(self) -> dict[str, Any]:
        """Every field, of VARIANTS those that are not GPT-2's own."""
        plain = {name: getattr(GPTConfig, name) for name in VARIANTS}
        return {name: value for name, value in vars(self).items() if plain.get(name) != value}

    def attention_factor(self, layer: int) -> float:
        """What a layer multiplies q k / sqrt(D) by before the softmax."""
        factor = 1 / (layer + 1) if self.scale_attn_by_inverse_layer_idx else 1.0
        return factor if self.scale_attn_weights else factor * (self.n_embd // self.n_head) ** 0.5


VARIANTS = ("n_inner", "layer_norm_epsilon", "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
    "silu": F.silu}  # fmt: skip


def initial_tensor(name: str, shape: tuple[int, ...], n_layer: int, seed: int) -> Tensor:
    """The first value of one full parameter, float32, as GPT-2 draws it: N(0, 0.02), the two
    projections into the residual stream N(0, 0.02 / sqrt(2 n_layer)), biases 0, LayerNorm gains 1.
    Each tensor has a random stream of its own, seeded by `seed` and its name: a rank can draw one
    and keep its part, which is the same in every split of the model."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if ".ln_" in name:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
    return torch.empty(shape).normal_(0.0, std, generator=stream)


class Past(NamedTuple):
    """A layer's part of a KVCache in one forward pass. kv: [B, 2 H, size, D], the heads' keys, then
    their values. rows [B, 1], positions [B, T]: where the T new tokens of each row belong; rows is
    None if all are equally long and take [start, stop). mask, causal: what a new token attends to
    of the first `stop` tokens."""

    kv: Tensor
    rows: Tensor | None
    positions: Tensor | None
    start: int
    stop: int
    mask: Tensor | None
    causal: bool

    def update(self, kv: Tensor) -> tuple[Tensor, ...]:
        """Store new keys and values [B, 2 H, T, D]; returns all so far, [B, H, stop, D] each."""
        if self.rows is None:
            self.kv[:, :, self.start : self.stop] = kv
        else:
            self.kv[self.rows, :, self.positions] = kv.transpose(1, 2).to(self.kv.dtype)
        return self.kv[:, :, : self.stop].chunk(2, dim=1)


class KVCache:
    """Keys and values of the tokens read so far. kv: for each layer as in Past; a shard keeps its
    own heads only. lengths: of each row, in tokens. `begin` prepares a forward pass, in which layer
    i gets `past(i)`; `advance` ends it."""

    def __init__(self, kv: list[Tensor], lengths: list[int]):
        self.kv, self.lengths, self.size = kv, lengths, kv[0].shape[2]

    @classmethod
    def like(cls, x: Tensor, n_layer: int, *shape: int) -> "KVCache":
        """An empty one of this shape, [B, 2 H, size, D], with x's dtype and device."""
        return cls([x.new_zeros(shape) for _ in range(n_layer)], [0] * shape[0])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.kv)

    def check(self, n: int, T: int) -> None:
        """ValueError if T tokens after n others have no room."""
        if n + T > self.size:
            raise ValueError(f"{n} tokens are in the cache, {T} more do not fit its {self.size}")

    def begin(self, T: int) -> Tensor:
        """Prepare for T more tokens in every row. Returns their positions, [1 or B, T] int64."""
        self.check(max(self.lengths), T)
        device, start, stop = self.kv[0].device, min(self.lengths), max(self.lengths) + T
        rows = mask = None
        if start + T == stop:
            positions = torch.arange(start, stop, device=device).unsqueeze(0)
        else:
            rows = torch.arange(len(self.lengths), device=device).unsqueeze(1)
            starts = torch.tensor(self.lengths, device=device).unsqueeze(1)
            positions = starts + torch.arange(T, device=device)
        # No mask for one token that follows equally long rows, which sees everything, nor for a
        # first pass, which is plain causal attention; else [1 or B, 1, T, stop].
        causal = stop == T and T > 1
        if not causal and (rows is not None or T > 1):
            mask = (torch.arange(stop, device=device) <= positions.unsqueeze(-1)).unsqueeze(1)
        self._pass = rows, positions, start, stop, mask, causal
        return positions

    def past(self, layer: int) -> Past:
        return Past(self.kv[layer], *self._pass)

    def advance(self, lengths: list[int]) -> None:
        """The rows now have this many tokens. Padding beyond them is overwritten later."""
        self.lengths = list(lengths)

    def part(self, lo: int, hi: int) -> "KVCache":
        """The rows [lo, hi), in the same memory."""
        return KVCache([layer[lo:hi] for layer in self.kv], self.lengths[lo:hi])

    def copy(self, row: int, source: int, tokens: int) -> None:
        """Copy the first tokens of one row to another."""
        for layer in self.kv:
            layer[row, :, :tokens] = layer[source, :, :tokens]


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension whose bias is optional."""

    def __init__(self, n_embd: int, bias: bool, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


def attend(q: Tensor, k: Tensor, v: Tensor, past: Past | None, dropout: float) -> Tensor:
    """Causal attention: q [B, H, T, D], k and v [B, H, S, D] -> [B, T, H * D]. With earlier tokens
    in a cache S > T."""
    mask, causal = (None, True) if past is None else (past.mask, past.causal)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.factor = config.attention_factor(layer)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        B, T, C = x.shape
        H = self.n_head
        qkv = self.c_attn(x).view(B, T, 3 * H, C // H).transpose(1, 2)
        q, kv = qkv.split([H, 2 * H], dim=1)
        q = q if self.factor == 1 else q * self.factor
        k, v = kv.chunk(2, dim=1) if past is None else past.update(kv)
        y = self.c_proj(attend(q, k, v, past, self.dropout if self.training else 0.0))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(self.activation(self.c_fc(x)))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        norm = config.n_embd, config.bias, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(*norm)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(*norm)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Everything but the head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias, config.layer_norm_epsilon)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, seed: int = 1337):
        super().__init__()
        if config.n_embd % config.n_head:
            heads = f"n_head={config.n_head} heads"
            raise ValueError(f"n_embd={config.n_embd} does not divide into {heads}")
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:  # one table, two uses
            self.transformer.wte.weight = self.lm_head.weight
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_tensor(name, tuple(parameter.shape), config.n_layer, seed))

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The final hidden state [B, T, C] of tokens idx [B, T]; with a cache, idx follows it."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}")
        positions = cache.begin(T) if cache else torch.arange(T, device=idx.device).unsqueeze(0)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache.past(i) if cache else None)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """idx [B, T] -> (logits, loss). With targets [B, T] (-1: ignored) all logits [B, T, V] and
        the mean loss; without them the last position's logits [B, 1, V] and None."""
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def get_num_params(self, non_embedding: bool = True) -> int:
        """As nanoGPT counts: the tied table once, the position table not (GPT-2 124M: 123.69M)."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - (self.transformer.wpe.weight.numel() if non_embedding else 0)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, use_cache: bool = True,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continue idx [B, T] by max_new_tokens; temperature 0 takes the most likely token. The
        last block_size tokens are the context. Positions are absolute: once the window slides,
        every token has a new one, and costs a whole forward pass without the cache."""
        size, cache = self.config.block_size, None
        if use_cache and idx.shape[1] <= size:
            c = self.config
            shape = len(idx), 2 * c.n_head, size, c.n_embd // c.n_head
            cache = KVCache.like(self.transformer.wte.weight, c.n_layer, *shape)
        for _ in range(max_new_tokens):
            if cache is not None and idx.shape[1] <= size:
                logits, _ = self(idx[:, cache.lengths[0] :], cache=cache)
                cache.advance([idx.shape[1]] * len(idx))
            else:
                logits, _ = self(idx[:, -size:])
            idx = torch.cat([idx, choose(logits[:, -1], temperature, top_k, generator)], dim=1)
        return idx


def adamw(named_parameters: Iterator[tuple[str, nn.Parameter]], weight_decay: float,
          learning_rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with nanoGPT's two groups: matrices decay, vectors (biases, LayerNorms) do not. A part
    of a tensor has as many dimensions, and so is in the same group."""
    parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def choose(logits: Tensor, temperature: float, top_k: int | None,
           generator: torch.Generator | None) -> Tensor:
    """One token a row [B, 1] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)

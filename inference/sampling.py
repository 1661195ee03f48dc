"""The next token: each rank's candidates, and the choice among them.

A token is drawn by a race (Gumbel-max): the largest sum of scaled logit and noise wins. The noise
depends on seed, sample, position and token alone. So a draw does not depend on the rows beside it,
and two models that draw at one position draw the same token with probability (1 - d) / (1 + d) or
more, where d is the total variation distance of their distributions (Daliri, Musco, Suresh, arXiv
2408.07978). Drafts rely on that (speculation.py).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a row ends. n_tokens: ids the tokenizer knows; no others are
    chosen. temperature 0 is greedy, top_k 0 keeps all tokens, top_p the likeliest that together
    reach that probability. overflow, at block_size tokens: slide (the last block_size count), stop
    (the row ends), error. batch_size: rows written at a time; it bounds the memory alone."""

    n_tokens: int
    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    max_new_tokens: int = 200
    num_samples: int = 1
    seed: int = 1337
    overflow: str = "slide"
    kv_cache: bool = True
    batch_size: int = 32


@dataclass
class Row:
    """One sequence: the numbers of the row, of its prompt and of the sample, and all its tokens."""

    number: int
    prompt: int
    sample: int
    tokens: list[int]
    prompt_tokens: int
    ended: bool = False

    @property
    def new(self) -> int:
        return len(self.tokens) - self.prompt_tokens


def candidates(logits: Tensor, lo: int, vocab_size: int, sampling: Sampling, tp: int) -> Tensor:
    """This rank's best tokens, [2, rows, k] int32: the bits of their float32 logits, and their ids.
    logits: [rows, v], of the ids from `lo` on. k is the same on all ranks, whose candidates include
    the k best tokens of the whole vocabulary. Ranks with fewer known ids fill up with -inf."""
    width = -(-vocab_size // tp)
    k = 1 if sampling.temperature == 0 else min(sampling.top_k or width, width)
    known = logits[:, : max(0, sampling.n_tokens - lo)].float()
    if known.shape[1] < k:
        known = F.pad(known, (0, k - known.shape[1]), value=float("-inf"))
    take_all = known.shape[1] == k
    ids = torch.arange(k, device=known.device).expand_as(known) if take_all else likeliest(known, k)
    return torch.stack([known.gather(1, ids).view(torch.int32), (ids + lo).int()])


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Ids [rows, k] of the k largest of float32 logits [rows, n]; of equal logits the lower ids."""
    if k == 1 and logits.is_cuda:
        return logits.argmax(dim=-1, keepdim=True)  # takes the first of equal logits
    if k == 1:  # so does numpy's, in a third of the time
        return torch.from_numpy(logits.numpy().argmax(axis=1, keepdims=True))
    return ranked(logits, torch.arange(logits.shape[1], device=logits.device), k)


def ranked(logits: Tensor, ids: Tensor, k: int) -> Tensor:
    """The places [rows, k] of the k largest logits, largest first; of equal ones those of the lower
    ids [rows, n] or [n]. torch.topk takes any of several equal logits, and half precision makes
    many: the choice would depend on the split of the vocabulary. So it gets integers that are all
    different: the float's bits, rearranged to order as floats do, above the id."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((ordered.long() << 32) - ids).topk(k, dim=-1).indices


def noise_start(seed: int, sample: int, position: int) -> NDArray[np.uint64]:
    """The number [1] from which a position's noise is computed."""
    stream = np.random.Philox(key=[seed, 0x5A3], counter=[0, position, sample, 0])
    return stream.random_raw(1)


def noise(seed: int, sample: int, position: int, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Standard Gumbel noise [n] of the tokens `ids`; a token's does not depend on the other ids:
    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) indexed by token, from Philox's number on."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x += noise_start(seed, sample, position)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    u = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # neither 0 nor 1
    gumbel: NDArray[np.float64] = -np.log(-np.log(u))
    return gumbel


def choose(values: NDArray[np.float32], ids: NDArray[np.int32], sampling: Sampling, sample: int,
           position: int) -> int:
    """The token at one position of a sample, from logits `values` [n] of the tokens `ids` [n], in
    float64. Equal logits are ranked by id, so the order of the candidates is irrelevant."""
    order = np.lexsort((ids, -values))  # likeliest first
    if sampling.temperature == 0:
        return int(ids[order[0]])
    if sampling.top_k:
        order = order[: sampling.top_k]
    z = values[order].astype(np.float64)
    z = (z - z[0]) / sampling.temperature
    if sampling.top_p < 1.0:
        p = np.exp(z)
        keep = int(np.searchsorted(np.cumsum(p / p.sum()), sampling.top_p)) + 1
        order, z = order[:keep], z[:keep]
    return int(ids[order[np.argmax(z + noise(sampling.seed, sample, position, ids[order]))]])

"""Which token comes next: every rank's best candidates, and the choice among them.

A token is drawn by a race (Gumbel-max): its scaled logit plus noise that seed, sample, position and token alone decide, and
the largest wins. So the draw does not depend on which rows are written together, on the order in which candidates come, or on
who else asks: two models that draw at the same place mostly draw alike, at least as often as (1 - d) / (1 + d) where d is the
total variation distance of their distributions (Daliri, Musco, Suresh, arXiv 2408.07978). That is what a draft lives on.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a row ends. n_tokens: ids the tokenizer knows; what lies beyond is never chosen.

    temperature 0 is greedy. top_k 0 keeps all. top_p keeps the likeliest tokens that together reach that probability.
    overflow, at block_size tokens: slide (the last block_size count), stop (the row ends), error.
    batch_size: rows written at a time, which bounds the memory; the tokens do not depend on it.
    """

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


def candidates(logits: Tensor, lo: int, vocab_size: int, sampling: Sampling, tp: int) -> Tensor:
    """This rank's contenders, [2, rows, k] int32 where the logits are: the bits of their float32 logits, and their ids.
    k is alike on all ranks.

    Among the global best k every one is among the best k of its rank. Where fewer are left (a rank may hold nothing but
    ids the tokenizer does not know) the rest is -inf.
    """
    width = -(-vocab_size // tp)
    k = 1 if sampling.temperature == 0 else min(sampling.top_k or width, width)
    known = logits[:, : max(0, sampling.n_tokens - lo)].float()
    if known.shape[1] < k:
        known = F.pad(known, (0, k - known.shape[1]), value=float("-inf"))
    every = known.shape[1] == k  # then there is no need to rank them
    ids = torch.arange(k, device=known.device).expand_as(known) if every else likeliest(known, k)
    return torch.stack([known.gather(1, ids).view(torch.int32), (ids + lo).int()])


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Ids [rows, k] of the k largest of float32 logits [rows, n]; among equal ones the lower ids.

    torch.topk takes any of several equal logits, of which half precision makes many: which one would depend on how the
    vocabulary is split. So it gets whole numbers that are never equal: the float's bits, arranged to order as floats do,
    above the id.
    """
    if k == 1 and logits.is_cuda:
        return logits.argmax(dim=-1, keepdim=True)  # the first of equal ones
    if k == 1:
        return torch.from_numpy(logits.numpy().argmax(axis=1, keepdims=True))  # so is this, in a third of the time
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: there is one zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) - torch.arange(logits.shape[1], device=logits.device)
    return keys.topk(k, dim=-1).indices


def noise(seed: int, sample: int, position: int, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Standard Gumbel noise, [n], of the tokens `ids` at one position of one sample: for each the same whatever the others are.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) counts through the tokens, from where Philox is at that position.
    """
    start = np.random.Philox(key=[seed, 0x5A3], counter=[0, position, sample, 0]).random_raw(1)
    x = start + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    u = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # neither 0 nor 1
    gumbel: NDArray[np.float64] = -np.log(-np.log(u))
    return gumbel


def choose(values: NDArray[np.float32], ids: NDArray[np.int32], sampling: Sampling, sample: int, position: int) -> int:
    """The token at that position of that sample, from logits `values` of tokens `ids`, both [n], in float64.

    Ties are ranked by id, so the order in which ranks brought them is no matter.
    """
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

"""Which heads live with which neurons: a permutation of the weights under which ranks miss less of each other.

Between the attention and the MLP of a layer that do not synchronise, a rank's neurons see its own heads only. What neuron j
misses, to first order, is sum over the other ranks' heads h of c_jh = w_j . J P_h, P_h being the head's output, J LayerNorm's
derivative and w_j the neuron's input weights; it does damage as far as GELU's slope and the neuron's output weights let it
through. With G_j[h, k] = E[(slope |v_j|)^2 c_jh c_jk] the damage of neuron j on a rank with heads S is the sum of G_j over all
h, k outside S. Every partition of the heads into the ranks' shares is tried (many, at random, where there are too many), each
with the neurons dealt so that the damage is small. The dense model computes the same as before: sums in another order.
(After Sync-Point Drop, arXiv 2502.20727, which scatters heads by their attention maps, and 2609.13846, which deals neurons by
first-order damage.)
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.manifest import Sync
from checkpoints.sources import Source
from model import GPT, attend, gelu
from plan.partition import Partition, Run

MOST_PARTITIONS = 20_000  # of the heads, tried out
TOKENS = 256  # whose damages are computed at a time

Groups = dict[int, tuple[list[int], list[int]]]  # layer -> new order of (heads, neurons): a rank's share comes in one run


class Regrouped:
    """A source whose heads and neurons stand in another order. It reads whole tensors, and permutes them."""

    def __init__(self, source: Source, groups: Groups):
        self.source, self.groups = source, groups
        self.config, self.dtype, self.tokenizer, self.dataset = source.config, source.dtype, source.tokenizer, source.dataset
        self.description = f"{source.description}, heads and neurons grouped"
        self.sync: Sync | None = None

    def read(self, name: str, dim: int | None, runs: Iterable[Run]) -> Tensor:
        full = self.source.read(name, None, ())
        parts = name.split(".")
        if parts[1] == "h" and int(parts[2]) in self.groups:
            full = permuted(full, ".".join(parts[3:]), *self.groups[int(parts[2])], self.config.n_embd // self.config.n_head)
        if dim is None:
            return full
        return torch.cat([full.narrow(dim, lo, hi - lo) for lo, hi in runs], dim=dim)


def permuted(full: Tensor, name: str, heads: list[int], neurons: list[int], head_dim: int) -> Tensor:
    """A layer's tensor with its heads and neurons in a new order. name: within the layer, such as attn.c_attn.weight."""
    channels = torch.tensor([head_dim * head + i for head in heads for i in range(head_dim)])
    if name.startswith("attn.c_attn."):  # q, k and v, each by heads
        return torch.cat([part[channels] for part in full.chunk(3)])
    if name == "attn.c_proj.weight":
        return full[:, channels]
    if name.startswith("mlp.c_fc."):
        return full[torch.tensor(neurons)]
    return full[:, torch.tensor(neurons)] if name == "mlp.c_proj.weight" else full


@torch.no_grad()
def damages(model: GPT, idx: Tensor) -> Iterator[Tensor]:
    """For each layer G [n_hidden, n_head, n_head] in float64, over the tokens idx [B, T] of a calibration text."""
    blocks: Any = model.transformer.h
    H = model.config.n_head
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(idx.shape[1]))
    for block in blocks:
        q, k, v = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3 * H, -1)).transpose(1, 2).split(H, dim=1)
        y = attend(q, k, v, None, 0.0).unflatten(-1, (H, -1))  # [B, T, H, D]
        weight = block.attn.c_proj.weight.unflatten(-1, (H, -1))  # [C, H, D]
        outputs = torch.einsum("bthd,chd->bthc", y, weight).flatten(0, 1)  # P_h of every token, [B T, H, C]
        x = x + block.attn(block.ln_1(x))
        yield _damage(block, x.flatten(0, 1), outputs)
        x = x + block.mlp(block.ln_2(x))


def _damage(block: Any, x: Tensor, outputs: Tensor) -> Tensor:
    """G of one layer. x [n, C]: what enters its MLP part; outputs [n, H, C]: the heads' addends of it."""
    made = torch.zeros(block.mlp.c_fc.weight.shape[0], outputs.shape[1], outputs.shape[1], dtype=torch.float64)
    strength = block.mlp.c_proj.weight.norm(dim=0)  # |v_j|
    for h, p in zip(x.split(TOKENS), outputs.split(TOKENS), strict=True):
        z = block.mlp.c_fc(block.ln_2(h))
        sigma = (h.var(dim=-1, unbiased=False) + 1e-5).sqrt()
        unit = ((h - h.mean(dim=-1, keepdim=True)) / sigma.unsqueeze(-1)).unsqueeze(1)  # what LayerNorm gives, [n, 1, C]
        moved = p - p.mean(dim=-1, keepdim=True) - unit * (unit * p).mean(dim=-1, keepdim=True)
        seen = block.ln_2.weight * moved / sigma[:, None, None]  # [n, H, C]
        c = F.linear(seen, block.mlp.c_fc.weight) * (_slope(z, block.mlp.activation) * strength).unsqueeze(1)  # [n, H, m]
        made += torch.einsum("nhm,nkm->mhk", c, c).double()
    return made / len(x)


def _slope(z: Tensor, activation: str) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(gelu(z, activation).sum(), z)
    return slope


def group(G: Tensor, split: Partition) -> tuple[list[int], list[int], float, float]:
    """The order of heads and of neurons that does the least damage, that damage, and the one of the order as it is."""
    sizes = [hi - lo for lo, hi in map(split.heads, range(split.tp))]
    columns = [hi - lo for lo, hi in map(split.columns, range(split.tp))]
    best: tuple[float, list[int], list[int]] | None = None
    for shares in partitions(split.n_head, sizes):
        cost = torch.stack([_missed(G, share) for share in shares])  # [tp, neurons]
        neurons, damage = deal(cost, columns)
        if best is None or damage < best[0]:
            best = damage, [head for share in shares for head in share], neurons
    assert best is not None
    as_it_is = torch.stack([_missed(G, range(*split.heads(rank))) for rank in range(split.tp)])
    owners = torch.repeat_interleave(torch.arange(split.tp), torch.tensor(columns))
    return best[1], best[2], best[0], float(as_it_is.gather(0, owners.unsqueeze(0)).sum())


def _missed(G: Tensor, share: Iterable[int]) -> Tensor:
    """The damage [neurons] where a rank has the heads of `share`."""
    others = torch.tensor(sorted(set(range(G.shape[1])) - set(share)), dtype=torch.int64)
    return G[:, others][:, :, others].sum(dim=(1, 2))


def partitions(n: int, sizes: list[int]) -> Iterator[list[tuple[int, ...]]]:
    """Ways to deal n heads to ranks with shares of these sizes; ranks of equal share are not told apart. MOST_PARTITIONS at
    random, always the same ones, where there are more."""
    count = math.factorial(n)
    for size in sizes:
        count //= math.factorial(size)
    if count > MOST_PARTITIONS:
        stream = torch.Generator().manual_seed(0)
        for i in range(MOST_PARTITIONS):
            order = list(range(n)) if i == 0 else torch.randperm(n, generator=stream).tolist()
            yield [tuple(sorted(order[sum(sizes[:r]) : sum(sizes[: r + 1])])) for r in range(len(sizes))]
        return

    def rest(left: frozenset[int], r: int, before: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
        if r == len(sizes):
            yield []
            return
        for share in itertools.combinations(sorted(left), sizes[r]):
            if r and sizes[r] == sizes[r - 1] and share < before:
                continue  # the same shares, named differently
            for others in rest(left - set(share), r + 1, share):
                yield [share, *others]

    yield from rest(frozenset(range(n)), 0, ())


def deal(cost: Tensor, columns: list[int]) -> tuple[list[int], float]:
    """Neurons in the order of the ranks they go to, columns[r] to rank r, and the sum of their costs. cost: [tp, neurons].

    Neurons choose in turn, those first that have most to lose; then pairs change places for as long as that helps. For two
    ranks the first is already the best there is.
    """
    tp, n = cost.shape
    if tp == 2:
        order = (cost[0] - cost[1]).argsort(stable=True)
        owner = torch.ones(n, dtype=torch.int64)
        owner[order[: columns[0]]] = 0
    else:
        room, owner = list(columns), torch.zeros(n, dtype=torch.int64)
        two = cost.topk(2, dim=0, largest=False).values
        for j in (two[0] - two[1]).argsort(stable=True).tolist():
            rank = min((r for r in range(tp) if room[r]), key=lambda r: float(cost[r, j]))
            owner[j], room[rank] = rank, room[rank] - 1
        while _swap(cost, owner):
            pass
    total = float(cost.gather(0, owner.unsqueeze(0)).sum())
    return owner.argsort(stable=True).tolist(), total


def _swap(cost: Tensor, owner: Tensor) -> bool:
    """Exchange the one pair of neurons of two ranks that gains most, for every pair of ranks; whether any did."""
    better = False
    for a, b in itertools.combinations(range(len(cost)), 2):
        mine, theirs = (owner == a).nonzero().squeeze(1), (owner == b).nonzero().squeeze(1)
        gain_a, gain_b = (cost[a] - cost[b])[mine], (cost[b] - cost[a])[theirs]
        if len(mine) and len(theirs) and float(gain_a.max() + gain_b.max()) > 1e-12 * float(cost.abs().max()):
            owner[mine[gain_a.argmax()]], owner[theirs[gain_b.argmax()]] = b, a
            better = True
    return better

"""`group`: permute heads and neurons so that ranks miss less of each other's work.

If a layer's attention and MLP do not synchronise, a rank's neurons see only its own heads. To first
order neuron j misses the sum over the other ranks' heads h of c_jh = w_j . J P_h, with P_h the
head's output, J the derivative of LayerNorm and w_j the neuron's input weights. The damage scales
with GELU's slope and the norm of the neuron's output weights |v_j|. With
G_j[h, k] = E[(slope |v_j|)^2 c_jh c_jk], neuron j on a rank with heads S does the damage sum of
G_j[h, k] over all h, k outside S. Every way to deal the heads to the ranks is tried (a random
sample if there are too many), each with neurons dealt for little damage. The dense model stays the
same but for the order of sums. (After Sync-Point Drop, arXiv 2502.20727, which deals heads by their
attention maps, and 2609.13846, which deals neurons by first-order damage.)

Under delay:1 a rank's heads also miss the other ranks' neurons of the layer below. The damage to a
head is then the mean square of what its output changes by. From the first layer to the last, heads
and neurons of least damage together are chosen. Neurons that are dealt for their own heads' sake
add up to outputs that differ between ranks, so the next layer's heads miss more. Pairs of them are
exchanged until their damage and that of the next heads, which grows with the mean square of what
they miss, are least together.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import UserError
from base.files import check_target, new_directory, write_json
from checkpoints.convert import SHARD_FILES, place, write_shards
from checkpoints.sources import Source
from checkpoints.tensor_file import runs_of
from cli.options import GroupOptions
from fewer_syncs.inputs import about, open_inputs
from model import GPT, attend
from plan.partition import Partition, Span, length
from report import report
from text.tokenizer import TOKENIZER_FILE
from world.mesh import World

MOST_PARTITIONS = 20_000  # of the heads that are tried
TOKENS = 256  # processed at a time

Groups = dict[int, tuple[list[int], list[int]]]  # layer -> (heads, neurons), rank after rank


class Choice(NamedTuple):
    """Of a layer: heads and neurons, rank after rank; their damage, and that of their own order."""

    heads: list[int]
    neurons: list[int]
    damage: float
    as_it_is: float


def group_heads(world: World, options: GroupOptions) -> None:
    """The command. One process holds the whole model."""
    if world.size > 1:
        raise UserError("drop_syncs.py group is one process: start it with plain python. --ranks "
                        "is what the groups are for.")
    out = place(options.out)
    check_target(out, options.force, SHARD_FILES)
    source, dataset, tokenizer = open_inputs(world, options)
    config, split = source.config, Partition.of(source.config, options.ranks)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(source.read(name, None, ()))
    rows = max(1, min(options.tokens, len(dataset.train)) // config.block_size)
    ids = torch.from_numpy(dataset.train[: rows * config.block_size].astype("int64"))
    groups: Groups = {}
    layers: list[dict[str, Any]] = []
    print(f"{'layer':>5} {'damage as it is':>16} {'grouped':>10}   heads of each rank")
    chosen = choices(model, ids.view(rows, -1), split, options.sync != "mlp")
    for layer, (heads, neurons, damage, before) in enumerate(chosen):
        groups[layer] = heads, neurons
        parts = (heads[slice(*split.heads(rank))] for rank in range(split.tp))
        shares = " | ".join(",".join(map(str, part)) for part in parts)
        layers.append({"layer": layer, "damage_as_it_is": before, "damage_grouped": damage,
                       "heads_of_each_rank": shares})
        print(f"{layer:>5} {before:>16.4g} {damage / before if before else 1.0:>10.1%}   {shares}")
    grouped = Regrouped(source, groups)
    with new_directory(out, options.force, SHARD_FILES) as scratch:
        write_shards(grouped, split, source.dtype, scratch)
        write_json(scratch / TOKENIZER_FILE, tokenizer.to_json())
    print(f"{options.out}: {grouped.description} for tp={split.tp}. With all sync points it is "
          "the same model.")
    head = about("group", world, source, ids)
    report.write(options.report, head | {"ranks": split.tp, "layers": layers})


class Regrouped(Source):
    """A source with heads and neurons in another order."""

    def __init__(self, source: Source, groups: Groups):
        self.source, self.groups, self.config = source, groups, source.config
        self.dtype, self.tokenizer, self.dataset = source.dtype, source.tokenizer, source.dataset
        self.description = f"{source.description}, heads and neurons grouped"

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        full = self.source.read(name, None, ())
        parts = name.split(".")
        if parts[1] == "h" and int(parts[2]) in self.groups:
            heads, neurons = self.groups[int(parts[2])]
            head_dim = self.config.n_embd // self.config.n_head
            full = permuted(full, ".".join(parts[3:]), heads, neurons, head_dim)
        return runs_of(full, dim, runs)


def permuted(full: Tensor, name: str, heads: list[int], neurons: list[int],
             head_dim: int) -> Tensor:
    """A layer's tensor in the new order. name: within the layer, such as attn.c_attn.weight."""
    channels = [head_dim * head + i for head in heads for i in range(head_dim)]
    if name.startswith("attn.c_attn."):  # [q | k | v], each by heads
        return torch.cat([part[channels] for part in full.chunk(3)])
    if name.startswith("mlp.c_fc."):
        return full[neurons]
    columns = {"attn.c_proj.weight": channels, "mlp.c_proj.weight": neurons}
    return full[:, columns[name]] if name in columns else full


@torch.no_grad()
def choices(model: GPT, idx: Tensor, split: Partition, delayed: bool) -> Iterator[Choice]:
    """Of each layer, chosen with the tokens idx [B, T]. delayed: for delay:1, else for mlp."""
    blocks: Any = model.transformer.h
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(idx.shape[1]))
    unseen: list[list[Tensor]] = []  # by each rank's heads, [B, T, C]: grouped, and as it is
    for layer, block in enumerate(blocks):
        costs = [head_damage(block, x, missing) for missing in unseen]
        outputs = head_outputs(block, x).flatten(0, 1)
        x = x + block.attn(block.ln_1(x))
        G = neuron_damage(block, x.flatten(0, 1), outputs)
        found = group(G, split, *costs)
        hidden = block.mlp.activation(block.mlp.c_fc(block.ln_2(x)))
        x = x + block.mlp(block.ln_2(x))
        if delayed and layer + 1 < len(blocks):
            missing = others(block, hidden, split, found.neurons)
            square = sum(part.square().sum(dim=-1).mean() for part in missing)
            weight = head_damage(blocks[layer + 1], x, missing).sum() / square
            found = balanced(found, G, weight * inner_products(block, hidden), split)
            unseen = [others(block, hidden, split, neurons)
                      for neurons in (found.neurons, list(range(hidden.shape[-1])))]
        yield found


def head_outputs(block: Any, x: Tensor) -> Tensor:
    """P_h [B, T, H, C] of x [B, T, C], the input of the sub-block."""
    H = block.attn.n_head
    heads = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3 * H, -1)).transpose(1, 2)
    q, k, v = heads.split(H, dim=1)
    y = attend(q * block.attn.factor, k, v, None, 0.0).unflatten(-1, (H, -1))  # [B, T, H, D]
    weight = block.attn.c_proj.weight.unflatten(-1, (H, -1))  # [C, H, D]
    return torch.einsum("bthd,chd->bthc", y, weight)


def others(block: Any, hidden: Tensor, split: Partition, neurons: list[int]) -> list[Tensor]:
    """For each rank the output [B, T, C] of the others' neurons. neurons: rank after rank."""
    weight = block.mlp.c_proj.weight
    shares = [neurons[slice(*split.columns(rank))] for rank in range(split.tp)]
    outputs = [F.linear(hidden[..., share], weight[:, share]) for share in shares]
    return [sum(outputs) - own for own in outputs]


def inner_products(block: Any, hidden: Tensor) -> Tensor:
    """[n_hidden, n_hidden], float64: the mean inner products of the neurons' outputs."""
    acts, weight = hidden.flatten(0, 1).double(), block.mlp.c_proj.weight.double()
    return (acts.T @ acts / len(acts)) * (weight.T @ weight)


def head_damage(block: Any, x: Tensor, unseen: list[Tensor]) -> Tensor:
    """[tp, H], float64: the mean square of the change of each head's output on each rank."""
    whole = head_outputs(block, x)
    change = [(head_outputs(block, x - missing) - whole).square().sum(dim=-1) for missing in unseen]
    return torch.stack(change).double().mean(dim=(1, 2))


def neuron_damage(block: Any, x: Tensor, outputs: Tensor) -> Tensor:
    """G [n_hidden, H, H] of one layer, float64. x [n, C]: the input of ln_2; outputs [n, H, C]: the
    heads' terms of it."""
    H, mlp = outputs.shape[1], block.mlp
    G = torch.zeros(mlp.c_fc.weight.shape[0], H, H, dtype=torch.float64)
    norm = mlp.c_proj.weight.norm(dim=0)  # |v_j|
    for h, p in zip(x.split(TOKENS), outputs.split(TOKENS), strict=True):
        sigma = (h.var(dim=-1, unbiased=False) + block.ln_2.epsilon).sqrt()[:, None, None]
        unit = (h - h.mean(dim=-1, keepdim=True)).unsqueeze(1) / sigma  # [n, 1, C]
        moved = p - p.mean(dim=-1, keepdim=True) - unit * (unit * p).mean(dim=-1, keepdim=True)
        seen = block.ln_2.weight * moved / sigma  # J P_h, [n, H, C]
        slope = torch.func.grad(lambda z: mlp.activation(z).sum())(mlp.c_fc(block.ln_2(h)))
        c = F.linear(seen, mlp.c_fc.weight) * (slope * norm).unsqueeze(1)  # [n, H, n_hidden]
        G += torch.einsum("nhm,nkm->mhk", c, c).double()
    return G / len(x)


def group(G: Tensor, split: Partition, cost: Tensor | None = None,
          before: Tensor | None = None) -> Choice:
    """The groups of least damage found. cost, before: head_damage with the neurons of the layer
    below grouped, and as they are; None: the heads miss nothing."""
    ranks = range(split.tp)
    columns, own = ([length(part(rank)) for rank in ranks] for part in (split.columns, split.heads))

    def dealt(shares: list[tuple[int, ...]]) -> Choice:
        neurons, damage = deal(torch.stack([_missed(G, share) for share in shares]), columns)
        damage += 0.0 if cost is None else _total(cost, shares)
        return Choice([head for share in shares for head in share], neurons, damage, 0.0)

    every = partitions(split.n_head, own)
    if cost is not None:
        every = (_placed(shares, cost, own) for shares in every)
    found = min(map(dealt, every), key=lambda choice: choice.damage)
    as_it_is = [tuple(range(*split.heads(rank))) for rank in ranks]
    damage = 0.0 if before is None else _total(before, as_it_is)
    damage += sum(float(_missed(G, share)[slice(*split.columns(rank))].sum())
                  for rank, share in enumerate(as_it_is))
    return found._replace(as_it_is=damage)


def balanced(found: Choice, G: Tensor, M: Tensor, split: Partition) -> Choice:
    """The neurons after exchanges. M: `inner_products`, in units of damage; what all ranks miss has
    as mean square that of their own outputs, and a constant."""
    shares = [found.heads[slice(*split.heads(rank))] for rank in range(split.tp)]
    cost = torch.stack([_missed(G, share) for share in shares])
    owner = torch.empty(len(M), dtype=torch.int64)
    for rank in range(split.tp):
        owner[found.neurons[slice(*split.columns(rank))]] = rank
    before = cost.gather(0, owner.unsqueeze(0)).sum()
    pulls = M, torch.stack([M[owner == rank].sum(dim=0) for rank in range(split.tp)])
    while _exchange(cost, owner, pulls):
        pass
    change = float(cost.gather(0, owner.unsqueeze(0)).sum() - before)
    return found._replace(neurons=owner.argsort(stable=True).tolist(), damage=found.damage + change)


def _total(cost: Tensor, shares: list[tuple[int, ...]]) -> float:
    return sum(float(cost[rank, list(share)].sum()) for rank, share in enumerate(shares))


def _placed(shares: list[tuple[int, ...]], cost: Tensor, sizes: list[int]) -> list[tuple[int, ...]]:
    """The shares on the ranks where they cost least; on many ranks as they are exchanged in
    pairs."""
    placed, gained = list(shares), True
    while gained:
        gained = False
        for a, b in itertools.combinations(range(len(placed)), 2):
            swapped = list(placed)
            swapped[a], swapped[b] = placed[b], placed[a]
            if sizes[a] == sizes[b] and _total(cost, swapped) < _total(cost, placed) - 1e-12:
                placed, gained = swapped, True
    return placed


def _missed(G: Tensor, share: Iterable[int]) -> Tensor:
    """The damage [n_hidden] of each neuron on a rank with the heads of `share`."""
    others = sorted({*range(G.shape[1])} - {*share})
    return G[:, others][:, :, others].sum(dim=(1, 2))


def partitions(n: int, sizes: list[int]) -> Iterator[list[tuple[int, ...]]]:
    """The ways to deal n heads to ranks in shares of these sizes. Ranks with shares of one size are
    interchangeable. If there are more than MOST_PARTITIONS, so many at random, always the same."""
    if math.factorial(n) // math.prod(map(math.factorial, sizes)) <= MOST_PARTITIONS:
        yield from _partitions(range(n), sizes)
        return
    stream = torch.Generator().manual_seed(0)
    for i in range(MOST_PARTITIONS):
        order = torch.randperm(n, generator=stream) if i else torch.arange(n)
        yield [tuple(sorted(part.tolist())) for part in order.split(sizes)]


def _partitions(heads: Iterable[int], sizes: list[int]) -> Iterator[list[tuple[int, ...]]]:
    if not sizes:
        yield []
        return
    for share in itertools.combinations(heads, sizes[0]):
        for others in _partitions(sorted({*heads} - {*share}), sizes[1:]):
            if not others or len(others[0]) < len(share) or others[0] > share:
                yield [share, *others]


def deal(cost: Tensor, columns: list[int]) -> tuple[list[int], float]:
    """(neurons in the order of their ranks, columns[r] of rank r; their cost).

    cost: [tp, n_hidden]. The neurons with most to lose choose first, then pairs are exchanged while
    that helps. For two ranks the order by the difference of costs is the optimum.
    """
    tp, n = cost.shape
    owner = torch.ones(n, dtype=torch.int64)
    if tp == 2:
        owner[(cost[0] - cost[1]).argsort(stable=True)[: columns[0]]] = 0
    else:
        room, (first, second) = list(columns), cost.topk(2, dim=0, largest=False).values
        for j in (first - second).argsort(stable=True).tolist():
            rank = min((r for r in range(tp) if room[r]), key=lambda r: float(cost[r, j]))
            owner[j] = rank
            room[rank] -= 1
        while _exchange(cost, owner):
            pass
    total = float(cost.gather(0, owner.unsqueeze(0)).sum())
    return owner.argsort(stable=True).tolist(), total


def _exchange(cost: Tensor, owner: Tensor, pulls: tuple[Tensor, Tensor] | None = None) -> bool:
    """Of each two ranks exchange the pair of neurons that gains most; False if none gains. pulls:
    (M [n, n], its sums [tp, n] over each rank's neurons), if these also cost the sum of M over all
    pairs of them."""
    gained = False
    for a, b in itertools.combinations(range(len(cost)), 2):
        in_a, in_b = ((owner == rank).nonzero().squeeze(1) for rank in (a, b))
        to_b, to_a = cost[b] - cost[a], cost[a] - cost[b]  # what it costs to move a neuron
        if pulls is not None:
            M, sums = pulls
            nearer, own = 2 * (sums[b] - sums[a]), 2 * M.diagonal()
            to_b, to_a = to_b + nearer + own, to_a - nearer + own
        j = in_a[to_b[in_a].argmin()]
        change = to_b[j] + to_a[in_b] - (4 * pulls[0][j, in_b] if pulls else 0)
        if float(change.min()) < -1e-12 * float(cost.abs().max()):
            k, gained = in_b[change.argmin()], True
            owner[j], owner[k] = b, a
            if pulls is not None:
                sums[a] += M[k] - M[j]
                sums[b] += M[j] - M[k]
    return gained

"""One MLP, one attention block or one layer under every strategy, on the same weights and the same input.

    naive          all-gather after the column-parallel layer, all-reduce after the row-parallel one
    megatron       nothing between the two, one all-reduce after them
    sequence       megatron, with the tokens split outside of the two (+kept: what was gathered is kept for the backward pass)
    spd            megatron, without the all-reduce after the attention (a layer only): another function, approximately the same

and under megatron with one of the mistakes that are easily made, to see what catches it (MISTAKES).

Shapes: B batch, T tokens, t of them this rank's, C = n_embd, m = this rank's columns, M = all columns.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import GPTConfig, attend, gelu
from parallel.collectives import Axis, all_gather, all_reduce
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from parallel.ledger import Account, total
from parallel.parameters import default_dtype, take
from parallel.regions import WHOLE, Region, SplitTokens, f, g
from plan.cost import ring_bytes
from plan.partition import Partition, Rule, Run, spans
from tp_model import MLP, Block, CausalSelfAttention, Stream
from train.gradients import sum_gradients

STRATEGIES = ("naive", "megatron", "sequence", "sequence+kept", "spd")
MISTAKES = {
    "qkv": "rank r has the r-th stretch of c_attn's rows, not its heads' rows of q, of k and of v",
    "bias": "every rank adds the row-parallel layer's bias, before the all-reduce",
    "no_f": "x enters the column-parallel layer without f: no all-reduce of its gradient",
    "no_g": "the row-parallel layer's addend leaves without g: no all-reduce of the output",
}
INSIDE = {"layer": "", "attention": "attn.", "mlp": "mlp."}  # where a part stands in a layer

Said = dict[tuple[str, str], tuple[int, int]]  # (direction, op) -> (calls, bytes told to the ledger)


# --- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split(Partition):
    """A Partition whose MLP may have any width."""

    intermediate: int = 0  # 0 = 4 * n_embd

    @property
    def n_hidden(self) -> int:
        return self.intermediate or 4 * self.n_embd

    @classmethod
    def sized(cls, config: GPTConfig, tp: int, intermediate: int) -> "Split":
        return cls(**asdict(Partition.of(config, tp)), intermediate=intermediate)


@dataclass(frozen=True)
class Case:
    """A part of a layer, its full weights (named as in that part), its input and its output's gradient, both [B, T, C]."""

    part: str
    config: GPTConfig  # block_size is T, and there is one layer
    intermediate: int
    weights: dict[str, Tensor]
    x: Tensor
    dy: Tensor

    @classmethod
    def draw(
        cls, part: str, config: GPTConfig, batch: int, intermediate: int = 0, dtype: torch.dtype = torch.float32, seed: int = 1
    ) -> "Case":
        """Weights at which every part matters; the same on all ranks."""
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in of_part(part, Split.sized(config, 1, intermediate).shapes()).items():
            drawn = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
            weights[name] = (drawn + 1 if "ln_" in name and name.endswith("weight") else drawn).to(dtype)
        x, dy = (torch.randn(batch, config.block_size, config.n_embd, generator=generator).to(dtype) for _ in range(2))
        return cls(part, config, intermediate, weights, x, dy)

    def split(self, tp: int) -> Split:
        return Split.sized(self.config, tp, self.intermediate)

    def rules(self, tp: int) -> dict[str, Rule]:
        return of_part(self.part, self.split(tp).rules)

    def replicated(self, strategy: str) -> list[str]:
        """The parameters of which a rank has a part of the gradient only."""
        names = [name for name, rule in self.rules(1).items() if rule.dim is None]
        if strategy == "spd":
            return [name for name in names if name != "mlp.c_proj.bias"]
        return names if strategy.startswith("sequence") else []

    def strategies(self, tp: int) -> tuple[str, ...]:
        """Those that there are; on one rank all are the same."""
        return ("megatron",) if tp == 1 else STRATEGIES if self.part == "layer" else STRATEGIES[:-1]


def of_part(part: str, table: dict[str, Any]) -> dict[str, Any]:
    """Of a Partition's table, the lines of one part of its first layer, by their names in that part."""
    prefix = f"transformer.h.0.{INSIDE[part]}"
    return {name.removeprefix(prefix): value for name, value in table.items() if name.startswith(prefix)}


# --- what is expected -----------------------------------------------------------------------------------------------


def answers(case: Case, virtual: Split | None = None) -> dict[str, Tensor]:
    """Output, input gradient and every weight's gradient in double precision: model.py's, or spd's over virtual ranks."""
    C, H, bias = case.config.n_embd, case.split(1).n_hidden, case.config.bias
    with default_dtype(torch.float64):
        whole = model.Block(case.config)
        whole.mlp.c_fc, whole.mlp.c_proj = nn.Linear(C, H, bias), nn.Linear(H, C, bias)
    part: nn.Module = {"layer": whole, "attention": whole.attn, "mlp": whole.mlp}[case.part]
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(case.weights[name])
    x = case.x.double().requires_grad_()
    y = part(x) if virtual is None else dropped_sync(whole, virtual, x)
    y.backward(case.dy.double())
    gradients = {"input gradient": x.grad} | {name: p.grad for name, p in part.named_parameters()}
    return {"output": y.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


def dropped_sync(whole: model.Block, split: Split, x: Tensor) -> Tensor:
    """A layer without the sync point after its attention, ranks as turns of a loop: each rank's MLP reads x, the attention's
    bias and its own heads' output; the sum of all heads and columns reaches the stream."""
    p, rules = dict(whole.named_parameters()), of_part("layer", split.rules)

    def linear(z: Tensor, name: str, rank: int, bias: bool) -> Tensor:
        b = take(p[f"{name}.bias"], rules[f"{name}.bias"], rank) if bias and split.bias else None
        return F.linear(z, take(p[f"{name}.weight"], rules[f"{name}.weight"], rank), b)

    biases = [p[f"{name}.c_proj.bias"] if split.bias else torch.zeros(()) for name in ("attn", "mlp")]
    out = x + biases[0] + biases[1]
    for rank in range(split.tp):
        qkv = linear(whole.ln_1(x), "attn.c_attn", rank, True).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (-1, split.head_dim)).transpose(1, 2) for z in qkv)
        heads = linear(attend(q, k, v, None, 0.0), "attn.c_proj", rank, False)
        hidden = gelu(linear(whole.ln_2(x + heads + biases[0]), "mlp.c_fc", rank, True), whole.mlp.activation)
        out = out + heads + linear(hidden, "mlp.c_proj", rank, False)
    return out


def formula(case: Case, strategy: str, tp: int) -> Said:
    """What a rank tells the ledger in a forward and a backward pass (and in the step after them)."""
    if tp == 1:
        return {}
    split, rows, x = case.split(tp), case.x.shape[0] * case.x.shape[1], case.x.numel()
    widths = {
        "attention": [3 * split.head_dim * (hi - lo) for lo, hi in map(split.heads, range(tp))],
        "mlp": [hi - lo for lo, hi in map(split.columns, range(tp))],
    }
    calls: list[tuple[str, str, int]] = []  # (direction, op, elements)
    for kind in widths if case.part == "layer" else (case.part,):
        if strategy.startswith("sequence"):
            calls += [(way, op, x) for way in ("forward", "backward") for op in ("all_gather", "reduce_scatter")]
            calls += [("backward", "all_gather", x)] if strategy == "sequence" else []
        if strategy == "naive":  # the gather's message is one rank's, padded to the widest
            calls += [("forward", "all_gather", rows * max(widths[kind])), ("backward", "all_reduce", rows * sum(widths[kind]))]
        if strategy in ("naive", "megatron") or (strategy, kind) == ("spd", "mlp"):
            calls.append(("forward", "all_reduce", x))
        if strategy in ("naive", "megatron") or (strategy, kind) == ("spd", "attention"):
            calls.append(("backward", "all_reduce", x))
    if partial := case.replicated(strategy):
        calls.append(("step", "all_reduce", sum(case.weights[name].numel() for name in partial)))
    said: Said = {}
    for direction, op, elements in calls:
        before = said.get((direction, op), (0, 0))
        said[direction, op] = before[0] + 1, before[1] + elements * case.x.element_size()
    return said


def summed(account: Account) -> Said:
    """The same of what was told."""
    tallies = {key: total(account, direction=key[0], op=key[1]) for key in {(e.direction, e.op) for e in account}}
    return {key: (tally.calls, tally.bytes) for key, tally in tallies.items()}


def wire_bytes(said: Said, strategy: str, tp: int) -> float:
    """What a rank sends in rings: 2 (N - 1) / N of an all-reduce's message, half of that of the other two's whole message."""
    found = 0.0
    for (_, op), (_, nbytes) in said.items():
        whole = nbytes * tp if (strategy, op) == ("naive", "all_gather") else nbytes  # told: one rank's; the others tell all
        found += ring_bytes(whole, tp) / (1 if op == "all_reduce" else 2)
    return found


# --- one rank's share -----------------------------------------------------------------------------------------------


class _GatherColumns(torch.autograd.Function):
    """Every rank's columns [B, T, m] side by side, [B, T, M]; backward, the ranks' gradients are summed, and one's own kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis, widths: list[int]) -> Tensor:
        ctx.axis, ctx.widths = axis, widths
        parts = all_gather(F.pad(y, (0, max(widths) - y.shape[-1])), axis, "forward")
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad, ctx.axis, "backward").split(ctx.widths, dim=-1)[ctx.axis.rank], None, None


def naive(body: CausalSelfAttention | MLP, split: Split, x: Tensor) -> Tensor:
    """The same function of x [B, T, C] with everything between the two layers done by every rank in full.

    The row-parallel layer wants this rank's columns only, which it had before: nothing comes of the gather, and Megatron leaves
    it out.
    """
    column = body.c_attn if isinstance(body, CausalSelfAttention) else body.c_fc
    axis, attention = column.axis, isinstance(body, CausalSelfAttention)
    unit, runs = (split.head_dim, split.heads) if attention else (1, split.columns)
    edges = [(unit * lo, unit * hi) for lo, hi in map(runs, range(axis.size))]
    widths = [(3 if attention else 1) * (hi - lo) for lo, hi in edges]
    y: Tensor = _GatherColumns.apply(column.local(f(x, axis)), axis, widths)
    if isinstance(body, MLP):
        y = gelu(y, body.activation)
    else:  # each rank's columns are its heads' [q | k | v]
        parts = [part.chunk(3, dim=-1) for part in y.split(widths, dim=-1)]
        q, k, v = (torch.cat(z, dim=-1).unflatten(-1, (-1, unit)).transpose(1, 2) for z in zip(*parts, strict=True))
        y = attend(q, k, v, None, 0.0)
    lo, hi = edges[axis.rank]
    return body.c_proj(y[..., lo:hi])


def mistaken(body: CausalSelfAttention | MLP, x: Tensor, mistake: str) -> Tensor:
    """A sub-block of x [B, T, C] as tp_model.py has it, but for one line (in qkv that line is in the table of rules)."""
    column = body.c_attn if isinstance(body, CausalSelfAttention) else body.c_fc
    row, axis = body.c_proj, column.axis
    y = column.local(x if mistake == "no_f" else f(x, axis))
    y = body.heads(y, None) if isinstance(body, CausalSelfAttention) else gelu(y, body.activation)
    if mistake == "bias":
        return g(F.linear(y, row.weight, row.bias), axis)
    if mistake == "no_g":
        return F.linear(y, row.weight, row.bias)
    return row(y)


def in_a_row(rule: Rule) -> Rule:
    """As many rows for each rank as the rule gives it, one rank's after the other's."""
    owned = [rule.owned(rank) for rank in range(len(rule.runs))]
    edges: list[Run] = [(sum(owned[:rank]), sum(owned[: rank + 1])) for rank in range(len(owned))]
    return replace(rule, runs=tuple((edge,) for edge in edges))


class Piece:
    """One rank's share of a case under one strategy, or with one of the mistakes."""

    def __init__(self, case: Case, strategy: str, axis: Axis, device: torch.device | str = "cpu"):
        self.case, self.strategy, self.axis = case, strategy, axis
        self.split, self.rules = case.split(axis.size), case.rules(axis.size)
        if strategy == "qkv":
            self.rules |= {name: in_a_row(rule) for name, rule in self.rules.items() if "c_attn" in name}
        T = case.x.shape[1]
        self.region: Region = WHOLE
        self.own = slice(None)  # its tokens
        if strategy.startswith("sequence") and axis.size > 1:
            self.region = SplitTokens(T, keep=strategy == "sequence+kept")
            self.own = slice(*spans(T, axis.size)[axis.rank])
        made = (case.config, self.split, axis, 0)
        self.body: Any
        with torch.device(device), default_dtype(case.x.dtype):
            if case.part == "layer":
                self.body = Block(*made, (strategy != "spd", True))
            else:
                self.body = (MLP if case.part == "mlp" else CausalSelfAttention)(*made)
        with torch.no_grad():
            for name, parameter in self.body.named_parameters():
                parameter.copy_(take(case.weights[name], self.rules[name], axis.rank))
        self.x = case.x[:, self.own].to(device).clone().requires_grad_()  # a part that is kept would hold the whole
        self.dy = case.dy[:, self.own].to(device)

    def forward(self) -> Tensor:
        """The output [B, T, C], or of this rank's tokens [B, t, C]."""
        body, x = self.body, self.x
        ways = {"naive": partial(naive, split=self.split)} | {name: partial(mistaken, mistake=name) for name in MISTAKES}
        if self.strategy in ways:
            way = ways[self.strategy]
            if self.case.part != "layer":
                return way(body, x=x)
            x = x + way(body.attn, x=body.ln_1(x))
            return x + way(body.mlp, x=body.ln_2(x))
        if self.case.part == "layer":
            return body(Stream(x, self.region)).x
        return body(x, region=self.region)

    def run(self) -> Tensor:
        """A forward and a backward pass; gradients are left where torch leaves them."""
        self.body.zero_grad()
        self.x.grad = None
        y = self.forward()
        y.backward(self.dy)
        return y

    def sum_partial(self) -> None:
        names = self.case.replicated(self.strategy) if self.axis.size > 1 else []
        parameters = dict(self.body.named_parameters())
        sum_gradients([parameters[name] for name in names], self.axis.at("optimizer"))

    def errors(self, expected: dict[str, Tensor]) -> dict[str, float]:
        """The relative errors of the output, the input gradient and every weight's gradient."""
        y = self.run()
        self.sum_partial()
        assert self.x.grad is not None
        errors = {"output": relative(y, expected["output"][:, self.own])}
        errors["input gradient"] = relative(self.x.grad, expected["input gradient"][:, self.own])
        for name, parameter in self.body.named_parameters():
            part = take(expected[name], self.rules[name], self.axis.rank)
            # a key's bias moves all scores of a query alike: its gradient is zero but for rounding
            errors[name] = relative(parameter.grad, part, expected[name] if name.endswith("c_attn.bias") else part)
        return errors

    def worst(self, expected: dict[str, Tensor]) -> tuple[float, str]:
        """The largest of them, and where."""
        errors = self.errors(expected)
        worst = max(errors, key=lambda name: errors[name])
        return errors[worst], worst

    @torch.no_grad()
    def linear_errors(self) -> tuple[float, float]:
        """Relative errors of two statements: all ranks' columns side by side are the full column-parallel layer's output, and
        their addends add up to the full row-parallel layer's."""
        columns = rows = 0.0
        for name, layer in self.body.named_modules():
            if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                continue
            weight, bias = self.case.weights[f"{name}.weight"].double(), self.case.weights[f"{name}.bias"].double()
            rule, axis = replace(self.rules[f"{name}.weight"], dim=2), layer.axis
            if isinstance(layer, ColumnParallelLinear):
                full = F.linear(self.case.x.double(), weight, bias)
                widths = [rule.owned(rank) for rank in range(axis.size)]
                ours = _GatherColumns.apply(layer.local(self.case.x.to(self.x.device)), axis, widths)
                columns = max(columns, relative(ours, torch.cat([take(full, rule, rank) for rank in range(axis.size)], dim=2)))
            else:
                y = F.gelu(self.case.x.repeat(1, 1, -(-layer.in_features // self.case.x.shape[2]))[..., : layer.in_features])
                addend = layer.partial(take(y, rule, axis.rank).to(self.x.device))
                full = F.linear(y.double(), weight, bias)
                rows = max(rows, relative(all_reduce(addend, axis, "forward").cpu(), full - bias))
        return columns, rows


def relative(ours: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    return ((ours.detach().cpu().double() - expected).norm() / (expected if scale is None else scale).norm()).item()


def kept_bytes(body: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, the body's parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in body.parameters()}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            found[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

"""A layer, its MLP or its attention under every strategy, with the same weights and the same input.

    naive           all-gather after the column-parallel layer, all-reduce after the row-parallel
    megatron        no collective between the two, one all-reduce after them
    sequence        megatron with the tokens split outside of the two
    sequence+kept   the same, and what was gathered is kept for the backward pass
    spd             megatron without the all-reduce after the attention (a layer only): another
                    function, approximately the same

MISTAKES are megatron with one common mistake, to see what finds it.

Shapes: B batch, T tokens, t of them this rank's, C = n_embd, M columns, m of them this rank's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import GPTConfig, attend
from parallel.collectives import Axis, all_gather, all_reduce
from parallel.ledger import Account, total
from parallel.parameters import take
from parallel.regions import WHOLE, Region, SplitTokens, f, g
from plan.cost import Step
from plan.link import ring_bytes
from plan.memory import FLOAT
from plan.partition import Partition, Rule, spans
from plan.schedule import KINDS, Schedule
from tp_model import MLP, Block, CausalSelfAttention, Stream
from train.gradients import sum_gradients

STRATEGIES = ("naive", "megatron", "sequence", "sequence+kept", "spd")
MISTAKES = {
    "qkv": "rank r has the r-th stretch of c_attn's rows, not its heads' rows of q, of k and of v",
    "bias": "every rank adds the row-parallel layer's bias, before the all-reduce",
    "no_f": "x enters the column-parallel layer without f: no all-reduce of its gradient",
    "no_g": "the row-parallel layer's addend leaves without g: no all-reduce of the output",
}
INSIDE = {"layer": "", "attention": "attn", "mlp": "mlp"}  # a part's name in a layer

Counts = dict[tuple[str, str], tuple[int, int]]  # (direction, op) -> (calls, bytes) in the ledger


def widths_of(split: Partition, kind: str) -> list[int]:
    """The columns of each rank's column-parallel layer."""
    unit, runs = (3 * split.head_dim, split.heads) if kind == "attention" else (1, split.columns)
    return [unit * (hi - lo) for lo, hi in map(runs, range(split.tp))]


@dataclass(frozen=True)
class Case:
    """A part of a layer: its full weights, its input and its output's gradient, both [B, T, C]."""

    part: str
    config: GPTConfig  # block_size is T
    weights: dict[str, Tensor]
    x: Tensor
    dy: Tensor

    @classmethod
    def draw(cls, part: str, config: GPTConfig, batch: int, intermediate: int = 0,
             dtype: torch.dtype = torch.float32, seed: int = 1, device: str = "cpu") -> "Case":
        """Random numbers, the same on all ranks; on the device "meta" only shapes."""
        config = replace(config, n_inner=intermediate)
        generator = torch.Generator().manual_seed(seed) if device == "cpu" else None
        weights = {}
        for name, shape in of_part(part, Partition.of(config, 1).shapes()).items():
            drawn = torch.randn(shape, generator=generator, device=device)
            drawn = drawn * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
            is_gain = "ln_" in name and name.endswith("weight")
            weights[name] = (drawn + is_gain).to(dtype)
        shape = (2, batch, config.block_size, config.n_embd)
        x, dy = torch.randn(shape, generator=generator, device=device).to(dtype)
        return cls(part, config, weights, x, dy)

    def split(self, tp: int) -> Partition:
        return Partition.of(self.config, tp)

    def rules(self, tp: int) -> dict[str, Rule]:
        return of_part(self.part, self.split(tp).rules)

    def partial(self, strategy: str) -> list[str]:
        """The parameters for which a rank computes only a part of the gradient."""
        names = [name for name, rule in self.rules(1).items() if rule.dim is None]
        if strategy == "spd":
            return [name for name in names if name != "mlp.c_proj.bias"]
        return names if strategy.startswith("sequence") else []

    def strategies(self, tp: int) -> tuple[str, ...]:
        """On one rank all are the same."""
        return ("megatron",) if tp == 1 else STRATEGIES[: None if self.part == "layer" else -1]


def of_part(part: str, table: dict[str, Any]) -> dict[str, Any]:
    """The entries of a Partition's table for one part of its first layer, by their names there."""
    prefix = f"transformer.h.0.{INSIDE[part]}".rstrip(".") + "."
    return {name.removeprefix(prefix): v for name, v in table.items() if name.startswith(prefix)}


# --- the right answers ----------------------------------------------------------------------------


def answers(case: Case, split: Partition | None = None) -> dict[str, Tensor]:
    """Output, input gradient and every weight's gradient in double precision, by model.py; with
    `split`, of spd."""
    whole = model.Block(case.config)
    part: nn.Module = whole.double().get_submodule(INSIDE[case.part])
    part.load_state_dict(case.weights)
    x = case.x.double().requires_grad_()
    y = part(x) if split is None else dropped_sync(whole, split, x)
    y.backward(case.dy.double())
    found: dict[str, Any] = {"output": y.detach(), "input gradient": x.grad}
    return found | {name: p.grad for name, p in part.named_parameters()}


def dropped_sync(whole: model.Block, split: Partition, x: Tensor) -> Tensor:
    """A layer without the sync point after its attention, computed rank after rank. Each rank's MLP
    reads x, the attention's bias and its own heads' output; all ranks' outputs are added."""
    rules = of_part("layer", split.rules)

    def addend(name: str, z: Tensor, rank: int) -> Tensor:
        """The output of this rank's heads or columns alone, without bias."""
        part: Any = whole.get_submodule(name)
        weight, ((lo, hi),) = part.c_proj.weight, rules[f"{name}.c_proj.weight"].runs[rank]
        own = {"c_proj.weight": F.pad(weight[:, lo:hi], (lo, weight.shape[1] - hi))}
        if split.bias:
            own["c_proj.bias"] = torch.zeros_like(part.c_proj.bias)
        return torch.func.functional_call(part, own, z)

    a, b = (part.c_proj.bias if split.bias else 0.0 for part in (whole.attn, whole.mlp))
    out = x + a + b
    for rank in range(split.tp):
        heads = addend("attn", whole.ln_1(x), rank)
        out = out + heads + addend("mlp", whole.ln_2(x + a + heads), rank)
    return out


def formula(case: Case, strategy: str, tp: int) -> Counts:
    """A rank's collectives of one layer in a forward and a backward pass and in the step after
    them, as the cost model counts them."""
    if tp == 1:
        return {}
    B, T, C = case.x.shape
    points = Schedule.parse("mlp" if strategy == "spd" else "all", 1)
    split, sequence = replace(case.split(tp), n_layer=1), strategy.startswith("sequence")
    step = Step(split, points, "train", B, T, sequence_parallel=sequence, logit_rows=B * T)
    kinds = KINDS if case.part == "layer" else (case.part,)
    calls = [(m.direction, m.op, m.nbytes // FLOAT) for m in step.messages() if m.block in kinds]
    for widths in (widths_of(split, kind) for kind in kinds):
        if strategy == "sequence+kept":
            calls.remove(("backward", "all_gather", B * T * C))
        elif strategy == "naive":  # the gather's message is one rank's, padded to the widest
            calls.append(("forward", "all_gather", B * T * max(widths)))
            calls.append(("backward", "all_reduce", B * T * sum(widths)))
    partial = sum(case.weights[name].numel() for name in case.partial(strategy))
    calls += [("step", "all_reduce", partial)] * (partial > 0)
    counts: Counts = {}
    for direction, op, elements in calls:
        n, nbytes = counts.get((direction, op), (0, 0))
        counts[direction, op] = n + 1, nbytes + elements * case.x.element_size()
    return counts


def summed(account: Account) -> Counts:
    """The account in the same form."""
    keys = {(entry.direction, entry.op) for entry in account}
    tallies = {(way, op): total(account, direction=way, op=op) for way, op in keys}
    return {key: (tally.calls, tally.bytes) for key, tally in tallies.items()}


def wire_bytes(counts: Counts, strategy: str, tp: int) -> float:
    """Bytes that a rank sends in rings: 2 (N - 1) / N of an all-reduce's message, half of that of
    the others' whole message. The ledger has whole messages, except of naive's gather."""
    parts = {("naive", "all_gather"): tp}
    return sum(ring_bytes(nbytes * parts.get((strategy, op), 1), tp) / (1 + (op != "all_reduce"))
               for (_, op), (_, nbytes) in counts.items())


# --- one rank's share -----------------------------------------------------------------------------


class _GatherColumns(torch.autograd.Function):
    """forward: all ranks' columns [B, T, m] side by side, [B, T, M].
    backward: the sum of the ranks' gradients, this rank's columns of it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis, widths: list[int]) -> Tensor:
        ctx.axis, ctx.widths = axis, widths
        parts = all_gather(F.pad(y, (0, max(widths) - y.shape[-1])), axis, "forward")
        return torch.cat([part[..., :n] for part, n in zip(parts, widths, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = all_reduce(grad, ctx.axis, "backward").split(ctx.widths, dim=-1)
        return parts[ctx.axis.rank], None, None


def changed(body: Any, x: Tensor, how: str, split: Partition) -> Tensor:
    """A sub-block of x [B, T, C] as in tp_model.py but for what is naive or a mistake (not qkv)."""
    attention = isinstance(body, CausalSelfAttention)
    column, row = body.c_attn if attention else body.c_fc, body.c_proj
    y = column.local(x if how == "no_f" else f(x, column.axis))
    if how == "naive":
        y = in_full(body, y, split)
    elif attention:
        y = body.heads(y, None)
    else:
        y = body.activation(y)
    if how == "bias":
        return g(F.linear(y, row.weight, row.bias), column.axis)
    return F.linear(y, row.weight, row.bias) if how == "no_g" else row(y)


def in_full(body: Any, y: Tensor, split: Partition) -> Tensor:
    """Attention or GELU of all columns on every rank. The row-parallel layer then reads this rank's
    columns only, so the gather is useless: Megatron has none."""
    axis = body.c_proj.axis
    if isinstance(body, MLP):
        lo, hi = split.columns(axis.rank)
        return body.activation(_GatherColumns.apply(y, axis, widths_of(split, "mlp")))[..., lo:hi]
    widths = widths_of(split, "attention")
    parts = _GatherColumns.apply(y, axis, widths).split(widths, dim=-1)  # of each rank [q | k | v]
    parts = [part.unflatten(-1, (3, -1, split.head_dim)) for part in parts]
    q, k, v = torch.cat(parts, dim=-2).transpose(1, 3).unbind(2)
    lo, hi = (split.head_dim * head for head in split.heads(axis.rank))
    return attend(q, k, v, None, 0.0)[..., lo:hi]


class Piece:
    """One rank's share of a case under a strategy or with a mistake."""

    def __init__(self, case: Case, strategy: str, axis: Axis, device: torch.device | str = "cpu"):
        self.case, self.strategy, self.axis = case, strategy, axis
        self.split, self.rules = case.split(axis.size), case.rules(axis.size)
        if strategy == "qkv":  # as many rows for each rank, one rank's after the other's
            unit, heads = 3 * self.split.head_dim, map(self.split.heads, range(axis.size))
            row = Rule(0, tuple(((unit * lo, unit * hi),) for lo, hi in heads))
            self.rules |= {name: row for name in self.rules if "c_attn" in name}
        T = case.x.shape[1]
        self.region: Region = WHOLE
        self.own = slice(None)  # its tokens
        if strategy.startswith("sequence") and axis.size > 1:
            self.region = SplitTokens(T, keep=strategy == "sequence+kept")
            self.own = slice(*spans(T, axis.size)[axis.rank])
        with torch.device(device), torch.no_grad():
            block = Block(case.config, self.split, axis, 0, (strategy != "spd", True))
            block.to(case.x.dtype)
            self.body: Any = block.get_submodule(INSIDE[case.part])
            for name, parameter in self.body.named_parameters():
                parameter.copy_(take(case.weights[name], self.rules[name], axis.rank))
        self.x = case.x[:, self.own].to(device).clone().requires_grad_()  # a view keeps the whole
        self.dy = case.dy[:, self.own].to(device)

    def forward(self) -> Tensor:
        """The output [B, T, C], or of this rank's tokens [B, t, C]."""
        body, x, how, layer = self.body, self.x, self.strategy, self.case.part == "layer"
        if how not in ("naive", *MISTAKES):
            return body(Stream(x, self.region)).x if layer else body(x, region=self.region)
        if not layer:
            return changed(body, x, how, self.split)
        x = x + changed(body.attn, body.ln_1(x), how, self.split)
        return x + changed(body.mlp, body.ln_2(x), how, self.split)

    def run(self) -> Tensor:
        """A forward and a backward pass."""
        self.body.zero_grad()
        self.x.grad = None
        y = self.forward()
        y.backward(self.dy)
        return y

    def sum_partial(self) -> None:
        names = self.case.partial(self.strategy) if self.axis.size > 1 else []
        sum_gradients(map(self.body.get_parameter, names), self.axis.at("optimizer"))

    def errors(self, expected: dict[str, Tensor]) -> dict[str, float]:
        """Relative errors of the output, the input gradient and every weight's gradient."""
        found = {"output": self.run(), "input gradient": self.x.grad}
        self.sum_partial()
        errors = {name: relative(y, expected[name][:, self.own]) for name, y in found.items()}
        for name, parameter in self.body.named_parameters():
            part = take(expected[name], self.rules[name], self.axis.rank)
            # a key's bias moves all scores of a query alike: its gradient is only rounding
            scale = expected[name] if name.endswith("c_attn.bias") else part
            errors[name] = relative(parameter.grad, part, scale)
        return errors


def relative(ours: Any, expected: Tensor, scale: Tensor | None = None) -> float:
    error = (ours.detach().cpu().double() - expected).norm()
    return (error / (expected if scale is None else scale).norm()).item()


def kept_bytes(body: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the parameters."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    parameters = {p.untyped_storage().data_ptr() for p in body.parameters()}
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in parameters)

"""A report's account, read: its lines, what they add up to, and the schedule and layout that they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from model import GPTConfig
from plan.partition import Partition
from plan.schedule import KINDS, Schedule
from report.diagram import Layer, layer


@dataclass(frozen=True)
class Line:
    """What was told of one collective. layer: its number, or "-" outside of the layers."""

    layer: str
    block: str
    direction: str
    op: str
    calls: int
    bytes: int
    seconds: float


def told(account: dict[str, Any]) -> Iterator[Line]:
    """Each layer's attention and MLP in turn, then the rest."""
    blocks = [(str(layer["layer"]), block, layer[block]) for layer in account["layers"] for block in KINDS]
    blocks += [("-", block, passes) for block, passes in account["other"].items()]
    for number, block, passes in blocks:
        for direction, ops in passes.items():
            for op, tally in ops.items():
                yield Line(number, block, direction, op, tally["calls"], tally["bytes"], tally["seconds"])


def picture(report: dict[str, Any]) -> Layer:
    """The layer as this report's ranks saw it. KeyError where it has no model with sizes, UserError where they do not go
    together."""
    sizes = {field.name: report["model"][field.name] for field in fields(GPTConfig) if field.name in report["model"]}
    split = Partition.of(GPTConfig(**sizes), report["tp"])
    schedule = Schedule.parse(report.get("sync") or "all", split.n_layer)
    found = told(report["comm_account"]) if "comm_account" in report else ()
    sequence = report.get("sequence_parallel") or any(line.op == "reduce_scatter" and line.block in KINDS for line in found)
    return layer(split, schedule, bool(sequence))


def all_reduces_per_token(report: dict[str, Any]) -> float | None:
    """All-reduces of the forward passes for each generated token, prompts included; None where nothing was generated."""
    return float(report["per_token"].get("all_reduce", 0)) if "per_token" in report else None

"""From a report: the collectives of its account, and the layer as its ranks saw it."""

from typing import Any

from model import GPTConfig
from parallel.ledger import Account, Entry, Tally, total
from plan.partition import Partition
from plan.schedule import KINDS, Schedule
from report.diagram import Layer, layer

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")


def entries(report: dict[str, Any]) -> Account:
    """Its account: each layer's attention and MLP in turn, then the rest. Empty if it has none."""
    account = report.get("comm_account") or {"layers": [], "other": {}}
    blocks = [(layer["layer"], kind, layer[kind]) for layer in account["layers"] for kind in KINDS]
    blocks += [(None, block, passes) for block, passes in account["other"].items()]
    return {Entry(number, block, direction, op): Tally(t["calls"], t["bytes"], t["seconds"])
            for number, block, passes in blocks
            for direction, ops in passes.items() for op, t in ops.items()}


def rows(account: Account, digits: int = 6) -> list[dict[str, str]]:
    """The cells of a table: a row for each collective, then their sum. digits: of seconds."""
    found = [("-" if e.layer is None else str(e.layer), e, tally) for e, tally in account.items()]
    found.append(("", Entry(None, "sum", "", ""), total(account)))
    return [{"layer": layer, "block": e.block, "pass": e.direction, "collective": e.op,
             "calls": f"{t.calls:,}", "bytes": f"{t.bytes:,}", "seconds": f"{t.seconds:.{digits}f}"}
            for layer, e, t in found]


def picture(report: dict[str, Any]) -> Layer:
    """The layer as this report's ranks saw it. UserError if its sizes do not go together."""
    split = Partition.of(GPTConfig(**{name: report["model"][name] for name in SIZES}), report["tp"])
    schedule = Schedule.parse(report.get("sync") or "all", split.n_layer)
    scattered = any(e.op == "reduce_scatter" and e.block in KINDS for e in entries(report))
    return layer(split, schedule, scattered or bool(report.get("sequence_parallel")))

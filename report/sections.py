"""The sections of a page: a function of the report each, and the shape of what it reads.

A report of another shape, a stranger's or an older version's, has these figures in tables instead.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any
from xml.etree.ElementTree import Element

from base.errors import UserError
from base.numbers import nbytes, plural, seconds, share
from model import GPTConfig
from parallel.ledger import Account, Entry, Tally, total
from plan.partition import Partition
from plan.schedule import KINDS, Schedule
from report.diagram import Layer, Message, Place, Sharded, Shared, drawn_ranks
from report.diagram import layer as seen
from report.html import SPREAD, Content, E, at, fits, folded, is_number, note, plain, table, words
from report.svg import Point, Series, chart, legend

Report = dict[str, Any]
Names = Mapping[str, str]
WAYS = ("forward", "backward", "step")
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
FEW, MANY = range(1, 1001), range(1, 10**9)
MODEL = {"n_layer": FEW, "n_head": FEW, "n_embd": MANY, "vocab_size": MANY, "block_size": MANY,
         "bias": bool}
TALLY = {"calls": int, "bytes": int, "seconds": float, "in_flight?": float}
PASSES = {str: {str: TALLY}}
ACCOUNT = {"layers": [{"layer": int, "attention": PASSES, "mlp": PASSES}], "other": {str: PASSES},
           "total": {**TALLY, "fraction_of_time": float}, "forward_passes?": int}
OPEN_SAMPLES = 6  # samples that are not folded


@dataclass(frozen=True)
class Section:
    """shape: all that `make` may read, see html.fits. make: None if there is nothing to show."""

    title: str
    shape: dict[str, Any]
    make: Callable[[Report], Content]

    def draw(self, report: Report) -> Element | None:
        given = all(report.get(key) or key.endswith("?") for key in self.shape)
        content = self.make(report) if given and fits(report, self.shape) else None
        return None if content is None else E("section", E("h2", self.title), content)


def bar(parts: Mapping[str, float], most: float) -> Element:
    """Parts side by side, on a scale that ends at `most`."""
    widths = {class_: 100 * part / (most or 1) for class_, part in parts.items() if part > 0}
    drawn = [E("i", class_=class_, style=f"width:{width:.2f}%") for class_, width in widths.items()]
    return E("div", drawn, class_="bar")


def listing(items: Mapping[str, Any], parts: Names, columns: Names) -> Content:
    """A table of items by name, with a bar each. Figures that an item lacks are left out.

    parts: {path of a part of the bar: its class}. columns: {head: path}.
    """
    bars = {name: {k: size for path, k in parts.items() if is_number(size := at(item, path))}
            for name, item in items.items()}
    most = max((sum(sizes.values()) for sizes in bars.values()), default=0)
    rows = []
    for name, item in items.items():
        cells = {head: plain(at(item, path), path) for head, path in columns.items()}
        rows.append({"": E("b", name), " ": bar(bars[name], most) if parts else "", **cells})
    used = {class_ for sizes in bars.values() for class_, size in sizes.items() if size}
    names = [(class_, words(path)) for path, class_ in parts.items() if class_ in used]
    return [legend(names) if len(parts) > 1 else None, table(rows)]


# --- the run ----------------------------------------------------------------------------------


def entries(report: Report) -> Account:
    """Its account: each layer's attention and MLP in turn, then the rest. Empty if it has none."""
    account = report.get("comm_account") or {"layers": [], "other": {}}
    blocks = [(layer["layer"], kind, layer[kind]) for layer in account["layers"] for kind in KINDS]
    blocks += [(None, block, passes) for block, passes in account["other"].items()]
    return {Entry(number, block, direction, op):
            Tally(t["calls"], t["bytes"], t["seconds"], t.get("in_flight", 0.0))
            for number, block, passes in blocks
            for direction, ops in passes.items() for op, t in ops.items()}


def account_rows(account: Account, digits: int = 6) -> list[dict[str, str]]:
    """The cells of a table: a row for each collective, then their sum. digits: of seconds."""
    found = [("-" if e.layer is None else str(e.layer), e, tally) for e, tally in account.items()]
    found.append(("", Entry(None, "sum", "", ""), total(account)))
    return [{"layer": layer, "block": e.block, "pass": e.direction, "collective": e.op,
             "calls": f"{t.calls:,}", "bytes": f"{t.bytes:,}", "seconds": f"{t.seconds:.{digits}f}"}
            for layer, e, t in found]


def picture(report: Report) -> Layer:
    """The layer as this report's ranks saw it. UserError if its sizes do not go together."""
    split = Partition.of(GPTConfig(**{name: report["model"][name] for name in SIZES}), report["tp"])
    schedule = Schedule.parse(report.get("sync") or "all", split.n_layer)
    scattered = any(e.op == "reduce_scatter" and e.block in KINDS for e in entries(report))
    return seen(split, schedule, scattered or bool(report.get("sequence_parallel")))


def halves(layer: Layer, notes: Mapping[tuple[str, str, str], str],
           forward_only: bool) -> Iterator[Element]:
    """Attention and MLP, each a picture.

    notes: {(block, pass, collective): text at its message}. forward_only: there was no backward.
    """
    for kind, places in layer.halves.items():
        uses = Counter((way, op) for place in places if isinstance(place, Message)
                       for way, ops in place.passes.items() for op in ops)
        # The account has one sum for a collective that the picture has twice: show it at neither.
        known = {key: notes.get((kind, *key), "") for key, n in uses.items() if n == 1}
        yield E("div", [_place(place, layer.split.tp, known, forward_only) for place in places],
                class_="half")


def _place(place: Place, tp: int, notes: Mapping[tuple[str, str], str],
           forward_only: bool) -> Element:
    if isinstance(place, Shared):
        class_ = "stream" if place.stream else "shared"
        return E("p", E("code", place.name), f" {place.note}", class_=class_)
    if isinstance(place, Sharded):
        parts = [E("code", name, class_=f"part {kind}") for name, kind in place.parts]
        return E("div", ["…" if rank is None else E(
            "div", E("b", f"rank {rank}"), E("small", place.shares[rank]), parts, class_="rank")
            for rank in drawn_ranks(tp)], class_="ranks")
    rows = []
    for line in place.words:
        way = line.partition(":")[0]
        ops = place.passes.get(way, ())
        rows += [E("p", line), *(E("small", f"{op}: " * (len(ops) > 1), notes[way, op])
                                  for op in ops if notes.get((way, op)))]
    way = "unused" if forward_only and not place.forward else "backward"
    class_ = "left-out" if not place.times else "forward" if place.forward else way
    point = E("b", "sync point") if place.sync and place.times else None
    return E("div", E("code", place.name), E("div", rows), point, class_=f"message {class_}")


def diagram(report: Report) -> Content:
    try:
        layer = picture(report)
    except UserError:
        return None  # sizes or a schedule that do not go together
    tp, syncs = layer.split.tp, layer.schedule.syncs
    found = entries(report) if tp > 1 else {}
    notes = {}
    for block, way, op in {(e.block, e.direction, e.op) for e in found}:
        t = total(found, block=block, direction=way, op=op)
        text = f"{t.calls:,} calls, {nbytes(t.bytes)}, {seconds(t.seconds)}"
        notes[block, way, op.replace("_", "-")] = text
    forward_only = bool(found) and not total(found, direction="backward").calls
    names = [("column", "column-parallel"), ("row", "row-parallel")]
    names += [("forward", "communication, forward")] * (tp > 1)
    names += [("backward", "backward")] * (tp > 1 and not forward_only)
    summed = " Calls, bytes and seconds are those of all layers together." * bool(found)
    drawn = [note(f"{layer.title[0].upper()}{layer.title[1:]}.{summed}"),
             E("div", halves(layer, notes, forward_only), class_="halves"), legend(names)]
    if tp == 1:
        return drawn
    marks = [E("i", class_="on" if sync else "off") for sync in syncs]
    pairs = [E("span", marks[i : i + 2], E("small", str(i // 2))) for i in range(0, len(marks), 2)]
    return [*drawn, note("Sync points, layer by layer: after attention and after the MLP. ",
                         f"{sum(syncs)} of {len(syncs)}",
                         "." if all(syncs) else
                         ", the other sums are waited for later." if layer.schedule.delay else
                         ", the others are left out."),
            E("div", pairs, class_="strip")]


def by_layer(report: Report) -> Content:
    found = entries(report)
    if not found:
        return note("One rank: nothing is communicated.")
    timed = any(tally.seconds for tally in found.values())
    places: dict[str, Counter[str]] = defaultdict(Counter)
    for e, t in found.items():
        name = e.block if e.layer is None else f"{e.layer} {e.block}"
        places[name].update({**asdict(t), e.direction: t.seconds if timed else t.bytes})
    columns = {**({"time": "seconds"} if timed else {}), "bytes": "bytes", "calls": "calls"}
    return [note(f"{report['comm_account'].get('forward_passes') or 0:,} forward passes. Time: ",
                 "rank 0's clock, waiting for the others included; bytes: handed in by a rank."),
            listing(places, {way: way for way in WAYS}, columns),
            folded(f"The account, {plural(len(found), 'line')}", table(account_rows(found)))]


def shares(report: Report) -> Content:
    found, both = entries(report), report["comm_account"]["total"]
    if not both["fraction_of_time"] or not both["seconds"]:
        return None
    whole = both["seconds"] / both["fraction_of_time"]
    ways = {way: total(found, direction=way).seconds for way in WAYS}
    parts = {"compute": max(0.0, whole - sum(ways.values())), **ways}
    names = {"compute": "compute and all else", "step": "collectives, between passes"}
    names = {way: names.get(way, f"collectives, {way}") for way in parts}
    labels = [(way, f"{names[way]}: {seconds(took)}, {share(took / whole)}")
              for way, took in parts.items() if took]
    text = f"{share(both['fraction_of_time'])} of {seconds(whole)} were spent in collectives"
    return [note(f"{text} (rank 0's clock)."),
            E("div", bar(parts, sum(parts.values())), class_="whole"), legend(labels)]


def losses(report: Report) -> Content:
    series = []
    for name, prefix, colour in (("a training batch", "", "c0"), ("validation", "val_", "c3")):
        curve = (report["loss_curve"][f"{prefix}{key}"] for key in ("iter", "loss"))
        points = [Point(x, y, f"iteration {x:,}: {y:.4f}") for x, y in zip(*curve, strict=False)]
        series.append(Series(name, points, colour))
    return chart(series, "iteration", "loss", read=lambda x: f"{x:,.0f}")


def samples(report: Report) -> Content:
    drawn = [E("blockquote", E("span", one["prompt"], class_="prompt"), one["text"])
             for one in report["samples"]]
    hidden = drawn[OPEN_SAMPLES:]
    return [drawn[:OPEN_SAMPLES], folded(f"{len(hidden)} more", hidden) if hidden else None]


# --- dropped sync points ----------------------------------------------------------------------


def messages(row: Report) -> float:
    """All-reduces a token that are waited for at once: a schedule's, and the embedding's."""
    return float(row["points"] + 1)


def scan(report: Report) -> Content:
    fewer, others = [report["plain"], *report["curve"]], report["others"]
    chosen = [report["chosen"]] if report.get("chosen") else []
    groups = (("ever fewer sync points", "c0", fewer), ("other schedules", "c3", others),
              ("within the budget", "c2", chosen))

    def drawn(x: Callable[[Report], float], axis: str) -> Element | None:
        series = []
        for name, colour, rows in groups:
            points = [Point(x(row), row["perplexity"],
                            f"--sync={row['sync']}: {row['perplexity']:.4f}, {row['loss']:+.2%}",
                            row["sync"] if rows is others and len(row["sync"]) < 9 else "")
                      for row in rows]
            joined = rows is fewer and x is messages  # fewer messages do not always take less time
            series.append(Series(name, points, colour, joined))
        return chart(series, axis, "perplexity", log=(False, True))

    cells = [{"sync points": str(row["points"]),
              "perplexity": f"{row['perplexity']:.4f}", "lost": f"{row['loss']:+.2%}",
              "ms a token": plain(row.get("ms_per_token")), "--sync=": row["sync"]}
             for row in {row["sync"]: row for row in [*fewer, *others, *chosen]}.values()]
    alone = {name: {"length": max(0.0, row["loss"]), "lost": f"{row['loss']:+.2%}"}
             for name, row in report["single"].items()}
    single = note("Perplexity lost without one sync point (a: after the layer's ",
                  "attention, m: after its MLP).")
    charts = [drawn(messages, "all-reduces a token that are waited for at once"),
              drawn(lambda row: at(row, "ms_per_token.median") or math.nan, "ms a token, measured"),
              E("figure", single, listing(alone, {"length": "c3"}, {"lost": "lost"}))]
    return [note(f"Perplexity of {report['tokens']:,} tokens on {report['tp']} ranks. Fewer ",
                 "waits are to the left; the embedding's is counted."),
            E("div", charts, class_="charts"), table(cells)]


# --- measurements -----------------------------------------------------------------------------


def strategies(report: Report) -> Content:
    text = """Of a layer, a forward and a backward pass. Told: bytes of one rank's messages; on the
        wire (the bars): sent by a rank if they travel in rings; weights: of the rank with most;
        kept: for the backward pass, without weights; between passes: a sum of partial gradients,
        one for all layers."""
    items = {f"tp {line['tp']} {line['strategy']}": line for line in report["lines"]}
    return [note(text), listing(items, {"bytes_on_the_wire": "forward"}, STRATEGY)]


def unit_of(report: Report) -> str:
    """The key of the parties' rates, such as tokens/s; "" if there is none."""
    party = at(report, "parties.nanotp")
    keys = party if isinstance(party, dict) else ()
    return next((key for key in keys if key not in ("rounds", "ratio")), "")


def parties(report: Report) -> Content:
    unit = unit_of(report)
    columns = {f"{unit}, median (lowest to highest)": unit, "rounds": "rounds",
               "nanoTP is so many times as fast": "ratio"}
    return listing(report["parties"], {f"{unit}.median": "c0"}, columns) if unit else None


def sizes(report: Report) -> Content:
    rows, series = report["sizes"], []
    for name, colour in zip(rows[0]["us"], cycle(COLOURS), strict=False):
        times = [(row["bytes"], row["us"][name]) for row in rows if name in row["us"]]
        points = [Point(x, us["median"], f"{nbytes(x)}: {plain(us)} µs") for x, us in times]
        series.append(Series(name, points, colour))
    axes = "bytes of a message", "microseconds of an all-reduce"
    drawn = chart(series, *axes, log=(True, True), read=nbytes)
    items = {nbytes(row["bytes"]): row for row in rows}
    columns = {f"{name}, µs": f"us.{name}" for name in rows[0]["us"]}
    return E("div", drawn, listing(items, {}, columns), class_="charts")


# --- all of them ------------------------------------------------------------------------------

STRATEGY = {
    "collectives forward": "calls.forward", "backward": "calls.backward",
    "between passes": "calls.step", "told": "bytes_told", "on the wire": "bytes_on_the_wire",
    "weights a rank": "weight_bytes", "kept": "kept_bytes", "time": "seconds",
    "in collectives": "share_in_collectives.median", "largest error": "error"}
POINT = {"sync": str, "points": int, "perplexity": float, "loss": float, "ms_per_token?": SPREAD,
         "all_reduces_per_token?": float}
CURVE = dict.fromkeys(("iter", "loss", "val_iter", "val_loss"), [float])
SECTIONS = (
    Section("One layer, as its ranks see it",
            {"model": MODEL, "tp": FEW, "sync?": str, "comm_account?": ACCOUNT}, diagram),
    Section("Every strategy", {"lines": [{"tp": int, "strategy": str}]}, strategies),
    Section("Perplexity against all-reduces", {
        "plain": POINT, "curve": [POINT], "others": [POINT], "single": {str: POINT},
        "chosen?": POINT, "tp": int, "tokens": int}, scan),
    Section("Side by side", {"parties": {str: dict}}, parties),
    Section("Messages", {"sizes": [{"bytes": float, "us": {str: SPREAD}}]}, sizes),
    Section("Loss", {"loss_curve": CURVE}, losses),
    Section("Compute and communication", {"comm_account": ACCOUNT}, shares),
    Section("Communication, layer by layer", {"comm_account": ACCOUNT}, by_layer),
    Section("Samples", {"samples": [{"prompt": str, "text": str}]}, samples))

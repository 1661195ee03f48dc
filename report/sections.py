"""The sections of a page: a function of the report each, and the shape of what it reads.

A report of another shape, a stranger's or an older version's, has these figures in tables instead.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any
from xml.etree.ElementTree import Element

from base.errors import UserError
from base.numbers import nbytes, number, plural, seconds, share
from parallel.ledger import Tally, total
from report import account
from report.html import Content, E, facts, folded, note, plain, spread, table, words
from report.shapes import ACCOUNT, FEW, MODEL, SPREAD, at, fits, is_number
from report.svg import Point, Series, chart, halves, legend

Report = dict[str, Any]
Names = Mapping[str, str]
WAYS = ("forward", "backward", "step")
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
MOST_SAMPLES, OPEN_SAMPLES = 60, 6  # samples on a page, and those that are not folded


@dataclass(frozen=True)
class Section:
    """shape: all that `make` may read, see shapes.fits. make: None if there is nothing to show."""

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


def figures(key: str) -> Callable[[Report], Content]:
    return lambda report: facts((words(k), plain(v, k)) for k, v in report[key].items())


# --- the run ----------------------------------------------------------------------------------


def diagram(report: Report) -> Content:
    try:
        layer = account.picture(report)
    except UserError:
        return None  # sizes or a schedule that do not go together
    tp, syncs = layer.split.tp, layer.schedule.syncs
    found = account.entries(report) if tp > 1 else {}
    sums: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
    for e, tally in found.items():
        sums[e.block, e.direction, e.op.replace("_", "-")].add(tally)
    notes = {key: f"{t.calls:,} calls, {nbytes(t.bytes)}, {seconds(t.seconds)}"
             for key, t in sums.items()}
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
    text = "Sync points, layer by layer: after attention and after the MLP. "
    text += f"{sum(syncs)} of {len(syncs)}{'' if all(syncs) else ', the others are left out'}."
    return [*drawn, note(text), E("div", pairs, class_="strip")]


def by_layer(report: Report) -> Content:
    found = account.entries(report)
    if not found:
        return note("One rank: nothing is communicated.")
    timed = any(tally.seconds for tally in found.values())
    places: dict[str, Counter[str]] = defaultdict(Counter)
    for e, t in found.items():
        name = e.block if e.layer is None else f"{e.layer} {e.block}"
        places[name].update({**asdict(t), e.direction: t.seconds if timed else t.bytes})
    columns = {"bytes": "bytes", "calls": "calls"}
    if timed:
        columns = {"time": "seconds", **columns}
    text = f"{report['comm_account'].get('forward_passes') or 0:,} forward passes. Time: rank 0's "
    text += "clock, waiting for the others included; bytes: handed in by a rank."
    lines = folded(f"The account, {plural(len(found), 'line')}", table(account.rows(found)))
    return [note(text), listing(places, {way: way for way in WAYS}, columns), lines]


def shares(report: Report) -> Content:
    found, both = account.entries(report), report["comm_account"]["total"]
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
    return [note(f"{text} (rank 0's clock)."), whole_bar(parts), legend(labels)]


def measured_shares(report: Report) -> Content:
    found = report["share_in_collectives"]
    text = f"{spread(found, share)} of the time was spent in collectives (rank 0's clock)."
    drawn = whole_bar({"compute": 1 - found["median"], "forward": found["median"]})
    return [note(text), drawn, legend([("compute", "compute"), ("forward", "collectives")])]


def whole_bar(parts: Mapping[str, float]) -> Element:
    return E("div", bar(parts, sum(parts.values())), class_="whole")


def memory(report: Report) -> Content:
    rest = "all else up to the peak (the process, activations, optimizer)"
    items = {}
    for rank, sizes in enumerate(zip(*(report["memory"][kind] for kind in RANKS), strict=False)):
        weights, cache, peak = sizes
        cached = f", KV cache {nbytes(cache)}" if cache else ""
        text = E("span", f"weights {nbytes(weights)}{cached}, peak {nbytes(peak)}")
        items[f"rank {rank}"] = {"weights": weights, "KV cache": cache, "text": text,
                                 rest: max(0, peak - weights - cache)}
    return listing(items, {"weights": "c0", "KV cache": "c1", rest: "compute"}, {"  ": "text"})


def losses(report: Report) -> Content:
    series = []
    for name, prefix, colour in (("a training batch", "", "c0"), ("validation", "val_", "c3")):
        curve = (report["loss_curve"][f"{prefix}{key}"] for key in ("iter", "loss"))
        points = [Point(x, y, f"iteration {x:,}: {y:.4f}") for x, y in zip(*curve, strict=False)]
        series.append(Series(name, points, colour))
    return chart(series, "iteration", "loss", read=lambda x: f"{x:,.0f}")


def samples(report: Report) -> Content:
    every = report["samples"]
    drawn = [E("blockquote", E("span", one["prompt"], class_="prompt"), one["text"])
             for one in every[:MOST_SAMPLES]]
    hidden, more = drawn[OPEN_SAMPLES:], len(every) - MOST_SAMPLES
    return [drawn[:OPEN_SAMPLES], folded(f"{len(hidden)} more", hidden) if hidden else None,
            note(f"{more:,} more are in the report below.") if more > 0 else None]


# --- dropped sync points ----------------------------------------------------------------------


def messages(row: Report) -> float:
    """All-reduces a token: as counted, else a schedule's sync points and the embedding's."""
    return float(row.get("all_reduces_per_token") or row["points"] + 1)


def milliseconds(row: Report) -> float:
    return float(at(row, "ms_per_token.median") or math.nan)


def scan(report: Report) -> Content:
    fewer, others = [report["plain"], *report["curve"]], report["others"]
    chosen = [report["chosen"]] if report.get("chosen") else []
    groups = (("ever fewer sync points", "c0", fewer), ("other schedules", "c3", others),
              ("within the budget", "c2", chosen))

    def drawn(x: Callable[[Report], float], axis: str) -> Element | None:
        series = []
        for name, colour, rows in groups:
            points = []
            for row in rows:
                label = row["sync"] if rows is others and len(row["sync"]) < 9 else ""
                title = f"--sync={row['sync']}: {row['perplexity']:.4f}, {row['loss']:+.2%}"
                points.append(Point(x(row), row["perplexity"], title, label))
            joined = rows is fewer and x is messages  # fewer messages do not always take less time
            series.append(Series(name, points, colour, joined))
        return chart(series, axis, "perplexity", log=(False, True))

    cells = [{"sync points": str(row["points"]), "all-reduces a token": number(messages(row)),
              "perplexity": f"{row['perplexity']:.4f}", "lost": f"{row['loss']:+.2%}",
              "ms a token": plain(row.get("ms_per_token")), "--sync=": row["sync"]}
             for row in {row["sync"]: row for row in [*fewer, *others, *chosen]}.values()]
    alone = {name: {"length": max(0.0, row["loss"]), "lost": f"{row['loss']:+.2%}"}
             for name, row in report["single"].items()}
    text = "Perplexity lost where one sync point alone goes"
    single = note(f"{text} (a: after the layer's attention, m: after its MLP).")
    charts = [drawn(messages, "all-reduces a token"), drawn(milliseconds, "ms a token, measured"),
              E("figure", single, listing(alone, {"length": "c3"}, {"lost": "lost"}))]
    text = f"Perplexity of {report['tokens']:,} tokens on {report['tp']} ranks. Fewer all-reduces a"
    text += " token are to the left; the embedding's is counted."
    return [note(text), E("div", charts, class_="charts"), table(cells)]


def repair(report: Report) -> Content:
    text = f"Perplexity of {report['tokens']:,} tokens on {report['tp']} ranks under --sync="
    text += f"{report['sync']}: with all sync points (dense), before and after repair."
    return [note(text), plain(report["evidence"])]


# --- measurements -----------------------------------------------------------------------------


def strategies(report: Report) -> Content:
    text = """Of a layer, a forward and a backward pass. Told: bytes of one rank's messages; on the
        wire (the bars): sent by a rank if they travel in rings; weights: of the rank with most;
        kept: for the backward pass, without weights; between passes: a sum of partial gradients,
        one for all layers."""
    items = {f"tp {line['tp']} {line['strategy']}": line for line in report["lines"]}
    wires = {name: line for name, line in items.items() if line["tp"] > 1}
    bars = listing(wires, {"bytes_on_the_wire": "forward"}, {"on the wire": "bytes_on_the_wire"})
    return [note(text), bars, listing(items, {}, STRATEGY)]


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
        points = [Point(x, us["median"], f"{nbytes(x)}: {spread(us)} µs") for x, us in times]
        series.append(Series(name, points, colour))
    axes = "bytes of a message", "microseconds of an all-reduce"
    drawn = chart(series, *axes, log=(True, True), read=nbytes)
    items = {nbytes(row["bytes"]): row for row in rows}
    columns = {f"{name}, µs": f"us.{name}" for name in rows[0]["us"]}
    return E("div", drawn, listing(items, {}, columns), class_="charts")


def layouts(report: Report) -> Content:
    items = {}
    for row in report["layouts"]:
        names = [f"tp {row['tp']}, dp {row['dp']}", *(LAYOUT[key] for key in LAYOUT if row[key])]
        items[", ".join(names)] = row | {"peak_bytes": row["peak"]}
    text = "Bytes on the rank that has most, the run as asked for first. The peak: all that is"
    drawn = listing(items, PARTS, {"peak": "peak_bytes"})
    return [note(f"{text} there at the worst moment, and the process itself."), drawn,
            folded("All figures", plain(report["layouts"]))]


# --- all of them ------------------------------------------------------------------------------

STRATEGY = {
    "collectives forward": "calls.forward", "backward": "calls.backward",
    "between passes": "calls.step", "told": "bytes_told", "on the wire": "bytes_on_the_wire",
    "weights a rank": "weight_bytes", "kept": "kept_bytes", "time": "seconds",
    "in collectives": "share_in_collectives.median", "largest error": "error"}
PARTS = {"parameters": "c0", "gradients": "c1", "optimizer": "c2", "activations": "c3",
         "temporary": "c4"}
LAYOUT = {"dp_shard": "sharded", "sequence_parallel": "sequence",
          "activation_checkpointing": "recomputed"}
POINT = {"sync": str, "points": int, "perplexity": float, "loss": float, "ms_per_token?": SPREAD,
         "all_reduces_per_token?": float}
SCAN = {"plain": POINT, "curve": [POINT], "tp": int}
REPAIR = {"evidence": {"loss": float}, "points": int, "sync": str, "tp": int}
CURVE = dict.fromkeys(("iter", "loss", "val_iter", "val_loss"), [float])
RANKS = {f"{kind}_bytes_per_rank": [int] for kind in ("weight", "kv_cache", "peak")}
SECTIONS = (
    Section("One layer, as its ranks see it",
            {"model": MODEL, "tp": FEW, "sync?": str, "comm_account?": ACCOUNT}, diagram),
    Section("Every strategy", {"lines": [{"tp": int, "strategy": str}]}, strategies),
    Section("Perplexity against all-reduces", {**SCAN, "others": [POINT], "single": {str: POINT},
                                               "chosen?": POINT, "tokens": int}, scan),
    Section("Repair", {**REPAIR, "tokens": int}, repair),
    Section("Side by side", {"parties": {str: dict}}, parties),
    Section("Messages", {"sizes": [{"bytes": float, "us": {str: SPREAD}}]}, sizes),
    Section("What a rank's memory holds", {"layouts": [
        {"tp": int, "dp": int, "peak": int, **dict.fromkeys(LAYOUT, bool)}]}, layouts),
    Section("Loss", {"loss_curve": CURVE}, losses),
    Section("Evaluation", {"evaluation": {str: float}}, figures("evaluation")),
    Section("Compute and communication", {"comm_account": ACCOUNT}, shares),
    Section("Compute and communication", {"share_in_collectives": SPREAD}, measured_shares),
    Section("Communication, layer by layer", {"comm_account": ACCOUNT}, by_layer),
    Section("Memory of each rank", {"memory": RANKS}, memory),
    Section("Time", {"timing": {str: float}}, figures("timing")),
    Section("Samples", {"samples": [{"prompt": str, "text": str}]}, samples),
)

"""The parts of a page: each is a function of the report that gives elements, and names what of the report it has shown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from base.numbers import nbytes, number, plural, seconds, share
from report import account
from report.drawing import Series, chart, halves, legend
from report.html import Content, E, facts, spread, table, words

Report = dict[str, Any]
WAYS = ("forward", "backward", "step")
MOST_SAMPLES, OPEN_SAMPLES = 60, 6  # how many samples a page has, and how many are not folded away
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")


@dataclass(frozen=True)
class Section:
    """needs: what a report must have for it; shows: what need not be shown again."""

    title: str
    needs: tuple[str, ...]
    shows: tuple[str, ...]
    make: Callable[[Report], Content]


def note(*said: Content) -> Element:
    return E("p", said, class_="note")


def bar(parts: Iterable[tuple[str, float]], most: float) -> Element:
    """A bar of parts side by side, (class, value), on a scale that ends at `most`."""
    found = [(class_, 100 * value / most) for class_, value in parts if most > 0 and value > 0]
    return E("div", [E("i", class_=class_, style=f"width:{width:.2f}%") for class_, width in found], class_="bar")


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], most: float = 0.0) -> Element:
    """A bar a row: its name, its parts, what is said at its end."""
    most = most or max((sum(value for _, value in parts) for _, parts, _ in rows), default=0.0)
    brief = max((len(said) for _, _, said in rows), default=0) <= 12  # room beside the bar on a telephone
    made = [[E("b", name), bar(parts, most), E("span", said)] for name, parts, said in rows]
    return E("div", made, class_="bars brief" if brief else "bars")


# --- the picture ----------------------------------------------------------------------------------------------------


def diagram(report: Report) -> Content:
    made = account.picture(report)
    told: dict[tuple[str, str, str], str] = {}
    found = list(account.told(report["comm_account"])) if "comm_account" in report and made.split.tp > 1 else []
    for kind, way, op in {(line.block, line.direction, line.op) for line in found}:
        mine = [line for line in found if (line.block, line.direction, line.op) == (kind, way, op)]
        calls, size, took = (sum(figures) for figures in zip(*((x.calls, x.bytes, x.seconds) for x in mine), strict=True))
        told[kind, way, op.replace("_", "-")] = f"{calls:,} calls, {nbytes(size)}, {seconds(took)}"
    kinds = [("column-parallel", "column"), ("row-parallel", "row")]
    silent = bool(found) and not any(line.direction == "backward" for line in found)
    if made.split.tp > 1:
        kinds += [("communication, forward", "forward")] + [("backward", "backward")] * (not silent)
    said = f"{made.title[0].upper()}{made.title[1:]}."
    if found:
        said += " Calls, bytes and seconds are those of all layers together."
    pictures = E("div", halves(made, told, silent), class_="halves")
    return [note(said), pictures, legend(kinds), strip(made.schedule.syncs, made.split.tp)]


def strip(syncs: Sequence[bool], tp: int) -> Content:
    """All layers' sync points."""
    if tp == 1:
        return None
    pairs = [syncs[i : i + 2] for i in range(0, len(syncs), 2)]
    marks = [[E("i", class_="on" if sync else "off") for sync in pair] for pair in pairs]
    cells = [E("span", mark, E("small", str(i))) for i, mark in enumerate(marks)]
    said = f"Sync points, layer by layer: after attention and after the MLP. {sum(syncs)} of {len(syncs)}"
    return [note(f"{said}." if all(syncs) else f"{said}, the others are left out."), E("div", cells, class_="strip")]


# --- the account ----------------------------------------------------------------------------------------------------


def by_layer(report: Report) -> Content:
    made = report["comm_account"]
    found = list(account.told(made))
    if not found:
        return note("One rank: nothing is communicated.")
    places = list(dict.fromkeys((line.layer, line.block) for line in found))
    measured = any(line.seconds for line in found)
    rows = []
    for place in places:
        mine = [line for line in found if (line.layer, line.block) == place]
        size, calls = sum(line.bytes for line in mine), sum(line.calls for line in mine)
        took = sum(line.seconds for line in mine)
        parts = [(way, sum(x.seconds if measured else x.bytes for x in mine if x.direction == way)) for way in WAYS]
        name = place[1] if place[0] == "-" else f"{place[0]} {place[1]}"
        rows.append((name, parts, f"{seconds(took)} · " * measured + f"{nbytes(size)} · {calls:,} ×"))
    total = made["total"]
    spoken = [way for way in WAYS if any(line.direction == way for line in found)]
    cells = [[x.layer, x.block, x.direction, x.op, f"{x.calls:,}", f"{x.bytes:,}", f"{x.seconds:.6f}"] for x in found]
    cells.append(["", "sum", "", "", f"{total['calls']:,}", f"{total['bytes']:,}", f"{total['seconds']:.6f}"])
    head = ("layer", "block", "pass", "collective", "calls", "bytes", "seconds")
    what = "Seconds (rank 0's clock, waiting for the others included)" if measured else "Bytes"
    return [
        note(f"{what}, bytes that a rank handed in, and calls, in {made.get('forward_passes', 0):,} forward passes."),
        legend([(way, way) for way in spoken]),
        bars(rows),
        E("details", E("summary", f"The account, {plural(len(found), 'line')}"), table(head, cells, words=4)),
    ]


def shares(report: Report) -> Content:
    total, found = report["comm_account"]["total"], list(account.told(report["comm_account"]))
    fraction = total["fraction_of_time"]
    if not fraction or not total["seconds"]:
        return None
    whole = total["seconds"] / fraction
    spoken = [(way, sum(line.seconds for line in found if line.direction == way)) for way in WAYS]
    spoken = [(way, took) for way, took in spoken if took]
    rest = max(0.0, whole - sum(took for _, took in spoken))
    names = {"forward": "collectives, forward", "backward": "collectives, backward", "step": "collectives, between passes"}
    cells = [["compute and all else", seconds(rest), share(rest / whole)]]
    cells += [[names[way], seconds(took), share(took / whole)] for way, took in spoken]
    return [
        note(f"{share(fraction)} of {seconds(whole)} were spent in collectives (rank 0's clock)."),
        E("div", bar([("compute", rest), *spoken], whole), class_="whole"),
        legend([("compute", "compute"), *((names[way], way) for way, _ in spoken)]),
        table(("", "time", "share"), cells),
    ]


def measured_shares(report: Report) -> Content:
    found = report["share_in_collectives"]
    middle = found["median"]
    said = f"{share(middle)} of the time was spent in collectives, {share(found['min'])} to {share(found['max'])} by round."
    colours = [("compute", "compute"), ("collectives", "forward")]
    parts = [("compute", 1 - middle), ("forward", middle)]
    return [note(f"{said} (Rank 0's clock.)"), E("div", bar(parts, 1.0), class_="whole"), legend(colours)]


# --- memory and time ------------------------------------------------------------------------------------------------


def memory(report: Report) -> Content:
    made = report["memory"]
    rows = []
    ranks = zip(made["weight_bytes_per_rank"], made["kv_cache_bytes_per_rank"], made["peak_bytes_per_rank"], strict=True)
    for rank, (weights, cache, peak) in enumerate(ranks):
        parts = [("c0", weights), ("c1", cache), ("compute", max(0, peak - weights - cache))]
        cached = f", KV cache {nbytes(cache)}" if cache else ""
        rows.append((f"rank {rank}", parts, f"weights {nbytes(weights)}{cached}, peak {nbytes(peak)}"))
    rest = "all else up to the peak (the process, activations, optimizer)"
    colours = [("weights", "c0"), ("KV cache", "c1"), (rest, "compute")]
    return [legend(colours if any(made["kv_cache_bytes_per_rank"]) else [colours[0], colours[2]]), bars(rows)]


def timing(report: Report) -> Content:
    cells = []
    for key, value in report["timing"].items():
        rate = "_per_s" in key
        named = words(key.removesuffix("_per_s") + "/s" if rate else key.removesuffix("_s"))
        cells.append((named, seconds(value) if key.endswith("_s") and not rate else number(value)))
    return facts(cells)


def evaluation(report: Report) -> Content:
    return facts((words(key), number(value)) for key, value in report["evaluation"].items())


def losses(report: Report) -> Content:
    made = report["loss_curve"]
    train = [(x, y, f"iteration {x:,}: {y:.4f}") for x, y in zip(made["iter"], made["loss"], strict=True)]
    val = [(x, y, f"iteration {x:,}: {y:.4f}") for x, y in zip(made["val_iter"], made["val_loss"], strict=True)]
    series = [Series("a training batch", train, "c0"), Series("validation", val, "c3")]
    return chart(series, "iteration", "loss", read=lambda x: f"{x:,.0f}")


# --- dropped sync points --------------------------------------------------------------------------------------------


def scan(report: Report) -> Content:
    plain, steps, others = report["plain"], report["curve"], report["others"]
    chosen = report.get("chosen")

    def point(row: Report, x: float) -> tuple[float, float, str]:
        return x, row["perplexity"], f"--sync={row['sync']}: {row['perplexity']:.4f}, {row['loss']:+.2%}"

    def series(rows: Sequence[Sequence[Report]], across: Callable[[Report], float]) -> list[Series]:
        fewer, named, fit = ([point(row, across(row)) for row in group] for group in rows)
        labels = [row["sync"] if len(row["sync"]) < 9 else "" for row in rows[1]]
        fall = Series("ever fewer sync points", fewer, "c0", joined=across is messages)  # times go back and forth
        return [fall, Series("other schedules", named, "c3", False, labels), Series("within the budget", fit, "c2", False)]

    rows = [[plain, *steps], others, [chosen] if chosen else []]
    drawn = [chart(series(rows, messages), "all-reduces a token", "perplexity", ("linear", "log"))]
    timed = [[row for row in group if "ms_per_token" in row] for group in rows]
    if any(timed):
        drawn.append(chart(series(timed, milliseconds), "ms a token, measured", "perplexity", ("linear", "log")))
    listed = list({row["sync"]: row for row in [plain, *steps, *others, *rows[2]]}.values())
    head = ["sync points", "all-reduces a token", "perplexity", "lost", *["ms a token"] * any(timed), "--sync="]
    cells = [[str(r["points"]), number(messages(r)), f"{r['perplexity']:.4f}", f"{r['loss']:+.2%}",
              *[spread(r["ms_per_token"]) if "ms_per_token" in r else ""] * any(timed), r["sync"]] for r in listed]  # fmt: skip
    said = f"Perplexity of {report['tokens']:,} tokens on {report['tp']} ranks. "
    said += "Fewer all-reduces a token are to the left; the embedding's is counted."
    alone = [(name, [("c3", max(0.0, row["loss"]))], f"{row['loss']:+.2%}") for name, row in report["single"].items()]
    means = note("Perplexity lost where one sync point alone goes (a: after the layer's attention, m: after its MLP).")
    listing = E("div", table(head, cells, words=0), class_="named-last")
    return [note(said), E("div", drawn, E("figure", means, bars(alone)), class_="charts"), listing]


def messages(row: Report) -> float:
    """All-reduces a token: counted where that was done, else a schedule's sync points and the embedding's."""
    return float(row.get("all_reduces_per_token", row["points"] + 1))


def milliseconds(row: Report) -> float:
    return float(row["ms_per_token"]["median"])


def repair(report: Report) -> Content:
    made = report["evidence"]
    dense = made["dense"]
    stages = [("all sync points", dense), (f"{report['points']} of them, before repair", made["before"])]
    stages += [("after the runs", made["by_run"]["perplexity"])] if "by_run" in made else []
    stages += [("after end to end", made["whole"]["perplexity"])] if "whole" in made else []
    stages += [("the dense model, as many steps on", made["control"])] if "control" in made else []
    rows = [(name, [("c0" if value <= dense else "c3", abs(value / dense - 1))], f"{value:.4f} ({value / dense - 1:+.2%})")
            for name, value in stages]  # fmt: skip
    parts = [[", ".join(run["run"]), f"{run['error'][0]:.3g}", f"{run['error'][1]:.3g}"] for run in made["runs"]]
    said = f"Perplexity of {report['tokens']:,} tokens on {report['tp']} ranks under --sync={report['sync']}; the bars are its "
    runs = table(("run of sub-blocks", "mean squared error before", "after"), parts) if parts else None
    return [note(f"{said}distance from the one with all sync points."), bars(rows), runs]


# --- measurements ---------------------------------------------------------------------------------------------------


def parties(report: Report) -> Content:
    drawn = []
    unit = unit_of(report["parties"])
    found = {name: party[unit] for name, party in report["parties"].items()}
    top = max(one["max"] for one in found.values())
    cells = []
    for name, one in found.items():
        ratio = report["parties"][name].get("ratio")
        drawn.append((name, [("c0" if name == "nanotp" else "compute", one["median"])], f"{number(one['median'])} {unit}"))
        rounds = ", ".join(number(value) for value in report["parties"][name]["rounds"])
        cells.append([name, spread(one), "" if name == "nanotp" or not ratio else spread(ratio), rounds])
    head = ("", f"{unit}, median (lowest to highest)", "nanoTP is so many times as fast", "rounds")
    return [bars(drawn, top), table(head, cells)]


def unit_of(parties: Mapping[str, Any]) -> str:
    """What rates are measured in: the name that they have in a report."""
    return next(key for key in parties["nanotp"] if key not in ("rounds", "ratio"))


def strategies(report: Report) -> Content:
    rows = report["lines"]
    timed = any("seconds" in row for row in rows)
    head = ["tp", "strategy", "collectives forward", "backward", "told", "on the wire", "weights a rank", "kept"]
    head += ["ms", "in collectives", "largest error"] * timed
    cells = []
    for row in rows:
        calls = row["calls"]
        kept = nbytes(row["kept_bytes"]) if "kept_bytes" in row else ""
        step = " + 1" if calls["step"] else ""
        cell = [str(row["tp"]), row["strategy"], number(calls["forward"]), f"{number(calls['backward'])}{step}"]
        cell += [nbytes(row["bytes_told"]), nbytes(row["bytes_on_the_wire"]), nbytes(row["weight_bytes"]), kept]
        if timed and "seconds" in row:
            times = {key: 1e3 * value for key, value in row["seconds"].items()}
            cell += [spread(times), share(row["share_in_collectives"]["median"]), f"{row['error']:.1e}"]
        elif timed:
            cell += ["counted", "", ""]
        cells.append(cell)
    wires = [(f"tp {row['tp']} {row['strategy']}", [("forward", row["bytes_on_the_wire"])], nbytes(row["bytes_on_the_wire"]))
             for row in rows if row["tp"] > 1]  # fmt: skip
    return [
        note("Of a layer, a forward and a backward pass. Told: bytes of one rank's messages; on the wire: what a rank sends of "
             "them in rings, drawn below; weights: of the rank with most; kept: for the backward pass, without weights; + 1: "
             "one sum of partial gradients for all layers."),
        bars(wires),
        table(head, cells, words=2),
    ]  # fmt: skip


def sizes(report: Report) -> Content:
    rows = report["sizes"]
    names = list(rows[0]["us"])
    series = []
    for name, colour in zip(names, COLOURS, strict=False):
        times = [(row["bytes"], row["us"][name]) for row in rows]
        points = [(size, us["median"], f"{nbytes(size)}: {spread(us)} µs") for size, us in times]
        series.append(Series(name, points, colour))
    cells = [[nbytes(row["bytes"]), *(spread(row["us"][name]) for name in names)] for row in rows]
    head = ["message", *(f"{name}, µs" for name in names)]
    drawn = chart(series, "bytes of a message", "microseconds of an all-reduce", ("log", "log"), nbytes)
    return E("div", drawn, table(head, cells), class_="charts")


def layouts(report: Report) -> Content:
    kinds = {"parameters": "c0", "gradients": "c1", "optimizer": "c2", "activations": "c3", "temporary": "c4"}
    kinds = {name: colour for name, colour in kinds.items() if name in report["layouts"][0]}
    options = {"dp_shard": "sharded", "sequence_parallel": "sequence", "activation_checkpointing": "recomputed"}
    rows = []
    for row in report["layouts"]:
        name = ", ".join([f"tp {row['tp']}, dp {row['dp']}", *(said for key, said in options.items() if row[key])])
        rows.append((name, [(colour, row[part]) for part, colour in kinds.items()], f"peak {nbytes(row['peak'])}"))
    said = "Bytes on the rank that has most, the run as asked for first. The peak: all that is there at the worst moment, and "
    keys = ["tp", "dp", *options, *kinds, "kv_cache", "live", "peak"]
    cells = [[nbytes(row[k]) if k in row and k not in ("tp", "dp", *options) else str(row.get(k, "")) for k in keys]
             for row in report["layouts"]]  # fmt: skip
    whole = E("details", E("summary", "All figures"), table([words(key) for key in keys], cells, words=0))
    return [note(f"{said}the process itself."), legend(kinds.items()), bars(rows), whole]


def samples(report: Report) -> Content:
    pairs = [(one["prompt"], one["text"]) for one in report["samples"][:MOST_SAMPLES]]
    shown = [E("blockquote", E("span", prompt, class_="prompt"), said) for prompt, said in pairs]
    more = len(report["samples"]) - MOST_SAMPLES
    return [
        shown[:OPEN_SAMPLES],
        E("details", E("summary", f"{len(shown) - OPEN_SAMPLES} more"), shown[OPEN_SAMPLES:]) if shown[OPEN_SAMPLES:] else None,
        note(f"{more:,} more are in the report below.") if more > 0 else None,
    ]


SCAN = ("plain", "curve", "single", "others")
SECTIONS = (
    Section("One layer, as its ranks see it", ("model",), (), diagram),
    Section("Every strategy", ("lines",), ("lines",), strategies),
    Section("Perplexity against all-reduces", SCAN, (*SCAN, "chosen", "tokens"), scan),
    Section("Repair", ("evidence", "points"), ("evidence", "points", "tokens"), repair),
    Section("Side by side", ("parties",), ("parties",), parties),
    Section("Messages", ("sizes",), ("sizes",), sizes),
    Section("What a rank's memory holds", ("layouts",), ("layouts",), layouts),
    Section("Loss", ("loss_curve",), ("loss_curve",), losses),
    Section("Evaluation", ("evaluation",), ("evaluation",), evaluation),
    Section("Compute and communication", ("comm_account",), (), shares),
    Section("Compute and communication", ("share_in_collectives",), ("share_in_collectives",), measured_shares),
    Section("Communication, layer by layer", ("comm_account",), ("comm_account",), by_layer),
    Section("Memory of each rank", ("memory",), ("memory",), memory),
    Section("Time", ("timing",), ("timing",), timing),
    Section("Samples", ("samples",), ("samples",), samples),
)

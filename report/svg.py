"""A page's pictures, as SVG: the two halves of a layer, and curves. A unit is a pixel on a phone.

Colours are classes of style.css, so that they follow the reader's choice of light or dark.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree.ElementTree import Element

from base.numbers import number
from report.diagram import Layer, Message, Sharded, Shared, drawn_ranks
from report.html import E

WIDE = 340  # of a half of a layer
MIDDLE = WIDE / 2
GAP = 13  # between two places

def text(x: float, y: float, words: str, class_: str = "", anchor: str = "middle") -> Element:
    return E("text", words, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def box(x: float, y: float, wide: float, high: float, class_: str, corner: float = 5) -> Element:
    return E("rect", x=x, y=y, width=wide, height=high, rx=corner, class_=class_)


def legend(names: Iterable[tuple[str, str]]) -> Element:
    """names: (class, what has its colour)."""
    chips = [E("span", E("i", class_=f"chip {class_}"), name) for class_, name in names]
    return E("p", chips, class_="legend")


# --- a layer ----------------------------------------------------------------------------------

Drawn = tuple[list[Element], float]  # with its height


def halves(
    layer: Layer, notes: Mapping[tuple[str, str, str], str], forward_only: bool
) -> Iterator[Element]:
    """Attention and MLP, each a picture.

    notes: {(block, pass, collective): text at its message}. forward_only: there was no backward.
    """
    for kind, places in layer.halves.items():
        uses = Counter((way, op) for place in places if isinstance(place, Message)
                       for way, ops in place.passes.items() for op in ops)
        # The account has one sum for a collective that the picture has twice: show it at neither.
        known = {key: notes.get((kind, *key), "") for key, n in uses.items() if n == 1}
        y, drawn = 2.0, []
        for place in places:
            if isinstance(place, Sharded):
                parts, high = _sharded(place, layer.split.tp, y)
            elif isinstance(place, Message):
                parts, high = _message(place, known, forward_only and not place.forward, y)
            else:
                parts, high = _shared(place, y)
            drawn += parts
            y += high + GAP
        trunk = E("path", d=f"M{MIDDLE:g} 6V{y:g}m-4 -6l4 6l4 -6", class_="wire")
        title = f"{kind}: what each of {layer.split.tp} ranks does, and where they communicate"
        size = f"0 0 {WIDE} {y + 3:g}"
        yield E("svg", E("title", title), trunk, drawn, viewBox=size, role="img", class_="half")


def _shared(place: Shared, y: float) -> Drawn:
    wide, high = (210, 28) if place.stream else (290 if place.note else 110, 24)
    name = E("tspan", place.name, class_="strong" if place.stream else "code")
    middle = {"x": MIDDLE, "y": y + high / 2 + 4.5, "text_anchor": "middle"}
    words = E("text", name, f"   {place.note}", **middle)
    frame = ("stream", 14) if place.stream else ("shared", 5)
    return [box(MIDDLE - wide / 2, y, wide, high, *frame), words], high


def _message(place: Message, notes: Mapping[tuple[str, str], str], unused: bool, y: float) -> Drawn:
    """unused: the report's run had no such pass."""
    rows = []
    for words in place.words:
        way = words.partition(":")[0]
        ops = place.passes.get(way, ())
        rows += [(words, "soft" if unused else ""), *(
            (f"{op}: " * (len(ops) > 1) + notes[way, op], "soft")
            for op in ops if notes.get((way, op)))]
    way = "forward" if place.forward else "backward"
    class_ = "left-out" if not place.times else "unused" if unused else way
    high, left = 10 + 16 * len(rows), 24 + 7.5 * len(place.name)
    drawn = [box(0.5, y, WIDE - 1, high, f"message {class_}"),
             text(14, y + 18, place.name, "code strong", "start")]
    drawn += [text(left, y + 18 + 16 * i, *row, "start") for i, row in enumerate(rows)]
    if place.sync and place.times:
        drawn.append(text(WIDE - 12, y + 18, "sync point", "strong", "end"))
    return drawn, high


def _sharded(place: Sharded, tp: int, y: float) -> Drawn:
    """A box for each drawn rank, with a fork above and a join below; "…" for those between."""
    ranks = drawn_ranks(tp)
    n, dots = len(ranks) - (None in ranks), 14 * (None in ranks)
    wide = min(150.0, (WIDE - 10 * (n - 1) - dots) / n)
    x = (WIDE - n * wide - 10 * (n - 1) - dots) / 2
    top, row, head = y + 12, 27, 37
    end = top + head + row * len(place.parts)
    # covers the trunk
    drawn = [E("rect", x=MIDDLE - 2, y=y + 1, width=4, height=end - y + 10, class_="blank")]
    for rank in ranks:
        if rank is None:
            drawn.append(text(x + 2, (top + end) / 2 + 4, "…", "soft"))
            x += dots
            continue
        centre = x + wide / 2
        fork = f"M{MIDDLE:g} {y:g}H{centre:g}V{top:g}M{centre:g} {end:g}V{end + 12:g}H{MIDDLE:g}"
        drawn += [E("path", d=fork, class_="wire"), box(x, top, wide, end - top, "rank"),
                  text(centre, top + 15, f"rank {rank}", "strong"),
                  text(centre, top + 30, place.shares[rank], "soft")]
        for i, (name, kind) in enumerate(place.parts):
            at = top + head + row * i
            drawn += [box(x + 5, at, wide - 10, row - 5, f"part {kind}"),
                      text(centre, at + 15, name, "code")]
        x += wide + 10
    return drawn, end + 12 - y


# --- curves -----------------------------------------------------------------------------------


WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 388, 26, 226  # of the area between the axes
MOST_DOTS = 40  # of a curve; one of more points is a line


class Point(NamedTuple):
    """title: shown on hover; label: written beside it."""

    x: float
    y: float
    title: str
    label: str = ""


@dataclass(frozen=True)
class Series:
    name: str
    points: Iterable[Point]
    class_: str
    joined: bool = True


def fit(value: float) -> bool:
    """Can it be a place on an axis? NaN cannot, nor what overflows with some room added."""
    return value == 0 or 1e-99 < abs(value) < 1e99


def ticks(lo: float, hi: float, whole: bool = False) -> list[float]:
    """About six round numbers from lo to hi; whole ones where the values are."""
    raw = max((hi - lo) / 7, float(whole))
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]


def log_ticks(lo: float, hi: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or powers alone if they are many, or `ticks` if few."""
    powers = [10.0**e for e in range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)]
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    found = [f * p for p in powers for f in factors if lo * 0.999 <= f * p <= hi * 1.001]
    return found if len(found) > 2 else ticks(lo, hi)


def scale(values: Sequence[float], log: bool, start: float,
          end: float) -> tuple[Callable[[float], float], list[float]]:
    """(places from `start` to `end` for the values of an axis, with a little room at both ends; the
    values to mark). log: a logarithmic axis, if all values are positive."""
    log = log and min(values) > 0
    bend: Callable[[float], float] = math.log if log else float
    least, most = bend(min(values)), bend(max(values))
    room = 0.06 * (most - least) or abs(most) * 0.1 or 1.0
    lo, hi = least - room, most + room
    whole = all(float(value).is_integer() for value in values)
    marks = log_ticks(math.exp(lo), math.exp(hi)) if log else ticks(lo, hi, whole)
    return lambda value: start + (bend(value) - lo) * (end - start) / (hi - lo), marks


def chart(series: Iterable[Series], across: str, up: str, log: tuple[bool, bool] = (False, False),
          read: Callable[[float], str] = number) -> Element | None:
    """Curves over one another; None if they have no points. Points that do not fit are left out.

    across, up: the names of the axes. log: which of them are logarithmic. read: how x is written.
    """
    found = [(one, [p for p in one.points if fit(p.x) and fit(p.y)]) for one in series]
    found = [(one, points) for one, points in found if points]
    if not found:
        return None
    xs, marks = scale([p.x for _, points in found for p in points], log[0], LEFT, RIGHT)
    ys, lines = scale([p.y for _, points in found for p in points], log[1], BOTTOM, TOP)
    drawn = [text(xs(mark), BOTTOM + 18, read(mark), "soft") for mark in marks]
    for y in lines:
        drawn += [E("path", d=f"M{LEFT} {ys(y):.1f}H{RIGHT}", class_="grid"),
                  text(LEFT - 7, ys(y) + 4, number(y), "soft", "end")]
    middle = (LEFT + RIGHT) / 2
    drawn += [text(middle, HEIGHT - 6, across, "soft"), text(4, 13, up, "soft", "start")]
    for one, points in found:
        places = [(xs(p.x), ys(p.y)) for p in points]
        if one.joined and len(points) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            drawn.append(E("path", d=path, class_=f"line {one.class_}"))
        for (x, y), point in zip(places, points, strict=True):
            if len(points) <= MOST_DOTS:
                title = E("title", point.title)
                drawn.append(E("circle", title, cx=x, cy=y, r=4, class_=f"dot {one.class_}"))
            if point.label:  # towards the middle
                room, anchor = (7, "start") if x < middle else (-7, "end")
                drawn.append(text(x + room, y - 6, point.label, "soft", anchor))
    title = E("title", f"{up} against {across}")
    svg = E("svg", title, drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart")
    names = [(one.class_, one.name) for one, _ in found]
    return E("figure", svg, legend(names) if len(names) > 1 else None)

"""What is drawn on a page, as SVG: the two halves of a layer, and curves. A unit of size is about a pixel on a telephone.

Colours are classes of style.css, so that they follow the reader's choice of light or dark.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from base.numbers import number
from report.diagram import Alike, Layer, Message, Own, Place, seen
from report.html import E

WIDE = 340  # of a half of a layer
MIDDLE = WIDE / 2
GAP = 13  # between two places


def text(x: float, y: float, said: str, class_: str = "", anchor: str = "middle") -> Element:
    return E("text", said, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def box(x: float, y: float, wide: float, high: float, class_: str, round_: float = 5) -> Element:
    return E("rect", x=x, y=y, width=wide, height=high, rx=round_, class_=class_)


# --- a layer --------------------------------------------------------------------------------------------------------


Told = Mapping[tuple[str, str, str], str]


def halves(made: Layer, told: Told, silent: bool = False) -> list[Element]:
    """Attention and MLP, each a picture. told: for (block, pass, collective) what is known of these messages, in a few words;
    silent: there was no backward pass."""
    return [_half(kind, places, made.split.tp, told, silent) for kind, places in made.halves.items()]


def _half(kind: str, places: Sequence[Place], tp: int, told: Told, silent: bool) -> Element:
    y, drawn = 2.0, []
    spoken = Counter((way, op) for one in places if isinstance(one, Message) for way, ops in one.ways for op in ops)
    # what is said in two places is told of both together, and belongs to neither
    alone = {(way, op): told.get((kind, way, op), "") for (way, op), n in spoken.items() if n == 1}
    for place in places:
        if isinstance(place, Own):
            parts, high = _own(place, tp, y)
        elif isinstance(place, Message):
            parts, high = _message(place, alone, silent, y)
        else:
            parts, high = _alike(place, y)
        drawn += parts
        y += high + GAP
    trunk = E("path", d=f"M{MIDDLE:g} 6V{y:g}m-4 -6l4 6l4 -6", class_="wire")
    label = f"{kind}: what each of {tp} ranks does, and where they communicate"
    return E("svg", E("title", label), trunk, drawn, viewBox=f"0 0 {WIDE} {y + 3:g}", role="img", class_="half")


def _alike(place: Alike, y: float) -> tuple[list[Element], float]:
    if place.stream:
        name = E("text", E("tspan", place.name, class_="strong"), f"   {place.note}", x=MIDDLE, y=y + 19, text_anchor="middle")
        return [box(MIDDLE - 105, y, 210, 28, "stream", 14), name], 28
    wide = 290 if place.note else 110
    name = E("text", E("tspan", place.name, class_="code"), f"   {place.note}", x=MIDDLE, y=y + 16, text_anchor="middle")
    return [box(MIDDLE - wide / 2, y, wide, 24, "alike"), name], 24


def _message(place: Message, told: Mapping[tuple[str, str], str], silent: bool, y: float) -> tuple[list[Element], float]:
    silent = silent and not place.forward
    rows = [(word, "soft" if silent else "") for word in place.words]
    for way, ops in place.ways if place.times else ():
        for op in ops:
            if said := told.get((way, op)):
                at = [row[0].startswith(way) for row in rows].index(True) + 1
                rows.insert(at, (f"{op}: {said}" if len(ops) > 1 else said, "soft"))
    high = 10 + 16 * len(rows)
    way = "left-out" if not place.times else "silent" if silent else "forward" if place.forward else "backward"
    drawn = [box(0.5, y, WIDE - 1, high, f"message {way}"), text(14, y + 18, place.name, "code strong", "start")]
    left = 24 + 7.5 * len(place.name)
    drawn += [text(left, y + 18 + 16 * i, said, kind, "start") for i, (said, kind) in enumerate(rows)]
    if place.sync and place.times:
        drawn.append(text(WIDE - 12, y + 18, "sync point", "strong mark", "end"))
    return drawn, high


def _own(own: Own, tp: int, y: float) -> tuple[list[Element], float]:
    ranks = seen(tp)
    n = len(ranks) - (None in ranks)
    wide = min(150.0, (WIDE - 10 * (n - 1) - 14 * (None in ranks)) / n)
    x = (WIDE - n * wide - 10 * (n - 1) - 14 * (None in ranks)) / 2
    fork, row, top = 12.0, 27.0, 37.0
    high = top + row * len(own.parts)
    drawn: list[Element] = []
    centres: list[float] = []
    for rank in ranks:
        if rank is None:
            drawn.append(text(x + 2, y + fork + high / 2 + 4, "…", "soft"))
            x += 14
            continue
        centre = x + wide / 2
        centres.append(centre)
        drawn += [box(x, y + fork, wide, high, "rank"), text(centre, y + fork + 15, f"rank {rank}", "strong")]
        drawn.append(text(centre, y + fork + 30, own.shares[rank], "soft"))
        for i, (name, kind) in enumerate(own.parts):
            at = y + fork + top + row * i
            drawn += [box(x + 5, at, wide - 10, row - 5, f"part {kind}"), text(centre, at + 15, name, "code")]
        x += wide + 10
    end = y + fork + high
    ways = "".join(f"M{MIDDLE:g} {y:g}H{c:g}V{y + fork:g}M{c:g} {end:g}V{end + fork:g}H{MIDDLE:g}" for c in centres)
    hidden = E("rect", x=MIDDLE - 2, y=y + 1, width=4.0, height=high + 2 * fork - 2, class_="blank")
    return [hidden, E("path", d=ways, class_="wire"), *drawn], high + 2 * fork


# --- curves ---------------------------------------------------------------------------------------------------------


Read = Callable[[float], str]
Bend = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """Points (x, y, what a reader is told of it), joined by a line or not. class_: its colour; labels: words beside them."""

    name: str
    points: Sequence[tuple[float, float, str]]
    class_: str
    joined: bool = True
    labels: Sequence[str] = ()


def ticks(lo: float, hi: float, whole: bool = False) -> list[float]:
    """Six round numbers or so from lo to hi; whole ones where the values are."""
    if not hi > lo:
        return [lo]
    raw = max((hi - lo) / 7, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if factor * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]


def log_ticks(lo: float, hi: float) -> list[float]:
    """1, 2 and 5 times powers of ten from lo to hi; powers alone where they are many; round numbers where these are few."""
    powers = [10.0**e for e in range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)]
    found = [f * p for p in powers for f in ((1,) if len(powers) > 4 else (1, 2, 5)) if lo * 0.999 <= f * p <= hi * 1.001]
    return found if len(found) > 3 else ticks(lo, hi)


@dataclass(frozen=True)
class Scale:
    """Where a value lies between two ends of an axis, which is linear or log.
    lo, hi: the ends, bent as the axis is; whole: whether values are whole numbers."""

    kind: str
    lo: float
    hi: float
    whole: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], kind: str, start: float, end: float) -> "Scale":
        """With a little room on both sides."""
        kind = "linear" if kind == "log" and min(values) <= 0 else kind
        bend = BENDS[kind][0]
        lo, hi = bend(min(values)), bend(max(values))
        room = 0.06 * (hi - lo) or abs(hi) * 0.1 or 1.0
        return cls(kind, lo - room, hi + room, all(float(value).is_integer() for value in values), start, end)

    def __call__(self, value: float) -> float:
        return self.start + (BENDS[self.kind][0](value) - self.lo) / (self.hi - self.lo) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        lo, hi = (BENDS[self.kind][1](end) for end in (self.lo, self.hi))
        return log_ticks(lo, hi) if self.kind == "log" else ticks(lo, hi, self.whole)


BENDS: dict[str, tuple[Bend, Bend]] = {"linear": (float, float), "log": (math.log, math.exp)}


def chart(
    series: Sequence[Series], across: str, up: str, kinds: tuple[str, str] = ("linear", "linear"), read: Read = number
) -> Element:
    """Curves over one another. across, up: what the axes are; kinds: see Scale; read: how x is written.
    Points that are no numbers are left out; ValueError where no other is."""
    series = [replace(one, points=[p for p in one.points if math.isfinite(p[0] + p[1])]) for one in series]
    series = [one for one in series if one.points]
    wide, high, left, right, top, bottom = 400, 270, 52, 12, 26, 44
    points = [point for one in series for point in one.points]
    xs = Scale.over([x for x, _, _ in points], kinds[0], left, wide - right)
    ys = Scale.over([y for _, y, _ in points], kinds[1], high - bottom, top)
    drawn = [E("path", d=f"M{left} {ys(t):.1f}H{wide - right}", class_="grid") for t in ys.ticks]
    drawn += [text(left - 7, round(ys(t) + 4, 1), number(t), "soft", "end") for t in ys.ticks]
    drawn += [text(round(xs(t), 1), high - bottom + 18, read(t), "soft") for t in xs.ticks]
    drawn += [text((left + wide - right) / 2, high - 6, across, "soft"), text(4, 13, up, "soft", "start")]
    for one in series:
        places = [(xs(x), ys(y)) for x, y, _ in one.points]
        if one.joined and len(places) > 1:
            drawn.append(E("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), class_=f"line {one.class_}"))
        if len(places) <= 40:
            for (x, y), (_, _, said) in zip(places, one.points, strict=True):
                dot = E("circle", E("title", said), cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_=f"dot {one.class_}")
                drawn.append(dot)
        for (x, y), said in zip(places, one.labels, strict=False):
            drawn.append(text(round(x + 7, 1), round(y - 6, 1), said, "soft", "start"))
    svg = E("svg", E("title", f"{up} against {across}"), drawn, viewBox=f"0 0 {wide} {high}", role="img", class_="chart")
    names = legend([(one.name, one.class_) for one in series]) if len(series) > 1 else None
    return E("figure", svg, names)


def legend(entries: Iterable[tuple[str, str]]) -> Element:
    return E("p", [E("span", E("i", class_=f"chip {class_}"), name) for name, class_ in entries], class_="legend")

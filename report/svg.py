"""A page's curves, as SVG. A unit is a pixel on a phone.

Colours are classes of style.css, so that they follow the reader's choice of light or dark.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from base.numbers import number
from report.html import E

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 388, 26, 226  # of the area between the axes
MOST_DOTS = 40  # of a curve; one of more points is a line


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "middle") -> Element:
    return E("text", words, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def legend(names: Iterable[tuple[str, str]]) -> Element:
    """names: (class, what has its colour)."""
    chips = [E("span", E("i", class_=f"chip {class_}"), name) for class_, name in names]
    return E("p", chips, class_="legend")


class Point(NamedTuple):
    """title: shown on hover; label: written beside it."""

    x: float
    y: float
    title: str
    label: str = ""


class Series(NamedTuple):
    name: str
    points: list[Point]
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
    """An axis: where values lie from `start` to `end`, with a little room at both ends; values to
    mark. log: a logarithmic one, if all values are positive."""
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

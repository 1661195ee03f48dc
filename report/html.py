"""HTML as a tree, and tables of anything.

Everything that a page says goes through `E`, and ElementTree writes it: text stays text, whatever is in it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias
from xml.etree.ElementTree import Element, tostring

from base.numbers import number

Content: TypeAlias = "str | Element | None | Iterable[Content]"

# what HTML has no place for: control characters, and the halves of characters that Python keeps of bytes that are no text
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
DEEP, LONG = 5, 24  # of what a report has beyond what is known: how deep tables go, how many numbers of a list are shown


def clean(text: str) -> str:
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


def E(tag: str, *content: Content, **attributes: Any) -> Element:
    """An element. Attributes are spelled as in Python: class_, stroke_width; None leaves one out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            said = f"{value:g}" if isinstance(value, float) else clean(str(value))
            made.set(name.rstrip("_").replace("_", "-"), said)
    _fill(made, content)
    return made


def _fill(parent: Element, content: Content) -> None:
    if isinstance(content, Element):
        parent.append(content)
    elif isinstance(content, str):
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + clean(content)
        else:
            parent.text = (parent.text or "") + clean(content)
    elif content is not None:
        for part in content:
            _fill(parent, part)


def written(element: Element) -> str:
    return tostring(element, encoding="unicode", method="html")


# --- tables ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Content]], words: int = 1) -> Element:
    """A table that scrolls by itself where it is too wide. words: how many columns at the left are text, not figures."""

    def row(tag: str, cells: Sequence[Content]) -> Element:
        return E("tr", [E(tag, cell, class_=None if i < words else "n") for i, cell in enumerate(cells)])

    body = E("tbody", [row("td", cells) for cells in rows])
    return E("div", E("table", E("thead", row("th", head)), body), class_="scroll", tabindex="0")


def facts(cells: Iterable[tuple[str, Content]], class_: str = "facts") -> Element:
    """Figures, each with its name below it."""
    return E("dl", [E("div", E("dt", name), E("dd", said)) for name, said in cells], class_=class_)


def is_short(value: Any) -> bool:
    """Whether a value is said in a few words."""
    return is_spread(value) or not isinstance(value, Mapping | list) or isinstance(value, list) and 0 < len(value) <= 8 and all(
        _is_number(inner) for inner in value)


def is_spread(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"median", "min", "max"} and all(map(_is_number, value.values()))


def spread(value: Mapping[str, float]) -> str:
    return f"{number(value['median'])} ({number(value['min'])} to {number(value['max'])})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain(value: Any, depth: int = 0) -> Content:
    """Any value of JSON: mappings and lists of mappings as tables, long lists by their beginning."""
    if is_spread(value):
        return spread(value)
    if isinstance(value, Mapping) and value and not depth and all(map(is_short, value.values())):
        return facts(((words(key), plain(inner, 1)) for key, inner in value.items()), "facts small")
    if isinstance(value, Mapping) and value and depth < DEEP:
        return table(("", ""), [(words(key), plain(inner, depth + 1)) for key, inner in value.items()])
    if isinstance(value, list) and value and depth < DEEP and all(isinstance(inner, Mapping) for inner in value):
        keys = list(dict.fromkeys(key for inner in value for key in inner))
        cells = ([plain(inner.get(key, ""), depth + 1) for key in keys] for inner in value)
        return table([words(key) for key in keys], cells, words=0)
    if isinstance(value, list):
        more = f" … {len(value):,} in all" if len(value) > LONG else ""
        return ", ".join(_one(inner) for inner in value[:LONG]) + more
    return _one(value)


def _one(value: Any) -> str:
    if value is None or value == {}:
        return "–"
    if _is_number(value):
        return number(value)
    text = str(value)
    return text if len(text) <= 2000 else f"{text[:2000]}…"


def words(key: Any) -> str:
    """A report's key as words."""
    return str(key).replace("_", " ")

"""HTML as a tree, and any JSON, of whatever shape, as facts and tables.

A page's text goes through `E` and ElementTree escapes it: text stays text, whatever is in it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias
from xml.etree.ElementTree import Element

from base.numbers import nbytes, number, seconds, share

Content: TypeAlias = "str | Element | None | Iterable[Content]"

# not in HTML: control characters, noncharacters, surrogates (Python's for bytes that are no text)
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
FIGURE = re.compile(r"[-+]?\d|$")
DEEP, LONG, TEXT = 5, 24, 2000  # most levels of nesting, numbers of a list, characters of a text


def clean(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def E(tag: str, *content: Content, **attributes: Any) -> Element:
    """An element. Attributes are spelled class_, stroke_width; one that is None is left out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:g}" if isinstance(value, float) else clean(str(value))
            made.set(name.rstrip("_").replace("_", "-"), text)
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


def note(*text: Content) -> Element:
    return E("p", text, class_="note")


def folded(summary: str, *content: Content) -> Element:
    return E("details", E("summary", summary), content)


def facts(cells: Iterable[tuple[str, Content]], class_: str = "facts") -> Element:
    """Figures, each with its name below it."""
    return E("dl", [E("div", E("dt", name), E("dd", text)) for name, text in cells], class_=class_)


def table(rows: Iterable[Mapping[str, Content]]) -> Element:
    """A table that scrolls sideways if it is too wide. Rows name their cells by column.

    Columns without content are left out, columns of figures are set to the right.
    """
    rows = list(rows)
    columns = dict.fromkeys(head for row in rows for head, cell in row.items() if cell != "")
    classes = {}
    for head in columns:
        cells = [row.get(head, "") for row in rows]
        figures = all(isinstance(cell, str) and FIGURE.match(cell) for cell in cells)
        classes[head] = "n" if figures else None
    lines = [E("tr", [E("td", row.get(head, ""), class_=classes[head]) for head in columns])
             for row in rows]
    heads = E("tr", [E("th", head, class_=classes[head]) for head in columns])
    return E("div", E("table", E("thead", heads), E("tbody", lines)), class_="scroll", tabindex="0")


# --- any JSON ---------------------------------------------------------------------------------

SPREAD = {"median": float, "min": float, "max": float}


def is_number(value: Any) -> bool:
    """NaN is one, as a loss may be; infinity, and what is too large for a float, is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and not abs(value) > 1e305


def fits(value: Any, shape: Any) -> bool:
    """Has this JSON this shape?

    A shape is a type (float: any number), a range of integers, [shape of every item], {str: shape
    of every value} or {key: shape, ...}; a key that ends in "?" may be missing or null.
    """
    if isinstance(shape, range):
        return type(value) is int and value in shape
    if shape in (int, float):
        return is_number(value) and isinstance(value, int | shape)
    if isinstance(shape, type):
        return isinstance(value, shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(fits(item, shape[str]) for item in value.values())
    found = {key: value.get(key.rstrip("?")) for key in shape}
    return all(key.endswith("?") if found[key] is None else fits(found[key], inner)
               for key, inner in shape.items())


def at(value: Any, path: str) -> Any:
    """The value at a path such as "timing.load_s", None if there is none."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def words(key: str) -> str:
    """A report's key as words, without the unit that its values are shown in."""
    name = f"{key.removesuffix('_per_s')}/s" if key.endswith("_per_s") else key.removesuffix("_s")
    return name.replace("_", " ")


def unit(key: str) -> Callable[[float], str]:
    """How the numbers of a key, or of a path of keys, are written."""
    if key.endswith("_per_s"):
        return number
    if key.endswith(("_s", "seconds")):
        return seconds
    if key.startswith(("share_", "fraction_")):
        return share
    return nbytes if "bytes" in key else number


def is_spread(value: Any) -> bool:
    return fits(value, SPREAD) and len(value) == len(SPREAD)


def spread(value: Mapping[str, float], text: Callable[[float], str] = number) -> str:
    return f"{text(value['median'])} ({text(value['min'])} to {text(value['max'])})"


def flat(row: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The cells of a row: a mapping in it is several."""
    for key, value in row.items():
        if depth < DEEP and isinstance(value, dict) and not is_spread(value):
            yield from flat(value, f"{prefix}{key} ", depth + 1)
        else:
            yield f"{prefix}{key}", value


def plain(value: Any, key: str = "", depth: int = 0) -> Content:
    """Any JSON: short values as facts, lists of mappings as tables, the beginning of long lists."""
    if is_number(value):
        return unit(key)(value)
    if is_spread(value):
        return spread(value, unit(key))
    if value and depth < DEEP and isinstance(value, dict):
        cells = {words(name): plain(inner, name, depth + 1) for name, inner in value.items()}
        short = {name: cell for name, cell in cells.items() if isinstance(cell, str)}
        more = [E("div", E("h3", name), cells[name]) for name in cells if name not in short]
        return [facts(short.items(), "facts small") if short else None, more]
    if value and depth < DEEP and fits(value, [dict]):
        return table({words(name): plain(inner, name, depth + 1) for name, inner in flat(row)}
                     for row in value)
    if isinstance(value, list) and value:
        texts = [str(plain(inner, key, DEEP)) for inner in value[:LONG]]
        texts += [f"… {len(value):,} in all"] * (len(value) > LONG)
        return (" " if fits(value, [str]) else ", ").join(texts)
    return "" if value is None else "–" if value in ({}, []) else str(value)[:TEXT]

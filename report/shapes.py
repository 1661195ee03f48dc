"""Reading a report that may be a stranger's or an older version's: its shape first, then values."""

from collections.abc import Mapping
from typing import Any

FEW, MANY = range(1, 1001), range(1, 10**9)
MODEL = {"n_layer": FEW, "n_head": FEW, "n_embd": MANY, "vocab_size": MANY, "block_size": MANY,
         "bias": bool}
SPREAD = {"median": float, "min": float, "max": float}
TALLY = {"calls": int, "bytes": int, "seconds": float}
PASSES = {str: {str: TALLY}}
ACCOUNT = {"layers": [{"layer": int, "attention": PASSES, "mlp": PASSES}], "other": {str: PASSES},
           "total": {**TALLY, "fraction_of_time": float}, "forward_passes?": int}


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

"""Check objects of JSON files that may come from anywhere against a table of their fields."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from base.errors import UserError, shown


class Field(NamedTuple):
    """kind: the value's type (True is no int, a whole number may stand for a float). holds: what
    else must be true of it. fault: the message where it is not, with {name} and {value}."""

    kind: type
    holds: Callable[[Any], object] = lambda value: True
    fault: str = ""


def check_fields(
    raw: Any, table: Mapping[str, Field], what: str, label: Callable[[str], str] = str
) -> dict[str, Any]:
    """The fields of a table, each checked. UserError unless `raw` is an object that has them all;
    the message calls the object `what` and a field `label(name)`."""
    if not isinstance(raw, dict):
        raise UserError(f"{what} not an object.")
    found = {}
    for name, (kind, holds, fault) in table.items():
        if name not in raw:
            raise UserError(f"{label(name)} is missing.")
        value = raw[name]
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind or not holds(value):
            if not fault:
                of_kind = type(value) is kind
                why = "out of range" if of_kind else f"not of type {kind.__name__}"
                fault = f"{{name}}={{value}} is {why}."
            raise UserError(fault.format(name=label(name), value=shown(value)))
        found[name] = value
    return found

"""Pickles read as data: nothing that one names is imported or called, and reading takes time and memory in proportion to
its bytes.

`plain` gives what nanoGPT's meta.pkl may hold. `outline` goes through the pickle of a ckpt.pt before torch reads it, which
itself admits calls that take all memory (bytearray(10**12)) and keys that take for ever to hash (tuples of tuples of ...).
"""

import pickletools
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, cast

STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
INTS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
DICTS = {"MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"}
MEMO = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"}
PLAIN = STRINGS | INTS | DICTS | MEMO | {"PROTO", "FRAME", "STOP"}
TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"}
MORE = {"BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "APPEND", "APPENDS", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"}

BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}
ORDERED, PARAMETER, TENSOR = "collections OrderedDict", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2"


class Refused(ValueError):
    """What a pickle holds that is not read; the message goes on after its file's name."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    text: str


@dataclass(frozen=True)
class Opaque:
    """A tensor, or the storage that it is made of. key: the storage's."""

    key: str


@dataclass(frozen=True)
class Mark:
    """Where a run of values begins on the stack."""


def plain(raw: bytes) -> Any:
    """The dict, string or int that a pickle stands for; Refused where it holds anything else."""
    return _Machine(PLAIN, {}).run(raw)


def outline(raw: bytes, records: Mapping[str, int]) -> Any:
    """What torch.save wrote: dicts (keys are strings or ints), lists, tuples, numbers, strings and, as Opaque, tensors.

    records: the bytes that the file has for each storage, by the storage's key: none may claim more. Refused for all else.
    """
    return _Machine(PLAIN | TUPLES | MORE, records).run(raw)


class _Machine:
    """A pickle's stack and memo, for the operations that are admitted."""

    def __init__(self, admitted: Container[str], records: Mapping[str, int]):
        self.admitted, self.records = admitted, records
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, raw: bytes) -> Any:
        try:
            for operation, value, _ in pickletools.genops(raw):
                name, argument = operation.name, cast(Any, value)
                if name == "STACK_GLOBAL":
                    name, argument = "GLOBAL", f"{self.stack[-2]} {self.stack[-1]}" if type(self.stack[-2]) is str else ""
                if name == "GLOBAL" and (name not in self.admitted or not _is_known(argument)):
                    raise Refused(f"it names {ascii(argument.replace(' ', '.'))[1:81].rstrip(chr(39))}")
                if name not in self.admitted or type(argument) is bool:  # protocol 0 writes True as an INT
                    raise Refused(f"it has the operation {name}")
                self._do(name, argument)
            return self._pop()
        except Refused:
            raise
        except (ValueError, LookupError, TypeError) as error:  # cut short, a stack that is empty, a name that is unknown
            raise Refused(f"it is damaged ({type(error).__name__})") from None

    def _do(self, name: str, argument: Any) -> None:
        stack, pop = self.stack, self._pop
        if name in STRINGS or name in INTS or name == "BINFLOAT":
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self._top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name))
        elif name == "MARK":
            stack.append(Mark())
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("APPEND", "APPENDS"):
            values = self._since_mark() if name == "APPENDS" else [pop()]
            self._top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._since_mark() if name == "SETITEMS" else [pop(), pop()][::-1]
            self._top(dict).update(_pairs(values))
        elif name == "DICT":
            stack.append(_pairs(self._since_mark()))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in TUPLES:
            stack.append(tuple([pop() for _ in range(int(name[-1]))][::-1]))
        elif name == "GLOBAL":
            stack.append(Name(argument))
        elif name == "REDUCE":
            arguments, function = pop(), pop()
            stack.append(_called(function, arguments))
        elif name == "BUILD":
            # what state_dict() hangs on its OrderedDict; any other attribute could stand in for a method of it
            state = pop()
            if type(state) is not dict or set(state) != {"_metadata"} or type(self._top()) is not dict:
                raise Refused("it sets attributes")
        elif name == "BINPERSID":
            stack.append(self._storage(*pop()))

    def _since_mark(self) -> list[Any]:
        values = []
        while type(value := self.stack.pop()) is not Mark:
            values.append(value)
        return values[::-1]

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _top(self, kind: type | None = None) -> Any:
        value = self.stack[-1]
        if type(value) is Mark or kind is not None and type(value) is not kind:
            raise Refused(f"it takes a {type(value).__name__.lower()} for something else")
        return value

    def _storage(self, what: Any, kind: Any, key: Any, device: Any, count: Any) -> Opaque:
        found = re.fullmatch(r"torch (\w+)Storage", kind.text if isinstance(kind, Name) else "")
        if what != "storage" or not found or not isinstance(key, str) or not isinstance(device, str) or type(count) is not int:
            raise Refused("it holds a storage that is none")
        if count < 0 or count * BYTES[found[1]] > self.records.get(key, -1):
            raise Refused(f"it holds a storage of {count} numbers that the file does not have")
        return Opaque(key)


def _is_known(name: str) -> bool:
    storage = re.fullmatch(r"torch (\w+)Storage", name)
    return name in (ORDERED, PARAMETER, TENSOR) or storage is not None and storage[1] in BYTES


def _pairs(values: list[Any]) -> dict[Any, Any]:
    keys = values[::2]
    if len(values) % 2 or not all(type(key) in (str, int) for key in keys):
        raise Refused("it has a key that is neither a string nor an int")
    return dict(zip(keys, values[1::2], strict=True))


def _called(function: Any, arguments: Any) -> Any:
    """What torch's call will give."""
    if function == Name(ORDERED) and arguments == ():
        return {}
    if function == Name(PARAMETER) and len(arguments) == 3 and isinstance(arguments[0], Opaque):
        return arguments[0]
    # a seventh argument is metadata: bits that say to negate or conjugate what is stored
    if function == Name(TENSOR) and len(arguments) == 6 and isinstance(arguments[0], Opaque):
        return arguments[0]
    raise Refused("it calls what makes no tensor")

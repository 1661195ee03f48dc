"""Pickles read as data: nothing that one names is imported or called, and reading takes time and memory in proportion to
its bytes.

`plain` gives what nanoGPT's meta.pkl may hold. `outline` goes through the pickle of a ckpt.pt before torch reads it, which
itself admits calls that take all memory (bytearray(10**12)) and keys that take for ever to hash (tuples of tuples of ...).
"""

import pickletools
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

# operations of a pickle, as pickletools names them
NUMBERS_AND_TEXT = (
    {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
)
PLAIN = NUMBERS_AND_TEXT | (
    {"BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "APPEND", "APPENDS"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"}
    | {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "PROTO", "FRAME", "STOP"}
)
TORCHS = PLAIN | {"GLOBAL", "REDUCE", "BUILD", "BINPERSID"}

BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}
ORDERED, PARAMETER, TENSOR = "collections OrderedDict", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2"


class Refused(ValueError):
    """What a pickle holds that is not read; the message goes on after its file's name."""


class Foreign(Refused):
    """A value of a kind that is not read: the rest of the pickle may be good."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    text: str


@dataclass(frozen=True)
class Opaque:
    """A tensor, or the storage that it is made of. key: the storage's."""

    key: str


class Mark:
    """Where a run of values begins on the stack."""


def plain(raw: bytes) -> Any:
    """The value that a pickle stands for: dicts (keys are strings or ints), lists, tuples, numbers,
    strings, None. Refused where it holds anything else."""
    return _Machine(PLAIN, {}).run(raw)


def outline(raw: bytes, records: Mapping[str, int]) -> Any:
    """What torch.save wrote: dicts (keys are strings or ints), lists, tuples, numbers, strings and, as Opaque, tensors.

    records: the bytes that the file has for each storage, by the storage's key: none may claim more. Refused for all else.
    """
    return _Machine(TORCHS, records).run(raw)


class _Machine:
    """A pickle's stack and memo, for the operations that are admitted."""

    def __init__(self, admitted: Container[str], records: Mapping[str, int]):
        self.records = records
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        push, pop = self.stack.append, self._pop
        operations: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(NUMBERS_AND_TEXT | {"BINFLOAT"}, push),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda key: self.memo.update({key: self._top()})),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda key: push(self.memo[key])),
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            "MEMOIZE": lambda _: self.memo.update({len(self.memo): self._top()}),
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "MARK": lambda _: push(Mark()),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_TUPLE": lambda _: push(()),
            "DICT": lambda _: push(_pairs(self._since_mark())),
            "SETITEM": lambda _: self._fill(dict, _pairs(self._last(2))),
            "SETITEMS": lambda _: self._fill(dict, _pairs(self._since_mark())),
            "APPEND": lambda _: self._fill(list, self._last(1)),
            "APPENDS": lambda _: self._fill(list, self._since_mark()),
            "TUPLE": lambda _: push(tuple(self._since_mark())),
            "TUPLE1": lambda _: push(tuple(self._last(1))),
            "TUPLE2": lambda _: push(tuple(self._last(2))),
            "TUPLE3": lambda _: push(tuple(self._last(3))),
            "GLOBAL": lambda name: push(_known(name)),
            "REDUCE": lambda _: push(_called(*self._last(2))),
            "BUILD": lambda _: self._set_attributes(pop()),
            "BINPERSID": lambda _: push(self._storage(*pop())),
        }
        self.operations = {name: operation for name, operation in operations.items() if name in admitted}

    def run(self, raw: bytes) -> Any:
        try:
            for operation, argument, _ in pickletools.genops(raw):
                do = self.operations.get(operation.name)
                if do is None or type(argument) is bool:  # protocol 0 writes True as an INT
                    raise self._why_not(operation.name, argument)
                do(argument)
            return self._pop()
        except Refused:
            raise
        except (ValueError, LookupError, TypeError) as error:  # cut short, a stack that is empty, a name that is unknown
            raise Refused(f"it is damaged ({type(error).__name__})") from None

    def _why_not(self, operation: str, argument: Any) -> Foreign:
        if operation == "STACK_GLOBAL" and all(type(part) is str for part in self.stack[-2:]):
            argument = " ".join(self.stack[-2:])
        if operation in ("GLOBAL", "STACK_GLOBAL", "INST") and isinstance(argument, str):
            return _naming(argument)
        return Foreign(f"it has the operation {operation}")

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _top(self) -> Any:
        value = self.stack[-1]
        if type(value) is Mark:
            raise Refused("it takes a mark for a value")
        return value

    def _last(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _since_mark(self) -> list[Any]:
        values = []
        while type(value := self.stack.pop()) is not Mark:
            values.append(value)
        return values[::-1]

    def _fill(self, kind: Any, content: Any) -> None:
        target = self._top()
        if type(target) is not kind:
            raise Refused(f"it fills a {type(target).__name__.lower()} as if that were a {kind.__name__}")
        if kind is dict:
            target.update(content)
        else:
            target.extend(content)

    def _set_attributes(self, attributes: Any) -> None:
        # what state_dict() hangs on its OrderedDict; any other could stand in for a method of it
        if type(attributes) is not dict or set(attributes) != {"_metadata"} or type(self._top()) is not dict:
            raise Refused("it sets attributes")

    def _storage(self, what: Any, kind: Any, key: Any, device: Any, count: Any) -> Opaque:
        found = re.fullmatch(r"torch (\w+)Storage", kind.text if isinstance(kind, Name) else "")
        if what != "storage" or not found or not isinstance(key, str) or not isinstance(device, str) or type(count) is not int:
            raise Refused("it holds a storage that is none")
        if count < 0 or count * BYTES[found[1]] > self.records.get(key, -1):
            raise Refused(f"it holds a storage of {count} numbers that the file does not have")
        return Opaque(key)


def _known(name: str) -> Name:
    storage = re.fullmatch(r"torch (\w+)Storage", name)
    if name in (ORDERED, PARAMETER, TENSOR) or storage is not None and storage[1] in BYTES:
        return Name(name)
    raise _naming(name)


def _naming(name: str) -> Foreign:
    return Foreign(f"it names {ascii(name.replace(' ', '.', 1))[1:-1][:80]}")


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

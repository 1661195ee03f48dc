"""Pickles read as data: nothing that one names is imported or called, and reading takes time and
memory in proportion to its bytes.

`PlainUnpickler` is Python's own unpickler with fewer operations and stricter dict keys: a tuple of
tuples of ..., each the same object twice, is a few bytes long and takes for ever to hash."""

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

# the operations of dicts, lists, tuples, numbers, strings and None, and the two that name a class
PLAIN = """UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 INT BININT BININT1 BININT2 LONG LONG1
LONG4 BINFLOAT NONE NEWTRUE NEWFALSE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
TUPLE3 MARK EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
PROTO FRAME STOP GLOBAL STACK_GLOBAL"""
STRAY = (EOFError, struct.error, LookupError, TypeError, ValueError, AttributeError)


class Refused(ValueError):
    """A pickle holds more than data, or is damaged; the message goes on after its file's name."""


class Foreign(Refused):
    """A value of a kind that is not read: the rest of the pickle may be good."""


def plain(raw: bytes) -> Any:
    """Unpickle dicts (of str or int), lists, tuples, numbers, strings, None; else Refused."""
    return PlainUnpickler(io.BytesIO(raw)).load()


class Operations(dict[int, Callable[[Any], None]]):
    """Operations by code; Foreign for any other."""

    def __missing__(self, code: int) -> Any:
        operation = pickletools.code2op.get(chr(code))  # type: ignore[attr-defined]
        raise Foreign(f"it has the operation {operation.name if operation else hex(code)}")


class PlainUnpickler(pickle._Unpickler):
    stack: list[Any]
    readline: Callable[[], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch = Operations()
    for code in (getattr(pickle, name)[0] for name in PLAIN.split()):
        dispatch[code] = pickle._Unpickler.dispatch[code]

    def load(self) -> Any:
        try:
            return super().load()
        except Refused:
            raise
        except (pickle.UnpicklingError, *STRAY) as error:
            raise Refused(f"it is damaged ({type(error).__name__})") from None

    def find_class(self, module: str, name: str) -> Any:
        raise Foreign(f"it names {ascii(f'{module}.{name}')[1:-1][:80]}")

    def load_int(self) -> None:
        text = self.readline()
        if text in (b"00\n", b"01\n"):  # protocol 0 writes False and True as an INT
            raise Foreign("it has a bool of protocol 0")
        self.append(int(text, 0))

    def load_dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self._set(pairs)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, pairs: list[Any]) -> None:
        keys, target = pairs[::2], self.stack[-1]
        if len(pairs) % 2 or not all(type(key) in (str, int) for key in keys):
            raise Refused("it has a key that is neither a string nor an int")
        if type(target) is not dict:
            raise Refused(f"it fills a {type(target).__name__} as if that were a dict")
        target.update(zip(keys, pairs[1::2], strict=True))

    dispatch[pickle.INT[0]], dispatch[pickle.DICT[0]] = load_int, load_dict
    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems

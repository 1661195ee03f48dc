"""nanoGPT's way of setting options, with errors that name the mistake.

Config files by position and `--key=value` (or `--key value`, or a bare `--flag` for True) are read in order, the later one
wins. Keys are spelled with underscores as in nanoGPT; hyphens are accepted. A config file is Python: it runs in a namespace
of its own, and the names it leaves there are checked exactly as if they had been typed.
"""

import dataclasses
import difflib
import inspect
import math
import numbers
import operator
import os
import re
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from base.errors import UserError, print_error
from cli.config_files import every_name, run_config
from cli.options import PATHS, EntryOptions, RunOptions

Options = TypeVar("Options", bound=EntryOptions)
Say = Callable[[str], None]


# ----------------------------------------------------------------------------------------------------------------------
# The two calls

def parse(cls: type[Options], argv: list[str], prog: str, say: Say = print_error) -> Options:
    """The options of a command line (without the program's name); `prog` is how messages call the program.

    Prints the help and raises SystemExit(0) where --help or -h is among the words. Raises UserError for an unknown
    option, a value of the wrong type or out of range, a missing required option, and a config file that is missing,
    fails, or sets any of these wrongly. `say` is told of other commands' options in a config file.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, prog), flush=True)
        raise SystemExit(0)
    keys = _keys(cls)
    options = cls(**_collect(argv, keys, prog, say))
    for key in keys.values():
        if key.required and getattr(options, key.name) == "":
            raise UserError(f"--{key.name} is required: {key.help} ({prog} --help lists all)")
    return options


def parse_command(commands: Mapping[str, type[EntryOptions]], argv: list[str], prog: str,
                  say: Say = print_error) -> tuple[str, Any]:
    """(command, its options) where the first word picks the command.

    Prints the help and raises SystemExit(0) where the first word is --help or -h; after a command, that command's.
    Raises UserError where the first word is no command, and as `parse` does.
    """
    if not argv:
        raise UserError(f"{prog} needs a command: {_one_of(commands)} ({prog} --help tells more)")
    word, rest = argv[0], argv[1:]
    if word in ("--help", "-h"):
        print(_commands_text(commands, prog), flush=True)
        raise SystemExit(0)
    if word.startswith("-"):
        raise UserError(f"the command comes first: {prog} {'|'.join(commands)} --key=value ..., got {word!r}")
    if word not in commands:
        raise UserError(f"unknown command {word!r}{_did_you_mean(_nearest(word, commands)) or '.'} "
                        f"The commands are {_one_of(commands, 'and')} ({prog} --help tells more)")
    return word, parse(commands[word], rest, f"{prog} {word}", say)


# ----------------------------------------------------------------------------------------------------------------------
# The words of a command line

@dataclass(frozen=True)
class _Key:
    """A field, its type taken apart: `start: list[str]` has kind str and many, `int | None` kind int and optional."""

    name: str
    kind: type
    optional: bool
    many: bool
    limits: Mapping[str, Any]

    @property
    def help(self) -> str:
        return self.limits.get("help") or ""

    @property
    def required(self) -> bool:
        return bool(self.limits.get("required"))


def _keys(cls: type[EntryOptions]) -> dict[str, _Key]:
    """The options of a dataclass by name, those it declares itself before those it inherits."""
    hints = typing.get_type_hints(cls)
    declared = dict.fromkeys(name for owner in cls.__mro__ for name in inspect.get_annotations(owner))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return {name: _key(fields[name], hints[name]) for name in declared if name in fields}


def _key(field: "dataclasses.Field[Any]", hint: Any) -> _Key:
    """Raises TypeError for a type that no word can be read as: a mistake in the dataclass, not the user's."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    many = typing.get_origin(hint) is list
    kind = typing.get_args(hint)[0] if many else hint
    if kind not in (bool, int, float, str):
        raise TypeError(f"option {field.name} has a type that options cannot have: {kind}")
    return _Key(field.name, kind, optional, many, field.metadata)


def _collect(argv: list[str], keys: Mapping[str, _Key], prog: str, say: Say) -> dict[str, Any]:
    """The value of each option that was set; the later one wins, but typed lists add up.

    The first --start typed replaces a config file's, since whoever types a prompt wants that prompt; the next ones
    append.
    """
    values: dict[str, Any] = {}
    typed: set[str] = set()
    for name, value, was_typed in _assignments(argv, keys, prog, say):
        append = keys[name].many and was_typed and name in typed
        values[name] = values[name] + value if append else value
        if was_typed:
            typed.add(name)
        else:
            typed.discard(name)
    return values


def _assignments(argv: list[str], keys: Mapping[str, _Key], prog: str,
                 say: Say) -> Iterator[tuple[str, Any, bool]]:
    """(name, checked value, whether it was typed rather than read from a config file), in the order of the words."""
    words = deque(argv)
    while words:
        word = words.popleft()
        if word.startswith("--"):
            key, text = _typed_option(word, words, keys, prog)
            yield key.name, _checked(key, _from_text(key, text), f"--{key.name}"), True
        elif word.endswith(".py") and Path(word).is_file():
            for key, value in _config_options(word, keys, prog, say):
                yield key.name, _checked(key, value, f"{word}: {key.name}"), False
        else:
            raise UserError(_about_positional(word, keys, prog))


def _typed_option(word: str, words: deque[str], keys: Mapping[str, _Key], prog: str) -> tuple[_Key, str]:
    """The option that `--key=value` or `--key` names and its value's text, taken off `words` where it stands there."""
    typed, equals, text = word[2:].partition("=")
    name = typed.replace("-", "_")
    # Under torchrun, Pythons before 3.12.7 take --start for an abbreviation of torchrun's own --start-method: hence --prompt.
    name = next((key.name for key in keys.values() if name and key.limits.get("also") == name), name)
    if name not in keys:
        meant = _nearest_option(name, keys)
        raise UserError(f"unknown option --{typed}{_did_you_mean(meant and '--' + meant)} ({prog} --help lists all)")
    return keys[name], text if equals else _next_text(keys[name], words)


def _next_text(key: _Key, words: deque[str]) -> str:
    """The value of an option written without `=`: the next word, unless that is an option itself."""
    if key.kind is bool:
        # The word after a bare flag may be a config file: it is the flag's value only where it reads as one.
        return words.popleft() if words and isinstance(_from_text(key, words[0]), bool) else "True"
    if not words:
        raise UserError(f"--{key.name} expects {_wanted(key.kind)}, got nothing")
    if words[0].startswith("--"):
        raise UserError(f"--{key.name} expects {_wanted(key.kind)}, got another option: {words[0]} "
                        f"(a value that starts with -- is written --{key.name}={words[0]})")
    return words.popleft()


def _about_positional(word: str, keys: Mapping[str, _Key], prog: str) -> str:
    """What is wrong with a word that is neither an option nor an existing config file."""
    name, equals, text = word.lstrip("-").partition("=")
    if word.endswith(".py") and not equals:
        return f"no config file {word}{_did_you_mean(_nearest_file(word))}"
    meant = _nearest_option(name.replace("-", "_"), keys)
    if meant in keys:
        meant += equals + text
    return (f"{word!r} is neither a config file (*.py) nor an option{_did_you_mean(meant and '--' + meant)} "
            f"({prog} --help lists all)")


# ----------------------------------------------------------------------------------------------------------------------
# Config files

def _config_options(path: str, keys: Mapping[str, _Key], prog: str,
                    say: Say) -> Iterator[tuple[_Key, Any]]:
    """The options that a config file sets. Raises UserError for a public name that no command has.

    What the file imports or defines is no setting, and a name that starts with _ is the file's own.
    """
    also, of_others = {key.limits.get("also"): key for key in keys.values()}, []
    for name, value in run_config(path).items():
        if name in keys or name in also:
            yield keys.get(name) or also[name], value
        elif name in every_name():
            of_others.append(name)
        elif not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value)):
            meant = _nearest_option(name, keys)
            own = "" if meant else "; names of the file's own start with _"
            raise UserError(f"{path}: unknown option {name}{_did_you_mean(meant)} ({prog} --help lists all{own})")


    if of_others:
        others = ", ".join(of_others)
        say(f"{prog}: {path} sets options of other commands, which are not used here: {others}")


# ----------------------------------------------------------------------------------------------------------------------
# Values

def _from_text(key: _Key, text: str) -> Any:
    """The value that a typed text stands for; a text that does not read as the key's type stays one, to be refused."""
    if key.optional and text == "None":
        return None
    if key.kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    for read in (int, float) if key.kind in (int, float) else ():
        try:
            return read(text)
        except ValueError:
            pass
    return text


def _checked(key: _Key, value: Any, label: str) -> Any:
    """The value as the option's type. Raises UserError, in which `label` names the option, where it cannot be."""
    if value is None and key.optional:
        return None
    if not key.many:
        return _in_limits(key, _fit(key.kind, value, label), label)
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise UserError(f"{label} expects at least one value, got {_shown(value)}")
    return [_in_limits(key, _fit(key.kind, item, label), label) for item in items]


def _fit(kind: type, value: Any, label: str) -> Any:
    """The value as bool, int, float or str. Raises UserError where that would lose something.

    Whole floats are ints (1e3 iterations), ints are floats, and 0 and 1 are bools; but True is no number: it is far
    more often a slip.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is bool and (isinstance(value, bool) or isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if kind is str and isinstance(value, numbers.Real):
        return str(value)
    if kind is int and number and (isinstance(value, numbers.Integral) or float(value).is_integer()):
        return int(value)
    if kind is float and number and _is_finite(value):
        return float(value)
    raise UserError(f"{label} expects {_wanted(kind, finite=kind is float and number)}, got {_shown(value)}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _in_limits(key: _Key, value: Any, label: str) -> Any:
    """The value, the ~ of a path expanded. UserError where it is none of the choices or out of range."""
    if key.name in PATHS:
        value = re.sub(f"({PATHS[key.name]})(~[^/,]*)",
                       lambda found: found[1] + os.path.expanduser(found[2]), value)
    choices = key.limits.get("choices")
    if choices and value not in choices:
        raise UserError(f"{label} must be {_one_of(choices)}, got {_shown(value)}")
    for name, words, is_met in (("low", "at least", operator.ge), ("high", "at most", operator.le),
                                ("above", "above", operator.gt), ("below", "below", operator.lt)):
        limit = key.limits.get(name)
        if limit is not None and not is_met(value, limit):
            raise UserError(f"{label} must be {words} {limit}, got {_shown(value)}")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Help and hints

def help_text(cls: type[EntryOptions], prog: str) -> str:
    """What --help shows: usage, the class's docstring, and each option with its default and its line of help.

    Below a blank line follow the options that every torchrun entry has.
    """
    keys = _keys(cls)
    defaults = cls()
    shown = {name: f"--{name}={_default_text(key, getattr(defaults, name))}" for name, key in keys.items()}
    width = max(map(len, shown.values()))
    common = {field.name for field in dataclasses.fields(RunOptions)}
    lines = [f"usage: {_launcher([cls])} {prog} [config.py ...] [--key=value ...]", "", inspect.getdoc(cls) or "", ""]
    for is_common in (False, True):
        lines += [f"  {shown[name]:<{width}}  {_help_line(key)}" for name, key in keys.items()
                  if (name in common) == is_common]
        lines.append("")
    lines.append("Config files and options count in the order given, the later one wins.")
    return "\n".join(lines)


def _commands_text(commands: Mapping[str, type[EntryOptions]], prog: str) -> str:
    width = max(map(len, commands))
    usage = f"usage: {_launcher(commands.values())} {prog} {'|'.join(commands)} [config.py ...] [--key=value ...]"
    lines = [f"  {name:<{width}}  {_in_short(cls)}" for name, cls in commands.items()]
    return "\n".join([usage, "", *lines, "", f"{prog} COMMAND --help lists a command's options."])


def _in_short(cls: type[EntryOptions]) -> str:
    """What a command does, up to the first stop of its description."""
    return re.split(r"[.;:(]", " ".join((inspect.getdoc(cls) or "").split()))[0].strip()


def _launcher(classes: Iterable[type[EntryOptions]]) -> str:
    is_run = all(issubclass(cls, RunOptions) for cls in classes)
    return "torchrun --standalone --nproc_per_node=N" if is_run else "python"


def _help_line(key: _Key) -> str:
    choices = " | ".join(filter(None, key.limits.get("choices") or ()))
    also = f", or --{key.limits['also']}" if key.limits.get("also") else ""
    return key.help + (f" ({choices})" if choices else "") + also + (" (required)" if key.required else "")


def _default_text(key: _Key, default: Any) -> str:
    """A default as one would type it; quoted where it is empty or holds anything unprintable."""
    if key.required:
        return "..."
    if key.many:
        return " ".join(map(repr, default))
    plain = not isinstance(default, str) or default.isprintable() and default and " " not in default
    return str(default) if plain else repr(default)


def _shown(value: Any) -> str:
    """A wrong value as a message quotes it: on one line, and not endless."""
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # Python prints no int of more than 4300 digits
        return "a number too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


def _wanted(kind: type, finite: bool = False) -> str:
    if finite:
        return "a finite number"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]


def _one_of(words: Iterable[str], last: str = "or") -> str:
    """'a, b or c'; the empty choice, which stands for "not set", goes unmentioned."""
    *others, final = filter(None, words)
    return f"{', '.join(others)} {last} {final}" if others else final


def _did_you_mean(meant: str) -> str:
    return f". Did you mean {meant}?" if meant else ""


def _nearest(word: str, known: Iterable[str]) -> str:
    """The known word that looks most like `word`, "" where none comes near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def _nearest_option(name: str, keys: Mapping[str, _Key]) -> str:
    """The option most like `name`; for another grammar's no_stream, `stream=False` rather than its opposite."""
    positive = name.removeprefix("no_")
    if positive != name and positive in keys and keys[positive].kind is bool:
        return f"{positive}=False"
    return _nearest(name, keys)


def _nearest_file(path: str) -> str:
    """The config file most like a missing one, beside it or in configs/ (nanoGPT calls the directory config/)."""
    folders = dict.fromkeys((Path(path).parent, Path("configs")))
    return _nearest(path, [str(file) for folder in folders for file in sorted(folder.glob("*.py"))])

"""The command line: config files by position and `--key=value`, in order, the later one wins.

`--key value` and a bare `--flag` (True) work too, and hyphens for underscores. A config file is
Python, as in nanoGPT. The names that it leaves are checked as if they had been typed."""

import contextlib
import dataclasses
import difflib
import inspect
import itertools
import math
import numbers
import operator
import os
import re
import traceback
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from base.errors import UserError, print_error
from cli import options
from cli.options import PATHS, EntryOptions, RunOptions

Options = TypeVar("Options", bound=EntryOptions)
Say = Callable[[str], None]
Keys = Mapping[str, "_Key"]

LIMITS = {"low": ("at least", operator.ge), "high": ("at most", operator.le),
          "above": ("above", operator.gt), "below": ("below", operator.lt)}  # fmt: skip
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def parse(cls: type[Options], argv: list[str], prog: str, say: Say = print_error) -> Options:
    """The options that the words set; prog: the program's name in messages. --help prints the help
    and raises SystemExit(0). Raises UserError for an unknown option, a value of the wrong type or
    out of range, a missing required option, and a config file that does not run. A config file's
    options of other commands are reported to `say`."""
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, prog), flush=True)
        raise SystemExit(0)
    keys = _keys(cls)
    options = cls(**_collect(argv, keys, prog, say))
    for key in keys.values():
        if key.get("required") and getattr(options, key.name) == "":
            needed = f"--{key.name} is required: {key.get('help')}"
            raise UserError(f"{needed} ({prog} --help lists all)")
    return options


def parse_command(commands: Mapping[str, type[EntryOptions]], argv: list[str], prog: str,
                  say: Say = print_error) -> tuple[str, Any]:  # fmt: skip
    """(command, its options); the first word is the command. Errors and help as of `parse`."""
    if not argv:
        raise UserError(f"{prog} needs a command: {_one_of(commands)} ({prog} --help tells more)")
    word, rest = argv[0], argv[1:]
    if word in ("--help", "-h"):
        print(_commands_text(commands, prog), flush=True)
        raise SystemExit(0)
    if word.startswith("-"):
        usage = f"{prog} {'|'.join(commands)} --key=value ..."
        raise UserError(f"the command comes first: {usage}, got {word!r}")
    if word not in commands:
        known = f"The commands are {_one_of(commands, 'and')} ({prog} --help tells more)"
        hint = _did_you_mean(_nearest(word, commands)) or "."
        raise UserError(f"unknown command {word!r}{hint} {known}")
    return word, parse(commands[word], rest, f"{prog} {word}", say)


# --- words of the command line --------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    """A dataclass field. `list[str]` has kind str and is many, `int | None` is optional."""

    name: str
    kind: type
    optional: bool
    many: bool
    get: Callable[[str], Any]  # of the field's metadata


def _keys(cls: type[EntryOptions]) -> dict[str, _Key]:
    keys, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        parts = typing.get_args(hint)
        kind, many = parts[0] if parts else hint, typing.get_origin(hint) is list
        if kind not in KINDS:
            raise TypeError(f"option {field.name} has a type that options cannot have: {kind}")
        keys[field.name] = _Key(field.name, kind, type(None) in parts, many, field.metadata.get)
    return keys


def _collect(argv: list[str], keys: Keys, prog: str, say: Say) -> dict[str, Any]:
    """The value of each option that was set. Typed lists append to each other, but the first one
    replaces a config file's: a prompt that is typed is the prompt that is wanted."""
    values: dict[str, Any] = {}
    typed: set[str] = set()
    for name, value, was_typed in _settings(argv, keys, prog, say):
        append = keys[name].many and was_typed and name in typed
        values[name] = values[name] + value if append else value
        (typed.add if was_typed else typed.discard)(name)
    return values


def _settings(argv: list[str], keys: Keys, prog: str, say: Say) -> Iterator[tuple[str, Any, bool]]:
    """(name, checked value, True if typed and False if a config file's), in the words' order."""
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


def _typed_option(word: str, words: deque[str], keys: Keys, prog: str) -> tuple[_Key, str]:
    """The option of `--key=value` or `--key`, and the text of its value."""
    typed, equals, text = word[2:].partition("=")
    name = typed.replace("-", "_")
    # Pythons before 3.12.7 take torchrun's --start for --start-method. Hence --prompt
    name = next((key.name for key in keys.values() if name and key.get("also") == name), name)
    if name not in keys:
        meant = _nearest_option(name, keys)
        hint = _did_you_mean(meant and "--" + meant)
        raise UserError(f"unknown option --{typed}{hint} ({prog} --help lists all)")
    return keys[name], text if equals else _next_text(keys[name], words)


def _next_text(key: _Key, words: deque[str]) -> str:
    """The value of an option written without `=`: the next word, unless that is an option."""
    if key.kind is bool:  # the word after a bare flag may be a config file
        is_value = words and isinstance(_from_text(key, words[0]), bool)
        return words.popleft() if is_value else "True"
    wanted = f"--{key.name} expects {KINDS[key.kind]}"
    if not words:
        raise UserError(f"{wanted}, got nothing")
    if words[0].startswith("--"):
        how = f"a value that starts with -- is written --{key.name}={words[0]}"
        raise UserError(f"{wanted}, got another option: {words[0]} ({how})")
    return words.popleft()


def _about_positional(word: str, keys: Keys, prog: str) -> str:
    """The error for a word that is neither an option nor an existing config file."""
    name, equals, text = word.lstrip("-").partition("=")
    if word.endswith(".py") and not equals:  # nanoGPT calls the directory config/
        folders = dict.fromkeys((Path(word).parent, Path("configs")))
        files = [str(file) for folder in folders for file in sorted(folder.glob("*.py"))]
        return f"no config file {word}{_did_you_mean(_nearest(word, files))}"
    meant = _nearest_option(name.replace("-", "_"), keys)
    if meant in keys:
        meant += equals + text
    hint = _did_you_mean(meant and "--" + meant)
    return f"{word!r} is neither a config file (*.py) nor an option{hint} ({prog} --help lists all)"


def _config_options(path: str, keys: Keys, prog: str, say: Say) -> Iterator[tuple[_Key, Any]]:
    """The options that a config file sets. Imports, functions and names with _ are its own. Raises
    UserError for another name that no command has."""
    also = {key.get("also"): key for key in keys.values()}
    of_others = []
    for name, value in _run_config(path).items():
        if name in keys or name in also:
            yield keys.get(name) or also[name], value
        elif name in _every_name():
            of_others.append(name)
        elif not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value)):
            meant = _nearest_option(name, keys)
            own = "" if meant else "; names of the file's own start with _"
            hint = f"{_did_you_mean(meant)} ({prog} --help lists all{own})"
            raise UserError(f"{path}: unknown option {name}{hint}")
    if of_others:
        others = ", ".join(of_others)
        say(f"{prog}: {path} sets options of other commands, which are not used here: {others}")


def _every_name() -> set[str]:
    """The names of all commands' options: a config file may serve several commands."""
    kinds = (kind for kind in vars(options).values() if isinstance(kind, type))
    fields = (dataclasses.fields(kind) for kind in kinds if issubclass(kind, EntryOptions))
    return {name for f in itertools.chain(*fields) for name in (f.name, f.metadata["also"])}


def _run_config(path: str) -> dict[str, Any]:
    """The names that a config file leaves. Raises UserError if it cannot be read or run."""
    names: dict[str, Any] = {"__file__": path, "__name__": "config"}
    code = _compiled(path)
    try:
        exec(code, names)
    except (Exception, SystemExit) as error:  # a config file must not end the program silently
        # the last line of the file itself, also where the error is in something that it calls
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == path]
        raise UserError(f"{path} line {lines[-1]}: {_one_line(error)}") from error
    return names


def _compiled(path: str) -> types.CodeType:
    try:
        return compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from error
    except SyntaxError as error:
        where = f"{path} line {error.lineno or 1}"
        raise UserError(f"{where}: {type(error).__name__}: {error.msg}") from error
    except ValueError as error:  # a null byte, before Python 3.12
        raise UserError(f"{path}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# --- values ---------------------------------------------------------------------------------------


def _from_text(key: _Key, text: str) -> Any:
    """The value of a typed text; the text itself if it does not read as the option's type."""
    if key.optional and text == "None":
        return None
    if key.kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    for read in (int, float) if key.kind in (int, float) else ():
        with contextlib.suppress(ValueError):
            return read(text)
    return text


def _checked(key: _Key, value: Any, label: str) -> Any:
    """The value as the option's type. Raises UserError that begins with `label`."""
    if value is None and key.optional:
        return None
    if not key.many:
        return _in_limits(key, _fit(key.kind, value, label), label)
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise UserError(f"{label} expects at least one value, got {_shown(value)}")
    return [_in_limits(key, _fit(key.kind, item, label), label) for item in items]


def _fit(kind: type, value: Any, label: str) -> Any:
    """The value as bool, int, float or str. Raises UserError if that would lose something. 1e3 is a
    whole number, ints are floats, 0 and 1 are bools. True is no number: more often it is a slip."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if kind is str and isinstance(value, numbers.Real):
        return str(value)
    if kind is int and number and (isinstance(value, numbers.Integral) or value.is_integer()):
        return int(value)
    with contextlib.suppress(OverflowError):  # an int that no float can hold
        if kind is float and number and math.isfinite(value):
            return float(value)
    wanted = "a finite number" if kind is float and number else KINDS[kind]
    raise UserError(f"{label} expects {wanted}, got {_shown(value)}")


def _in_limits(key: _Key, value: Any, label: str) -> Any:
    """The value, the ~ of a path expanded. Raises UserError if it is out of range."""
    if key.name in PATHS:
        home = f"({PATHS[key.name]})(~[^/,]*)"
        value = re.sub(home, lambda found: found[1] + os.path.expanduser(found[2]), value)
    choices = key.get("choices")
    if choices and value not in choices:
        raise UserError(f"{label} must be {_one_of(choices)}, got {_shown(value)}")
    for name, (words, is_met) in LIMITS.items():
        limit = key.get(name)
        if limit is not None and not is_met(value, limit):
            raise UserError(f"{label} must be {words} {limit}, got {_shown(value)}")
    return value


# --- help and hints -------------------------------------------------------------------------------


def help_text(cls: type[EntryOptions], prog: str) -> str:
    """Usage, the class's docstring, and a line for each option; those of every run come last."""
    keys, defaults = _keys(cls), cls()
    shown = {n: f"--{n}={_default_text(key, getattr(defaults, n))}" for n, key in keys.items()}
    width = max(map(len, shown.values()))
    common = {field.name for field in dataclasses.fields(RunOptions)}
    lines = [_usage([cls], prog), "", inspect.getdoc(cls) or "", ""]
    for names in (keys.keys() - common, keys.keys() & common):
        chosen = sorted((keys[n] for n in keys if n in names), key=lambda key: key.name == "debug")
        lines += [f"  {shown[key.name]:<{width}}  {_help_line(key)}" for key in chosen] + [""]
    end = "Config files and options count in the order given, the later one wins."
    return "\n".join([*lines, end])


def _commands_text(commands: Mapping[str, type[EntryOptions]], prog: str) -> str:
    width, names = max(map(len, commands)), "|".join(commands)
    lines = [_usage(commands.values(), f"{prog} {names}"), ""]
    for name, cls in commands.items():
        first = re.split(r"[.;:(]", " ".join((inspect.getdoc(cls) or "").split()))[0].strip()
        lines.append(f"  {name:<{width}}  {first}")
    return "\n".join([*lines, "", f"{prog} COMMAND --help lists a command's options."])


def _usage(classes: Iterable[type[EntryOptions]], command: str) -> str:
    is_run = all(issubclass(cls, RunOptions) for cls in classes)
    launcher = "torchrun --standalone --nproc_per_node=N" if is_run else "python"
    return f"usage: {launcher} {command} [config.py ...] [--key=value ...]"


def _help_line(key: _Key) -> str:
    choices = " | ".join(filter(None, key.get("choices") or ()))
    also = f", or --{key.get('also')}" if key.get("also") else ""
    required = " (required)" if key.get("required") else ""
    return (key.get("help") or "") + (f" ({choices})" if choices else "") + also + required


def _default_text(key: _Key, default: Any) -> str:
    """A default as one would type it; quoted if it is empty or not printable."""
    if key.get("required"):
        return "..."
    if key.many:
        return " ".join(map(repr, default))
    plain = not isinstance(default, str) or default.isprintable() and default and " " not in default
    return str(default) if plain else repr(default)


def _shown(value: Any) -> str:
    """A wrong value in a message: on one line, of at most 80 characters."""
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # Python prints no int of more than 4300 digits
        return "a number too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


def _one_of(words: Iterable[str], last: str = "or") -> str:
    """'a, b or c', without the empty choice, which stands for "not set"."""
    *others, final = filter(None, words)
    return f"{', '.join(others)} {last} {final}" if others else final


def _did_you_mean(meant: str) -> str:
    return f". Did you mean {meant}?" if meant else ""


def _nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`, "" if none is like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def _nearest_option(name: str, keys: Keys) -> str:
    """The option most like `name`; `stream=False` for another grammar's no_stream."""
    positive = name.removeprefix("no_")
    if positive != name and positive in keys and keys[positive].kind is bool:
        return f"{positive}=False"
    return _nearest(name, keys)

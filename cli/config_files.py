"""Config files: Python that runs in a namespace of its own."""

import dataclasses
import traceback
import types
from pathlib import Path
from typing import Any

from base.errors import UserError
from cli import options


def every_name() -> set[str]:
    """The names of all commands' options: a config file may serve several commands."""
    return {
        name
        for cls in vars(options).values()
        if isinstance(cls, type) and issubclass(cls, options.EntryOptions)
        for field in dataclasses.fields(cls)
        for name in (field.name, field.metadata["also"])
    }


def run_config(path: str) -> dict[str, Any]:
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

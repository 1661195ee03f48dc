"""Config files: Python that runs in a namespace of its own, and what names it may leave there."""

import dataclasses
import traceback
import types
from pathlib import Path
from typing import Any

from base.errors import UserError
from cli import options


def every_name() -> set[str]:
    """The names of all commands' options: a config file may be for several."""
    classes = [
        cls
        for cls in vars(options).values()
        if isinstance(cls, type) and issubclass(cls, options.EntryOptions)
    ]
    return {
        name
        for cls in classes
        for field in dataclasses.fields(cls)
        for name in (field.name, field.metadata["also"])
    }


def run_config(path: str) -> dict[str, Any]:
    """The names that a config file leaves behind. Raises UserError where it cannot be read or run."""
    names: dict[str, Any] = {"__file__": path, "__name__": "config"}
    code = _compiled(path)
    try:
        exec(code, names)
    except (Exception, SystemExit) as error:  # a config file may raise anything, and must not end the program quietly
        # The deepest frame in the file itself: where something that it calls fails, the line that calls is meant.
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
        raise UserError(f"{path} line {lines[-1]}: {_one_line(error)}") from error
    return names


def _compiled(path: str) -> types.CodeType:
    """Raises UserError where the file cannot be read or is not Python."""
    try:
        return compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from error
    except SyntaxError as error:
        raise UserError(f"{path} line {error.lineno or 1}: {type(error).__name__}: {error.msg}") from error
    except ValueError as error:  # a null byte, before Python 3.12
        raise UserError(f"{path}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

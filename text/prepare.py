"""What the data/*/prepare.py scripts share: options, the text to prepare, and how errors end."""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from base.console import console
from base.errors import ReaderGone, UserError
from base.files import decode_text, read_text, replacing
from text.dataset import make_directory

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


def run(main: Callable[[], None]) -> None:
    """main(); a user's mistake ends in one line on standard error and exit status 2."""
    with console():
        try:
            main()
            sys.stdout.flush()
        except ReaderGone:
            sys.exit(128 + signal.SIGPIPE)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


def a_path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def options_parser(description: str, script: str) -> argparse.ArgumentParser:
    """A parser that knows --out; its default is the directory of `script`, a prepare.py."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    home = Path(script).resolve().parent
    parser.add_argument(
        "--out", type=a_path, default=home, metavar="DIR",
        help="where to write (default: %(default)s)"
    )
    return parser


def shakespeare_options(description: str, script: str) -> argparse.Namespace:
    """The command line's --input and --out."""
    parser = options_parser(description, script)
    parser.add_argument(
        "--input", type=a_path, metavar="FILE",
        help="a UTF-8 text to take instead of downloading one"
    )
    return parser.parse_args()


def shakespeare_text(options: argparse.Namespace) -> str:
    """--input's text; without it tiny Shakespeare, downloaded once and kept in --out."""
    if options.input is not None:
        return read_text(options.input)
    kept = options.out / "input.txt"
    if not kept.exists():
        content = _download(SHAKESPEARE_URL)
        decode_text(content, SHAKESPEARE_URL)  # keep nothing that is not text
        make_directory(options.out)
        with replacing(kept) as file:
            file.write(content)
    return read_text(kept)


def _download(url: str) -> bytes:
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} is out of reach ({error}): pass a text with --input=FILE"
        ) from error

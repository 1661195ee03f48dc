"""What the data/*/prepare.py scripts share: options, and the text to prepare."""

import argparse
import http.client
import os
from pathlib import Path

from base.errors import UserError
from base.files import decode_text, read_text, replacing
from text.dataset import make_directory

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")  # fmt: skip


def a_path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def options_parser(description: str, script: str) -> argparse.ArgumentParser:
    """A parser that knows --out; its default is the directory of `script`, a prepare.py."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    home, said = Path(script).resolve().parent, "where to write (default: %(default)s)"
    parser.add_argument("--out", type=a_path, default=home, metavar="DIR", help=said)
    return parser


def shakespeare_options(description: str, script: str) -> argparse.Namespace:
    """The command line's --input and --out."""
    parser = options_parser(description, script)
    said = "a UTF-8 text to take instead of downloading one"
    parser.add_argument("--input", type=a_path, metavar="FILE", help=said)
    return parser.parse_args()


def shakespeare_text(options: argparse.Namespace) -> str:
    """--input's text; without it tiny Shakespeare, downloaded once and kept in --out."""
    if options.input is not None:
        return read_text(options.input)
    kept = options.out / "input.txt"
    if not kept.exists():
        import urllib.request

        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            fault = f"{SHAKESPEARE_URL} is out of reach ({error})"
            raise UserError(f"{fault}: pass a text with --input=FILE") from error
        decode_text(content, SHAKESPEARE_URL)  # keep nothing that is not text
        make_directory(options.out)
        with replacing(kept) as file:
            file.write(content)
    return read_text(kept)

"""Tiny Shakespeare (1.1 MB), or any text given with --input, character by character."""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.console import run
from text.dataset import split_and_write
from text.prepare import shakespeare_options, shakespeare_text
from text.tokenizer import CharTokenizer


def main(options: Namespace) -> None:
    text = shakespeare_text(options)
    split_and_write(options.out, text, CharTokenizer.of_text(text))


if __name__ == "__main__":
    sys.exit(run(lambda: (main, shakespeare_options("Prepare tiny Shakespeare, one token a character.", __file__))))

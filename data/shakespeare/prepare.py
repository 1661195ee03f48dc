"""Tiny Shakespeare (1.1 MB), or any text given with --input, in GPT-2's tokens: for fine-tuning GPT-2."""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.console import run
from text.dataset import split_and_write
from text.prepare import shakespeare_options, shakespeare_text
from text.tokenizer import GPT2Tokenizer


def main(options: Namespace) -> None:
    split_and_write(options.out, shakespeare_text(options), GPT2Tokenizer())


if __name__ == "__main__":
    sys.exit(run(lambda: (main, shakespeare_options("Prepare tiny Shakespeare in GPT-2's tokens.", __file__))))

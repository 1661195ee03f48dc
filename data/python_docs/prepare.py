"""Python's own help topics, character by character: a dataset with nothing to download.

Every Python carries them (465 KB of English and code), each version its own edition, so two versions of Python give two
slightly different texts.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.console import run
from base.errors import UserError
from text.dataset import split_and_write
from text.prepare import options_parser
from text.tokenizer import CharTokenizer


def help_topics() -> str:
    """All topics, in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python came without its help topics (pydoc_data): use another, or data/shakespeare_char"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def main(options: Namespace) -> None:
    text = help_topics()
    split_and_write(options.out, text, CharTokenizer.of_text(text))


if __name__ == "__main__":
    parser = options_parser("Prepare Python's help topics, one token a character.", __file__)
    sys.exit(run(lambda: (main, parser.parse_args())))

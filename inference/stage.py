"""Where generated tokens go: the text on standard output, and the file of --out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import IO, Any

from base.errors import ReaderGone
from base.files import growing, naming
from cli.options import SampleOptions
from inference.generation import Generation, Row
from text.tokenizer import StreamDecoder, Tokenizer


@contextmanager
def samples_file(path: str) -> Iterator[IO[str] | None]:
    """The file of --out, if there is one."""
    with naming(path), growing(path) if path else nullcontext() as out:
        yield out


class Stage:
    """The audience: prints the rows in order, and writes each to the file of --out when its turn has come.

    With --stream the first row that is not through appears as it is written; a row that ends before its turn waits.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer, options: SampleOptions, out: IO[str] | None):
        self.texts, self.options, self.out = texts, options, out
        self.listeners = [Listener(tokenizer, options.stop) for _ in range(len(texts) * options.num_samples)]
        self.ended: dict[int, Row] = {}  # complete, and waiting for their turn
        self.turn = 0  # the number of the row that is printed now
        self.printed = 0  # characters of it that have been
        self.gone = False  # nobody reads, and nothing is kept: the rows end

    def hear(self, row: Row, token: int) -> bool:
        ended = self.listeners[row.number].hear(token)
        if self.options.stream and row.number == self.turn:
            self._print(row)
        return ended or self.gone

    def end(self, row: Row) -> None:
        self.listeners[row.number].finish()
        self.ended[row.number] = row
        while (done := self.ended.pop(self.turn, None)) is not None:
            self._print(done)
            self._say("\n---------------\n")
            self._keep(done)
            self.turn, self.printed = self.turn + 1, 0

    def _print(self, row: Row) -> None:
        """The prompt and what is final of the row's text, as far as it has not been printed."""
        listener = self.listeners[row.number]
        text = self.texts[row.prompt] + listener.text[: listener.final]
        self._say(text[self.printed :])
        self.printed = len(text)

    def _say(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except ReaderGone:
            self.gone = not (self.options.out or self.options.report)

    def leave(self) -> None:
        """Where a run is broken off within a row, what is said next starts on a line of its own."""
        if self.printed:
            with suppress(OSError):  # that it cannot be written may be what broke it off
                self._say("\n")

    def _keep(self, row: Row) -> None:
        if self.out is not None:
            sample = {
                "prompt": self.texts[row.prompt],
                "sample": row.sample,
                "text": self.listeners[row.number].text,
                "tokens": row.tokens[row.prompt_tokens :],
            }
            self.out.write(json.dumps(sample, ensure_ascii=False) + "\n")
            self.out.flush()

    def samples(self, result: Generation) -> list[dict[str, Any]]:
        """The report's list of samples."""
        return [
            {
                "prompt": self.texts[row.prompt],
                "prompt_tokens": row.tokens[: row.prompt_tokens],
                "tokens": row.tokens[row.prompt_tokens :],
                "text": listener.text,
            }
            for row, listener in zip(result.rows, self.listeners, strict=True)
        ]


@dataclass
class Listener:
    """Turns a row's tokens into text as they come, and finds its stop text, which is not part of the sample.

    text[:final] will not change any more: whole characters, and nothing that may yet turn out to begin the stop text.
    """

    tokenizer: Tokenizer
    stop: str
    text: str = ""
    final: int = 0

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer)

    def hear(self, token: int) -> bool:
        """True where the stop text is complete: the row ends."""
        self.text += self._decoder.push(token)
        found = self.text.find(self.stop, self.final) if self.stop else -1
        if found >= 0:
            self._decoder.finish()  # the rest of this token, half a character perhaps, comes after the stop text
            self.text = self.text[:found]
        self.final = len(self.text) - (0 if found >= 0 else self._held())
        return found >= 0

    def finish(self) -> str:
        """The whole text, with whatever was held back."""
        self.text += self._decoder.finish()
        self.final = len(self.text)
        return self.text

    def _held(self) -> int:
        """Length of the longest end of the text that could begin the stop text."""
        longest = min(len(self.stop) - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if self.text.endswith(self.stop[:n])), 0)

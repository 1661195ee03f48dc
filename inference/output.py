"""Where the rows go: their text on standard output, and the file of --out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import IO, Any

from base.errors import ReaderGone, UserError
from base.files import growing, naming
from cli.options import SampleOptions
from inference.sampling import Row
from text.tokenizer import Tokenizer


class RowText:
    """A row's text, decoded token by token up to the stop text. text[:final] will not change: it
    ends before what may become the stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: str):
        self.decoder, self.stop, self.text, self.final = tokenizer.stream(), stop, "", 0

    def push(self, token: int) -> bool:
        """Decode the row's next token. True if it completes the stop text."""
        self.text += self.decoder.push(token)
        found = self.text.find(self.stop, self.final) if self.stop else -1
        if found >= 0:
            self.decoder.finish()  # drops the rest of the token, perhaps half a character
            self.text, self.final = self.text[:found], found
            return True
        # the longest end of the text that could begin the stop text
        longest = min(len(self.stop) - 1, len(self.text))
        ends = (n for n in range(longest, 0, -1) if self.text.endswith(self.stop[:n]))
        self.final = len(self.text) - next(ends, 0)
        return False

    def finish(self) -> str:
        """The complete text, after the row's last token."""
        self.text += self.decoder.finish()
        self.final = len(self.text)
        return self.text


def stop_token(tokenizer: Tokenizer, choice: str) -> int:
    """The id that --stop_token names, -1 if none. UserError unless it is one of the tokenizer's."""
    token_id = tokenizer.eot if choice == "eos" else -1
    if choice.isascii() and choice.isdigit() and int(choice) < tokenizer.n_vocab:
        token_id = int(choice)
    elif choice not in ("", "eos"):
        most = tokenizer.n_vocab
        raise UserError(f"--stop_token={choice} is neither eos nor an id below {most}.")
    if token_id is None:
        fault = "the tokenizer has no token that ends a text"
        raise UserError(f"--stop_token=eos: {fault}. Give an id.")
    return token_id


class Output:
    """Prints the rows in order and appends each to `file`; for rank 0. A complete row waits until
    all before it are complete. With --stream the first incomplete row is printed as it is written.
    closed: nobody reads standard output and nothing else is kept."""

    def __init__(self, prompts: list[str], tokenizer: Tokenizer, options: SampleOptions,
                 file: IO[str] | None):
        self.prompts, self.options, self.file = prompts, options, file
        n = len(prompts) * options.num_samples
        self.texts = [RowText(tokenizer, options.stop) for _ in range(n)]
        self.complete: dict[int, Row] = {}  # rows that wait
        self.stop_token = stop_token(tokenizer, options.stop_token)
        # the number of the row that is printed now, characters of it that are
        self.current, self.printed, self.closed = 0, 0, False

    def stops(self, row: Row, token: int) -> bool:
        """Whether the row ends with its next token; see Generation."""
        ended = token == self.stop_token or self.texts[row.number].push(token)
        return ended or self.closed

    def show(self, row: Row) -> None:
        """Print what there is to print now that the row has got tokens."""
        if row.ended:
            self.texts[row.number].finish()
            self.complete[row.number] = row
        elif self.options.stream and row.number == self.current:
            self._print_text(row)
        while (done := self.complete.pop(self.current, None)) is not None:
            self._print_text(done)
            self._print("\n---------------\n")
            if self.file is not None:
                sample = {"prompt": self.prompts[done.prompt], "sample": done.sample}
                text, tokens = self.texts[done.number].text, done.tokens[done.prompt_tokens :]
                line = json.dumps(sample | {"text": text, "tokens": tokens}, ensure_ascii=False)
                print(line, file=self.file, flush=True)
            self.current, self.printed = self.current + 1, 0

    def _print_text(self, row: Row) -> None:
        text = self.texts[row.number]
        final = self.prompts[row.prompt] + text.text[: text.final]
        self._print(final[self.printed :])
        self.printed = len(final)

    def _print(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except ReaderGone:
            self.closed = not (self.options.out or self.options.report)

    def end_line(self) -> None:
        """If a row is half printed, end its line, so that an error message begins on the next."""
        if self.printed:
            with suppress(OSError):  # standard output may be what failed
                self._print("\n")

    def samples(self, rows: list[Row]) -> list[dict[str, Any]]:
        """The report's list of samples."""
        return [
            {"prompt": self.prompts[row.prompt], "prompt_tokens": row.tokens[: row.prompt_tokens],
             "tokens": row.tokens[row.prompt_tokens :], "text": self.texts[row.number].text}
            for row in rows
        ]  # fmt: skip


@contextmanager
def output_of(prompts: list[str], tokenizer: Tokenizer, options: SampleOptions,
              out: str) -> Iterator[Output]:
    """The Output of a run, which appends to the file `out` unless that is empty."""
    with naming(out), growing(out) if out else nullcontext() as file:
        output = Output(prompts, tokenizer, options, file)
        try:
            yield output
        finally:
            output.end_line()

"""Prompts: read from the options and files, made token ids."""

from pathlib import Path

from base.errors import UserError
from base.files import read_text
from text.tokenizer import Tokenizer


def read_prompts(start: list[str]) -> list[str]:
    """The prompts of --start: text, FILE:path (one prompt, whole), PROMPTS:path (one a line, empty lines left out)."""
    prompts: list[str] = []
    for spec in start:
        if spec.startswith("FILE:"):
            prompts.append(read_text(spec.removeprefix("FILE:")))
        elif spec.startswith("PROMPTS:"):
            prompts += read_lines(Path(spec.removeprefix("PROMPTS:")))
        elif any("\ud800" <= char <= "\udfff" for char in spec):  # how Python passes on bytes that are not UTF-8
            raise UserError(f"--prompt={ascii(spec)[:60]} is not UTF-8 text.")
        else:
            prompts.append(spec)
    return prompts


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank. Not splitlines(): that also cuts at form feeds and the like, within a prompt."""
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path} has no prompt: write one a line.")
    return lines


def encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The prompts as ids. UserError where that is not possible, naming the prompt."""
    prompts = []
    for i, text in enumerate(texts, 1):
        try:
            prompts.append(tokenizer.encode(text))
        except UserError as error:
            raise UserError(f"prompt {i} ({text[:40]!r}): {error}") from error
        if not prompts[-1] and tokenizer.kind == "ids":
            raise UserError(
                f"prompt {i} is empty. The model's tokenizer is not known: give token ids, for example --prompt='5 17 3'."
                f" {tokenizer.note}".rstrip()
            )
    return prompts

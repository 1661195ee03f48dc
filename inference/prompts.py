"""Prompts: read from options and files, encoded, and checked against the model."""

from pathlib import Path

from base.errors import UserError
from base.files import read_text
from inference.sampling import Sampling
from text.tokenizer import Tokenizer


def read_prompts(start: list[str]) -> list[str]:
    """The prompts of --start: text, FILE:path (the whole file), PROMPTS:path (one on each line)."""
    prompts: list[str] = []
    for spec in start:
        if spec.startswith("FILE:"):
            prompts.append(read_text(spec.removeprefix("FILE:")))
        elif spec.startswith("PROMPTS:"):
            path = Path(spec.removeprefix("PROMPTS:"))
            # not splitlines(), which also cuts at form feeds and the like
            lines = [line for line in read_text(path).split("\n") if line.strip()]
            if not lines:
                raise UserError(f"{path} has no prompt: write one a line.")
            prompts += lines
        elif any("\ud800" <= char <= "\udfff" for char in spec):  # bytes that are not UTF-8
            raise UserError(f"--prompt={ascii(spec)[:60]} is not UTF-8 text.")
        else:
            prompts.append(spec)
    return prompts


def encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The prompts' ids. UserError names the prompt that cannot be encoded."""
    prompts = []
    for i, text in enumerate(texts, 1):
        try:
            prompts.append(tokenizer.encode(text))
        except UserError as error:
            raise UserError(f"prompt {i} ({text[:40]!r}): {error}") from error
        if not prompts[-1] and tokenizer.kind == "ids":
            unknown = f"prompt {i} is empty. The model's tokenizer is not known: give token ids"
            raise UserError(f"{unknown}, for example --prompt='5 17 3'. {tokenizer.note}".rstrip())
    return prompts


def check_prompts(prompts: list[list[int]], vocab_size: int, block_size: int,
                  sampling: Sampling) -> None:
    """UserError if a prompt is empty, has unknown ids, or is too long for the overflow rule."""
    if not prompts:
        advice = "give --prompt, and a prompt file with at least one line"
        raise UserError(f"there is no prompt: {advice}.")
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            advice = "give it at least one to go on from, for example --prompt=$'\\n'"
            raise UserError(f"prompt {i} has no token: {advice}.")
        if beyond := [token for token in prompt if not 0 <= token < vocab_size]:
            fault = f"token id {beyond[0]}, the model's vocab_size is {vocab_size}"
            raise UserError(f"prompt {i} has {fault}: not its tokenizer?")
        room, overflow = block_size - len(prompt), sampling.overflow
        has = f"prompt {i} has {len(prompt)} tokens"
        if overflow == "stop" and room <= 0 or overflow == "error" and room < 0:
            advice = "Shorten it, or use --overflow=slide"
            raise UserError(f"{has}, block_size is {block_size}. {advice}.")
        if overflow == "error" and sampling.max_new_tokens > room:
            advice = f"Ask for {room}, or use" if room else "Use"
            limits = f"max_new_tokens={sampling.max_new_tokens} it outgrows block_size={block_size}"
            raise UserError(f"{has}, with {limits}. {advice} --overflow=slide.")

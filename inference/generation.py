"""Prefill, decode step, sampling on which all ranks agree, stopping, and text that streams.

Rows are the sequences being written: each prompt, as often as num_samples says. Every rank runs every forward pass and
every collective here; rank 0 of the tp axis alone chooses tokens and decides which rows end, and tells the others.

A draft may guess what comes next (speculative decoding: Leviathan, Kalman, Matias, arXiv 2211.17192). A step then reads a
row's newest token and the guesses behind it at once, and gives the row every guess that is what would have been chosen
anyway, and the token after them: the same text in fewer passes.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from base.errors import UserError
from inference.decoding import Decoder, decoder_for
from inference.sampling import Sampling, candidates, choose
from model import KVCache
from parallel.collectives import all_gather, broadcast
from tp_model import TensorParallelGPT


@dataclass
class Row:
    """One sequence: its number, its prompt's, which of that prompt's samples it is, and all its tokens so far."""

    number: int
    prompt: int
    sample: int
    tokens: list[int]
    prompt_tokens: int
    ended: bool = False

    @property
    def new(self) -> int:
        return len(self.tokens) - self.prompt_tokens


class Audience(Protocol):
    """Who follows the rows as they are written; called on rank 0 of the tp axis only."""

    def hear(self, row: Row, token: int) -> bool:
        """The row's next token; row.tokens may be behind. True: the row ends with it."""
        ...

    def end(self, row: Row) -> None:
        """The row is complete."""
        ...


class Draft(Protocol):
    """Who guesses. Every rank asks its own; what two ranks guess differently is not used."""

    def begin(self) -> None:
        """A new group of rows begins; what is known of others is of no use."""
        ...

    def propose(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        """For each row at most room[i] tokens that may follow those it has. On all ranks as many."""
        ...

    def learn(self, row: Row, proposed: int, accepted: int) -> None:
        """So many of the row's last guesses were right; they are in it, and the token that came after them."""
        ...


@dataclass
class Timing:
    """Seconds, over all groups of rows. A decode step adds a token, or with a draft several, to every unfinished row."""

    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0  # from the start of the first prefill
    decode_s: float = 0.0
    decode_tokens: int = 0  # the tokens after each row's first
    decode_steps: int = 0
    kv_cache_bytes: int = 0  # the most that was held
    slid: bool = False


@dataclass
class Generation:
    rows: list[Row]
    timing: Timing = field(default_factory=Timing)


def check_prompts(prompts: list[list[int]], vocab_size: int, block_size: int, sampling: Sampling) -> None:
    """UserError for a prompt that cannot be continued: empty, of foreign ids, or too long for the overflow rule."""
    if not prompts:
        raise UserError("there is no prompt: give --prompt, and a prompt file with at least one line.")
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"prompt {i} has no token: give it at least one to go on from, for example --prompt=$'\\n'.")
        beyond = [token for token in prompt if not 0 <= token < vocab_size]
        if beyond:
            raise UserError(f"prompt {i} has token id {beyond[0]}, the model's vocab_size is {vocab_size}: not its tokenizer?")
        room = block_size - len(prompt)
        if sampling.overflow == "stop" and room <= 0 or sampling.overflow == "error" and room < 0:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, block_size is {block_size}. Shorten it, or use --overflow=slide."
            )
        if sampling.overflow == "error" and sampling.max_new_tokens > room:
            advice = f"Ask for {room}, or use" if room else "Use"
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, with max_new_tokens={sampling.max_new_tokens} it outgrows "
                f"block_size={block_size}. {advice} --overflow=slide."
            )


@torch.inference_mode()
def generate(
    model: TensorParallelGPT,
    prompts: list[list[int]],
    sampling: Sampling,
    audience: Audience | None = None,
    decoder: Decoder | None = None,
    draft: Draft | None = None,
) -> Generation:
    """Continue every prompt num_samples times. The tokens are the same at every tp, in any company of prompts, and with any
    draft or none.

    Rows are written in groups of batch_size, one group after the other. decoder: how steps are computed, the fastest way
    unless given. UserError for a prompt as `check_prompts` says, and for logits that are no numbers.
    """
    decoder = decoder or decoder_for(model)
    check_prompts(prompts, model.config.vocab_size, model.config.block_size, sampling)
    n = sampling.num_samples
    rows = [Row(i * n + j, i, j, list(prompt), len(prompt)) for i, prompt in enumerate(prompts) for j in range(n)]
    result = Generation(rows)
    for first in range(0, len(rows), sampling.batch_size):
        _write(model, decoder, rows[first : first + sampling.batch_size], sampling, audience, draft, result.timing)
    return result


def _write(
    model: TensorParallelGPT,
    decoder: Decoder,
    rows: list[Row],
    sampling: Sampling,
    audience: Audience | None,
    draft: Draft | None,
    timing: Timing,
) -> None:
    """Write the rows of one group until each has ended."""
    size = model.config.block_size
    if draft is not None:
        draft.begin()
    started = _clock(model.device)
    logits, held = _prefill(model, rows, sampling)
    prefilled = _clock(model.device)
    _extend(model, logits, rows, [[] for _ in rows], sampling, audience)
    first_token = time.perf_counter()
    while active := [row for row in rows if not row.ended]:
        held.release(size)
        timing.slid = timing.slid or any(len(row.tokens) > size for row in active)
        active = held.rows + [row for row in active if row not in held]
        guesses = [[] for _ in active] if draft is None else draft.propose(active, _room(active, held, sampling, size))
        logits = _step(model, decoder, active, guesses, held)
        counts = _extend(model, logits, active, guesses, sampling, audience)
        timing.decode_tokens += sum(counts)
        timing.decode_steps += 1
        for row, guess, count in zip(active, guesses, counts, strict=True):
            if draft is not None:
                draft.learn(row, len(guess), min(count - 1, len(guess)))
    timing.prefill_s += prefilled - started
    timing.time_to_first_token_s = timing.time_to_first_token_s or first_token - started
    timing.decode_s += time.perf_counter() - first_token
    timing.kv_cache_bytes = max(timing.kv_cache_bytes, held.nbytes)


def _clock(device: torch.device) -> float:
    """The time at which the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Held:
    """The rows whose past is in a KV cache, in the cache's order; the others compute their whole window each time.

    A row leaves when it ends, and when it outgrows block_size: sliding gives every token a new absolute position, so
    what was cached is of no use, and the row goes on as nanoGPT does.
    """

    def __init__(self, cache: KVCache | None, rows: list[Row]):
        self.cache, self.rows = cache, rows if cache is not None else []
        self.nbytes = cache.nbytes if cache is not None else 0
        self._numbers = {row.number for row in self.rows}

    def __contains__(self, row: Row) -> bool:
        return row.number in self._numbers

    def release(self, block_size: int) -> None:
        """Let go of the rows that have left, before a decode step."""
        stay = [i for i, row in enumerate(self.rows) if not row.ended and len(row.tokens) <= block_size]
        if self.cache is not None and len(stay) < len(self.rows):
            self.rows = [self.rows[i] for i in stay]
            self._numbers = {row.number for row in self.rows}
            self.cache = self.cache.rows(stay) if stay else None


def _room(rows: list[Row], held: _Held, sampling: Sampling, size: int) -> list[int]:
    """For each row the most tokens that a draft may propose: with the one after them they must fit max_new_tokens and the
    context, and in the cache every row takes as much room as the one with the most guesses."""
    full = size - 1 if sampling.overflow == "stop" else size
    most = held.cache.size - max(len(row.tokens) for row in held.rows) if held.cache is not None else size
    limits = [(sampling.max_new_tokens - row.new - 1, full - len(row.tokens), most if row in held else size) for row in rows]
    return [max(0, min(limit)) for limit in limits]


def _prefill(model: TensorParallelGPT, rows: list[Row], sampling: Sampling) -> tuple[Tensor, _Held]:
    """One pass over the rows' prompts, each read once however many rows continue it: local logits [rows, v] after each
    row's last token, and what is cached.

    Shorter prompts are padded on the right: causal attention never looks there, and what is cached there is overwritten.
    """
    size = model.config.block_size
    prompts = {row.prompt: row.tokens for row in rows}
    place = {prompt: i for i, prompt in enumerate(prompts)}
    windows = [tokens[-size:] for tokens in prompts.values()]
    lengths = [len(window) for window in windows]
    cache = None
    if sampling.kv_cache:
        # a row stops using the cache when it slides, so block_size is enough
        cache = model.new_cache(len(windows), min(size, max(lengths) + sampling.max_new_tokens))
    logits = _last_logits(model, windows, [1] * len(windows), cache)
    source = [place[row.prompt] for row in rows]
    if cache is not None:
        cache.advance(lengths)
        if source != list(range(len(windows))):
            cache = cache.rows(source)
    return logits[torch.tensor(source, device=logits.device)], _Held(cache, rows)


def _last_logits(model: TensorParallelGPT, windows: list[list[int]], counts: list[int], cache: KVCache | None) -> Tensor:
    """Local logits [n, v] after the last counts[i] tokens of each window; only those positions go through the head."""
    device = model.device
    longest = max(len(window) for window in windows)
    idx = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)
    places = [
        (i, at)
        for i, (window, count) in enumerate(zip(windows, counts, strict=True))
        for at in range(len(window) - count, len(window))
    ]
    hidden = model.hidden(idx, cache)  # [windows, longest, C]
    return model.local_logits(hidden[torch.tensor(places, device=device).unbind(1)])


def _step(model: TensorParallelGPT, decoder: Decoder, rows: list[Row], guesses: list[list[int]], held: _Held) -> Tensor:
    """Local logits [positions, v] after each row's newest token and after each of its guesses, row by row: one forward pass
    for the rows whose past is cached, which come first, one for the others."""
    size, n = model.config.block_size, len(held.rows)
    parts = []
    if held.cache is not None:
        longest = max(map(len, guesses[:n]))
        held.cache.advance([len(row.tokens) - 1 for row in held.rows])  # wrong guesses are overwritten
        news = [[row.tokens[-1], *guess] for row, guess in zip(held.rows, guesses, strict=False)]
        logits = decoder.logits([new + [0] * (1 + longest - len(new)) for new in news], held.cache)  # [n, 1 + longest, v]
        used = [i * (1 + longest) + j for i, new in enumerate(news) for j in range(len(new))]
        logits = logits.flatten(0, 1)
        parts.append(logits if len(used) == len(logits) else logits[torch.tensor(used, device=logits.device)])
    if n < len(rows):
        others = list(zip(rows[n:], guesses[n:], strict=True))
        windows = [(row.tokens + guess)[-size:] for row, guess in others]
        parts.append(_last_logits(model, windows, [1 + len(guess) for _, guess in others], None))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _extend(
    model: TensorParallelGPT,
    logits: Tensor,
    rows: list[Row],
    guesses: list[list[int]],
    sampling: Sampling,
    audience: Audience | None,
) -> list[int]:
    """Give each row its next tokens, and end those that are complete; alike on all ranks. Returns how many each got."""
    full = model.config.block_size if sampling.overflow == "stop" else None
    verdict = _agree(model, logits, rows, guesses, sampling, audience)
    for row, (count, *tokens) in zip(rows, verdict, strict=True):
        row.tokens += tokens[: abs(count)]
        row.ended = count < 0 or row.new == sampling.max_new_tokens or len(row.tokens) == full
        if row.ended and audience is not None and model.tp.rank == 0:
            audience.end(row)
    return [abs(count) for count, *_ in verdict]


def _agree(
    model: TensorParallelGPT,
    logits: Tensor,
    rows: list[Row],
    guesses: list[list[int]],
    sampling: Sampling,
    audience: Audience | None,
) -> list[list[int]]:
    """For each row how many tokens it gets, less than 0 where it ends with them, and the tokens: chosen by rank 0, told to all.
    Two small collectives.

    Ranks exchange their best candidates, and what they guessed; nothing depends on two ranks computing the same number. As
    far as all guessed alike, the logits are those of one text on all of them.
    """
    axis = model.tp.at("sampling")
    best = candidates(logits, model.vocab_lo, model.config.vocab_size, sampling, axis.size)  # [2, positions, k]
    guessed = torch.tensor([token for guess in guesses for token in guess], dtype=torch.int32)
    mine = torch.cat([best.flatten(), guessed.to(best.device)])
    everyone = all_gather(mine, axis, "step").cpu().numpy()
    verdict = np.zeros((len(rows), 2 + max(map(len, guesses))), np.int64)
    if axis.rank == 0:
        # [tp, 2, positions, k] -> each position's candidates from all ranks, [positions, tp * k]
        contenders = everyone[:, : best.numel()].reshape(axis.size, *best.shape)
        bits, ids = contenders.transpose(1, 2, 0, 3).reshape(2, len(logits), -1)
        values = bits.view(np.float32)
        if not np.isfinite(values.max(axis=1)).all():
            raise UserError(
                "the model's logits are not finite numbers: its weights are damaged, or too large for this precision "
                "(try --dtype=float32)."
            )
        alike = (everyone[:, best.numel() :] == everyone[0, best.numel() :]).all(axis=0)
        at = guessed_at = 0  # the row's first position, and its first guess
        for row, guess, line in zip(rows, guesses, verdict, strict=True):
            for j in range(1 + len(guess)):
                token = choose(values[at + j], ids[at + j], sampling, row.sample, row.new + j)
                ends = audience is not None and audience.hear(row, token)
                line[0], line[1 + j] = -(j + 1) if ends else j + 1, token
                if ends or j == len(guess) or token != guess[j] or not alike[guessed_at + j]:
                    break
            at, guessed_at = at + 1 + len(guess), guessed_at + len(guess)
    here = best.device if axis.size > 1 else torch.device("cpu")  # one rank tells nobody
    told: list[list[int]] = broadcast(torch.from_numpy(verdict).to(here), axis, "step").tolist()
    return told

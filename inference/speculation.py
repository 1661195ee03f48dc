"""Speculative decoding: who guesses a row's next tokens, and how many of them.

`Ngrams` searches the text itself; `SmallModel` asks a smaller GPT, which every rank holds whole.
Neither communicates. A guess changes the number of passes, never the text (generation.py): it is
right if the model draws the same token there. `SmallModel` draws with the model's noise
(sampling.py), which makes that likely.

The small model has a KV cache of its own. An example with three guesses, for a row `a b c d`:

    the draft's cache   a b c
    it reads and draws  d -> e, e -> f, f -> g      guesses e f g; the cache holds a b c d e f
    the row becomes     a b c d e x                 e was right, f wrong
    next time           a b c d e are read; it reads x in the place of f, and goes on
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from inference.decoding import decoder_for
from inference.sampling import Row, Sampling, candidates, choose
from model import KVCache
from tp_model import TensorParallelGPT

LONGEST_PAUSE = 8


class Guesser(Protocol):
    def begin(self) -> None:
        """A new group of rows begins: forget the old ones."""
        ...

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        """At most room[i] tokens that may follow row i, for all unfinished rows of the group.

        The numbers of guesses, though not the guesses, are the same on all ranks.
        """
        ...


@dataclass
class Pace:
    """How many tokens of one row to guess: `reach`.

    It doubles if all guesses were right; otherwise it is one more than were right. After two and
    more failures in a row the next steps are made without guesses, as a wrong guess slows a step.
    """

    reach: int
    misses: int = 0
    pause: int = 0

    def ask(self) -> int:
        if self.pause:
            self.pause -= 1
            return 0
        return self.reach

    def learn(self, proposed: int, accepted: int, most: int) -> None:
        if not proposed:
            return
        all_right = accepted == proposed
        self.reach = min(most, max(self.reach, 2 * proposed) if all_right else accepted + 1)
        self.misses = 0 if accepted else self.misses + 1
        self.pause = min(max(0, self.misses - 1), LONGEST_PAUSE)


@dataclass
class Speculation:
    """Asks a guesser for at most `most` tokens of a row at a time, and counts how many were right."""

    guesser: Guesser
    most: int
    proposed: int = 0
    accepted: int = 0
    _paces: dict[int, Pace] = field(default_factory=dict)

    def begin(self) -> None:
        self._paces.clear()
        self.guesser.begin()

    def propose(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        paces = [self._paces.setdefault(row.number, Pace(self.most)) for row in rows]
        wanted = [min(pace.ask(), most) for pace, most in zip(paces, room, strict=True)]
        return self.guesser.guess(rows, wanted)

    def learn(self, row: Row, proposed: int, accepted: int) -> None:
        """So many of the row's last guesses were right."""
        self._paces[row.number].learn(proposed, accepted, self.most)
        self.proposed += proposed
        self.accepted += accepted


class Ngrams:
    """Prompt look-up: a row continues as it did after the last occurrence of its newest tokens.

    Looks for the longest such run of tokens, at most `longest` and at least `shortest` of them. A
    continuation that reaches the end of the text goes on with the guesses themselves.
    """

    def __init__(self, longest: int = 5, shortest: int = 2):
        self.sizes = range(longest, shortest - 1, -1)
        self.begin()

    def begin(self) -> None:
        # of each row: where each run occurred last (the index after it), and the tokens indexed
        self.after: dict[int, dict[tuple[int, ...], int]] = defaultdict(dict)
        self.indexed: dict[int, int] = defaultdict(int)

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        return [self._continue(row, most) if most else [] for row, most in zip(rows, room, strict=True)]

    def _continue(self, row: Row, most: int) -> list[int]:
        tokens, after = row.tokens, self.after[row.number]
        for end in range(self.indexed[row.number] + 1, len(tokens)):  # the newest run is the one sought
            after.update({tuple(tokens[end - n : end]): end for n in self.sizes if n <= end})
        self.indexed[row.number] = max(self.indexed[row.number], len(tokens) - 1)
        runs = (tuple(tokens[-n:]) for n in self.sizes if n < len(tokens))
        at = next((after[run] for run in runs if run in after), None)
        if at is None:
            return []
        text = tokens[at:]
        for i in range(most - len(text)):
            text.append(text[i])
        return text[:most]


@dataclass
class _Cached:
    """One row of the draft's cache.

    It holds `read` of the row's tokens, from the token `begin` on, and then `guesses` that the draft
    read while it guessed; the row may have got other tokens since.
    """

    row: Row
    begin: int
    read: int
    guesses: list[int]

    @property
    def length(self) -> int:
        return len(self.row.tokens) - self.begin

    def accept(self) -> None:
        """Count the guesses that the row got as read; its newest token is to be read once more."""
        for token in self.guesses:
            if self.read == self.length - 1 or token != self.row.tokens[self.begin + self.read]:
                break
            self.read += 1
        self.guesses = []


class SmallModel:
    """Guesses by drawing from the logits of a model of one rank.

    A row that outgrows the model's block_size is read again, from half of block_size back.
    """

    def __init__(self, model: TensorParallelGPT, sampling: Sampling):
        self.model, self.sampling, self.decoder = model, sampling, decoder_for(model)
        self.begin()

    def begin(self) -> None:
        self.rows: list[_Cached] = []  # in the order of the cache
        self.cache: KVCache | None = None

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        n = min(max(room), self.model.config.block_size // 2)
        if n < 1:
            return [[] for _ in rows]
        cache = self._follow(rows, n)
        lengths = [cached.length for cached in self.rows]
        T = max(cached.length - cached.read for cached in self.rows)
        cache.advance([length - T for length in lengths])  # some rows read tokens a second time
        new, drawn = [cached.row.tokens[-T:] for cached in self.rows], list[list[int]]()
        for j in range(n):
            drawn.append(self._draw(self.decoder.logits(new, cache)[:, -1], j))
            cache.advance([length + j for length in lengths])
            new = [[token] for token in drawn[-1]]
        guesses = {}
        for cached, guess in zip(self.rows, map(list, zip(*drawn, strict=True)), strict=True):
            guesses[cached.row.number] = guess
            cached.read, cached.guesses = cached.length, guess[:-1]  # the last one was not read
        return [guesses[row.number][:most] for row, most in zip(rows, room, strict=True)]

    def _draw(self, logits: Tensor, ahead: int) -> list[int]:
        """Each row's token, `ahead` positions after its next one, from logits [rows, v]."""
        vocab_size = self.model.config.vocab_size
        bits, ids = candidates(logits, 0, vocab_size, self.sampling, 1).numpy()
        values = bits.view(np.float32)
        rows = [cached.row for cached in self.rows]
        return [
            choose(values[i], ids[i], self.sampling, row.sample, row.new + ahead)
            for i, row in enumerate(rows)
        ]

    def _follow(self, rows: list[Row], n: int) -> KVCache:
        """The cache, without the rows that ended and with room for n more tokens."""
        if self.cache is None:
            return self._read(rows, n)
        numbers = {row.number for row in rows}
        stay = [i for i, cached in enumerate(self.rows) if cached.row.number in numbers]
        if len(stay) < len(self.rows):
            self.rows, self.cache = [self.rows[i] for i in stay], self.cache.rows(stay)
        for cached in self.rows:
            cached.accept()
        lengths = [cached.length for cached in self.rows]
        unread = max(cached.length - cached.read for cached in self.rows)
        if max(lengths) + n - 1 > self.cache.size or unread > min(lengths):
            return self._read(rows, n)
        return self.cache

    def _read(self, rows: list[Row], n: int) -> KVCache:
        """A new cache: one pass over all tokens of the rows but the newest."""
        size, device = self.model.config.block_size, self.model.device
        self.rows = []
        for row in rows:
            length = len(row.tokens)
            begin = 0 if length + n - 1 <= size else length - size // 2
            self.rows.append(_Cached(row, begin, length - begin - 1, []))
        longest = max(cached.length for cached in self.rows)
        most = min(size, longest + self.sampling.max_new_tokens + n)
        self.cache = self.model.new_cache(len(rows), most)
        if longest > 1:
            windows = [cached.row.tokens[cached.begin : -1] for cached in self.rows]
            padded = [window + [0] * (longest - 1 - len(window)) for window in windows]
            self.model.hidden(torch.tensor(padded, device=device), self.cache)
        return self.cache

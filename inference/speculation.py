"""Drafts for speculative decoding: who guesses what comes next, and how far to trust them.

`Ngrams` looks at the text itself, `SmallModel` asks a smaller GPT, whole on every rank. Neither says a word to other ranks.
What is guessed changes how many passes a text takes, and never the text (generation.py): a draft is asked what *would be
drawn* at a place, by the same noise (sampling.py), and is right where the model draws the same.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from inference.decoding import decoder_for
from inference.generation import Row
from inference.sampling import Sampling, candidates, choose
from model import KVCache
from tp_model import TensorParallelGPT

LONGEST_PAUSE = 8


class Guesser(Protocol):
    """Of all ranks' guessers each guesses as many tokens."""

    def begin(self) -> None:
        """Forget the rows there were."""
        ...

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        """For each row at most room[i] tokens that may follow. The rows are those of one group that are being written."""
        ...


@dataclass
class Pace:
    """How many tokens of a row to guess at once: twice as many after guesses that were all right, else one more than were
    right; after several mistakes on end none for ever longer (a guess that is wrong makes a pass slower)."""

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
        self.reach = min(most, max(self.reach, 2 * proposed) if accepted == proposed else accepted + 1)
        self.misses = 0 if accepted else self.misses + 1
        self.pause = min(max(0, self.misses - 1), LONGEST_PAUSE)


@dataclass
class Speculation:
    """A guesser that is asked for at most `most` tokens of a row at a time, and what came of it. See generation.Draft."""

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
        return self.guesser.guess(rows, [min(pace.ask(), here) for pace, here in zip(paces, room, strict=True)])

    def learn(self, row: Row, proposed: int, accepted: int) -> None:
        self._paces[row.number].learn(proposed, accepted, self.most)
        self.proposed += proposed
        self.accepted += accepted


# --- the text itself ------------------------------------------------------------------------------------------------


@dataclass
class _Index:
    """Where in a text each of its short runs of tokens stood last: the place after it. Runs that end at `upto` or before."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    upto: int = 0


class Ngrams:
    """Prompt look-up: the row goes on as it did where its last tokens stood the last time, the longest such run of at most
    `longest` tokens and at least `shortest`. Past the end of the text it goes on with what it has guessed itself."""

    def __init__(self, longest: int = 5, shortest: int = 2):
        self.sizes = range(longest, shortest - 1, -1)
        self._indices: dict[int, _Index] = {}

    def begin(self) -> None:
        self._indices.clear()

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        return [self._continued(row, most) if most else [] for row, most in zip(rows, room, strict=True)]

    def _continued(self, row: Row, most: int) -> list[int]:
        tokens, index = row.tokens, self._indices.setdefault(row.number, _Index())
        for end in range(index.upto + 1, len(tokens)):  # not the run at the very end, which is what is looked for
            for n in self.sizes:
                if n <= end:
                    index.after[tuple(tokens[end - n : end])] = end
        index.upto = max(index.upto, len(tokens) - 1)
        runs = (tuple(tokens[-n:]) for n in self.sizes if n < len(tokens))
        at = next((index.after[run] for run in runs if run in index.after), None)
        if at is None:
            return []
        text = tokens[at:]
        for i in range(most - len(text)):
            text.append(text[i])
        return text[:most]


# --- a small model --------------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """A row of the cache. It holds the row's tokens from `begin` on; the first `right` of them are in the row too. When it was
    last guessed the row had `length` tokens, and of the guesses those in `fed` were read."""

    row: Row
    begin: int
    right: int
    length: int
    fed: list[int]

    @property
    def window(self) -> int:
        return len(self.row.tokens) - self.begin

    def look_back(self) -> None:
        """Of what was fed, what the row has got since is right."""
        came = self.row.tokens[self.length :]
        while self.right < self.window - 1 and self.fed and self.fed[0] == came[0]:
            self.fed, came = self.fed[1:], came[1:]
            self.right += 1
        self.fed = []


class SmallModel:
    """A model of one rank that reads the rows along and draws their next tokens from its own logits.

    It need not have room for a whole row: one that outgrows its block_size is read anew from half of that back.
    """

    def __init__(self, model: TensorParallelGPT, sampling: Sampling):
        self.model, self.sampling, self.decoder = model, sampling, decoder_for(model)
        self.begin()

    def begin(self) -> None:
        self.readings: list[_Reading] = []
        self.cache: KVCache | None = None

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        n = min(max(room), self.model.config.block_size // 2)
        if n < 1:
            return [[] for _ in rows]
        cache = self._follow(rows, n)
        lengths = [reading.window for reading in self.readings]
        T = max(reading.window - reading.right for reading in self.readings)
        cache.advance([length - T for length in lengths])  # each row's last T tokens, though of some fewer are new
        news, guesses = [reading.row.tokens[-T:] for reading in self.readings], list[list[int]]()
        for j in range(n):
            guesses.append(self._choose(self.decoder.logits(news, cache)[:, -1], j))
            cache.advance([length + j for length in lengths])
            news = [[token] for token in guesses[-1]]
        for reading, guess in zip(self.readings, zip(*guesses, strict=True), strict=True):
            reading.right, reading.length, reading.fed = reading.window, len(reading.row.tokens), list(guess)
        guessed = {reading.row.number: reading.fed for reading in self.readings}
        for reading in self.readings:
            reading.fed = reading.fed[:-1]  # the last was not read
        return [guessed[row.number][:most] for row, most in zip(rows, room, strict=True)]

    def _choose(self, logits: Tensor, ahead: int) -> list[int]:
        """For each row the token drawn `ahead` places after its next one, from logits [rows, v]."""
        bits, ids = candidates(logits, 0, self.model.config.vocab_size, self.sampling, 1).numpy()
        rows = [reading.row for reading in self.readings]
        return [
            choose(values, here, self.sampling, row.sample, row.new + ahead)
            for row, values, here in zip(rows, bits.view(np.float32), ids, strict=True)
        ]

    def _follow(self, rows: list[Row], n: int) -> KVCache:
        """The cache, brought to these rows: some have left, all have grown, and in a new group none has been read."""
        stay = [i for i, reading in enumerate(self.readings) if any(row is reading.row for row in rows)]
        if self.cache is None or len(stay) < len(rows):
            return self._read(rows, n)
        if len(stay) < len(self.readings):
            self.readings, self.cache = [self.readings[i] for i in stay], self.cache.rows(stay)
        for reading in self.readings:
            reading.look_back()
        lengths = [reading.window for reading in self.readings]
        behind = max(reading.window - reading.right for reading in self.readings)
        if max(lengths) + n - 1 > self.cache.size or behind > min(lengths):
            return self._read(rows, n)
        return self.cache

    def _read(self, rows: list[Row], n: int) -> KVCache:
        """One pass over these rows, which leaves their newest token unread."""
        size = self.model.config.block_size
        begins = [0 if len(row.tokens) + n - 1 <= size else len(row.tokens) - size // 2 for row in rows]
        self.readings = [
            _Reading(row, begin, len(row.tokens) - begin - 1, len(row.tokens), [])
            for row, begin in zip(rows, begins, strict=True)
        ]
        longest = max(reading.window for reading in self.readings)
        self.cache = self.model.new_cache(len(rows), min(size, longest + self.sampling.max_new_tokens + n))
        if longest > 1:
            windows = [row.tokens[begin:-1] for row, begin in zip(rows, begins, strict=True)]
            idx = torch.tensor([window + [0] * (longest - 1 - len(window)) for window in windows], device=self.model.device)
            self.model.hidden(idx, self.cache)
        return self.cache

"""Speculative decoding: who guesses a row's next tokens, and how many of them.

`Ngrams` searches the text itself; `SmallModel` asks a smaller GPT, which every rank holds whole.
Neither communicates. A guess changes the number of passes, never the text (generation.py): it is
right if the model draws the same token there. `SmallModel` draws with the model's noise
(sampling.py), which makes that likely. It has a KV cache of its own; an example with three guesses:

    the row             a b c d
    the draft's cache   a b c               d is not read yet
    it reads and draws  d -> e  e -> f  f -> g
    its cache           a b c d e f         the guesses are e f g
    the row             a b c d e x         e was right, f wrong
    the next time       it reads x in the place of f, and goes on from there
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from inference.decoders import decoder_for
from inference.sampling import Row, Sampling, candidates, choose
from model import KVCache
from tp_model import TensorParallelGPT

LONGEST_PAUSE = 8


@dataclass
class Pace:
    """`reach` is the number of tokens of one row to guess: twice as many after only right guesses,
    else one more than were right. After several failures there are ever longer pauses."""

    reach: int
    misses: int = 0
    pause: int = 0

    def ask(self) -> int:
        self.pause, resting = max(0, self.pause - 1), self.pause
        return 0 if resting else self.reach

    def learn(self, proposed: int, accepted: int, most: int) -> None:
        if not proposed:
            return
        longer = max(self.reach, 2 * proposed)
        self.reach = min(most, longer if accepted == proposed else accepted + 1)
        self.misses = 0 if accepted else self.misses + 1
        self.pause = min(max(0, self.misses - 1), LONGEST_PAUSE)


class Ngrams:
    """Prompt look-up: a row continues as it did after the last occurrence of its newest tokens, the
    longest run of them of at most `longest` and at least `shortest`. Past the end of the text it
    continues with its own guesses."""

    def __init__(self, longest: int = 5, shortest: int = 2):
        self.sizes = range(longest, shortest - 1, -1)
        self.begin()

    def begin(self) -> None:
        """A new group of rows begins."""
        # for each row: the index after the last occurrence of each run, and the tokens indexed
        self.after: dict[int, dict[tuple[int, ...], int]] = defaultdict(dict)
        self.indexed: dict[int, int] = defaultdict(int)

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        """At most room[i] tokens that may follow row i, for all unfinished rows of the group."""
        pairs = zip(rows, room, strict=True)
        return [self._continue(row, most) if most else [] for row, most in pairs]

    def _continue(self, row: Row, most: int) -> list[int]:
        tokens, after = row.tokens, self.after[row.number]
        for end in range(self.indexed[row.number] + 1, len(tokens)):  # without the newest run
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
    """A row of the draft's cache, which begins at the row's token `begin`: it holds `read` of the
    row's tokens, then `guesses` that the draft has read (the row may have got other tokens)."""

    row: Row
    begin: int
    read: int
    guesses: list[int]

    @property
    def length(self) -> int:
        return len(self.row.tokens) - self.begin

    def accept(self) -> None:
        """Count the guesses that the row got as read, but not its newest token."""
        for token in self.guesses:
            if self.read == self.length - 1 or token != self.row.tokens[self.begin + self.read]:
                break
            self.read += 1
        self.guesses = []


class SmallModel:
    """Draws guesses from a model of one rank. A row that outgrows the model's block_size is read
    anew, from half of block_size back."""

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
        for cached, *guess in zip(self.rows, *drawn, strict=True):
            guesses[cached.row.number] = guess
            cached.read, cached.guesses = cached.length, guess[:-1]  # the last one was not read
        return [guesses[row.number][:most] for row, most in zip(rows, room, strict=True)]

    def _draw(self, logits: Tensor, ahead: int) -> list[int]:
        """Each row's token, `ahead` positions after its next one, from logits [rows, v]."""
        vocab_size = self.model.config.vocab_size
        bits, ids = candidates(logits, 0, vocab_size, self.sampling, 1).numpy()
        places = [(cached.row.sample, cached.row.new + ahead) for cached in self.rows]
        each = zip(bits.view(np.float32), ids, places, strict=True)
        return [choose(values, theirs, self.sampling, *place) for values, theirs, place in each]

    def _follow(self, rows: list[Row], n: int) -> KVCache:
        """The cache, without the rows that ended and with room for n more tokens."""
        if self.cache is None:
            return self._read(rows, n)
        numbers = {row.number for row in rows}
        stay = [i for i, cached in enumerate(self.rows) if cached.row.number in numbers]
        if len(stay) < len(self.rows):
            self.rows = [self.rows[i] for i in stay]
            self.cache = self.decoder.adopt(self.cache.rows(stay))
        for cached in self.rows:
            cached.accept()
        lengths = [cached.length for cached in self.rows]
        unread = max(cached.length - cached.read for cached in self.rows)
        if max(lengths) + n - 1 > self.cache.size or unread > min(lengths):
            return self._read(rows, n)
        return self.cache

    def _read(self, rows: list[Row], n: int) -> KVCache:
        """A new cache: one pass over all tokens of the rows but the newest."""
        size, lengths = self.model.config.block_size, [len(row.tokens) for row in rows]
        begins = [0 if length + n - 1 <= size else length - size // 2 for length in lengths]
        windows = [row.tokens[begin:-1] for row, begin in zip(rows, begins, strict=True)]
        each = zip(rows, begins, windows, strict=True)
        self.rows = [_Cached(row, begin, len(window), []) for row, begin, window in each]
        longest = max(map(len, windows))
        most = min(size, longest + 1 + self.sampling.max_new_tokens + n)
        cache = self.model.new_cache(len(rows), most)
        if longest:
            padded = [window + [0] * (longest - len(window)) for window in windows]
            self.model.hidden(torch.tensor(padded, device=self.model.device), cache)
            cache.advance([longest] * len(rows))
        self.cache = self.decoder.adopt(cache)
        return self.cache


Guesser = Ngrams | SmallModel


@dataclass
class Speculation:
    """Asks a guesser for at most `most` tokens of a row at a time, and counts the right ones."""

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
        self._paces[row.number].learn(proposed, accepted, self.most)
        self.proposed += proposed
        self.accepted += accepted

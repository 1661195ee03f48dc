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
from torch import Tensor

from inference.decoders import decoder_for
from inference.sampling import Row, Sampling, candidates, choose
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
        self.begin(0, 0)

    def begin(self, rows: int, longest: int) -> None:
        """New rows begin, at most so many at a time, of at most `longest` tokens."""
        # for each row: the index after the last occurrence of each run, and the tokens indexed
        self.after: dict[int, dict[tuple[int, ...], int]] = defaultdict(dict)
        self.indexed: dict[int, int] = defaultdict(int)

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        """At most room[i] tokens that may follow row i, for all rows that are written and begun."""
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
    """A row in the draft's cache, which begins at the row's token `begin`: it holds `read` of the
    row's tokens, then `guesses` that the draft has read (the row may have got other tokens)."""

    row: Row
    begin: int = 0
    read: int = 0
    guesses: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.row.tokens[self.begin :]

    def follow(self, room: int, size: int) -> None:
        """Count the guesses that the row got as read, but not its newest token. Begin anew, from
        half of `size` back, if the row has more than `room` tokens."""
        for guess, token in zip(self.guesses, self.tokens[self.read : -1], strict=False):
            if guess != token:
                break
            self.read += 1
        self.guesses = []
        if len(self.tokens) > room:
            self.begin, self.read = len(self.row.tokens) - size // 2, 0


class SmallModel:
    """Draws guesses from a model of one rank. A row that outgrows the model's block_size is read
    anew, from half of block_size back."""

    def __init__(self, model: TensorParallelGPT, sampling: Sampling):
        self.model, self.sampling, self.decoder = model, sampling, decoder_for(model)

    def begin(self, rows: int, longest: int) -> None:
        self.rows: list[_Cached] = []  # in the order of the cache
        self.cache = self.decoder.new_cache(rows, min(self.model.config.block_size, longest))

    def guess(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        n = min(max(room), self.cache.size // 2)
        if n < 1:
            return [[] for _ in rows]
        self._seat(rows, n)
        new, drawn = [cached.tokens[cached.read :] for cached in self.rows], list[list[int]]()
        for j in range(n):
            logits = self.decoder.logits(new, self.cache, [1] * len(new))
            self.cache.advance([len(cached.tokens) + j for cached in self.rows])
            drawn.append(self._draw(logits, j))
            new = [[token] for token in drawn[-1]]
        guesses = {}
        for cached, *guess in zip(self.rows, *drawn, strict=True):
            guesses[cached.row.number] = guess
            cached.read, cached.guesses = len(cached.tokens), guess[:-1]  # the last was not read
        return [guesses[row.number][:most] for row, most in zip(rows, room, strict=True)]

    def _seat(self, rows: list[Row], n: int) -> None:
        """Let the cache follow these rows, with room for n - 1 guesses: first those of which it has
        something, then those that are read whole."""
        size, known = self.cache.size, {cached.row.number: cached for cached in self.rows}
        wanted = {row.number: known.get(row.number) or _Cached(row) for row in rows}
        for cached in wanted.values():
            cached.follow(size - n + 1, size)
        # torch's decoder pads what rows read to the longest: some read tokens a second time
        T = max([len(c.tokens) - c.read for c in wanted.values() if c.read], default=0)
        kept = list[_Cached]()
        for i, cached in enumerate(self.rows):
            cached.read = min(cached.read, max(0, size - T))
            if cached.row.number in wanted and cached.read:
                if i > len(kept):
                    self.cache.copy(len(kept), i, cached.read)
                kept.append(wanted.pop(cached.row.number))
        self.rows = kept + list(wanted.values())
        self.cache.advance([cached.read for cached in self.rows])

    def _draw(self, logits: Tensor, ahead: int) -> list[int]:
        """Each row's token, `ahead` positions after its next one, from logits [rows, v]."""
        vocab_size = self.model.config.vocab_size
        bits, ids = candidates(logits, 0, vocab_size, self.sampling, 1).numpy()
        places = [(cached.row.sample, cached.row.new + ahead) for cached in self.rows]
        each = zip(bits.view(np.float32), ids, places, strict=True)
        return [choose(values, theirs, self.sampling, *place) for values, theirs, place in each]


Guesser = Ngrams | SmallModel


@dataclass
class Speculation:
    """Asks a guesser for at most `most` tokens of a row at a time, and counts the right ones."""

    guesser: Guesser
    most: int
    proposed: int = 0
    accepted: int = 0
    _paces: dict[int, Pace] = field(default_factory=dict)

    def begin(self, rows: int, longest: int) -> None:
        self._paces.clear()
        self.guesser.begin(rows, longest + self.most)

    def propose(self, rows: list[Row], room: list[int]) -> list[list[int]]:
        paces = [self._paces.setdefault(row.number, Pace(self.most)) for row in rows]
        wanted = [min(pace.ask(), most) for pace, most in zip(paces, room, strict=True)]
        return self.guesser.guess(rows, wanted)

    def learn(self, row: Row, proposed: int, accepted: int) -> None:
        self._paces[row.number].learn(proposed, accepted, self.most)
        self.proposed += proposed
        self.accepted += accepted

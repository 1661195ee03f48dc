"""Generation: passes that read prompts and newest tokens, the same tokens on all ranks.

A row is one sequence: a prompt is continued in num_samples rows. Up to batch_size rows are written
at a time, each in a row of the KV cache; where one ends the next begins at once (continuous
batching: Yu et al., Orca, OSDI 2022). Every rank runs the same passes and collectives; rank 0 of
the tp axis chooses the tokens and broadcasts them. A step of a row whose newest token is t, with
guesses g and h of a draft (speculative decoding: Leviathan, Kalman, Matias, arXiv 2211.17192):

    one pass reads    t  g  h       (t is the only one that is in the text already)
    rank 0 draws      a  b  c       after each of them
    the row gets      a             if a is not g
                      a  b          if a is g, and b is not h
                      a  b  c       if a is g and b is h

So a guess never changes the text, only the number of passes.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.errors import UserError
from inference.cuda_graphs import GraphDecoder
from inference.decoders import TorchDecoder, decoder_for
from inference.sampling import Row, Sampling, candidates, choose
from inference.speculation import Speculation
from parallel.collectives import all_gather, broadcast
from tp_model import TensorParallelGPT

NOT_FINITE = (
    "the model's logits are not finite numbers: its weights are damaged, or too large for this "
    "precision (try --dtype=float32)."
)


@dataclass
class Timing:
    """Sums over steps, each of one pass. A step that reads a prompt counts as prefill, with all
    that it does beside; a decode step adds a token or more to every row."""

    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    kv_cache_bytes: int = 0
    slid: bool = False

    def add(self, seconds: float, tokens: int) -> None:
        """A step. tokens: that it decoded, 0 if it has read a prompt."""
        self.time_to_first_token_s = self.time_to_first_token_s or seconds
        self.prefill_s += 0 if tokens else seconds
        self.decode_s += seconds if tokens else 0
        self.decode_tokens += tokens
        self.decode_steps += tokens > 0


class Generation:
    """Iterate over it, to the end and on all ranks, to write its rows; it yields a row each time
    that row has got tokens. They depend neither on tp, nor on the other prompts, nor on the draft.

    prompts: as `check_prompts` accepts them. stops: rank 0 calls it with a row and its next token,
    once for each token and in order; True ends the row with it. UserError if logits are not finite.
    """

    def __init__(self, model: TensorParallelGPT, prompts: list[list[int]], sampling: Sampling,
                 decoder: TorchDecoder | None = None, draft: Speculation | None = None,
                 stops: Callable[[Row, int], bool] = lambda row, token: False):
        self.model, self.sampling, self.draft, self.stops = model, sampling, draft, stops
        self.decoder, self.size = decoder or decoder_for(model), model.config.block_size
        each = ((i, j) for i in range(len(prompts)) for j in range(sampling.num_samples))
        self.rows = [Row(n, i, j, [*prompts[i]], len(prompts[i])) for n, (i, j) in enumerate(each)]
        self.timing, self._waiting = Timing(), deque(self.rows)
        self.most = min(sampling.batch_size, len(self.rows))  # rows written at a time

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Row]:
        timing = self.timing
        longest = max(row.prompt_tokens for row in self.rows) + self.sampling.max_new_tokens
        # a row that slides is read anew in each step, so block_size is enough
        self.cache = self.decoder.new_cache(self.most, min(self.size, longest))
        timing.kv_cache_bytes = self.cache.nbytes
        if self.draft is not None:
            self.draft.begin(self.most, longest)
        rows = list[Row]()
        while rows := self._seat(rows):
            started = time.perf_counter()
            # a draft has to see a step's tokens before it can guess the next ones
            goes_ahead = self.draft is None and all(self.cache.lengths)
            if goes_ahead and isinstance(self.decoder, GraphDecoder):
                yield from self._ahead(self.decoder, rows)
                timing.decode_s += time.perf_counter() - started
                continue
            reads = any(not row.new for row in rows)
            counts = self._finish(rows, *self._begin(rows))
            yield from rows
            timing.add(time.perf_counter() - started, 0 if reads else sum(counts))

    def _seat(self, rows: list[Row]) -> list[Row]:
        """The rows of the next step, each in the row of the cache with its number in the list:
        first those that the cache knows, then those that are read whole, then those whose prompt
        one of these reads for them. rows: of the last step."""
        cache, kept, whole, led = self.cache, list[Row](), list[Row](), list[Row]()
        for i, row in enumerate(rows):
            if row.ended:
                continue
            if not self.sampling.kv_cache or len(row.tokens) > self.size:
                whole.append(row)
                continue
            if i > len(kept):
                cache.copy(len(kept), i, len(row.tokens) - 1)
            kept.append(row)
        self.timing.slid |= any(len(row.tokens) > self.size for row in whole)
        for row in list(self._waiting) if len(kept) + len(whole) < self.most else ():
            prompts = [other.prompt for other in kept]
            if row.prompt_tokens > 1 and row.prompt in prompts:
                cache.copy(len(kept), prompts.index(row.prompt), row.prompt_tokens - 1)
                kept.append(row)
            else:
                (led if _leader(row, whole) is not None else whole).append(row)
            self._waiting.remove(row)
            if len(kept) + len(whole) + len(led) == self.most:
                break
        cache.advance([len(row.tokens) - 1 for row in kept] + [0] * len(whole))
        return kept + whole + led

    def _begin(self, rows: list[Row]) -> tuple[list[list[int]], Tensor]:
        """One pass. Returns the draft's guesses, and what `_gather` does."""
        n, guesses = len(self.cache.lengths), self._guesses(rows)
        new = [(row.tokens + guess)[length or -self.size :]
               for row, guess, length in zip(rows, guesses, self.cache.lengths, strict=False)]
        counts = [1 + len(guess) for guess in guesses[:n]]
        logits = self.decoder.logits(new, self.cache, counts)
        places = list(range(len(logits)))
        for i, row in enumerate(rows[n:], n):
            leader = _leader(row, rows[:n]) or 0
            places.append(sum(counts[:leader]))
            self.cache.copy(i, leader, min(row.prompt_tokens, self.size))
        if len(rows) > n:
            logits = logits[torch.tensor(places, device=logits.device)]
        lo, vocab_size, tp = self.model.vocab_lo, self.model.config.vocab_size, self.model.tp.size
        best = candidates(logits, lo, vocab_size, self.sampling, tp)
        return guesses, self._gather(best, guesses)

    def _finish(self, rows: list[Row], guesses: list[list[int]], everyone: Tensor) -> list[int]:
        """Give each row its next tokens and end the complete ones. Returns how many each got."""
        chosen = self._agree(rows, guesses, everyone).tolist()
        for row, guess, (count, *tokens) in zip(rows, guesses, chosen, strict=True):
            got = abs(count)
            row.tokens += tokens[:got]
            row.ended = count < 0 or self._is_complete(row)
            if self.draft is not None and row.new > got:
                self.draft.learn(row, len(guess), min(got - 1, len(guess)))
        return [abs(count) for count, *_ in chosen]

    def _guesses(self, rows: list[Row]) -> list[list[int]]:
        """The draft's guesses for each row that is begun. With the token after them they fit
        max_new_tokens, the context, and the cache, where each row takes as much room as the one
        with most guesses."""
        guesses: dict[int, list[int]] = {}
        if self.draft is not None and (begun := [row for row in rows if row.new]):
            full = self.size - 1 if self.sampling.overflow == "stop" else self.size
            known = zip(rows, self.cache.lengths, strict=False)
            spare = self.cache.size - max([len(row.tokens) for row, n in known if n], default=0)
            most = self.sampling.max_new_tokens - 1
            room = [min(most - row.new, full - len(row.tokens), spare) for row in begun]
            found = self.draft.propose(begun, [max(0, n) for n in room])
            guesses = {row.number: guess for row, guess in zip(begun, found, strict=True)}
        return [guesses.get(row.number, []) for row in rows]

    def _ahead(self, decoder: GraphDecoder, rows: list[Row]) -> Iterator[Row]:
        """Decode with the host one step behind, until all rows have ended, or one if others wait,
        or one has no room.

        Only rank 0 knows at once that a row has ended. The others hear it with a later step, and
        drop what the row has got since. Ranks launch the same steps, so all of them go by that.
        """
        axis, new, size = self.model.tp.at("sampling"), [row.new for row in rows], self.size
        full = size if self.sampling.overflow == "stop" else size + 1
        most = min(self.sampling.max_new_tokens - max(new),
                   full - max(len(row.tokens) for row in rows))
        cache = self.cache.part(0, len(rows))
        steps = decoder.ahead([row.tokens[-1] for row in rows], cache, self.sampling)
        counts, heard, collected = [0] * len(rows), [0] * len(rows), 0
        enough = any if self._waiting else all
        while collected < steps.launched or steps.launched < most and not enough(heard):
            if steps.launched < most and not enough(heard):
                places = zip(rows, new, strict=True)
                steps.launch([(row.sample, n + steps.launched) for row, n in places], counts)
                if steps.launched - collected < min(2, most):
                    continue
            chosen, collected = steps.collect(), collected + 1
            heard = [count for count, _ in chosen]
            growing = [i for i, row in enumerate(rows) if not row.ended and not heard[i]]
            for i in growing:
                row, (_, token) = rows[i], chosen[i]
                if token < 0:
                    raise UserError(NOT_FINITE)
                ends = axis.rank == 0 and self.stops(row, token)
                row.tokens.append(token)
                counts[i] = row.new if ends else 0
                row.ended = ends or self._is_complete(row)
            yield from (rows[i] for i in growing)
        self.timing.decode_steps += steps.launched
        told = broadcast(torch.tensor(counts, device=self.model.device), axis, "step").tolist()
        for row, count in zip(rows, told, strict=True):
            if count:
                del row.tokens[row.prompt_tokens + count :]
                row.ended = True
        self.timing.decode_tokens += sum(row.new for row in rows) - sum(new)

    def _is_complete(self, row: Row) -> bool:
        full = self.sampling.overflow == "stop" and len(row.tokens) == self.size
        return full or row.new == self.sampling.max_new_tokens

    def _gather(self, best: Tensor, guesses: list[list[int]]) -> Tensor:
        """Every rank's candidates and guesses, [tp, 2 * positions * k + guesses] int32."""
        guessed = torch.tensor([token for guess in guesses for token in guess], dtype=torch.int32)
        mine = torch.cat([best.flatten(), guessed.to(best.device)])
        return all_gather(mine, self.model.tp.at("sampling"), "step")

    def _agree(self, rows: list[Row], guesses: list[list[int]], everyone: Tensor) -> Tensor:
        """The next tokens of each row, the same on all ranks, int64: (count, token, ...), where the
        count is negative if the row ends with them.

        Ranks have gathered their candidates and guesses, and rank 0 broadcasts its choice. So ranks
        agree even if they compute different numbers or guesses.
        """
        axis, n = self.model.tp.at("sampling"), sum(map(len, guesses))
        chosen = np.zeros((len(rows), 2 + max(map(len, guesses))), np.int64)
        if axis.rank == 0:
            # [tp, 2, positions, k] -> each position's candidates of all ranks, [positions, tp * k]
            best, theirs = np.split(everyone.cpu().numpy(), [everyone.shape[1] - n], axis=1)
            found = best.reshape(axis.size, 2, len(rows) + n, -1).transpose(1, 2, 0, 3)
            bits, ids = found.reshape(2, len(rows) + n, -1)
            alike = (theirs == theirs[0]).all(axis=0)
            self._draw(chosen, rows, guesses, alike, bits.view(np.float32), ids)
        device = everyone.device if axis.size > 1 else "cpu"  # one rank: nothing is sent
        return broadcast(torch.from_numpy(chosen).to(device), axis, "step")

    def _draw(self, chosen: NDArray[np.int64], rows: list[Row], guesses: list[list[int]],
              alike: NDArray[np.bool_], values: NDArray[np.float32],
              ids: NDArray[np.int32]) -> None:
        """Fill `chosen`, see `_agree`. alike: for each guess, whether all ranks made it; the logits
        after others differ. values, ids: each position's candidates."""
        if not np.isfinite(values.max(axis=1)).all():
            raise UserError(NOT_FINITE)
        at = guess_at = 0  # the row's first position and first guess
        for row, guess, line in zip(rows, guesses, chosen, strict=True):
            for j in range(1 + len(guess)):
                token = choose(values[at + j], ids[at + j], self.sampling, row.sample, row.new + j)
                ends = self.stops(row, token)
                line[0], line[1 + j] = -(j + 1) if ends else j + 1, token
                if ends or j == len(guess) or token != guess[j] or not alike[guess_at + j]:
                    break
            at, guess_at = at + 1 + len(guess), guess_at + len(guess)


def _leader(row: Row, rows: list[Row]) -> int | None:
    """The place of a row that reads the prompt of `row`, which is new, in the same pass."""
    return next((i for i, other in enumerate(rows) if other.prompt == row.prompt and not other.new),
                None)


def generate(model: TensorParallelGPT, prompts: list[list[int]], sampling: Sampling,
             decoder: TorchDecoder | None = None, draft: Speculation | None = None) -> Generation:
    """Continue every prompt num_samples times; see Generation."""
    generation = Generation(model, prompts, sampling, decoder, draft)
    list(generation)  # to the end
    return generation

"""Generation: prefill, decode steps, and tokens that are the same on all ranks.

A row is one sequence: a prompt is continued in num_samples rows. Every rank runs the same passes
and collectives; rank 0 of the tp axis chooses the tokens and broadcasts them. A step of a row whose
newest token is t, with guesses g and h of a draft (speculative decoding: Leviathan, Kalman, Matias,
arXiv 2211.17192):

    one pass reads    t  g  h       (t is the only one that is in the text already)
    rank 0 draws      a  b  c       after each of them
    the row gets      a             if a is not g
                      a  b          if a is g, and b is not h
                      a  b  c       if a is g and b is h

So a guess never changes the text, only the number of passes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.errors import UserError
from inference.decoders import GraphDecoder, TorchDecoder, decoder_for
from inference.sampling import Row, Sampling, candidates, choose
from inference.speculation import Speculation
from model import KVCache
from parallel.collectives import all_gather, broadcast
from tp_model import TensorParallelGPT

NOT_FINITE = (
    "the model's logits are not finite numbers: its weights are damaged, or too large for this "
    "precision (try --dtype=float32)."
)


@dataclass
class Timing:
    """Sums over the groups of rows. A decode step adds a token or more to every unfinished row."""

    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0  # of the first group
    decode_s: float = 0.0
    decode_tokens: int = 0  # without each row's first
    decode_steps: int = 0
    kv_cache_bytes: int = 0  # of the largest cache
    slid: bool = False


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
        self.timing = Timing()

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self.rows), self.sampling.batch_size):
            yield from self._write(self.rows[first : first + self.sampling.batch_size])

    def _write(self, rows: list[Row]) -> Iterator[Row]:
        """Write one group of rows to their ends."""
        timing, size = self.timing, self.size
        if self.draft is not None:
            self.draft.begin()
        started = self._clock()
        logits, cache = self._prefill(rows)
        prefilled = self._clock()
        self._extend(rows, [[] for _ in rows], logits)
        first_token = time.perf_counter()
        yield from rows
        # A row leaves the cache when it ends or outgrows block_size: then its tokens have new
        # positions in every step, and its whole window is computed each time, as nanoGPT does.
        cached = rows if cache is not None else []
        cache = cache and self.decoder.adopt(cache)
        while active := [row for row in rows if not row.ended]:
            stay = [i for i, row in enumerate(cached) if not row.ended and len(row.tokens) <= size]
            if cache is not None and len(stay) < len(cached):
                cached = [cached[i] for i in stay]
                cache = self.decoder.adopt(cache.rows(stay)) if stay else None
            # a draft has to see a step's tokens before it can guess the next ones
            goes_ahead = self.draft is None and len(active) == len(cached)
            if goes_ahead and cache is not None and isinstance(self.decoder, GraphDecoder):
                yield from self._ahead(self.decoder, cached, cache)
                continue
            timing.slid = timing.slid or any(len(row.tokens) > size for row in active)
            others = [row for row in active if cache is None or len(row.tokens) > size]
            active = cached + others
            guesses = self._guesses(cached, others, cache)
            counts = self._extend(active, guesses, self._step(cached, others, guesses, cache))
            timing.decode_tokens += sum(counts)
            timing.decode_steps += 1
            if self.draft is not None:
                for row, guess, count in zip(active, guesses, counts, strict=True):
                    self.draft.learn(row, len(guess), min(count - 1, len(guess)))
            yield from active
        timing.prefill_s += prefilled - started
        timing.time_to_first_token_s = timing.time_to_first_token_s or first_token - started
        timing.decode_s += time.perf_counter() - first_token

    def _ahead(self, decoder: GraphDecoder, rows: list[Row], cache: KVCache) -> Iterator[Row]:
        """Decode with the host one step behind, until all rows have ended or one has no room.

        Only rank 0 knows at once that a row has ended. The others hear it with a later step, and
        drop what the row has got since. Ranks launch the same steps, so all of them go by that.
        """
        axis, new, size = self.model.tp.at("sampling"), rows[0].new, self.size
        full = size if self.sampling.overflow == "stop" else size + 1
        most = min(self.sampling.max_new_tokens - new, full - max(len(row.tokens) for row in rows))
        steps = decoder.ahead([row.tokens[-1] for row in rows], cache, self.sampling)
        counts, heard, collected = [0] * len(rows), [0] * len(rows), 0
        while collected < steps.launched or steps.launched < most and not all(heard):
            if steps.launched < most and not all(heard):
                steps.launch([(row.sample, new + steps.launched) for row in rows], counts)
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
        self.timing.decode_tokens += sum(row.new - new for row in rows)
        cache.advance([len(row.tokens) - 1 for row in rows])

    def _clock(self) -> float:
        """The time, after the device has finished its work."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _prefill(self, rows: list[Row]) -> tuple[Tensor, KVCache | None]:
        """Local logits [rows, v] after the prompts, and the rows' cache: one pass that reads every
        prompt once, however many rows continue it."""
        windows = list({row.prompt: row.tokens[-self.size :] for row in rows}.values())
        index = [row.prompt - rows[0].prompt for row in rows]
        lengths = [len(window) for window in windows]
        # a row that slides leaves the cache, so block_size is enough
        most = min(self.size, max(lengths) + self.sampling.max_new_tokens)
        cache = self.model.new_cache(len(windows), most) if self.sampling.kv_cache else None
        logits = self._logits(windows, [1] * len(windows), cache)
        if cache is not None:
            cache.advance(lengths)
            cache = cache.rows(index) if len(index) > len(windows) else cache
            self.timing.kv_cache_bytes = max(self.timing.kv_cache_bytes, cache.nbytes)
        return logits[torch.tensor(index, device=logits.device)], cache

    def _logits(self, windows: list[list[int]], counts: list[int], cache: KVCache | None) -> Tensor:
        """Local logits [n, v] after the last counts[i] tokens of each window, in one pass. Padding
        on the right is not attended to, and is overwritten in the cache later."""
        longest, device = max(map(len, windows)), self.model.device
        padded = [window + [0] * (longest - len(window)) for window in windows]
        hidden = self.model.hidden(torch.tensor(padded, device=device), cache)  # [n, longest, C]
        ends = zip(map(len, windows), counts, strict=True)
        places = [(i, at) for i, (end, count) in enumerate(ends) for at in range(end - count, end)]
        return self.model.local_logits(hidden[torch.tensor(places, device=device).unbind(1)])

    def _guesses(self, cached: list[Row], others: list[Row],
                 cache: KVCache | None) -> list[list[int]]:
        """The draft's guesses for each row. With the token after them they fit max_new_tokens, the
        context, and the cache, where each row takes as much room as the one with most guesses."""
        rows = cached + others
        if self.draft is None:
            return [[] for _ in rows]
        full = self.size - 1 if self.sampling.overflow == "stop" else self.size
        spare = cache.size - max(len(row.tokens) for row in cached) if cache is not None else full
        most = self.sampling.max_new_tokens - 1
        room = [min(most - row.new, full - len(row.tokens), spare) for row in rows]
        return self.draft.propose(rows, [max(0, n) for n in room])

    def _step(self, cached: list[Row], others: list[Row], guesses: list[list[int]],
              cache: KVCache | None) -> Tensor:
        """Local logits [positions, v] after each row's newest token and after each of its guesses:
        one pass for the rows in the cache, one for the others."""
        parts, n = [], len(cached)
        if cache is not None:
            cache.advance([len(row.tokens) - 1 for row in cached])  # wrong guesses are overwritten
            new = [[row.tokens[-1], *guess] for row, guess in zip(cached, guesses[:n], strict=True)]
            T = max(map(len, new))
            padded = [tokens + [0] * (T - len(tokens)) for tokens in new]
            logits = self.decoder.logits(padded, cache).flatten(0, 1)  # [n * T, v]
            used = [i * T + j for i, tokens in enumerate(new) for j in range(len(tokens))]
            if len(used) < len(logits):
                logits = logits[torch.tensor(used, device=logits.device)]
            parts.append(logits)
        if others:
            pairs = list(zip(others, guesses[n:], strict=True))
            windows = [(row.tokens + guess)[-self.size :] for row, guess in pairs]
            parts.append(self._logits(windows, [1 + len(guess) for _, guess in pairs], None))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _extend(self, rows: list[Row], guesses: list[list[int]], logits: Tensor) -> list[int]:
        """Give each row its next tokens and end the complete ones. Returns how many each got."""
        chosen = self._agree(rows, guesses, logits)
        for row, (count, *tokens) in zip(rows, chosen, strict=True):
            row.tokens += tokens[: abs(count)]
            row.ended = count < 0 or self._is_complete(row)
        return [abs(count) for count, *_ in chosen]

    def _is_complete(self, row: Row) -> bool:
        full = self.sampling.overflow == "stop" and len(row.tokens) == self.size
        return full or row.new == self.sampling.max_new_tokens

    def _agree(self, rows: list[Row], guesses: list[list[int]], logits: Tensor) -> list[list[int]]:
        """The next tokens of each row, the same on all ranks: (count, token, ...), where the count
        is negative if the row ends with them.

        Two small collectives: ranks gather their candidates and guesses, and rank 0 broadcasts its
        choice. So ranks agree even if they compute different numbers or guesses.
        """
        axis, lo = self.model.tp.at("sampling"), self.model.vocab_lo
        best = candidates(logits, lo, self.model.config.vocab_size, self.sampling, axis.size)
        guessed = torch.tensor([token for guess in guesses for token in guess], dtype=torch.int32)
        mine = torch.cat([best.flatten(), guessed.to(best.device)])
        everyone = all_gather(mine, axis, "step").cpu().numpy()  # [tp, 2 * positions * k + guesses]
        chosen = np.zeros((len(rows), 2 + max(map(len, guesses))), np.int64)
        if axis.rank == 0:
            # [tp, 2, positions, k] -> each position's candidates of all ranks, [positions, tp * k]
            found = everyone[:, : best.numel()].reshape(axis.size, *best.shape)
            bits, ids = found.transpose(1, 2, 0, 3).reshape(2, len(logits), -1)
            theirs = everyone[:, best.numel() :]
            alike = (theirs == theirs[0]).all(axis=0)
            self._draw(chosen, rows, guesses, alike, bits.view(np.float32), ids)
        device = best.device if axis.size > 1 else torch.device("cpu")  # one rank: nothing is sent
        agreed: list[list[int]]
        agreed = broadcast(torch.from_numpy(chosen).to(device), axis, "step").tolist()
        return agreed

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


def generate(model: TensorParallelGPT, prompts: list[list[int]], sampling: Sampling,
             decoder: TorchDecoder | None = None, draft: Speculation | None = None) -> Generation:
    """Continue every prompt num_samples times; see Generation."""
    generation = Generation(model, prompts, sampling, decoder, draft)
    for _ in generation:
        pass
    return generation

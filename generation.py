"""Prefill, decode step, sampling on which all ranks agree, stopping, and text that streams.

Rows are the sequences being written: each prompt, as often as num_samples says. Every rank runs every forward pass and
every collective here; rank 0 of the tp axis alone chooses tokens and decides which rows end, and tells the others.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from decoding import Decoder, decoder_for
from errors import UserError
from model import KVCache
from parallel.collectives import all_gather, broadcast
from text.tokenizer import StreamDecoder, Tokenizer
from tp_model import TensorParallelGPT


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a row ends. n_tokens: ids the tokenizer knows; what lies beyond is never chosen.

    temperature 0 is greedy. top_k 0 keeps all. top_p keeps the likeliest tokens that together reach that probability.
    overflow, at block_size tokens: slide (the last block_size count), stop (the row ends), error.
    batch_size: rows written at a time, which bounds the memory; the tokens do not depend on it.
    """

    n_tokens: int
    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    max_new_tokens: int = 200
    num_samples: int = 1
    seed: int = 1337
    overflow: str = "slide"
    kv_cache: bool = True
    batch_size: int = 32


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
        """The row's next token, not yet in it. True: the row ends with it."""
        ...

    def end(self, row: Row) -> None:
        """The row is complete."""
        ...


@dataclass
class Timing:
    """Seconds, over all groups of rows. A decode step adds one token to every unfinished row of a group."""

    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0  # from the start of the first prefill
    decode_s: float = 0.0
    decode_tokens: int = 0  # the tokens after each row's first
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
) -> Generation:
    """Continue every prompt num_samples times. The tokens are the same at every tp, and in any company of prompts.

    Rows are written in groups of batch_size, one group after the other. decoder: how steps are computed, the fastest way
    unless given. UserError for a prompt as `check_prompts` says, and for logits that are no numbers.
    """
    decoder = decoder or decoder_for(model)
    check_prompts(prompts, model.config.vocab_size, model.config.block_size, sampling)
    n = sampling.num_samples
    rows = [Row(i * n + j, i, j, list(prompt), len(prompt)) for i, prompt in enumerate(prompts) for j in range(n)]
    result = Generation(rows)
    for first in range(0, len(rows), sampling.batch_size):
        _write(model, decoder, rows[first : first + sampling.batch_size], sampling, audience, result.timing)
    return result


def _write(
    model: TensorParallelGPT, decoder: Decoder, rows: list[Row], sampling: Sampling, audience: Audience | None, timing: Timing
) -> None:
    """Write the rows of one group until each has ended."""
    size = model.config.block_size
    started = _clock(model.device)
    logits, held = _prefill(model, rows, sampling)
    prefilled = _clock(model.device)
    _extend(model, logits, rows, sampling, audience)
    first_token = time.perf_counter()
    while active := [row for row in rows if not row.ended]:
        held.release(size)
        timing.slid = timing.slid or any(len(row.tokens) > size for row in active)
        active, logits = _step(model, decoder, active, held)
        _extend(model, logits, active, sampling, audience)
        timing.decode_tokens += len(active)
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

    def release(self, block_size: int) -> None:
        """Let go of the rows that have left, before a decode step."""
        stay = [i for i, row in enumerate(self.rows) if not row.ended and len(row.tokens) <= block_size]
        if self.cache is not None and len(stay) < len(self.rows):
            self.rows = [self.rows[i] for i in stay]
            self.cache = self.cache.rows(stay) if stay else None


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
    logits = _last_logits(model, windows, cache)
    source = [place[row.prompt] for row in rows]
    if cache is not None:
        cache.advance(lengths)
        if source != list(range(len(windows))):
            cache = cache.rows(source)
    return logits[torch.tensor(source, device=logits.device)], _Held(cache, rows)


def _last_logits(model: TensorParallelGPT, windows: list[list[int]], cache: KVCache | None) -> Tensor:
    """Local logits [n, v] after the last token of each window; only those positions go through the head."""
    device = model.device
    longest = max(len(window) for window in windows)
    idx = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)
    last = torch.tensor([len(window) - 1 for window in windows], device=device)
    hidden = model.hidden(idx, cache)  # [n, longest, C]
    return model.local_logits(hidden[torch.arange(len(windows), device=device), last])


def _step(model: TensorParallelGPT, decoder: Decoder, rows: list[Row], held: _Held) -> tuple[list[Row], Tensor]:
    """The rows in the order of their local logits, and those [rows, v]: one forward pass for the rows whose past is
    cached, one for the others."""
    size = model.config.block_size
    parts = []
    if held.cache is not None:
        parts.append(decoder.logits([row.tokens[-1] for row in held.rows], held.cache))
        held.cache.advance([len(row.tokens) for row in held.rows])
    cached = {row.number for row in held.rows}
    others = [row for row in rows if row.number not in cached]
    if others:
        parts.append(_last_logits(model, [row.tokens[-size:] for row in others], None))
    return held.rows + others, torch.cat(parts) if len(parts) > 1 else parts[0]


def _extend(model: TensorParallelGPT, logits: Tensor, rows: list[Row], sampling: Sampling, audience: Audience | None) -> None:
    """Give each row its next token, and end those that are complete; alike on all ranks."""
    full = model.config.block_size if sampling.overflow == "stop" else None
    tokens, ended = _agree(model, logits, rows, sampling, audience)
    for row, token, end in zip(rows, tokens, ended, strict=True):
        row.tokens.append(token)
        row.ended = bool(end) or row.new == sampling.max_new_tokens or len(row.tokens) == full
        if row.ended and audience is not None and model.tp.rank == 0:
            audience.end(row)


def _agree(
    model: TensorParallelGPT, logits: Tensor, rows: list[Row], sampling: Sampling, audience: Audience | None
) -> tuple[list[int], list[int]]:
    """One token for each row, and whether it ends the row: chosen by rank 0, told to all. Two small collectives.

    Ranks exchange their best candidates only; nothing depends on two ranks computing the same number.
    """
    axis = model.tp.at("sampling")
    everyone = all_gather(candidates(logits, model.vocab_lo, model.config.vocab_size, sampling, axis.size), axis, "step")
    verdict = np.zeros((2, len(rows)), np.int64)
    if axis.rank == 0:
        # [tp, 2, rows, k] -> each row's candidates from all ranks, [rows, tp * k]
        bits, ids = everyone.numpy().transpose(1, 2, 0, 3).reshape(2, len(rows), -1)
        values = bits.view(np.float32)
        if not np.isfinite(values.max(axis=1)).all():
            raise UserError(
                "the model's logits are not finite numbers: its weights are damaged, or too large for this precision "
                "(try --dtype=float32)."
            )
        for i, row in enumerate(rows):
            u = uniform(sampling.seed, row.sample, row.new) if sampling.temperature else 0.0
            verdict[0, i] = token = choose(values[i], ids[i], u, sampling)
            verdict[1, i] = audience is not None and audience.hear(row, token)
    tokens, ended = broadcast(torch.from_numpy(verdict), axis, "step").tolist()
    return tokens, ended


def candidates(logits: Tensor, lo: int, vocab_size: int, sampling: Sampling, tp: int) -> Tensor:
    """This rank's contenders, [2, rows, k] int32 on the CPU: the bits of their float32 logits, and their ids. k is alike on
    all ranks.

    Among the global best k every one is among the best k of its rank. Where fewer are left (a rank may hold nothing but
    ids the tokenizer does not know) the rest is -inf.
    """
    width = -(-vocab_size // tp)
    k = 1 if sampling.temperature == 0 else min(sampling.top_k or width, width)
    known = logits[:, : max(0, sampling.n_tokens - lo)].float()
    if known.shape[1] < k:
        known = F.pad(known, (0, k - known.shape[1]), value=float("-inf"))
    every = known.shape[1] == k  # then there is no need to rank them
    ids = torch.arange(k, device=known.device).expand_as(known) if every else likeliest(known, k)
    return torch.stack([known.gather(1, ids).view(torch.int32), (ids + lo).int()]).cpu()


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Ids [rows, k] of the k largest of float32 logits [rows, n]; among equal ones the lower ids.

    torch.topk takes any of several equal logits, of which half precision makes many: which one would depend on how the
    vocabulary is split. So it gets whole numbers that are never equal: the float's bits, arranged to order as floats do,
    above the id.
    """
    if k == 1 and logits.is_cuda:
        return logits.argmax(dim=-1, keepdim=True)  # the first of equal ones
    if k == 1:
        return torch.from_numpy(logits.numpy().argmax(axis=1, keepdims=True))  # so is this, in a third of the time
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: there is one zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) - torch.arange(logits.shape[1], device=logits.device)
    return keys.topk(k, dim=-1).indices


def uniform(seed: int, sample: int, position: int) -> float:
    """The number in [0, 1) that chooses a sample's token at a position: a counter-based draw, so that a row's text does
    not depend on which other rows are generated with it."""
    return float(np.random.Generator(np.random.Philox(key=[seed, 0x5A3], counter=[0, position, sample, 0])).random())


def choose(values: NDArray[np.float32], ids: NDArray[np.int32], u: float, sampling: Sampling) -> int:
    """The token that u in [0, 1) picks from logits `values` of tokens `ids`, both [n], in float64.

    Ties are ranked by id, and the kept tokens are laid out by id, so the order in which ranks brought them is no matter.
    """
    order = np.lexsort((ids, -values))  # likeliest first
    if sampling.temperature == 0:
        return int(ids[order[0]])
    if sampling.top_k:
        order = order[: sampling.top_k]
    z = values[order].astype(np.float64)
    p = np.exp((z - z[0]) / sampling.temperature)
    p /= p.sum()
    if sampling.top_p < 1.0:
        keep = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
        order, p = order[:keep], p[:keep]
    by_id = np.argsort(ids[order], kind="stable")
    cumulative = np.cumsum(p[by_id])
    pick = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(ids[order[by_id[min(pick, len(by_id) - 1)]]])


@dataclass
class Listener:
    """Turns a row's tokens into text as they come, and finds its stop text, which is not part of the sample.

    text[:final] will not change any more: whole characters, and nothing that may yet turn out to begin the stop text.
    """

    tokenizer: Tokenizer
    stop: str
    text: str = ""
    final: int = 0

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer)

    def hear(self, token: int) -> bool:
        """True where the stop text is complete: the row ends."""
        self.text += self._decoder.push(token)
        found = self.text.find(self.stop, self.final) if self.stop else -1
        if found >= 0:
            self._decoder.finish()  # the rest of this token, half a character perhaps, comes after the stop text
            self.text = self.text[:found]
        self.final = len(self.text) - (0 if found >= 0 else self._held())
        return found >= 0

    def finish(self) -> str:
        """The whole text, with whatever was held back."""
        self.text += self._decoder.finish()
        self.final = len(self.text)
        return self.text

    def _held(self) -> int:
        """Length of the longest end of the text that could begin the stop text."""
        longest = min(len(self.stop) - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if self.text.endswith(self.stop[:n])), 0)

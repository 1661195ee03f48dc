"""Prefill, decode step, sampling on which all ranks agree, stopping, and text that streams.

Rows are the sequences being written: each prompt, as often as num_samples says. Every rank runs every forward pass and
every collective here; rank 0 of the tp axis alone chooses tokens and decides which rows end, and tells the others.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from errors import UserError
from model import KVCache
from parallel.collectives import all_gather, broadcast
from text.tokenizer import StreamDecoder, Tokenizer
from tp_model import TensorParallelGPT

OnToken = Callable[[int, int], bool]  # (row, token) -> whether the row ends here; called on rank 0 of the tp axis only


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a row ends. n_tokens: ids the tokenizer knows; what lies beyond is never chosen.

    temperature 0 is greedy. top_k 0 keeps all. top_p keeps the likeliest tokens that together reach that probability.
    overflow, at block_size tokens: slide (the last block_size count), stop (the row ends), error.
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


@dataclass
class Row:
    """One sequence: its prompt's number, which of that prompt's samples it is, and all its tokens so far."""

    prompt: int
    sample: int
    tokens: list[int]
    prompt_tokens: int

    @property
    def new(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass
class Timing:
    """Seconds; a decode step is one forward pass of every unfinished row after the prefill."""

    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0  # from the start of the prefill
    decode_s: float = 0.0
    decode_tokens: int = 0
    kv_cache_bytes: int = 0
    slid: bool = False


@dataclass
class Generation:
    rows: list[Row] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)


def check_prompts(prompts: list[list[int]], vocab_size: int, block_size: int, sampling: Sampling) -> None:
    """UserError for a prompt that cannot be continued: empty, of foreign ids, or too long for the overflow rule."""
    if not prompts:
        raise UserError("there is no prompt: give --start, and a prompt file with at least one line.")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: give at least one token, for example --start=$'\\n'.")
        beyond = [token for token in prompt if not 0 <= token < vocab_size]
        if beyond:
            raise UserError(f"prompt {i} has token id {beyond[0]}, the model's vocab_size is {vocab_size}: not its tokenizer?")
        if sampling.overflow == "stop" and len(prompt) >= block_size or sampling.overflow == "error" and len(prompt) > block_size:
            raise UserError(f"prompt {i} has {len(prompt)} tokens, block_size is {block_size}. Shorten it, or use --overflow=slide.")
        if sampling.overflow == "error" and len(prompt) + sampling.max_new_tokens > block_size:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, with max_new_tokens={sampling.max_new_tokens} it outgrows "
                f"block_size={block_size}. Ask for {block_size - len(prompt)}, or use --overflow=slide."
            )


@torch.inference_mode()
def generate(model: TensorParallelGPT, prompts: list[list[int]], sampling: Sampling, on_token: OnToken | None = None) -> Generation:
    """Continue every prompt num_samples times. The tokens are the same at every tp, and in any company of prompts.

    prompts are read once each, whatever num_samples is. A row whose context is full goes on as sampling.overflow says;
    sliding shifts every absolute position, so such a row recomputes its whole window for each token, as nanoGPT does.
    """
    size = model.config.block_size
    check_prompts(prompts, model.config.vocab_size, size, sampling)
    result = Generation()
    timing = result.timing
    start = time.perf_counter()
    logits, cache = _prefill(model, prompts, sampling)
    n = sampling.num_samples
    result.rows = [Row(i, j, list(prompt), len(prompt)) for i, prompt in enumerate(prompts) for j in range(n)]
    logits = logits.repeat_interleave(n, dim=0)
    active = list(range(len(result.rows)))
    cached: list[int] = []
    if cache is not None:
        cached = [r for r in active if len(result.rows[r].tokens) <= size]
        cache = _keep(cache, [result.rows[r].prompt for r in cached])
        timing.kv_cache_bytes = cache.nbytes if cache is not None else 0
    timing.prefill_s = time.perf_counter() - start
    while True:
        rows = [result.rows[r] for r in active]
        tokens, ended = _agree(model, logits, rows, active, sampling, on_token)
        if not timing.time_to_first_token_s:
            timing.time_to_first_token_s = time.perf_counter() - start
            start = time.perf_counter()
        else:
            timing.decode_tokens += len(rows)
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        full = size if sampling.overflow == "stop" else None
        active = [
            r
            for r, row, end in zip(active, rows, ended, strict=True)
            if not end and row.new < sampling.max_new_tokens and len(row.tokens) != full
        ]
        if not active:
            break
        if cache is not None:
            going = [r for r in cached if r in active and len(result.rows[r].tokens) <= size]
            if going != cached:
                cache, cached = _keep(cache, [cached.index(r) for r in going]), going
        timing.slid = timing.slid or any(len(result.rows[r].tokens) > size for r in active)
        logits = _step(model, result.rows, active, cached, cache)
    timing.decode_s = time.perf_counter() - start
    return result


def _keep(cache: KVCache, index: list[int]) -> KVCache | None:
    """The cache of these rows; the cache itself where that is all of them."""
    if index == list(range(len(cache.lengths))):
        return cache
    return cache.rows(index) if index else None


def _prefill(model: TensorParallelGPT, prompts: list[list[int]], sampling: Sampling) -> tuple[Tensor, KVCache | None]:
    """One pass over all prompts: local logits [P, v] after each one's last token, and the cache.

    Shorter prompts are padded on the right: causal attention never looks there, and what is cached there is overwritten.
    """
    size = model.config.block_size
    windows = [prompt[-size:] for prompt in prompts]
    cache = None
    if sampling.kv_cache:
        longest = max(len(window) for window in windows)
        # a row stops using the cache when it slides, so block_size is enough
        cache = model.new_cache(len(windows), min(size, longest + sampling.max_new_tokens))
    logits = _last_logits(model, windows, cache)
    if cache is not None:
        cache.advance([len(window) for window in windows])
    return logits, cache


def _last_logits(model: TensorParallelGPT, windows: list[list[int]], cache: KVCache | None) -> Tensor:
    """Local logits [n, v] after the last token of each window; only those positions go through the head."""
    device = model.device
    longest = max(len(window) for window in windows)
    idx = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)
    last = torch.tensor([len(window) - 1 for window in windows], device=device)
    hidden = model.hidden(idx, cache)  # [n, longest, C]
    return model.local_logits(hidden[torch.arange(len(windows), device=device), last])


def _step(model: TensorParallelGPT, rows: list[Row], active: list[int], cached: list[int], cache: KVCache | None) -> Tensor:
    """One forward pass for every active row: local logits [len(active), v], in the order of `active`."""
    size = model.config.block_size
    parts = []
    if cache is not None and cached:
        device = cache.k[0].device
        idx = torch.tensor([[rows[r].tokens[-1]] for r in cached], device=device)
        parts.append(model.local_logits(model.hidden(idx, cache)[:, -1]))
        cache.advance([len(rows[r].tokens) for r in cached])
    windowed = [r for r in active if r not in cached]
    if windowed:
        parts.append(_last_logits(model, [rows[r].tokens[-size:] for r in windowed], None))
    order = cached + windowed
    return torch.cat(parts)[[order.index(r) for r in active]] if order != active else torch.cat(parts)


def _agree(
    model: TensorParallelGPT, logits: Tensor, rows: list[Row], names: list[int], sampling: Sampling, on_token: OnToken | None
) -> tuple[list[int], list[bool]]:
    """One token for each row, and whether it ends the row: chosen by rank 0, told to all. Two small collectives.

    Ranks exchange their best candidates only; nothing depends on two ranks computing the same number.
    """
    axis = model.tp.at("sampling")
    values, ids = candidates(logits, model.vocab_lo, model.config.vocab_size, sampling, model.tp.size)
    # [tp, 2, rows, k]: ids travel beside the bits of their float32 logits
    everyone = all_gather(torch.stack([values.view(torch.int32), ids]), axis, "step")
    verdict = torch.zeros(2, len(rows), dtype=torch.int64)
    if model.tp.rank == 0:
        found = everyone[:, 0].contiguous().view(torch.float32).transpose(0, 1).flatten(1).numpy()
        found_ids = everyone[:, 1].transpose(0, 1).flatten(1).numpy()
        for i, row in enumerate(rows):
            token = choose(found[i], found_ids[i], uniform(sampling.seed, row.sample, row.new), sampling)
            verdict[0, i] = token
            verdict[1, i] = on_token is not None and on_token(names[i], token)
    tokens, ended = broadcast(verdict, axis, "step").tolist()
    return tokens, [bool(end) for end in ended]


def candidates(logits: Tensor, lo: int, vocab_size: int, sampling: Sampling, tp: int) -> tuple[Tensor, Tensor]:
    """This rank's contenders: (logits float32, ids int32), both [rows, k] on the CPU, k alike on all ranks.

    Among the global best k every one is among the best k of its rank. Where fewer are left (a rank may hold nothing but
    ids the tokenizer does not know) the rest is -inf.
    """
    width = -(-vocab_size // tp)
    k = 1 if sampling.temperature == 0 else min(sampling.top_k or width, width)
    known = logits[:, : max(0, sampling.n_tokens - lo)].float().cpu()
    if not known.shape[1]:
        known = known.new_full((len(known), 1), float("-inf"))
    if k < known.shape[1]:
        values, ids = known.topk(k, dim=-1) if k > 1 else known.max(dim=-1, keepdim=True)
    else:
        values, ids = known, torch.arange(known.shape[1]).expand_as(known)
    missing = k - values.shape[1]
    values = F.pad(values, (0, missing), value=float("-inf")).contiguous()
    return values, F.pad(ids + lo, (0, missing)).to(torch.int32)


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
    z = values[order].astype(np.float64) / sampling.temperature
    p = np.exp(z - z[0])
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
    """Turns a row's tokens into text as they come, and finds its stop text. Lives on the rank that chooses.

    show: called with each piece of text that is final: whole characters, and nothing that may yet turn out to be the
    beginning of the stop text (which is not part of the sample).
    """

    tokenizer: Tokenizer
    stop: str
    show: Callable[[str], None]
    text: str = ""
    shown: int = 0

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer)

    def hear(self, token: int) -> bool:
        """True where the stop text is complete: the row ends."""
        self.text += self._decoder.push(token)
        found = self.text.find(self.stop, max(0, self.shown - len(self.stop))) if self.stop else -1
        if found >= 0:
            self.text = self.text[:found]
            self._show(len(self.text))
            return True
        self._show(len(self.text) - self._held())
        return False

    def finish(self) -> str:
        """The whole text, with whatever was held back."""
        self.text += self._decoder.finish()
        self._show(len(self.text))
        return self.text

    def _held(self) -> int:
        """Length of the longest end of the text that could begin the stop text."""
        longest = min(len(self.stop) - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if self.text.endswith(self.stop[:n])), 0)

    def _show(self, end: int) -> None:
        if end > self.shown:
            self.show(self.text[self.shown : end])
            self.shown = end

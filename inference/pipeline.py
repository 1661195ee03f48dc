"""Text from a model whose layers are split over pipeline stages.

A pass goes through the stages. The first looks its tokens up, each sends the residual stream to the
next, the last sends the candidates for the next tokens to the first. That one chooses, and the
choice follows the stream. So the messages go round a ring (parallel/ring.py). The rows are dealt to
as many groups as there are stages: while one stage works on a group, the one before works on the
next group. Two stages, groups a and b, pass by pass:

    first    a1  b1  a2  b2  a3  ...     a2 needs the tokens that the last stage's a1 has led to
    last         a1  b1  a2  b2  ...

Every rank takes the groups in turn: it hears what was chosen after the group's last pass, seats new
rows in the place of ended ones, and runs the group's next pass. A pass needs messages of earlier
passes and of earlier stages alone, so no two ranks wait for each other.
"""

import copy
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from base.errors import Unavailable
from inference.decoders import TorchDecoder, decoder_for
from inference.generation import Generation
from inference.native_decoder import NativeDecoder
from inference.packed import suits
from inference.sampling import Row
from inference.speculation import Speculation
from model import KVCache
from parallel.collectives import Axis
from parallel.regions import WHOLE, f
from parallel.ring import Ring
from plan.partition import length, spans
from tp_model import Stream, TensorParallelGPT


def generation_for(model: TensorParallelGPT, pp: Axis,
                   kernels: bool) -> tuple[type[Generation], TorchDecoder]:
    """How to write texts with a model, which is whole or a stage along the axis pp; its fastest
    decoder. A stage has no CUDA graph, as its messages go through the host. kernels: see
    `decoder_for`."""
    if pp.size == 1:
        return Generation, decoder_for(model, kernels)
    model.stages.without(model.schedule, {"--kernels=True": kernels})
    ring, why = Ring(pp), ""
    if model.sequence_parallel:
        why = "--sequence_parallel=True splits the tokens of prompts"
    elif suits(model):
        try:
            return PipelinedGeneration, NativeDecoder(model, ring)
        except Unavailable as error:
            why = str(error)
    return PipelinedGeneration, StageDecoder(model, ring, why)


def hidden(model: TensorParallelGPT, ring: Ring, idx: Tensor,
           cache: KVCache | None = None) -> Tensor | None:
    """TensorParallelGPT.hidden of all stages together: the last one's result, None on the others.
    """
    stages, (B, T), C = model.stages, idx.shape, model.config.n_embd
    if stages.has_first:
        s = model.embed(idx, cache)
    else:
        if cache is not None:
            cache.begin(T)
        model.tp.ledger.forward_passes += 1
        region = model.region(T)
        own = T if region is WHOLE else length(spans(T, model.tp.size)[model.tp.rank])
        like = torch.empty(B, own, C, dtype=model.dtype, device=model.device)
        s = Stream(ring.receive(like), region)
    s = model.layers(s, stages.layers[stages.rank], cache)
    if stages.has_last:
        return f(model.transformer.ln_f(s.x), model.tp.at("head"), s.region)
    ring.send(s.x)
    return None


class StageDecoder(TorchDecoder):
    """Runs one stage of the model, see TorchDecoder. Only the last stage returns logits; the others
    return as many rows of no columns."""

    def __init__(self, model: TensorParallelGPT, ring: Ring, why: str = ""):
        super().__init__(model, why)
        self.ring = ring

    def new_cache(self, rows: int, size: int) -> KVCache:
        """Without room for the layers of other stages."""
        model, (lo, hi) = self.model, self.model.stages.layers[self.model.stages.rank]
        heads, D = length(model.split.heads(model.tp.rank)), model.split.head_dim
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        widths = [D if lo <= layer < hi else 0 for layer in range(model.config.n_layer)]
        kv = [like.new_zeros(rows, 2 * heads, size, width) for width in widths]
        return KVCache(kv, [0] * rows)

    def _read(self, new: list[list[int]], cache: KVCache, places: list[tuple[int, int]]) -> Tensor:
        idx = torch.tensor(new, device=self.model.device)
        x = hidden(self.model, self.ring, idx, cache)
        if x is None:
            return idx.new_empty(len(places), 0, dtype=self.model.dtype)
        at = torch.tensor(places, device=self.model.device).unbind(1)
        return self.model.local_logits(x[at])

    _go_on = _read


@dataclass
class Group:
    """Rows that go through the stages together. under_way: of the pass that nobody has heard of
    yet, what `_begin` has returned."""

    most: int
    cache: KVCache
    draft: Speculation | None
    rows: list[Row] = field(default_factory=list)
    under_way: Any = None


class PipelinedGeneration(Generation):
    """Generation by stages. groups: of rows, as many as stages unless given."""

    groups = 0

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Row]:
        decoder: Any = self.decoder
        self.ring: Ring = decoder.ring
        groups, draft = list(self._deal()), self.draft
        turns, ended = deque(groups), time.perf_counter()
        while turns:
            group = turns.popleft()
            self.most, self.cache, self.draft = group.most, group.cache, group.draft
            if group.under_way is not None:
                reads = any(not row.new for row in group.rows)
                counts = self._finish(group.rows, *group.under_way)
                yield from group.rows
                ended, before = time.perf_counter(), ended
                self.timing.add(ended - before, 0 if reads else sum(counts))
            group.rows = self._seat(group.rows)
            if group.rows:
                group.under_way = self._begin(group.rows)
                turns.append(group)
        self.ring.flush()
        self.draft = draft
        for group in groups:
            if draft is not None and group.draft is not None:
                draft.proposed += group.draft.proposed
                draft.accepted += group.draft.accepted

    def _deal(self) -> Iterator[Group]:
        """The groups, each with a cache and a draft of its own."""
        longest = max(row.prompt_tokens for row in self.rows) + self.sampling.max_new_tokens
        count = min(self.groups or self.model.stages.pp, self.most)
        for rows in map(length, spans(self.most, count)):
            cache, draft = self.decoder.new_cache(rows, min(self.size, longest)), None
            if self.draft is not None:
                draft = replace(self.draft, guesser=copy.copy(self.draft.guesser), _paces={})
                draft.begin(rows, longest)
            self.timing.kv_cache_bytes += cache.nbytes
            yield Group(rows, cache, draft)

    def _gather(self, best: Tensor, guesses: list[list[int]]) -> Tensor:
        """The last stage's ranks gather, and send it all to the first. That one keeps the guesses
        of its own ranks, which have looked them up."""
        stages = self.model.stages
        if not stages.has_last and not (stages.has_first and any(guesses)):
            return best.flatten().expand(self.model.tp.size, -1)  # for its shape
        everyone = super()._gather(best, guesses)
        if stages.has_last:
            self.ring.send(everyone, "step")
        return everyone

    def _agree(self, rows: list[Row], guesses: list[list[int]], everyone: Tensor) -> Tensor:
        """The first stage chooses, and the others hear of it one by one."""
        stages, n = self.model.stages, sum(map(len, guesses))
        if stages.has_first:
            found = self.ring.receive(everyone, "step")
            if n:
                found[:, -n:] = everyone[:, -n:]
            chosen = super()._agree(rows, guesses, found)
        else:
            like = torch.empty(len(rows), 2 + max(map(len, guesses)), dtype=torch.int64)
            chosen = self.ring.receive(like, "step")
        if not stages.has_last:
            self.ring.send(chosen, "step")
        return chosen

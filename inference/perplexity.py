"""The exact loss of a text: every token after the first is predicted once."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from inference.pipeline import hidden
from parallel.collectives import Axis, broadcast
from parallel.loss import vocab_parallel_cross_entropy
from parallel.ring import Ring
from tp_model import TensorParallelGPT

HEAD_ROWS = 1024  # positions whose logits exist at a time; a whole batch's could outgrow the model


def windows(n: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first) of each forward pass over n tokens. Inputs are tokens [start, stop);
    target i is token start + i + 1, and counts if i >= first. Each of the tokens 1 ... n - 1 counts
    in one window; from the second on, it has at least block_size - stride tokens before it."""
    counted = start = 0  # targets so far: tokens 1 ... counted
    while counted < n - 1:
        stop = min(start + block_size, n - 1)
        yield start, stop, counted - start
        counted, start = stop, start + stride


@torch.inference_mode()
def measure(model: TensorParallelGPT, tokens: Tensor, stride: int, batch_size: int,
            show: bool = False, pp: Axis | None = None) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of tokens[1:] (nats, summed in float64) and their number.
    show: a progress bar on standard error. pp: the axis of the model's stages, if it has several.
    """
    ring = Ring(pp) if pp is not None and pp.size > 1 else None
    every = list(windows(len(tokens), model.config.block_size, stride))
    total, count = 0.0, 0
    for i in tqdm(range(0, len(every), batch_size), desc="eval", unit="batch", disable=not show):
        idx, targets = _batch(tokens, every[i : i + batch_size])
        counts, idx = targets >= 0, idx.to(model.device)
        count += int(counts.sum())
        x = model.hidden(idx) if ring is None else hidden(model, ring, idx)
        if x is None:  # the last stage has it
            continue
        x, y = x[counts.to(model.device)], targets[counts].to(model.device)  # [n, C], [n]
        losses = [
            vocab_parallel_cross_entropy(model.local_logits(x), y, model.vocab_lo, model.tp)
            for x, y in zip(x.split(HEAD_ROWS), y.split(HEAD_ROWS), strict=True)
        ]
        total += float(torch.stack([loss.double().sum() for loss in losses]).sum())
    if ring is not None and pp is not None:
        ring.flush()
        known = torch.tensor(total, dtype=torch.float64, device=model.device)
        total = broadcast(known, pp.at("pipeline"), "step", pp.size - 1).item()
    return total, count


def _batch(tokens: Tensor, batch: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64 of these windows; a target of -1 does not count. Padding is
    on the right, where causal attention does not look."""
    width = max(stop - start for start, stop, _ in batch)
    idx = torch.zeros(len(batch), width, dtype=torch.int64)
    targets = torch.full((len(batch), width), -1, dtype=torch.int64)
    for row, (start, stop, first) in enumerate(batch):
        idx[row, : stop - start] = tokens[start:stop]
        targets[row, first : stop - start] = tokens[start + 1 + first : stop + 1]
    return idx, targets

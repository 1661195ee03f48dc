"""The exact loss of a text: every token after the first is predicted once."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from parallel.loss import vocab_parallel_cross_entropy
from tp_model import TensorParallelGPT

HEAD_ROWS = 1024


def windows(n: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first): inputs are tokens [start, stop), and targets count from position `first` of the window on.

    Target i is token start + i + 1. Each of the tokens 1 ... n - 1 counts in exactly one window; from the second window
    on, each has at least block_size - stride tokens before it.
    """
    counted = 0  # targets so far: tokens 1 ... counted
    start = 0
    while counted < n - 1:
        stop = min(start + block_size, n - 1)
        yield start, stop, counted - start
        counted = stop
        start += stride


@torch.inference_mode()
def measure(model: TensorParallelGPT, tokens: Tensor, stride: int, batch_size: int, show: bool = False) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of tokens[1:] (nats, added up in float64) and their number."""
    every = list(windows(len(tokens), model.config.block_size, stride))
    total, count = 0.0, 0
    for i in tqdm(range(0, len(every), batch_size), desc="eval", unit="batch", disable=not show):
        idx, targets = fill(tokens, every[i : i + batch_size])
        counts = targets >= 0
        hidden = model.hidden(idx.to(model.device))[counts.to(model.device)]  # [n, C]: only what counts goes through the head
        total += summed_losses(model, hidden, targets[counts].to(model.device))
        count += int(counts.sum())
    return total, count


def fill(tokens: Tensor, batch: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64 of these windows; a target of -1 does not count. Padding is at the end of a row,
    where causal attention never looks back from."""
    width = max(stop - start for start, stop, _ in batch)
    idx = torch.zeros(len(batch), width, dtype=torch.int64)
    targets = torch.full((len(batch), width), -1, dtype=torch.int64)
    for row, (start, stop, first) in enumerate(batch):
        idx[row, : stop - start] = tokens[start:stop]
        targets[row, first : stop - start] = tokens[start + 1 + first : stop + 1]
    return idx, targets


def summed_losses(model: TensorParallelGPT, hidden: Tensor, targets: Tensor) -> float:
    """Sum of the losses of targets [n] after hidden states [n, C]. Logits exist for HEAD_ROWS of them at a time: those
    of a whole batch would be larger than the model."""
    losses = [
        vocab_parallel_cross_entropy(model.local_logits(x), y, model.vocab_lo, model.tp).double().sum()
        for x, y in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    ]
    return float(torch.stack(losses).sum())

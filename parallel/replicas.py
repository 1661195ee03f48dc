"""Do ranks hold the same replicas? Checksums of the bits, compared over an axis in one message. And
how replicas of a tp group stay the same when dp sums them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Axis, all_gather, broadcast
from parallel.parameters import local_part

AT_ONCE = 1 << 20  # words; each takes 16 bytes meanwhile
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(RuntimeError):
    """Ranks hold different values of one replica."""


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """An int64 [] of a tensor's bits and their places; it wraps around."""
    words = x.detach().contiguous().flatten().view(_WORDS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for first in range(0, len(words), AT_ONCE):
        some = words[first : first + AT_ONCE].to(torch.int64)
        # odd factors, so that the product loses no bit of a word
        places = torch.arange(2 * first + 1, 2 * (first + len(some)), 2, device=x.device)
        total += (some * places).sum()
    return total


@torch.no_grad()
def check_alike(tensors: Mapping[str, Tensor], axis: Axis, ranks: str, step: int) -> None:
    """DriftError, on all ranks of the axis, for the first tensor that differs between them. Every
    rank calls it with the same names: one all-gather of 8 bytes a tensor. ranks: "tp ranks"."""
    if axis.size == 1 or not tensors:
        return
    mine = torch.stack([checksum(tensor) for tensor in tensors.values()])
    sums = all_gather(mine, axis, "step").cpu()  # [ranks, tensors]
    different = (sums != sums[0]).T.nonzero().tolist()
    if not different:
        return
    i, other = different[0]
    name, tensor = list(tensors.items())[i]
    values = all_gather(tensor, axis, "step")
    if not values.is_floating_point():
        first, second = (f"{int(sums[rank, i]) % 2**32:08x}" for rank in (0, other))
        between = f"between {ranks} 0 ({first}) and {other} ({second})"
        advice = "Ranks of a tp group must see the same data"
        raise DriftError(f"{name} mismatch at step {step} {between}. {advice}.")
    most = (values[other].double() - values[0].double()).abs().max().item()
    where = f"differs between {ranks} 0 and {other} (max {most:.0e}) at step {step}"
    raise DriftError(f"replicated parameter {name} {where}.")


@torch.no_grad()
def make_alike(model: Any, dp: Axis, found: Mapping[str, Tensor] | None = None) -> None:
    """Give all tp ranks rank 0's sums over dp of the parameters that they share, in one broadcast.
    A sum of three or more numbers is rounded in an order that depends on its place in a message,
    and tp ranks have other messages. model: a TensorParallelGPT. found: the sums by name, those of
    all parameters; default: the gradients."""
    tp, rules = model.tp.at("optimizer"), model.split.rules
    if tp.size == 1 or dp.size <= 2:
        return
    if found is None:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tensors = [local_part(x)[0] for name, x in found.items() if rules[name].dim is None]
    whole = broadcast(torch.cat([tensor.flatten() for tensor in tensors]), tp, "step")
    for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))

"""Whether what is replicated is the same on all ranks: checksums of the bits, compared over an axis in one small message."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.collectives import Axis, all_gather

AT_ONCE = 1 << 20  # words, which take 16 bytes each meanwhile
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(RuntimeError):
    """Ranks hold different values of what should be one thing."""


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """A number, int64 [], of a tensor's bits and of where each stands; it wraps around."""
    words = x.detach().contiguous().flatten().view(_WORDS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for first in range(0, len(words), AT_ONCE):
        some = words[first : first + AT_ONCE].to(torch.int64)
        places = torch.arange(2 * first + 1, 2 * (first + len(some)), 2, device=x.device)
        total += (some * places).sum()  # places are odd: no bit of a word is lost in the product
    return total


@torch.no_grad()
def check_alike(tensors: Mapping[str, Tensor], axis: Axis, ranks: str, step: int) -> None:
    """DriftError, on all ranks of the axis, for the first of these that is not the same on them. One all-gather of 8 bytes a
    tensor; every rank of the axis calls this with the same names.

    ranks: what the message calls them: "tp ranks".
    """
    if axis.size == 1 or not tensors:
        return
    sums = all_gather(torch.stack([checksum(tensor) for tensor in tensors.values()]), axis, "step")  # [ranks, tensors]
    differs = (sums != sums[0]).cpu()
    if not differs.any():
        return
    name = list(tensors)[int(differs.any(dim=0).nonzero()[0])]
    other = int(differs[:, list(tensors).index(name)].nonzero()[0])
    values = all_gather(tensors[name], axis, "step")
    if not values.is_floating_point():
        found = [f"{int(total) % 2**32:08x}" for total in sums[:, list(tensors).index(name)][[0, other]]]
        raise DriftError(
            f"{name} mismatch at step {step} between {ranks} 0 ({found[0]}) and {other} ({found[1]}). Ranks of a tp group must "
            f"see the same data."
        )
    most = (values[other].double() - values[0].double()).abs().max().item()
    raise DriftError(f"replicated parameter {name} differs between {ranks} 0 and {other} (max {most:.0e}) at step {step}.")

"""The schedule of sync points: after which sub-blocks the ranks synchronise. No torch.

A sub-block is one attention or one MLP, named by its layer: 0a, 0m, 1a, 1m, ... Plain Megatron
synchronises after each of them, Sync-Point Drop (arXiv 2502.20727) only after a layer's MLP.
tp_model.py computes what lies between two sync points. With a delay (parallel/flight.py) the ranks'
outputs of every sub-block are summed, but the sum is waited for some sub-blocks later.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from base.errors import UserError, shown

SubBlock = tuple[int, str]  # (layer, "attention" or "mlp")
KINDS = ("attention", "mlp")
# the LayerNorm and the body of a sub-block, in nanoGPT's names
MODULES = {"attention": ("ln_1", "attn"), "mlp": ("ln_2", "mlp")}


def short_name(sub_block: SubBlock) -> str:
    return f"{sub_block[0]}{sub_block[1][0]}"


@dataclass(frozen=True)
class Schedule:
    """syncs: for each sub-block in order, True if the ranks synchronise after it. delay: the others
    are summed, too, but their sums join the stream this many sub-blocks later; 0: never."""

    syncs: tuple[bool, ...]
    delay: int = 0

    def __post_init__(self) -> None:
        if len(self.syncs) % 2 or not self.syncs or not self.syncs[-1]:
            raise ValueError(f"not two sub-blocks a layer, or no last sync point: {self.syncs}")

    @classmethod
    def plain(cls, n_layer: int) -> "Schedule":
        """Megatron's: a sync point after every sub-block."""
        return cls((True,) * (2 * n_layer))

    @classmethod
    def after(cls, numbers: Iterable[int], n_layer: int, delay: int = 0) -> "Schedule":
        """Sync points after the sub-blocks of these numbers (0a: 0, 0m: 1), and after the last."""
        chosen = {*numbers, 2 * n_layer - 1}
        syncs = tuple(i in chosen for i in range(2 * n_layer))
        return cls(syncs, 0 if all(syncs) else delay)

    @classmethod
    def parse(cls, text: str, n_layer: int) -> "Schedule":
        """all | mlp | every:K | a list such as 0a,0m,1m,3m | delay:D | delay:D+ and a list;
        UserError for any other text."""
        if text == "all":
            return cls.plain(n_layer)
        if found := re.fullmatch(r"delay:([0-9]{1,9})(?:\+(.*))?", text):
            if (delay := int(found[1])) >= 2 * n_layer:
                most = f"the model has {2 * n_layer} sub-blocks, a delay is less"
                raise UserError(f"--sync={text}: {most}.")
            waited = found[2].split(",") if found[2] is not None else []
            numbers = [_number(word.strip(), text, n_layer) for word in waited]
            return cls.after(numbers, n_layer, delay) if delay else cls.plain(n_layer)
        if text == "mlp":
            text = "every:1"
        if found := re.fullmatch(r"every:([0-9]{1,9})", text):
            if not 1 <= (k := int(found[1])) <= n_layer:
                layers = f"the model has {n_layer} layers, K is 1 to {n_layer}"
                raise UserError(f"--sync={text}: {layers}.")
            return cls.after(range(2 * k - 1, 2 * n_layer, 2 * k), n_layer)
        words = text.split(",")
        return cls.after((_number(word.strip(), text, n_layer) for word in words), n_layer)

    @property
    def is_plain(self) -> bool:
        return all(self.syncs)

    @property
    def sums(self) -> int:
        """All-reduces of a forward pass, without the embedding's."""
        return len(self.syncs) if self.delay else self.points

    def arrivals(self) -> list[int]:
        """Under a delay, for each sub-block the number of the one before which its sum joins."""
        ends = enumerate(self.syncs)
        return [i + 1 if sync else min(i + 1 + self.delay, len(self.syncs)) for i, sync in ends]

    @property
    def points(self) -> int:
        """Sync points of a forward pass. The embedding's does not count."""
        return sum(self.syncs)

    def walk(self) -> Iterator[tuple[int, str, bool, bool]]:
        """(layer, kind, start, sync) of each sub-block. start: the first after a sync point."""
        start = True
        for i, sync in enumerate(self.syncs):
            yield i // 2, KINDS[i % 2], start, sync
            start = sync

    def stretches(self) -> list[list[SubBlock]]:
        """The sub-blocks between two sync points. Each stretch ends with one that synchronises."""
        found: list[list[SubBlock]] = []
        for layer, kind, start, _ in self.walk():
            if start:
                found.append([])
            found[-1].append((layer, kind))
        return found

    def __str__(self) -> str:
        """The shortest text that `parse` accepts for this schedule."""
        n_layer = len(self.syncs) // 2
        if self.is_plain:
            return "all"
        names = ",".join(short_name(stretch[-1]) for stretch in self.stretches())
        if self.delay:  # the last one is always waited for
            waited = names.rpartition(",")[0]
            return f"delay:{self.delay}{'+' * bool(waited)}{waited}"
        k = self.syncs.index(True) // 2 + 1  # every:k has its first sync point there
        if self == Schedule.parse(f"every:{k}", n_layer):
            return "mlp" if k == 1 else f"every:{k}"
        return names


def _number(word: str, text: str, n_layer: int) -> int:
    option = f"--sync={text if len(text) <= 100 and text.isprintable() else shown(text)}"
    found = re.fullmatch(r"([0-9]{1,9})([am])", word)
    if not found:
        raise UserError(f"{option}: {shown(word)} is no sub-block. Use all, mlp, every:K, delay:D, "
                        "or a list such as 0a,0m,1m (layer, then a for attention or m for MLP).")
    if int(found[1]) >= n_layer:
        layers = f"{n_layer} layers (0 to {n_layer - 1})"
        raise UserError(f"{option}: there is no sub-block {word}, the model has {layers}.")
    return 2 * int(found[1]) + "am".index(found[2])

"""The schedule of sync points: after which sub-blocks the ranks of a tensor-parallel group agree again. No torch.

A sub-block is one attention or one MLP, named by its layer: 0a, 0m, 1a, 1m, ... Plain Megatron synchronises after every
one of them, Sync-Point Drop (arXiv 2502.20727) after a layer's MLP only. What happens in between is written in tp_model.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from base.errors import UserError, shown

SubBlock = tuple[int, str]  # (layer, "attention" or "mlp")
KINDS = ("attention", "mlp")


@dataclass(frozen=True)
class Schedule:
    """syncs: for each sub-block of the model, in order, whether the ranks synchronise after it; always after the last."""

    syncs: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.syncs) % 2 or not self.syncs or not self.syncs[-1]:
            raise ValueError(f"a schedule has two sub-blocks a layer, and the last one synchronises: {self.syncs}")

    @classmethod
    def plain(cls, n_layer: int) -> "Schedule":
        """Megatron's: a sync point after every sub-block."""
        return cls((True,) * (2 * n_layer))

    @classmethod
    def after(cls, sub_blocks: Iterable[int], n_layer: int) -> "Schedule":
        """A sync point after the sub-blocks of these numbers (2 layer + 1 for an MLP), and after the last."""
        chosen = {*sub_blocks, 2 * n_layer - 1}
        return cls(tuple(i in chosen for i in range(2 * n_layer)))

    @classmethod
    def parse(cls, text: str, n_layer: int) -> "Schedule":
        """all | mlp | every:K | a list such as 0a,0m,1m,3m; a UserError says what is wrong with any other."""
        if text == "all":
            return cls.plain(n_layer)
        if text == "mlp":
            text = "every:1"
        if found := re.fullmatch(r"every:([0-9]{1,9})", text):
            k = int(found[1])
            if not 1 <= k <= n_layer:
                raise UserError(f"--sync={text}: the model has {n_layer} layers, K is 1 to {n_layer}.")
            return cls.after(range(2 * k - 1, 2 * n_layer, 2 * k), n_layer)
        return cls.after([_number(word.strip(), text, n_layer) for word in text.split(",")], n_layer)

    @property
    def is_plain(self) -> bool:
        return all(self.syncs)

    @property
    def points(self) -> int:
        """Sync points of a forward pass, the embedding's not counted."""
        return sum(self.syncs)

    def runs(self) -> list[list[SubBlock]]:
        """The sub-blocks between two sync points, in order; each run ends with one that synchronises."""
        runs: list[list[SubBlock]] = [[]]
        for i, sync in enumerate(self.syncs):
            runs[-1].append((i // 2, KINDS[i % 2]))
            if sync:
                runs.append([])
        return runs[:-1]

    def __str__(self) -> str:
        """The shortest text that `parse` makes this schedule of."""
        n_layer = len(self.syncs) // 2
        if self.is_plain:
            return "all"
        k = self.syncs.index(True) // 2 + 1  # of the only every:K that has its first sync point there
        if self == Schedule.parse(f"every:{k}", n_layer):
            return "mlp" if k == 1 else f"every:{k}"
        return ",".join(f"{i // 2}{KINDS[i % 2][0]}" for i, sync in enumerate(self.syncs) if sync)


def _number(word: str, text: str, n_layer: int) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([am])", word)
    if not found:
        raise UserError(
            f"--sync={_short(text)}: {shown(word)} is no sub-block. Use all, mlp, every:K, or a list such as 0a,0m,1m "
            f"(layer, then a for attention or m for MLP)."
        )
    if int(found[1]) >= n_layer:
        fault = f"there is no sub-block {word}, the model has {n_layer} layers (0 to {n_layer - 1})"
        raise UserError(f"--sync={_short(text)}: {fault}.")
    return 2 * int(found[1]) + "am".index(found[2])


def _short(text: str) -> str:
    """The text as a message repeats it: a manifest may hold any."""
    return text if len(text) <= 100 and text.isprintable() else shown(text)

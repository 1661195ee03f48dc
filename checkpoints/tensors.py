"""What all sources of weights share: names that wrappers changed, checks of shapes and dtypes."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from base.errors import UserError, printable
from checkpoints.manifest import DTYPES, Sync
from model import GPTConfig
from plan.partition import Partition, Span

T = TypeVar("T")
CARRIED = "nanotp_tokenizer"  # tokenizer.json's content, among the settings of a merged checkpoint
# of a training checkpoint: its state, the directory of its optimizer's, and what that holds
STATE, OPTIMIZER, MOMENTS = "training.json", "optimizer", ("exp_avg", "exp_avg_sq")
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
# added by torch.compile, DDP, FSDP and activation checkpointing to the names of what they wrap
WRAPPERS = r"\b(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
# the causal mask, which older versions of nanoGPT and transformers save
MASK = r"transformer\.h\.(\d+)\.attn\.(?:bias|masked_bias)"


@dataclass
class Source:
    """Weights. Of this class itself: their description alone. description: for people. sync: the
    schedule of sync points that the weights were made for, None if for none in particular. dtype:
    of the stored weights. tokenizer: as tokenizer.json has it, None if it is not known; dataset:
    nanoGPT's hint for it. files: what tells them from others."""

    config: GPTConfig
    description: str
    sync: Sync | None = None
    dtype: torch.dtype = torch.float32
    tokenizer: dict[str, Any] | None = None
    dataset: str | None = None
    files: Sequence[Path] = ()

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        """Runs of a full tensor along `dim`, concatenated; all if dim is None. May be a view."""
        raise NotImplementedError


def by_plain_name(pairs: Iterable[tuple[str, T]], where: str) -> dict[str, T]:
    """The tensors under nanoGPT's names; GPT2Model saves without GPT2LMHeadModel's prefix."""
    found: dict[str, T] = {}
    for key, value in pairs:
        name = re.sub(WRAPPERS, "", key).removeprefix("transformer.")
        name = name if name.startswith("lm_head.") else "transformer." + name
        if name in found:
            twice = f"{printable(name)} stands there twice, with and without a prefix"
            raise UserError(f"{where}: tensor {twice}.")
        found[name] = value
    return found


def check_tensors(found: Mapping[str, object], expected: Mapping[str, object], where: str,
                  says: str, verb: str = "has shape") -> None:  # fmt: skip
    """UserError unless `found` has every tensor of `expected`, and as it is there."""
    for name, needed in expected.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing: {says} {needed}.")
        if found[name] != needed:
            raise UserError(f"{where}: tensor {name} {verb} {found[name]}, {says} {needed}.")


def check_weights(found: Mapping[str, tuple[Sequence[int] | None, Any]], config: GPTConfig,
                  where: str, says: str, read: Callable[[str], Tensor],
                  files: Mapping[str, Path] | None = None) -> torch.dtype:  # fmt: skip
    """The dtype that holds the values of all tensors, given (shape, dtype) of each; (None, None)
    for what is no tensor. UserError unless they are those of the model: one left out would make it
    another model. Causal masks may be there as well. read: gives a whole tensor. files: of each,
    for the message about its shape."""
    shapes = Partition.of(config, 1).shapes()
    tied = HEAD in found and HEAD not in shapes
    if tied:
        shapes[HEAD] = shapes[TABLE]
    for name, shape in shapes.items():
        here = found.get(name, (None, None))[0]
        place = str((files or {}).get(name, where))
        check_tensors({name: here} if here is not None else {}, {name: list(shape)}, place, says)
    extra = sorted(n for n in found if n not in shapes and not _is_mask(n, found[n][0], config))
    if extra:
        others = f", nor have {len(extra) - 1} others" if extra[1:] else ""
        fault = f"has no place in the GPT-2 that is described there{others}"
        how = "Left out, it would be another model: merge it into the weights, or save them without"
        raise UserError(f"{where}: tensor {printable(extra[0])} {fault}. {how} it.")
    for name in shapes:
        if found[name][1] not in DTYPES.values():
            fault = f"is {found[name][1]}; {', '.join(DTYPES)} are read"
            raise UserError(f"{where}: tensor {name} {fault}.")
    if tied:  # then head and table are one
        head, table = read(HEAD), read(TABLE)
        same = head.dtype == table.dtype and torch.equal(head, table)
        if head.data_ptr() != table.data_ptr() and not same:
            only = "only a head tied to the embedding is supported"
            raise UserError(f"{where}: {HEAD} differs from wte.weight; {only}.")
    return functools.reduce(torch.promote_types, (found[name][1] for name in shapes))


def _is_mask(name: str, shape: Sequence[int] | None, config: GPTConfig) -> bool:
    layer = re.fullmatch(MASK, name)
    if layer is None or shape is None or int(layer[1]) >= config.n_layer:
        return False
    return len(shape) in (0, 4) and set(shape[:2]) <= {1}

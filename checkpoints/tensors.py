"""What other programs' files have in common: names that wrappers changed, tensors that the model
has no place for, a stored head."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from base.errors import UserError, printable
from checkpoints.shards import DTYPES
from text.tokenizer import GPT2Tokenizer

Held = TypeVar("Held")
CARRIED = "nanotp_tokenizer"  # tokenizer.json's content, among the settings of a merged checkpoint
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
# what torch.compile, DDP, FSDP and activation checkpointing put into the names of what they wrap
WRAPPERS = r"\b(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
# the causal mask, which older versions of nanoGPT and transformers save
MASK = r"transformer\.h\.(\d+)\.attn\.(?:bias|masked_bias)"


def by_plain_name(pairs: Iterable[tuple[str, Held]], where: str) -> dict[str, Held]:
    """The tensors under nanoGPT's names. transformers' GPT2Model saves without the prefix that
    GPT2LMHeadModel saves with."""
    found: dict[str, Held] = {}
    for key, value in pairs:
        name = re.sub(WRAPPERS, "", key).removeprefix("transformer.")
        name = name if name.startswith("lm_head.") else "transformer." + name
        if name in found:
            raise UserError(
                f"{where}: tensor {printable(name)} stands there twice, with and without a prefix."
            )
        found[name] = value
    return found


def check_all_used(
    names: Iterable[str],
    shapes: Mapping[str, Any],
    n_layer: int,
    shape_of: Callable[[str], tuple[int, ...]],
    where: str,
) -> None:
    """UserError where a tensor has no place in the model, whose text would then be that of another.
    Masks are known."""

    def is_mask(name: str) -> bool:
        layer = re.fullmatch(MASK, name)
        return bool(
            layer
            and int(layer[1]) < n_layer
            and len(shape := shape_of(name)) in (0, 4)
            and set(shape[:2]) <= {1}
        )

    extra = sorted(name for name in names if name not in shapes and not is_mask(name))
    if extra:
        others = f", nor have {len(extra) - 1} others" if extra[1:] else ""
        raise UserError(
            f"{where}: tensor {printable(extra[0])} has no place in the GPT-2 that is described there"
            f"{others}. Left out, it would be another model: merge it into the weights, or save them "
            "without it."
        )


def tokenizer_for(
    vocab_size: int, settings: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The tokenizer that a merged checkpoint carries in its settings; else what a vocabulary's size
    alone tells."""
    size_tells = {"kind": "gpt2"} if vocab_size >= GPT2Tokenizer.n_vocab else None
    return (settings or {}).get(CARRIED, size_tells)


def common_dtype(tensors: Mapping[str, torch.dtype], where: str) -> torch.dtype:
    """The dtype that holds the values of all tensors; UserError naming one whose dtype is not read."""
    for name, dtype in tensors.items():
        if dtype not in DTYPES.values():
            raise UserError(f"{where}: tensor {name} is {dtype}; {', '.join(DTYPES)} are read.")
    return functools.reduce(torch.promote_types, tensors.values())


def check_tied(head: Tensor, table: Tensor, where: str) -> None:
    """UserError where a stored lm_head.weight is not the embedding table: here they are one."""
    same = head.data_ptr() == table.data_ptr() or head.dtype == table.dtype and torch.equal(head, table)
    if not same:
        raise UserError(f"{where}: lm_head.weight differs from wte.weight; only a head tied to the embedding is supported.")

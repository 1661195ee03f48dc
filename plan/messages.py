"""The messages of a step on the tp axis: where the residual stream is communicated. No torch."""

from collections.abc import Iterator
from typing import NamedTuple

from plan.partition import Partition
from plan.schedule import MODULES, Schedule


class Exchange(NamedTuple):
    """The collectives of one place in the forward and in the backward pass."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


# (where a column-parallel layer starts, where a row-parallel layer ends): the paper's f and g
MEGATRON = Exchange((), ("all_reduce",)), Exchange(("all_reduce",), ())
# the backward pass gathers a column-parallel layer's input again, for the gradient of its weight
SEQUENCE = (
    Exchange(("all_gather",), ("reduce_scatter", "all_gather")),
    Exchange(("reduce_scatter",), ("all_gather",)),
)


def exchanges(schedule: Schedule, sequence: bool) -> Iterator[tuple[str, Exchange]]:
    """(block, exchange) of a pass: "embedding", the sub-blocks ("attention", "mlp") and "head".

    Each message is the whole stream, B x T x n_embd numbers. A stretch of the schedule has one f,
    where it starts, and one g, where it ends; under a delay every sub-block has both. sequence: the
    stream is split over the sequence.
    """
    f, g = SEQUENCE if sequence else MEGATRON
    yield "embedding", g
    for _, kind, start, sync in schedule.walk():
        if start or schedule.delay:
            yield kind, f
        if sync or schedule.delay:
            yield kind, g
    yield "head", Exchange(f.forward, f.backward[:1])  # the head's input is kept


def partial_gradients(split: Partition, schedule: Schedule, sequence: bool) -> list[str]:
    """The replicated parameters whose gradients must be summed over tp, once a step.

    With the stream split over the sequence these are all of them: a rank sees its own tokens only.
    Else they are the LayerNorms in a stretch of several sub-blocks, and the biases (of c_proj) that
    are added before its end. Under a delay these are all of a layer's.
    """
    if sequence:
        return [name for name, rule in split.rules.items() if rule.dim is None]
    found = []
    for layer, kind, start, sync in schedule.walk():
        norm, body = MODULES[kind]
        if schedule.delay or not (start and sync):
            found += [f"{layer}.{norm}.weight", f"{layer}.{norm}.bias"]
        if schedule.delay or not sync:
            found.append(f"{layer}.{body}.c_proj.bias")
    return [f"transformer.h.{name}" for name in found if split.bias or name.endswith("weight")]

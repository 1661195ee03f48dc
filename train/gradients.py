"""A model's gradients after an iteration's last backward pass: parts summed, and their norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from parallel.collectives import Axis, all_reduce
from parallel.parameters import local_part
from plan import messages
from tp_model import TensorParallelGPT


def partial_gradients(model: TensorParallelGPT) -> list[nn.Parameter]:
    """The replicated parameters of whose gradient each rank has only a part."""
    names = messages.partial_gradients(model.split, model.schedule, model.sequence_parallel)
    return [model.get_parameter(name) for name in names if model.stages.holds(name)]


def sum_partial_gradients(model: TensorParallelGPT) -> None:
    """One all-reduce, or none if there are no partial gradients, as in plain Megatron."""
    sum_gradients(partial_gradients(model), model.tp.at("optimizer"))


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Sum the gradients of these parameters over the axis, in place, in one all-reduce."""
    gradients = [local_part(p.grad)[0] for p in parameters if p.grad is not None]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        sums = all_reduce(flat, axis, "step").split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))


@torch.no_grad()
def grad_norm(model: TensorParallelGPT, pp: Axis | None = None) -> Tensor:
    """The 2-norm of the full model's gradient, float32, equal on all ranks.

    One all-reduce adds the squares of tp-split parameters, one over dp those of sharded ones, and
    one over pp those of the stages. Replicated gradients are the same on every rank and count once,
    as does the table that two stages hold; padding rows have none.
    """
    rules, squares, stages = model.split.rules, [], model.stages
    for replicated in (True, False):
        found = [local_part(p.grad)[0] for name, p in model.named_parameters()
                 if p.grad is not None and (rules[name].dim is None) == replicated
                 and stages.owner(name) == stages.rank]
        norms = torch._foreach_norm(found, dtype=torch.float32) if found else ()
        zero = torch.zeros((), device=model.device)
        squares.append(torch.stack([zero, *norms]).square().sum())
    square = squares[0] + all_reduce(squares[1], model.tp.at("optimizer"), "step")
    if model.parts.dp:
        square = all_reduce(square, model.parts.dp.at("optimizer"), "step")
    if pp:
        square = all_reduce(square, pp.at("optimizer"), "step")
    return square.sqrt()

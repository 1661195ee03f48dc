"""Local steps: each group of dp ranks takes steps of AdamW of its own, then all average what they
changed.

    outer gradient = parameters at the last averaging - parameters now, the mean over dp
    parameters = those at the last averaging, after a step of an outer SGD with Nesterov momentum

This is DiLoCo (arXiv 2311.08105). With an outer learning rate of 1 and no momentum it averages
parameters. A group is one dp rank, or several that do plain or sharded data parallelism among
themselves. Between two averagings nothing travels from group to group.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from checkpoints.manifest import DTYPES
from checkpoints.sources import reader
from cli.options import TrainOptions
from parallel.collectives import Axis, all_gather, all_reduce
from parallel.parameters import local_part
from parallel.replicas import make_alike
from plan.memory import MESSAGE
from tp_model import TensorParallelGPT
from train.checkpoint import MOMENTUM, OUTER, checked
from world.mesh import LATER_S, World, new_axis


def group_size(options: TrainOptions, dp: int) -> int:
    """How many of dp ranks are a group. UserError if the other options do not go with local steps.
    """
    every, groups = options.dp_every, options.dp_groups or dp
    if options.dp_groups and not every:
        raise UserError(f"--dp_groups={groups} needs --dp_every=H: without it there are no groups.")
    if dp % groups:
        raise UserError(f"--dp_groups={groups} does not divide dp={dp}.")
    if every and options.dp_shard and dp > 1 and dp == groups:
        both = f"--dp_every={every} together with --dp_shard=True needs groups of several dp ranks"
        raise UserError(f"{both}: use --dp_groups=N, with N less than dp={dp}.")
    return dp // groups if every else dp


def dp_axes(world: World, options: TrainOptions) -> tuple[Axis, Axis]:
    """The axis of dp ranks in a group, and that of ranks in the same place of all groups. All ranks
    call this."""
    dp, alone = world.dp.size, Axis("dp", ledger=world.ledger)
    own = group_size(options, dp)
    if own in (1, dp):
        return (world.dp, alone) if own == dp else (alone, world.dp)
    ranks = torch.arange(world.size).view(dp // own, own, -1)
    lines = (ranks.movedim(dim, 2).reshape(-1, ranks.shape[dim]).tolist() for dim in (1, 0))
    near, far = (new_axis(world, "dp", each, options.comm_timeout + LATER_S) for each in lines)
    return near or alone, far or alone  # each is there


def sharded_like(tensor: Any, part: Tensor) -> Tensor:
    """This rank's part of a tensor as such a tensor: a DTensor if it is sharded over dp."""
    if not hasattr(tensor, "to_local"):
        return part
    how = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
    made: Tensor = type(tensor).from_local(part, tensor.device_mesh, tensor.placements, **how)
    return made


class LocalSteps:
    """The outer optimizer, of this rank's part of the parameters. All groups hold the same state.

    dp: the axis over the groups. before: the parameters at the last averaging, one after the other,
    [n]. momentum: of the outer gradient, [n], or [0] if there is none. messages: `before` as it is
    sent, in views of it.
    """

    def __init__(self, model: TensorParallelGPT, dp: Axis, options: TrainOptions):
        self.model, self.dp = model, dp.at("data_parallel")
        self.dtype = DTYPES[options.dp_reduce_dtype]
        self.before = self._now()
        self.momentum = torch.zeros_like(self.before[: None if options.outer_momentum else 0])
        self.messages = self.before.split(MESSAGE)
        self.optimizer = torch.optim.SGD(
            self.messages, options.outer_lr, options.outer_momentum,
            nesterov=options.outer_momentum > 0,
        )  # fmt: skip
        for part, momentum in zip(self.messages, self.momentum.split(MESSAGE), strict=False):
            self.optimizer.state[part]["momentum_buffer"] = momentum

    @property
    def _parts(self) -> dict[str, Tensor]:
        """Of each parameter what this rank holds."""
        return {name: local_part(p)[0] for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def _now(self) -> Tensor:
        return torch.cat([p.flatten() for p in self._parts.values()])

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of such a tensor, in the part's shape."""
        parts = flat.split([p.numel() for p in self._parts.values()])
        pairs = zip(self._parts.items(), parts, strict=True)
        return {name: part.view_as(p) for (name, p), part in pairs}

    @property
    def outer(self) -> dict[str, Tensor]:
        """The momentum of each parameter, for checkpoints; sharded if the parameter is."""
        if not len(self.momentum):
            return {}
        parameters, views = dict(self.model.named_parameters()), self._views(self.momentum)
        return {name: sharded_like(parameters[name], view) for name, view in views.items()}

    def load(self, model: TensorParallelGPT, path: Path, world: World) -> None:
        """Read the momentum, which stays 0 if the checkpoint has none."""
        if self.outer and (path / OUTER).is_dir():
            stored = checked(path, OUTER, (MOMENTUM,), world)
            read = reader(stored, model.tp.rank, model.config.block_size)
            for name, value in self.outer.items():
                model.parts.store(name, value, read(MOMENTUM + name, model.split.rules[name]))

    @torch.no_grad()
    def average(self) -> None:
        """One all-reduce for each 2^23 numbers. The parameters are then equal in all groups."""
        changes = self._now()
        for part, change in zip(self.messages, changes.split(MESSAGE), strict=True):
            torch.sub(part, change, out=change)
            change.copy_(all_reduce(change.to(self.dtype), self.dp, "step"))
            part.grad = change.div_(self.dp.size)
        make_alike(self.model, self.dp, self._views(changes))
        self.optimizer.step()
        self.optimizer.zero_grad()
        parts = self._parts
        for name, value in self._views(self.before).items():
            parts[name].copy_(value)

    def agree(self, numbers: Sequence[Sequence[float]]) -> list[list[float]]:
        """numbers: (loss, gradient norm, *answers) of each iteration since the last averaging.
        Returns the means of the first two over dp, and the largest answers. One all-gather."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.before.device)
        groups = all_gather(mine, self.dp, "step")  # [dp, iterations, numbers]
        return torch.cat([groups.mean(0)[:, :2], groups.amax(0)[:, 2:]], dim=1).tolist()

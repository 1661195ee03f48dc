"""Local steps: each dp group takes steps of AdamW of its own, then all average what they changed.

    outer gradient = parameters at the last averaging - parameters now, the mean over dp
    parameters = those at the last averaging, after a step of an outer SGD with Nesterov momentum

This is DiLoCo (arXiv 2311.08105). With an outer learning rate of 1 and no momentum it averages
parameters. Between two averagings nothing travels over dp.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError
from checkpoints.manifest import DTYPES
from checkpoints.sources import reader
from cli.options import TrainOptions
from parallel.collectives import Axis, all_gather, all_reduce
from parallel.replicas import make_alike
from plan.memory import MESSAGE
from tp_model import TensorParallelGPT
from train.checkpoint import MOMENTUM, OUTER, checked
from world.mesh import World


def check_local_steps(options: TrainOptions) -> None:
    """UserError if the other options do not go with local steps."""
    if options.dp_every and options.dp_shard:
        why = "which needs the same parameters on all dp ranks after every iteration"
        both = f"--dp_every={options.dp_every} together with --dp_shard=True, {why}"
        raise UserError(f"{both}: use one of them.")


class LocalSteps:
    """The outer optimizer, of this rank's parameters. All dp ranks hold the same state.

    before: the parameters at the last averaging, one after the other, [n]. momentum: of the outer
    gradient, [n], or [0] if there is none. messages: `before` as it is sent, in views of it.
    """

    def __init__(self, model: TensorParallelGPT, dp: Axis, options: TrainOptions):
        self.model, self.dp = model, dp.at("data_parallel")
        self.dtype = DTYPES[options.dp_reduce_dtype]
        self.parameters = dict(model.named_parameters())
        self.before = self._now()
        self.momentum = torch.zeros_like(self.before[: None if options.outer_momentum else 0])
        self.messages = self.before.split(MESSAGE)
        self.optimizer = torch.optim.SGD(
            self.messages, options.outer_lr, options.outer_momentum,
            nesterov=options.outer_momentum > 0,
        )  # fmt: skip
        for part, momentum in zip(self.messages, self.momentum.split(MESSAGE), strict=False):
            self.optimizer.state[part]["momentum_buffer"] = momentum

    @torch.no_grad()
    def _now(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.parameters.values()])

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of such a tensor, in the parameter's shape."""
        parts = flat.split([p.numel() for p in self.parameters.values()])
        pairs = zip(self.parameters.items(), parts, strict=True)
        return {name: part.view_as(p) for (name, p), part in pairs}

    @property
    def outer(self) -> dict[str, Tensor]:
        """The momentum of each parameter, for checkpoints."""
        return self._views(self.momentum) if len(self.momentum) else {}

    def load(self, model: TensorParallelGPT, path: Path, world: World) -> None:
        """Read the momentum, which stays 0 if the checkpoint has none."""
        if self.outer and (path / OUTER).is_dir():
            stored = checked(path, OUTER, (MOMENTUM,), world)
            read = reader(stored, model.tp.rank, model.config.block_size)
            for name, value in self.outer.items():
                model.parts.store(name, value, read(MOMENTUM + name, model.split.rules[name]))

    @torch.no_grad()
    def average(self) -> None:
        """One all-reduce for each 2^23 numbers. The parameters are then equal on all dp ranks."""
        changes = self._now()
        for part, change in zip(self.messages, changes.split(MESSAGE), strict=True):
            torch.sub(part, change, out=change)
            change.copy_(all_reduce(change.to(self.dtype), self.dp, "step"))
            part.grad = change.div_(self.dp.size)
        make_alike(self.model, self.dp, self._views(changes))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in self._views(self.before).items():
            self.parameters[name].copy_(value)

    def agree(self, numbers: Sequence[Sequence[float]]) -> list[list[float]]:
        """numbers: (loss, gradient norm, *answers) of each iteration since the last averaging.
        Returns the means of the first two over dp, and the largest answers. One all-gather."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.before.device)
        groups = all_gather(mine, self.dp, "step")  # [dp, iterations, numbers]
        return torch.cat([groups.mean(0)[:, :2], groups.amax(0)[:, 2:]], dim=1).tolist()

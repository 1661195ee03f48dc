"""Data parallelism over the dp axis, PyTorch's own: replicas whose gradients are averaged
(DistributedDataParallel), or parameters, gradients and optimizer state sharded over dp (FSDP2).
All their messages are in the ledger."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from parallel.collectives import Axis, average_later, gather_into, scatter_into, torch_group


def replicate(model: nn.Module, dp: Axis, reduce_dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, whose gradients each backward pass outside `no_sync` averages over dp.

    All ranks have loaded or drawn the same weights: nothing is broadcast at the start.
    reduce_dtype: in which gradients travel and are added.
    """
    if dp.size == 1:
        return model
    ddp = DistributedDataParallel(
        model, process_group=torch_group(dp), gradient_as_bucket_view=True, init_sync=False
    )
    ddp.register_comm_hook((dp.at("data_parallel"), reduce_dtype), _average)
    return ddp


def _average(how: tuple[Axis, torch.dtype], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP calls it with a bucket of finished gradients while the backward pass goes on."""
    dp, dtype = how
    return average_later(bucket.buffer(), dp, "backward", dtype)


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 splits a model's parameters over dp: along dimension 0 as torch.chunk does, so the
    last ranks may have less, or nothing. While it computes a block a rank has all of that block.

    It splits this tp rank's own tensors and knows nothing of tp. reduce_dtype: as in `replicate`.
    """

    dp: Axis
    device: torch.device
    reduce_dtype: torch.dtype = torch.float32

    def apply(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Make each block's parameters, and those outside the blocks, DTensors sharded over dp."""
        mesh = DeviceMesh.from_group(torch_group(self.dp), self.device.type)
        policy = MixedPrecisionPolicy(reduce_dtype=self.reduce_dtype)
        here = self.dp.at("data_parallel")
        for module in (*blocks, model):
            sharded: Any = fully_shard(module, mesh=mesh, mp_policy=policy)
            sharded.set_custom_all_gather(AllGather(here))
            sharded.set_custom_reduce_scatter(ReduceScatter(here))


@dataclass(frozen=True)
class _Message:
    """A message of FSDP2, which asks for its memory first."""

    dp: Axis

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Message):
    """All of a block's parameters, from every rank's part."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        return gather_into(output_tensor, input_tensor, self.dp, "forward", async_op)


class ReduceScatter(_Message):
    """This rank's part of the sum or mean of a block's gradients."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any) -> None:
        scatter_into(output_tensor, input_tensor, op, self.dp, "backward")


def last_only(model: nn.Module, last: bool) -> Any:
    """The model. last: its next backward pass sends gradients, as the last micro-batch's does."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
    return model


def rest(model: nn.Module) -> None:
    """After a forward pass without a backward pass: free what FSDP2 has gathered for the latter."""
    if isinstance(model, FSDPModule):
        model.reshard()

"""Data parallelism on the dp axis, PyTorch's own: replicas whose gradients are averaged (DistributedDataParallel), or
parameters, gradients and optimizer state sharded over dp (FSDP2). Each of their messages is told to the ledger."""

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

# --- replicas -------------------------------------------------------------------------------------------------------


def replicate(model: nn.Module, dp: Axis, reduce_dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with its gradients averaged over dp in each backward pass that is not under `no_sync`.

    Every rank has loaded or drawn the same weights, so nothing is broadcast at the start. reduce_dtype: what gradients travel
    in, and are added in.
    """
    if dp.size == 1:
        return model
    # there are no buffers to be kept alike
    ddp = DistributedDataParallel(model, process_group=torch_group(dp), gradient_as_bucket_view=True, init_sync=False)
    ddp.register_comm_hook((dp.at("data_parallel"), reduce_dtype), _average)
    return ddp


def _average(how: tuple[Axis, torch.dtype], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP calls with a bucket of gradients that are ready, while the backward pass goes on."""
    dp, dtype = how
    return average_later(bucket.buffer(), dp, "backward", dtype)


# --- shards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 deals a model's parameters over dp. A rank holds of each a part along dimension 0, as torch.chunk cuts it (the
    last ranks may have less, or nothing), and all of a block's while it computes the block.

    The tp axis is none of its business: what it deals are this tp rank's own tensors. reduce_dtype: what gradients travel in.
    """

    dp: Axis
    device: torch.device
    reduce_dtype: torch.dtype = torch.float32

    def apply(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Make the parameters of each block, and those of the model that are in none, DTensors that are sharded over dp."""
        mesh = DeviceMesh.from_group(torch_group(self.dp), self.device.type)
        policy = MixedPrecisionPolicy(reduce_dtype=self.reduce_dtype)
        here = self.dp.at("data_parallel")
        for module in (*blocks, model):
            sharded: Any = fully_shard(module, mesh=mesh, mp_policy=policy)
            sharded.set_custom_all_gather(Gathered(here))
            sharded.set_custom_reduce_scatter(Scattered(here))


@dataclass(frozen=True)
class _Message:
    """FSDP2's message: it asks for the memory, then for the call."""

    dp: Axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gathered(_Message):
    """All of a block's parameters from every rank's part."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return gather_into(output_tensor, input_tensor, self.dp, "forward", async_op)


class Scattered(_Message):
    """A rank's part of the sum, or of the mean, of a block's gradients."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        return scatter_into(output_tensor, input_tensor, op, self.dp, "backward", async_op)


# --- both -----------------------------------------------------------------------------------------------------------


def last_only(model: nn.Module, last: bool) -> Any:
    """Whether this backward pass's gradients travel: with accumulation only those of the last micro-batch do."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
    return model


def rest(model: nn.Module) -> None:
    """After a forward pass without a backward one: let go of what FSDP2 has gathered and keeps for the latter."""
    if isinstance(model, FSDPModule):
        model.reshard()

"""Data parallelism over the dp axis, PyTorch's own: replicas whose gradients are averaged
(DistributedDataParallel), or parameters, gradients and optimizer state sharded over dp (FSDP2).
All their messages are in the ledger."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from parallel.collectives import Axis, average_later, gather_into, scatter_into, torch_group


def replicate(model: nn.Module, dp: Axis, reduce_dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, whose gradients each backward pass outside `no_sync` averages over dp. All ranks
    have the same weights. reduce_dtype: in which gradients travel and are added."""
    if dp.size == 1:
        return model
    ddp = DistributedDataParallel(model, process_group=torch_group(dp),
                                  gradient_as_bucket_view=True, init_sync=False)
    here = dp.at("data_parallel")
    ddp.register_comm_hook(  # called with finished gradients while the backward pass goes on
        None, lambda _, bucket: average_later(bucket.buffer(), here, "backward", reduce_dtype)
    )
    return ddp


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 splits a model's parameters over dp: along dimension 0 as torch.chunk does, so the
    last ranks may have less, or nothing. While it computes a block a rank has all of that block. It
    splits this tp rank's own tensors and knows nothing of tp. reduce_dtype: as in `replicate`."""

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
            sharded.set_custom_all_gather(_Message(gather_into, here))
            sharded.set_custom_reduce_scatter(_Message(scatter_into, here))


@dataclass(frozen=True)
class _Message:
    """A message of FSDP2, which asks for its memory first: all of a block's parameters from every
    rank's part (send is `gather_into`), or this rank's part of the sum or mean of their gradients
    (`scatter_into`)."""

    send: Any
    dp: Axis

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **how: Any) -> Any:
        return self.send(output_tensor, input_tensor, self.dp, *how.values())


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

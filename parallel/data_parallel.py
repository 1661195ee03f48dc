"""Data parallelism on the dp axis: PyTorch's DistributedDataParallel, with each of its messages told to the ledger."""

from typing import Any

import torch
from torch import nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from parallel.collectives import Axis, GroupTransport, average_later


def replicate(model: nn.Module, dp: Axis) -> nn.Module:
    """The model with its gradients averaged over dp in each backward pass that is not under `no_sync`.

    Every rank has loaded or drawn the same weights, so nothing is broadcast at the start.
    """
    if dp.size == 1:
        return model
    if not isinstance(dp.transport, GroupTransport):
        raise ValueError("data parallelism needs a torch.distributed group")
    ddp = DistributedDataParallel(
        model, process_group=dp.transport.group, gradient_as_bucket_view=True, broadcast_buffers=False, init_sync=False
    )
    ddp.register_comm_hook(dp.at("data_parallel"), _average)
    return ddp


def _average(dp: Axis, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP calls with a bucket of gradients that are ready, while the backward pass goes on."""
    return average_later(bucket.buffer(), dp, "backward")


def last_only(model: nn.Module, last: bool) -> Any:
    """Whether this backward pass's gradients travel: with accumulation only those of the last micro-batch do."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    return model

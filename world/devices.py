"""Where a rank computes: its device, precision, transport and threads."""

import importlib.util
import os
import shutil
import sys
import warnings
from typing import Any

import torch

from base.errors import UserError
from world.launch import Launch


def pick_device(device: str, launch: Launch) -> torch.device:
    """The device of this rank. auto is a GPU where there is one, else the CPU. Several ranks take the
    GPUs that they see in turn: whether two of them have the same one, the roll call finds out."""
    try:
        kind = torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        raise UserError(f"--device={device} is not a device. Use auto, cpu, cuda or cuda:N.") from None
    if kind.type == "mps" and launch.size > 1:
        raise UserError(
            "--device=mps runs one rank only: it has no collectives. Use --device=cpu for several ranks."
        )
    if device != "auto" and kind.type != "cuda":
        return kind
    count, why = _gpus()
    if device == "auto" and not count:
        if why and launch.rank == 0:
            print(f"no GPU is used: {why}", file=sys.stderr)
        return kind
    if not count:
        raise UserError(f"--device={device}, but {why or 'torch sees no CUDA device'}. Use --device=cpu.")
    if kind.index is not None and launch.size > 1:
        raise UserError(
            f"--device={device} is one GPU and there are {launch.size} ranks. Use --device=cuda, and "
            f"CUDA_VISIBLE_DEVICES to choose GPUs."
        )
    if kind.index is not None and kind.index >= count:
        raise UserError(f"--device={device}, but this host has {count} CUDA devices.")
    index = launch.local_rank % count if kind.index is None else kind.index
    return torch.device("cuda", index)


def _gpus() -> tuple[int, str]:
    """(how many GPUs this process can use, why none where there is a driver that does not work)."""
    with warnings.catch_warnings(record=True) as said:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    texts = [str(warning.message).strip() for warning in said if "CUDA" in str(warning.message)]
    return count, texts[0].partition(". ")[0].splitlines()[0].rstrip(".") if texts else ""


def gpu_name(device: torch.device) -> str:
    """What tells a GPU from every other, whatever number a rank has for it; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def share_gpus(stated: list[dict[str, Any]], oversubscribe: bool) -> bool:
    """Whether ranks share a GPU, by what each has stated. UserError where they may not."""
    owner: dict[str, int] = {}
    for rank, mine in enumerate(stated):
        other = owner.setdefault(mine["gpu"], rank) if mine["gpu"] else rank
        if other != rank and not oversubscribe:
            here = [said["gpu"] for said in stated if said["host"] == mine["host"]]
            count = len(set(here))
            raise UserError(
                f"{len(here)} processes on host {mine['host']} but {count} CUDA devices: ranks {other} and "
                f"{rank} have the same one. Start {count}, pass --device=cpu, or share a device with "
                f"--oversubscribe=True."
            )
    return 0 < len(owner) < sum(1 for mine in stated if mine["gpu"])


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of a run: auto is bfloat16 on a GPU that has it, else float32 (never float16 by
    surprise). UserError for bfloat16 on a GPU that only emulates it."""
    has = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--dtype=bfloat16: {name} has none. Use --dtype=float16 or --dtype=float32.")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and has else "float32"
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return kinds[dtype]


def pick_comm(comm: str, device: torch.device, launch: Launch, tp: int, shared: bool = False) -> str:
    """The transport: nccl where every rank has a GPU of its own, shm between CPU ranks where no tp
    group leaves its host, else gloo. shared: two ranks have one GPU."""
    if comm == "auto":
        comm = "gloo"
        if device.type == "cuda" and not shared:
            comm = "nccl"
        elif device.type == "cpu" and tp > 1 and launch.local_size % tp == 0:
            comm = "shm"
    if comm == "shm" and device.type != "cpu":
        kind = device.type
        raise UserError(f"--comm=shm is for ranks on CPU cores, the device is {kind}. Use --comm=auto.")
    if comm == "shm" and launch.local_size % tp:
        raise UserError(
            f"--comm=shm: hosts of {launch.local_size} ranks do not hold whole groups of tp={tp}. "
            f"Use --comm=gloo."
        )
    if comm == "nccl" and device.type != "cuda":
        raise UserError(f"--comm=nccl needs GPUs, the device is {device.type}. Use --comm=gloo.")
    if comm == "nccl" and shared:
        raise UserError("--comm=nccl cannot share a GPU between ranks. Use --comm=gloo.")
    if comm == "shm" and tp == 1:
        comm = "gloo"  # the dp axis is torch's own
    return comm if launch.size > 1 else "none"


def set_threads(threads: int, device: torch.device, launch: Launch) -> None:
    """CPU threads of this rank: its share of the cores it may use, unless told otherwise."""
    if not threads and device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        threads = max(1, cores // launch.local_size)
    if threads:
        torch.set_num_threads(threads)


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile has nothing to compile with: a C++ compiler for a CPU; Triton and a C compiler
    (for what starts its kernels) for a GPU."""
    gpu = device.type == "cuda"
    given = os.environ.get("CC" if gpu else "CXX")
    usual = ("gcc", "clang") if gpu else ("clang++" if sys.platform == "darwin" else "g++",)
    names = (given,) if given else usual
    missing = "" if any(map(shutil.which, names)) else f"a compiler ({' or '.join(names)})"
    if gpu and importlib.util.find_spec("triton") is None:
        missing = "the package triton"
    if missing:
        raise UserError(f"--compile=True needs {missing}, which is not here. Install it, or leave --compile out.")

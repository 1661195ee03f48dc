"""Where and how a rank computes: device, precision, transport, threads."""

import importlib.util
import os
import shutil
import sys
import warnings
from typing import Any

import torch

from base.errors import UserError, print_error
from checkpoints.manifest import DTYPES
from plan.link import Link
from world.launch import Launch


def pick_device(device: str, launch: Launch) -> torch.device:
    """The device of this rank. auto: a GPU if there is one, else the CPU. Ranks of a host take the
    GPUs they see in turn; `share_gpus` finds out if two have the same."""
    try:
        found = torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        fault = f"--device={device} is not a device. Use auto, cpu, cuda or cuda:N."
        raise UserError(fault) from None
    if found.type == "mps" and launch.size > 1:
        fault = "runs one rank only: it has no collectives. Use --device=cpu for several ranks."
        raise UserError(f"--device=mps {fault}")
    if device != "auto" and found.type != "cuda":
        return found
    count, why = _count_gpus()
    if device == "auto" and not count:
        if why and launch.rank == 0:
            print_error(f"no GPU is used: {why}")
        return found
    if not count:
        fault = f"--device={device}, but {why or 'torch sees no CUDA device'}"
        raise UserError(f"{fault}. Use --device=cpu.")
    if found.index is None:
        return torch.device("cuda", launch.local_rank % count)
    if launch.size > 1:
        advice = "Use --device=cuda, and CUDA_VISIBLE_DEVICES to choose GPUs."
        raise UserError(f"--device={device} is one GPU and there are {launch.size} ranks. {advice}")
    if found.index >= count:
        raise UserError(f"--device={device}, but this host has {count} CUDA devices.")
    return found


def _count_gpus() -> tuple[int, str]:
    """(number of usable GPUs, torch's warning about a driver that does not work)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    texts = [str(warning.message).strip() for warning in caught if "CUDA" in str(warning.message)]
    return count, texts[0].partition(". ")[0].splitlines()[0].rstrip(".") if texts else ""


def gpu_name(device: torch.device) -> str:
    """The GPU's UUID, the same in every process; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def share_gpus(statements: list[dict[str, Any]], oversubscribe: bool) -> bool:
    """Whether two ranks have the same GPU. UserError if so, without --oversubscribe."""
    first: dict[str, int] = {}
    for rank, mine in enumerate(statements):
        other = first.setdefault(mine["gpu"], rank)
        if other == rank or not mine["gpu"]:
            continue
        if oversubscribe:
            return True
        gpus = [theirs["gpu"] for theirs in statements if theirs["host"] == mine["host"]]
        there, n = f"{len(gpus)} processes on host {mine['host']}", len({*gpus})
        raise UserError(
            f"{there} but {n} CUDA devices: ranks {other} and {rank} have the same one. Start {n}, "
            "pass --device=cpu, or share a device with --oversubscribe=True."
        )
    return False


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of a run. auto: bfloat16 on a GPU that has it, else float32. UserError for
    bfloat16 on a GPU that only emulates it."""
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not native:
        fault = f"{torch.cuda.get_device_name(device)} has none"
        raise UserError(f"--dtype=bfloat16: {fault}. Use --dtype=float16 or --dtype=float32.")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and native else "float32"
    return DTYPES[dtype]


def pick_comm(
    comm: str, device: torch.device, launch: Launch, tp: int, shared: bool = False,
    link: Link | None = None,
) -> str:
    """The transport of the tp axis. UserError if the one asked for cannot work here. auto: nccl if
    every rank has its own GPU; shm between CPU ranks if no tp group spans hosts; else gloo.
    shared: two ranks have the same GPU. link: to be emulated, which shm can."""
    kind, whole = device.type, launch.local_size % tp == 0  # whole: a host holds whole tp groups
    if comm == "auto":
        comm = "shm" if kind == "cpu" and whole else "gloo"
        if kind == "cuda" and not shared:
            comm = "nccl"
    fault = ""
    if comm == "shm" and kind != "cpu":
        fault = f" is for ranks on CPU cores, the device is {kind}. Use --comm=auto."
    elif comm == "shm" and not whole:
        fault = f": hosts of {launch.local_size} ranks do not hold whole groups of tp={tp}. "
        fault += "Use --comm=gloo."
    elif comm == "nccl" and kind != "cuda":
        fault = f" needs GPUs, the device is {kind}. Use --comm=gloo."
    elif comm == "nccl" and shared:
        fault = " cannot share a GPU between ranks. Use --comm=gloo."
    if fault:
        raise UserError(f"--comm={comm}{fault}")
    if comm == "shm" and tp == 1:
        comm = "gloo"  # shm is for the tp axis only
    comm = comm if launch.size > 1 else "none"
    if link is not None and comm != "shm":
        what = {"nccl": "this run has a real link, nccl", "gloo": "this run has a real link, gloo"}
        why = what.get(comm, "this run is one rank, which sends nothing")
        raise UserError(f"--link emulates a link over shared memory, between the CPU ranks of a tp "
                        f"group on one host: {why}.")
    return comm


def set_threads(threads: int, device: torch.device, launch: Launch) -> None:
    """Set this rank's CPU threads. 0: on a CPU, its share of the cores that it may use."""
    if not threads and device.type == "cpu":
        affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))
        threads = max(1, len(affinity(0)) // launch.local_size)
    if threads:
        torch.set_num_threads(threads)


def check_compiler(device: torch.device) -> None:
    """UserError if torch.compile lacks what it needs: a C++ compiler for a CPU; Triton and a C
    compiler for a GPU."""
    gpu = device.type == "cuda"
    usual = ["gcc", "clang"] if gpu else ["clang++" if sys.platform == "darwin" else "g++"]
    chosen = os.environ.get("CC" if gpu else "CXX")
    names = [chosen] if chosen else usual
    missing = "" if any(map(shutil.which, names)) else f"a compiler ({' or '.join(names)})"
    if gpu and importlib.util.find_spec("triton") is None:
        missing = "the package triton"
    if missing:
        what = f"{missing}, which is not here. Install it, or leave --compile out."
        raise UserError(f"--compile=True needs {what}")

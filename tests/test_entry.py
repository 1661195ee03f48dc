"""How runs end: one line from one rank for a mistake, and nobody left behind when a rank dies."""

import contextlib
import importlib.util
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import PYTHON

import world.launch
from base.errors import UserError, explaining_memory
from cli.grammar import parse
from cli.options import RunOptions, TrainOptions
from parallel.collectives import all_reduce
from parallel.data_parallel import replicate
from world import devices, entry
from world.mesh import World

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """Below those that the system gives to connections, one of which could take it meanwhile."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := random.SystemRandom().randint(15000, 32000)))
            return port


def launch(
    size: int,
    main: Callable[[World, Any], None],
    scratch: Path,
    argv: list[str],
    options: type = RunOptions,
    seconds: float = 10,
    start: str = "fork",
) -> list[tuple[int | None, str]]:
    """entry.run on ranks with nobody to end them but themselves: (exit status, standard error) of
    each. start: fork, or spawn where ranks use GPUs, which a fork of a process that has looked for
    some cannot."""
    context: Any = multiprocessing.get_context(start)
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, main, scratch, argv, options))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    late = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        rank.kill()
    assert not late, f"ranks {late} were still there after {seconds} s"
    return [(rank.exitcode, (scratch / f"stderr-{i}").read_text()) for i, rank in enumerate(ranks)]


def _rank(
    rank: int, size: int, port: int, main: Any, scratch: Path, argv: list[str], options: type
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, size, size)), strict=True))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    log = os.open(scratch / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    sys.argv = ["prog.py", *argv]
    entry.run(options, main, "prog.py")
    os._exit(0)


def spoken(ends: list[tuple[int | None, str]]) -> str:
    """What all ranks together said; the tests below want one line, once."""
    return "".join(text for _, text in ends)


def _fine(world: World, options: Any) -> None:
    assert all_reduce(torch.ones(1), world.tp.at("mlp", 0), "forward").item() == world.size


def test_a_good_run_says_nothing_and_exits_0(tmp_path: Path) -> None:
    assert launch(3, _fine, tmp_path, ["--device=cpu"]) == [(0, "")] * 3


def test_a_mistyped_option_is_one_line_from_one_rank(tmp_path: Path) -> None:
    ends = launch(2, _fine, tmp_path, ["--sed=3"])
    assert (
        spoken(ends)
        == "prog.py: unknown option --sed. Did you mean --seed? (prog.py --help lists all)\n"
    )
    assert [status for status, _ in ends] == [2, 2]


def test_a_world_that_tp_does_not_divide(tmp_path: Path) -> None:
    ends = launch(3, _fine, tmp_path, ["--tp=2"], TrainOptions)
    assert spoken(ends) == (
        "prog.py: world size 3 cannot be split into tensor-parallel groups of 2. Use --tp in {1, "
        "3}, or start 2 or 4 "
        "processes: torchrun --standalone --nproc_per_node=4 prog.py ...\n"
    )


def test_options_of_other_commands_in_a_config_file_are_named_once(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("seed = 3\nlearning_rate = 1e-3\n")
    ends = launch(2, _fine, tmp_path, [str(path), "--device=cpu"])
    said = (
        f"prog.py: {path} sets options of other commands, which are not used here: learning_rate\n"
    )
    assert spoken(ends) == said and [status for status, _ in ends] == [0, 0]


def _mistake(world: World, options: Any) -> None:
    if world.rank == 1:
        raise UserError("there is no such thing.")
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "backward")


def test_a_mistake_that_one_rank_finds_is_said_by_that_rank_alone(tmp_path: Path) -> None:
    ends = launch(3, _mistake, tmp_path, ["--device=cpu"])
    assert spoken(ends) == "prog.py: there is no such thing.\n"
    assert ends[1][0] == 2 and all(status for status, _ in ends)


def _bug(world: World, options: Any) -> None:
    if world.rank == 1:
        raise RuntimeError("a bug of ours")
    for _ in range(3):
        all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")


def test_a_rank_that_raises_takes_all_down_and_its_error_is_shown_once(tmp_path: Path) -> None:
    ends = launch(3, _bug, tmp_path, ["--device=cpu"])
    assert spoken(ends).count("prog.py:") == 1
    assert (
        "prog.py: rank 1: RuntimeError: a bug of ours\n" in ends[1][1] and "Traceback" in ends[1][1]
    )
    assert [status for status, _ in ends] == [1, 1, 1]


def _gpu_is_gone(world: World, options: Any) -> None:
    def fails() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    if world.rank == 1:
        world.tp.at("mlp", 3).account("all_reduce", "forward", torch.ones(1), fails)
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")


def test_a_gpu_that_fails_is_not_taken_for_a_lost_peer(tmp_path: Path) -> None:
    ends = launch(2, _gpu_is_gone, tmp_path, ["--device=cpu"])
    said = (
        "prog.py: rank 1: its GPU failed in all_reduce #1 (layer 3, mlp, forward): CUDA error: "
        "unspecified launch failure."
    )
    assert (
        said in ends[1][1] and "lost contact" not in spoken(ends) and "Traceback" not in ends[1][1]
    )
    assert "--init_from=resume" in ends[1][1] and [status for status, _ in ends] == [1, 1]


def _no_room(world: World, options: Any) -> None:
    with explaining_memory(lambda: "It takes 93.1 GB a rank, its GPU has 79.2 GB."):
        if world.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")


def test_what_a_run_needs_is_told_when_memory_is_out(tmp_path: Path) -> None:
    ends = launch(2, _no_room, tmp_path, ["--device=cpu"])
    assert ends[1] == (
        1,
        "prog.py: rank 1 is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. "
        "It takes 93.1 GB a rank, its GPU has 79.2 GB.\n",
    )


@pytest.mark.parametrize(
    "device, missing", [("cpu", "a compiler (no-such-compiler)"), ("cuda", "the package triton")]
)
def test_compile_without_a_compiler(
    device: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        devices.check_compiler(torch.device(device))
    assert (
        str(error.value)
        == f"--compile=True needs {missing}, which is not here. Install it, or leave --compile out."
    )
    monkeypatch.setenv("CXX", sys.executable)
    devices.check_compiler(torch.device("cpu"))


def _killed(world: World, options: Any) -> None:
    for i in range(1000):
        if world.rank == 1 and i == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")


def test_a_killed_rank_takes_all_down_and_is_named(tmp_path: Path) -> None:
    ends = launch(3, _killed, tmp_path, ["--device=cpu"])
    said = spoken(ends)
    assert said.count("prog.py:") == 1
    assert (
        "lost contact with its peers (rank 1 is gone) in all_reduce #21 (layer 3, mlp, forward)"
        in said
    )
    assert [status for status, _ in ends] == [1, -signal.SIGKILL, 1]


def _stuck(world: World, options: Any) -> None:
    if world.rank == 1:
        time.sleep(60)
    all_reduce(torch.ones(1), world.tp.at("attention", 0), "forward")


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_limit(tmp_path: Path) -> None:
    ends = launch(2, _stuck, tmp_path, ["--device=cpu", "--comm_timeout=2"])
    assert spoken(ends) == (
        f"prog.py: [rank 0 host {socket.gethostname()}] waited 2 s in all_reduce #1 (layer 0, "
        "attention, forward, 4 B). "
        "Last seen: rank 0 #1, rank 1 no call yet. Look at rank 1 first: it is in no collective.\n"
    )
    assert [status for status, _ in ends] == [1, 1]


def _disagree(world: World, options: Any) -> None:
    raise AssertionError("never started")


def test_ranks_that_were_told_different_things_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_dict = entry.as_dict
    monkeypatch.setattr(
        entry,
        "as_dict",
        lambda options: as_dict(options) | {"seed": 7 if os.environ["RANK"] == "1" else 8},
    )
    ends = launch(2, _disagree, tmp_path, ["--device=cpu"])
    said = spoken(ends)
    assert said.count("prog.py:") == 1 and "has seed=7, rank 0 has 8.\n" in said
    assert "prog.py: ranks disagree on options: rank 1 (host " in said


def test_debug_shows_the_traceback_of_a_mistake(tmp_path: Path) -> None:
    said = spoken(launch(2, _mistake, tmp_path, ["--device=cpu", "--debug"]))
    assert "Traceback" in said and said.endswith("prog.py: there is no such thing.\n")


@pytest.mark.parametrize("device, comm, size, message", [
    ("cuda", "auto", 1, "--device=cuda, but torch sees no CUDA device. Use --device=cpu."),
    ("gpu", "auto", 1, "--device=gpu is not a device. Use auto, cpu, cuda or cuda:N."),
    ("cpu", "nccl", 2, "--comm=nccl needs GPUs, the device is cpu. Use --comm=gloo."),
    ("mps", "auto", 2,
     "--device=mps runs one rank only: it has no collectives. Use --device=cpu for several ranks."),
])  # fmt: skip
def test_devices_that_cannot_be(
    device: str, comm: str, size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    there = world.launch.Launch(0, size, 0, size)
    with pytest.raises(UserError) as error:
        devices.pick_comm(comm, devices.pick_device(device, there), there, size)
    assert str(error.value) == message


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, bf16: bool = True) -> None:
    """A host with so many GPUs, as far as choosing one goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: bf16 or including_emulation,
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=f"uuid of {device.index}"),
    )


def stated(*gpus: str, host: str = "a") -> list[dict[str, Any]]:
    return [{"gpu": gpu, "host": host} for gpu in gpus]


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    here = [devices.pick_device("auto", world.launch.Launch(rank, 4, rank, 4)) for rank in range(4)]
    assert [device.index for device in here] == [0, 1, 0, 1]
    said = stated(*map(devices.gpu_name, here))
    with pytest.raises(UserError) as error:
        devices.share_gpus(said, False)
    assert str(error.value) == (
        "4 processes on host a but 2 CUDA devices: ranks 0 and 2 have the same one. Start 2, pass "
        "--device=cpu, or share a device with --oversubscribe=True."
    )
    there = world.launch.Launch(3, 4, 3, 4)
    assert devices.share_gpus(said, True)
    assert (
        devices.pick_comm("auto", here[3], there, 2, shared=True) == "gloo"
    )  # nccl cannot share a device
    with pytest.raises(UserError, match="--comm=nccl cannot share a GPU"):
        devices.pick_comm("nccl", here[3], there, 2, shared=True)
    assert not devices.share_gpus(said[:2], False)
    assert devices.pick_comm("auto", here[0], world.launch.Launch(0, 2, 0, 2), 2) == "nccl"


def test_ranks_that_see_one_gpu_each_are_told_apart() -> None:
    """As srun --gpus-per-task=1 starts them: to each rank its GPU is the first and only one."""
    assert not devices.share_gpus(stated("x", "y") + stated("z", "v", host="b"), False)
    assert not devices.share_gpus(stated("", "", ""), False)  # CPUs
    with pytest.raises(
        UserError, match="2 processes on host b but 1 CUDA devices: ranks 2 and 3 have the same one"
    ):
        devices.share_gpus(stated("x", "y") + stated("z", "z", host="b"), False)


def test_one_gpu_for_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    assert devices.pick_device("cuda:1", world.launch.Launch(0, 1, 0, 1)) == torch.device("cuda", 1)
    with pytest.raises(
        UserError,
        match="--device=cuda:1 is one GPU and there are 2 ranks. Use --device=cuda, and CUDA_VIS",
    ):
        devices.pick_device("cuda:1", world.launch.Launch(0, 2, 0, 2))
    with pytest.raises(UserError, match="--device=cuda:2, but this host has 2 CUDA devices"):
        devices.pick_device("cuda:2", world.launch.Launch(0, 1, 0, 1))


def test_a_driver_that_is_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def old() -> bool:
        system = "CUDA initialization: The NVIDIA driver on your system"
        old = f"{system} is too old (found version 11040)."
        warnings.warn(f"{old}\nMore", stacklevel=1)
        return False

    gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "is_available", old)
    with pytest.raises(
        UserError,
        match="--device=cuda, but CUDA initialization: The NVIDIA driver "
        ".*11040.. Use --device=cpu",
    ):
        devices.pick_device("cuda", world.launch.Launch(0, 1, 0, 1))
    assert devices.pick_device("auto", world.launch.Launch(0, 1, 0, 1)) == torch.device("cpu")
    assert capsys.readouterr().err.startswith(
        "no GPU is used: CUDA initialization: The NVIDIA driver on your"
    )


def test_bfloat16_on_a_gpu_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1, bf16=False)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert devices.pick_dtype("auto", gpu) == torch.float32
    assert (
        devices.pick_dtype("bfloat16", cpu) == torch.bfloat16
        and devices.pick_dtype("float16", gpu) == torch.float16
    )
    with pytest.raises(
        UserError,
        match="--dtype=bfloat16: Tesla T4 has none. Use --dtype=float16 or --dtype=float32.",
    ):
        devices.pick_dtype("bfloat16", gpu)
    gpus(monkeypatch, 1)
    assert devices.pick_dtype("auto", gpu) == torch.bfloat16


def test_a_half_set_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE is not set. Start ranks with torchrun"):
        world.launch.Launch.from_environment()


@pytest.mark.parametrize("changes, message", [
    ({"WORLD_SIZE": "0"},
     "there is no such rank: RANK=0, WORLD_SIZE=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1. Start ranks "
     "with"),
    ({"LOCAL_WORLD_SIZE": "0"},
     "there is no such rank: RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=0. Start ranks"),
    ({"LOCAL_WORLD_SIZE": "2"},
     "there is no such rank: RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2. Start ranks"),
    ({"RANK": "1"}, "there is no such rank: RANK=1, WORLD_SIZE=1"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is not a whole number. Start ranks with torchrun"),
    ({"WORLD_SIZE": "²"}, "WORLD_SIZE='²' is not a whole number."),
    ({"WORLD_SIZE": "9" * 5000},
     "WORLD_SIZE='999999999999...9999999999999' is not a whole number."),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x' is not a whole number."),
])  # fmt: skip
def test_ranks_that_cannot_be(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for key, value in {**one, **changes}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError) as error:
        world.launch.Launch.from_environment()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("port", ["abc", "70000", "0", "-1", "²", ""])
def test_ports_that_cannot_be(port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one who says so looks for no store there."""
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="^MASTER_PORT(=| is not set)"):
        world.launch.open_store(world.launch.Launch(0, 2, 0, 2), 1)
    assert entry.first_to_fail(None)


@pytest.mark.parametrize(
    "rank, size, says", [("3", "2", True), ("x", "2", True), ("1", "²", True), ("1", "2", False)]
)
def test_a_rank_that_cannot_be_says_so_itself(
    rank: str, size: str, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    assert entry.first_to_fail(None) == says


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_store_of_one_host_listens_to_that_host_alone(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    store, holds = world.launch.open_store(world.launch.Launch(0, 2, 0, 2), 5)
    store.set("key", "value")
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    sockets = [line.split() for line in sum(tables, [])]
    assert holds and [
        at for _, at, _, state, *_ in sockets if state == "0A" and at.endswith(f":{port:04X}")
    ] == [f"0100007F:{port:04X}"]


def test_more_threads_than_a_system_starts_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--threads must be at most 1024, got 100000$"):
        parse(RunOptions, ["--threads=100000"], "prog.py")


def _set_by_a_stranger(world: World, options: Any) -> None:
    if world.rank == 0:
        assert world.watch is not None
        world.watch.store.add("failed", 1)
    time.sleep(60)


def test_a_run_that_another_process_ends_says_so(tmp_path: Path) -> None:
    ends = launch(2, _set_by_a_stranger, tmp_path, ["--device=cpu"])
    assert spoken(ends) == (
        "prog.py: key 'failed' of the run's store was set, and by none of its ranks: another "
        "process, which can reach the "
        "store, has ended the run.\n"
    )
    assert [status for status, _ in ends] == [1, 1]


def _too_much(world: World, options: Any) -> None:
    if world.rank == 1:
        torch.empty(2**55)
    time.sleep(60)


def _no_thread(world: World, options: Any) -> None:
    if world.rank == 1:
        limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(
            resource.RLIMIT_AS, (used + 2**20, limit)
        )  # no room for a thread's stack
        torch.empty(2**30)
    time.sleep(60)


def _no_room_in_python(world: World, options: Any) -> None:
    if world.rank == 1:
        bytearray(2**62)
    time.sleep(60)


@pytest.mark.parametrize("body", [_too_much, _no_thread, _no_room_in_python])
def test_a_rank_without_memory_says_so_in_one_line(body: Any, tmp_path: Path) -> None:
    ends = launch(2, body, tmp_path, ["--device=cpu"])
    said = spoken(ends)
    assert said.startswith("prog.py: rank 1 is out of memory: ") and said.count("\n") == 1, said
    assert said.endswith(". Use a smaller batch or a larger tp.\n") and "enforce fail" not in said
    assert [status for status, _ in ends] == [1, 1]


def _interrupted(world: World, options: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # another test may have ignored it
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def test_a_second_ctrl_c_does_not_break_off_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linger = entry.linger

    def impatient(world: World | None, said: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        linger(world, said)

    monkeypatch.setattr(entry, "linger", impatient)
    ends = launch(2, _interrupted, tmp_path, ["--device=cpu"])
    assert spoken(ends) == "prog.py: stopped by Ctrl-C\n"
    assert [status for status, _ in ends] == [130, 130]


def test_ranks_that_are_replicas_start_without_a_word(tmp_path: Path) -> None:
    """Not torch's either: it warns once a rank."""
    assert (
        launch(2, _replicated, tmp_path, ["--device=cpu", "--tp=1"], TrainOptions) == [(0, "")] * 2
    )


def _replicated(world: World, options: Any) -> None:
    warnings.simplefilter("always")
    replicate(torch.nn.Linear(2, 2), world.dp)


def test_a_rank_ends_before_its_interpreter_does(tmp_path: Path) -> None:
    """gloo's threads need it: one that frees the tensors of the last message without it aborts the
    process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, sys\n"
        "from cli.options import RunOptions\nfrom world import entry\n"
        "class Last:\n    def __del__(self, write=os.write):\n        write(1, b'finalized ')\n"
        "sys.last = Last()\n"
        "atexit.register(lambda: os.write(1, b'atexit '))\n"
        "entry.run(RunOptions, lambda world, options: None, 'prog.py')\n"
    )
    shared = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([PYTHON, str(script)], env=shared | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE)
        for r in "01"
    ]
    assert [(rank.communicate(timeout=60)[0], rank.wait()) for rank in ranks] == [
        (b"atexit ", 0)
    ] * 2


def torchrun(size: int, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow
def test_torchrun_ends_within_seconds_of_a_rank_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import test_entry\nfrom world import entry\nfrom cli.options import RunOptions\n"
        "import time, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "def main(world, options):\n    mark.write_text(str(time.time()))\n"
        "    test_entry._killed(world, options)\n"
        "entry.run(RunOptions, main, 'prog.py')\n"
    )
    done = torchrun(2, str(script), "--device=cpu")
    took = time.time() - float((tmp_path / "mark").read_text())
    assert done.returncode != 0 and took < 10
    assert "exitcode  : -9" in done.stderr
    assert (
        done.stderr.count(
            "prog.py: rank 0 lost contact with its peers (rank 1 is gone) in all_reduce #"
        )
        == 1
    )

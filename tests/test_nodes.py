"""More than one node: torchrun agents that find each other, on one host, and on two of its own making (network namespaces)."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_data_parallel import trained
from test_training import TINY, figures, letters  # noqa: F401

ROOT = Path(__file__).parent.parent
NAMES = ("nanotp-a", "nanotp-b")  # of the hosts, and of their network namespaces
ADDRESSES = ("10.203.77.1", "10.203.77.2")

pytestmark = pytest.mark.slow


@contextmanager
def hosts(home: Path) -> Iterator[list[list[str]]]:
    """What to put before a command to have it run on the one host or on the other, each with an address and a name.

    home: a directory for their table of names.
    """
    tools = all(map(shutil.which, ("ip", "unshare", "sh", "hostname", "mount")))
    made = tools and subprocess.run(["ip", "netns", "add", NAMES[0]], capture_output=True).returncode == 0
    if not made:
        pytest.skip("network namespaces cannot be made here")
    try:
        subprocess.run(["ip", "netns", "add", NAMES[1]], check=True)
        ends = [f"{name}0" for name in NAMES]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for name, end, address in zip(NAMES, ends, ADDRESSES, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", name], check=True)
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", end], check=True)
            subprocess.run([*inside, "link", "set", end, "up"], check=True)
            subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
        table = home / "hosts"
        table.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)))
        named = f'hostname "$0" && mount --bind {table} /etc/hosts && exec "$@"'  # seen by this command alone
        yield [["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, name] for name in NAMES]
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def two_agents(before: list[list[str]], endpoint: str, addresses: tuple[str, str], interface: list[str], *words: str) -> str:
    """Run train_tp.py on 2 + 2 ranks; returns what the first node printed on both streams."""
    agents = []
    for node in range(2):
        command = [
            *before[node], sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
            f"--node_rank={node}", "--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint={endpoint}",
            f"--local_addr={addresses[node]}", "train_tp.py", *words,
        ]  # fmt: skip
        alone = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface[node]}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        agents.append(subprocess.Popen(command, cwd=ROOT, env=alone, text=True, **pipes))  # type: ignore[call-overload]
    try:
        said = [agent.communicate(timeout=180)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    return "\n".join(said)


def words(letters: Path, out: Path, **changes: object) -> list[str]:  # noqa: F811
    asked = TINY | {"gradient_accumulation_steps": 6, "max_iters": 30, "lr_decay_iters": 30} | changes
    return [f"--{name}={value}" for name, value in (asked | {"data_dir": letters, "out_dir": out}).items()]


def test_two_agents_on_one_host(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    here = ("127.0.0.1", "127.0.0.1")
    said = two_agents([[], []], endpoint, here, ["lo", "lo"], *words(letters, tmp_path / "two", tp=2, dp_shard=True))
    assert "world 4 = dp 2 x tp 2, shm, cpu, float32" in said
    np.testing.assert_allclose(figures(tmp_path / "two"), trained(letters, tmp_path / "one", 1, 1), rtol=1e-4)


def test_two_hosts(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    """dp across, tp inside: shared memory on each host, messages between them."""
    with hosts(tmp_path) as before:
        asked = words(letters, tmp_path / "two", tp=2)
        said = two_agents(before, f"{ADDRESSES[0]}:29677", ADDRESSES, [f"{name}0" for name in NAMES], *asked)
    assert "world 4 = dp 2 x tp 2, shm, cpu, float32" in said
    np.testing.assert_allclose(figures(tmp_path / "two"), trained(letters, tmp_path / "one", 1, 1), rtol=1e-4)


def test_a_tp_group_across_hosts_works_and_is_warned_of(letters: Path, tmp_path: Path) -> None:  # noqa: F811
    with hosts(tmp_path) as before:
        asked = words(letters, tmp_path / "two", tp=4, max_iters=5)
        said = two_agents(before, f"{ADDRESSES[0]}:29678", ADDRESSES, [f"{name}0" for name in NAMES], *asked)
    assert "world 4 = dp 1 x tp 4, gloo, cpu, float32" in said
    assert f"tp group 0 (ranks 0-3) spans hosts {', '.join(NAMES)}: every all-reduce" in said
    np.testing.assert_allclose(figures(tmp_path / "two"), trained(letters, tmp_path / "one", 1, 1, max_iters=5), rtol=1e-4)

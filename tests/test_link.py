"""The emulated link: its figures, when a message arrives, and that what arrives is what the ranks sent."""

import time
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from base.errors import UserError
from parallel import emulated_link
from parallel.emulated_link import EmulatedLink
from parallel.shm import LATE_BYTES, ShmTransport
from plan.link import LINKS, Link
from world.devices import pick_comm
from world.launch import Launch
from world.mesh import World, make_axis

HERE = Launch(0, 2, 0, 2)


def test_figures() -> None:
    assert Link.parse("alpha_us:200,GBps:1") == Link.parse("GBps:1,alpha_us:200.0") == Link(1e-6 * 200, 1e-9)
    assert Link.parse("ethernet-10g") == LINKS["ethernet-10g"]
    assert str(Link(2e-4, 1e-9)) == "200 us, 1 GB/s"
    # 2 alpha and each byte once over two ranks; four ranks pass them on in a tree
    assert Link(1e-4, 1e-9).seconds("all_reduce", 1000, 2) == pytest.approx(2e-4 + 1e-6)
    assert Link(1e-4, 0.0).seconds("all_reduce", 1000, 4) == pytest.approx(4e-4)


@pytest.mark.parametrize("text", [
    "alpha_us:200", "GBps:1", "alpha_us:-1,GBps:1", "alpha_us:nan,GBps:1", "alpha_us:1e9,GBps:1", "alpha_us:1,GBps:0",
    "alpha_us:1,GBps:1,GBps:1", "alpha_us:1,GBps:inf", "alpha_us:,GBps:1", "alpha_us:.,GBps:1", "ethernet",
    "alpha_us:200000,GBps:1",
])  # fmt: skip
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--link=.*: use alpha_us:200,GBps:1, or one of ethernet-1g, "):
        Link.parse(text)


@pytest.mark.parametrize("comm, device, launch, why", [
    ("gloo", "cpu", HERE, "this run has a real link, gloo"), ("auto", "cuda", HERE, "this run has a real link, nccl"),
    ("auto", "cpu", Launch(0, 2, 0, 1), "this run has a real link, gloo"),
    ("auto", "cpu", Launch(0, 1, 0, 1), "this run is one rank"),
])  # fmt: skip
def test_a_real_link_is_not_emulated(comm: str, device: str, launch: Launch, why: str) -> None:
    with pytest.raises(UserError, match=f"--link emulates a link over shared memory.*: {why}"):
        pick_comm(comm, torch.device(device), launch, launch.size, link=LINKS["pcie"])
    assert pick_comm("auto", torch.device("cpu"), HERE, 2, link=LINKS["pcie"]) == "shm"


class Clock:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 1e-9  # a loop that looks at it ends
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Inner:
    rank, size = 0, 2

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return 2 * x

    def all_reduce_later(self, x: Tensor) -> Any:
        return lambda: 2 * x


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> tuple[EmulatedLink, Clock]:
    """1 s latency a step, so 2 s an all-reduce, and 1000 bytes a second; rank 1 brings all at once."""
    link, clock = EmulatedLink(Inner(), Link(1.0, 1e-3), lambda value: [value, value]), Clock()  # type: ignore[arg-type]
    monkeypatch.setattr(emulated_link, "time", clock)
    return link, clock


def test_a_message_arrives_when_the_link_has_brought_it(emulated: tuple[EmulatedLink, Clock]) -> None:
    link, clock = emulated
    link.all_reduce(torch.ones(250), "sum")
    assert clock.now == pytest.approx(103.0, abs=1e-3)
    link._times[1][2] = 107.0  # the other rank is late
    link.all_reduce(torch.ones(250), "sum")
    assert clock.now == pytest.approx(110.0, abs=1e-3)


def test_messages_in_flight_share_the_bytes_and_not_the_latency(emulated: tuple[EmulatedLink, Clock]) -> None:
    link, clock = emulated
    waits = [link.all_reduce_later(torch.ones(250)) for _ in range(3)]
    at = []
    for wait in waits:
        wait()
        at.append(clock.now)
    assert at == pytest.approx([103.0, 104.0, 105.0], abs=1e-3)
    wait = link.all_reduce_later(torch.ones(250))
    clock.sleep(10.0)  # computing
    wait()
    assert clock.now == pytest.approx(115.0, abs=1e-3)


def _all(world: World) -> list[tuple[float, bool]]:
    """Of each collective: its seconds over the link's, and whether it brought what shm brings."""
    link = Link(1e-3, 1e-7)
    slow = make_axis("tp", world.groups.get("tp"), "shm", world.ledger, link=link).transport
    fast: Any = world.tp.transport
    assert isinstance(slow, EmulatedLink) and isinstance(fast, ShmTransport)
    x, size = torch.arange(24.0).view(1, 6, 4) + world.rank, world.size
    calls: list[tuple[str, int, Any]] = [
        ("all_reduce", 96, lambda t: t.all_reduce(x, "sum")), ("all_reduce", 96, lambda t: t.all_reduce(x, "max")),
        ("all_gather", 96 * size, lambda t: t.all_gather(x)), ("broadcast", 96, lambda t: t.broadcast(x, 1)),
        ("reduce_scatter", 96, lambda t: t.reduce_scatter(x)),
        ("all_gather", 96, lambda t: t.gather_tokens(t.reduce_scatter(x), 6)),
        ("all_reduce", 96, lambda t: t.all_reduce_later(x)()),
        ("all_reduce", LATE_BYTES + 4, lambda t: t.all_reduce_later(torch.ones(LATE_BYTES // 4 + 1))()),
    ]  # fmt: skip
    found = []
    for op, nbytes, call in calls:
        started = time.monotonic()
        result = call(slow)
        seconds = time.monotonic() - started
        found.append((seconds / link.seconds(op, nbytes, size), torch.equal(result, call(fast))))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_every_collective_is_the_same_and_never_early(size: int) -> None:
    for found in run_ranks(size, _all, comm="shm"):
        assert all(same and ratio >= 1.0 for ratio, same in found), found

"""The roll call and the watchdog: who is missing, late, stopped or gone is named, and nobody who
computes is accused."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soak
import test_entry
import torch
import torch.distributed as dist
from ranks import PYTHON, run_ranks
from test_entry import launch, spoken
from test_training import TINY, letters  # noqa: F401

from base.errors import UserError
from base.processes import call_within, is_running, process_state
from parallel import collectives
from parallel.collectives import Axis, all_reduce, all_reduce_later, average_later
from parallel.ledger import Entry, Ledger, Track, call_text
from world.launch import call_roll, check_statements, warn_of_hosts
from world.mesh import World
from world.peers import Peer, Progress, diagnosis, ranks_text

HOST = socket.gethostname()


# --- the roll call --------------------------------------------------------------------------------


def attempt(
    store: Any, size: int, absent: int = -1, seconds: float = 5.0, last: int = -1
) -> list[Any]:
    """What each rank of one attempt makes of the roll call, or its error. last: the rank that comes
    after the others."""
    found: list[Any] = [None] * size

    def come(rank: int) -> None:
        if rank == last:
            time.sleep(0.3)
        try:
            found[rank] = call_roll(store, rank, size, {"host": f"h{rank}", "pid": rank}, seconds)
        except UserError as error:
            found[rank] = str(error)

    threads = [
        threading.Thread(target=come, args=(rank,)) for rank in range(size) if rank != absent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_rank_hears_what_all_state() -> None:
    found = attempt(dist.HashStore(), 3)
    assert found[0] == found[1] == found[2]
    assert found[0][1] == [{"host": f"h{rank}", "pid": rank} for rank in range(3)]


@pytest.mark.parametrize("last", [0, 2])
def test_what_an_earlier_attempt_left_in_the_store_is_not_believed(last: int) -> None:
    store = dist.HashStore()
    names = {attempt(store, 3, last=last)[rank][0] for rank in range(3)}
    again = attempt(store, 3, last=last)
    assert len({name for name, _ in again}) == 1 and again[0][0] not in names
    smaller = attempt(store, 2, last=min(last, 1))
    assert len(smaller[0][1]) == len(smaller[1][1]) == 2


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("world.launch.LATER_S", 0.1)
    found = attempt(dist.HashStore(), 4, absent=2, seconds=0.3)
    said = (
        "rank 2 did not come within 0.3 s; ranks 0-1, 3 did, on h0, h1, h3. Look at the output of "
        "those that are missing"
    )
    assert found[0].startswith(said) and found[1] == found[3] == found[0]
    found = attempt(dist.HashStore(), 2, absent=0, seconds=0.3)
    assert found[1].startswith("rank 0 did not come within 0.3 s.")


def test_names_of_many_ranks() -> None:
    assert ranks_text([3]) == "rank 3" and ranks_text({5, 0, 1, 2}) == "ranks 0-2, 5"


def _never(world: World, options: Any) -> None:
    raise AssertionError("never started")


def test_a_rank_that_no_launcher_has_started_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks are announced and two started, by nobody who would know."""
    start = test_entry._rank

    def rank_of_three(rank: int, size: int, *rest: Any) -> None:
        start(rank, 3, *rest)

    monkeypatch.setattr(test_entry, "_rank", rank_of_three)
    ends = launch(2, _never, tmp_path, ["--device=cpu", "--start_timeout=1"], seconds=20)
    said = spoken(ends)
    assert (
        said.startswith(f"prog.py: rank 2 did not come within 1 s; ranks 0-1 did, on {HOST}. ")
        and said.count("\n") == 1
    )
    assert [status for status, _ in ends] == [2, 2]


def test_ranks_on_other_devices_are_named() -> None:
    here = {"device": "cuda:0", "options": {}, "host": "a"}
    check_statements([here, here | {"device": "cuda:1"}])
    with pytest.raises(
        UserError, match=r"rank 1 \(host b\) on cpu, rank 0 \(host a\) on cuda. Give --device"
    ):
        check_statements([here, here | {"device": "cpu", "host": "b"}])


def test_a_tp_group_that_spans_hosts_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    peers = tuple(Peer(host, 1, host) for host in "aaabbb")
    warn_of_hosts(peers, 3, "prog.py")
    assert capsys.readouterr().err == ""
    warn_of_hosts(peers, 2, "prog.py")
    said = (
        "prog.py: tp group 1 (ranks 2-3) spans hosts a, b: every all-reduce of its layers crosses "
        "the network. --tp=3 keeps"
    )
    assert capsys.readouterr().err.startswith(said)


def _limits(world: World) -> dict[str, tuple[int, float]]:
    """Of each axis's group: its ranks, and the seconds that torch waits in it."""
    groups: dict[str, Any] = dict(world.groups)
    limits = {
        name: group._get_backend(torch.device("cpu")).options._timeout
        for name, group in groups.items()
    }
    return {name: (groups[name].size(), limit.total_seconds()) for name, limit in limits.items()}


def test_every_group_has_the_runs_limit() -> None:
    """Not torch's default of half an hour. tests/ranks.py asks for 20 s."""
    assert run_ranks(4, _limits, tp=2) == [{"dp": (2, 20.0), "tp": (2, 20.0)}] * 4
    assert run_ranks(2, _limits, tp=1) == [{"dp": (2, 20.0)}] * 2  # an axis of one rank has none


def _other_weights(world: World, options: Any) -> None:
    world.agree("weights", f"w{world.rank // 2}")


def test_ranks_that_read_other_weights_do_not_go_on(tmp_path: Path) -> None:
    said = spoken(launch(3, _other_weights, tmp_path, ["--device=cpu"]))
    assert (
        said == f"prog.py: ranks disagree on weights: rank 2 (host {HOST}) has w1, rank 0 has w0.\n"
    )


# --- what is said ---------------------------------------------------------------------------------

MLP = Entry(5, "mlp", "forward", "all_reduce")


def seen(number: int, waits: bool, text: str, beat: int = 7, left: bool = False) -> Progress:
    return Progress(beat, left, "tp 0 1 2 3", {"tp 0 1 2 3": (number, waits, text)})


def test_a_call_as_text() -> None:
    assert (
        call_text(1843, (MLP, 3_145_728, "step 77"), True)
        == "all_reduce #1843 (step 77, layer 5, mlp, forward, 3.1 MB)"
    )
    assert call_text(1, (MLP, 3072, ""), True) == "all_reduce #1 (layer 5, mlp, forward, 3.1 kB)"
    assert (
        call_text(7, (Entry(None, "", "", "gather"), 0, "step 8, save"), True)
        == "gather #7 (step 8, save)"
    )


def test_the_verdict_names_who_is_to_be_looked_at() -> None:
    late = call_text(1843, (MLP, 0, "step 77"))
    behind = "all_reduce #1841 (step 77, layer 4, attention, forward)"
    there = {rank: seen(1843, True, late) for rank in range(3)} | {3: seen(1841, False, behind)}

    def said(ended: set[int], silent: set[int], ranks: dict[int, Progress] = there) -> str:
        return diagnosis("tp 0 1 2 3", 1843, late, (0, 1, 2, 3), ranks, ended, silent)

    places = " Last seen: ranks 0-2 #1843, rank 3 #1841 (step 77, layer 4, attention, forward)."
    assert said(set(), set()) == f"{places} Look at rank 3 first: it is in no collective."
    assert said(set(), {3}).startswith(f"{places} Look at rank 3 first: it does not run")
    assert said({1}, {3}).endswith("Look at rank 1 first: its process has ended.")
    waiting = there | {3: seen(1841, True, behind)}
    assert said(set(), set(), waiting).endswith("Look at rank 3 first: it is behind.")
    other = there | {3: seen(1843, True, late.replace("mlp", "attention"))}
    assert said(set(), set(), other).endswith("Look at rank 3 first: it is in another call.")
    all_there = there | {3: seen(1843, True, late)}
    assert said(set(), set(), all_there).endswith(
        "All have come to it: look at the network between them."
    )
    elsewhere = all_there | {
        6: Progress(9, False, "dp 2 6", {"dp 2 6": (4, False, "all_reduce #4 (step 77)")})
    }
    assert said(set(), {6}, elsewhere).startswith(
        " Last seen: ranks 0-3 #1843, rank 6 #4 (step 77). Look at rank 6 first"
    )
    assert said(set(), set(), {}).startswith(" The store does not answer.")


def test_calls_that_have_not_come_back() -> None:
    track, first, second = Track("tp", (0, 1)), (MLP, 8, "step 1"), (MLP, 8, "step 2")
    assert not list(track.open())
    track.number, track.call, track.waiting = 5, first, True
    track.begun[3] = second
    assert list(track.open()) == [(5, first), (3, second)]
    track.waiting = False
    done = [True, False, False]
    track.begun.clear()
    track.queued = deque((i, first, partial(done.__getitem__, i)) for i in range(3))
    assert list(track.open()) == [(1, first)] and len(track.queued) == 2


def test_a_gpus_calls_are_open_until_its_stream_has_got_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call over nccl returns at once; what tells that it was made is an event."""
    arrived: list[bool] = [False]
    event = SimpleNamespace(query=lambda: arrived[0])
    monkeypatch.setattr(collectives, "clock", lambda message: event)
    axis = Axis("tp", 0, 2).at("mlp", 5)
    axis.track.queued = deque()
    message: Any = SimpleNamespace(is_cuda=True, nbytes=8)
    axis.account("all_reduce", "forward", message, lambda: None)
    ((number, (entry, _, _)),) = axis.track.open()
    assert number == 1 and entry == MLP and not axis.track.waiting
    arrived[0] = True
    assert not list(axis.track.open())


def test_an_answer_that_does_not_come() -> None:
    assert call_within(lambda: 3, 0, 1.0) == 3
    assert call_within(threading.Event().wait, True, 0.1)

    def fails() -> int:
        raise RuntimeError("gone")

    assert call_within(fails, 7, 1.0) == 7


def test_the_state_of_a_process() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    assert process_state(child) == "T" and is_running(child)
    os.kill(child, signal.SIGKILL)
    while process_state(child) not in ("Z", "X"):
        time.sleep(0.01)
    assert not is_running(child)
    os.waitpid(child, 0)
    assert process_state(child) == ""


# --- real ranks -----------------------------------------------------------------------------------


def _stopped(world: World, options: Any) -> None:
    for i in range(200):
        with world.ledger.during(f"step {i}"):
            if world.rank == 1 and i == 100:
                os.kill(os.getpid(), signal.SIGSTOP)
            all_reduce(torch.ones(300), world.tp.at("mlp", 3), "forward")


@pytest.mark.parametrize("comm", ["gloo", "shm"])
def test_a_stopped_rank_is_named_and_killed(tmp_path: Path, comm: str) -> None:
    ends = launch(
        3, _stopped, tmp_path, ["--device=cpu", f"--comm={comm}", "--comm_timeout=1"], seconds=15
    )
    said = spoken(ends)
    assert (
        f" host {HOST}] waited 1 s in all_reduce #101 (step 100, layer 3, mlp, forward, 1.2 kB). "
        "Last seen: " in said
    )
    assert "Look at rank 1 first: it does not run: stopped, or its host is out of reach.\n" in said
    assert said.count("prog.py:") == 1
    assert [status for status, _ in ends] == [1, -signal.SIGKILL, 1]


def _stopped_in_a_replay(world: World, options: Any) -> None:
    """Rank 1 stops while a CUDA graph runs: the others' GPUs never come to its end, and their hosts
    wait for the logits, which is no collective."""
    with world.ledger.recording() as recording:
        all_reduce(torch.ones(300), world.tp.at("mlp", 3), "forward")
    for i in range(200):
        with world.ledger.during(f"step {i}"):
            if world.rank == 1 and i == 100:
                os.kill(os.getpid(), signal.SIGSTOP)
            world.ledger.replay(recording, lambda i=i: i < 100)  # type: ignore[misc]
            if i == 100:
                time.sleep(60)


def test_a_rank_that_stops_in_a_replay_is_named(tmp_path: Path) -> None:
    words = ["--device=cpu", "--comm=gloo", "--comm_timeout=1"]
    ends = launch(2, _stopped_in_a_replay, tmp_path, words, seconds=15)
    said = spoken(ends)
    assert (
        f"[rank 0 host {HOST}] waited 1 s in all_reduce #102 (step 100, CUDA graph, layer 3, mlp, "
        "forward, 1.2 kB)" in said
    )
    assert "Look at rank 1 first: it does not run: stopped, or its host is out of reach.\n" in said
    assert [status for status, _ in ends] == [1, -signal.SIGKILL]


def _slow(world: World, options: Any) -> None:
    time.sleep(3)  # all compute, and none waits
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")
    if world.rank:
        time.sleep(1.5)  # late, but there before anybody has spoken
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")


def test_who_computes_is_not_late(tmp_path: Path) -> None:
    assert (
        launch(2, _slow, tmp_path, ["--device=cpu", "--comm_timeout=1"], seconds=20)
        == [(0, "")] * 2
    )


def _compiles(world: World, options: Any) -> None:
    if world.rank == 1:

        def backend(
            graph: Any, inputs: Any
        ) -> Any:  # what torch.compile calls, in the middle of compiling
            time.sleep(6)
            return graph

        torch.compile(torch.neg, backend=backend)(torch.ones(1))
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")
    if world.rank == 1:
        time.sleep(60)
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")


def test_who_compiles_is_waited_for_and_no_longer(tmp_path: Path) -> None:
    words = ["--device=cpu", "--compile=True", "--comm=gloo", "--comm_timeout=1"]
    ends = launch(2, _compiles, tmp_path, words, seconds=40)
    assert "waited 1 s in all_reduce #2 (layer 3, mlp, forward, 4 B)" in spoken(ends)
    assert "Look at rank 1 first: it is in no collective.\n" in spoken(ends)


def _in_a_gather(world: World, options: Any) -> None:
    with world.ledger.during("step 8, save"):
        if world.rank == 1:
            time.sleep(60)
        world.barrier()


def _in_a_bucket(world: World, options: Any) -> None:
    if world.rank == 1:
        time.sleep(60)
    average_later(torch.ones(4), world.tp.at("data_parallel"), "backward").wait()


def _later(world: World, options: Any) -> None:
    if world.rank == 1:
        time.sleep(60)
    all_reduce_later(torch.ones(4), world.tp.at("mlp", 3), "backward")()


@pytest.mark.parametrize(
    "body, call",
    [
        (_in_a_gather, r"gather #2 (step 8, save)"),
        (_in_a_bucket, "all_reduce #1 (data_parallel, backward, 16 B)"),
        (_later, "all_reduce #1 (layer 3, mlp, backward, 16 B)"),
    ],
)
def test_every_kind_of_waiting_is_watched(tmp_path: Path, body: Any, call: str) -> None:
    ends = launch(
        2, body, tmp_path, ["--device=cpu", "--comm=gloo", "--comm_timeout=1"], seconds=15
    )
    said = spoken(ends)
    assert f"prog.py: [rank 0 host {HOST}] waited 1 s in {call}. Last seen: " in said
    assert "Look at rank 1 first: it is in no collective.\n" in said
    assert [status for status, _ in ends] == [1, 1]  # rank 1 sleeps, and hears of it


def _gone_while_others_compute(world: World, options: Any) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_rank_that_dies_while_the_others_compute_is_found(tmp_path: Path) -> None:
    ends = launch(3, _gone_while_others_compute, tmp_path, ["--device=cpu"], seconds=15)
    said = spoken(ends)
    assert (
        said.count("\n") == 1
        and " lost contact with its peers (rank 1 is gone) after all_reduce #" in said
    )
    assert [status for status, _ in ends] == [1, -signal.SIGKILL, 1]


def _leaves_early(world: World, options: Any) -> None:
    if world.rank != 1:
        time.sleep(3)


def test_a_rank_that_comes_to_its_end_first_is_not_missed(tmp_path: Path) -> None:
    assert launch(3, _leaves_early, tmp_path, ["--device=cpu"], seconds=20) == [(0, "")] * 3


def _told_to_stop(number: int, world: World, options: Any) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), number)
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")
    time.sleep(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_rank_that_is_told_to_stop_says_so(tmp_path: Path, number: signal.Signals) -> None:
    ends = launch(2, partial(_told_to_stop, number), tmp_path, ["--device=cpu"], seconds=15)
    assert (
        f"prog.py: rank 1 was told to stop ({number.name}) " in ends[1][1]
        and spoken(ends).count("prog.py:") == 1
    )
    assert [status for status, _ in ends] == [1, 128 + number]


def _suspended(world: World, options: Any) -> None:
    """All ranks are stopped while one waits for the other."""
    pids = [peer.pid for peer in world.peers]
    if world.rank == 0 and os.fork() == 0:
        for number, then in ((signal.SIGSTOP, 3.5), (signal.SIGCONT, 0.0)):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(then)
        os._exit(0)
    for _ in range(8 * world.rank):
        time.sleep(0.1)
    assert all_reduce(torch.ones(1), world.tp.at("mlp", 0), "forward").item() == 2


def test_ranks_that_are_all_stopped_for_a_while_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("world.mesh.LATER_S", -3.0)  # torch's own limit: three seconds
    words = ["--device=cpu", "--comm=gloo", "--comm_timeout=6"]
    assert launch(2, _suspended, tmp_path, words, seconds=30) == [(0, "")] * 2


# --- without a launcher ---------------------------------------------------------------------------


def _left_alone(scratch: Path, world: World, options: Any) -> None:
    mark = scratch / f"rank-{world.rank}"
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)
    if world.rank == 1:
        time.sleep(60)
    all_reduce(torch.ones(1), world.tp.at("mlp", 3), "forward")


def test_ranks_whose_launcher_is_killed_end(tmp_path: Path) -> None:
    """One waits for the other, which sleeps: no call of theirs fails."""
    launcher = os.fork()
    if launcher == 0:
        os.environ["TORCHELASTIC_RUN_ID"] = "job"
        launch(2, partial(_left_alone, tmp_path), tmp_path, ["--device=cpu"], seconds=60)
    marks = [tmp_path / f"rank-{rank}" for rank in range(2)]
    while not all(mark.exists() for mark in marks):
        time.sleep(0.02)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    killed = time.monotonic()
    while any(is_running(int(mark.read_text())) for mark in marks):
        assert time.monotonic() < killed + 20
        time.sleep(0.02)
    said = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in range(2))
    where = r"(in all_reduce #1 \(layer 3, mlp, forward\)|after .*)"
    assert re.fullmatch(
        rf"prog.py: the launcher of rank \d is gone: the run has ended {where}\n", said
    )


@pytest.mark.slow
def test_training_whose_launcher_is_killed_saves_and_ends(
    letters: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    asked = TINY | {
        "max_iters": 10**6,
        "eval_interval": 10**6,
        "data_dir": letters,
        "out_dir": out,
        "tp": 2,
    }
    command = [
        PYTHON,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local_addr=127.0.0.1",
        "--nproc_per_node=2",
    ]
    with open(tmp_path / "said", "w") as said:
        words = [*command, "train_tp.py", *(f"--{name}={value}" for name, value in asked.items())]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(words, cwd=test_entry.ROOT, stdout=said, stderr=said, env=alone)
    while (
        not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3
    ):
        assert launcher.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    killed = time.monotonic()
    while any(is_running(int(pid)) for pid in ranks):
        assert time.monotonic() < killed + 30
        time.sleep(0.05)
    lines = [
        line
        for line in (tmp_path / "said").read_text().splitlines()
        if line.startswith("train_tp.py:")
    ]
    at = soak.check_latest(out)
    how = (
        f"stopped after {at} iterations, saved {out}/step-{at:06d}. --init_from=resume goes on "
        f"from there."
    )
    assert lines == [f"train_tp.py: the launcher is gone: {how}"]


# --- no store -------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [False, True])
def test_a_rank_that_finds_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Rank 1 is started alone; where rank 0 should be is nobody, or somebody who listens and says
    nothing."""
    start = test_entry._rank
    monkeypatch.setattr(test_entry, "_rank", lambda rank, size, *rest: start(1, 2, *rest))
    monkeypatch.setattr("world.launch.ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setattr(test_entry, "free_port", lambda: port)
        if answers:
            silent.listen()
        (tmp_path / "stderr-0").touch()
        ends = launch(1, _never, tmp_path, ["--device=cpu", "--start_timeout=1"], seconds=30)
    said = (tmp_path / "stderr-1").read_text()
    there = (
        f"what answers at 127.0.0.1:{port} is no store: another program has that port. Set another "
        f"MASTER_PORT.\n"
    )
    nobody = (
        f"rank 1 (host {HOST}) found nobody at 127.0.0.1:{port} within 1 s. Is rank 0 there, and "
        f"can this host reach it?"
    )
    assert (
        ends[0][0] == 2
        and said.startswith(f"prog.py: {there if answers else nobody}")
        and said.count("\n") == 1
    )


def test_an_axis_has_one_track_under_all_its_labels() -> None:
    ledger = Ledger()
    axis = Axis("tp", 0, 2, None, ledger, track=ledger.track("tp", (0, 1)))
    axis.at("mlp", 5).account("all_reduce", "forward", torch.ones(1), lambda: None)
    axis.at("attention", 6).account("all_reduce", "forward", torch.ones(1), lambda: None)
    (track,) = ledger.tracks
    assert (
        track.number == 2
        and track.call == (Entry(6, "attention", "forward", "all_reduce"), 4, "")
        and not track.waiting
    )
    assert ledger.latest is track

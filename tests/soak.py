"""Many short runs of train_tp.py, each ended by a rank that is killed or stopped at a random moment, in saves above all.

    python tests/soak.py --kills=50 --report=soak.json

Every run goes on from what the one before has left, in a random layout (dp x tp of at most 4 ranks), over gloo or shared
memory, replicated or sharded, saving in the background or not. Ranks are real processes with train_tp.py's own start and end,
forked from a warm parent; --launcher=torchrun starts the real thing, which takes seconds a run.

After each: all ranks must be gone in time; `latest` must name a whole checkpoint (every byte of it), no older than the newest
that was announced. In the end the losses of all runs together must be those of a run that nobody disturbed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import train_tp  # noqa: E402
from base.processes import is_running  # noqa: E402
from checkpoints.shards import ShardDirectory  # noqa: E402
from checkpoints.sources import latest_checkpoint  # noqa: E402
from cli.options import TrainOptions  # noqa: E402
from world import entry  # noqa: E402

LAYOUTS = [(dp, tp) for dp in range(1, 5) for tp in range(1, 5) if 1 < dp * tp <= 4]
STOP_LIMIT = 5.0  # --comm_timeout: how long a stopped rank is waited for
GRACE = 10.0  # how long ranks may take to be gone after that, or after a kill
# large enough that a save takes a moment: 3.2 M parameters, 38 MB
SHAPE = ["n_layer=4", "n_head=4", "n_embd=160", "block_size=16", "batch_size=2", "gradient_accumulation_steps=6", "bias=True"]
HABITS = ["dataset=letters", "eval_interval=1000000", "save_interval=4", "keep_last=3", "learning_rate=1e-4", "min_lr=1e-4",
          "warmup_iters=0", "device=cpu", "threads=1", f"comm_timeout={STOP_LIMIT:g}"]  # fmt: skip


@dataclass
class Run:
    """One world of train_tp.py's ranks."""

    words: list[str]
    ranks: list[int]  # process ids
    log: Path
    processes: list[Any] = field(default_factory=list)  # the ranks, or torchrun

    def gone(self) -> bool:
        for process in self.processes:
            if isinstance(process, subprocess.Popen):
                process.poll()
        return not any(is_running(pid) for pid in self.ranks) and not any(map(_alive, self.processes))

    def clear(self) -> None:
        for pid in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.join()


def _alive(process: Any) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def _rank(rank: int, size: int, port: int, words: list[str], log: Path) -> None:
    """A rank as torchrun starts it, but forked."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    sys.argv = ["train_tp.py", *words]
    torch.set_num_threads(1)
    entry.run(TrainOptions, train_tp.main, "train_tp.py")
    os._exit(0)


def launched(words: list[str], size: int, launcher: str, log: Path) -> Run:
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", "train_tp.py"]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "ab") as out:
            agent = subprocess.Popen([*command, *words], stdout=out, stderr=out, cwd=ROOT, env=alone)
        return Run(words, [], log, [agent])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, size, port, words, log)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    return Run(words, [rank.pid or 0 for rank in ranks], log, list(ranks))


def find_ranks(run: Run) -> None:
    """Under torchrun: the processes that it has started, in rank order."""
    if not run.ranks:
        agent = run.processes[0].pid
        with contextlib.suppress(OSError):
            found = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
            run.ranks = [int(pid) for pid in found]


def saving(out: Path) -> bool:
    return any(out.glob(".step-*.tmp"))


def iterations(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def announced(log: Path) -> int:
    """The iteration of the newest checkpoint that a run has said it saved."""
    return max((int(n) for n in re.findall(r"saved \S*step-(\d+)", log.read_text(errors="replace"))), default=0)


def losses(out: Path) -> dict[int, tuple[float, float]]:
    """{iteration: (loss, norm of the gradient)}; a killed run's last line may be a part of one."""
    found = {}
    for text in (out / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if "loss" in line:
                found[line["iter"]] = line["loss"], line["grad_norm"]
    return found


def check_latest(out: Path) -> int:
    """The iteration of the checkpoint that `latest` names; an error unless every byte of it is there."""
    path = latest_checkpoint(out)
    for directory in (path, path / "optimizer"):
        shards = ShardDirectory(directory)
        for rank in range(shards.manifest.tp):
            shards.check_bytes(rank)
            shards.file(rank)
    return int(json.loads((path / "training.json").read_text())["progress"]["iter_num"])


def make_dataset(home: Path) -> None:
    (home / "letters").mkdir(parents=True)
    ids = (np.cumsum(np.random.default_rng(0).choice([1, 1, 1, 2, 5], 3000)) % 13).astype("<u2")
    ids[:2700].tofile(home / "letters" / "train.bin")
    ids[2700:].tofile(home / "letters" / "val.bin")
    (home / "letters" / "tokenizer.json").write_text(json.dumps({"kind": "char", "chars": list("abcdefghijklm")}))


def soak(home: Path, kills: int, seed: int, launcher: str, stops: float) -> dict[str, Any]:
    """kills: runs that are ended. stops: the share of them that is stopped (SIGSTOP), not killed."""
    make_dataset(home / "data")
    random.seed(seed)
    out, log = home / "out", home / "log"
    told: dict[int, list[tuple[float, float]]] = {}  # what runs said of an iteration, the repeated ones several times
    events: list[dict[str, Any]] = []
    known = 0  # the newest checkpoint that must not be lost
    while len(events) < kills:
        dp, tp = random.choice(LAYOUTS)
        comm, shard, background = random.choice(["gloo", "shm"]), random.random() < 0.5, random.random() < 0.5
        words = [f"--{word}" for word in (*SHAPE, *HABITS)] + [
            f"--data_dir={home / 'data'}", f"--out_dir={out}", f"--tp={tp}", "--max_iters=1000000",
            f"--init_from={'resume' if known else 'scratch'}", f"--overwrite={not known}", f"--comm={comm}",
            f"--dp_shard={shard}", f"--async_save={background}",
        ]  # fmt: skip
        log.write_bytes(b"")
        before, run = iterations(out), launched(words, dp * tp, launcher, log)
        try:
            event = ended(run, out, before, aim_at_save=random.random() < 0.7, stop=random.random() < stops)
        finally:
            run.clear()
        said = log.read_text(errors="replace")
        newest = check_latest(out) if (out / "latest").exists() else 0
        event |= {
            "dp": dp, "tp": tp, "comm": comm, "dp_shard": shard, "async_save": background, "announced": announced(log),
            "latest": newest, "error": next(filter(re.compile("train_tp.py: |\\[rank \\d").match, said.splitlines()), ""),
        }  # fmt: skip
        event["lost"] = newest < max(known, event["announced"])
        known = newest
        for iteration, values in losses(out).items() if out.exists() else ():
            told.setdefault(iteration, []).append(values)
        events.append(event)
        bar = "in a save" if event["in_save"] else "elsewhere"
        print(f"{len(events)}/{kills}: {event['signal']} of rank {event['rank']} of dp {dp} x tp {tp}, {bar}: gone in "
              f"{event['gone_s']:.1f} s, latest {newest}; {event['error'][:110]}", flush=True)  # fmt: skip
    return {"events": events, **compared(home, told, launcher)}


def ended(run: Run, out: Path, before: int, aim_at_save: bool, stop: bool) -> dict[str, Any]:
    """Wait for a random moment of the run, hit a rank, and wait until all are gone."""
    deadline = time.monotonic() + 120
    first, hold = random.randint(2, 12), random.random()
    while iterations(out) < before + 1 or iterations(out) == 0:  # it is under way
        check_running(run, deadline)
    begun = iterations(out)
    if aim_at_save:
        while not saving(out):
            check_running(run, deadline)
        time.sleep(0.15 * hold)
    else:
        while iterations(out) < begun + first:
            check_running(run, deadline)
        time.sleep(0.1 * hold)
    find_ranks(run)
    victim = random.randrange(len(run.ranks))
    number = signal.SIGSTOP if stop else signal.SIGKILL
    os.kill(run.ranks[victim], number)
    in_save, hit = saving(out), time.monotonic()
    limit = hit + GRACE + (STOP_LIMIT if stop else 0.0)
    others = [pid for i, pid in enumerate(run.ranks) if i != victim]
    while any(is_running(pid) for pid in others) and time.monotonic() < limit:
        reap(run)
        time.sleep(0.02)
    return {"signal": number.name, "rank": victim, "in_save": in_save, "gone_s": time.monotonic() - hit,
            "hang": any(is_running(pid) for pid in others)}  # fmt: skip


def check_running(run: Run, deadline: float) -> None:
    reap(run)
    if time.monotonic() > deadline or run.gone() and run.ranks:
        raise RuntimeError(f"a run did not get going:\n{run.log.read_text(errors='replace')[-3000:]}")
    time.sleep(0.002)


def reap(run: Run) -> None:
    for process in run.processes:
        _alive(process)


def compared(home: Path, told: dict[int, list[tuple[float, float]]], launcher: str) -> dict[str, Any]:
    """How far what all runs said is from what one undisturbed process says."""
    out, log = home / "whole", home / "whole.log"
    words = [f"--{word}" for word in (*SHAPE, *HABITS)]
    words += [f"--data_dir={home / 'data'}", f"--out_dir={out}", "--tp=1", f"--max_iters={max(told) + 1}", "--save_interval=0"]
    run = launched(words, 1, launcher, log)
    for process in run.processes:
        process.wait() if isinstance(process, subprocess.Popen) else process.join()
    expected = losses(out)
    pairs = [(values, expected[iteration]) for iteration, many in told.items() for values in many]
    errors = [max(abs(a / b - 1) for a, b in zip(*pair, strict=True)) for pair in pairs]
    return {"iterations": len(expected), "compared": len(pairs), "largest_relative_difference": max(errors)}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--kills", type=int, default=50)
    asked.add_argument("--seed", type=int, default=int(time.time()))
    asked.add_argument("--launcher", choices=("fork", "torchrun"), default="fork")
    asked.add_argument("--stops", type=float, default=0.2, help="share of runs that are stopped, not killed")
    asked.add_argument("--report", default="")
    options = asked.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        made = soak(Path(home), options.kills, options.seed, options.launcher, options.stops)
    events = made["events"]
    made = {
        "command": ["tests/soak.py", *sys.argv[1:]], "seed": options.seed, "launcher": options.launcher, "kills": len(events),
        "inside_a_save": sum(event["in_save"] for event in events), "lost_checkpoints": sum(event["lost"] for event in events),
        "hangs": sum(event["hang"] for event in events), "slowest_end_s": max(event["gone_s"] for event in events), **made,
    }  # fmt: skip
    print(json.dumps({key: value for key, value in made.items() if key != "events"}, indent=1))
    if options.report:
        Path(options.report).write_text(json.dumps(made, indent=1) + "\n")
    sys.exit(1 if made["lost_checkpoints"] or made["hangs"] or made["largest_relative_difference"] > 1e-4 else 0)


if __name__ == "__main__":
    main()

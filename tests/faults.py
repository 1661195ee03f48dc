"""What becomes of a run when one of its ranks is killed or stopped, in every part of it and over every transport.

    python tests/faults.py [--out=docs/results/faults.json] [--ranks=3] [--comms=gloo,shm]

--comms=nccl wants a GPU a rank, and strikes in the replay of a CUDA graph too.
Starts real torchrun worlds; in each, rank 1 kills (SIGKILL) or stops (SIGSTOP, with --comm_timeout=5) itself at a chosen call.
Measured is the time from there until no rank's process is left, and read is what the run has said. A world is started again
with --max_restarts by tests/test_faults.py, which has the quick part of this.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PHASES = ("forward", "backward", "save", "evaluation", "sampling")
SAMPLING = ("sampling", "replay")
LIMIT_S = 5.0
TRAIN = [
    "--dataset=letters", "--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=16", "--batch_size=2", "--device=cpu",
    "--gradient_accumulation_steps=2", "--max_iters=12", "--eval_interval=4", "--eval_iters=2", "--warmup_iters=2",
    "--lr_decay_iters=12", "--bias=True", "--progress=False", "--threads=1",
]  # fmt: skip


def main(argv: list[str]) -> None:
    given = dict(word.removeprefix("--").split("=", 1) for word in argv)
    ranks, found = int(given.get("ranks", 3)), []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for comm in given.get("comms", "gloo,shm").split(","):
            for phase in PHASES + ("replay",) * (comm == "nccl"):
                for name in ("SIGKILL", "SIGSTOP"):
                    case = strike(Path(scratch), phase, name, comm, ranks)
                    found.append(case)
                    print(f"{comm:<5} {phase:<11} {name}: {case['gone_s']:5.1f} s  {case['said']}", flush=True)
    limits = {"SIGKILL": 10.0, "SIGSTOP": LIMIT_S + 10.0}
    good = all(case["gone_s"] <= limits[case["signal"]] and case["names_rank_1"] for case in found)
    if "out" in given:
        made = {"command": " ".join(["python tests/faults.py", *argv]), "limits_s": limits, "all_good": good, "cases": found}
        Path(given["out"]).write_text(json.dumps(made, indent=1) + "\n")
    sys.exit(0 if good else 1)


def prepare(scratch: Path) -> None:
    """A dataset, and a checkpoint to sample from."""
    home = scratch / "data" / "letters"
    home.mkdir(parents=True)
    letters = bytes(i * i % 13 for i in range(4000))
    for name, part in (("train", letters[:3600]), ("val", letters[3600:])):
        (home / f"{name}.bin").write_bytes(b"".join(letter.to_bytes(2, "little") for letter in part))
    (home / "tokenizer.json").write_text(json.dumps({"kind": "char", "chars": list("abcdefghijklm")}))
    words = [*TRAIN, f"--data_dir={scratch / 'data'}", f"--out_dir={scratch / 'weights'}", "--max_iters=4"]
    subprocess.run([sys.executable, "train_tp.py", *words], cwd=ROOT, check=True, capture_output=True)


def command(scratch: Path, phase: str, comm: str, out: Path) -> list[str]:
    if phase in SAMPLING:
        words = [f"--init_from={scratch / 'weights'}", "--prompt=abc", "--max_new_tokens=400", "--device=cpu", "--threads=1"]
        words += ["--compile=True", "--overflow=stop"] * (phase == "replay")
    else:
        words = [*TRAIN, f"--data_dir={scratch / 'data'}", f"--out_dir={out}"]
    words += ["--device=cuda"] * (comm == "nccl")
    return [*words, f"--comm={comm}", f"--comm_timeout={LIMIT_S:g}"]


def strike(scratch: Path, phase: str, name: str, comm: str, ranks: int, *more: str) -> dict[str, Any]:
    """One run with one fault: seconds until all its ranks were gone, and what it said. more: options."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        words = [*command(scratch, phase, comm, Path(place) / "out"), *more]
        with open(Path(place) / "stderr", "w") as log:
            run = subprocess.Popen(
                [sys.executable, *launcher, "rank", place, phase, name, *words],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment(),
            )
            struck = wait_for(Path(place) / "struck", 120)
            pids = [int(path.read_text()) for path in Path(place).glob("pid-*")]
            deadline = struck + LIMIT_S + 40
            while time.time() < deadline and any(map(is_there, pids)):
                time.sleep(0.02)
            gone = time.time() - struck
            status = run.wait(60)
        text = (Path(place) / "stderr").read_text()
    prog = "sample_tp.py: " if phase in SAMPLING else "train_tp.py: "
    said = [line for line in text.splitlines() if line.startswith(prog)]
    line = said[0] if said else ""
    named = len(said) == 1 and any(how in line for how in ("(rank 1 is gone)", "Look at rank 1 first"))
    return {
        "comm": comm, "phase": phase, "signal": name, "ranks": ranks, "gone_s": round(gone, 2), "launcher_status": status,
        "names_rank_1": named, "said": " | ".join(said),
    }  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def wait_for(path: Path, seconds: float) -> float:
    """The time that is written in a file, once it is."""
    end = time.time() + seconds
    while time.time() < end:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return float(text)
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def is_there(pid: int) -> bool:
    """A stopped process is; one that waits for its parent as a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- within a rank --------------------------------------------------------------------------------------------------


def rank(place: Path, phase: str, name: str, argv: list[str]) -> None:
    sys.path[:0] = [str(ROOT)]
    import sample_tp
    import train_tp
    from checkpoints.tensor_file import TensorFile
    from cli.options import SampleOptions, TrainOptions
    from parallel.collectives import Axis
    from parallel.ledger import Ledger
    from parallel.pipeline import Messages, Stage
    from world import entry

    (place / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))

    def fall() -> None:
        scratch = place / ".struck"
        scratch.write_text(f"{time.time()}\n")
        scratch.replace(place / "struck")
        if name == "late":
            time.sleep(60)
        os.kill(os.getpid(), signal.Signals[name])

    account, close, replay, note, calls = Axis.account, TensorFile.close, Ledger.replay, Messages.note, 0
    compute = Stage.forward_one_chunk

    def watched(axis: Axis, op: str, direction: str, *rest: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        doing = axis.ledger.doing
        here = {
            "forward": doing == "step 6" and direction == "forward",
            "backward": doing == "step 6" and axis.line(op, direction)[0].direction == "backward",
            "evaluation": doing == "step 4, evaluation",
            "sampling": calls == 600,
            "save": False,
            "replay": False,
        }
        if here[phase]:
            fall()
        return account(axis, op, direction, *rest, **more)

    def noted(messages: Any, op: str, direction: str, asked: list[Any]) -> list[Any]:
        if asked and messages.axis.ledger.doing == "step 6" and direction == phase and name != "late":
            fall()
        return note(messages, op, direction, asked)

    def computed(stage: Any, *args: Any, **more: Any) -> Any:
        if stage.messages.axis.ledger.doing == "step 6" and name == "late":
            stage.around = lambda micro: fall()
        return compute(stage, *args, **more)

    def replayed(ledger: Ledger, *what: Any) -> None:
        nonlocal calls
        calls += 1
        if phase == "replay" and calls == 5:
            fall()
        replay(ledger, *what)

    def closed(file: TensorFile) -> Any:
        if phase == "save" and "step-000008" in str(file.path):
            fall()
        return close(file)

    if os.environ["RANK"] == "1" and not (place / "struck").exists():
        Axis.account = watched  # type: ignore[method-assign, assignment]
        TensorFile.close = closed  # type: ignore[method-assign, assignment]
        Ledger.replay = replayed  # type: ignore[method-assign, assignment]
        Messages.note = noted  # type: ignore[method-assign, assignment]
        Stage.forward_one_chunk = computed  # type: ignore[method-assign, assignment]
    runs: dict[bool, tuple[Any, Callable[..., None], str]] = {
        True: (SampleOptions, sample_tp.main, "sample_tp.py"),
        False: (TrainOptions, train_tp.main, "train_tp.py"),
    }
    sys.argv = [sys.argv[0], *argv]
    entry.run(*runs[phase in SAMPLING])


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
    else:
        main(sys.argv[1:])

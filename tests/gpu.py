"""What is true on this GPU: right first, then how fast. One card, at most nine minutes.

    python tests/gpu.py --minutes=9 --out=DIR [--text=tinyshakespeare.txt]
    python tests/gpu.py --page=DIR

Each step is a process of its own with a time limit, so one that hangs or dies costs no other. A finding
is a line of DIR/gpu.jsonl as soon as it is made. --page writes the tables of docs/gpu.md from those
lines. --device=cpu --tiny=1 goes through the same code without a GPU, and measures nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu.md"
# by worth, with a limit in seconds; the steps of one line run side by side, as nothing is timed there
STAGES = (
    (("facts", 45),),
    (("logits", 120), ("marked", 125), ("ranks", 100)),
    (("symmetric", 45),),
    (("decode_xl", 135),),
    (("train", 110),),
    (("characters", 170),),
    (("decode", 75),),
    (("train_xl", 110),),
)
LEAST_S = 15.0  # with less a step is not begun


def arguments() -> argparse.Namespace:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    ask.add_argument("--out", default="out/gpu", type=Path)
    ask.add_argument("--minutes", type=float, default=9.0)
    ask.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    ask.add_argument("--tiny", type=int, default=0, help="1: models of a few numbers")
    ask.add_argument("--patience", type=float, default=1.0, help="limits times this")
    ask.add_argument("--only", default="", help="steps with commas between")
    ask.add_argument("--text", default="", help="tiny Shakespeare, for nanoGPT's character recipe")
    ask.add_argument(
        "--page", default="", help="a DIR whose lines become the tables of docs/gpu.md"
    )
    return ask.parse_args()


def measure(asked: argparse.Namespace) -> bool:
    """Run the steps; False where one did not come to its end."""
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "gpu.jsonl").unlink(missing_ok=True)
    end, report, wanted = (
        time.monotonic() + 60 * asked.minutes,
        [],
        set(filter(None, asked.only.split(","))),
    )
    with open(asked.out / "log.txt", "w") as log:
        for stage in STAGES:
            chosen = [step for step in stage if not wanted or step[0] in wanted]
            for made in run_stage(asked, chosen, end, log):
                report.append(made)
                print(json.dumps(made), flush=True)
                (asked.out / "steps.json").write_text(json.dumps(report, indent=1) + "\n")
    return all(made["end"] == 0 for made in report)


def run_stage(
    asked: argparse.Namespace, stage: list[tuple[str, int]], end: float, log: Any
) -> Iterable[dict[str, Any]]:
    """Start the steps of one stage together; for each, how it ended and its seconds."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "4" if asked.device == "cuda" else "1",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    running = []
    for name, limit in stage:
        seconds = min(limit * asked.patience, end - time.monotonic() - 3)
        if seconds < LEAST_S:
            yield {"step": name, "end": "no time left", "s": 0}
            continue
        words = [
            f"--{key}={getattr(asked, key)}"
            for key in ("out", "device", "tiny", "patience", "text")
        ]
        command = [sys.executable, str(ROOT / "tests" / "gpu_steps.py"), name, *words]
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=log, start_new_session=True
        )
        running.append((name, child, time.monotonic(), seconds))
    for name, child, began, seconds in running:
        status: int | str = "limit"
        with suppress(subprocess.TimeoutExpired):
            status = child.wait(max(1.0, began + seconds - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # whatever the step has started ends with it
        child.wait()
        yield {"step": name, "end": status, "s": round(time.monotonic() - began, 1)}


# --- the page -------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list):
        return "; ".join(map(shown, value))
    return str(value).replace("|", "\\|").replace("\n", " ")[:160]


def tables(directory: Path) -> str:
    """A table for each step: a line for each finding, all its figures in words."""
    lines = map(json.loads, (directory / "gpu.jsonl").read_text().splitlines())
    steps: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        steps.setdefault(line.pop("step"), []).append(line)
    ends = {made["step"]: made for made in json.loads((directory / "steps.json").read_text())}
    text = []
    for step, found in steps.items():
        made = ends.get(step, {})
        text += [f"### {step}", "", f"Ended with {made.get('end')} after {made.get('s')} s.", ""]
        text += ["| what | found |", "|---|---|"]
        for line in found:
            what = line.pop("what")
            figures = ", ".join(f"{key} {shown(value)}" for key, value in line.items())
            text.append(f"| {shown(what)} | {figures} |")
        text.append("")
    return "\n".join(text)


def write_page(directory: Path, page: Path = PAGE) -> None:
    """Put the tables between the page's two marks."""
    begin, end = "<!-- measured -->\n", "<!-- end -->"
    head, _, rest = page.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}\n{tables(directory)}\n{end}{tail}")


if __name__ == "__main__":
    asked = arguments()
    if asked.page:
        write_page(Path(asked.page))
    else:
        sys.exit(0 if measure(asked) else 1)

"""metrics.jsonl of a training run: cut on resume, read for the report."""

import json
import mmap
import os
from pathlib import Path
from typing import Any

CURVE_POINTS = 200  # the most iterations of which a report has the loss


def cut_metrics(metrics: Path, iter_num: int) -> None:
    """Keep the lines of iterations before iter_num. Reads from the end, as there may be millions of
    lines; also cuts one that a kill left half written."""
    with open(metrics, "a+b" if iter_num else "w+b") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            while end:
                start = text.rfind(b"\n", 0, end - 1) + 1
                if text[end - 1 : end] == b"\n" and 0 <= iteration_of(text[start:end]) < iter_num:
                    break
                end = start
        file.truncate(end)


def iteration_of(line: bytes) -> int:
    """The iteration of a line of metrics.jsonl; -1 if the line is damaged."""
    try:
        number = json.loads(line)["iter"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return number if type(number) is int else -1


def loss_curve(metrics: Path) -> dict[str, list[Any]]:
    """All evaluations, and the loss at CURVE_POINTS iterations or fewer, evenly spread."""
    with open(metrics if metrics.is_file() else os.devnull, "rb") as lines:
        read = [json.loads(line) for line in lines if iteration_of(line) >= 0]
    trained = [line for line in read if "loss" in line]
    trained = trained[:: max(1, -(-len(trained) // CURVE_POINTS))]
    measured = [line for line in read if "val_loss" in line]
    curve = {key: [line[key] for line in trained] for key in ("iter", "loss")}
    return curve | {
        "val_iter": [line["iter"] for line in measured],
        "val_loss": [line["val_loss"] for line in measured],
    }

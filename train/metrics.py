"""metrics.jsonl of a training run: cut on resume, read for the report."""

import json
import mmap
import os
from pathlib import Path
from typing import Any

CURVE_POINTS = 200  # iterations of which a report has the loss, at most


def cut_metrics(metrics: Path, iter_num: int) -> None:
    """Leave the lines of iterations before iter_num. The others are the last ones, and only those are read: there may be
    millions. So is one that a kill has left half written."""
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


def iteration_of(line: str | bytes) -> int:
    """Of a line of metrics.jsonl; -1 for one that is none, such as a kill leaves half written."""
    try:
        number = json.loads(line)["iter"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return number if type(number) is int else -1


def loss_curve(metrics: Path) -> dict[str, list[Any]]:
    """What a report has of metrics.jsonl: the loss at CURVE_POINTS iterations or fewer, spread evenly, and all evaluations'."""
    with open(metrics if metrics.is_file() else os.devnull, "rb") as lines:
        read = [json.loads(line) for line in lines if iteration_of(line) >= 0]
    trained = [line for line in read if "loss" in line]
    trained = trained[:: max(1, -(-len(trained) // CURVE_POINTS))]
    measured = [line for line in read if "val_loss" in line]
    return {
        "iter": [line["iter"] for line in trained],
        "loss": [line["loss"] for line in trained],
        "val_iter": [line["iter"] for line in measured],
        "val_loss": [line["val_loss"] for line in measured],
    }

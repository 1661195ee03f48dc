"""The curve: perplexity lost against sync points left, of any number of scans and repairs, in one picture."""

from pathlib import Path
from typing import Any

from base.errors import UserError
from report import report

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def read_reports(paths: list[Path]) -> list[dict[str, Any]]:
    """Reports of scan and repair, JSON or pages. UserError for a file that is none."""
    return [_opened(path) for path in paths]


def draw(made: list[dict[str, Any]], path: Path) -> None:
    """A line for each report of a scan, and for each of a repair an arrow from the loss before it to the loss after.

    One colour for each number of ranks; weights that were grouped are dashed.
    """
    plt = report.pyplot()
    ranks = sorted({found["tp"] for found in made})
    colours = {tp: COLOURS[i % len(COLOURS)] for i, tp in enumerate(ranks)}
    figure, plane = plt.subplots(figsize=(8, 5))
    for found in made:
        tp, grouped = found["tp"], "grouped" in found["source"]
        name = f"tp {tp}{', grouped' if grouped else ''}"
        if found["what"] == "scan":
            points = [found["plain"], *found["curve"]]
            line = {"color": colours[tp], "linestyle": "--" if grouped else "-", "marker": "o", "markersize": 4}
            plane.plot([p["points"] for p in points], [100 * p["loss"] for p in points], label=f"{name}, zero-shot", **line)
        else:
            evidence = found["evidence"]
            before, after = (100 * (evidence[key] / evidence["dense"] - 1) for key in ("before", "after"))
            place = {"xytext": (found["points"], before), "arrowprops": {"arrowstyle": "-|>", "color": colours[tp], "lw": 1.5}}
            plane.annotate("", (found["points"], after), **place)
            plane.plot(found["points"], after, marker="*", markersize=13, color=colours[tp], linestyle="none",
                       label=f"{name}, {found['sync']} repaired: {after:+.2f} %")  # fmt: skip
    # linear where repairs end, logarithmic where schedules fail
    plane.set_yscale("symlog", linthresh=1.0)
    plane.set_yticks(ticks := [0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200], [f"{tick:g}" for tick in ticks])
    plane.set(ylim=(-0.2, 300), xlabel="sync points in the forward pass", ylabel="perplexity lost, %")
    plane.invert_xaxis()
    plane.grid(alpha=0.25)
    plane.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    report.write_figure(path, figure)


def _opened(path: Path) -> dict[str, Any]:
    found = report.read(path)
    if not isinstance(found, dict) or found.get("entry") != "drop_syncs" or found.get("what") not in ("scan", "repair"):
        raise UserError(f"{path} is no report of drop_syncs.py scan or repair (--report=FILE writes one).")
    return found

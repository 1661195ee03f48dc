"""One transformer layer as the ranks of a tensor-parallel group see it, in words and in a terminal.

`layer` describes it, `lines` draws it with characters, svg.py draws it on a page.
"""

import textwrap
from collections import Counter
from dataclasses import dataclass

from base.numbers import plural
from plan.messages import MEGATRON, SEQUENCE, exchanges
from plan.partition import Partition
from plan.schedule import KINDS, Schedule

MOST = 3  # ranks that are drawn; of more, the first two and the last
# Columns of a terminal: the picture's width, the first column of notes, the width of all.
WIDE, NOTES, PAGE = 43, 46, 80
# By the number of boxes side by side: columns of a box and of the gap between two.
BOXES = {1: (17, 0), 2: (17, 9), 3: (13, 2), 4: (13, 1)}
PART_NOTES = {"column": "column-parallel", "middle": "own part only",
              "row": "row-parallel: a partial sum"}
ASCII = str.maketrans("│─┌┐└┘┬┴┼━╌·•○–…×", "|-+++++++=-.*o-.x")


@dataclass(frozen=True)
class Shared:
    """Work that every rank repeats, or (stream) the residual stream, of which all have a copy."""

    name: str
    note: str = ""
    stream: bool = False


@dataclass(frozen=True)
class Sharded:
    """The work of each rank on its own heads or hidden units.

    parts: (name, kind), kind is column (a column-parallel layer), middle or row (row-parallel).
    shares: for each rank, its heads or its number of units.
    """

    parts: tuple[tuple[str, str], ...]
    shares: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """A place where ranks communicate.

    forward, backward: the collectives of that pass. times: in how many of the model's `layers`
    layers; the schedule may drop some. sync: the stream is equal on all ranks after it. later: when
    it is waited for under a delay.
    """

    name: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    times: int
    layers: int
    sync: bool = False
    later: str = ""

    @property
    def passes(self) -> dict[str, tuple[str, ...]]:
        passes = {"forward": self.forward, "backward": self.backward}
        return {name: tuple(op.replace("_", "-") for op in ops)
                for name, ops in passes.items() if ops}

    @property
    def words(self) -> list[str]:
        """A line for each pass, and one if the message is left out in some layers."""
        lines = [f"{name}: {', '.join(ops)}" for name, ops in self.passes.items()]
        if self.times == 0:
            return [f"left out ({lines[0]})"]
        lines += [f"in {self.times} of {self.layers} layers"] * (self.times < self.layers)
        return lines + [self.later] * bool(self.later)


Place = Shared | Sharded | Message


@dataclass(frozen=True)
class Layer:
    """halves: for attention and mlp, the places from the residual stream back to it."""

    split: Partition
    schedule: Schedule
    sequence: bool
    title: str
    halves: dict[str, tuple[Place, ...]]


def layer(split: Partition, schedule: Schedule, sequence: bool = False) -> Layer:
    """The description. sequence: with sequence parallelism, which has no effect on one rank."""
    alone, ranks, n = split.tp == 1, range(split.tp), split.n_layer
    sequence = sequence and not alone
    start, end = SEQUENCE if sequence else MEGATRON
    times = Counter(exchanges(schedule, sequence))
    late = Counter(kind for _, kind, _, sync in schedule.walk() if schedule.delay and not sync)
    gap = f"{plural(schedule.delay, 'sub-block')} later"
    names = ("gather", "scatter") if sequence else ("f", "g")
    tokens, owner = (f"T/{split.tp}", "own tokens") if sequence else ("T", "on every rank")
    stream = Shared("x", f"[B, {tokens}, {split.n_embd}], {owner}", stream=True)
    heads = [f"head {lo}" if hi - lo == 1 else f"heads {lo}–{hi - 1}"
             for lo, hi in map(split.heads, ranks)]
    units = [f"{hi - lo} units" for lo, hi in map(split.columns, ranks)]
    work = {"attention": (("c_attn", "column"), ("attention", "middle"), ("c_proj", "row")),
            "mlp": (("c_fc", "column"), ("activation", "middle"), ("c_proj", "row"))}
    halves = {}
    for kind, norm, shares in zip(KINDS, ("ln_1", "ln_2"), (heads, units), strict=True):
        places: list[Place] = [Sharded(work[kind], tuple(shares))]
        if not alone:
            first = Message(names[0], *start, times[kind, start], n)
            later = f"waited for {gap} in {late[kind]} of {n} layers" if late[kind] else ""
            last = Message(names[1], *end, times[kind, end], n, late[kind] < n, later)
            places = [first, *places, last]
        whole = alone or times[kind, end] and late[kind] < n
        added = Shared("+ bias + x", "" if whole else "each rank its own version of x")
        halves[kind] = (stream, Shared(norm), *places, added)
    points = "nothing is communicated" if alone else f"{schedule.points} of {2 * n} sync points"
    if late and not alone:
        points += f", the other sums are waited for {gap}"
    title = (f"a layer of {n} on {plural(split.tp, 'rank')}: {split.n_head} heads, {split.n_embd} "
             f"wide{', split over the sequence' * sequence}; {points}")
    return Layer(split, schedule, sequence, title, halves)


def drawn_ranks(tp: int) -> list[int | None]:
    """The ranks that are drawn, None for those left out in between."""
    return list(range(tp)) if tp <= MOST else [0, 1, None, tp - 1]


# --- in a terminal ----------------------------------------------------------------------------


def lines(layer: Layer) -> list[str]:
    """The picture, in at most 80 columns."""
    drawn = [*textwrap.wrap(layer.title, PAGE), ""]
    for places in layer.halves.values():
        for place in places:
            drawn += _place(place, layer.split.tp)
    return drawn + [_row("x"), "", *_strip(layer)]


def fit(text: str, encoding: str | None) -> str:
    """The text, in ASCII if the reader's encoding (None: not known) lacks its lines."""
    try:
        text.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return text.translate(ASCII).encode("ascii", "replace").decode()
    return text


def _strip(layer: Layer) -> list[str]:
    """The sync points of all layers: after attention, after the MLP."""
    if layer.split.tp == 1:
        return []
    marks = "".join("•" if sync else "○" for sync in layer.schedule.syncs)
    cells = [f"{i:>3} {marks[2 * i : 2 * i + 2]}" for i in range(layer.split.n_layer)]
    rows = ["".join(cells[i : i + 12]) for i in range(0, len(cells), 12)]
    other = "delayed" if layer.schedule.delay else "left out"
    return [f"sync points after attention and MLP, layer by layer (• is there, ○ {other})", *rows]


def _row(picture: str, note: str = "") -> str:
    return f"{picture.center(WIDE):<{NOTES}}{note}".rstrip()


def _place(place: Place, tp: int) -> list[str]:
    if isinstance(place, Sharded):
        return _sharded(place, tp)
    if isinstance(place, Shared):
        return [_row(place.name, place.note), _row("│")]
    words = place.words + ["SYNC POINT"] * bool(place.sync and place.times)
    wrapped = [textwrap.wrap(text, PAGE - NOTES, break_on_hyphens=False) for text in words]
    first, *rest = (line for lines in wrapped for line in lines)
    rule = ("━" if place.times else "╌") * (WIDE // 2 - 3 - len(place.name) // 2)
    return [_row(f"{rule} {place.name} {rule}", first), *(_row("│", line) for line in rest or [""])]


def _sharded(place: Sharded, tp: int) -> list[str]:
    """A box for each rank, with a fork above and a join below."""
    ranks = drawn_ranks(tp)
    width, gap = BOXES[len(ranks)]

    def across(cells: list[str]) -> str:
        cells = ["·" if rank is None else cell for rank, cell in zip(ranks, cells, strict=True)]
        return (" " * gap).join(cells).center(WIDE)

    def each(text: str) -> str:
        return across([text] * len(ranks))

    texts = [f"rank {rank}" for rank in ranks], [place.shares[rank or 0] for rank in ranks]
    drawn = [
        _branch(each("┬".center(width)), "┌┐┴"),
        each("┌" + "┴".center(width - 2, "─") + "┐"),
        *(across([f"│{text:^{width - 2}}│" for text in row]) for row in texts),
        *(_row(each(f"│{name:^{width - 2}}│"), PART_NOTES[kind]) for name, kind in place.parts),
        each("└" + "┬".center(width - 2, "─") + "┘"),
        _branch(each("┴".center(width)), "└┘┬")]
    return [row.rstrip() for row in (drawn if tp > 1 else drawn[1:-1])]


def _branch(ends: str, corners: str) -> str:
    """A line from the trunk to the boxes' middles. corners: its left and right, and the trunk's."""
    line = list(ends)
    first, last, trunk = len(ends) - len(ends.lstrip()), len(ends.rstrip()) - 1, WIDE // 2
    line[first : last + 1] = ends[first : last + 1].replace(" ", "─").replace("·", "─")
    line[first], line[last] = corners[0], corners[1]
    line[trunk] = corners[2] if line[trunk] == "─" else "┼"
    return "".join(line)

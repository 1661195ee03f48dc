"""One transformer layer as the ranks of a tensor-parallel group see it: what each of them does, and where they speak.

`layer` is the description; it is drawn in a terminal here (`lines`) and on a page in drawing.py.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from base.numbers import plural
from plan.partition import Partition
from plan.schedule import KINDS, Schedule

MOST = 3  # ranks that are drawn; of more the first two and the last
WIDE, NOTES, PAGE = 43, 46, 80  # in a terminal: columns of the picture, where what is said of it begins, and all there are
BOXES = {1: (17, 0), 2: (17, 9), 3: (13, 2), 4: (13, 1)}  # by how many stand side by side: columns of a box, and between two
KINDS_OF_PART = {"column": "column-parallel", "middle": "own part only", "row": "row-parallel: a partial sum"}
ASCII = str.maketrans("│─┌┐└┘┬┴┼━╌·•○–…×", "|-+++++++=-.*o-.x")


@dataclass(frozen=True)
class Alike:
    """What every rank does alike, or the stream itself, which they all have."""

    name: str
    note: str = ""
    stream: bool = False


@dataclass(frozen=True)
class Own:
    """What each rank does with its own heads or hidden units. parts: (name, kind), kind being column (a column-parallel layer),
    middle or row (a row-parallel layer); shares: what of it each rank has."""

    parts: tuple[tuple[str, str], ...]
    shares: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """A place where ranks speak to each other. forward, backward: in which collectives; times: in how many of the model's
    `layers` layers they do, where the schedule leaves some out. sync: whether the stream is whole again after it."""

    name: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    times: int
    layers: int
    sync: bool = False

    @property
    def ways(self) -> list[tuple[str, tuple[str, ...]]]:
        """(pass, collectives) for each pass in which something is said."""
        return [(way, ops) for way, ops in (("forward", self.forward), ("backward", self.backward)) if ops]

    @property
    def words(self) -> list[str]:
        """What is said here, a line for each pass; where it is left out, or not everywhere, that too."""
        said = [f"{way}: {', '.join(ops)}" for way, ops in self.ways]
        if self.times == 0:
            return [f"left out ({said[0]})"]
        return said + ([f"in {self.times} of {self.layers} layers"] if self.times < self.layers else [])


Place = Alike | Own | Message


@dataclass(frozen=True)
class Layer:
    """A layer of the model `split` under a schedule. halves: for attention and mlp the places from the stream to the stream."""

    split: Partition
    schedule: Schedule
    sequence: bool
    halves: dict[str, tuple[Place, ...]]

    @property
    def title(self) -> str:
        s, points = self.split, self.schedule.points
        spoken = f"{points} of {2 * s.n_layer} sync points" if s.tp > 1 else "nothing is communicated"
        sequence = ", split over the sequence" if self.sequence else ""
        return f"a layer of {s.n_layer} on {plural(s.tp, 'rank')}: {s.n_head} heads, {s.n_embd} wide{sequence}; {spoken}"


def layer(split: Partition, schedule: Schedule, sequence: bool = False) -> Layer:
    """The description. sequence: with sequence parallelism, which a single rank has not."""
    alone, ranks, n = split.tp == 1, range(split.tp), split.n_layer
    sequence = sequence and not alone
    after = {kind: [schedule.syncs[2 * i + k] for i in range(n)] for k, kind in enumerate(KINDS)}
    before = {"attention": [True, *after["mlp"][:-1]], "mlp": after["attention"]}  # a run's backward all-reduce is at its start
    tokens = f"T/{split.tp}" if sequence else "T"
    shape = f"[B, {tokens}, {split.n_embd}]"
    whose = "own tokens" if sequence else "on every rank"
    heads = [f"head {lo}" if hi - lo == 1 else f"heads {lo}–{hi - 1}" for lo, hi in map(split.heads, ranks)]
    units = [f"{hi - lo} units" for lo, hi in map(split.columns, ranks)]
    owns = {
        "attention": Own((("c_attn", "column"), ("attention", "middle"), ("c_proj", "row")), tuple(heads)),
        "mlp": Own((("c_fc", "column"), ("gelu", "middle"), ("c_proj", "row")), tuple(units)),
    }
    halves = {}
    for kind, norm in zip(KINDS, ("ln_1", "ln_2"), strict=True):
        places: list[Place] = [Alike("x", f"{shape}, {whose}", stream=True), Alike(norm)]
        if sequence:
            places.append(Message("gather", ("all-gather",), ("reduce-scatter", "all-gather"), n, n))
            places += [owns[kind], Message("scatter", ("reduce-scatter",), ("all-gather",), n, n, sync=True)]
        elif alone:
            places.append(owns[kind])
        else:
            places.append(Message("f", (), ("all-reduce",), sum(before[kind]), n))
            places += [owns[kind], Message("g", ("all-reduce",), (), sum(after[kind]), n, sync=True)]
        whole = alone or sequence or any(after[kind])
        places.append(Alike("+ bias + x", "" if whole else "each rank its own version of x"))
        halves[kind] = tuple(places)
    return Layer(split, schedule, sequence, halves)


def seen(tp: int) -> list[int | None]:
    """The ranks that are drawn, None for those left out in between."""
    return list(range(tp)) if tp <= MOST else [0, 1, None, tp - 1]


# --- in a terminal --------------------------------------------------------------------------------------------------


def lines(made: Layer) -> list[str]:
    """The picture, in at most 80 columns."""
    drawn = [*textwrap.wrap(made.title, PAGE), ""]
    for places in made.halves.values():
        for place in places:
            drawn += _own(place, made.split.tp) if isinstance(place, Own) else _place(place)
    return drawn + [_row("x", ""), "", *strip(made)]


def strip(made: Layer) -> list[str]:
    """All layers' sync points: after attention, after the MLP."""
    if made.split.tp == 1:
        return []
    marks = "".join("•" if sync else "○" for sync in made.schedule.syncs)
    cells = [f"{i:>3} {marks[2 * i : 2 * i + 2]}" for i in range(made.split.n_layer)]
    rows = ["".join(cells[i : i + 12]) for i in range(0, len(cells), 12)]
    return ["sync points after attention and MLP, layer by layer (• is there, ○ left out)", *rows]


def fit(text: str, encoding: str | None) -> str:
    """The text, in ASCII where the encoding of who will read it (None: not known) has no such lines."""
    try:
        text.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return text.translate(ASCII).encode("ascii", "replace").decode()
    return text


def _row(picture: str, note: str) -> str:
    return f"{picture.center(WIDE):<{NOTES}}{note}".rstrip()


def _place(place: Alike | Message) -> list[str]:
    if isinstance(place, Alike):
        return [_row(place.name, place.note), _row("│", "")]
    words = place.words + (["SYNC POINT"] if place.sync and place.times else [])
    first, *rest = (line for text in words for line in textwrap.wrap(text, PAGE - NOTES, break_on_hyphens=False))
    rule = ("━" if place.times else "╌") * (WIDE // 2 - 3 - len(place.name) // 2)
    return [_row(f"{rule} {place.name} {rule}", first), *(_row("│", line) for line in rest or [""])]


def _own(own: Own, tp: int) -> Iterator[str]:
    """A box for each rank, with a fork above and a join below."""
    ranks = seen(tp)
    width, gap = BOXES[len(ranks)]

    def across(cells: list[str], note: str = "") -> str:
        return _row((" " * gap).join("·" if rank is None else cell for rank, cell in zip(ranks, cells, strict=True)), note)

    def each(text: str, note: str = "") -> str:
        return across([text] * len(ranks), note)

    centres = [i for i, char in enumerate(each("┴".center(width))) if char == "┴"]
    if len(centres) > 1:
        yield _branch(centres, "┌", "┬", "┐", "┴")
    yield each("┌" + "┴".center(width - 2, "─") + "┐")
    for texts in ([f"rank {rank}" for rank in ranks], [own.shares[rank or 0] for rank in ranks]):
        yield across([f"│{text:^{width - 2}}│" for text in texts])
    for name, kind in own.parts:
        yield each(f"│{name:^{width - 2}}│", KINDS_OF_PART[kind])
    yield each("└" + "┬".center(width - 2, "─") + "┘")
    if len(centres) > 1:
        yield _branch(centres, "└", "┴", "┘", "┬")


def _branch(centres: list[int], left: str, middle: str, right: str, trunk: str) -> str:
    """A line from the trunk to each rank's box, or back."""
    row = [" "] * WIDE
    row[centres[0] : centres[-1] + 1] = "─" * (centres[-1] + 1 - centres[0])
    for i in centres:
        row[i] = middle
    row[centres[0]], row[centres[-1]] = left, right
    row[WIDE // 2] = "┼" if WIDE // 2 in centres else trunk
    return "".join(row).rstrip()

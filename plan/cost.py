"""What a step takes, reckoned from what it reads, multiplies and says: pure arithmetic, no torch.

Computing after the roofline (Williams, Waterman and Patterson, CACM 52(4), 2009): a product takes as long as its arithmetic
at the peak, or as its weights at the memory's bandwidth, whichever is longer. Messages after Hockney (Parallel Computing 20,
1994): m bytes from one rank to another take alpha + m beta; a collective is as many of them, one after the other, as its
algorithm has rounds (Thakur, Rabenseifner and Gropp, IJHPCA 19, 2005; the ring: Patarasuk and Yuan, JPDC 69, 2009). Beyond
that every sub-block costs a fixed time, `overhead`, for what is not in these terms: kernels launched, LayerNorm, calls.

What is read and multiplied follows from the partition table, what is said from the schedule of sync points, as
tp_model.py, loss.py and generation.py do it. A step is as fast as its slowest rank: the first of a tp group, which has the
longest run of heads, columns and vocabulary rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from plan.memory import FLOAT, ID, Training
from plan.partition import Partition
from plan.schedule import Schedule

MODES = ("decode", "prefill", "train")
# Bytes that a step of AdamW reads and writes for each parameter: the gradient's norm and its clipping (12), then weight,
# gradient and two moments read, weight and moments written (28). The tied table has two gradients, cleared and added (20).
OPTIMIZER, TIED = 10 * FLOAT, 5 * FLOAT
BACKWARD = 2  # as many numbers and products in the backward pass as in the forward pass
PASSES = 6  # over the logits of a chunk: largest, difference, exponential, sum, scaling, and the target's


def ring_bytes(nbytes: float, size: int) -> float:
    """What each rank sends in a ring all-reduce of a message of nbytes over `size` ranks: 2 (N - 1) / N of it."""
    return 2 * (size - 1) / size * nbytes


# --- hardware -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """What joins the ranks. alpha: seconds of a message of no bytes; beta: seconds a byte (Hockney). one_shot: every rank can
    read every other's memory, so all may write, meet and read at once, in two rounds however many they are."""

    alpha: float
    beta: float
    one_shot: bool = False

    def seconds(self, op: str, nbytes: float, size: int) -> float:
        """A collective of a whole message of nbytes over `size` ranks, by the fastest of the algorithms below.

        all_reduce: ring, 2 (N - 1) rounds of m / N; tree, 2 log2 N of m; one shot, 2 rounds, in which a rank reads the
        N - 1 others' m. all_gather and reduce_scatter are one half of a ring; broadcast is one half of a tree.
        """
        if size == 1:
            return 0.0
        depth = (size - 1).bit_length()
        ring = (size - 1) * self.alpha + ring_bytes(nbytes, size) / 2 * self.beta
        tree = depth * (self.alpha + nbytes * self.beta)
        ways = {"all_reduce": [2 * ring, 2 * tree], "broadcast": [tree]}.get(op, [ring])
        if self.one_shot:
            others = (size - 1) * (nbytes if op == "all_reduce" else nbytes / size)
            ways.append(2 * self.alpha + (nbytes if op == "broadcast" else others) * self.beta)
        return min(ways)


@dataclass(frozen=True)
class Hardware:
    """What a rank runs on. memory: bytes a second that it reads while all ranks do; peak: flop a second of its matrix products;
    overhead: seconds of a sub-block beyond its products and messages. attend: flop a second of attention's kernel, 0 = peak;
    touch: seconds for each number of what is done number by number, 0 = as long as reading and writing it; widening: 8-bit
    weights a second that it can multiply with, 0 where reading them takes longer. capacity: bytes of its memory, 0 where
    nobody asks."""

    name: str
    memory: float
    peak: float
    overhead: float
    link: Link
    attend: float = 0.0
    touch: float = 0.0
    widening: float = 0.0
    capacity: float = 0.0


# --- what a step does -----------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """A collective. told: the bytes that the ledger is told of; whole: those of the whole message."""

    block: str
    direction: str
    op: str
    told: int
    whole: int


@dataclass(frozen=True)
class Seconds:
    """Where a step's time goes. weights: products that wait for the memory; compute: products that do not; attention: scores,
    values and the cache; elementwise: LayerNorm, GELU, biases, sums, the loss; communication; overhead."""

    weights: float = 0.0
    compute: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    communication: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def share(self) -> float:
        """The part of it in communication."""
        return self.communication / self.total

    def scaled(self, times: int) -> "Seconds":
        return Seconds(*(times * getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Step:
    """One step as its clock sees it: a token for each row (decode), the reading of a prompt and the choice of a first token
    (prefill), or an iteration of one micro-batch with AdamW's step (train).

    rows: sequences. tokens: of each, read at once (decode: 1). past: tokens in the cache before them. width: bytes of a
    number in the products; where it is 2 in training, the residual stream has 4. int8: weights of one byte (not to train).
    logit_rows: rows whose logits exist at a time (train). candidates: tokens that a rank proposes (1 is greedy).
    """

    split: Partition
    schedule: Schedule
    mode: str
    rows: int = 1
    tokens: int = 1
    past: int = 0
    width: int = FLOAT
    int8: bool = False
    sequence_parallel: bool = False
    logit_rows: int = 0
    candidates: int = 1

    # --- work -------------------------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters on the first rank, those of the first layer for all of them: they are alike."""
        return replace(self.split, n_layer=1).local_shapes(0)

    def times(self, name: str) -> int:
        """How many parameters of the model such a one of `shapes` stands for."""
        return self.split.n_layer if ".h." in name else 1

    @property
    def numbers(self) -> int:
        """Numbers in this rank's parameters, padding rows included."""
        return sum(prod(shape) * self.times(name) for name, shape in self.shapes.items())

    @cached_property
    def entries(self) -> list[int]:
        """Entries of the matrices of each sub-block on this rank, in order (each layer has the same), and of the head's."""
        found = []
        for body in ("attn", "mlp"):
            names = (f"transformer.h.0.{body}.c_{way}.weight" for way in ("attn" if body == "attn" else "fc", "proj"))
            found.append(sum(prod(self.shapes[name]) for name in names))
        return found * self.split.n_layer + [prod(self.shapes["transformer.wte.weight"])]

    @property
    def channels(self) -> int:
        """Width of this rank's heads, side by side."""
        lo, hi = self.split.heads(0)
        return (hi - lo) * self.split.head_dim

    def product(self, entries: int, rows: int, hardware: Hardware) -> Seconds:
        """Rows through a matrix of so many entries; in training with both gradients, each a product of the same size."""
        nbytes = entries * (1 if self.int8 else self.width)
        times = 1 + BACKWARD * self.trains
        reading, arithmetic = nbytes / hardware.memory, 2 * rows * entries / hardware.peak
        if self.int8 and hardware.widening:
            reading = max(reading, rows * entries / hardware.widening)
        return Seconds(weights=times * reading) if reading >= arithmetic else Seconds(compute=times * arithmetic)

    def attention(self, hardware: Hardware) -> Seconds:
        """Scores and values of one layer: keys and values read, two products over what is before each token. Its backward pass
        makes the scores again, and four products of the same size."""
        seen = self.past + (self.tokens + 1) / 2  # the mean of what a token looks at
        flops = 4 * self.rows * self.tokens * seen * self.channels * (3.5 if self.trains else 1)
        nbytes = 2 * self.rows * (self.past + self.tokens) * self.channels * self.width
        return Seconds(attention=max(flops / (hardware.attend or hardware.peak), nbytes / hardware.memory))

    def elementwise(self, hardware: Hardware) -> Seconds:
        """What is done number by number to the tokens of a pass: two LayerNorms, two biases and two sums over the stream,
        c_attn's bias, c_fc's and GELU. A decode step's single tokens never leave the caches: that is in the overhead."""
        if self.mode == "decode":
            return Seconds()
        tokens = self.tokens / self.split.tp if self.split_tokens else self.tokens
        lo, hi = self.split.columns(0)
        layer = 6 * tokens * self.split.n_embd + self.tokens * (3 * self.channels + 2 * (hi - lo))
        numbers = self.rows * layer * self.split.n_layer * (1 + BACKWARD * self.trains)
        if self.trains:
            numbers += PASSES * self.rows * self.tokens * self.split.local_vocab
        return Seconds(elementwise=numbers * (hardware.touch or 2 * self.width / hardware.memory))

    def seconds(self, hardware: Hardware) -> Seconds:
        """The step on this hardware."""
        n = self.rows * self.tokens
        found = Seconds(overhead=len(self.entries) * hardware.overhead * (1 + BACKWARD * self.trains))
        found += self.elementwise(hardware)
        layer = self.attention(hardware)
        for entries in self.entries[:2]:
            layer += self.product(entries, n, hardware)
        found += layer.scaled(self.split.n_layer) + self.product(self.entries[-1], n if self.trains else self.rows, hardware)
        if self.trains:
            nbytes = OPTIMIZER * self.numbers + TIED * self.entries[-1]
            found += Seconds(weights=nbytes / hardware.memory)
        said = sum(hardware.link.seconds(message.op, message.whole, self.split.tp) for message in self.messages())
        return found + Seconds(communication=said)

    # --- messages ---------------------------------------------------------------------------------------------------

    def messages(self) -> Iterator[Message]:
        """Every collective of the step on the tp axis, in no particular order."""
        if self.split.tp == 1:
            return
        n, wide = self.rows * self.tokens * self.split.n_embd, FLOAT if self.trains else self.width
        yield from self._pass(n, wide)
        if not self.trains:
            for op, told in (("all_gather", 2 * self.rows * self.candidates * FLOAT), ("broadcast", 2 * self.rows * ID)):
                yield Message("sampling", "step", op, told, told * (self.split.tp if op == "all_gather" else 1))
            return
        for rows in self._chunks():  # of the loss: three numbers a row from each rank
            told = 3 * rows * FLOAT
            yield Message("loss", "forward", "all_gather", told, told * self.split.tp)
        head = "reduce_scatter" if self.split_tokens else "all_reduce"
        yield Message("head", "backward", head, n * wide, n * wide)
        if partial := self._partial():
            yield Message("optimizer", "step", "all_reduce", partial * FLOAT, partial * FLOAT)
        yield Message("optimizer", "step", "all_reduce", FLOAT, FLOAT)  # of the gradient's norm

    @property
    def split_tokens(self) -> bool:
        return self.sequence_parallel and self.split.tp <= self.tokens

    def _pass(self, n: int, wide: int) -> Iterator[Message]:
        """What is said of the stream, n numbers, in the pass and the one back. wide: bytes of one in the stream."""
        ways = ("forward", "backward") if self.trains else ("forward",)
        if not self.split_tokens:
            yield Message("embedding", "forward", "all_reduce", n * wide, n * wide)
            for run in self.schedule.runs():
                yield Message(run[-1][1], "forward", "all_reduce", n * self.width, n * self.width)
                if self.trains:
                    yield Message(run[0][1], "backward", "all_reduce", n * wide, n * wide)
            return
        yield Message("embedding", "forward", "reduce_scatter", n * wide, n * wide)
        yield Message("head", "forward", "all_gather", n * wide, n * wide)
        if self.trains:
            yield Message("embedding", "backward", "all_gather", n * wide, n * wide)
        for _, kind in (sub_block for run in self.schedule.runs() for sub_block in run):
            for way in ways:
                yield Message(kind, way, "all_gather", n * self.width, n * self.width)
                scattered = n * (wide if way == "backward" else self.width)
                yield Message(kind, way, "reduce_scatter", scattered, scattered)
            if self.trains:  # what came into the product, once more, for the weight's gradient
                yield Message(kind, "backward", "all_gather", n * self.width, n * self.width)

    def _chunks(self) -> Iterator[int]:
        n = self.rows * self.tokens
        yield from (min(self.logit_rows, n - first) for first in range(0, n, self.logit_rows))

    def _partial(self) -> int:
        """Numbers in the gradients of which a rank has a part only, see partial_gradients of train/gradients.py."""
        C, vectors = self.split.n_embd, 2 if self.split.bias else 1
        if self.split_tokens:
            rules = replace(self.split, n_layer=1).rules
            return sum(prod(shape) * self.times(name) for name, shape in self.shapes.items() if rules[name].dim is None)
        runs = [run for run in self.schedule.runs() if len(run) > 1]
        return sum(len(run) * vectors * C + (len(run) - 1) * C * self.split.bias for run in runs)

    # --- room -------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Bytes of the weights on this rank, and of the keys and values of its rows; in training the peak that memory.py
        reckons for a GPU."""
        if self.trains:
            sizes = self.split, self.schedule, 1, self.rows, 1, self.rows, self.width
            return Training(*sizes, False, True, self.logit_rows, self.split_tokens).peak
        cache = 2 * self.split.n_layer * self.channels * self.rows * (self.past + self.tokens) * self.width
        if self.int8:  # the table is kept for looking up, too
            return self.numbers + self.entries[-1] * self.width + cache
        return self.numbers * self.width + cache


# --- fitting --------------------------------------------------------------------------------------------------------


def fit_link(times: Iterable[tuple[float, float]], one_shot: bool = False) -> Link:
    """The link between two ranks of which all-reduces of so many bytes took so many seconds: [(bytes, seconds), ...].

    Over two ranks every algorithm is 2 alpha + m beta. Weighted least squares, each residual over the time it is of, so that
    microseconds count as much as milliseconds; neither constant is negative. ValueError with fewer than two sizes.
    """
    points = [(1 / t, m / t) for m, t in times]  # 2 alpha u + beta v = 1 at each, u = 1 / t, v = m / t
    uu, uv, vv = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
    u, v = (sum(p[i] for p in points) for i in (0, 1))
    if len({v / u for u, v in points}) < 2:
        raise ValueError("latency and bandwidth are told apart by messages of two sizes at least")
    determinant = uu * vv - uv * uv
    latency, beta = (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant
    if latency < 0:
        latency, beta = 0.0, v / vv
    if beta < 0:
        latency, beta = u / uu, 0.0
    return Link(latency / 2, beta, one_shot)

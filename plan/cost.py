"""The cost model: the seconds that a step takes, by arithmetic alone. No torch.

Products follow the roofline (Williams, Waterman and Patterson, CACM 52(4), 2009): the longer of
their arithmetic and of reading their weights. Messages follow Hockney (Parallel Computing 20,
1994): m bytes between two ranks take alpha + m beta, and a collective takes as many of them as its
algorithm has rounds (Thakur, Rabenseifner and Gropp, IJHPCA 19, 2005; the ring: Patarasuk and Yuan,
JPDC 69, 2009). A step is as fast as its slowest rank, the first of a tp group: it has the most
heads, columns and vocabulary rows.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from operator import add, attrgetter
from typing import NamedTuple

from plan.link import Link
from plan.memory import FLOAT, ID, Training
from plan.messages import MEGATRON, SEQUENCE, exchanges, partial_gradients
from plan.partition import Partition, length
from plan.schedule import KINDS, Schedule
from plan.stages import Stages

MODES = ("decode", "prefill", "train")
# Bytes a parameter that AdamW's step reads and writes: the gradient's norm and clipping (12), then
# weight, gradient and two moments read, weight and moments written (28). The tied table has two
# gradients, cleared and added (20).
OPTIMIZER, TIED = 10 * FLOAT, 5 * FLOAT
PASSES = 6  # of the loss over a chunk of logits
BUCKET = 25 * 2**20  # bytes of a message of gradients: DistributedDataParallel's


@dataclass(frozen=True)
class Hardware:
    name: str  # of a rank's device
    memory: float  # bytes a second that it reads while all ranks do
    peak: float  # flop a second of matrix products
    overhead: float  # seconds of a sub-block beyond products and messages: kernel launches, calls
    link: Link
    attend: float = 0.0  # flop a second of the attention kernel, 0 = peak
    touch: float = 0.0  # seconds a number of elementwise work, 0 = reading and writing it
    widening: float = 0.0  # int8 weights a second that it multiplies with, 0 = as many as it reads
    capacity: float = 0.0  # bytes of its memory, 0 = unlimited


class Message(NamedTuple):
    block: str
    direction: str
    op: str
    nbytes: int  # as the ledger counts them
    parts: int = 1  # the whole message has parts x nbytes


@dataclass(frozen=True)
class Seconds:  # the parts of a step's time
    weights: float = 0.0  # products that wait for memory
    compute: float = 0.0  # products that do not
    attention: float = 0.0  # scores, values and the cache
    elementwise: float = 0.0  # LayerNorm, GELU, biases, sums, the loss
    communication: float = 0.0  # on the tp axis, and from stage to stage
    overhead: float = 0.0
    bubble: float = 0.0  # a stage waits for its first micro-batch, and after its last
    replicas: float = 0.0  # dp's messages, as far as no work hides them

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def share(self) -> float:
        return self.communication / self.total

    def __mul__(self, times: int) -> "Seconds":
        return Seconds(*(times * value for value in vars(self).values()))

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*map(add, vars(self).values(), vars(other).values()))


@dataclass
class Step:
    """A decode step, the prefill of a prompt with its first new token, or a training iteration."""

    split: Partition
    schedule: Schedule
    mode: str
    rows: int = 1  # sequences
    tokens: int = 1  # read at once, of each sequence (decode: 1)
    past: int = 0  # tokens in the cache before them
    width: int = FLOAT  # bytes of a number in products; in training the residual stream has 4
    int8: bool = False  # weights of one byte (not in training)
    sequence_parallel: bool = False
    logit_rows: int = 0  # rows whose logits exist at a time (train)
    micro_batches: int = 1  # of `rows` sequences in an iteration (train)
    activation_checkpointing: bool = False
    pp: int = 1  # ranks that share the layers (train)
    dp: int = 1  # ranks that share the iteration (train): micro_batches each
    dp_shard: bool = False
    dp_every: int = 0  # local steps from one averaging to the next, of
    dp_groups: int = 1  # this many groups of dp ranks
    has_first: bool = True  # of one stage: whether it is the first, the last
    has_last: bool = True

    def __post_init__(self) -> None:
        self.trains, self.own = self.mode == "train", self.dp // self.dp_groups
        # a backward pass has as many products as two forward
        self.passes = 3 + self.activation_checkpointing if self.trains else 1
        self.split_tokens = self.sequence_parallel and self.split.tp <= self.tokens
        self.channels, layers = length(self.split.channels(0)), self.split.n_layer
        one = replace(self.split, n_layer=1).local_shapes(0).items()  # all layers are alike
        # numbers in this rank's parameters, padding rows included
        ends = self.has_first or self.has_last
        self.numbers = sum(prod(shape) * (layers if ".h." in name else ends) for name, shape in one)
        matrices = [(name, prod(shape)) for name, shape in one if len(shape) == 2]
        parts = (".attn.", ".mlp.", ".wte.")
        *layer, table = (sum(n for name, n in matrices if part in name) for part in parts)
        # of each sub-block's matrices, and of the head's
        self.entries = layer * layers + [table * ends]

    def product(self, entries: int, rows: int, hardware: Hardware) -> Seconds:
        """Rows times a matrix of so many entries; in training its two gradients as well."""
        reading = entries * (1 if self.int8 else self.width) / hardware.memory
        if self.int8 and hardware.widening:
            reading = max(reading, rows * entries / hardware.widening)
        arithmetic = 2 * rows * entries / hardware.peak
        kind = "weights" if reading >= arithmetic else "compute"
        return Seconds(**{kind: self.passes * max(reading, arithmetic)})

    def attention(self, hardware: Hardware) -> Seconds:
        """One layer's products of queries, keys and values, or reading keys and values. A backward
        pass computes the scores again and has four more products."""
        seen = self.past + (self.tokens + 1) / 2  # by a token, on average
        flops = 4 * self.rows * self.tokens * seen * self.channels
        flops *= self.passes + 0.5 if self.trains else 1
        nbytes = 2 * self.rows * (self.past + self.tokens) * self.channels * self.width
        compute = flops / (hardware.attend or hardware.peak)
        return Seconds(attention=max(compute, nbytes / hardware.memory))

    def elementwise(self, hardware: Hardware) -> Seconds:
        """In a layer: two LayerNorms, two biases and two sums over the stream; on this rank's
        columns the biases of c_attn and c_fc, and GELU. The overhead includes a decode step's."""
        if self.mode == "decode":
            return Seconds()
        stream = self.tokens / (self.split.tp if self.split_tokens else 1) * self.split.n_embd
        own = self.tokens * (3 * self.channels + 2 * length(self.split.columns(0)))
        numbers = self.rows * (6 * stream + own) * self.split.n_layer * self.passes
        if self.trains and self.has_last:
            numbers += PASSES * self.rows * self.tokens * self.split.local_vocab
        return Seconds(elementwise=numbers * (hardware.touch or 2 * self.width / hardware.memory))

    def seconds(self, hardware: Hardware) -> Seconds:
        """The step on this hardware."""
        stages = self.stages()
        once = max((stage.once(hardware) for stage, _ in stages), key=attrgetter("total"))
        passes = [(stage.of_pass(hardware), count) for stage, count in stages]
        slowest = max((one for one, _ in passes), key=attrgetter("total"))
        # of 1F1B: the first micro-batch comes through the other stages, the last one goes back
        bubble = sum(one.total * count for one, count in passes) - slowest.total
        numbers = max(stage.numbers for stage, _ in stages)
        replicas = self.replicas(hardware, numbers, slowest.total)
        return once + slowest * self.micro_batches + Seconds(bubble=bubble, replicas=replicas)

    def replicas(self, hardware: Hardware, numbers: int, pass_seconds: float) -> float:
        """Seconds in which dp ranks wait for messages of a stage's gradients or parameters. Without
        stages they overlap the last micro-batch's backward pass, sharded all passes, but for one
        bucket. Those of local steps overlap nothing."""
        stride, link = self.pp * self.split.tp, hardware.link
        count, far = -(-FLOAT * numbers // BUCKET), 0.0
        if self.dp_every:
            mine = FLOAT * numbers / (self.own if self.dp_shard else 1) / count
            far = count * link.seconds("all_reduce", mine, self.dp_groups, stride * self.own)
            far /= self.dp_every
        if self.own == 1:
            return far
        reduce, gather = (count * link.seconds(op, FLOAT * numbers / count, self.own, stride)
                          for op in ("all_reduce", "all_gather"))
        sent, hidden = reduce, 2 / 3 * pass_seconds
        if self.dp_shard:  # parameters for each pass, and a reduce-scatter at the end
            sent, hidden = gather * (2 * self.micro_batches + 1), self.micro_batches * pass_seconds
        if self.pp > 1:
            sent, hidden = 2 * gather, 0.0
        return far + max(sent - hidden, sent / count)

    def stages(self) -> list[tuple["Step", int]]:
        """The stages of a pipeline, and how many are alike; itself if there is one."""
        if self.pp == 1:
            return [(self, 1)]
        layers = Stages.over(self.split, self.pp).layers
        alike = Counter((hi - lo, self.schedule.syncs[2 * lo : 2 * hi], lo == 0, i == self.pp - 1)
                        for i, (lo, hi) in enumerate(layers))
        return [(replace(self, split=replace(self.split, n_layer=n), schedule=Schedule(syncs),
                         has_first=first, has_last=last), count)
                for (n, syncs, first, last), count in alike.items()]

    def once(self, hardware: Hardware) -> Seconds:
        """What an iteration does once: the optimizer, and the sum of the table of two stages."""
        if not self.trains:
            return Seconds()
        own = self.numbers / (self.own if self.dp_shard else 1)
        nbytes = OPTIMIZER * own + TIED * self.entries[-1]
        link, tp, table = hardware.link, self.split.tp, FLOAT * self.entries[-1]
        seconds = [link.seconds(m.op, m.nbytes * m.parts, tp) for m in self.messages()
                   if m.block == "optimizer"]
        if self.has_first != self.has_last:
            seconds.append(link.seconds("all_reduce", table, 2, tp * (self.pp - 1), tp))
        return Seconds(weights=nbytes / hardware.memory, communication=sum(seconds))

    def of_pass(self, hardware: Hardware) -> Seconds:
        """The passes over one micro-batch."""
        n, (*layers, head) = self.rows * self.tokens, self.entries
        found = self.elementwise(hardware) + self.product(sum(layers), n, hardware)
        found += Seconds(attention=self.split.n_layer * self.attention(hardware).attention)
        if self.has_last:
            found += self.product(head, n if self.trains else self.rows, hardware)
        link, tp = hardware.link, self.split.tp
        messages = [m for m in self.messages() if m.block != "optimizer"
                    and not (self.schedule.delay and m.block in KINDS)]
        communication = sum(link.seconds(m.op, m.nbytes * m.parts, tp) for m in messages)
        if self.schedule.delay and tp > 1:
            communication += self.waits(hardware)
        if self.pp > 1:  # the stream goes on, its gradient comes back
            nbytes = n * self.split.n_embd * FLOAT / (tp if self.split_tokens else 1)
            communication += 2 * link.seconds("broadcast", nbytes, 2, tp, tp)
        overhead = (2 * self.split.n_layer + self.has_last) * hardware.overhead * self.passes
        return found + Seconds(communication=communication, overhead=overhead)

    def waits(self, hardware: Hardware) -> float:
        """Under a delay: seconds in which the ranks wait for sums, which the link sends one after
        the other while the ranks compute. A backward pass takes as long as two forward ones."""
        n, layers, arrivals = self.rows * self.tokens, self.entries[:-1], self.schedule.arrivals()
        tp = self.split.tp
        other = self.elementwise(hardware).total / len(layers) + self.passes * hardware.overhead
        attention = self.attention(hardware).total
        times = [self.product(entries, n, hardware).total + other + attention * (i % 2 == 0)
                 for i, entries in enumerate(layers)]
        nbytes = {m.direction: m.nbytes for m in self.messages() if m.block in KINDS}
        once = [t / self.passes for t in times]
        waited = _waits(once, arrivals, nbytes["forward"], hardware.link, tp)
        if self.trains:  # G(n) of parallel/flight.py is wanted by the last m that arrives before n
            last, late = len(layers) - 1, dict(zip(arrivals, range(len(layers)), strict=True))
            wanted = [last - late.get(last - i, -1) for i in range(len(layers))]
            times = [2 / 3 * t for t in reversed(times)]
            waited += _waits(times, wanted, nbytes["backward"], hardware.link, tp)
        return waited

    def messages(self) -> Iterator[Message]:
        """Every collective of the step on the tp axis, in no particular order."""
        tp, n, C = self.split.tp, self.rows * self.tokens, self.split.n_embd
        if tp == 1:
            return
        # a sub-block's are as narrow as its products, but for sums in the backward pass
        narrow, wide = n * C * self.width, n * C * (FLOAT if self.trains else self.width)
        here = {"embedding": self.has_first, "head": self.has_last}
        last = "mlp", (SEQUENCE if self.split_tokens else MEGATRON)[1]
        for block, exchange in exchanges(self.schedule, self.split_tokens):
            if not here.get(block, True):
                continue
            inside = narrow if block in KINDS else wide
            for op in exchange.forward:
                yield Message(block, "forward", op, inside)
            if self.activation_checkpointing and block in KINDS and (block, exchange) != last:
                for op in exchange.forward:  # a layer again, but for its last message
                    yield Message(block, "backward", op, inside)
            for op in exchange.backward if self.trains else ():
                yield Message(block, "backward", op, inside if op == "all_gather" else wide)
        if not self.trains:
            yield Message("sampling", "step", "all_gather", 2 * self.rows * FLOAT, tp)
            yield Message("sampling", "step", "broadcast", 2 * self.rows * ID)
            return
        # the loss: three numbers a row of each rank
        for first in range(0, n * self.has_last, self.logit_rows):
            rows = min(self.logit_rows, n - first)
            yield Message("loss", "forward", "all_gather", 3 * rows * FLOAT, tp)
        if names := partial_gradients(self.split, self.schedule, self.split_tokens):
            numbers = sum(prod(self.split.table[name][0]) for name in names)
            yield Message("optimizer", "step", "all_reduce", FLOAT * numbers)
        yield Message("optimizer", "step", "all_reduce", FLOAT)  # the gradient's norm

    @property
    def capacity(self) -> int:
        """Bytes of this rank's weights and cache; in training the peak on a GPU by memory.py."""
        if self.trains:
            return max(Training(
                split=self.split, rows=self.rows, eval_rows=self.rows, gpu=True, width=self.width,
                logit_rows=self.logit_rows, sequence_parallel=self.split_tokens,
                micro_steps=self.micro_batches, stages=Stages.over(self.split, self.pp, rank),
                activation_checkpointing=self.activation_checkpointing, dp=self.dp,
                dp_shard=self.dp_shard, groups=self.dp_groups,
                outer=2 * (self.dp_every > 0),
            ).peak for rank in range(self.pp))  # fmt: skip
        cache = self.width * self.split.cache_numbers(self.rows * (self.past + self.tokens))
        if self.int8:  # look-ups read the table in full width
            return self.numbers + self.entries[-1] * self.width + cache
        return self.numbers * self.width + cache


def _waits(times: list[float], wanted: list[int], nbytes: int, link: Link, tp: int) -> float:
    """Seconds of waiting in a pass. times: of its sub-blocks. wanted: before which one the sum that
    starts after each must have arrived."""
    sending = replace(link, alpha=0.0).seconds("all_reduce", nbytes, tp)
    seconds = link.seconds("all_reduce", nbytes, tp)
    clock = free = waited = 0.0  # free: when the link has sent the last sum
    arrived: list[float] = []
    for i, time in enumerate([*times, 0.0]):
        due = [arrived[m] for m in range(i) if wanted[m] == i]
        wait = max([clock, *due]) - clock
        waited, clock = waited + wait, clock + wait + time
        free = max(free, clock) + sending
        arrived.append(free - sending + seconds)
    return waited

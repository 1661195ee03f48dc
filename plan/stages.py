"""Pipeline stages: which layers a stage has, which stages a rank has, and what the schedules of
torch.distributed.pipelining ask for. Pure integers, no torch."""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from base.errors import UserError, shown
from plan.partition import Rule, Shape, Span
from plan.schedule import Schedule

TABLE = "transformer.wte.weight"
LAST = ("transformer.ln_f.", "lm_head.")  # parameters of the last stage


@dataclass(frozen=True)
class Kind:
    """each: stages on a rank. v: a rank's second stage is the mirror image of its first, so that
    rank 0 has both ends. splits: gradients of weights are computed later than those of inputs."""

    each: int = 1
    v: bool = False
    splits: bool = False


# by torch's names
SCHEDULES = {
    "1F1B": Kind(), "GPipe": Kind(), "LoopedBFS": Kind(2), "Interleaved1F1B": Kind(2),
    "InterleavedZeroBubble": Kind(2, splits=True), "ZBVZeroBubble": Kind(2, True, True),
    "DualPipeV": Kind(2, True, True),
}  # fmt: skip


@dataclass(frozen=True)
class Stages:
    """The stages of a model of n_layer layers over the pp ranks of one pipeline, of which this is
    number `rank`. schedule: a key of SCHEDULES. tied: the head is the embedding table, which first
    and last stage then both hold. table: its size, in layers. UserError if there are fewer layers
    than stages."""

    n_layer: int
    pp: int = 1
    rank: int = 0
    schedule: str = "1F1B"
    tied: bool = True
    table: float = 0.0

    @classmethod
    def over(cls, config: Any, pp: int = 1, rank: int = 0, schedule: str = "1F1B") -> "Stages":
        """Of the model that a GPTConfig or a Partition describes."""
        table = config.vocab_size / (4 * config.n_embd + 2 * config.n_hidden)
        return cls(config.n_layer, pp, rank, schedule, config.tie_word_embeddings, table)

    @classmethod
    def of(cls, options: Any, config: Any, sync: Schedule, rank: int = 0) -> "Stages":
        """Of a training run. UserError if its other options do not go with stages."""
        made = cls.over(config, options.pp, rank, options.pp_schedule)
        splits, zero = made.kind.splits, f"--pp_schedule={made.schedule}"
        return made.without(sync, {
            f"--dp_shard=True and {zero}": options.dp_shard and made.kind.each > 1,
            "--dp_reduce_dtype=bfloat16":
                options.dp_reduce_dtype != "float32" and not options.dp_shard,
            f"--compile=True and {zero}": options.compile and splits,
            f"--activation_checkpointing=True and {zero}":
                options.activation_checkpointing and splits,
        })  # fmt: skip

    def without(self, sync: Schedule, others: Any = ()) -> "Stages":
        """These stages; UserError if there are several and one of the `others` is given, or a
        schedule in which a stage ends between sync points."""
        inside = f"--sync={sync}, where a stage ends between sync points"
        ends = (sync.syncs[2 * hi - 1] for _, hi in self.layers)
        for other, given in {**dict(others), inside: sync.delay or not all(ends)}.items():
            if self.pp > 1 and given:
                raise UserError(f"--pp={self.pp} together with {other}: use one of them.")
        return self

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise UserError(f"--pp_schedule must be one of {known}, got {shown(self.schedule)}")
        if self.n_layer < self.count:
            each = f"--pp_schedule={self.schedule} has {self.kind.each} stages on a rank, and "
            fault = f"{self.count} stages are more than n_layer={self.n_layer}"
            most = self.n_layer // self.kind.each
            advice = f"Use a --pp of at most {most}" if most else "Use another --pp_schedule"
            raise UserError(f"--pp={self.pp}: {each * (self.kind.each > 1)}{fault}. {advice}.")

    @property
    def kind(self) -> Kind:
        return SCHEDULES[self.schedule] if self.pp > 1 else Kind()

    @property
    def count(self) -> int:
        return self.pp * self.kind.each

    @property
    def shares_table(self) -> bool:
        """Whether this rank is one of two that hold the tied table."""
        return self.tied and self.has_first != self.has_last

    @cached_property
    def layers(self) -> list[Span]:
        """The layers [lo, hi) of each stage. The first and the last stage also have the table, so
        each next layer goes to the stage that has least."""
        has = [1 + self.table * (stage in (0, self.count - 1)) for stage in range(self.count)]
        owners = [*range(self.count)]
        for _ in range(self.n_layer - self.count):
            owners.append(min(range(self.count), key=has.__getitem__))
            has[owners[-1]] += 1
        edges = [sum(owner < stage for owner in owners) for stage in range(self.count + 1)]
        return [*pairwise(edges)]

    def check_micro_batches(self, count: int) -> None:
        """UserError if the schedule cannot run so many micro-batches."""
        least = self.count if self.schedule in ("1F1B", "DualPipeV") else 1
        wanted = f"at least {least} micro-batches, one for each stage"
        if self.schedule.startswith("Interleaved") and count % max(1, count // self.pp):
            least, wanted = count + 1, f"a multiple of {self.pp} micro-batches"
        if count < least and self.pp > 1:
            fault = f"--pp_schedule={self.schedule} on --pp={self.pp} needs {wanted}"
            raise UserError(
                f"{fault}: each dp rank has {count} in an iteration. Use another "
                "--gradient_accumulation_steps, or --pp_schedule=GPipe, which takes any number."
            )

    def __str__(self) -> str:
        """The layers of each stage, for people; "" if there is one."""
        layers = ", ".join(f"{lo}-{hi - 1}" if hi - lo > 1 else str(lo) for lo, hi in self.layers)
        return f"; {self.schedule}, layers of the stages: {layers}" if self.count > 1 else ""

    def rank_of(self, stage: int) -> int:
        lap, place = divmod(stage, self.pp)
        return self.pp - 1 - place if self.kind.v and lap % 2 else place

    @property
    def mine(self) -> list[int]:
        """The stages of this rank, in order."""
        return [stage for stage in range(self.count) if self.rank_of(stage) == self.rank]

    @property
    def has_first(self) -> bool:
        return self.rank == 0

    @property
    def has_last(self) -> bool:
        return self.rank == self.rank_of(self.count - 1)

    def owner(self, name: str) -> int:
        """The rank that a parameter belongs to: a tied table to that of the first stage."""
        if self.pp == 1:
            return 0
        if found := re.match(r"transformer\.h\.(\d+)\.", name):
            layer = int(found[1])
            stages = (stage for stage, (_, hi) in enumerate(self.layers) if layer < hi)
            return self.rank_of(next(stages))
        return self.rank_of(self.count - 1 if name.startswith(LAST) else 0)

    def holds(self, name: str) -> bool:
        """Whether this rank has the parameter in memory."""
        return self.shares_table and name == TABLE or self.rank == self.owner(name)

    def rule(self, name: str, shape: Shape, rule: Rule, tp: int) -> Rule:
        """How the files of pp x tp ranks split a tensor that tp ranks split by `rule`: those of its
        owner alone have parts of it. If it is replicated, the first of them has all."""
        if self.pp == 1:
            return rule.unpadded
        runs = rule.runs or (((0, shape[0]),), *[()] * (tp - 1))
        before, after = self.owner(name), self.pp - 1 - self.owner(name)
        return Rule(rule.dim or 0, ((),) * (tp * before) + runs + ((),) * (tp * after))

    def in_flight(self, count: int) -> int:
        """The most activations that this rank holds, of `count` micro-batches: one for each stage
        and micro-batch."""
        pp, all_of_them = self.pp, count * self.kind.each
        most = {
            "1F1B": pp - self.rank, "Interleaved1F1B": 3 * pp - 2 * self.rank - 1,
            "InterleavedZeroBubble": 2 * pp, "ZBVZeroBubble": 2 * pp, "DualPipeV": 2 * pp + 1,
        }  # fmt: skip
        return min(most.get(self.schedule, all_of_them), all_of_them) if pp > 1 else 1

    def messages(self) -> tuple[int, int]:
        """Messages of one micro-batch: (received forward, and as many sent backward; sent forward,
        and as many received backward)."""
        pairs = list(pairwise(map(self.rank_of, range(self.count))))
        before = sum(there != here == self.rank for there, here in pairs)
        return before, sum(self.rank == here != there for here, there in pairs)

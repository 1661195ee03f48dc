"""The split of a GPT-2 over ranks: who owns which heads, columns and rows. Pure integers, no torch.
`Partition.table` is the only place that holds the split rules: all others read it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any

from base.errors import UserError

Span = tuple[int, int]  # [lo, hi)
Shape = tuple[int, ...]

# A rank's embedding table is padded to a multiple of this many rows, because tensor cores are slow
# with odd widths such as 50257. Only memory has the padding, files never do.
VOCAB_MULTIPLE = 64


def spans(n: int, parts: int) -> list[Span]:
    """range(n) in `parts` spans, as even as possible: the first `n % parts` are one longer."""
    if parts < 1:
        raise ValueError(f"cannot split {n} over {parts} parts")
    small, longer = divmod(n, parts)
    edges = [i * small + min(i, longer) for i in range(parts + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def length(span: Span) -> int:
    return span[1] - span[0]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Rule:
    """How one tensor is split. dim: the dimension of the full tensor that is split, None if
    replicated. runs: for each rank, the spans along `dim` that it owns, in the order in which it
    stores them. rows: the size along `dim` in every rank's memory; None if it is what it owns."""

    dim: int | None = None
    runs: tuple[tuple[Span, ...], ...] = ()
    rows: int | None = None

    def runs_of(self, rank: int) -> tuple[Span, ...]:
        """The spans that `rank` owns, () of a replicated tensor."""
        return self.runs[rank] if self.runs else ()

    def owned(self, rank: int) -> int:
        """Entries along `dim`, without padding."""
        return sum(map(length, self.runs[rank]))

    @property
    def unpadded(self) -> "Rule":
        return replace(self, rows=None)

    def local_shape(self, shape: Shape, rank: int) -> Shape:
        """The shape in `rank`'s memory of a full tensor of `shape`."""
        if self.dim is None:
            return shape
        width = self.owned(rank) if self.rows is None else self.rows
        return (*shape[: self.dim], width, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class Partition:
    """The split of a GPT-2 of the given sizes over `tp` ranks: 1 to n_head, UserError beyond."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    bias: bool
    tp: int
    n_inner: int = 0
    tie_word_embeddings: bool = True

    @classmethod
    def of(cls, config: Any, tp: int) -> "Partition":
        """The split of the model that a GPTConfig describes."""
        names = (field.name for field in fields(cls) if field.name != "tp")
        return cls(**{name: getattr(config, name) for name in names}, tp=tp)

    def __post_init__(self) -> None:
        n_head, n_embd, tp = self.n_head, self.n_embd, self.tp
        if n_embd % n_head:
            low = n_embd // n_head * n_head
            nearest = " or ".join(str(n) for n in (low, low + n_head) if n)
            fault = f"n_embd={n_embd} does not divide into n_head={n_head} heads"
            raise UserError(f"{fault}. Use n_embd={nearest}.")
        if tp < 1:
            raise UserError(f"tp={tp}: the tensor-parallel size is at least 1.")
        if tp > n_head:
            even = ", ".join(str(k) for k in range(1, n_head + 1) if n_head % k == 0)
            fault = f"tp={tp} is more than n_head={n_head}: some ranks would hold no head"
            raise UserError(f"{fault}. Use a tp between 1 and {n_head} (even splits: {even}).")
        if tp > self.vocab_size:
            fault = f"tp={tp} is more than vocab_size={self.vocab_size}"
            raise UserError(f"{fault}: some ranks would hold no row.")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.n_inner or 4 * self.n_embd

    def heads(self, rank: int) -> Span:
        return spans(self.n_head, self.tp)[rank]

    def channels(self, rank: int) -> Span:
        lo, hi = self.heads(rank)
        return self.head_dim * lo, self.head_dim * hi

    def columns(self, rank: int) -> Span:
        """The hidden units of the MLP that the rank owns."""
        return spans(self.n_hidden, self.tp)[rank]

    def vocabulary(self, rank: int) -> Span:
        return spans(self.vocab_size, self.tp)[rank]

    @property
    def local_vocab(self) -> int:
        """Rows of the embedding table in every rank's memory, padding included."""
        return round_up(-(-self.vocab_size // self.tp), VOCAB_MULTIPLE)

    def cache_numbers(self, tokens: int) -> int:
        """Numbers in the first rank's KV cache of so many tokens."""
        return 2 * self.n_layer * length(self.channels(0)) * tokens

    @cached_property
    def table(self) -> dict[str, tuple[Shape, Rule]]:
        """Full shape and split rule of every parameter, in nanoGPT's names and order, without
        `lm_head.weight` where it is `transformer.wte.weight`."""
        C, H, ranks, whole = self.n_embd, self.n_hidden, range(self.tp), Rule()
        channels, units = list(map(self.channels, ranks)), [(self.columns(rank),) for rank in ranks]
        vocabulary = tuple((self.vocabulary(rank),) for rank in ranks)
        table_rows = Rule(0, vocabulary, self.local_vocab)
        # c_attn is [q | k | v]: a rank owns its heads' rows of each, not a third of all rows
        qkv = (tuple((i * C + lo, i * C + hi) for i in range(3)) for lo, hi in channels)
        qkv_rows, head_columns = Rule(0, tuple(qkv)), Rule(1, tuple((span,) for span in channels))
        unit_rows, unit_columns = Rule(0, tuple(units)), Rule(1, tuple(units))
        # c_proj.bias is added once, after the all-reduce, so every rank holds all of it
        block = {
            "ln_1.weight": ((C,), whole), "ln_1.bias": ((C,), whole),
            "attn.c_attn.weight": ((3 * C, C), qkv_rows), "attn.c_attn.bias": ((3 * C,), qkv_rows),
            "attn.c_proj.weight": ((C, C), head_columns), "attn.c_proj.bias": ((C,), whole),
            "ln_2.weight": ((C,), whole), "ln_2.bias": ((C,), whole),
            "mlp.c_fc.weight": ((H, C), unit_rows), "mlp.c_fc.bias": ((H,), unit_rows),
            "mlp.c_proj.weight": ((C, H), unit_columns), "mlp.c_proj.bias": ((C,), whole),
        }
        table: dict[str, tuple[Shape, Rule]] = {
            "transformer.wte.weight": ((self.vocab_size, C), table_rows),
            "transformer.wpe.weight": ((self.block_size, C), whole),
            **{f"transformer.h.{i}.{n}": block[n] for i in range(self.n_layer) for n in block},
            "transformer.ln_f.weight": ((C,), whole), "transformer.ln_f.bias": ((C,), whole),
        }
        if not self.tie_word_embeddings:
            table["lm_head.weight"] = table["transformer.wte.weight"]
        return {name: row for name, row in table.items() if self.bias or not name.endswith(".bias")}

    def shapes(self) -> dict[str, Shape]:
        return {name: shape for name, (shape, _) in self.table.items()}

    @cached_property
    def rules(self) -> dict[str, Rule]:
        return {name: rule for name, (_, rule) in self.table.items()}

    def local_shapes(self, rank: int) -> dict[str, Shape]:
        return {name: rule.local_shape(shape, rank) for name, (shape, rule) in self.table.items()}

    def count(self, rank: int | None = None, names: Iterable[str] = ()) -> int:
        """Parameters of the full model, or those that `rank` owns, of these names or of all.
        Padding rows do not count."""
        if rank is None:
            return sum(map(prod, self.shapes().values()))
        rows = map(self.table.__getitem__, names or self.table)
        return sum(prod(rule.unpadded.local_shape(shape, rank)) for shape, rule in rows)

    def imbalance(self) -> str:
        """The cost of an uneven split of heads, "" if it is even."""
        heads = [length(self.heads(rank)) for rank in range(self.tp)]
        extra, split = max(heads) * self.tp / self.n_head - 1, ",".join(map(str, heads))
        text = f"tp={self.tp} over {self.n_head} heads: {split} (busiest rank does {extra:.0%} "
        return f"{text}more attention than an even split)." if extra else ""

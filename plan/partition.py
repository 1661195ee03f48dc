"""Which rank owns which heads, columns, rows and vocabulary rows: pure integers, no torch.

All ranges are half open. `Partition` holds the one table of split rules; the model, the converter, the parameter count,
the optimizer's state, gradient norms and the tests all read it and nothing else.
"""

import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from base.errors import UserError

Run = tuple[int, int]  # [lo, hi) along the split dimension of the full tensor

# The local embedding table is padded to a multiple of this many rows: the head's matrix product then has a width that
# tensor cores like (50257 rows do not). Padding lives in memory only, never on disk.
VOCAB_MULTIPLE = 64


def spans(n: int, parts: int) -> list[Run]:
    """Split range(n) into `parts` contiguous runs, as even as possible; the first `n % parts` are one longer."""
    if parts < 1:
        raise ValueError(f"cannot split {n} over {parts} parts")
    small, longer = divmod(n, parts)
    edges = [i * small + min(i, longer) for i in range(parts + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Rule:
    """How one tensor is split.

    dim: the full tensor's dimension that is split, or None where every rank holds the whole (replicated).
    runs: for each rank, the runs of the full tensor along `dim` that it owns, in the order it keeps them.
    rows: the size along `dim` that every rank holds in memory, or None where that is just what its runs add up to.
    """

    dim: int | None = None
    runs: tuple[tuple[Run, ...], ...] = ()
    rows: int | None = None

    def owned(self, rank: int) -> int:
        """Entries along `dim` that this rank owns (without padding)."""
        return sum(hi - lo for lo, hi in self.runs[rank])

    def local_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """The shape rank holds in memory of a full tensor of `shape`."""
        if self.dim is None:
            return shape
        width = self.owned(rank) if self.rows is None else self.rows
        return (*shape[: self.dim], width, *shape[self.dim + 1 :])


REPLICATED = Rule()


@dataclass(frozen=True)
class Partition:
    """The split of a GPT-2 of the given sizes over `tp` ranks.

    n_head, n_embd, vocab_size: of the full model; head width is n_embd // n_head, the MLP is 4 * n_embd wide.
    tp: tensor-parallel size, 1 to n_head (UserError beyond: a rank would hold no head).
    vocab_multiple: see VOCAB_MULTIPLE.
    """

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    bias: bool
    tp: int
    vocab_multiple: int = VOCAB_MULTIPLE

    @classmethod
    def of(cls, config: Any, tp: int, vocab_multiple: int = VOCAB_MULTIPLE) -> "Partition":
        """The split of the model that a GPTConfig describes."""
        names = (f.name for f in fields(cls) if f.name not in ("tp", "vocab_multiple"))
        return cls(**{name: getattr(config, name) for name in names}, tp=tp, vocab_multiple=vocab_multiple)

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            low = self.n_embd // self.n_head * self.n_head
            nearest = " or ".join(str(n) for n in (low, low + self.n_head) if n)
            raise UserError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads. Use n_embd={nearest}.")
        if self.tp < 1:
            raise UserError(f"tp={self.tp}: the tensor-parallel size is at least 1.")
        if self.tp > self.n_head:
            even = ", ".join(str(k) for k in range(1, self.n_head + 1) if self.n_head % k == 0)
            raise UserError(
                f"tp={self.tp} is more than n_head={self.n_head}: some ranks would hold no head. "
                f"Use a tp between 1 and {self.n_head} (even splits: {even})."
            )
        if self.tp > self.vocab_size:
            raise UserError(f"tp={self.tp} is more than vocab_size={self.vocab_size}: some ranks would hold no row.")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return 4 * self.n_embd

    def heads(self, rank: int) -> Run:
        return spans(self.n_head, self.tp)[rank]

    def columns(self, rank: int) -> Run:
        """The hidden units of the MLP that rank owns."""
        return spans(self.n_hidden, self.tp)[rank]

    def vocabulary(self, rank: int) -> Run:
        return spans(self.vocab_size, self.tp)[rank]

    @property
    def local_vocab(self) -> int:
        """Rows of the embedding table that every rank holds in memory, padding included."""
        return round_up(-(-self.vocab_size // self.tp), self.vocab_multiple)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter, in nanoGPT's names and order. `lm_head.weight` is `transformer.wte.weight`."""
        C, H = self.n_embd, self.n_hidden
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocab_size, C),
            "transformer.wpe.weight": (self.block_size, C),
        }
        block = {
            "ln_1.weight": (C,), "ln_1.bias": (C,),
            "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
            "ln_2.weight": (C,), "ln_2.bias": (C,),
            "mlp.c_fc.weight": (H, C), "mlp.c_fc.bias": (H,),
            "mlp.c_proj.weight": (C, H), "mlp.c_proj.bias": (C,),
        }  # fmt: skip
        for layer in range(self.n_layer):
            shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
        return {name: shape for name, shape in shapes.items() if self.bias or not name.endswith(".bias")}

    @cached_property
    def rules(self) -> dict[str, Rule]:
        """The table: the split rule of every parameter in `shapes`."""
        ranks = range(self.tp)
        heads = [tuple(self.head_dim * h for h in self.heads(r)) for r in ranks]  # in units of channels
        channels = tuple(((lo, hi),) for lo, hi in heads)
        # c_attn is [q | k | v]: a rank owns its heads' rows in each of the three, not a third of the rows
        qkv = tuple(tuple((part * self.n_embd + lo, part * self.n_embd + hi) for part in range(3)) for lo, hi in heads)
        columns = tuple((self.columns(r),) for r in ranks)
        vocabulary = tuple((self.vocabulary(r),) for r in ranks)
        table = {
            r"transformer\.wte\.weight": Rule(0, vocabulary, rows=self.local_vocab),
            r"transformer\.h\.\d+\.attn\.c_attn\.(weight|bias)": Rule(0, qkv),
            r"transformer\.h\.\d+\.attn\.c_proj\.weight": Rule(1, channels),
            r"transformer\.h\.\d+\.mlp\.c_fc\.(weight|bias)": Rule(0, columns),
            r"transformer\.h\.\d+\.mlp\.c_proj\.weight": Rule(1, columns),
            # the biases of row-parallel layers are added once, after the all-reduce: every rank keeps the whole
            r"transformer\.(wpe\.weight|h\.\d+\.(ln_[12]\..*|(attn|mlp)\.c_proj\.bias)|ln_f\..*)": REPLICATED,
        }
        return {name: next(rule for pattern, rule in table.items() if re.fullmatch(pattern, name)) for name in self.shapes()}

    def local_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        rules = self.rules
        return {name: rules[name].local_shape(shape, rank) for name, shape in self.shapes().items()}

    def count(self, rank: int | None = None) -> int:
        """Parameters of the full model, or those that `rank` owns (padding rows are nobody's)."""
        total = 0
        rules = self.rules
        for name, shape in self.shapes().items():
            rule, size = rules[name], 1
            for dim, n in enumerate(shape):
                size *= rule.owned(rank) if rank is not None and dim == rule.dim else n
            total += size
        return total

    def imbalance(self) -> str:
        """What an uneven split of heads costs, or "" where it is even."""
        heads = [hi - lo for lo, hi in map(self.heads, range(self.tp))]
        if min(heads) == max(heads):
            return ""
        extra = max(heads) * self.tp / self.n_head - 1
        return (
            f"tp={self.tp} over {self.n_head} heads: {','.join(map(str, heads))} "
            f"(busiest rank does {extra:.0%} more attention than an even split)."
        )

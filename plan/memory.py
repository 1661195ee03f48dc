"""Memory that training takes on a rank, computed before it starts: pure integers, no torch.

Parameters, gradients and AdamW's moments follow from the partition table to the byte. Activations
follow Korthikanti et al. (arXiv 2205.05198, section 4), who count s b h (34 + 5 a s / h) bytes a
layer. Here a layer keeps, in bytes a token, with C = n_embd and w = 4, or 2 under autocast:

    inputs of both LayerNorms          8 C      split by tokens under sequence_parallel
    inputs of c_attn and c_fc        2 w C      the same: they are gathered again in backward
    dropout masks                    2 w C      the same; 2 C on a GPU; 0 without dropout
    q, k, v and attention's output   4 w C      split by heads
    input and output of GELU         8 w C      split by columns

or 64 C in float32 without dropout. The attention kernel keeps no [T, T] matrix; a CPU has no such
kernel for dropout and keeps three. Under autocast a layer keeps its weights in half precision.

Activations go as gradients come: a GPU, and a CPU sharded over dp, which gives memory back at once,
take the largest moment (`live`). Another CPU rank keeps what it frees (`set_up_heap` in
train/setup.py), in pieces that the next tensors do not fit: it takes the sum of the parts.
The process itself, workspaces of kernels and mapped files are not counted.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from plan.partition import Partition, spans

FLOAT = 4  # bytes of a parameter, a gradient, a moment, a number of the residual stream
ID = 8  # bytes of a token id


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run. Each figure is of the rank that has most: the first of a tp group (`spans`).

    split: over tp. dp: replicas. rows, eval_rows: sequences in a micro-batch and in a batch of an
    evaluation. micro_steps: micro-batches in an iteration. width: bytes of a number in matrix
    products, 4, or 2 under autocast. logit_rows: rows whose logits exist at a time.
    """

    split: Partition
    rows: int
    eval_rows: int
    logit_rows: int
    width: int = FLOAT
    dp: int = 1
    micro_steps: int = 1
    dropout: bool = False
    gpu: bool = False
    sequence_parallel: bool = False
    activation_checkpointing: bool = False
    dp_shard: bool = False

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter on this rank, padding included, before dp shards it."""
        return self.split.local_shapes(0)

    @cached_property
    def whole(self) -> int:
        return FLOAT * sum(map(prod, self.shapes.values()))  # before dp shards them

    @cached_property
    def _layers(self) -> int:
        return FLOAT * sum(prod(shape) for name, shape in self.shapes.items() if ".h." in name)

    @property
    def parameters(self) -> int:
        """Sharded over dp, each tensor is cut along dimension 0; the first piece is the longest."""
        dp = self.dp if self.dp_shard else 1
        return FLOAT * sum(-(-rows // dp) * prod(rest) for rows, *rest in self.shapes.values())

    @property
    def gradients(self) -> int:
        return max(self.parameters, self._gradients(0), self._gradients(self._layers))

    def _gradients(self, done: int) -> int:
        """Bytes of gradients in the last micro-batch, when those of `done` bytes are there. Earlier
        micro-batches leave sums; dp adds DDP's buckets or, sharded, this rank's part of `done`."""
        if self.dp == 1:
            return self.whole if self.micro_steps > 1 else done
        sums = self.whole - done if self.micro_steps > 1 else 0
        return sums + (-(-done // self.dp) if self.dp_shard else self.whole)

    @property
    def optimizer(self) -> int:
        return 2 * self.parameters

    @property
    def tokens(self) -> int:
        return self.rows * self.split.block_size

    @property
    def own_tokens(self) -> int:
        """Tokens of the residual stream on this rank."""
        lo, hi = spans(self.split.block_size, self.split.tp if self.sequence_parallel else 1)[0]
        return self.rows * (hi - lo)

    @property
    def stream(self) -> int:
        return self.own_tokens * self.split.n_embd * FLOAT

    @property
    def channels(self) -> int:
        """Width of this rank's heads, side by side."""
        lo, hi = self.split.heads(0)
        return (hi - lo) * self.split.head_dim

    @property
    def columns(self) -> int:
        lo, hi = self.split.columns(0)
        return hi - lo

    @property
    def _half_weights(self) -> int:
        numbers = (4 * self.channels + 2 * self.columns) * self.split.n_embd
        return numbers * self.width if self.width < FLOAT else 0  # autocast copies a layer's

    @property
    def kept_by_norm(self) -> int:
        return self.stream + 2 * self.own_tokens * FLOAT  # its input; means and deviations

    @property
    def kept_by_layer(self) -> int:
        """Bytes that a layer keeps for its backward pass: the table at the head of this file."""
        w, mask = self.width, self.dropout * (1 if self.gpu else self.width)
        kept = 2 * self.kept_by_norm + 2 * self.own_tokens * self.split.n_embd * (w + mask)
        kept += self.tokens * (4 * self.channels + 2 * self.columns) * w + self._half_weights
        heads = self.channels // self.split.head_dim
        if self.dropout and not self.gpu:  # probabilities, mask, product; q, k and v in float32
            scores = heads * self.split.block_size * FLOAT
            return kept + 3 * self.tokens * (scores + self.channels * (FLOAT - w))
        return kept + self.tokens * heads * FLOAT  # logarithms of the kernel's sums

    @property
    def activations(self) -> int:
        """Bytes that a forward pass keeps: token ids, all layers, the last LayerNorm."""
        layer = self.kept_by_layer
        if self.activation_checkpointing:  # autocast holds weights: if split, the row-parallel ones
            layer = self.stream + self._half_weights // min(self.split.tp, 2)
        return 2 * self.tokens * ID + self.split.n_layer * layer + self.kept_by_norm

    @property
    def table(self) -> int:
        """Bytes of a gradient of the embedding table. The head's waits for the embedding's."""
        return FLOAT * prod(self.shapes["transformer.wte.weight"])

    def _head(self, rows: int) -> int:
        """Bytes of the last hidden states, their gradient, and a chunk of logits."""
        tokens = rows * self.split.block_size
        logits = min(self.logit_rows, tokens) * self.split.local_vocab
        number = FLOAT if self.width == FLOAT else FLOAT + 2 * self.width  # half twice
        return 2 * tokens * self.split.n_embd * FLOAT + logits * number

    @property
    def _loss(self) -> int:
        """Bytes of head and loss, the table's gradient and its half-precision copies among them."""
        half = 0 if self.width == FLOAT else 1 if self.gpu else 2
        return self._head(self.rows) + self.table * (1 + half)

    @property
    def _evaluation(self) -> int:
        """Bytes of a forward pass that keeps nothing: the head's and one MLP's."""
        hidden = self.eval_rows * self.split.block_size * self.columns
        return self._head(self.eval_rows) + 2 * hidden * self.width

    @property
    def _backward(self) -> int:
        """Bytes of a layer's backward pass: gradients, a message, activations computed again."""
        number = FLOAT + self.width if self.sequence_parallel else FLOAT
        message = 2 * self.tokens * self.split.n_embd * number if self.split.tp > 1 else 0
        weight = self.columns * self.split.n_embd * FLOAT
        again = self.kept_by_layer - self.stream if self.activation_checkpointing else 0
        return self.stream + max(self.tokens * self.columns * self.width, message) + weight + again

    @property
    def _gathered(self) -> int:
        """Bytes of whole parameters under dp_shard: those in no layer, and three layers'."""
        layers = self._layers - 3 * self._layers // self.split.n_layer
        return self.whole - layers if self.dp_shard else 0

    @property
    def temporary(self) -> int:
        """Bytes of what comes and goes within a pass, at their most."""
        most = max(self._loss, self._backward + self.table, self._evaluation)
        return most + self.table + self._gathered

    def live(self) -> tuple[int, str]:
        """(bytes, its name) of the largest moment: the most that tensors take at a time."""
        before, after = self._gradients(0), self._gradients(self._layers)
        moments = {
            "evaluation": before + self._evaluation,
            "head and loss": before + self.activations + self._loss,
            "last layer, backward": before + self.activations + self.table + self._backward,
            "embedding, backward": after + 2 * self.table,
        }
        name, most = max(moments.items(), key=lambda moment: moment[1])
        return self.parameters + self.optimizer + self._gathered + most, name

    @property
    def peak(self) -> int:
        """The most bytes that the rank takes, without the process itself."""
        parts = self.parameters + self.gradients + self.optimizer + self.activations
        return self.live()[0] if self.gpu or self.dp_shard else parts + self.temporary

    @property
    def kv_cache(self) -> int:
        """Bytes of keys and values of one sequence of block_size tokens, in generation."""
        return 2 * self.split.n_layer * self.channels * self.split.block_size * self.width

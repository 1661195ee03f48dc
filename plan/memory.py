"""What training takes of a rank's memory, reckoned before it starts: pure integers, no torch.

The parts that stay (parameters, gradients, AdamW's moments) follow from the partition table to the byte, and so does what a
layer keeps for its backward pass, after Korthikanti et al. (arXiv 2205.05198, section 4, equations 1 to 4) with these
differences: numbers are float32, or half precision in the matrix products only; attention's kernel keeps no probabilities,
but a CPU's has no dropout; a CPU's dropout keeps its mask in the numbers' type, a GPU's in bytes; the input of a gathered
product is kept as this rank's tokens and gathered again; and the logits exist for some rows at a time. Under autocast a
layer keeps half-precision copies of its weights as well.

How much of that is there at once decides the peak: activations go as gradients come. `Training.moments` has an
iteration's candidates, written down from what the passes of tp_model.py, layers.py and loss.py hold; that is what a GPU's
allocator counts, and a CPU where large tensors are given back at once, as they are when sharded over dp. Else a CPU rank has
glibc keep what is freed (`set_up_heap` in train/setup.py), and what one part of an iteration leaves is in pieces that the next
one's tensors do not fit: there the peak is the sum of all parts. Not in either: the process itself, workspaces inside
kernels, files mapped into memory.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

from plan.partition import Partition, spans
from plan.schedule import Schedule

FLOAT = 4  # bytes of a parameter, a gradient, a moment, a number of the residual stream, LayerNorm or loss
ID = 8  # bytes of a token id
MOMENTS = 2  # that AdamW has of each parameter
BIG = 2  # a message and its result, while a collective runs


@dataclass(frozen=True)
class Training:
    """A training run as its memory sees it. Every figure is of the rank that has most: the first of a tp group, which has
    the longest run of heads, columns, vocabulary rows and tokens (`spans`).

    split: the model, over tp. dp: replicas. rows, micro_steps: sequences in a micro-batch, micro-batches in an iteration.
    eval_rows: sequences in an evaluation's batch. width: bytes of a number in the matrix products, 4, or 2 under autocast.
    dropout: whether there is any. gpu: whether the device is one. logit_rows: rows whose logits exist at a time.
    sequence_parallel, activation_checkpointing, dp_shard: as the options of these names.
    """

    split: Partition
    schedule: Schedule
    dp: int
    rows: int
    micro_steps: int
    eval_rows: int
    width: int
    dropout: bool
    gpu: bool
    logit_rows: int
    sequence_parallel: bool = False
    activation_checkpointing: bool = False
    dp_shard: bool = False

    # --- what stays -------------------------------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter on this rank, padding rows included, before dp shards it."""
        return self.split.local_shapes(0)

    @cached_property
    def _layers(self) -> list[int]:
        """Numbers in the parameters of each layer."""
        counts = [0] * self.split.n_layer
        for name, shape in self.shapes.items():
            if name.startswith("transformer.h."):
                counts[int(name.split(".")[2])] += prod(shape)
        return counts

    @property
    def whole(self) -> int:
        """Bytes of this rank's parameters before dp shards them."""
        return FLOAT * sum(map(prod, self.shapes.values()))

    @property
    def parameters(self) -> int:
        """Bytes of the parameters that stay. Sharded over dp, each tensor is cut along its first dimension, in pieces of
        equal length of which the last may be short (torch.chunk's rule): the first rank's is the longest."""
        if not self.dp_shard:
            return self.whole
        return FLOAT * sum(-(-shape[0] // self.dp) * prod(shape[1:]) for shape in self.shapes.values())

    @property
    def gradients(self) -> int:
        """Bytes of the gradients when most of them are there."""
        layers = FLOAT * sum(self._layers)
        return max(self.parameters, self._gradients(0), self._gradients(layers))

    def _gradients(self, done: int) -> int:
        """Bytes of the gradients in the last micro-batch's backward pass, when that has gone through layers of `done` bytes.

        What the micro-batches before have added up lies there whole. Replicated over dp there are DistributedDataParallel's
        buckets besides, always, to which a gradient moves when it is done; sharded, this rank's part of each that is done.
        """
        if self.dp == 1:
            return self.whole if self.micro_steps > 1 else done
        sums = self.whole - done if self.micro_steps > 1 else 0
        return sums + (-(-done // self.dp) if self.dp_shard else self.whole)

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's moments."""
        return MOMENTS * self.parameters

    # --- what a micro-batch keeps -----------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        return self.rows * self.split.block_size

    @property
    def own_tokens(self) -> int:
        """The tokens of the residual stream that this rank has."""
        lo, hi = spans(self.split.block_size, self.split.tp if self.sequence_parallel else 1)[0]
        return self.rows * (hi - lo)

    @property
    def stream(self) -> int:
        """Bytes of this rank's residual stream."""
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

    def _mask(self, width: int) -> int:
        """Bytes of a dropout mask over the residual stream, whose numbers have `width` bytes."""
        if not self.dropout:
            return 0
        return self.own_tokens * self.split.n_embd * (1 if self.gpu else width)

    def _residual_mask(self, sub_block: int) -> int:
        """The mask of one sub-block's output. Within a run of several between two sync points it is made of ones, and stays."""
        before = sub_block == 0 or self.schedule.syncs[sub_block - 1]
        if self.schedule.syncs[sub_block] and before:
            return self._mask(FLOAT if self.split.bias else self.width)  # a float32 bias widens what it is added to
        return self.tokens * self.split.n_embd * self.width if self.dropout else 0

    def _linear(self, inputs: int, outputs: int) -> int:
        """Bytes of a weight's copy under autocast, kept for the backward pass."""
        return inputs * outputs * self.width if self.width < FLOAT else 0

    @property
    def attention_scores(self) -> int:
        """Bytes of one [T, T] matrix a head, where attention makes them: with dropout, on a CPU."""
        heads = self.channels // self.split.head_dim
        return self.rows * heads * self.split.block_size**2 * FLOAT if self.dropout and not self.gpu else 0

    def kept_by_norm(self) -> int:
        """Its input, and each token's mean and deviation."""
        return self.stream + 2 * self.own_tokens * FLOAT

    def kept_by_attention(self, layer: int) -> int:
        """Bytes that a layer's first half keeps for the backward pass."""
        C, q = self.split.n_embd, self.channels
        heads = q // self.split.head_dim
        kept = self.kept_by_norm() + self.own_tokens * C * self.width  # the input of c_attn
        if self.attention_scores:  # the plain formula, in float32: q, k and v; probabilities, mask and their product
            kept += 3 * self.tokens * q * FLOAT + 3 * self.attention_scores + self.tokens * q * self.width
        else:  # q, k and v; attention's output, which is c_proj's input; a logarithm a head and token
            kept += 4 * self.tokens * q * self.width + self.tokens * heads * FLOAT
        return kept + self._residual_mask(2 * layer) + self._linear(C, 3 * q) + self._linear(q, C)

    def kept_by_mlp(self, layer: int) -> int:
        """Bytes that a layer's second half keeps for the backward pass."""
        C, m = self.split.n_embd, self.columns
        kept = self.kept_by_norm() + self.own_tokens * C * self.width  # the input of c_fc
        kept += 2 * self.tokens * m * self.width  # GELU's input, and c_proj's
        return kept + self._residual_mask(2 * layer + 1) + 2 * self._linear(C, m)

    def kept_by_layer(self, layer: int) -> int:
        return self.kept_by_attention(layer) + self.kept_by_mlp(layer)

    def _handed_on(self, layer: int) -> int:
        """Bytes that a layer begins with: the stream; between two sync points this rank's own version of it, and its outputs
        since the last."""
        if layer == 0 or self.schedule.syncs[2 * layer - 1]:
            return self.stream
        return self.stream + self.tokens * self.split.n_embd * self.width

    @cached_property
    def _kept(self) -> list[int]:
        """Bytes kept by the embedding, by it and the first layer, and so on, when the forward pass is over."""
        ids = 2 * self.tokens * ID + (self.tokens * (ID + 1) if self.split.tp > 1 else 0)  # and where each is looked up
        held = self._handed_on if self.activation_checkpointing else self.kept_by_layer
        return list(accumulate(map(held, range(self.split.n_layer)), initial=ids + self._mask(FLOAT)))

    @property
    def activations(self) -> int:
        """Bytes that a whole forward pass keeps: those above and the last LayerNorm's."""
        return self._kept[-1] + self.kept_by_norm()

    # --- what comes and goes ----------------------------------------------------------------------------------------

    @property
    def table(self) -> int:
        """Bytes of the embedding table's gradient. The head makes one, which waits for the embedding's."""
        return prod(self.shapes["transformer.wte.weight"]) * FLOAT

    def _logits(self, rows: int) -> int:
        """Bytes of one chunk's logits: in half precision, in float32, and their gradient in half precision again."""
        numbers = min(self.logit_rows, rows * self.split.block_size) * self.split.local_vocab
        return numbers * (FLOAT if self.width == FLOAT else FLOAT + 2 * self.width)

    def head(self) -> int:
        """Bytes of the head and the loss beyond what is kept: hidden states and their gradient, the table's gradient, one
        chunk of logits; under autocast the table and a chunk's part of its gradient in half precision."""
        C, V = self.split.n_embd, self.split.local_vocab
        half = 2 * V * C * self.width + self.logit_rows * C * self.width if self.width < FLOAT else 0
        if half and not self.gpu:  # a CPU widens the whole of what it adds to a wider tensor
            half += self.table
        chunk = self._logits(self.rows) + min(self.logit_rows, self.tokens) * C * self.width
        return 2 * self.tokens * C * FLOAT + self.table + chunk + half

    def _cast_weights(self) -> int:
        """Bytes of the half-precision weights that autocast holds until the forward pass is over, whoever keeps them: those
        of row-parallel layers, and where nothing is said between ranks those of all."""
        C, q, m = self.split.n_embd, self.channels, self.columns
        column = self._linear(C, 3 * q + m) if self.split.tp == 1 else 0
        return (self._linear(C, q + m) + column) * self.split.n_layer

    def backward(self, layer: int) -> int:
        """Bytes that a layer's backward pass takes at its height, beyond what was kept and the gradients of other layers."""
        C, q, m = self.split.n_embd, self.channels, self.columns
        wide, narrow = self.tokens * C * FLOAT, self.tokens * C * self.width
        hidden, weight = self.tokens * m * self.width, m * C * FLOAT + self._linear(m, C)
        half = narrow if self.width < FLOAT else 0
        # mlp.c_proj: the stream's gradient, in half precision too, gathered where it is split, that of its input, its weight's
        first = self.stream + half + (BIG * narrow if self.sequence_parallel else 0) + hidden + weight
        # c_fc: GELU's input and output are gone; a message that sums its input's gradient
        message = BIG * wide if self.split.tp > 1 else narrow
        again = BIG * narrow if self.sequence_parallel else 0
        second = self.stream + max(message + half, message + again + weight) + weight - hidden
        # attention: the MLP's is gone; gradients of q, k and v one by one, side by side, and the last in order
        attention = self.stream + 2 * self.tokens * 3 * q * self.width + self.attention_scores - self.kept_by_mlp(layer)
        return max(first, second, attention)

    @property
    def _root(self) -> int:
        """Sharded over dp: bytes of the whole parameters outside the layers, gathered for both passes."""
        return self.whole - FLOAT * sum(self._layers) if self.dp_shard else 0

    @property
    def _layer(self) -> int:
        """Sharded over dp: bytes of a layer's whole parameters."""
        return FLOAT * max(self._layers) if self.dp_shard else 0

    # --- the peak ---------------------------------------------------------------------------------------------------

    def moments(self) -> dict[str, int]:
        """Bytes at each moment of an iteration that may be its peak, the process itself not counted.

        Sharded over dp (FSDP2, a layer a unit) there are, while a layer's backward pass begins, its parameters, those of the
        next one on their way (in gloo's hands twice), and the gradients of the one before on theirs.
        """
        layers = [FLOAT * n for n in self._layers]
        last = len(layers) - 1
        states = self.parameters + self.optimizer
        cast = self._cast_weights() if self.activation_checkpointing else 0
        buckets = self.whole if self.dp > 1 and not self.dp_shard else 0
        found = {"evaluation": states + buckets + self._evaluation() + self._root + 2 * self._layer}
        kept = self.activations + self.head() + cast
        found["head and loss"] = states + self._gradients(0) + kept + self._root + self._layer
        for layer in reversed(range(last + 1)):
            kept = self._kept[layer + 1]
            if self.activation_checkpointing:  # made again, but for the first LayerNorm's input, which is what was kept
                kept += self.kept_by_layer(layer) - self.stream
            took = self.backward(layer)
            if layer and not self.gpu:
                took = max(took, self._layer + self.stream)
            took += self._root + self._layer * (1 + (layer > 0) + (layer < last))
            found[f"layer {layer}, backward"] = states + self._gradients(sum(layers[layer + 1 :])) + kept + self.table + took
        tables = 2 * self.table + self._kept[0] + self._root + self._layer
        found["embedding, backward"] = states + self._gradients(sum(layers)) + tables
        found["optimizer"] = states + buckets if buckets else states + self.parameters
        return found

    def _evaluation(self) -> int:
        """Bytes of a forward pass that keeps nothing: the stream and one MLP, or the stream, the last hidden states and
        logits."""
        C, tokens = self.split.n_embd, self.eval_rows * self.split.block_size
        mlp = tokens * (2 * C * FLOAT + (C + 2 * self.columns) * self.width)
        half = self.split.local_vocab * C * self.width if self.width < FLOAT else 0
        return max(mlp, 2 * tokens * C * FLOAT + self._logits(self.eval_rows) + half) + self._cast_weights()

    @property
    def temporary(self) -> int:
        """Bytes of what comes and goes within a pass, when most of it is there; in training that is always the table's second
        gradient, and most at the head, or in a layer's backward pass. An evaluation may have more rows."""
        layers = range(self.split.n_layer)
        remade = (self.kept_by_layer(0) - self.stream, self._cast_weights()) if self.activation_checkpointing else (0, 0)
        pass_back = self.table + max(map(self.backward, layers)) + remade[0]
        most = max(self.head() + remade[1] + self.table, pass_back + self.table, self._evaluation())
        return most + self._root + (3 if self.gpu else 4) * self._layer

    def live(self) -> tuple[int, str]:
        """(bytes, the moment's name) of the largest moment: the most that tensors take."""
        moments = self.moments()
        name = max(moments, key=lambda moment: moments[moment])
        return moments[name], name

    @property
    def peak(self) -> int:
        """The most bytes that the rank takes, the process itself not counted: the largest moment; where what is freed is kept,
        all parts."""
        parts = self.parameters + self.gradients + self.optimizer + self.activations + self.temporary
        return self.live()[0] if self.gpu or self.dp_shard else parts

    @property
    def kv_cache(self) -> int:
        """Bytes of the keys and values of one sequence of block_size tokens, when this model generates text. Training has
        none."""
        return 2 * self.split.n_layer * self.channels * self.split.block_size * self.width

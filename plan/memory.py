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
from math import prod

from plan.partition import Partition, length, spans
from plan.stages import TABLE, Stages

FLOAT = 4  # bytes of a parameter, a gradient, a moment, a number of the residual stream
ID = 8  # bytes of a token id
# The most numbers in a message of local steps: a slow link must send it within --comm_timeout
MESSAGE = 2**23


@dataclass(kw_only=True)
class Training:
    """A training run. Each figure is of the rank that has most: the first of a tp group (`spans`),
    of those with the stages of `stages`.
    rows, eval_rows: sequences in a micro-batch and in a batch of an evaluation. width: bytes of a
    number in products, 4, or 2 under autocast. logit_rows: rows whose logits exist at a time.
    groups: of dp ranks; each averages its gradients. outer: copies of the parameters that local
    steps keep: 1, with an outer momentum 2."""

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
    groups: int = 1
    outer: int = 0
    stages: Stages | None = None

    def __post_init__(self) -> None:
        s, w = self.split, self.width
        self.place = place = self.stages or Stages(s.n_layer)
        # padding included, before dp shards them
        self.shapes = {n: shape for n, shape in s.local_shapes(0).items() if place.holds(n)}
        self.whole = FLOAT * sum(map(prod, self.shapes.values()))
        self._layers = FLOAT * sum(prod(shape) for n, shape in self.shapes.items() if ".h." in n)
        # a gradient of the embedding table: the head's waits for the embedding's
        self._table = FLOAT * prod(self.shapes.get(TABLE, (0,)))
        # sharded over dp, each tensor is cut along dimension 0; the first piece is the longest
        self.own = self.dp // self.groups
        dp = self.own if self.dp_shard else 1
        pieces = (-(-rows // dp) * prod(rest) for rows, *rest in self.shapes.values())
        self.parameters = FLOAT * sum(pieces)
        self.optimizer = (2 + self.outer) * self.parameters
        self.gradients = max(self.parameters, self._gradients(0), self._gradients(self._layers))
        self.tokens = self.rows * s.block_size
        own = spans(s.block_size, s.tp if self.sequence_parallel else 1)[0]
        self.own_tokens = self.rows * length(own)  # of the residual stream
        self.stream = self.own_tokens * s.n_embd * FLOAT
        self.kept_by_norm = self.stream + 2 * self.own_tokens * FLOAT  # input; means, deviations
        layer, half = self._kept_by_layer(), self._half_weights()
        self.kept_by_layer = layer + half
        self.activations = self._kept(self.stream if self.activation_checkpointing else layer, half)
        # whole parameters under dp_shard: those in no layer, and three layers'
        layers = self._layers - 3 * self._layers // s.n_layer
        layers *= place.pp == 1  # PyTorch's stages keep all that they have gathered
        self._gathered = self.whole - layers if self.dp_shard else 0
        self._passing = self._within_a_pass()
        # what local steps have changed, and a message of it
        message = min(self.parameters, FLOAT * MESSAGE)
        self._averaging = (self.parameters + message) * (self.outer > 0)
        passing = max(self._passing.values()) + self._table + self._gathered
        self.temporary = max(passing, self._averaging)
        self.kv_cache = w * s.cache_numbers(s.block_size)  # of a sequence, in generation

    def _kept(self, layer: int, half: int) -> int:
        """Activations: token ids, layers, the last LayerNorm, in a pipeline the streams between
        stages. One stage receives in as much memory as it uses at a time; what it has received is
        the input of its first layer. With two on a rank PyTorch allocates for all micro-batches of
        an iteration, as it does for those of an evaluation. Bytes a layer: `layer` for each
        micro-batch, `half` for all."""
        place, m = self.place, self.micro_steps if self.place.pp > 1 else 1
        before, after = place.messages()
        passes, own = place.in_flight(m), sum(length(place.layers[stage]) for stage in place.mine)
        received = after if place.kind.each == 1 else m * (before + after)
        kept = passes * after // place.kind.each  # until their gradients come
        found = m * 2 * self.tokens * ID + (received + kept) * self.stream
        found += before * place.count * self.stream // self.rows * self.eval_rows
        found += passes * own * layer // place.kind.each + own * half
        if place.has_last:  # the loss holds the table's gradient from one pass to the other
            found += passes * self.kept_by_norm + (passes - 1) * self._table
        return found

    def _gradients(self, done: int) -> int:
        """Bytes of gradients in the last micro-batch, when those of `done` bytes are there. Earlier
        micro-batches leave sums; dp adds DDP's buckets or, sharded, this rank's part of `done`."""
        if self.own == 1 or self.place.pp > 1:
            return self.whole if self.micro_steps > 1 else done
        sums = self.whole - done if self.micro_steps > 1 else 0
        return sums + (-(-done // self.own) if self.dp_shard else self.whole)

    def _half_weights(self) -> int:
        """Copies of a layer's weights that autocast keeps: with tp none of those split by columns.
        """
        channels, columns = length(self.split.channels(0)), length(self.split.columns(0))
        kept = channels + columns if self.split.tp > 1 else 4 * channels + 2 * columns
        return kept * self.split.n_embd * self.width if self.width < FLOAT else 0

    def _kept_by_layer(self) -> int:
        """What a layer keeps for its backward pass, but half weights: the table at the head of this
        file."""
        s, w, mask = self.split, self.width, self.dropout * (1 if self.gpu else self.width)
        channels, columns = length(s.channels(0)), length(s.columns(0))
        kept = 2 * self.kept_by_norm + 2 * self.own_tokens * s.n_embd * (w + mask)
        kept += self.tokens * (4 * channels + 2 * columns) * w
        heads = channels // s.head_dim
        if self.dropout and not self.gpu:  # probabilities, mask, product; q, k and v in float32
            return kept + 3 * self.tokens * (heads * s.block_size * FLOAT + channels * (FLOAT - w))
        return kept + self.tokens * heads * FLOAT  # logarithms of the kernel's sums

    def _within_a_pass(self) -> dict[str, int]:
        """Bytes of what comes and goes within a pass, by moment. An evaluation keeps nothing but
        the head's and one MLP's. The loss has the table's gradient and its half-precision copies. A
        layer's backward pass has gradients, a message, activations computed again."""
        s, w, columns = self.split, self.width, length(self.split.columns(0))

        def head(tokens: int, number: int) -> int:
            """The last hidden states, their gradient, and `number` bytes for each logit."""
            logits = min(self.logit_rows, tokens) * s.local_vocab
            return 2 * tokens * s.n_embd * FLOAT + logits * number

        wide = FLOAT if w == FLOAT else FLOAT + 2 * w  # logits, their gradient in both precisions
        loss = head(self.tokens, wide) + self._table
        seen, half = self.eval_rows * s.block_size, 0 if w == FLOAT else 1 if self.gpu else 2
        if half:  # then two products of the gradient in half precision, or its making
            product = head(self.tokens, 2 * w) + self._table * (1 + half)
            loss = max(product, loss + self._table // 2)
        message = 2 * self.tokens * s.n_embd * (FLOAT + w * self.sequence_parallel) * (s.tp > 1)
        backward = self.stream + max(self.tokens * columns * w, message)
        backward += columns * s.n_embd * FLOAT  # a weight's gradient
        again = self.kept_by_layer - self.stream if self.activation_checkpointing else 0
        last = self.place.has_last
        return {
            "evaluation": head(seen, wide) * last + 2 * seen * columns * w,
            "head and loss": loss * last,
            "last layer, backward": backward + again + self._table,
        }

    def live(self) -> tuple[int, str]:
        """(bytes, its name) of the largest moment: the most that tensors take at a time."""
        moments = {
            name: self._gradients(0) + self.activations * (name != "evaluation") + passing
            for name, passing in self._passing.items()
        }
        moments["embedding, backward"] = self._gradients(self._layers) + 2 * self._table
        moments["averaging"] = self._averaging
        name = max(moments, key=moments.__getitem__)
        return self.parameters + self.optimizer + self._gathered + moments[name], name

    @property
    def peak(self) -> int:
        """The most bytes that the rank takes, without the process itself."""
        parts = self.parameters + self.gradients + self.optimizer + self.activations
        return self.live()[0] if self.gpu or self.dp_shard else parts + self.temporary

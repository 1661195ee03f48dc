"""Every command's options as dataclasses; grammar.py reads them from the command line.

Options that nanoGPT has keep its names, meanings and nearly all defaults, so its config files work.
device, dtype and compile differ, because nanoTP also runs on CPUs."""

import dataclasses
from dataclasses import dataclass
from typing import Any, dataclass_transform


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, *,
           low: float | None = None, high: float | None = None, above: float | None = None,
           below: float | None = None, required: bool = False, also: str = "") -> Any:  # fmt: skip
    """A dataclass field with its line of help and its limits; `also` is a second name for it. `low`
    and `high` are allowed, `above` and `below` are not. A required option must not stay ""."""
    metadata = locals()
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# Options that hold a path, in every command, and a regular expression of what stands before it.
PATHS = {"start": "^(?:FILE|PROMPTS):", "prompt": "^FILE:"} | dict.fromkeys(
    ("data_dir", "dataset", "draft", "init_from", "kept", "out", "out_dir", "report", "scan",
     "shards", "text", "tokenizer"), "^")  # fmt: skip
DTYPES = ("auto", "float32", "bfloat16", "float16")
SOURCES = "hub name, HF directory, ckpt.pt, shard or training directory"
SYNC = "sync points: all, mlp, every:K, 0a,0m,1m or delay:D+0a; default: as the weights say"
TOKENIZER = "directory with tokenizer.json or meta.pkl, gpt2 or ids; default: the checkpoint's"

# --- each class's docstring is the description that --help shows ----------------------------------


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class EntryOptions:
    """Options of every command. Subclasses are frozen dataclasses, too."""

    debug: bool = option(False, "show the traceback of an error, too")

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


class RunOptions(EntryOptions):
    """Options of every command that torchrun starts."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option("auto", "precision of the computation", DTYPES)
    comm: str = option("auto", "transport of the collectives", ("auto", "nccl", "gloo", "shm"))
    link: str = option("", "emulate a slower link over shm: alpha_us:200,GBps:1, or its name")
    compile: bool = option(False, "run the model through torch.compile")
    seed: int = option(1337, "seed of all random choices", low=0, high=2**63 - 1)
    threads: int = option(0, "CPU threads a rank, 0 = cores divided by ranks", low=0, high=1024)
    oversubscribe: bool = option(False, "let several ranks share one GPU, over gloo")
    comm_timeout: float = option(120.0, "seconds a collective waits for other ranks", above=0)
    start_timeout: float = option(30.0, "seconds to wait for all ranks at the start", above=0)
    report: str = option("", "write the run's account: a page to FILE.html, else JSON")


class MeshOptions(RunOptions):
    """Options of every command that arranges its ranks as dp x tp."""

    tp: int = option(0, "tensor-parallel size, 0 = world size", low=0)


class InferenceOptions(RunOptions):
    """Options of every command that runs a trained model."""

    init_from: str = option("resume", f"weights: {SOURCES}; resume = out_dir")
    out_dir: str = option("out", "training directory that init_from=resume reads")
    quantize: str = option("", "int8: 8-bit matrices, smaller and faster", ("", "int8"))
    sync: str = option("", SYNC)
    sequence_parallel: bool = option(False, "split activations over the sequence, to save memory")
    pp: int = option(1, "ranks that share the layers, as pipeline stages", low=1)
    tokenizer: str = option("", TOKENIZER)


class SampleOptions(InferenceOptions):
    """Generate text with a model split over all ranks. In float32 it is the same text at any tp."""

    start: list[str] = option(["\n"], "prompt; FILE:path reads one, PROMPTS:path one a line; may be"
                                      " repeated", also="prompt")
    num_samples: int = option(1, "samples drawn for each prompt", low=1)
    batch_size: int = option(32, "rows (prompts x samples) generated at a time", low=1)
    max_new_tokens: int = option(200, "tokens generated for each sample", low=1)
    temperature: float = option(0.8, "less than 1: likelier tokens, 0: greedy", low=0)
    top_k: int = option(200, "sample among the k likeliest tokens, 0 = all", low=0)
    top_p: float = option(1.0, "sample among the likeliest of this probability", above=0, high=1)
    stop: str = option("", "end a sample where this text appears")
    data_dir: str = option("data", "where a nanoGPT checkpoint's dataset has its characters")
    stop_token: str = option("", "end a sample with this token: eos, the tokenizer's own, or an id")
    stream: bool = option(True, "print the text as it is generated")
    out: str = option("", "keep the samples in this file, one JSON object a line")
    overflow: str = option("slide", "at block_size tokens: keep the last ones, end, or refuse",
                           ("slide", "stop", "error"))
    kv_cache: bool = option(True, "keep keys and values of past tokens")
    draft: str = option("", "guess ahead, the same text in fewer passes: ngram, or a small model")
    draft_tokens: int = option(5, "tokens guessed ahead at most", low=1)
    kernels: bool = option(False, "decode on a GPU with Triton kernels (not measured yet)")


# nanoGPT's options come first, in nanoGPT's order. gradient_accumulation_steps counts the whole
# job's micro-batches (nanoGPT divides by its ranks, this by dp), so an iteration holds the same
# tokens on any number of ranks.
class TrainOptions(MeshOptions):
    """Train from scratch, fine-tune, resume or evaluate a GPT, pp x tp ranks to a model and
    world size / (pp x tp) models."""

    out_dir: str = option("out", "directory of the checkpoints, metrics.jsonl and the tokenizer")
    eval_interval: int = option(2000, "iterations between two evaluations", low=1)
    log_interval: int = option(1, "iterations between two printed lines", low=1)
    eval_iters: int = option(200, "batches of each split in an evaluation", low=1)
    eval_only: bool = option(False, "evaluate once, then end")
    always_save_checkpoint: bool = option(True, "save after every evaluation, not only the best")
    init_from: str = option("scratch", "scratch, resume, or weights: hub name, HF directory,"
                                       " ckpt.pt, shard directory")
    wandb_log: bool = option(False, "send the metrics to wandb as well")
    wandb_project: str = option("nanotp", "wandb project")
    wandb_run_name: str = option("gpt2", "wandb run name")
    dataset: str = option("openwebtext", "directory below data_dir with train.bin and val.bin")
    data_dir: str = option("data", "directory of the datasets")
    gradient_accumulation_steps: int = option(40, "micro-batches an iteration, of all dp", low=1)
    batch_size: int = option(12, "sequences in a micro-batch", low=1)
    block_size: int = option(1024, "tokens in a sequence", low=1)
    n_layer: int = option(12, "layers", low=1)
    n_head: int = option(12, "attention heads a layer", low=1)
    n_embd: int = option(768, "width of the residual stream", low=1)
    dropout: float = option(0.0, "0 for pretraining, 0.1 or more for fine-tuning", low=0, high=1)
    bias: bool = option(False, "biases in the linear layers and LayerNorms")
    learning_rate: float = option(6e-4, "highest learning rate", low=0)
    max_iters: int = option(600000, "iterations in all", low=0)
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only", low=0)
    beta1: float = option(0.9, "AdamW's first beta", low=0, below=1)
    beta2: float = option(0.95, "AdamW's second beta", low=0, below=1)
    grad_clip: float = option(1.0, "clip the norm of the whole gradient to this, 0 = off", low=0)
    decay_lr: bool = option(True, "warm up and decay the learning rate; False keeps it constant")
    warmup_iters: int = option(2000, "iterations of linear warm-up", low=0)
    lr_decay_iters: int = option(600000, "iteration at which the decay has reached min_lr", low=0)
    min_lr: float = option(6e-5, "lowest learning rate", low=0)
    backend: str = option("", "nanoGPT's name for comm, used where comm=auto", ("", "nccl", "gloo"))
    pp: int = option(1, "ranks that share the layers, as pipeline stages", low=1)
    pp_schedule: str = option("1F1B", "order of micro-batches in stages: 1F1B, GPipe and others")
    sync: str = option("", SYNC)
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass")
    sequence_parallel: bool = option(False, "split activations over the sequence, to save memory")
    dp_shard: bool = option(False, "shard parameters, gradients and optimizer over dp (FSDP2)")
    dp_every: int = option(0, "iterations between averagings over dp (DiLoCo), 0 = plain dp", low=0)
    dp_groups: int = option(0, "with dp_every: groups of dp ranks, 0 = each rank is one", low=0)
    outer_lr: float = option(0.7, "with dp_every: factor of the mean change, 1 = average", above=0)
    outer_momentum: float = option(0.9, "with dp_every: its Nesterov momentum", low=0, below=1)
    dp_reduce_dtype: str = option("float32", "precision of sums over dp", ("float32", "bfloat16"))
    async_save: bool = option(False, "write checkpoints in the background, from a copy")
    save_interval: int = option(0, "iterations between checkpoints, 0 = at evaluations", low=0)
    check_replicas: int = option(500, "iterations between checks of the replicas, 0 = never", low=0)
    keep_last: int = option(3, "checkpoints kept in out_dir, 0 = all", low=0)
    overwrite: bool = option(False, "start over: old checkpoints go with the first new one")
    progress: bool = option(True, "progress bar on a terminal")
    dry_run: bool = option(False, "print each layout's memory and end: 0 it fits, 1 not")
    memory: str = option("", "with dry_run: a rank's memory, such as 80GB or 24GiB")
    ranks: int = option(0, "with dry_run: the number of ranks, 0 = those started", low=0)

    def __post_init__(self) -> None:  # nothing else needs to know of the second name
        if self.backend and self.comm == "auto":
            object.__setattr__(self, "comm", self.backend)


class EvalOptions(InferenceOptions):
    """Measure the exact perplexity of a text (--text) or of a prepared dataset (--dataset)."""

    text: str = option("", "text file to measure")
    dataset: str = option("", "directory below data_dir to measure instead of a text file")
    data_dir: str = option("data", "directory of the datasets")
    split: str = option("val", "which part of the dataset", ("train", "val"))
    stride: int = option(0, "tokens between two windows, 0 = block_size: side by side", low=0)
    batch_size: int = option(8, "windows in a forward pass", low=1)
    max_tokens: int = option(0, "measure only this many tokens, 0 = all", low=0)


class DropOptions(RunOptions):
    """Options of every step of dropping sync points."""

    init_from: str = option("", "weights as in sample_tp.py", required=True)
    dataset: str = option("", "directory below data_dir with train.bin and val.bin")
    data_dir: str = option("data", "directory of the datasets")
    max_tokens: int = option(0, "measure only this many tokens, 0 = all", low=0)
    batch_size: int = option(16, "sequences in a batch", low=1)


class OutOptions(EntryOptions):
    """Options of every command that writes weights."""

    out: str = option("", "shard directory to write", required=True)
    force: bool = option(False, "replace the output where it exists")


class GroupOptions(DropOptions, OutOptions):
    """Group heads with the neurons that depend on them: the same model, which loses less where
    sync points are dropped."""

    ranks: int = option(2, "tensor-parallel size the groups are for", low=2)
    sync: str = option("mlp", "schedule the groups are for", ("mlp", "delay:1"))
    tokens: int = option(8192, "tokens of the training split that choose the groups", low=1)


class ScanOptions(DropOptions):
    """Measure the perplexity under many schedules, and find the one with the fewest sync points
    within a budget. The sync points in between are dropped, or delayed with --delay."""

    scan: str = option("", "keep what was measured in this file, and go on from it")
    budget: str = option("", "allowed increase of the perplexity, such as 1%")
    search: str = option("greedy", "drop the cheapest that is left, or in a first scan's order",
                         ("greedy", "order"))
    delay: int = option(0, "delay sums by so many sub-blocks, as --sync=delay:D; 0 = drop", low=0)
    schedules: str = option("mlp;every:2", "more schedules to measure, with semicolons between")
    decode_tokens: int = option(0, "time this many new tokens, too; 0 = no", low=0)


class RepairOptions(DropOptions, OutOptions):
    """Train weights for fewer sync points on the outputs of the original, and write shards."""

    sync: str = option("", "the schedule: mlp, every:K, 0a,0m,1m or delay:D+0a", required=True)
    steps: int = option(300, "steps for each run between two sync points, 0 = none", low=0)
    learning_rate: float = option(1e-3, "highest learning rate of those", above=0)
    whole_steps: int = option(0, "steps end to end after that, 0 = none", low=0)
    whole_learning_rate: float = option(3e-4, "highest learning rate of those", above=0)
    control: bool = option(True, "train the dense model as many steps on the text, to compare")


class BenchShapeOptions(RunOptions):
    """The shape of the model that is measured or counted."""

    n_layer: int = option(12, "layers", low=1)
    n_head: int = option(12, "attention heads a layer", low=1)
    n_embd: int = option(768, "width of the residual stream", low=1)
    vocab_size: int = option(50257, "size of the vocabulary", low=2)


class BenchOptions(BenchShapeOptions):
    """Options of every measurement."""

    repeats: int = option(7, "rounds; medians and spreads are over them", low=1)
    against: str = option("", "contestants in turn with nanoTP in each round, with commas between")


class BenchModelOptions(BenchOptions):
    """Options of the measurements of generation."""

    init_from: str = option("", "weights as in sample_tp.py; default: random ones")
    prompt_tokens: int = option(128, "length of the prompt", low=1)
    quantize: str = option("", "int8: 8-bit matrices, also in contestants", ("", "int8"))
    sync: str = option("", "sync points, as in sample_tp.py")
    sequence_parallel: bool = option(False, "split the prompt's activations, as in sample_tp.py")


class BenchDecodeOptions(BenchModelOptions):
    """Decode greedily after a prompt; --against=hf,ctranslate2,llama_cpp,one_rank,float32,
    all_syncs,no_draft (from one_rank on it is nanoTP: on one thread; with the weights in float32;
    with the schedule all; without the draft)."""

    new_tokens: int = option(128, "tokens generated in a round", low=2)
    batch_size: int = option(1, "texts at a time, each after a prompt of its own", low=1)
    prompt: str = option("", "text to decode after, or FILE:path; default: random tokens")
    draft: str = option("", "guess ahead, as in sample_tp.py")
    draft_tokens: int = option(5, "tokens guessed ahead at most", low=1)


class BenchTextsOptions(BenchModelOptions):
    """Write many texts of different lengths, as many at a time as --batch_size says, also in
    contestants; --against=hf,ctranslate2."""

    texts: int = option(200, "prompts", low=1)
    prompt_tokens: int = option(200, "tokens of the longest prompt, at least 8", low=8)
    new_tokens: int = option(200, "new tokens of the longest text, at least 16", low=16)
    batch_size: int = option(64, "texts at a time", low=1)
    comm_timeout: float = option(1500.0, "seconds that ranks wait for a contestant", above=0)


class BenchPrefillOptions(BenchModelOptions):
    """Read a prompt and choose the first new token; --against=hf,ctranslate2."""

    prompt_tokens: int = option(512, "length of the prompt", low=1)


class BenchTrainOptions(BenchOptions, MeshOptions):
    """Train; --against=reference (model.py in one process on all cores, AdamW, full logits)."""

    batch_size: int = option(4, "sequences in a step", low=1)
    block_size: int = option(256, "tokens in a sequence", low=1)
    steps: int = option(3, "steps in a round", low=1)
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass")


class BenchSaveOptions(BenchOptions, MeshOptions):
    """How long a checkpoint stops a run, saved in front and in the background."""

    batch_size: int = option(2, "sequences in an iteration", low=1)
    block_size: int = option(128, "tokens in a sequence", low=1)
    steps: int = option(4, "iterations that give the usual time of one", low=1)


class BenchAllreduceOptions(BenchOptions):
    """All-reduces of many sizes over every transport that can run here."""

    sizes: str = option(
        "1024,3072,16384,65536,262144,1048576,4194304,16777216", "bytes of messages")


class BenchBlockOptions(BenchOptions):
    """Run an MLP, attention or a layer under every strategy (naive, megatron, sequence, spd): its
    errors, messages, time, memory."""

    part: str = option("layer", "what is measured", ("mlp", "attention", "layer"))
    mistake: str = option("", "run megatron with a mistake, too: qkv cut in one piece, bias on"
                              " every rank, f or g left out", ("", "qkv", "bias", "no_f", "no_g"))
    tp: str = option("1,2,4,8", "tensor-parallel sizes; those above the world size are counted")
    intermediate: int = option(0, "width of the MLP's hidden layer, 0 = 4 x n_embd", low=0)
    batch_size: int = option(1, "sequences", low=1)
    block_size: int = option(128, "tokens in a sequence", low=1)


class BenchDiagramOptions(BenchShapeOptions):
    """Draw a layer as its ranks see it, and compare the strategies by formula (one process)."""

    tp: str = option("2", "tensor-parallel sizes, the first is drawn, the table has all")
    sync: str = option("all", "sync points, as in sample_tp.py")
    sequence_parallel: bool = option(False, "draw it with activations split over the sequence")
    batch_size: int = option(1, "sequences", low=1)
    block_size: int = option(128, "tokens in a sequence", low=1)


class BenchPageOptions(RunOptions):
    """Make a page of a kept report: --kept=run.json --report=run.html (one process)."""

    kept: str = option("", "the report: JSON, or a page, which contains its JSON", required=True)


class BenchPredictOptions(BenchOptions):
    """Predict with a cost model how long a step takes on given hardware, at which tp and with which
    sync points it is fastest, and when one device is."""

    hardware: str = option("all", "profiles with commas between, all, or custom")
    model: str = option("gpt2,gpt2-medium,gpt2-large,gpt2-xl,7b-like,13b-like",
                        "shapes with commas between, all, or custom: that of --n_layer and so on")
    tp: str = option("1,2,4,8", "tensor-parallel sizes with commas between")
    mode: str = option("decode", "decode, prefill and train with commas between, or all")
    batch_size: int = option(1, "sequences", low=1)
    gradient_accumulation_steps: int = option(1, "training: micro-batches in an iteration", low=1)
    nnodes: int = option(0, "training on so many nodes: which tp, pp and dp are fastest", low=0)
    nproc_per_node: int = option(8, "with --nnodes: ranks of a node", low=1)
    between: str = option("roce-100g", "with --nnodes: a node's link, or alpha_us:40,GBps:5")
    dp_every: int = option(0, "with --nnodes: local steps between averagings over dp", low=0)
    tokens: int = option(512, "tokens in the cache (decode), or in a sequence that is read", low=1)
    quantize: str = option("", "int8: weights of 8 bits", ("", "int8"))
    alpha_us: float = option(0.0, "replaces the profile's microseconds of a message", low=0)
    link_GBps: float = option(0.0, "replaces the profile's GB/s of the link", low=0)
    memory_GBps: float = option(0.0, "replaces the profile's GB/s that a rank reads", low=0)
    peak_tflops: float = option(0.0, "replaces the profile's TFLOP/s of products", low=0)
    memory_GB: float = option(0.0, "replaces the profile's GB of memory", low=0)
    overhead_us: float = option(-1.0, "instead of the profile's: microseconds a sub-block", low=-1)


class SplitOptions(OutOptions):
    """Split pretrained weights into a shard directory: a file for each rank, and a manifest."""

    init_from: str = option("", f"weights: {SOURCES}", required=True)
    tp: int = option(2, "tensor-parallel size: the number of shards", low=1)
    dtype: str = option("auto", "precision of the shards; auto keeps the source's", DTYPES)
    tokenizer: str = option("", TOKENIZER)
    data_dir: str = option("data", "where a nanoGPT checkpoint's dataset has its characters")
    drop_heads: bool = option(False, "leave out the heads of a model that classifies")


class ShardsOptions(EntryOptions):
    """Options of every command that reads shards."""

    shards: str = option("", "shard directory to read", required=True)


class MergeOptions(ShardsOptions):
    """Merge a shard directory into one checkpoint that transformers or nanoGPT can read."""

    out: str = option("", "directory (hf) or file (nanogpt) to write", required=True)
    format: str = option("hf", "format of the checkpoint", ("hf", "nanogpt"))
    force: bool = option(False, "replace the output where it exists")


class VerifyOptions(ShardsOptions):
    """Check every byte of a shard directory against its manifest."""

    shards: str = option("", "shard directory to check", required=True)


class InspectOptions(ShardsOptions):
    """Show which rank owns what in a shard directory, and how many bytes."""


def as_dict(options: EntryOptions) -> dict[str, Any]:
    """The options as plain values that JSON can hold; a copy."""
    return dataclasses.asdict(options)

"""A model that is ready to generate: weights, quantization, compilation, and the draft."""

from typing import Any

import torch

from base.errors import UserError
from checkpoints.sources import Source, identity, open_source, reader, schedule_of, tokenizer_of
from cli.options import SampleOptions
from inference.sampling import Sampling
from inference.speculation import Guesser, Ngrams, SmallModel, Speculation
from parallel.collectives import Axis
from parallel.quantized import Gather, quantize
from plan.partition import Partition
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT
from world.devices import pick_dtype
from world.mesh import World


def need(world: World, source: Source, options: Any, rows: int = 0) -> str:
    """For a run that has no memory left: what the weights take, and the keys and values of the rows."""
    split, dtype = Partition.of(source.config, world.tp.size), pick_dtype(options.dtype, world.device)
    weights = split.count(0) * (1 if options.quantize else dtype.itemsize)
    if options.quantize:  # tokens are looked up in a float table
        weights += split.local_vocab * split.n_embd * dtype.itemsize
    lo, hi = split.heads(0)
    cache = 2 * rows * split.n_layer * (hi - lo) * split.head_dim * split.block_size * dtype.itemsize
    takes = f"The weights take {weights / 1e9:.2f} GB on rank 0"
    if cache:
        takes += f", keys and values of {rows} rows at most {cache / 1e9:.2f} GB"
    if world.device.type == "cuda":
        has = torch.cuda.get_device_properties(world.device).total_memory
        takes += f"; its GPU has {has / 1e9:.2f} GB"
    return f"{takes}. Use more ranks, --quantize=int8 or a smaller --batch_size."


def load(world: World, source: Source, options: Any) -> TensorParallelGPT:
    """The model for inference: each rank reads its own part of the weights."""
    model = TensorParallelGPT(
        source.config,
        world.tp,
        reader(source, world.tp.rank),
        device=world.device,
        dtype=pick_dtype(options.dtype, world.device),
        schedule=schedule_of(source, options.sync, world.tp.size),
        sequence_parallel=options.sequence_parallel,
    )
    return finished(model, options, world.gather)


def finished(model: TensorParallelGPT, options: Any, gather: Gather) -> TensorParallelGPT:
    """Quantized and compiled, as the options say."""
    model.eval()
    if options.quantize:
        quantize(model, gather)
    if options.compile:
        model.compile_blocks()
    return model


def drafted(world: World, options: SampleOptions, tokenizer: Tokenizer, sampling: Sampling) -> Speculation | None:
    """Who guesses ahead. A small model is whole on every rank, on an axis of its own, along which nothing is said. UserError
    where its tokens are not those of the model."""
    if not options.draft:
        return None
    guesser: Guesser = Ngrams()
    if options.draft != "ngram":
        source = open_source(options.draft, (world.rank, world.size), "draft", also=("ngram",))
        world.agree("draft", identity(source))
        theirs = tokenizer_of(source, options.tokenizer)
        if theirs.to_json() != tokenizer.to_json() or source.config.vocab_size < tokenizer.n_vocab:
            raise UserError(
                f"--draft={options.draft} has another vocabulary: {theirs.kind} of {source.config.vocab_size} ids, the model "
                f"{tokenizer.kind} of {tokenizer.n_vocab}. Use a draft with the model's tokenizer, or --draft=ngram."
            )
        dtype = pick_dtype(options.dtype, world.device)
        model = TensorParallelGPT(source.config, Axis("tp"), reader(source, 0), device=world.device, dtype=dtype)
        guesser = SmallModel(finished(model, options, lambda mine: [mine]), sampling)
    return Speculation(guesser, options.draft_tokens)

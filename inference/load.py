"""The model for inference, quantized and compiled as the options say, and its draft."""

from contextlib import suppress
from typing import Any

import torch

from base.errors import Unavailable, UserError
from base.processes import Exchange
from checkpoints.sources import Source, identity, open_source, reader, schedule_of, tokenizer_of
from cli.options import SampleOptions
from inference.packed import pack, suits
from inference.sampling import Sampling
from inference.speculation import Guesser, Ngrams, SmallModel, Speculation
from parallel.collectives import Axis
from parallel.quantized import quantize
from plan.partition import Partition
from plan.stages import Stages
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT
from world.devices import pick_dtype
from world.mesh import World


def load(world: World, source: Source, options: Any) -> TensorParallelGPT:
    """The model for inference, on this rank; options: of sample_tp.py or eval_tp.py."""
    config, tp, schedule = source.config, world.tp, schedule_of(source, options.sync, world.tp.size)
    stages = Stages.over(config, world.pp.size, world.pp.rank).without(schedule)
    model = TensorParallelGPT(config, tp, reader(source, tp.rank), device=world.device,
                              dtype=pick_dtype(options.dtype, world.device), schedule=schedule,
                              sequence_parallel=options.sequence_parallel, stages=stages)
    return _prepared(model, options, lambda x: world.gather(x)[world.rank - tp.rank :][: tp.size])


def _prepared(model: TensorParallelGPT, options: Any, gather: Exchange) -> TensorParallelGPT:
    model.eval()
    if options.quantize:
        quantize(model, gather, (model.stages.has_first, model.stages.has_last))
    if options.compile:
        model.compile_blocks(tuned=model.device.type == "cuda")
    if suits(model):
        with suppress(Unavailable):  # the decoder says why
            pack(model)
    return model


def load_draft(world: World, options: SampleOptions, tokenizer: Tokenizer,
               sampling: Sampling) -> Speculation | None:
    """The draft of --draft, whole on every rank. UserError if its tokens are not the model's."""
    if not options.draft:
        return None
    guesser: Guesser = Ngrams()
    if options.draft != "ngram":
        source = open_source(options.draft, (world.rank, world.size), "draft", also=("ngram",))
        world.agree("draft", identity(source))
        theirs = tokenizer_of(source, options.tokenizer)
        size = source.config.vocab_size
        if theirs.to_json() != tokenizer.to_json() or size < tokenizer.n_vocab:
            ids = f"{theirs.kind} of {size} ids, the model {tokenizer.kind} of {tokenizer.n_vocab}"
            advice = "Use a draft with the model's tokenizer, or --draft=ngram"
            raise UserError(f"--draft={options.draft} has another vocabulary: {ids}. {advice}.")
        place: Any = {"device": world.device, "dtype": pick_dtype(options.dtype, world.device)}
        model = TensorParallelGPT(source.config, Axis("tp"), reader(source, 0), **place)
        guesser = SmallModel(_prepared(model, options, lambda mine: [mine]), sampling)
    return Speculation(guesser, options.draft_tokens)


def memory_needed(world: World, source: Source, options: Any, rows: int = 0) -> str:
    """What the weights and `rows` rows of the KV cache take, for a message about memory."""
    split = Partition.of(source.config, world.tp.size)
    stages = Stages.over(source.config, world.pp.size, world.pp.rank)
    size = pick_dtype(options.dtype, world.device).itemsize
    weights = split.count(0, filter(stages.holds, split.table)) * (1 if options.quantize else size)
    if options.quantize:  # tokens are looked up in a float table
        weights += split.local_vocab * split.n_embd * size
    takes = f"The weights take {weights / 1e9:.2f} GB on rank 0"
    if rows:
        cache = split.cache_numbers(rows * split.block_size) * size / stages.pp
        takes += f", keys and values of {rows} rows at most {cache / 1e9:.2f} GB"
    if world.device.type == "cuda":
        has = torch.cuda.get_device_properties(world.device).total_memory
        takes += f"; its GPU has {has / 1e9:.2f} GB"
    return f"{takes}. Use more ranks, --quantize=int8 or a smaller --batch_size."

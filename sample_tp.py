"""Generate text on N ranks.

    torchrun --standalone --nproc_per_node=2 sample_tp.py --init_from=shards/gpt2-tp2 --prompt="Once upon a time"

Standard output has the text and nothing else; notices, the account and figures go to standard error.
"""

import sys
import time
from typing import Any

from base.errors import ReaderGone, explaining_memory
from base.numbers import nbytes
from checkpoints.sources import Source, identity, open_for_inference, tokenizer_of
from cli.options import SampleOptions
from inference.decoding import Decoder, decoder_for
from inference.generation import Generation, Timing, check_prompts, generate
from inference.load import drafted, load, need
from inference.prompts import encode, read_prompts
from inference.sampling import Sampling
from inference.speculation import Speculation
from inference.stage import Stage, samples_file
from parallel.ledger import Account
from parallel.quantized import read_weights
from plan.partition import Partition
from report import report
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT
from world import peaks
from world.entry import run
from world.mesh import World


def main(world: World, options: SampleOptions) -> None:
    started = time.perf_counter()
    if world.is_main:
        report.check_place(options.report, "report")
        report.check_place(options.out, "out")
    source = open_for_inference(options, (world.rank, world.size))
    world.agree("weights", identity(source))
    tokenizer = tokenizer_of(source, options.tokenizer)
    # files are read by one rank: the others may be on hosts that do not have them
    texts: list[str] = world.gather(read_prompts(options.start) if world.is_main else None)[0]
    prompts = encode(texts, tokenizer)
    sampling = how_to_sample(options, tokenizer)
    check_prompts(prompts, source.config.vocab_size, source.config.block_size, sampling)
    with explaining_memory(lambda: need(world, source, options)):
        model = load(world, source, options)
        draft = drafted(world, options, tokenizer, sampling)
    decoder = decoder_for(model)
    world.synchronize()
    load_s = time.perf_counter() - started
    if world.is_main:
        for notice in notices(world, source, model, decoder, tokenizer):
            print(notice, file=sys.stderr)
    with samples_file(options.out if world.is_main else "") as out:
        stage = Stage(texts, tokenizer, options, out)
        begun = time.perf_counter()
        try:
            rows = min(options.batch_size, len(texts) * options.num_samples)
            why = explaining_memory(lambda: need(world, source, options, rows))
            with world.ledger.during("sampling"), why:
                result = generate(model, prompts, sampling, stage, decoder, draft)
        finally:
            stage.leave()
        seconds = time.perf_counter() - begun
    if any(world.gather(stage.gone)):
        raise ReaderGone
    figures = {"load_s": load_s, **rates(result.timing)}
    samples = stage.samples(result) if world.is_main else []
    account, kv_cache_bytes = world.ledger.snapshot(), result.timing.kv_cache_bytes
    more = {"decoder": decoder.name, **per_token(world.ledger.forward_passes, account, result, draft), "samples": samples}
    made = report.build("sample_tp", world, model, account, figures, seconds, kv_cache_bytes, **more)
    made["utilisation"] = used(world, model, result, decoder).figures(world)
    if world.is_main:
        finish(options, made, result.timing.slid)


def how_to_sample(options: SampleOptions, tokenizer: Tokenizer) -> Sampling:
    return Sampling(
        n_tokens=tokenizer.n_vocab,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        seed=options.seed,
        overflow=options.overflow,
        kv_cache=options.kv_cache,
        batch_size=options.batch_size,
    )


def notices(
    world: World, source: Source, model: TensorParallelGPT, decoder: Decoder, tokenizer: Tokenizer
) -> list[str]:
    """What a user would like to know before waiting: an uneven split, a reshard, a model that one device would hold."""
    lines = [Partition.of(source.config, world.tp.size).imbalance(), tokenizer.note]
    written = getattr(getattr(source, "manifest", None), "tp", world.tp.size)
    if written != world.tp.size:
        lines.append(f"the checkpoint is tp={written}, this run tp={world.tp.size}: resharded on load, no file changed.")
    if not model.schedule.is_plain:
        points, plain = model.schedule.points, 2 * source.config.n_layer
        lines.append(f"ranks synchronise after {points} of {plain} sub-blocks (--sync={model.schedule}); --sync=all is exact.")
    if world.tp.size > 1 and world.device.type == "cuda":
        syncs = model.schedule.points + 1
        size = model.split.count() * next(model.parameters()).element_size()
        lines.append(f"{source.description} ({nbytes(size)}): tp={world.tp.size} makes {syncs} all-reduces a token.")
    if decoder.why:
        lines.append(f"each token is computed by torch, which is slower: {decoder.why}.")
    return [line for line in lines if line]


def per_token(passes: int, account: Account, result: Generation, draft: Speculation | None) -> dict[str, Any]:
    """The report's `per_token`: passes of the model and calls of each op on its behalf (not the small ones by which ranks
    agree on tokens), over all tokens that were generated; and what became of a draft's guesses."""
    tokens = sum(row.new for row in result.rows)
    calls: dict[str, int] = {}
    for entry, tally in account.items():
        if entry.direction == "forward":
            calls[entry.op] = calls.get(entry.op, 0) + tally.calls
    figures = {"passes": passes} | calls
    made: dict[str, Any] = {"per_token": {"tokens": tokens} | {name: round(n / tokens, 6) for name, n in figures.items()}}
    if draft is not None:
        proposed, accepted = draft.proposed, draft.accepted
        rate = round(accepted / proposed, 6) if proposed else 0.0
        made["speculation"] = {"proposed": proposed, "accepted": accepted, "acceptance_rate": rate}
    return made


def used(world: World, model: TensorParallelGPT, result: Generation, decoder: Decoder) -> peaks.Use:
    """What decoding asked of the machine; reading the prompts, where each row got one token."""
    timing, rows, size = result.timing, result.rows, model.config.block_size
    dtype = next(model.parameters()).dtype
    if not timing.decode_steps:
        length = sum(row.prompt_tokens for row in rows) / len(rows)
        count = len({row.prompt for row in rows}) * length
        return peaks.Use(count * peaks.operations(model.split, length, False) / timing.prefill_s, dtype)
    seconds = timing.decode_s - decoder.capture_s
    length = sum(min(size, len(row.tokens) - row.new / 2) for row in rows) / len(rows)
    operations = timing.decode_tokens * peaks.operations(model.split, length, False) / seconds
    weights = read_weights(model)
    read = sum(world.gather(sum(w.nbytes for w in weights))) * timing.decode_steps / seconds
    return peaks.Use(operations, dtype, read, weights)


def rates(timing: Timing) -> dict[str, float]:
    return {
        "time_to_first_token_s": timing.time_to_first_token_s,
        "prefill_s": timing.prefill_s,
        "decode_s": timing.decode_s,
        "decode_tokens": timing.decode_tokens,
        "decode_tokens_per_s": timing.decode_tokens / timing.decode_s if timing.decode_tokens else 0.0,
    }


def finish(options: SampleOptions, made: dict[str, Any], slid: bool) -> None:
    """The run's figures on standard error, and the report if asked for."""
    timing = made["timing"]
    print(report.account_table(made), file=sys.stderr)
    if slid:
        size = made["model"]["block_size"]
        print(
            f"the context is full at block_size={size}: from there on each token cost a forward pass over {size} tokens "
            "(--overflow=stop ends samples there instead)",
            file=sys.stderr,
        )
    speed = f"{timing['decode_tokens_per_s']:.1f} tokens/s after a " if timing["decode_tokens"] else ""
    print(f"{speed}prefill of {timing['prefill_s']:.3f} s; loaded in {timing['load_s']:.2f} s", file=sys.stderr)
    print(said_per_token(options, made), file=sys.stderr)
    what = "decoding" if timing["decode_tokens"] else "reading the prompts"
    print(peaks.text(made["utilisation"], what, made["dtype"]), file=sys.stderr)
    if options.report:
        report.write(options.report, made)


def said_per_token(options: SampleOptions, made: dict[str, Any]) -> str:
    """How often the model ran and its ranks summed for a token, and how the draft did."""
    figures = made["per_token"]
    said = f"{figures['passes']:.2f} passes a token"
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        said += f", {figures[op]:.2f} {op.replace('_', '-')}s" if op in figures else ""
    if "speculation" in made:
        draft = made["speculation"]
        said += f"; draft {options.draft}: {draft['accepted']:,} of {draft['proposed']:,} guesses right"
        said += f" ({draft['acceptance_rate']:.0%})" if draft["proposed"] else ""
    return said


if __name__ == "__main__":
    run(SampleOptions, main, "sample_tp.py")

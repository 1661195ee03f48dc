"""Generate text on N ranks.

    torchrun --standalone --nproc_per_node=2 sample_tp.py --init_from=gpt2 --prompt="Once upon"

Standard output gets the text alone; notices, the account and figures go to standard error.
"""

import sys
import time
from dataclasses import fields

import base.quick_start  # noqa: F401
from base.errors import ReaderGone, explaining_memory
from checkpoints.sources import identity, open_for_inference, tokenizer_of
from cli.options import SampleOptions
from inference.load import load, load_draft, memory_needed
from inference.output import output_of
from inference.pipeline import generation_for
from inference.prompts import check_prompts, encode, read_prompts
from inference.sampling import Sampling
from inference.summary import build_report, notices, print_summary
from report import report
from world.entry import run
from world.mesh import World


def main(world: World, options: SampleOptions) -> None:
    started = time.perf_counter()
    if world.is_main:
        report.check_place(options.report, "report")
        report.check_place(options.out, "out")
    source = open_for_inference(options, (world.rank, world.size))
    world.agree("weights", identity(source))
    tokenizer = tokenizer_of(source, options.tokenizer, options.data_dir)
    # rank 0 reads the prompt files: other hosts may not have them
    texts: list[str] = world.gather(read_prompts(options.start) if world.is_main else None)[0]
    prompts = encode(texts, tokenizer)
    names = [field.name for field in fields(Sampling) if field.name != "n_tokens"]
    sampling = Sampling(tokenizer.n_vocab, **{name: getattr(options, name) for name in names})
    check_prompts(prompts, source.config.vocab_size, source.config.block_size, sampling)
    with explaining_memory(lambda: memory_needed(world, source, options)):
        model = load(world, source, options)
        draft = load_draft(world, options, tokenizer, sampling)
    kind, decoder = generation_for(model, world.pp, options.kernels)
    world.synchronize()
    load_s = time.perf_counter() - started
    if world.is_main:
        for notice in notices(world, source, model, decoder, tokenizer):
            print(notice, file=sys.stderr)
    with output_of(texts, tokenizer, options, options.out if world.is_main else "") as output:
        started = time.perf_counter()
        generation = kind(model, prompts, sampling, decoder, draft, output.stops)
        rows = min(options.batch_size, len(generation.rows))
        explained = explaining_memory(lambda: memory_needed(world, source, options, rows))
        with world.ledger.during("sampling"), explained:
            for row in generation:
                if world.is_main:
                    output.show(row)
        seconds = time.perf_counter() - started
    if any(world.gather(output.closed)):
        raise ReaderGone
    samples = output.samples(generation.rows) if world.is_main else []
    made = build_report(world, generation, load_s, seconds, samples)
    if world.is_main:
        print_summary(made, options.draft, generation.timing.slid)
        if options.report:
            report.write(options.report, made)


if __name__ == "__main__":
    run(SampleOptions, main, "sample_tp.py")

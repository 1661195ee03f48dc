"""What sample_tp.py tells its user: notices before it writes, figures and the report afterwards."""

import sys
from typing import Any

from base.numbers import nbytes
from checkpoints.sources import Source
from inference.decoders import TorchDecoder
from inference.generation import Generation
from parallel.quantized import read_weights
from report import report
from report.sections import entries
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT
from world import peaks
from world.mesh import World


def notices(world: World, source: Source, model: TensorParallelGPT, decoder: TorchDecoder,
            known: Tokenizer) -> list[str]:
    """Facts that the user may want to know before waiting. known: the model's tokenizer."""
    tp, schedule = world.tp.size, model.schedule
    lines = [model.split.imbalance(), known.note]
    if (written := getattr(getattr(source, "manifest", None), "tp", tp)) != tp:
        here = f"this run tp={tp}: resharded on load, no file changed"
        lines.append(f"the checkpoint is tp={written}, {here}.")
    if not schedule.is_plain:
        points = f"{schedule.points} of {2 * source.config.n_layer} sub-blocks (--sync={schedule})"
        what = "wait for each other" if schedule.delay else "synchronise"
        lines.append(f"ranks {what} after {points}; --sync=all is exact.")
    if tp > 1 and world.device.type == "cuda":
        size = nbytes(model.split.count() * next(model.parameters()).element_size())
        syncs = f"tp={tp} makes {schedule.sums + 1} all-reduces a token"
        lines.append(f"{source.description} ({size}): {syncs}.")
    if decoder.why:
        lines.append(f"each token is computed by torch, which is slower: {decoder.why}.")
    return [line for line in lines if line]


def build_report(world: World, generation: Generation, load_s: float, seconds: float,
                 samples: list[Any]) -> dict[str, Any]:
    """The report; every rank calls this. seconds: of the whole generation."""
    timing, account = generation.timing, world.ledger.snapshot()
    rate = timing.decode_tokens / timing.decode_s if timing.decode_tokens else 0.0
    names = ("time_to_first_token_s", "prefill_s", "decode_s", "decode_tokens")
    figures = {"load_s": load_s, **{name: getattr(timing, name) for name in names}}
    figures["decode_tokens_per_s"] = rate
    more: dict[str, Any] = {"decoder": generation.decoder.name}
    if draft := generation.draft:
        rate = round(draft.accepted / max(draft.proposed, 1), 6)
        guesses = {"proposed": draft.proposed, "accepted": draft.accepted, "acceptance_rate": rate}
        more["speculation"] = guesses
    made = report.build("sample_tp", world, generation.model, account, figures, seconds,
                        timing.kv_cache_bytes, **more, samples=samples)
    # all-reduces and the like of forward passes, without the small calls that agree on tokens
    counts = {"passes": world.ledger.forward_passes}
    for entry, tally in entries(made).items():
        if entry.direction == "forward":
            counts[entry.op] = counts.get(entry.op, 0) + tally.calls
    tokens = sum(row.new for row in generation.rows)
    per_token = {op: round(n / tokens, 6) for op, n in counts.items()}
    made["per_token"] = {"tokens": tokens} | per_token
    made["utilisation"] = used(world, generation).figures(world)
    return made


def used(world: World, generation: Generation) -> peaks.Use:
    """What decoding used of the machine; what prefill did, if each row got one token only."""
    model, timing, rows = generation.model, generation.timing, generation.rows
    split, size, dtype = model.split, model.config.block_size, next(model.parameters()).dtype
    if not timing.decode_steps:
        length = sum(row.prompt_tokens for row in rows) / len(rows)
        tokens = len({row.prompt for row in rows}) * length
        operations = tokens * peaks.operations(split, length, False)
        return peaks.Use(operations / timing.prefill_s, dtype)
    seconds = timing.decode_s - generation.decoder.capture_s
    length = sum(min(size, len(row.tokens) - row.new / 2) for row in rows) / len(rows)
    operations = timing.decode_tokens * peaks.operations(split, length, False) / seconds
    weights = read_weights(model)
    read = sum(world.gather(sum(w.nbytes for w in weights))) * timing.decode_steps / seconds
    return peaks.Use(operations, dtype, read, weights)


def print_summary(made: dict[str, Any], draft: str, slid: bool) -> None:
    """The report's figures, on standard error. draft: the option --draft."""
    timing, per_token = made["timing"], made["per_token"]
    lines = [report.account_table(made)]
    if slid:
        size = made["model"]["block_size"]
        cost = f"from there on each token cost a forward pass over {size} tokens"
        instead = "--overflow=stop ends samples there instead"
        lines.append(f"the context is full at block_size={size}: {cost} ({instead})")
    speed = f"{timing['decode_tokens_per_s']:.1f} tokens/s after a " * bool(timing["decode_tokens"])
    prefill = f"prefill of {timing['prefill_s']:.3f} s"
    lines.append(f"{speed}{prefill}; loaded in {timing['load_s']:.2f} s")
    ops = [op for op in ("all_reduce", "all_gather", "reduce_scatter") if op in per_token]
    calls = "".join(f", {per_token[op]:.2f} {op.replace('_', '-')}s" for op in ops)
    lines.append(f"{per_token['passes']:.2f} passes a token{calls}")
    if guesses := made.get("speculation"):
        right = f"{guesses['accepted']:,} of {guesses['proposed']:,} guesses right"
        rate = f" ({guesses['acceptance_rate']:.0%})" if guesses["proposed"] else ""
        lines[-1] += f"; draft {draft}: {right}{rate}"
    what = "decoding" if timing["decode_tokens"] else "reading the prompts"
    lines.append(peaks.text(made["utilisation"], what, made["dtype"]))
    print("\n".join(lines), file=sys.stderr)

"""What a schedule's token costs in time: greedy decoding under several schedules, in turn."""

from typing import Any

from base.errors import UserError
from bench.rounds import spread
from inference.decoding import decoder_for
from inference.generation import generate
from inference.sampling import Sampling
from parallel.ledger import total
from plan.schedule import Schedule
from tp_model import TensorParallelGPT
from world.mesh import World

ROUNDS = 5  # each schedule has one turn in each, between its neighbours: a shared machine's speed changes by the minute
PROMPT = 8  # tokens read before


def check_length(n: int, block_size: int) -> None:
    """UserError where so many new tokens do not fit the context, or are too few for a clock. 0: nothing is measured."""
    if n == 1 or PROMPT + n > block_size and n:
        raise UserError(f"--decode_tokens={n}: with a prompt of {PROMPT} tokens use 2 to {block_size - PROMPT}, or 0 for none.")


def decode_times(
    world: World, model: TensorParallelGPT, schedules: list[Schedule], prompt: list[int], n: int
) -> dict[str, dict[str, Any]]:
    """For each schedule, by its name: ms_per_token over the rounds (rank 0's clock), and all_reduces_per_token as counted.

    n: tokens generated in a turn after the first PROMPT ids of `prompt`. The model keeps the last schedule.
    """
    sampling = Sampling(n_tokens=model.config.vocab_size, temperature=0, max_new_tokens=n)
    ways, times, counts = {str(schedule): schedule for schedule in schedules}, dict[str, list[float]](), dict[str, float]()
    decoders = {}
    for name, schedule in ways.items():
        model.set_schedule(schedule)
        decoders[name] = decoder_for(model)
    for turn in range(ROUNDS + 1):  # the first one warms up
        for name, schedule in ways.items():
            model.set_schedule(schedule)
            world.barrier()
            before = world.ledger.snapshot()
            timing = generate(model, [prompt[:PROMPT]], sampling, decoder=decoders[name]).timing
            counts[name] = total(world.ledger.since(before), op="all_reduce").calls / n
            if turn:
                times.setdefault(name, []).append(1e3 * timing.decode_s / timing.decode_tokens)
    return {name: {"ms_per_token": spread(ms), "all_reduces_per_token": counts[name]} for name, ms in times.items()}

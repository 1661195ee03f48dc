"""How much faster two stages write 8 rows in two groups than in one.

    python tests/measure_stages.py [--rows=8] [--new=32] [--rounds=5]

GPT-2 124M's shape with random weights, on two forked ranks of one thread. In each round both ways take turns.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ranks import run_ranks

from inference.packed import pack
from inference.pipeline import PipelinedGeneration, generation_for
from inference.sampling import Sampling
from model import GPTConfig
from plan.stages import Stages
from tp_model import TensorParallelGPT
from world.mesh import World


def _rates(world: World, rows: int, new: int, rounds: int) -> list[tuple[float, float]]:
    """Tokens a second of one group and of two, in each round."""
    config = GPTConfig()
    stages = Stages.over(config, world.pp.size, world.pp.rank)
    model = TensorParallelGPT(config, world.tp, stages=stages).eval()
    pack(model)
    _, decoder = generation_for(model, world.pp, False)
    sampling = Sampling(config.vocab_size, temperature=0.0, max_new_tokens=new)
    found = []
    for _ in range(rounds):
        rates = []
        for groups in (1, 2):
            made = PipelinedGeneration(model, [[i, 7, 8, 9] for i in range(rows)], sampling, decoder)
            made.groups = groups
            for _ in made:
                pass
            rates.append(made.timing.decode_tokens / made.timing.decode_s)
        found.append((rates[0], rates[1]))
    return found


def main(argv: list[str]) -> None:
    given = {"rows": 8, "new": 32, "rounds": 5}
    given |= {name: int(value) for name, value in (word.removeprefix("--").split("=") for word in argv)}
    rates = run_ranks(2, _rates, *given.values(), pp=2, tp=1)[0]
    ratios = [two / one for one, two in rates]
    one, two = (statistics.median(rate) for rate in zip(*rates, strict=True))
    print(f"{given['rows']} rows: {one:.1f} tokens/s in one group, {two:.1f} in two: "
          f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(sys.argv[1:])

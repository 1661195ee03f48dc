"""A step of tests/gpu.py as a process of its own: python tests/gpu_steps.py STEP --out=DIR ..."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from parallel.collectives import Axis
from parallel.ledger import Ledger
from parallel.parameters import take
from plan.partition import Partition
from tp_model import TensorParallelGPT
from world.mesh import World

ROOT = Path(__file__).parent.parent
SHAPES = {"gpt2": (12, 12, 768), "gpt2-xl": (48, 25, 1600)}


class Step:
    """What a step works with, and where its findings go."""

    def __init__(self) -> None:
        ask = argparse.ArgumentParser()
        ask.add_argument("name")
        for name in ("out", "device", "text"):
            ask.add_argument(f"--{name}", default="")
        ask.add_argument("--tiny", type=int, default=0)
        ask.add_argument("--patience", type=float, default=1.0)
        asked = ask.parse_args()
        self.name, self.out, self.tiny, self.text = (
            asked.name,
            Path(asked.out),
            bool(asked.tiny),
            asked.text,
        )
        self.patience, self.gpu = asked.patience, asked.device == "cuda"
        self.device = torch.device("cuda", 0) if self.gpu else torch.device("cpu")
        if self.gpu:
            torch.cuda.set_device(self.device)
        ledger = Ledger()
        axes = Axis("tp", ledger=ledger), Axis("dp", ledger=ledger)
        self.world = World(0, 1, self.device, "none", *axes, ledger)

    def say(self, what: str, **figures: Any) -> None:
        line = json.dumps({"step": self.name, "what": what, **figures})
        print(line[:400], flush=True)
        with open(self.out / "gpu.jsonl", "a") as file:
            file.write(line + "\n")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A failure is a finding too."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:700]}"
            self.say(what, ok=False, failed=fault, s=round(time.perf_counter() - began, 1))

    def seconds(self, call: Callable[[], object], n: int) -> float:
        """Of one call, the median of n."""
        found = []
        for _ in range(3 + n):
            self.world.synchronize()
            began = time.perf_counter()
            call()
            self.world.synchronize()
            found.append(time.perf_counter() - began)
        return sorted(found[3:])[n // 2]

    def config(self, name: str) -> GPTConfig:
        if self.tiny:
            return GPTConfig(160, 515, 2, 3, 48, activation="gelu_tanh")
        return GPTConfig(1024, 50257, *SHAPES[name], activation="gelu_tanh")

    def model(self, config: GPTConfig, dtype: torch.dtype) -> TensorParallelGPT:
        """Random weights, drawn on the device: seconds instead of minutes."""
        shapes = Partition.of(config, 1).shapes()

        def read(name: str, rule: Any) -> Tensor:
            full = torch.empty(shapes[name], device=self.device)
            fill = 0.0 if name.endswith(".bias") else 1.0
            plain = name.endswith(".bias") or ".ln_" in name
            return take(full.fill_(fill) if plain else full.normal_(0, 0.02), rule, 0)

        axis = self.world.tp
        return TensorParallelGPT(config, axis, read, device=self.device, dtype=dtype).eval()


def main() -> None:
    import gpu_fast as fast
    import gpu_right as right

    steps: dict[str, Callable[[Step], None]] = {
        "facts": right.facts, "logits": right.logits, "marked": right.marked, "ranks": right.ranks,
        "symmetric": right.symmetric, "decode": fast.decode, "train": fast.train,
        "decode_xl": lambda step: fast.decode(step, "gpt2-xl"),
        "train_xl": lambda step: fast.train(step, "gpt2-xl", 4), "characters": fast.characters,
    }  # fmt: skip
    step = Step()
    steps[step.name](step)


if __name__ == "__main__":
    main()

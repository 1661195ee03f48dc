"""A contestant: a program that a user would pick instead, in a process of its own.

It loads once, then answers each line on standard input with the seconds that a round took. Between
rounds it waits for the next line and uses no core.

    python -m bench.contestants '{"kind": "hf", ...}'
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from base.errors import UserError

ROOT = Path(__file__).parent.parent


class Contestant:
    """The parent's end. `job` is what the child needs; UserError if it cannot run."""

    def __init__(self, job: dict[str, Any]):
        self.kind = job["kind"]
        command = [sys.executable, "-m", "bench.contestants", json.dumps(job)]
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._child: Any = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self._child.stdout:
            if line.startswith("{"):  # libraries print other lines
                return json.loads(line)
        self._errors.seek(0)
        errors = self._errors.read().strip().splitlines() or ["no message"]
        raise UserError(f"--against={self.kind} failed: {errors[-1][:200]}")

    def round(self) -> dict[str, Any]:
        """{"seconds": of a round, ...}"""
        print("go", file=self._child.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        self._errors.close()


# --- the child ------------------------------------------------------------------------------------

Round = Callable[[], dict[str, Any]]


def decoding(job: dict[str, Any], generate: Callable[[int], list[int]]) -> Round:
    """Seconds of a decode step: the time of N new tokens less that of one, so that the prompt does
    not count. If N is 1, seconds to the first token."""
    n = job["new_tokens"]

    def once() -> dict[str, Any]:
        seconds = 0.0
        for count in sorted({1, n}):
            started = time.perf_counter()
            tokens = generate(count)
            seconds = time.perf_counter() - started - seconds
        return {"seconds": seconds / max(1, n - 1), "tokens": tokens}

    generate(2)
    return once


def hf(job: dict[str, Any]) -> Round:
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(job["threads"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # it is slow if every token has a new length
    model: Any = GPT2LMHeadModel.from_pretrained(job["weights"])
    model = model.to(job["device"], getattr(torch, job["dtype"])).eval()
    idx = torch.tensor([job["prompt"]], device=job["device"])
    fixed = {"attention_mask": torch.ones_like(idx), "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def generate(n: int) -> list[int]:
        out = model.generate(idx, max_new_tokens=n, min_new_tokens=n, **fixed)
        return out[0, idx.shape[1] :].tolist()

    return decoding(job, generate)


def ctranslate2(job: dict[str, Any]) -> Round:
    import ctranslate2 as ct2
    from ctranslate2.converters import TransformersConverter

    quantization = job["quantize"] or None
    compute = quantization or job["dtype"]
    place = Path(job["scratch"]) / f"ctranslate2-{compute}"
    if not place.exists():
        TransformersConverter(job["weights"]).convert(str(place), quantization=quantization)
    device, _, index = job["device"].partition(":")
    model = ct2.Generator(str(place), intra_threads=job["threads"], device=device,
                          device_index=int(index or 0), compute_type=compute)
    # a list of words, which the converter made of the tokenizer beside the weights
    words = json.loads((place / "vocabulary.json").read_text())
    prompt = [words[token] for token in job["prompt"]]

    def generate(n: int) -> list[int]:
        (made,) = model.generate_batch([prompt], max_length=n, min_length=n, sampling_topk=1,
                                       include_prompt_in_result=False)
        return list(made.sequences_ids[0])

    return decoding(job, generate)


def one_rank(job: dict[str, Any]) -> Round:
    """nanoTP on one rank of one thread."""
    import torch

    from bench.inference import Subject
    from checkpoints.sources import open_source, reader, tokenizer_of
    from inference.decoders import decoder_for
    from parallel.collectives import Axis
    from parallel.ledger import Ledger
    from parallel.quantized import quantize
    from tp_model import TensorParallelGPT

    torch.set_num_threads(1)
    source = open_source(job["weights"])
    where = {"device": job["device"], "dtype": getattr(torch, job["dtype"])}
    model = TensorParallelGPT(source.config, Axis("tp"), reader(source, 0), **where).eval()
    if job["quantize"]:
        quantize(model, lambda mine: [mine])
    if job["compile"]:
        model.compile_blocks()
    ours = Subject(model, tokenizer_of(source), job["prompt"], job["new_tokens"], Ledger())
    once = partial(ours.measure, decoder_for(model))
    once()
    return once


def reference(job: dict[str, Any]) -> Round:
    """model.py in one process. On a CPU with AdamW as torch has it by default; on a GPU as nanoGPT
    trains: autocast, fused AdamW, compiled as a whole if ours is compiled."""
    import torch

    from model import GPT, GPTConfig
    from text.dataset import Dataset, batch

    torch.set_num_threads(job["threads"])
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    model = GPT(GPTConfig(**job["config"])).to(device)
    whole = model.config.n_layer <= 24  # one graph of more layers would take minutes
    for part in ([model] if whole else model.transformer.h) if job["compile"] else ():
        part.compile()
    tokens, rows = Dataset(job["dataset"]).train, range(job["batch_size"])
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=fused)

    def step(i: int) -> float:
        x, y = (part.to(device) for part in batch(tokens, rows, model.config.block_size, 1, i))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def once() -> dict[str, Any]:
        started = time.perf_counter()
        losses = [step(i) for i in range(job["steps"])]
        return {"seconds": (time.perf_counter() - started) / job["steps"], "losses": losses}

    step(0)
    return once


def main() -> None:
    job = json.loads(sys.argv[1])
    once = {f.__name__: f for f in (hf, ctranslate2, one_rank, reference)}[job["kind"]](job)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


if __name__ == "__main__":
    main()

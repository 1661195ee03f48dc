"""A contestant: a program that a user would pick instead, in a process of its own.

The first line on standard input is the job, {"kind": "hf", ...}. It loads once, then answers each
further line with the seconds that a round took. Between rounds it waits and uses no core.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from base.errors import UserError

ROOT = Path(__file__).parent.parent


class Contestant:
    """The parent's end. `job` is what the child needs; UserError if it cannot run."""

    def __init__(self, job: dict[str, Any]):
        self.kind = job["kind"]
        command = [sys.executable, "-m", "bench.contestants"]
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._child: Any = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        print(json.dumps(job), file=self._child.stdin, flush=True)
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
    """Seconds of a decoded token: the time of N new ones a text less that of one, so that prompts
    do not count. If N is 1, seconds to the first token."""
    n, texts = job["new_tokens"], len(job["prompts"])

    def once() -> dict[str, Any]:
        seconds = 0.0
        for count in sorted({1, n}):
            started = time.perf_counter()
            tokens = generate(count)
            seconds = time.perf_counter() - started - seconds
        return {"seconds": seconds / max(1, n - 1) / texts, "tokens": tokens}

    generate(2)
    return once


def writing(job: dict[str, Any], write: Callable[[list[int]], list[list[int]]]) -> Round:
    """Seconds a token of texts that end after as many new ones as job["lengths"] says. write: the
    new tokens of the texts with these numbers."""
    every = list(range(len(job["lengths"])))

    def once() -> dict[str, Any]:
        started, made = time.perf_counter(), write(every)
        seconds = (time.perf_counter() - started) / sum(job["lengths"])
        return {"seconds": seconds, "tokens": [token for text in made for token in text]}

    write(every[:1])
    return once


def hf(job: dict[str, Any]) -> Round:
    import torch
    from transformers import GPT2LMHeadModel, StoppingCriteriaList

    torch.set_num_threads(job["threads"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # it is slow if every token has a new length
    model: Any = GPT2LMHeadModel.from_pretrained(job["weights"])
    model = model.to(job["device"], getattr(torch, job["dtype"])).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        T = max(map(len, prompts))
        idx = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
        n = torch.tensor(lengths, device=job["device"])
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
        ends = lambda ids, scores, **_: ids.shape[1] - T >= n  # noqa: E731
        out = model.generate(
            idx.to(job["device"]), attention_mask=mask.to(job["device"]), do_sample=False,
            pad_token_id=0, max_new_tokens=max(lengths), min_new_tokens=max(lengths),
            stopping_criteria=StoppingCriteriaList([ends]))
        return [row[T : T + length].tolist() for row, length in zip(out, lengths, strict=True)]

    def write(texts: list[int]) -> list[list[int]]:
        """In groups that end after alike many tokens."""
        made, size = dict[int, list[int]](), job["batch_size"]
        order = sorted(texts, key=job["lengths"].__getitem__)
        for group in (order[at : at + size] for at in range(0, len(order), size)):
            found = run(*([job[key][i] for i in group] for key in ("prompts", "lengths")))
            made.update(zip(group, found, strict=True))
        return [made[i] for i in texts]

    if "lengths" in job:
        return writing(job, write)
    return decoding(job, lambda n: sum(run(job["prompts"], [n] * len(job["prompts"])), []))


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
    prompts = [[words[token] for token in prompt] for prompt in job["prompts"]]

    def generate(n: int) -> list[int]:
        made = model.generate_batch(prompts, max_length=n, min_length=n, sampling_topk=1,
                                    include_prompt_in_result=False)
        return [token for text in made for token in text.sequences_ids[0]]

    def write(texts: list[int]) -> list[list[int]]:
        got = [0] * len(texts)

        def ends(step: Any) -> bool:
            got[step.batch_id] += 1
            return got[step.batch_id] == job["lengths"][texts[step.batch_id]]

        made = model.generate_batch(
            [prompts[i] for i in texts], max_batch_size=job["batch_size"], batch_type="examples",
            max_length=max(job["lengths"]), min_length=max(job["lengths"]), sampling_topk=1,
            include_prompt_in_result=False, callback=ends)
        return [list(text.sequences_ids[0]) for text in made]

    return writing(job, write) if "lengths" in job else decoding(job, generate)


def llama_cpp(job: dict[str, Any]) -> Round:
    """In float16, or in q8_0 for int8; one text."""
    import gguf
    from gguf.quants import quantize
    from llama_cpp import Llama

    from checkpoints.sources import open_source, reader
    from parallel.collectives import Axis
    from tp_model import TensorParallelGPT

    source, path = open_source(job["weights"]), Path(job["scratch"]) / "model.gguf"
    config = source.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(["t 0"])
    kind = gguf.GGMLQuantizationType[{"": "F16", "int8": "Q8_0"}[job["quantize"]]]
    names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd",
             "transformer.ln_f": "output_norm", "transformer.h.": "blk.", "ln_1": "attn_norm",
             "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
             "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for name, tensor in TensorParallelGPT(config, Axis("tp"), reader(source, 0)).named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        matrix = tensor.dim() == 2 and "position" not in name
        data = tensor.detach().numpy()[: config.vocab_size if "token" in name else None]
        writer.add_tensor(name, quantize(data, kind) if matrix else data,
                          raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Llama(str(path), n_ctx=config.block_size, n_threads=job["threads"],
                  n_threads_batch=job["threads"], verbose=False)

    def generate(n: int) -> list[int]:
        return list(islice(model.generate(job["prompts"][0], temp=0.0, repeat_penalty=1.0), n))

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
    ours = Subject(model, tokenizer_of(source), job["prompts"], job["new_tokens"], Ledger(),
                   lambda: model)
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
    job = json.loads(sys.stdin.readline())
    known = {f.__name__: f for f in (hf, ctranslate2, llama_cpp, one_rank, reference)}
    once = known[job["kind"]](job)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


if __name__ == "__main__":
    main()

"""The steps of tests/gpu.py that measure: decoding, training, nanoGPT's character recipe."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_right import write_letters
from gpu_steps import ROOT, SHAPES, Step
from torch import Tensor

from base.errors import UserError
from bench.contestants import Contestant
from inference.cuda_graphs import CudaGraphs, GraphDecoder
from inference.decoders import TorchDecoder, decoder_for
from inference.generation import generate
from inference.sampling import Sampling
from model import GPTConfig
from parallel.quantized import read_weights
from plan.partition import Partition
from tp_model import TensorParallelGPT
from world import peaks


def decode(step: Step, name: str = "gpt2") -> None:
    """Decoding after a prompt of 128 in bfloat16: ms a token, and GB/s of weights read beside a copy's."""
    config, dtype, n = step.config(name), torch.bfloat16, 12 if step.tiny else 128
    model = step.model(config, dtype)
    weights = read_weights(model)
    read, copied = sum(w.nbytes for w in weights), peaks.bandwidth(step.world, weights)
    prompt = [(7 * i * i + 3) % (config.vocab_size - 1) for i in range(16 if step.tiny else 128)]

    def whole(what: str, decoder: TorchDecoder, tokens: int, temperature: float = 0.0) -> None:
        sampling = Sampling(config.vocab_size, temperature=temperature, max_new_tokens=tokens)
        with step.attempt(what):
            for _ in range(2):
                before, timing = (
                    decoder.capture_s,
                    generate(model, [prompt], sampling, decoder).timing,
                )
                s = (timing.decode_s - decoder.capture_s + before) / timing.decode_tokens
            figures = {"tokens_s": 1 / s, "GBps": read / s / 1e9, "of_copy": read / s / copied}
            step.say(what, ms=1e3 * s, **figures, capture_s=decoder.capture_s - before)

    torch.backends.cuda.enable_cudnn_sdp(False)
    whole("eager", TorchDecoder(model), n if step.gpu else 6)
    kernels, refused = "graph, Triton kernels", ""
    try:
        decoder_for(model, kernels=True)
    except UserError as error:
        refused = str(error)
        step.say(kernels, left_out=refused)
    if step.gpu:
        whole("graph", GraphDecoder(model), n)
        whole("graph, sampled at 0.8", GraphDecoder(model), n, 0.8)
        replayed(step, "graph", model, GraphDecoder(model), prompt, read, copied)
        if not refused:
            whole(kernels, decoder_for(model, kernels=True), n)
            decoder: Any = decoder_for(model, kernels=True)
            replayed(step, kernels, model, decoder, prompt, read, copied)
            with step.attempt("Triton kernels by cut"):
                cuts(step, model)
        torch.backends.cuda.enable_cudnn_sdp(True)
        whole("eager, cuDNN's attention allowed", TorchDecoder(model), 6)
        torch.backends.cuda.enable_cudnn_sdp(False)
        model.compile_blocks(tuned=True)
        whole("graph, compiled", GraphDecoder(model), n)
        replayed(step, "graph, compiled", model, GraphDecoder(model), prompt, read, copied)
    with step.attempt("transformers"):
        transformers(step, config, prompt, read, copied)


def cuts(step: Step, model: TensorParallelGPT) -> None:
    """GB/s of the weights of all layers, by how a Triton kernel's programs share them."""
    from inference.kernels import product

    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        layers = [block.get_submodule(name) for block in model.blocks]
        norm = None if name.endswith("c_proj") else model.transformer.ln_f
        weight, found = layers[0].weight, {}
        x, nbytes = torch.ones_like(weight[:1]), len(layers) * weight.nbytes
        for cut in ((2, 1024, 4), (4, 512, 2), (4, 1024, 4), (8, 512, 4), (4, 2048, 8)):
            run = partial(products, product, x, layers, norm, cut)
            replay, _ = CudaGraphs()(run)
            found[str(cut)] = round(nbytes / step.seconds(replay, 10) / 1e9)
        step.say(f"{name}, GB/s by outputs, inputs and warps of a program", **found)


def products(product: Any, x: Tensor, layers: list[Any], norm: Any, cut: Any) -> None:
    with torch.inference_mode():
        for layer in layers:
            product(x, layer.weight, layer.bias, norm, cut=cut)


def replayed(
    step: Step, what: str, model: TensorParallelGPT, decoder: GraphDecoder, prompt: list[int],
    read: float, copied: float,
) -> None:  # fmt: skip
    """The step alone, without choosing a token, and its kernels by time."""
    cache = decoder.new_cache(1, 2 * len(prompt))
    with step.attempt(f"{what}, the step alone"), torch.inference_mode():
        decoder.logits([prompt], cache)
        cache.advance([len(prompt)])
        decoder.logits([[5]], cache)
        ((_, replay, _),) = decoder._steps.values()
        s = step.seconds(replay, 30)
        step.say(
            f"{what}, the step alone", ms=1e3 * s, GBps=read / s / 1e9, of_copy=read / s / copied
        )
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            replay()
            step.world.synchronize()
        rows = [(e.self_device_time_total, e.count, e.key[:60]) for e in profile.key_averages()]
        rows = sorted((row for row in rows if row[0]), reverse=True)
        top = [f"{round(us)} us in {count} {key}" for us, count, key in rows[:12]]
        count, busy = sum(row[1] for row in rows), sum(row[0] for row in rows) / 1e3
        step.say(f"{what}, kernels", kernels=count, busy_ms=busy, most=top)


def transformers(
    step: Step, config: GPTConfig, prompt: list[int], read: float, copied: float
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    sizes |= {"n_positions": config.block_size, "vocab_size": config.vocab_size}
    torch.set_default_dtype(torch.bfloat16)
    with step.device:
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    torch.set_default_dtype(torch.float32)
    idx = torch.tensor([prompt], device=step.device)
    fixed = {"attention_mask": torch.ones_like(idx), "do_sample": False, "pad_token_id": 0}

    def write(n: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(idx, max_new_tokens=n, min_new_tokens=n, **fixed)
        step.world.synchronize()
        return time.perf_counter() - began

    write(2)
    n = 6 if step.tiny else 40
    s = (write(n) - write(1)) / (n - 1)
    figures = {"tokens_s": 1 / s, "GBps": read / s / 1e9, "of_copy": read / s / copied}
    step.say("transformers generate", ms=1e3 * s, **figures)


def train(step: Step, name: str = "gpt2", rows: int = 12) -> None:
    """Training in bfloat16: bench_tp.py's own figures, then model.py's, one after the other."""
    n_layer, n_head, n_embd = (2, 3, 48) if step.tiny else SHAPES[name]
    rows, block, vocabulary = (2, 64, 515) if step.tiny else (rows, 1024, 50257)
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    padded = vocabulary if step.tiny else 50304  # nanoGPT's table
    config = GPTConfig(block, padded, n_layer, n_head, n_embd)
    operations = peaks.operations(Partition.of(config, 1), block, True)
    words = [f"--{key}={value}" for key, value in sizes.items()]
    words += [
        f"--vocab_size={vocabulary}",
        f"--batch_size={rows}",
        f"--block_size={block}",
        "--steps=3",
    ]
    words += [
        f"--device={step.device.type}",
        "--dtype=bfloat16",
        f"--repeats={2 if step.tiny else 5}",
    ]
    for compiled in (True, False) if step.gpu and name == "gpt2" else (step.gpu,):
        what = f"nanoTP{', compiled' * compiled}"
        with step.attempt(what), tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.json"
            more = [f"--compile={compiled}", f"--report={report}"]
            done = subprocess.run(
                [sys.executable, "bench_tp.py", "train", *words, *more],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-600:]
            made = json.loads(report.read_text())
            rate, mfu = made["parties"]["nanotp"]["tokens/s"], made["share_of_arithmetic"]
            s = rows * block / rate["median"]
            peak = operations * rate["median"] / mfu["median"]
            step.say(
                what,
                ms=1e3 * s,
                tokens_s=rate["median"],
                MFU=mfu["median"],
                peak_TFLOPs=peak / 1e12,
            )
    with step.attempt("model.py"), tempfile.TemporaryDirectory() as scratch:
        write_letters(Path(scratch) / "random", vocabulary)
        job: dict[str, Any] = {"kind": "reference", "config": vars(config), "threads": 4}
        job |= {
            "dataset": str(Path(scratch) / "random"),
            "device": str(step.device),
            "dtype": "bfloat16",
            "compile": step.gpu,
        }
        model = Contestant({**job, "batch_size": rows, "steps": 3})
        s = sorted(model.round()["seconds"] for _ in range(2 if step.tiny else 5))[
            -1 if step.tiny else 2
        ]
        model.close()
        mfu = operations * rows * block / s / peaks.arithmetic(step.world, torch.bfloat16)
        whole = "whole" if n_layer <= 12 else "block by block"
        step.say(f"model.py, compiled {whole}", ms=1e3 * s, tokens_s=rows * block / s, MFU=mfu)


def characters(step: Step) -> None:
    """nanoGPT's character recipe, which it publishes with a validation loss of 1.4697."""
    if not step.text and not step.tiny:
        return step.say("left out", why="give --text=FILE, tiny Shakespeare")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        text = Path(step.text) if step.text else place / "text"
        if not step.text:
            text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
        commands = [
            ["data/shakespeare_char/prepare.py", f"--input={text}", f"--out={place / 'letters'}"]
        ]
        train = ["train_tp.py", "configs/train_shakespeare_char.py", f"--device={step.device.type}"]
        train += ["--dataset=letters", f"--data_dir={place}", f"--out_dir={place / 'out'}"]
        train += [f"--compile={step.gpu}", "--always_save_checkpoint=False"]
        tiny = "--n_layer=1 --n_embd=12 --block_size=16 --batch_size=2 --max_iters=4 --eval_interval=4 --eval_iters=1"
        commands.append([*train, *(tiny.split() if step.tiny else [])])
        began = time.perf_counter()
        for words in commands:
            subprocess.run(
                [sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
        lines = list(map(json.loads, (place / "out" / "metrics.jsonl").read_text().splitlines()))
        best = min(line["val_loss"] for line in lines if "val_loss" in line)
        s = round(time.perf_counter() - began, 1)
        step.say(
            "validation loss", best=best, nanoGPT=1.4697, ok=step.tiny or best <= 1.47, seconds=s
        )

"""The steps of tests/gpu.py that say what a GPU is and whether it computes what it should."""

import copy
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_steps import ROOT, Step
from torch import Tensor

from inference.cuda_graphs import CudaGraphs, GraphDecoder
from inference.decoders import TorchDecoder
from model import GPTConfig
from parallel.collectives import Axis, GroupTransport
from parallel.symmetric import MOST_BYTES, SymmetricTransport
from text.dataset import write_tokens
from text.tokenizer import IdsTokenizer, write_tokenizer
from tp_model import TensorParallelGPT
from world import peaks

SDPA = ("math", "flash", "efficient", "cudnn", "overrideable")
SMALL = [
    "--n_layer=3", "--n_head=6", "--n_embd=96", "--block_size=64", "--batch_size=4", "--max_iters=8",
    "--gradient_accumulation_steps=2", "--eval_interval=8", "--eval_iters=2", "--warmup_iters=0", "--learning_rate=2e-3",
]  # fmt: skip


def facts(step: Step) -> None:
    about: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if step.gpu:
        card = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": card.name,
            "memory_GB": card.total_memory / 1e9,
            "sms": card.multi_processor_count,
        }
        about |= {"cudnn": torch.backends.cudnn.version(), "nccl": str(torch.cuda.nccl.version())}
    step.say("machine", **about)
    buffer = [torch.ones(1 << 24)]  # what a CPU reads; a GPU copies
    step.say("memory", GBps=peaks.bandwidth(step.world, buffer) / 1e9)
    for dtype in (torch.bfloat16, torch.float32):
        rate = peaks.arithmetic(step.world, dtype) / 1e12
        step.say(f"a {str(dtype)[6:]} product", TFLOPs=rate)
    cases = {"decode": (1, 200, False, False), "decode under a mask": (1, 137, True, False)}
    for what, (T, S, masked, causal) in {**cases, "prompt": (200, 200, False, True)}.items():
        q, kv = (torch.randn(1, 6, n, 64, device=step.device, dtype=torch.bfloat16) for n in (T, S))
        mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=step.device) if masked else None
        with step.attempt(f"attention, {what}"):
            backend = SDPA[torch._fused_sdp_choice(q, kv, kv, mask, 0.0, causal)]
            step.say(f"attention, {what}", backend=backend)
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        q = torch.randn(1, 12, 1, 64, device=step.device, dtype=torch.bfloat16)
        kv, ms = q.expand(1, 12, 1024, 64).contiguous(), []
        for S in range(300 + 10 * cudnn, 306 + 10 * cudnn):
            step.world.synchronize()
            began = time.perf_counter()
            F.scaled_dot_product_attention(q, kv[:, :, :S], kv[:, :, :S])
            step.world.synchronize()
            ms.append(round(1e3 * (time.perf_counter() - began), 2))
        step.say(f"attention over 6 new lengths, cuDNN {'allowed' if cudnn else 'off'}", ms=ms)


# --- what is right --------------------------------------------------------------------------------------


def logits(step: Step) -> None:
    """Every way to compute a step against model.py in double precision; the bound is twice the error
    that model.py has itself in the same precision."""
    import test_decoding as t

    config = t.WIDE
    double = t.reference(config).double()
    prompts = {rows: t.texts(config, rows) for rows in (1, 3)}
    right = {rows: t.expected(config, rows) for rows in prompts}
    ways: dict[str, Any] = {"eager": TorchDecoder, "fixed step": t.graphed}
    ways |= {"graph": GraphDecoder, "Triton kernels": by_kernels} if step.gpu else {}
    for dtype in (torch.float32, torch.bfloat16):
        own = copy.deepcopy(double).to(step.device, dtype)
        for cudnn in (True, False) if step.gpu else (False,):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for rows, texts in prompts.items():
                cut = [
                    [text[: len(text) - t.STEPS + i + 1] for text in texts] for i in range(t.STEPS)
                ]
                with torch.no_grad():
                    found = [
                        [own(torch.tensor([s], device=step.device))[0][0, -1] for s in row]
                        for row in cut
                    ]
                theirs = [torch.stack(row).double().cpu() for row in found]
                bound = 2 * error(theirs, right[rows]) + 1e-5 * float(right[rows][0].abs().max())
                for way, kind in ways.items():
                    what = f"{way}, {str(dtype)[6:]}, {rows} rows{', cuDNN' * cudnn}"
                    with step.attempt(what):
                        mine = decoded(step, config, dtype, kind, texts, t)
                        off = error(mine, right[rows])
                        step.say(what, ok=off <= bound, error=off, bound=bound)


def by_kernels(model: TensorParallelGPT) -> GraphDecoder:
    from inference.kernels import hidden

    return GraphDecoder(model, hidden=hidden)


def decoded(
    step: Step, config: GPTConfig, dtype: torch.dtype, kind: Any, texts: list[list[int]], t: Any
) -> list[Tensor]:
    """Logits after each of the last tokens of the texts, by a decoder over a cache of odd size."""
    model = t.split(t.reference(config), Axis("tp")).to(step.device, dtype)
    decoder, cache, found = kind(model), model.new_cache(len(texts), 137), []
    first = [text[: -t.STEPS] for text in texts]
    with torch.inference_mode():
        decoder.logits(first, cache)
        cache.advance(list(map(len, first)))
        for i in range(t.STEPS):
            news = [[text[i - t.STEPS]] for text in texts]
            found.append(decoder.logits(news, cache).double().cpu())
            cache.advance([n + 1 for n in cache.lengths])
    return found


def error(found: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, right, strict=True))


def marked(step: Step) -> None:
    """The tests that need a GPU; without one, that they are skipped."""
    words = ["-m", "gpu", "-p", "no:cacheprovider", "-rs"] + ["tests/test_quantized.py"] * step.tiny
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True
    )
    step.say("tests marked gpu", ok=done.returncode == 0, end=done.stdout[-900:])


def started(size: int, words: list[str], more: dict[str, str]) -> list[subprocess.Popen[str]]:
    """Ranks in this process's group, without a launcher: what is left of them ends with the step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = []
    for rank in range(size):
        environment = os.environ | (
            {**names, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        )
        ranks.append(subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **pipes))
    return ranks


def ended(children: list[subprocess.Popen[str]]) -> tuple[int, str]:
    """The worst exit status, and what the ranks said."""
    said = "".join(child.communicate()[0] for child in children)
    return max((child.returncode for child in children), key=abs), said


def ranks(step: Step) -> None:
    """Two ranks on one card over gloo, by the commands: text and losses are one rank's."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_letters(place / "letters")
        common = [f"--device={step.device.type}", "--dtype=float32", "--oversubscribe=True"]
        common += [f"--comm_timeout={40 * step.patience}", f"--start_timeout={60 * step.patience}"]
        train = ["train_tp.py", "--dataset=letters", f"--data_dir={place}", *SMALL, *common]
        losses: dict[str, list[float]] = {}
        ways = {"one rank": [], "tp=2": [], "dp=2 sharded": ["--tp=1", "--dp_shard=True"]}
        if not step.tiny:
            ways |= {"dp=2": ["--tp=1"], "tp=2, sequence": ["--sequence_parallel=True"]}
        running = {}
        for name, more in ways.items():
            words = [*train, *more, f"--out_dir={place / name}"]
            running[name] = started(1 if name == "one rank" else 2, words, {"OMP_NUM_THREADS": "1"})
        for name, children in running.items():
            with step.attempt(f"losses, {name}"):
                status, said = ended(children)
                assert status == 0, said[-600:]
                lines = map(json.loads, (place / name / "metrics.jsonl").read_text().splitlines())
                losses[name] = [line["loss"] for line in lines if "loss" in line]
                pairs = zip(losses[name], losses["one rank"], strict=True)
                off = max(abs(a / b - 1) for a, b in pairs)
                step.say(f"losses, {name}", ok=off < 1e-4, relative=off)
        sample = [
            "sample_tp.py",
            f"--init_from={place / 'one rank'}",
            "--tokenizer=ids",
            "--prompt=5 17 3",
        ]
        sample += ["--temperature=0", "--max_new_tokens=24", *common]
        both = [started(size, sample, {"OMP_NUM_THREADS": "1"}) for size in (1, 2)]
        outputs = [ended(children)[1].splitlines() for children in both]
        texts = [[line for line in said if line.startswith("5 17 3 ")] for said in outputs]
        same = len(texts[0]) == 1 and texts[0] == texts[1]
        step.say("greedy text of two ranks", ok=same, text=texts[1])


def write_letters(place: Path, vocabulary: int = 64) -> None:
    place.mkdir()
    ids = np.cumsum(np.random.default_rng(1).choice([1, 1, 1, 2, 5], 40_000)) % min(vocabulary, 64)
    for part in ("train", "val"):
        write_tokens(place / f"{part}.bin", ids, vocabulary)
    write_tokenizer(IdsTokenizer(vocabulary), place)


def symmetric(step: Step) -> None:
    """Sums of two ranks on one card through symmetric memory, plain and in a replayed graph."""
    if "RANK" in os.environ:
        return sums(step)
    if not step.gpu:
        return step.say("left out", why="a CPU has no symmetric memory")
    more = {
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }
    status, said = ended(started(2, sys.argv, more))
    step.say("two ranks on one card", ok=status == 0, said="" if status == 0 else said[-900:])


def sums(step: Step) -> None:
    import torch.distributed as dist

    from parallel import symmetric

    dist.init_process_group("gloo")
    rank, plain = dist.get_rank(), GroupTransport(dist.group.WORLD, "gloo")  # type: ignore[arg-type]

    def exchange(thing: Any) -> list[Any]:
        things = [None, None]
        dist.all_gather_object(things, thing)
        return things

    setattr(symmetric, "_check_reach", lambda places, rank: None)  # noqa: B010  it asks for two cards
    transport = SymmetricTransport.open(rank, exchange, plain)
    for dtype in (torch.float32, torch.bfloat16):
        for n in (8, 768, 1600, MOST_BYTES // dtype.itemsize):
            draw = torch.Generator(step.device).manual_seed(rank + n)
            x = torch.randn(n, device=step.device, generator=draw).to(dtype)
            ours, theirs = transport.all_reduce(x, "sum"), plain.all_reduce(x, "sum")
            if rank == 0:
                step.say(f"sum of {n} {str(dtype)[6:]}", ok=bool(torch.equal(ours, theirs)))
    x = torch.full((1600,), 1.0 + rank, device=step.device, dtype=torch.bfloat16)
    replay, out = CudaGraphs()(lambda: transport.all_reduce(x, "sum"))
    dist.barrier()
    began = time.perf_counter()
    for i in range(20):
        x.fill_(1 + rank + i)
        replay()
    step.world.synchronize()
    us = (time.perf_counter() - began) / 20 * 1e6
    if rank == 0:
        step.say("captured, and replayed 20 times", ok=bool((out == 3 + 2 * 19).all()), us=us)
    dist.barrier()
    dist.destroy_process_group()

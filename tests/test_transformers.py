"""Against transformers' GPT2LMHeadModel on weights that transformers made and saved itself, read the way users read them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from checkpoints.sources import open_source, reader
from inference.generation import generate
from inference.sampling import Sampling
from tp_model import TensorParallelGPT
from world.mesh import World

MODELS = [(3, 24, 257), (4, 32, 50257), (5, 40, 257), (12, 48, 257), (25, 100, 50257)]  # heads, width, vocabulary
BLOCK = 96


@pytest.fixture(scope="module", params=MODELS, ids=[f"{heads}heads-{vocab}" for heads, _, vocab in MODELS])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor, list[int]]:
    """(directory, ids [2, 30], transformers' logits for them, its 64 greedy tokens after the first row)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    heads, width, vocab = request.param
    torch.manual_seed(heads)
    config = GPT2Config(
        n_head=heads, n_embd=width, n_layer=3, vocab_size=vocab, n_positions=BLOCK, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # as made, attention hardly matters and the tied table repeats its input: make all of it matter
        for name, p in model.named_parameters():
            p.normal_(0, 0.05 if "bias" in name else 1.0 if "ln_" in name or "wpe" in name else 0.3)
    directory = tmp_path_factory.mktemp("hf")
    model.save_pretrained(directory)
    ids = torch.randint(1, vocab, (2, 30))
    with torch.no_grad():
        logits = model(ids).logits
        out = model.generate(ids[:1], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    return directory, ids, logits, out[0, 30:].tolist()


def _compare(world: World, directory: Path, ids: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    source = open_source(str(directory))
    model = TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank)).eval()
    with torch.no_grad():
        logits = model.gather_logits(model.local_logits(model.hidden(ids)))
    greedy = Sampling(n_tokens=source.config.vocab_size, temperature=0.0, max_new_tokens=64)
    row = generate(model, [ids[0].tolist()], greedy).rows[0]
    return logits, row.tokens[row.prompt_tokens :]


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5])
def test_logits_and_greedy_tokens(made: Any, tp: int) -> None:
    directory, ids, expected, tokens = made
    if tp > open_source(str(directory)).config.n_head:
        return  # a rank would hold no head: refused, and tested as such
    for logits, mine in run_ranks(tp, _compare, directory, ids):
        difference = (logits - expected).abs().max().item()
        largest = expected.abs().max().item()
        print(f"tp {tp}: {len(set(mine))} different tokens, largest logit {largest:.2f}, largest difference {difference:.1e}")
        assert difference < 1e-4
        assert mine == tokens and len(set(mine)) > 8  # a text, not one token over and over

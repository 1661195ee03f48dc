"""Variants of GPT-2's architecture that config.json may say, against transformers on weights that it made and saved itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_transformers import BLOCK, _compare

import shard_checkpoint
from checkpoints.sources import open_source, reader
from model import VARIANTS as KNOWN
from model import GPTConfig
from parallel.quantized import quantize
from tp_model import TensorParallelGPT
from world.mesh import World

VARIANTS: dict[str, dict[str, Any]] = {
    "narrow MLP": {"n_inner": 50},
    "exact gelu": {"activation_function": "gelu"},
    "tanh by its other name": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "plain scores": {"scale_attn_weights": False},
    "scores by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "scores by layer alone": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "epsilon": {"layer_norm_epsilon": 0.02},
    "a head of its own": {"tie_word_embeddings": False},
    "all at once": {"n_inner": 31, "activation_function": "silu", "scale_attn_by_inverse_layer_idx": True,
                    "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
}  # fmt: skip


def save(directory: Path, **variant: Any) -> Any:
    """transformers' model, saved: 5 heads, which neither 2 nor 3 ranks share evenly."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(len(variant))
    sizes = {"n_head": 5, "n_embd": 20, "n_layer": 3, "vocab_size": 131, "n_positions": BLOCK, "bos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, **variant)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.05 if "bias" in name else 1.0 if "ln_" in name or "wpe" in name else 0.3)
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor, list[int]]:
    """As in test_transformers.py."""
    directory = tmp_path_factory.mktemp("hf")
    model, ids = save(directory, **VARIANTS[request.param]), torch.randint(1, 131, (2, 30))
    with torch.no_grad():
        out = model.generate(ids[:1], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        return directory, ids, model(ids).logits, out[0, 30:].tolist()


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_logits_and_greedy_tokens(made: Any, tp: int) -> None:
    directory, ids, expected, tokens = made
    for logits, mine in run_ranks(tp, _compare, directory, ids):
        assert (logits - expected).abs().max().item() < 1e-4
        assert mine == tokens and len(set(mine)) > 8


def test_each_variant_is_seen(tmp_path: Path) -> None:
    """The same weights without the variant are another model."""
    for i, variant in enumerate(VARIANTS.values()):
        model = save(tmp_path / str(i), **variant)
        config = json.loads((tmp_path / str(i) / "config.json").read_text())
        ids = torch.randint(1, 131, (1, 30))
        for name in variant.keys() - {"n_inner", "tie_word_embeddings", "reorder_and_upcast_attn"}:
            if variant[name] == "gelu_pytorch_tanh":
                continue
            changed = {k: v for k, v in config.items() if k != name}
            (tmp_path / str(i) / "config.json").write_text(json.dumps(changed))
            source = open_source(str(tmp_path / str(i)))
            (found,) = run_ranks(1, _logits, tmp_path / str(i), ids)
            assert (found - model(ids).logits).abs().max() > 1e-3, (variant, name, source.config)


def _logits(world: World, directory: Path, ids: torch.Tensor) -> torch.Tensor:
    source = open_source(str(directory))
    model = TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank)).eval()
    with torch.no_grad():
        return model.gather_logits(model.local_logits(model.hidden(ids)))


def test_split_and_merged_it_is_the_same_to_transformers(made: Any, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    directory, ids, expected, _ = made
    split = [f"--init_from={directory}", f"--out={tmp_path / 'shards'}", "--tp=3"]
    assert shard_checkpoint.main(["split", *split]) == 0
    assert shard_checkpoint.main(["merge", f"--shards={tmp_path / 'shards'}", f"--out={tmp_path / 'hf'}", "--format=hf"]) == 0
    model, report = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert (model.eval()(ids).logits - expected).abs().max() < 1e-5  # gelu_new has other roundings


def test_nanogpt_has_no_such_model(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = made[0]
    config = open_source(str(directory)).config
    plain = GPTConfig(activation=config.activation)
    refused = "gelu" not in config.activation or any(getattr(config, name) != getattr(plain, name) for name in KNOWN)
    split = [f"--init_from={directory}", f"--out={tmp_path / 'shards'}", "--tp=2"]
    assert shard_checkpoint.main(["split", *split]) == 0
    words = [f"--shards={tmp_path / 'shards'}", f"--out={tmp_path / 'ckpt.pt'}", "--format=nanogpt"]
    assert shard_checkpoint.main(["merge", *words]) == 2 * refused
    assert ("nanoGPT's model.py knows no" in capsys.readouterr().err) == refused


def _loss(world: World, directory: Path, ids: torch.Tensor) -> Any:
    source = open_source(str(directory))
    model = TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank))
    _, loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), {name: (p.grad, model.split.rules[name].runs_of(world.tp.rank)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("tp", [1, 3])
def test_gradients_are_transformers(made: Any, tp: int) -> None:
    from transformers import GPT2LMHeadModel

    directory, ids, _, _ = made
    model = GPT2LMHeadModel.from_pretrained(directory).eval()
    right = model(ids, labels=ids).loss
    right.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for loss, grads in run_ranks(tp, _loss, directory, ids):
        assert abs(loss - right.item()) < 1e-5
        assert grads.keys() == wanted.keys()
        for name, (grad, runs) in grads.items():
            full = wanted[name].t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else wanted[name]
            dim = 1 if name.endswith("c_proj.weight") else 0
            part = torch.cat([full.narrow(dim, lo, hi - lo) for lo, hi in runs], dim) if runs else full
            torch.testing.assert_close(grad.narrow(0, 0, len(part)), part, rtol=1e-4, atol=1e-5)


def _int8(world: World, directory: Path, ids: torch.Tensor) -> Any:
    source = open_source(str(directory))
    model = TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank)).eval()
    quantize(model, world.gather)
    with torch.no_grad():
        return model.gather_logits(model.local_logits(model.hidden(ids))), sorted(name for name, _ in model.named_parameters())


def test_an_untied_head_in_8_bits(tmp_path: Path) -> None:
    model, ids = save(tmp_path, tie_word_embeddings=False), torch.randint(1, 131, (1, 30))
    right = model(ids).logits
    for found, names in run_ranks(2, _int8, tmp_path, ids):
        assert 1e-4 < (found - right).abs().max() < 0.1 * right.abs().max()
        assert "transformer.wte.weight" in names and "lm_head.weight" not in names

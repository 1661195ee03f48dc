"""Where weights come from: what transformers and nanoGPT save themselves, the hub's cache, and what is refused."""

import gzip
import json
import os
import pickle
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from ranks import PYTHON
from safetensors.torch import load_file, save_file, save_model
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)  # isort: skip  # fmt: skip

import shard_checkpoint
from base.errors import UserError
from checkpoints import archives
from checkpoints import nanogpt as nanogpt_module
from checkpoints.huggingface import HUB_SIZES as HUB
from checkpoints.huggingface import HuggingFaceDirectory
from checkpoints.nanogpt import NanoGPTCheckpoint
from checkpoints.shards import ShardSource
from checkpoints.sources import open_for_inference, open_sizes, open_source, tokenizer_of
from checkpoints.tensor_file import TensorFile
from cli.options import SampleOptions
from model import GPT, GPTConfig
from plan.partition import Partition

ROOT = Path(__file__).parent.parent
CONFIG = GPTConfig(n_layer=2, n_head=5, n_embd=20, vocab_size=131, block_size=16)
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt2(n_head: int = 5, dtype: torch.dtype = torch.float32, cls: Any = GPT2LMHeadModel, **changes: Any) -> Any:
    """A small model of transformers' with random weights everywhere (its own init leaves biases zero)."""
    torch.manual_seed(n_head)
    sizes = {"n_layer": 2, "n_head": n_head, "n_embd": 4 * n_head, "vocab_size": 131, "n_positions": 16}
    model = cls(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model.to(dtype)


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """transformers' tensors under our names, linear weights turned to [out, in]."""
    state = {f"transformer.{name.removeprefix('transformer.')}": tensor for name, tensor in model.state_dict().items()}
    return {
        name: tensor.t() if name.endswith(CONV1D) else tensor for name, tensor in state.items() if "lm_head" not in name
    }


def check_source(source: Any, expected: dict[str, torch.Tensor]) -> None:
    """Whole tensors and every rank's part at several tp, bit for bit."""
    for name, full in expected.items():
        assert torch.equal(source.read(name, None, ()), full), name
    for tp in (2, source.config.n_head):
        rules = Partition.of(source.config, tp).rules
        assert rules.keys() == expected.keys()
        for name, rule in rules.items():
            for rank, runs in enumerate(rule.runs):
                part = torch.cat([expected[name].narrow(rule.dim or 0, lo, hi - lo) for lo, hi in runs], rule.dim or 0)
                assert torch.equal(source.read(name, rule.dim, runs), part), (name, rank)


def refused(spec: Path | str) -> str:
    """What open_source says, checked to be one line that is soon said."""
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        open_source(str(spec))
    assert time.perf_counter() - start < 5
    message = str(error.value)
    assert message.isprintable() and len(message) < 600
    return message


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_head", [3, 4, 5, 12, 25])
def test_a_directory_that_transformers_saved(tmp_path: Path, n_head: int) -> None:
    model = gpt2(n_head)
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert isinstance(source, HuggingFaceDirectory)
    assert source.config == GPTConfig(16, 131, 2, n_head, 4 * n_head, 0.0, True, "gelu_tanh")
    assert (source.dtype, source.description, source.tokenizer) == (torch.float32, str(tmp_path), None)
    check_source(source, state_of(model))


def test_several_files_and_an_index(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and (tmp_path / "model.safetensors.index.json").is_file()
    check_source(open_source(str(tmp_path)), state_of(model))


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """GPT2Model, the part without the head, saves wte.weight where GPT2LMHeadModel saves transformer.wte.weight."""
    model = gpt2(cls=GPT2Model)
    model.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    check_source(open_source(str(tmp_path)), state_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = gpt2(dtype=dtype)
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert source.dtype == dtype
    check_source(source, state_of(model))


def test_mixed_precision_keeps_every_bit(tmp_path: Path) -> None:
    model = gpt2(dtype=torch.bfloat16)
    model.transformer.ln_f.float().weight.data.add_(1e-6)
    model.save_pretrained(tmp_path)
    assert open_source(str(tmp_path)).dtype == torch.float32
    assert shard_checkpoint.main(["split", f"--init_from={tmp_path}", "--tp=2", f"--out={tmp_path / 'shards'}"]) == 0
    shards = open_source(str(tmp_path / "shards"))
    assert all(torch.equal(shards.read(name, None, ()), full.float()) for name, full in state_of(model).items())


@pytest.mark.parametrize(
    ("saved", "read"), [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu")]
)
def test_the_activation_is_the_models(tmp_path: Path, saved: str, read: str) -> None:
    gpt2(activation_function=saved).save_pretrained(tmp_path)
    assert open_source(str(tmp_path)).config.activation == read


def test_a_head_that_is_stored_is_the_table(tmp_path: Path) -> None:
    """Old checkpoints hold lm_head.weight and the causal mask as well."""
    model = gpt2()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    check_source(open_source(str(tmp_path)), state_of(model))
    tensors["lm_head.weight"][130, 19] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    message = "lm_head.weight differs from wte.weight; only a head tied to the embedding is supported."
    assert refused(tmp_path) == f"{tmp_path}: {message}"


def test_gpt2s_sizes_mean_gpt2s_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HUB, "gpt2", (1, 1, 4))
    gpt2(n_head=1, n_layer=1, n_embd=4, n_positions=1024, vocab_size=50257).save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert source.tokenizer == {"kind": "gpt2"} and tokenizer_of(source).kind == "gpt2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("files", [1, 3])
def test_what_torch_save_wrote(tmp_path: Path, files: int, dtype: torch.dtype) -> None:
    """pytorch_model.bin, of which transformers writes no more: in one file, or several and an index."""
    model = gpt2(dtype=dtype)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state, weight_map = model.state_dict(), dict[str, str]()
    for i in range(files):
        name = "pytorch_model.bin" if files == 1 else f"pytorch_model-{i}.bin"
        torch.save({key: state[key] for key in list(state)[i::files]}, tmp_path / name)
        weight_map |= dict.fromkeys(list(state)[i::files], name)
    if files > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(str(tmp_path))
    assert source.dtype == dtype
    check_source(source, state_of(model))


def test_a_bin_that_is_none(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"<html>")
    said = "a web page: its address was that of a page about the file, not that of the file"
    assert refused(tmp_path) == f"{path} is not a readable pytorch_model.bin ({said})."
    torch.save([torch.ones(3)], path)
    assert refused(tmp_path) == f"{path} holds no tensors by name."
    torch.save({"a": torch.ones(3), "b": 5}, path)
    assert "is missing: config.json says" in refused(tmp_path)


HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "score.weight": (GPT2ForSequenceClassification, {"num_labels": 3, "pad_token_id": 0}),
    "classifier.weight": (GPT2ForTokenClassification, {"num_labels": 3}),
    "qa_outputs.weight": (GPT2ForQuestionAnswering, {}),
    "multiple_choice_head.summary.weight": (GPT2DoubleHeadsModel, {"num_labels": 1}),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_heads_of_models_that_classify(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cls, more = HEADS[head]
    model = gpt2(cls=cls, **more)
    model.save_pretrained(tmp_path / "hf")
    said = refused(tmp_path / "hf")
    kind = head.partition(".")[0]
    assert said.startswith(f"{tmp_path / 'hf'}: tensor {kind}") and said.endswith(
        "is a head that nanoTP does not compute: shard_checkpoint.py split --drop_heads=True writes shards without it.")
    words = [f"--init_from={tmp_path / 'hf'}", f"--out={tmp_path / 'shards'}", "--tp=2"]
    assert shard_checkpoint.main(["split", *words]) == 2
    assert shard_checkpoint.main(["split", *words, "--drop_heads=True"]) == 0
    expected = {key: value for key, value in state_of(model).items() if not key.startswith(("transformer." + kind, kind))}
    check_source(ShardSource(tmp_path / "shards"), expected)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "model_type is 'llama', nanoTP reads gpt2."),
    "no type": ({"model_type": None}, "model_type is None, nanoTP reads gpt2."),
    "n_inner": ({"n_inner": 79}, "tensor transformer.h.0.mlp.c_fc.weight has shape [80, 20], config.json says [79, 20]."),
    "n_inner negative": ({"n_inner": -1}, "n_inner=-1 is out of range."),
    "layer scale": ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx=1 is not of type bool."),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention=true: nanoTP reads decoders without an encoder."),
    "untied": ({"tie_word_embeddings": False}, "tensor lm_head.weight is missing: config.json says [131, 20]."),
    "epsilon": ({"layer_norm_epsilon": 1}, "layer_norm_epsilon=1 is out of range."),
    "tanh": (
        {"activation_function": "tanh"},
        "activation_function='tanh' is not one of gelu_new, gelu_pytorch_tanh, gelu, relu, silu, swish.",
    ),
    "activation a list": ({"activation_function": ["gelu"]}, "activation_function=['gelu'] is not one of"),
    "heads do not divide": ({"n_head": 3}, "n_embd=20 does not divide into n_head=3 heads."),
    "n_head a bool": ({"n_head": True}, "n_head=True is not of type int."),
    "n_head a text": ({"n_head": "5\n"}, "n_head='5\\n' is not of type int."),
    "n_embd 0": ({"n_embd": 0}, "n_embd=0 is out of range."),
    "positions negative": ({"n_positions": -1}, "n_positions=-1 is out of range."),
    "layers without end": ({"n_layer": 10**12}, "n_layer=1000000000000 is out of range."),
    "many layers": ({"n_layer": 9999}, "tensor transformer.h.2.ln_1.weight is missing"),
    "another width": ({"n_embd": 40}, "tensor transformer.wte.weight has shape [131, 20], config.json says [131, 40]."),
    "another length": ({"n_positions": 17}, "tensor transformer.wpe.weight has shape [16, 20], config.json says [17, 20]."),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "hf"
    gpt2().save_pretrained(path)
    return path


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_what_would_be_computed_differently_is_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "hf"))
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))
    said = refused(path)
    assert said.startswith(str(path)) and message in said


def test_damaged_directories(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "hf"))
    weights, config, index = path / "model.safetensors", path / "config.json", path / "model.safetensors.index.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert f"{weights} is not a readable safetensors file" in refused(path)
    weights.unlink()
    assert refused(path) == f"{path} has config.json but no model.safetensors."
    (path / "tf_model.h5").write_bytes(b"")
    assert refused(path).endswith("but no model.safetensors. Save the model again with save_pretrained(...).")
    for names, message in [
        ([], f"{index} has no weight_map."),
        ({"weight_map": 3}, f"{index} has no weight_map."),
        ({"weight_map": {"a": "../model.safetensors"}}, "'../model.safetensors' is not a safetensors file of this directory."),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' is not a safetensors file of this directory."),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "'pytorch_model.bin' is not a safetensors file of this directory."),
        ({"weight_map": {"a": 3}}, "3 is not a safetensors file of this directory."),
        ({"weight_map": {}}, "tensor transformer.wte.weight is missing"),
        ({"weight_map": {"wte.weight": "gone.safetensors"}}, "gone.safetensors is missing."),
    ]:
        index.write_text(json.dumps(names))
        assert message in refused(path)
    weights.with_name("part.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(["transformer.wte.weight", "wpe.weight"], "part.safetensors")}))
    assert refused(path).endswith("part.safetensors: tensor wpe.weight is missing, though the index names it.")
    config.write_text("[" * 10**5)
    assert f"{config} is not valid JSON" in refused(path)
    config.write_text("{}")
    assert refused(path) == f"{config}: model_type is None, nanoTP reads gpt2."


def test_a_dtype_that_is_not_read(tmp_path: Path) -> None:
    gpt2(dtype=torch.float64).save_pretrained(tmp_path)
    assert refused(tmp_path) == f"{tmp_path}: tensor transformer.wte.weight is F64; float32, bfloat16, float16 are read."


# --- the hub --------------------------------------------------------------------------------------------------------


def lay_out(home: Path, repository: str, source: Path) -> None:
    """What the hub's client leaves: blobs, a snapshot of links to them, and the branch that names the snapshot."""
    base, commit = home / "hub" / f"models--{repository.replace('/', '--')}", "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    (base / "blobs").mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)
    snapshot = base / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(source / name, base / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")


def test_a_hub_name_comes_from_the_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its long name, or under the short one where older caches have it; no network is asked."""
    lay_out(tmp_path, "openai-community/gpt2", saved)
    lay_out(tmp_path, "gpt2-xl", saved)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_out(tmp_path, "some-body/gpt2.nl", saved)
    for name in ("gpt2", "gpt2-xl", "openai-community/gpt2", "openai-community/gpt2-xl", "some-body/gpt2.nl"):
        source = open_source(name)
        assert source.description == name.removeprefix("openai-community/") and source.config.n_head == 5
        check_source(source, state_of(gpt2()))


@pytest.mark.parametrize("has", ["nothing", "config.json alone", "a broken link"])
def test_a_hub_name_without_network(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: str) -> None:
    if has != "nothing":
        lay_out(tmp_path, "openai-community/gpt2-medium", saved)
        weights = next(tmp_path.rglob("model.safetensors"))
        (weights if has == "config.json alone" else weights.resolve()).unlink()
    download, asked = huggingface_hub.snapshot_download, []

    def unreachable(repository: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            return download(repository, local_files_only=True, **options)
        asked.append(repository)
        raise ConnectionError("Name or service not known\nwhile resolving huggingface.co")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert refused("gpt2-medium") == (
        "gpt2-medium is not in the local Hugging Face cache and the hub cannot be reached (ConnectionError). "
        "A directory with config.json and model.safetensors works too: --init_from=/path/to/gpt2-medium"
    )
    assert asked == ["openai-community/gpt2-medium"]


def test_offline_by_the_environment(saved: Path, tmp_path: Path) -> None:
    """HF_HOME and HF_HUB_OFFLINE are read when the hub's client is imported: a process of its own."""
    lay_out(tmp_path / "home", "openai-community/gpt2", saved)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    script = (
        "import sys; from shard_checkpoint import main\n"
        f"print(main(['split', '--init_from=gpt2', '--tp=2', '--out={tmp_path / 'shards'}']))\n"
        f"print(main(['split', '--init_from=gpt2-large', '--tp=2', '--out={tmp_path / 'none'}']))\n"
    )
    command = [PYTHON, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-2:] == ["0", "2"]
    assert done.stderr.startswith("shard_checkpoint.py: gpt2-large is not in the local Hugging Face cache and the hub")
    assert done.stderr.count("\n") == 1
    check_source(ShardSource(tmp_path / "shards"), state_of(gpt2()))


def test_a_name_that_is_nothing(tmp_path: Path) -> None:
    names = "gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    assert refused("gpt2-xxl").endswith(f"is neither a file, a directory nor one of {names}. Did you mean gpt2-xl?")
    assert refused("openai-community/gpt2-larg").endswith("Did you mean openai-community/gpt2-large?")
    assert open_sizes("openai-community/gpt2-medium") == open_sizes("gpt2-medium")
    here, none = str(tmp_path), str(tmp_path / "none")
    words = SampleOptions(init_from="resum"), SampleOptions(out_dir=none), SampleOptions(out_dir=here)
    said = "Did you mean resume?", f"--out_dir={tmp_path / 'none'} is neither a file, a directory nor one of {names}."
    for options, text in zip(words, (*said, f"--out_dir={tmp_path} is a directory without weights"), strict=True):
        with pytest.raises(UserError) as error:
            open_for_inference(options, (0, 1))
        assert text in str(error.value)
    assert refused("~no_such_user/x").startswith("--init_from=~no_such_user/x is neither a file")
    assert refused(tmp_path).startswith(f"--init_from={tmp_path} is a directory without weights: no shards.json (shards)")
    assert set(HUB) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}


# --- nanoGPT --------------------------------------------------------------------------------------------------------

PREFIX = "_orig_mod."


def nanogpt(config: GPTConfig = CONFIG, prefix: str = "", **changes: Any) -> dict[str, Any]:
    """What nanoGPT's train.py passes to torch.save; nn.Linear and nn.Embedding as there, the head tied to the table."""
    torch.manual_seed(3)
    state = {name: torch.randn(shape) for name, shape in Partition.of(config, 1).shapes().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.randn(3))], lr=1e-3)
    args = {key: value for key, value in config.as_json().items() if key != "activation"}
    return {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.47),
        "config": {"dataset": "shakespeare_char", "batch_size": 12, "compile": True, "out_dir": "out"},
        **changes,
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_nanogpt_checkpoint(tmp_path: Path, prefix: str, bias: bool) -> None:
    config = replace(CONFIG, bias=bias, dropout=0.2)
    raw = nanogpt(config, prefix)
    torch.save(raw, tmp_path / "ckpt.pt")
    for spec in (tmp_path / "ckpt.pt", tmp_path):
        source = open_source(str(spec))
        assert isinstance(source, NanoGPTCheckpoint)
        assert (source.config, source.dtype) == (config, torch.float32)
        assert (source.dataset, source.tokenizer) == ("shakespeare_char", None)
        expected = {name.removeprefix(prefix): tensor for name, tensor in raw["model"].items()}
        del expected["lm_head.weight"]
        check_source(source, expected)


def test_the_same_logits_as_the_model_it_was_saved_from(tmp_path: Path) -> None:
    """By way of the file and a split: model.py's GPT with the tensors that a source gives."""
    torch.manual_seed(0)
    saved, ids = GPT(CONFIG, seed=5), torch.randint(131, (2, 9))
    torch.save(nanogpt(model=saved.state_dict()), tmp_path / "ckpt.pt")
    source = open_source(str(tmp_path / "ckpt.pt"))
    again = GPT(source.config)
    again.load_state_dict({name: source.read(name, None, ()) for name in source_names(source)}, strict=False)
    assert torch.equal(again(ids, ids)[0], saved(ids, ids)[0])


def source_names(source: Any) -> list[str]:
    return list(Partition.of(source.config, 1).shapes())


class Bomb:
    """Unpickled, it writes a file: what a checkpoint from a stranger could do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    path, harm = tmp_path / "ckpt.pt", tmp_path / "harm"
    bomb = Bomb(harm)
    for raw in (nanogpt() | {"config": bomb}, bomb, nanogpt(model={"x": bomb}), nanogpt(optimizer=[bomb])):
        torch.save(raw, path)
        with open(path, "rb") as file:
            assert b"touch" in file.read()
        reads = "only tensors, numbers, strings and lists and dicts of them are read from a ckpt.pt"
        names = f"{path} is refused: it names {os.system.__module__}.system; {reads}."
        assert refused(path) == f"{names} {archives.WITHOUT}"
        torch.save(raw, path, _use_new_zipfile_serialization=False)
        assert refused(path).startswith(f"{path} ")
        path.write_bytes(pickle.dumps(raw))
        assert refused(path).startswith(f"{path} ")
        assert not harm.exists()


def set_arg(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["model_args"].update({key: value})


def set_tensor(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["model"].update({name: value})


LN = "transformer.ln_f.weight"
CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no model": (lambda raw: raw.pop("model"), "it lacks `model` or `model_args`"),
    "no model_args": (lambda raw: raw.pop("model_args"), "it lacks `model` or `model_args`"),
    "no n_head": (lambda raw: raw["model_args"].pop("n_head"), "model_args.n_head is missing"),
    "n_head true": (set_arg("n_head", True), "model_args.n_head=True is not of type int"),
    "n_head a tensor": (set_arg("n_head", torch.zeros(40, 40)), "is not of type int"),
    "n_head 3": (set_arg("n_head", 3), "n_embd=20 does not divide into n_head=3 heads"),
    "layers without end": (set_arg("n_layer", 10**12), "model_args.n_layer=1000000000000 is out of range"),
    "dropout a tensor": (set_arg("dropout", torch.zeros(3)), "is not of type float"),
    "dropout NaN": (set_arg("dropout", float("nan")), "model_args.dropout=nan is out of range"),
    "activation": (set_arg("activation", "tanh"), "model_args.activation='tanh' is not known"),
    "a layer more": (set_arg("n_layer", 3), "tensor transformer.h.2.ln_1.weight is missing"),
    "another width": (set_arg("n_embd", 40), "tensor transformer.wte.weight has shape [131, 20], model_args say [131, 40]"),
    "tensor missing": (lambda raw: raw["model"].pop(LN), f"tensor {LN} is missing"),
    "tensor a number": (set_tensor(LN, 3), f"tensor {LN} is missing"),
    "tensor sparse": (set_tensor(LN, torch.ones(20).to_sparse()), "is refused: it names torch._utils._rebuild_sparse_tensor;"),
    "tensor without data": (set_tensor(LN, torch.ones(20, device="meta")), "it names torch._utils._rebuild_meta_tensor_no"),
    "dtype": (set_tensor(LN, torch.ones(20).long()), f"tensor {LN} is torch.int64; float32, bfloat16, float16 are read"),
    "head untied": (set_tensor("lm_head.weight", torch.ones(131, 20)), "lm_head.weight differs from wte.weight"),
    "head of another dtype": (set_tensor("lm_head.weight", torch.ones(131, 20).half()), "lm_head.weight differs"),
    "head of another shape": (set_tensor("lm_head.weight", torch.ones(3)), "tensor lm_head.weight has shape [3]"),
}


@pytest.mark.parametrize(("damage", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints_that_do_not_fit(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    raw = nanogpt()
    damage(raw)
    torch.save(raw, tmp_path / "ckpt.pt")
    said = refused(tmp_path / "ckpt.pt")
    assert said.startswith(f"{tmp_path / 'ckpt.pt'}") and message in said


NO_PLACE = "has no place in the GPT-2 that is described there"
MORE: dict[str, tuple[str, tuple[int, ...]]] = {
    "a bias of the head": ("lm_head.bias", (131,)),
    "a norm of the queries": ("transformer.h.0.attn.q_norm.weight", (4,)),
    "an adapter": ("transformer.h.1.attn.c_attn.lora_A.default.weight", (4, 20)),
    "a layer more": ("transformer.h.2.ln_1.weight", (20,)),
    "a mask of a layer more": ("transformer.h.2.attn.bias", (1, 1, 16, 16)),
    "a bias under a mask's name": ("transformer.h.0.attn.bias", (20,)),
}


@pytest.mark.parametrize(("name", "shape"), MORE.values(), ids=MORE)
def test_a_tensor_that_the_model_has_no_place_for(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """In every source, and so for every command; shard directories: "does not belong to the model" in test_shards.py."""
    raw, hf = nanogpt(), tmp_path / "hf"
    raw["model"][name] = torch.zeros(shape)
    torch.save(raw, tmp_path / "ckpt.pt")
    known = name if name.startswith("transformer.") or "lm_head" in name else f"transformer.{name}"
    assert refused(tmp_path / "ckpt.pt").startswith(f"{tmp_path / 'ckpt.pt'}: tensor {known} {NO_PLACE}.")
    for part in ({}, {"max_shard_size": "10KB"}):
        gpt2().save_pretrained(hf, **part)
        file = next(hf.glob("model*.safetensors"))
        save_file(load_file(file) | {name: torch.zeros(shape)}, file)
        index = hf / "model.safetensors.index.json"
        if part:
            assert f"{file}: tensor {name} is not in the index" in refused(hf)
            said = json.loads(index.read_text())
            said["weight_map"][name] = file.name
            index.write_text(json.dumps(said))
        assert refused(hf).startswith(f"{hf}: tensor {known} {NO_PLACE}.")
        shutil.rmtree(hf)
    raw["model"]["x"] = 3
    torch.save(raw, tmp_path / "ckpt.pt")
    assert f"{NO_PLACE}, nor have 1 others." in refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("h.1.", "h.1._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('h.0.', 'h.0._checkpoint_wrapped_module.')}",
    ],
)
def test_names_that_wrappers_have_changed(tmp_path: Path, wrap: Callable[[str], str]) -> None:
    raw = nanogpt()
    expected = {name: tensor for name, tensor in raw["model"].items() if "lm_head" not in name}
    torch.save(raw | {"model": {wrap(name): tensor for name, tensor in raw["model"].items()}}, tmp_path / "ckpt.pt")
    check_source(open_source(str(tmp_path)), expected)
    hf = tmp_path / "hf"
    gpt2().save_pretrained(hf)
    save_file({wrap(name): tensor for name, tensor in load_file(hf / "model.safetensors").items()}, hf / "model.safetensors")
    check_source(open_source(str(hf)), state_of(gpt2()))


@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2Model])
def test_what_save_model_writes(saved: Path, tmp_path: Path, cls: Any) -> None:
    """Of the table and the head it keeps the head."""
    path = Path(shutil.copytree(saved, tmp_path / "hf"))
    model = gpt2(cls=cls)
    save_model(model, str(path / "model.safetensors"))
    assert ("lm_head.weight" in load_file(path / "model.safetensors")) == (cls is GPT2LMHeadModel)
    check_source(open_source(str(path)), state_of(model))


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_from_before_nanogpt_had_the_option_bias(tmp_path: Path, bias: bool) -> None:
    raw = nanogpt(replace(CONFIG, bias=bias))
    raw["model_args"].pop("bias")
    torch.save(raw, tmp_path / "ckpt.pt")
    assert open_source(str(tmp_path)).config == replace(CONFIG, bias=bias)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548118077\n"


@pytest.mark.parametrize("name", ["ckpt.pt", "hf/model.safetensors", "hf/config.json", "shards/rank-01-of-02.safetensors",
                                  "shards/shards.json", "shards/tokenizer.json"])  # fmt: skip
def test_a_pointer_of_git_lfs(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, tmp_path / "hf")
    assert shard_checkpoint.main(["split", f"--init_from={saved}", "--tp=2", f"--out={tmp_path / 'shards'}"]) == 0
    (tmp_path / name).write_text(POINTER)
    place = (tmp_path / name).parent
    with pytest.raises(UserError) as error:
        tokenizer_of(open_source(str(place), verify=(0, 1)))
    assert str(error.value).startswith(f"{tmp_path / name} is a git-lfs pointer, not the file that it stands for")


FORMATS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "old": (lambda path: torch.save(nanogpt(), path, _use_new_zipfile_serialization=False),
            "torch's format from before version 1.6: load it with torch, save it again"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a pickle that torch.save did not write"),
    "safetensors": (lambda path: save_file({"a": torch.zeros(3)}, path), "a safetensors file: --init_from takes the directory"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\3" + bytes(40)), "a GGUF file, which is not read"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(bytes(400))), "packed by gzip: unpack it first"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html><html>Sign in</html>"), "a web page: its address"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "what"), FORMATS.values(), ids=FORMATS)
def test_another_format_under_the_name_ckpt_pt(tmp_path: Path, write: Callable[[Path], Any], what: str) -> None:
    write(tmp_path / "ckpt.pt")
    assert refused(tmp_path).startswith(f"{tmp_path / 'ckpt.pt'} is not a readable ckpt.pt ({what}")


def test_tensors_alone_under_the_name_ckpt_pt(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    for raw in (gpt2().state_dict(), nanogpt()["model"], {"state_dict": nanogpt()["model"], "epoch": 3}):
        torch.save(raw, path)
        assert refused(path).endswith(f"it lacks `model` or `model_args`. {nanogpt_module.BARE}")


class Settings:
    """What a fork of nanoGPT may keep beside the weights."""


@pytest.mark.parametrize(
    "more", [np.float32(1.47), np.arange(3), Settings(), Path("out"), {1, 2}, b"bytes"], ids=lambda value: type(value).__name__
)
def test_more_than_data_beside_the_weights(tmp_path: Path, more: Any) -> None:
    """The message says how to do without, and what it says works."""
    torch.save(nanogpt(more=more), tmp_path / "ckpt.pt")
    said = refused(tmp_path)
    assert said.endswith(archives.WITHOUT)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=False)
    lines = archives.WITHOUT.partition("alone: ")[2].rstrip(".").replace("'ckpt.pt'", repr(str(tmp_path / "ckpt.pt")))
    exec(lines, {"torch": torch, "checkpoint": checkpoint})
    assert open_source(str(tmp_path)).config == CONFIG


def test_a_checkpoint_of_the_other_byte_order(tmp_path: Path) -> None:
    """Its numbers are turned; torch.load reads it alike."""
    raw, path = nanogpt(), tmp_path / "ckpt.pt"
    torch.save(raw, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("byteorder"):
                content = b"big"
            elif "/data/" in name:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            archive.writestr(name, content)
    expected = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(tensor, raw["model"][name]) for name, tensor in expected.items())
    del expected["lm_head.weight"]
    check_source(open_source(str(tmp_path), verify=(0, 1)), expected)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt(), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-1000], whole[1000:]):
        path.write_bytes(content)
        assert refused(path).startswith(f"{path} is not a readable ckpt.pt (")
    file = TensorFile(path, {"a": (3,)}, torch.float32)  # a user may name the file where the directory is meant
    file.write("a", torch.zeros(3))
    file.close()
    assert refused(path).startswith(f"{path} is not a readable ckpt.pt (")


def test_where_a_tokenizer_is_found(saved: Path, tmp_path: Path) -> None:
    torch.save(nanogpt() | {"config": {"dataset": "poems"}}, tmp_path / "ckpt.pt")
    source = open_source(str(tmp_path))
    poems = tmp_path / "texts" / "poems"
    poems.mkdir(parents=True)
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (poems / "meta.pkl").write_bytes(pickle.dumps(meta))
    known = {"kind": "char", "chars": ["a", "b", "c"]}
    assert tokenizer_of(source, data_dir=str(tmp_path / "texts")).to_json() == known
    assert tokenizer_of(source, str(poems)).to_json() == known
    missed = tokenizer_of(source, data_dir=str(tmp_path))
    note = f"{tmp_path / 'ckpt.pt'} was trained on the dataset poems, which is not in {tmp_path}: text is token ids. "
    assert missed.kind == "ids" and missed.note == f"{note}--tokenizer=DIR names its directory."
    with pytest.raises(UserError, match=r"token ids such as 5 17 3, not 'Once'\. .*ckpt.pt was trained on the dataset poems"):
        missed.encode("Once upon a time")
    (poems / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')  # Hugging Face's, damaged
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        tokenizer_of(source, str(poems))
    with pytest.raises(UserError, match="is neither gpt2, ids, nor a directory with tokenizer.json, meta.pkl or encoder.json"):
        tokenizer_of(source, str(tmp_path))


# --- a training directory -------------------------------------------------------------------------------------------


def test_a_training_directory_is_its_latest_checkpoint(saved: Path, tmp_path: Path) -> None:
    for step, tp in ((100, 1), (200, 3)):
        out = tmp_path / f"step-{step:06d}"
        assert shard_checkpoint.main(["split", f"--init_from={saved}", f"--tp={tp}", f"--out={out}"]) == 0
    for latest, tp in (("step-000200\n", 3), ("step-000100", 1)):
        (tmp_path / "latest").write_text(latest)
        source = open_source(str(tmp_path), verify=(0, 1))
        assert isinstance(source, ShardSource) and source.manifest.tp == tp
        check_source(source, state_of(gpt2()))
    for content in (b"step-000300", b"", b".", b"..", b"../step", b"/etc", b"\xff\xfe", b"a\nb", b"x" * 999):
        (tmp_path / "latest").write_bytes(content)
        said = refused(tmp_path)
        assert said.startswith(f"{tmp_path / 'latest'} names ") and said.endswith(f", which is not a checkpoint in {tmp_path}.")

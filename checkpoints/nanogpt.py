"""Weights as nanoGPT saves them: ckpt.pt."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from base.errors import UserError, in_file, printable
from base.files import beginning, fetched
from base.pickles import Foreign, Refused
from checkpoints.archives import read_archive
from checkpoints.manifest import config_from
from checkpoints.tensor_file import runs_of
from checkpoints.tensors import Source, by_plain_name, check_weights, tokenizer_for
from plan.partition import Partition, Span

# how a file begins that torch.save did not write, as a regular expression, and what it is
BEGINNINGS = {
    rb"(?s:.{8}){":
        "a safetensors file: --init_from takes the directory that has it and config.json",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.":
        "torch's format from before version 1.6: load it with torch, save it again",
    b"\x80": "a pickle that torch.save did not write: save a dict of tensors with torch.save",
    b"GGUF": "a GGUF file, which is not read: --init_from takes the weights that it was made from",
    b"\x1f\x8b": "packed by gzip: unpack it first",
    b"\x89HDF": "an HDF5 file, as TensorFlow saves weights: save them with torch",
    b"<": "a web page: its address was that of a page about the file, not that of the file",
}  # fmt: skip
WITHOUT = ("Where it was made, save what is needed alone: "
           "torch.save({key: checkpoint[key] for key in ('model', 'model_args')}, 'ckpt.pt').")
BARE = ("It holds tensors alone, such as transformers' pytorch_model.bin does: name a directory "
        "that save_pretrained(...) wrote, or save {'model': ..., 'model_args': {...}}.")


class NanoGPTCheckpoint(Source):
    """A nanoGPT ckpt.pt, its tensors mapped from the file: {"model": state dict, "model_args":
    {...}, "config": {...}, ...}. verify: see `read_archive`."""

    def __init__(self, path: Path, verify: tuple[int, int] | None = None):
        self.path, self.description, self.files = path, str(path), [path]
        raw = self._load(verify)
        state = by_plain_name(((str(k), value) for k, value in raw["model"].items()), str(path))
        settings = raw["config"] if isinstance(raw.get("config"), dict) else {}
        # nanoGPT has no `activation`, always the exact GELU: `merge` writes it into `config`, where
        # nanoGPT does not look. `bias` is younger than some checkpoints, which have biases
        bias, activation = "transformer.ln_f.bias" in state, settings.get("activation", "gelu")
        defaults = {"dropout": 0.0, "activation": activation, "bias": bias}
        with in_file(path):
            self.config = config_from(defaults | raw["model_args"], "model_args.{}".format)
        found: dict[str, Any] = {
            name: (list(value.shape), value.dtype) if isinstance(value, Tensor) else (None, None)
            for name, value in state.items()
        }
        about = str(path), "model_args say"
        self.dtype = check_weights(found, self.config, *about, state.__getitem__)
        self.tensors = {name: state[name] for name in Partition.of(self.config, 1).shapes()}
        # one number may pose as many, by a stride of 0
        if sum(t.nbytes for t in self.tensors.values()) > path.stat().st_size:
            raise UserError(f"{path}: its tensors claim more bytes than the file has.")
        name = settings.get("dataset")
        plain = isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()
        self.dataset = name if plain else None
        self.tokenizer = tokenizer_for(self.config.vocab_size, settings)

    def _load(self, verify: tuple[int, int] | None) -> dict[str, Any]:
        try:
            raw = read_archive(fetched(self.path), verify)
        except UserError:
            raise
        except Refused as error:
            reads = "only tensors, numbers, strings and lists and dicts of them are read"
            how = f" {WITHOUT}" if isinstance(error, Foreign) else ""
            fault = f"is refused: {error}; {reads} from a ckpt.pt.{how}"
            raise UserError(f"{self.path} {fault}") from None
        except Exception as error:  # zipfile and torch raise a dozen kinds for a broken file
            fault = f"{type(error).__name__}: {printable((str(error).splitlines() or [''])[0], 80)}"
            head = beginning(self.path)
            fault = next((what for how, what in BEGINNINGS.items() if re.match(how, head)), fault)
            raise UserError(f"{self.path} is not a readable ckpt.pt ({fault}).") from None
        parts = raw if isinstance(raw, dict) else {}
        if all(isinstance(parts.get(key), dict) for key in ("model", "model_args")):
            return parts
        lacks = "is not a nanoGPT checkpoint: it lacks `model` or `model_args`."
        state = parts.get("state_dict", parts)
        values = state.values() if isinstance(state, dict) else ()
        bare = "model" not in parts and any(isinstance(value, Tensor) for value in values)
        raise UserError(f"{self.path} {lacks}{' ' + BARE if bare else ''}")

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        return runs_of(self.tensors[name], dim, runs)

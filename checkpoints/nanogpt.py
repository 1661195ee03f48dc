"""Weights as nanoGPT saves them: ckpt.pt."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from base.errors import UserError, in_file
from checkpoints.archives import read_pt
from checkpoints.manifest import config_from
from checkpoints.tensor_file import runs_of
from checkpoints.tensors import CARRIED, MOMENTS, Source, by_plain_name, check_weights
from plan.partition import Partition, Span

BARE = ("It holds tensors alone, such as transformers' pytorch_model.bin does: name a directory "
        "that save_pretrained(...) wrote, or save {'model': ..., 'model_args': {...}}.")


def parameter_orders(shapes: Mapping[str, Sequence[int]]) -> list[tuple[list[str], list[str]]]:
    """The names of nanoGPT's two groups, those that decay first: as it is, and as it was before
    June 2023, when the tables did not decay and names were sorted."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    vectors = [name for name in shapes if name not in matrices]
    tables = [name for name in matrices if name.endswith(("wte.weight", "wpe.weight"))]
    products = sorted({*matrices} - {*tables})
    return [(matrices, vectors), (products, sorted([*tables, *vectors]))]


class NanoGPTCheckpoint(Source):
    """A nanoGPT ckpt.pt, its tensors mapped from the file: {"model": state dict, "model_args":
    {...}, "config": {...}, ...}. verify: see `read_archive`."""

    def __init__(self, path: Path, verify: tuple[int, int] | None = None):
        self.path, self.description, self.files = path, str(path), [path]
        self.raw = raw = self._load(verify)
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
        # nanoGPT's own rule: GPT-2's tokens, in a table of 50257 or 50304 rows, unless the dataset
        # has a vocabulary
        usual = {"kind": "gpt2"} if self.config.vocab_size in (50257, 50304) else None
        self.tokenizer = settings.get(CARRIED, usual)

    def _load(self, verify: tuple[int, int] | None) -> dict[str, Any]:
        raw = read_pt(self.path, verify)
        parts = raw if isinstance(raw, dict) else {}
        if all(isinstance(parts.get(key), dict) for key in ("model", "model_args")):
            return parts
        lacks = "is not a nanoGPT checkpoint: it lacks `model` or `model_args`."
        state = parts.get("state_dict", parts)
        values = state.values() if isinstance(state, dict) else ()
        bare = "model" not in parts and any(isinstance(value, Tensor) for value in values)
        raise UserError(f"{self.path} {lacks}{' ' + BARE if bare else ''}")

    def optimizer_steps(self) -> int:
        """AdamW's steps so far. Makes its moments readable, as `exp_avg.NAME`. nanoGPT numbers the
        parameters group by group: those that decay, then the others. UserError if there is no such
        state, or it is of other parameters."""
        shapes = Partition.of(self.config, 1).shapes()
        orders = parameter_orders(shapes)
        try:
            stored = self.raw["optimizer"]
            sizes = [len(group["params"]) for group in stored["param_groups"]]
            order = next(order for order in orders if list(map(len, order)) == sizes)
            names, steps = [name for group in order for name in group], set()
            for i, name in enumerate(names):
                state = stored["state"][i]
                steps.add(int(state["step"]))
                for moment in MOMENTS:
                    tensor = state[moment]
                    if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
                        raise ValueError
                    self.tensors[f"{moment}.{name}"] = tensor
            (found,) = steps
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError):
            fault = "has no AdamW state of this model's parameters"
            new = f"--init_from={self.path} with another --out_dir starts from its weights"
            raise UserError(f"{self.path} {fault}: {new}.") from None
        return found

    def read(self, name: str, dim: int | None, runs: Iterable[Span]) -> Tensor:
        return runs_of(self.tensors[name], dim, runs)

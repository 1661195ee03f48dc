"""The weights, text and models that the commands start from."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from checkpoints.sources import Source, common_tokenizer, identity, open_source, reader
from cli.options import DropOptions
from inference.perplexity import measure
from plan.schedule import Schedule
from report import report
from text.dataset import Dataset
from text.tokenizer import Tokenizer
from tp_model import TensorParallelGPT
from world.devices import pick_dtype
from world.mesh import World


def open_inputs(world: World, options: DropOptions,
                command: str = "") -> tuple[Source, Dataset, Tokenizer]:
    """The weights, the dataset and their common tokenizer; UserError if they do not fit. command:
    one that needs several ranks."""
    if command and world.tp.size == 1:
        raise UserError(f"drop_syncs.py {command} needs the ranks that the schedule is for: "
                        f"torchrun --standalone --nproc_per_node=2 drop_syncs.py {command} ...")
    if world.is_main:
        report.check_place(options.report, "report")
    if not options.dataset:
        raise UserError("--dataset is required: the text that is measured and learned from "
                        "(data/NAME/prepare.py makes one).")
    source = open_source(options.init_from, (world.rank, world.size))
    world.agree("weights", identity(source))
    dataset = Dataset(Path(options.data_dir) / options.dataset)
    tokenizer, notice = common_tokenizer(source, dataset, options.data_dir)
    dataset.check(source.config.block_size, source.config.vocab_size)
    if notice and world.is_main:
        print(notice, file=sys.stderr)
    return source, dataset, tokenizer


def validation_tokens(dataset: Dataset, options: DropOptions) -> Tensor:
    """The ids of the text whose perplexity is measured, int64."""
    return torch.from_numpy(dataset.val[: options.max_tokens or len(dataset.val)].astype("int64"))


def build(world: World, source: Source, options: DropOptions,
          schedule: Schedule) -> TensorParallelGPT:
    return TensorParallelGPT(source.config, world.tp, reader(source, world.tp.rank),
                             device=world.device, dtype=pick_dtype(options.dtype, world.device),
                             schedule=schedule).eval()


def perplexity(model: TensorParallelGPT, tokens: Tensor, batch_size: int) -> float:
    """The exact perplexity of tokens [n], at most e^700; NaN if the model's loss is NaN."""
    total, count = measure(model, tokens, model.config.block_size, batch_size)
    return math.exp(min(total / count, 700))


def about(what: str, world: World, source: Source, tokens: Tensor) -> dict[str, Any]:
    """The head of a report."""
    return {"entry": "drop_syncs", "what": what, "source": source.description,
            **report.where(world), "tokens": len(tokens), "model": source.config.as_json()}

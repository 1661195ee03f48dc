"""OpenWebText, the open copy of GPT-2's training text, in GPT-2's tokens: 8 million documents, 9 billion tokens.

Needs the `datasets` package and some 100 GB of disk: train.bin takes 17 GB, the rest is the package's cache. Each
document ends with the end-of-text token. One document in 2000 goes to val.bin.
"""

import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.console import run
from base.errors import UserError
from text.dataset import new_dataset
from text.prepare import a_path, options_parser
from text.tokenizer import GPT2Tokenizer

HUB_NAME = "Skylion007/openwebtext"
VAL_FRACTION = 0.0005
SPLIT_SEED = 2357  # nanoGPT's
DOCUMENTS_A_SHARD = 1000  # appended to the file at once


def encode_documents(documents: dict[str, list[str]], tokenizer: GPT2Tokenizer) -> dict[str, list[list[int]]]:
    """Ids of each document's text, the end-of-text token last."""
    return {"ids": [[*tokenizer.encode_ordinary(text), tokenizer.eot] for text in documents["text"]]}


def load_documents(source: Path | None, num_proc: int):
    """The documents as a datasets.Dataset with a column "text": of a local JSON Lines file, or of the hub's."""
    try:
        import datasets
    except ImportError:
        raise UserError("OpenWebText is read with the `datasets` package: pip install datasets") from None
    try:
        if source is not None:
            documents = datasets.load_dataset("json", data_files=str(source), split="train")
        else:
            documents = datasets.load_dataset(HUB_NAME, split="train", num_proc=num_proc)
    except Exception as error:  # the network, the hub, the cache, the disk: each has its own kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load {source or HUB_NAME} ({type(error).__name__}: {reason}): pass --input=FILE.jsonl, "
            'one {"text": ...} a line, or see to the network or an older `datasets`'
        ) from error
    if "text" not in documents.column_names or len(documents) < 2:
        raise UserError(f'{source or HUB_NAME} should hold at least two documents, one {{"text": ...}} a line')
    return documents


def shards_of(encoded, name: str) -> Iterator:
    """The ids of DOCUMENTS_A_SHARD documents after another as one array each, with a progress bar."""
    import numpy as np
    from tqdm import tqdm

    shards = encoded.with_format("numpy").iter(batch_size=DOCUMENTS_A_SHARD)
    for shard in tqdm(shards, desc=name, total=math.ceil(len(encoded) / DOCUMENTS_A_SHARD)):
        yield np.concatenate(list(shard["ids"]))


def parse_options() -> Namespace:
    parser = options_parser("Prepare OpenWebText in GPT-2's tokens.", __file__)
    parser.add_argument("--input", type=a_path, metavar="FILE", help='take documents from JSON Lines, {"text": ...} each')
    half = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--num_proc", type=int, default=half, help="processes that encode (default: %(default)s)")
    options = parser.parse_args()
    if options.num_proc < 1:
        raise UserError(f"--num_proc={options.num_proc}: at least one process is needed")
    return options


def main(options: Namespace) -> None:
    documents = load_documents(options.input, options.num_proc)

    import datasets

    tokenizer = GPT2Tokenizer()
    encoded = documents.map(
        partial(encode_documents, tokenizer=tokenizer),
        batched=True,
        remove_columns=documents.column_names,
        features=datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"))}),  # a quarter of int64's cache
        num_proc=options.num_proc if options.num_proc > 1 else None,
        desc="encoding",
    )
    splits = encoded.train_test_split(test_size=VAL_FRACTION, seed=SPLIT_SEED)
    with new_dataset(options.out, tokenizer) as (train, val):
        for writer, split in ((train, "train"), (val, "test")):
            for ids in shards_of(splits[split], split):
                writer.append(ids)
    print(f"{options.out}: {len(documents):,} documents; train {train.count:,} tokens, val {val.count:,} tokens")


if __name__ == "__main__":
    sys.exit(run(lambda: (main, parse_options())))

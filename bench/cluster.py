"""Which of tp, pp and dp trains a model fastest on a cluster, by the cost model (plan/cost.py)."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from math import gcd
from operator import itemgetter
from typing import Any

from base.errors import UserError
from bench.rounds import table
from cli.options import BenchPredictOptions as Options
from model import GPTConfig
from parallel.loss import chunk_rows
from plan.cost import Hardware, Step
from plan.link import Cluster, Link
from plan.partition import Partition
from plan.schedule import Schedule
from plan.stages import Stages
from train.setup import Rows

SHOWN = 8  # layouts in a table
FLAGS = {"seq": "sequence_parallel", "ckpt": "activation_checkpointing", "shard": "dp_shard"}
WORDS = ", ".join(f"{word}: --{flag}" for word, flag in FLAGS.items())

Layout = dict[str, Any]  # tp, pp, dp, options (of FLAGS), rows, micro_batches, and its figures


def cluster_of(hardware: Hardware, options: Options) -> Hardware:
    """A profile whose ranks stand in several nodes. UserError for an unknown link."""
    link, between = hardware.link, Link.parse(options.between, "between")
    both = Cluster(link.alpha, link.beta, link.one_shot, options.nproc_per_node, between)
    return replace(hardware, link=both)


def steps(config: GPTConfig, tp: int, pp: int, dp: int, options: Options) -> Iterator[Step]:
    """The layout with each set of FLAGS. UserError if the model or the rows cannot be dealt so."""
    split = Partition.of(replace(config, block_size=options.tokens), tp)
    rows = Rows.of(options, 0, dp)
    Stages.over(config, pp).check_micro_batches(rows.micro_steps)
    plain, width = Schedule.plain(config.n_layer), 4 if options.dtype == "float32" else 2
    logit_rows = chunk_rows(rows.micro_rows * options.tokens, split.local_vocab, "cuda")
    within = options.nproc_per_node
    own = dp  # dp ranks of a group: with local steps those of a node
    if options.dp_every:
        own = gcd(dp, within // (tp * pp)) if within % (tp * pp) == 0 else 1
    local = options.dp_every if dp > own else 0
    for sequence, again, shard in product((False, True), repeat=3):
        if sequence <= (1 < tp <= options.tokens) and shard <= (own > 1):
            yield Step(
                split, plain, "train", rows.micro_rows, options.tokens, width=width,
                sequence_parallel=sequence, logit_rows=logit_rows, micro_batches=rows.micro_steps,
                activation_checkpointing=again, pp=pp, dp=dp, dp_shard=shard,
                dp_every=local, dp_groups=dp // own)


def layouts(config: GPTConfig, hardware: Hardware, options: Options) -> list[Layout]:
    """Each (tp, pp, dp): its fastest step that fits, or its smallest one. UserError for none."""
    found, fault, world = [], None, options.nnodes * options.nproc_per_node
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for tp, pp in product(sizes, repeat=2):
        if world % (tp * pp):
            continue
        try:
            ways = [figures(step, hardware) for step in steps(
                config, tp, pp, world // (tp * pp), options)]
        except UserError as error:
            fault = error
            continue
        fitting = [way for way in ways if way["fits"]]
        found.append(min(fitting, key=itemgetter("seconds")) if fitting
                     else min(ways, key=itemgetter("bytes")))
    if not found and fault:
        raise fault
    return sorted(found, key=lambda way: (not way["fits"], way["seconds"]))


def figures(step: Step, hardware: Hardware) -> Layout:
    size, seconds = step.capacity, step.seconds(hardware)
    given = step.split_tokens, step.activation_checkpointing, step.dp_shard
    return {"tp": step.split.tp, "pp": step.pp, "dp": step.dp, "dp_groups": step.dp_groups,
            "options": [word for word, on in zip(FLAGS, given, strict=True) if on],
            "rows": step.rows, "micro_batches": step.micro_batches, "bytes": size,
            "fits": not hardware.capacity or size <= hardware.capacity,
            "seconds": seconds.total, "parts": asdict(seconds)}


def answer(hardware: Hardware, name: str, config: GPTConfig,
           options: Options) -> tuple[dict[str, Any], list[str]]:
    """The report and the lines of one model on one cluster. UserError if it fits in no layout."""
    hardware = cluster_of(hardware, options)
    every = layouts(config, hardware, options)
    fitting = [way for way in every if way["fits"]]
    ranks = f"{options.nnodes} x {options.nproc_per_node} ranks"
    room = f"{hardware.name} ({1e-9 * hardware.capacity:.0f} GB a rank)"
    if not fitting:
        least = min(every, key=itemgetter("bytes"))
        raise UserError(
            f"--model={name} fits no layout of {ranks} of {room}. The one that takes least, "
            f"tp={least['tp']}, pp={least['pp']}, dp={least['dp']}, takes "
            f"{least['bytes'] / 1e9:.1f} GB. Use more nodes.")
    tokens = options.gradient_accumulation_steps * options.batch_size * options.tokens
    cells = [["tp", "pp", "dp", "options", "rows x steps", "GB", "ms", "tokens/s", "messages",
              "bubble", "waits for dp"]]
    for way in fitting[:SHOWN]:
        total, parts = way["seconds"], way["parts"]
        shares = (parts[part] / total for part in ("communication", "bubble", "replicas"))
        cells.append([*(str(way[axis]) for axis in ("tp", "pp", "dp")), " ".join(way["options"]),
                      f"{way['rows']} x {way['micro_batches']}", f"{way['bytes'] / 1e9:.1f}",
                      f"{1e3 * total:,.0f}", f"{tokens / total:,.0f}",
                      *(f"{share:.0%}" for share in shares)])
    best = fitting[0]
    flags = "".join(f" --{FLAGS[word]}=True" for word in best["options"])
    if best["dp_groups"] > 1:
        flags += f" --dp_every={options.dp_every} --dp_groups={best['dp_groups']}"
    lines = [
        f"{name} on {ranks} of {room}; between nodes {options.between}; {tokens:,} tokens an "
        f"iteration, {options.tokens:,} a sequence",
        *table(cells), f"({WORDS}; messages: over tp and from stage to stage)",
        f"Of {len(every)} layouts {len(fitting)} fit. Fastest: train_tp.py --tp={best['tp']} "
        f"--pp={best['pp']}{flags}", ""]
    return {"hardware": asdict(hardware), "model": name, "layouts": every}, lines

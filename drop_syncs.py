"""Find the sync points that can go, repair what their going breaks, and write shards that do without them.

    python drop_syncs.py group --init_from=SRC --ranks=2 --dataset=NAME --out=GROUPED
    torchrun --standalone --nproc_per_node=2 drop_syncs.py scan --init_from=GROUPED --dataset=NAME --scan=FILE.json --budget=1%
    torchrun --standalone --nproc_per_node=2 drop_syncs.py repair --init_from=GROUPED --dataset=NAME --sync=mlp --out=DIR

Perplexities are exact, of the dataset's validation split. What was made for one number of ranks is for that number only.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError
from base.files import check_target, new_directory, write_json
from checkpoints.convert import SHARD_FILES, place, write_shards
from checkpoints.manifest import Sync
from checkpoints.sources import Source, common_tokenizer, identity, open_source, reader
from cli.options import DropOptions, GroupOptions, RepairOptions, ScanOptions
from fewer_syncs.distillation import Lessons, repair_run, repair_whole, train_on
from fewer_syncs.grouping import Groups, Regrouped, damages, group
from fewer_syncs.scan import Measured, Perplexities, curve, parse_budget, sensitivities, within
from fewer_syncs.speed import check_length, decode_times
from inference.perplexity import measure
from model import GPT
from plan.partition import Partition
from plan.schedule import Schedule, SubBlock
from report import report
from text.dataset import Dataset
from text.tokenizer import TOKENIZER_FILE, Tokenizer
from tp_model import TensorParallelGPT
from train.checkpoint import export
from world.devices import pick_dtype
from world.entry import run_commands
from world.mesh import World


def opened(world: World, options: DropOptions) -> tuple[Source, Dataset, Tokenizer]:
    """The weights, the dataset and what their tokens are; UserError where these are not the same."""
    if world.is_main:
        report.check_place(options.report, "report")
    if not options.dataset:
        raise UserError("--dataset is required: the text that is measured and learned from (data/NAME/prepare.py makes one).")
    source = open_source(options.init_from, (world.rank, world.size))
    world.agree("weights", identity(source))
    dataset = Dataset(Path(options.data_dir) / options.dataset)
    tokenizer, notice = common_tokenizer(source, dataset, options.data_dir)
    dataset.check(source.config.block_size, source.config.vocab_size)
    if notice and world.is_main:
        print(notice, file=sys.stderr)
    return source, dataset, tokenizer


def validation(dataset: Dataset, options: DropOptions) -> Tensor:
    """The ids that perplexities are of, int64."""
    most = options.max_tokens or len(dataset.val)
    return torch.from_numpy(dataset.val[:most].astype("int64"))


def built(world: World, source: Source, options: DropOptions, schedule: Schedule) -> TensorParallelGPT:
    dtype = pick_dtype(options.dtype, world.device)
    read = reader(source, world.tp.rank)
    return TensorParallelGPT(source.config, world.tp, read, device=world.device, dtype=dtype, schedule=schedule).eval()


def needs_ranks(world: World, command: str) -> None:
    if world.tp.size == 1:
        raise UserError(
            f"drop_syncs.py {command} needs the ranks that the schedule is for: "
            f"torchrun --standalone --nproc_per_node=2 drop_syncs.py {command} ..."
        )


# --- group ----------------------------------------------------------------------------------------------------------


def group_heads(world: World, options: GroupOptions) -> None:
    """One process: it holds the whole model."""
    if world.size > 1:
        raise UserError("drop_syncs.py group is one process: start it with plain python. --ranks is what the groups are for.")
    out = place(options.out)
    check_target(out, options.force, SHARD_FILES)
    source, dataset, tokenizer = opened(world, options)
    split, config = Partition.of(source.config, options.ranks), source.config
    model = GPT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(source.read(name, None, ()))
    rows = max(1, min(options.tokens, len(dataset.train)) // config.block_size)
    ids = torch.from_numpy(dataset.train[: rows * config.block_size].astype("int64")).view(rows, -1)
    groups: Groups = {}
    layers: list[dict[str, Any]] = []
    print(f"{'layer':>5} {'damage as it is':>16} {'grouped':>10}   heads of each rank")
    for layer, G in enumerate(damages(model, ids)):
        heads, neurons, damage, before = group(G, split)
        groups[layer] = heads, neurons
        shares = " | ".join(",".join(map(str, heads[slice(*split.heads(rank))])) for rank in range(split.tp))
        layers.append({"layer": layer, "damage_as_it_is": before, "damage_grouped": damage, "heads_of_each_rank": shares})
        print(f"{layer:>5} {before:>16.4g} {damage / before if before else 1.0:>10.1%}   {shares}")
    grouped = Regrouped(source, groups)
    with new_directory(out, options.force, SHARD_FILES) as scratch:
        write_shards(grouped, split, source.dtype, scratch)
        write_json(scratch / TOKENIZER_FILE, tokenizer.to_json())
    print(f"{options.out}: {grouped.description} for tp={split.tp}. With all sync points it is the same model.")
    if options.report:
        figures = about(world, source, ids.flatten()) | {"ranks": split.tp, "layers": layers}
        report.write(options.report, {"entry": "drop_syncs", "what": "group", **figures})


# --- scan -----------------------------------------------------------------------------------------------------------


def scan(world: World, options: ScanOptions) -> None:
    needs_ranks(world, "scan")
    budget = parse_budget(options.budget) if options.budget else math.inf
    source, dataset, _ = opened(world, options)
    n_layer = source.config.n_layer
    check_length(options.decode_tokens, source.config.block_size)
    named = [Schedule.parse(text.strip(), n_layer) for text in options.schedules.split(";") if text.strip()]
    if world.is_main:
        report.check_place(options.scan, "scan")
    model = built(world, source, options, Schedule.plain(n_layer))
    # the names of files do not tell weights apart, some numbers of theirs do
    weights = f"{source.description} {sum(p.double().abs().sum().item() for p in model.parameters()):.9g}"
    tokens = validation(dataset, options)
    known = Perplexities(world, model, tokens, options.scan, options.batch_size, world.gather(weights)[0])
    plain = known.measured(Schedule.plain(n_layer))
    single = sensitivities(known, n_layer)
    steps = list(curve(known, n_layer, options.search == "greedy", budget))
    others = [known.measured(schedule) for schedule in named]
    known.bar.close()
    chosen = within([*steps, *others, *(made for _, made in single)], budget) if options.budget else None
    times: dict[str, dict[str, Any]] = {}
    if options.decode_tokens:
        timed = [made.schedule for made in (plain, *steps, *others, *([chosen] if chosen else []))]
        times = decode_times(world, model, timed, tokens.tolist(), options.decode_tokens)
    if not world.is_main:
        return
    print(f"{source.description}, tp {world.tp.size}, {len(tokens):,} tokens: perplexity {plain.perplexity:.4f}")
    print("one sync point dropped: " + ", ".join(f"{name} {made.loss:+.2%}" for name, made in single))
    print(table([plain, *steps, *others], times))
    if chosen is not None:
        print(f"within {options.budget}: --sync={chosen.schedule} ({chosen.schedule.points} sync points, {chosen.loss:+.3%})")
    if options.report:

        def known_of(made: Measured) -> dict[str, Any]:
            return made.as_json() | times.get(str(made.schedule), {})

        figures = {
            "plain": known_of(plain),
            "single": {name: made.as_json() for name, made in single},
            "curve": [known_of(made) for made in steps],
            "others": [known_of(made) for made in others],
            "chosen": chosen and known_of(chosen),
        }
        report.write(options.report, {"entry": "drop_syncs", "what": "scan", **about(world, source, tokens), **figures})


def table(rows: list[Measured], times: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'sync points':>11} {'perplexity':>11} {'loss':>9}{'  ms a token' if times else ''}   schedule"]
    for r in rows:
        ms = f"{times[str(r.schedule)]['ms_per_token']['median']:>12.3f}" if times else ""
        lines.append(f"{r.schedule.points:>11} {r.perplexity:>11.4f} {r.loss:>+9.2%}{ms}   {r.schedule}")
    return "\n".join(lines)


def about(world: World, source: Source, tokens: Tensor) -> dict[str, Any]:
    sizes = {"world_size": world.size, "tp": world.tp.size, "comm": world.comm, "device": world.device.type}
    return {"source": source.description, **sizes, "tokens": len(tokens), "model": asdict(source.config)}


# --- repair ---------------------------------------------------------------------------------------------------------


def repair(world: World, options: RepairOptions) -> None:
    needs_ranks(world, "repair")
    out = place(options.out)
    if world.is_main:
        check_target(out, options.force, SHARD_FILES)
    source, dataset, tokenizer = opened(world, options)
    schedule, tp = Schedule.parse(options.sync, source.config.n_layer), world.tp.size
    if schedule.is_plain:
        raise UserError("--sync=all drops no sync point: there is nothing to repair.")
    teacher = built(world, source, options, Schedule.plain(source.config.n_layer)).requires_grad_(False)
    student, tokens = built(world, source, options, schedule), validation(dataset, options)

    def perplexity(model: TensorParallelGPT) -> float:
        total, count = measure(model, tokens, model.config.block_size, options.batch_size)
        return math.exp(min(total / count, 700))

    def say(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    dense = perplexity(teacher)
    evidence: dict[str, Any] = {"tokens": len(tokens), "dense": dense, "runs": []}
    evidence["before"] = perplexity(student)
    say(f"perplexity {dense:.4f} with all sync points, {evidence['before']:.4f} ({evidence['before'] / dense - 1:+.2%}) with "
        f"{schedule.points} of {2 * source.config.n_layer} (--sync={schedule}) before repair")  # fmt: skip
    lessons = Lessons(dataset.train, options.batch_size, options.steps, options.learning_rate, options.seed, 0)
    runs, before = schedule.runs(), list[SubBlock]()
    for i, run in enumerate(runs if options.steps else []):
        if len(run) > 1:
            first, last = repair_run(student, teacher, before, run, replace(lessons, stream=100 + i))
            evidence["runs"].append({"run": [f"{layer}{kind[0]}" for layer, kind in run], "error": [first, last]})
            say(f"run {run[0][0]}{run[0][1][0]} to {run[-1][0]}{run[-1][1][0]}: mean squared error {first:.3g} -> {last:.3g}")
        before = before + run
    if options.steps:
        evidence["by_run"] = {"steps": options.steps, "learning_rate": options.learning_rate, "perplexity": perplexity(student)}
        made = evidence["by_run"]["perplexity"]
        say(f"after {options.steps} steps a run: perplexity {made:.4f} ({made / dense - 1:+.2%})")
    if options.whole_steps:
        whole = replace(lessons, steps=options.whole_steps, learning_rate=options.whole_learning_rate, stream=99)
        first, last = repair_whole(student, teacher, whole)
        made = perplexity(student)
        evidence["whole"] = {"steps": whole.steps, "learning_rate": whole.learning_rate, "divergence": [first, last]}
        evidence["whole"]["perplexity"] = made
        say(f"after {whole.steps} steps end to end: divergence {first:.3g} -> {last:.3g}, perplexity {made:.4f} "
            f"({made / dense - 1:+.2%})")  # fmt: skip
    evidence["after"] = perplexity(student)
    if not math.isfinite(evidence["after"]):
        raise UserError("the repaired weights are not numbers any more: lower --learning_rate or --whole_learning_rate.")
    evidence["loss"] = evidence["after"] / dense - 1
    description = f"{source.description}, repaired for --sync={schedule}"
    export(world, student, out, description, tokenizer.to_json(), Sync(str(schedule), tp, evidence))
    say(f"{options.out}: {schedule.points} sync points, {evidence['loss']:+.2%}")
    if options.control:
        steps, rate = max(options.steps, options.whole_steps), options.whole_learning_rate
        teacher.requires_grad_(True)
        train_on(teacher, replace(lessons, steps=steps, learning_rate=rate, stream=99))
        evidence["control"] = perplexity(teacher)
        say(f"control: the dense model after {steps} more steps on the text: {evidence['control']:.4f} "
            f"({evidence['control'] / dense - 1:+.2%}); the repaired one is {evidence['after'] / evidence['control'] - 1:+.2%} "
            f"beside it")  # fmt: skip
    if world.is_main and options.report:
        figures = {"sync": str(schedule), "points": schedule.points, "evidence": evidence}
        report.write(options.report, {"entry": "drop_syncs", "what": "repair", **about(world, source, tokens), **figures})


COMMANDS: dict[str, tuple[type[Any], Callable[[World, Any], None]]] = {
    "group": (GroupOptions, group_heads),
    "scan": (ScanOptions, scan),
    "repair": (RepairOptions, repair),
}

if __name__ == "__main__":
    run_commands(COMMANDS, "drop_syncs.py")

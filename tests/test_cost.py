"""The cost model: against closed formulas, in its limits, and what it says is said against the account of real ranks."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_bench_tp import run
from test_sample_tp import alone

from base.errors import UserError
from bench.predict import PROFILES, SHAPES, pays_from
from bench.strategies import Case, formula
from cli.options import BenchPredictOptions
from inference.generation import generate
from inference.sampling import Sampling
from model import GPTConfig
from parallel.ledger import Account
from parallel.loss import chunk_rows
from plan.cost import BUCKET, OPTIMIZER, TIED, Hardware, Seconds, Step
from plan.link import Cluster, Link, ring_bytes
from plan.partition import Partition
from plan.schedule import Schedule
from tp_model import TensorParallelGPT
from train import gradients
from world.mesh import World

CONFIG = GPTConfig(block_size=16, vocab_size=131, n_layer=3, n_head=6, n_embd=24)
MACHINE = Hardware("a machine", memory=1e9, peak=1e11, overhead=1e-5, link=Link(1e-5, 1e-9))


def step(mode: str = "decode", tp: int = 2, sync: str = "all", config: GPTConfig = CONFIG, **more: Any) -> Step:
    split = Partition.of(config, tp)
    more = {"tokens": 1 if mode == "decode" else 8, "logit_rows": 16} | more
    return Step(split, Schedule.parse(sync, config.n_layer), mode, **more)


# --- messages -------------------------------------------------------------------------------------------------------


def test_a_collective_is_the_fastest_of_its_algorithms() -> None:
    a, b, m = 3e-6, 1e-9, 10**6
    ring = [2 * (n - 1) * a + ring_bytes(m, n) * b for n in (2, 4, 8)]
    assert [Link(a, b).seconds("all_reduce", m, n) for n in (2, 4, 8)] == pytest.approx(ring)  # long: the ring
    assert Link(a, b).seconds("all_reduce", 8, 8) == pytest.approx(6 * (a + 8 * b))  # short: a tree, 2 log2 N rounds
    assert Link(a, b, one_shot=True).seconds("all_reduce", 8, 8) == pytest.approx(2 * a + 7 * 8 * b)  # two rounds
    assert Link(a, b, one_shot=True).seconds("all_reduce", m, 8) == pytest.approx(ring[2])
    assert Link(a, b).seconds("all_gather", m, 4) == pytest.approx(ring[1] / 2)
    assert Link(a, b).seconds("broadcast", m, 5) == pytest.approx(3 * (a + m * b))
    assert all(Link(a, b).seconds(op, m, 1) == 0 for op in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"))


def counted(messages: Any) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(calls, bytes) by block, direction and op."""
    calls, told = Counter[Any](), Counter[Any]()
    for message in messages:
        calls[message[:3]] += 1
        told[message[:3]] += message.nbytes
    return {key: (calls[key], told[key]) for key in calls}


def accounted(account: Account) -> dict[tuple[str, str, str], tuple[int, int]]:
    calls, told = Counter[Any](), Counter[Any]()
    for entry, tally in account.items():
        key = entry.block, entry.direction, entry.op
        calls[key] += tally.calls
        told[key] += tally.bytes
    return {key: (calls[key], told[key]) for key in calls}


def _accounts(world: World, sync: str, sequence_parallel: bool, again: bool) -> list[Any]:
    """What real ranks tell the ledger: reading a prompt of 7, a decode step of 2 rows, and a training step of 2 x 16."""
    schedule = Schedule.parse(sync, CONFIG.n_layer)
    make = partial(TensorParallelGPT, CONFIG, world.tp, schedule=schedule, sequence_parallel=sequence_parallel,
                   activation_checkpointing=again)
    model, found = make(), []
    for prompts, n in (([[1, 2, 3, 4, 5, 6, 7]], 1), ([[1, 2, 3], [4, 5, 6]], 1), ([[1, 2, 3], [4, 5, 6]], 2)):
        before = world.ledger.snapshot()
        with torch.no_grad():
            generate(model, prompts, Sampling(n_tokens=131, temperature=0, max_new_tokens=n))
        found.append(accounted(world.ledger.since(before)))
    both, one = found[2], found[1]
    more = {key: tuple(b - a for a, b in zip(one.get(key, (0, 0)), value, strict=True)) for key, value in both.items()}
    decode = {key: value for key, value in more.items() if value[0]}
    before = world.ledger.snapshot()
    tokens, model = torch.arange(32).view(2, 16), make()  # the other one has no weights to learn, if they are packed
    loss = model(tokens, tokens)[1]
    assert loss is not None
    loss.backward()
    gradients.sum_partial_gradients(model)
    gradients.grad_norm(model)
    return [found[0], decode, accounted(world.ledger.since(before))]


@pytest.mark.parametrize(
    "tp, sync, sequence, again",
    [
        (2, "all", False, False), (3, "mlp", False, False), (2, "every:2", False, False), (2, "0a,1m", False, False),
        (3, "all", True, False), (2, "all", False, True), (2, "all", True, True),
    ],
)
def test_what_is_said_is_what_ranks_tell_the_ledger(tp: int, sync: str, sequence: bool, again: bool) -> None:
    prefill, decode, train = run_ranks(tp, _accounts, sync, sequence, again)[0]
    rows = chunk_rows(32, Partition.of(CONFIG, tp).local_vocab, "cpu")
    said = [
        step("prefill", tp, sync, tokens=7, sequence_parallel=sequence),
        step("decode", tp, sync, rows=2, past=3, sequence_parallel=sequence),
        step("train", tp, sync, rows=2, tokens=16, logit_rows=rows, sequence_parallel=sequence, activation_checkpointing=again),
    ]
    # what a second token adds to a first is one decode step, which is never split over its one token
    assert [counted(each.messages()) for each in said] == [prefill, decode, train]


@pytest.mark.parametrize(
    "strategy, sync, sequence", [("megatron", "all", False), ("sequence", "all", True), ("spd", "mlp", False)]
)
@pytest.mark.parametrize("tp", [2, 3])
def test_a_layer_says_what_the_laboratory_says_of_it(strategy: str, sync: str, sequence: bool, tp: int) -> None:
    config = replace(CONFIG, n_layer=1)
    case = Case.draw("layer", config, batch=2)
    one = step("train", tp, sync, config, rows=2, tokens=16, sequence_parallel=sequence)
    said = Counter[Any]()
    for message in one.messages():
        if message.block in ("attention", "mlp"):
            said[message.direction, message.op] += message.nbytes
    wanted = {key: told for key, (_, told) in formula(case, strategy, tp).items() if key[0] != "step"}
    assert said == wanted


# --- time -----------------------------------------------------------------------------------------------------------


def test_a_decode_step_by_hand() -> None:
    """2 ranks, 3 layers 24 wide, 131 tokens: everything written out."""
    C, half, layers = 24, 12, 3
    weights = 4 * (layers * (C * 3 * half + half * C + 2 * C * 4 * half) + 128 * C)  # the table in rows of 64
    cache = layers * 2 * (5 + 1) * half * 4
    reduce = 2 * 1e-5 + C * 4 * 1e-9  # over two ranks: 2 alpha + m beta
    sampling = 1e-5 + 16 / 2 * 1e-9 + 1e-5 + 16 * 1e-9  # all-gather of a candidate each, broadcast of the choice
    found = step(past=5).seconds(MACHINE)
    assert found.weights == pytest.approx(weights / 1e9) and found.attention == pytest.approx(cache / 1e9)
    assert found.communication == pytest.approx((2 * layers + 1) * reduce + sampling)
    assert found.overhead == pytest.approx((2 * layers + 1) * 1e-5) and found.compute == found.elementwise == 0
    assert found.total == pytest.approx(sum((found.weights, found.attention, found.communication, found.overhead)))
    assert found.share == found.communication / found.total


def test_a_prompt_waits_for_arithmetic_and_a_step_for_the_memory() -> None:
    """The ridge of the roofline: 2 n flop a weight of 4 bytes, 100 flop a byte."""
    few, many = (step("prefill", 1, tokens=n).product(1000, n, MACHINE) for n in (199, 201))
    assert few.compute == 0 < few.weights and many.weights == 0 < many.compute
    assert step("train", 1).product(1000, 199, MACHINE).weights == pytest.approx(3 * few.weights)
    assert few.weights == pytest.approx(4000 / 1e9) and many.compute == pytest.approx(2 * 201 * 1000 / 1e11)


def test_training_is_three_products_and_the_optimizer() -> None:
    big = replace(MACHINE, overhead=0.0, link=Link(0.0, 0.0), touch=1e-30)
    config = replace(CONFIG, n_embd=96)
    reading, training = (step(mode, 1, config=config, rows=200).seconds(big) for mode in ("prefill", "train"))
    head = 2 * 200 * 192 * 96 / 1e11  # a prompt's head is of the last tokens only
    assert training.compute == pytest.approx(3 * (reading.compute + (200 * 8 - 200) * 2 * 192 * 96 / 1e11), rel=0.01), head
    split = Partition.of(config, 1)
    numbers = sum(torch.Size(shape).numel() for shape in split.local_shapes(0).values())
    assert training.weights == pytest.approx((OPTIMIZER * numbers + TIED * 192 * 96) / 1e9)


def test_two_levels_of_links_by_hand() -> None:
    """2 nodes of 4 ranks. tp 8 shares out its message within nodes; the 4 pairs between them share the node's link."""
    a, b, m = 1e-6, 1e-10, 4e6
    both = Cluster(a, b, ranks=4, between=Link(5e-6, 1e-8))
    within = 2 * (3 * a + 3 / 4 * m * b)  # a reduce-scatter and an all-gather of 4
    assert both.seconds("all_reduce", m, 8) == pytest.approx(within + 2 * 5e-6 + m / 4 * 4 * 1e-8)
    assert both.seconds("all_gather", m, 8) == pytest.approx(within / 2 + 5e-6 + m / 4 / 2 * 4 * 1e-8)
    assert both.seconds("all_reduce", m, 4) == Link(a, b).seconds("all_reduce", m, 4)  # tp 4 stays in a node
    assert both.seconds("all_reduce", m, 2, 4) == pytest.approx(2 * 5e-6 + m * 4 * 1e-8)  # dp 2 over it: 4 pairs cross
    assert both.seconds("all_reduce", m, 2, 2) == Link(a, b).seconds("all_reduce", m, 2)  # dp 2 over tp 2: in a node
    assert both.seconds("broadcast", m, 2, 4, 4) == pytest.approx(5e-6 + m * 4 * 1e-8)  # 4 tp ranks send to the next stage
    assert both.seconds("broadcast", m, 2, 8, 8) == pytest.approx(5e-6 + m * 4 * 1e-8)  # of 8, 4 are in a node


def test_what_dp_waits_for_by_hand() -> None:
    """Gradients overlap the last backward pass, parameters all passes; with stages nothing hides them."""
    wide = replace(CONFIG, n_embd=384)
    numbers = sum(torch.Size(shape).numel() for shape in Partition.of(wide, 1).local_shapes(0).values())
    assert BUCKET / 2 < 4 * numbers <= BUCKET
    sums, parts = (MACHINE.link.seconds(op, 4 * numbers, 3) for op in ("all_reduce", "all_gather"))

    def waits(speed: float, config: GPTConfig, **more: Any) -> float:
        machine = replace(MACHINE, peak=speed * 1e11, memory=speed * 1e9)
        return step("train", 1, config=config, micro_batches=2, **({"dp": 3} | more)).seconds(machine).replicas

    assert waits(1, wide, dp=1) == 0
    assert waits(1, wide) == pytest.approx(sums)  # one bucket: it is complete when the pass ends
    assert waits(1, wide, dp_every=7, dp_groups=3) == pytest.approx(sums / 7)
    near = waits(1, wide, dp=2)
    assert near > 0 and waits(1, wide, dp=6, dp_every=7, dp_groups=3) == pytest.approx(near + sums / 7)
    # gathered for 2 x 2 passes and scattered once
    assert waits(1e9, wide, dp_shard=True) == pytest.approx(5 * parts, rel=1e-3)
    assert waits(1e-3, wide, dp_shard=True) == pytest.approx(5 * parts)
    two = replace(wide, n_layer=6)
    assert waits(1e9, two) == pytest.approx(2 * waits(1e-3, two), rel=0.01)  # of two buckets a pass hides one
    assert waits(1e-3, two, pp=2) == pytest.approx(waits(1e9, two, pp=2))


@pytest.mark.parametrize("pp", [2, 4])
def test_a_pipeline_of_like_stages_by_hand(pp: int) -> None:
    """Stages of 2 layers: a micro-batch takes as long as in a model of 2, and its messages. The last stage, which has the
    head, is the slowest; the first micro-batch goes through the others, and the last one back."""

    def seconds(n_layer: int, **more: Any) -> float:
        return step("train", 1, config=replace(CONFIG, n_layer=n_layer), rows=2, **more).seconds(MACHINE).total

    alone, further = seconds(2, micro_batches=4), seconds(2, micro_batches=5)
    message = 2 * (1e-5 + 4 * 2 * 8 * 24 * 1e-9)  # rows x tokens x width, in 4 bytes, there and back
    table = MACHINE.link.seconds("all_reduce", 4 * 192 * 24, 2)
    passes, once = further - alone, alone - 4 * (further - alone)
    layers = seconds(4, micro_batches=5) - seconds(4, micro_batches=4) - passes
    for m in (4, 8):
        whole = seconds(2 * pp, micro_batches=m, pp=pp)
        assert whole == pytest.approx(once + table + m * (passes + message) + (pp - 1) * (layers + message))


def test_a_pipeline_takes_its_rank_with_most_memory() -> None:
    config = replace(CONFIG, n_layer=8, n_embd=96)
    one, two = (step("train", 2, config=config, micro_batches=4, pp=pp).capacity for pp in (1, 2))
    assert one / 2 < two < one


def test_attention_multiplies_or_reads_what_is_before_a_token() -> None:
    """4 flop for each pair of tokens and channel; in training 3.5 times: the scores again, and four products more."""
    reading = step("prefill", 1, tokens=9, past=40).attention(MACHINE)
    assert reading.attention == pytest.approx(2 * 49 * 24 * 4 / 1e9)  # 49 keys and values
    quick = replace(MACHINE, memory=1e15)
    flops = 4 * 9 * (40 + 5) * 24
    assert step("prefill", 1, tokens=9, past=40).attention(quick).attention == pytest.approx(flops / 1e11)
    assert step("train", 1, tokens=9, past=40).attention(quick).attention == pytest.approx(3.5 * flops / 1e11)
    slow = step("prefill", 1, tokens=9, past=40).attention(replace(quick, attend=1e10))
    assert slow.attention == pytest.approx(flops / 1e10)


def test_int8_reads_a_quarter_until_widening_is_slower() -> None:
    wide, narrow = step(past=5).seconds(MACHINE), step(past=5, int8=True).seconds(MACHINE)
    assert narrow.weights == pytest.approx(wide.weights / 4) and narrow.communication == wide.communication
    slow = step(past=5, int8=True).seconds(replace(MACHINE, widening=1e8))
    assert slow.weights == pytest.approx(10 * narrow.weights)


def test_limits_and_monotony() -> None:
    free = replace(MACHINE, link=Link(0.0, 0.0))
    for mode in ("decode", "prefill", "train"):
        assert step(mode).seconds(free).communication == 0 < step(mode).seconds(MACHINE).communication
        assert not list(step(mode, tp=1).messages()) and step(mode, tp=1).seconds(MACHINE).communication == 0
        totals = [step(mode, tp).seconds(free).total for tp in (1, 2, 3, 6)]
        assert totals == sorted(totals, reverse=True)  # nothing to pay: more ranks are never slower
        said = [step(mode, 2, sync).seconds(MACHINE).communication for sync in ("all", "mlp", "every:3")]
        assert said == sorted(said, reverse=True) and said[0] > said[2]
        slow = replace(MACHINE, link=Link(1e-3, 1e-9))
        late = [step(mode, 2, sync).seconds(slow).communication for sync in ("all", "delay:1", "delay:2")]
        assert late[0] > late[1] > late[2] > 0  # a longer delay hides more
        better: list[dict[str, Any]] = [{"memory": 2e9}, {"peak": 1e12}, {"link": Link(1e-6, 1e-10)}, {"overhead": 0.0}]
        for change in better:
            assert step(mode).seconds(replace(MACHINE, **change)).total <= step(mode).seconds(MACHINE).total
    assert step(past=500).seconds(MACHINE).attention > step(past=5).seconds(MACHINE).attention


# --- elsewhere ------------------------------------------------------------------------------------------------------


def test_gpt_fast_on_a100s() -> None:
    """Llama-2-7B in bfloat16, batch 1, tokens/s on 1, 2, 4 and 8 A100s as gpt-fast's README has it. The overhead of the profile
    was taken from the first; the others are predictions. A Llama's layer has 12.05 C^2 weights, a GPT's 12."""
    config = GPTConfig(1024, 32000, 32, 32, 4096)
    published = {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43}
    for tp, rate in published.items():
        one = Step(Partition.of(config, tp), Schedule.plain(32), "decode", past=100, width=2)
        assert 1 / one.seconds(PROFILES["a100-nvlink"]).total == pytest.approx(rate, rel=0.1), tp


def ask(*words: str) -> str:
    return run(alone(), "predict", *words)


def test_the_answer_for_gpus(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = ["--hardware=h100-nvlink,h100-ethernet", "--model=gpt2,13b-like", "--mode=decode,train", f"--report={path}"]
    said = ask(*words, "--tp=1,2,8")
    assert "predictions: nothing was measured" in said
    made = json.loads(path.read_text())["predictions"]
    fast, slow = ({line["model"]: line for line in found["lines"]} for found in made[:2])
    assert fast["gpt2"]["best"]["tp"] == 1 and fast["13b-like"]["best"]["tp"] == 8  # small models are faster on one device
    assert slow["13b-like"]["best"]["tp"] == 1 < slow["13b-like"]["fewer"]["speedup"]
    assert fast["13b-like"]["base_tp"] == 1 and made[2]["lines"][1]["base_tp"] == 8  # to train, 13B want 8 x 80 GB
    # at the break-even latency two ranks are as fast as one device
    limit = 1e-6 * fast["13b-like"]["alpha_limit_us"]["2"]
    even = replace(PROFILES["h100-nvlink"], link=replace(PROFILES["h100-nvlink"].link, alpha=limit))
    config = GPTConfig(513, 50257, 40, 40, 5120)
    one, two = (Step(Partition.of(config, tp), Schedule.plain(40), "decode", past=512, width=2) for tp in (1, 2))
    assert two.seconds(even).total == pytest.approx(one.seconds(even).total)
    # and below the size from which it pays it does not
    smallest = pays_from(PROFILES["h100-nvlink"], 2, "decode", BenchPredictOptions(hardware="all"))
    assert smallest is not None and smallest.n_embd > 768 and made[0]["pays_from"]["2"]["n_embd"] == smallest.n_embd


def test_a_machine_of_ones_own() -> None:
    words = ["--alpha_us=10", "--link_GBps=50", "--memory_GBps=1000", "--peak_tflops=100", "--memory_GB=16"]
    said = ask("--hardware=custom", "--model=gpt2,7b-like", *words)
    assert "custom, decode" in said and "an all-reduce of 2 ranks 20 us, 50 GB/s" in said
    assert "an all-reduce of 2 ranks 20 us" in ask("--hardware=a100-nvlink", "--alpha_us=10", "--model=gpt2")


def of_cluster(path: Path, *words: str) -> list[dict[str, Any]]:
    """The layouts of a cluster, best first."""
    ask("--hardware=h100-nvlink", "--gradient_accumulation_steps=64", "--tokens=1024", f"--report={path}", *words)
    found = json.loads(path.read_text())["predictions"][0]["layouts"]
    assert all(way["seconds"] == pytest.approx(sum(way["parts"].values())) for way in found)
    ways = [(way["tp"], way["pp"], way["dp"]) for way in found]
    assert len({*ways}) == len(ways) and {prod(way) for way in ways} == {16}
    assert found[0]["seconds"] == min(way["seconds"] for way in found if way["fits"])
    return found


def test_the_links_of_a_cluster_decide_how_a_model_is_cut(tmp_path: Path) -> None:
    words = ["--model=gpt2-xl", "--nnodes=2", "--nproc_per_node=8"]
    slow, quick = ([f"--between=alpha_us:{alpha},GBps:{rate}"] for alpha, rate in ((50, 0.1), (1, 5000)))
    near, far, local = (of_cluster(tmp_path / "r.json", *words, *more) for more in (quick, slow, [*slow, "--dp_every=100"]))
    assert near[0]["dp"] > 1 == far[0]["dp"] and far[0]["pp"] > 1  # stages send least
    assert near[-1]["tp"] == far[-1]["tp"] == 16  # then the sums of every layer cross
    assert local[0]["dp"] > 1 and local[0]["seconds"] < far[0]["seconds"]
    waits, hundredth = ({(way["tp"], way["pp"]): way["parts"]["replicas"] for way in found} for found in (far, local))
    assert waits[1, 1] / 100 < hundredth[1, 1] < waits[1, 1] / 90  # and what remains within a node


def test_a_model_that_wants_all_of_a_cluster() -> None:
    said = ask("--hardware=rtx4090-pcie", "--model=7b-like", "--nnodes=4", "--nproc_per_node=2", "--between=ethernet-10g",
               "--gradient_accumulation_steps=32")
    assert "Of 10 layouts" in said and "Fastest: train_tp.py --tp=" in said


def test_what_does_not_fit_one_is_said_of_it() -> None:
    said = ask("--hardware=rtx4090-pcie,h100-nvlink", "--model=65b-like")
    assert "no room: at least" not in said and "65b-like" in said  # 8 x 24 GB hold it
    assert "no room: at least" in ask("--hardware=rtx4090-pcie,h100-nvlink", "--model=175b-like")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--hardware=h100-nvlnk"], "--hardware=h100-nvlnk is not one of h100-nvlink, a100-nvlink, a100-pcie, rtx4090-pcie, "
         "h100-roce, h100-ethernet, custom. Did you mean h100-nvlink?"),
        (["--hardware=all", "--model=gpt-2"], f"--model=gpt-2 is not one of {', '.join(SHAPES)}, custom. Did you mean gpt2?"),
        (["--hardware=all", "--mode=decoding"], "--mode=decoding is not one of decode, prefill, train. Did you mean decode?"),
        (["--hardware=all", "--tp=2,x"], "--tp=2,x are not sizes with commas between."),
        (["--hardware=all", "--tp=0,2"], "--tp=0,2: sizes are 1 to 8"),
        (["--hardware=all", "--tp=1,16"], "--tp=1,16: sizes are 1 to 8"),
        (["--hardware=custom", "--alpha_us=3"],
         "--hardware=custom needs --link_GBps, --memory_GBps, --peak_tflops, --memory_GB as well."),
        (["--hardware=rtx4090-pcie", "--model=65b-like", "--tp=1,2,4"],
         "--model=65b-like does not fit rtx4090-pcie (24 GB): the layout that takes least, tp=4, all, takes 32.8 GB a rank. "
         "What would do: --tp=6."),
        (["--hardware=rtx4090-pcie", "--model=175b-like"], "What would do: --memory_GB=44 at tp=8."),
        (["--hardware=all", "--model=custom", "--n_head=3", "--n_embd=24", "--tp=4"], "tp=4 is more than n_head=3"),
        (["--hardware=all", "--model=custom", "--n_head=5"], "n_embd=768 does not divide into n_head=5 heads"),
        (["--hardware=all", "--model=custom", "--n_layer=0"], "n_layer"),
        (["--hardware=h100-nvlink", "--model=175b-like", "--nnodes=1", "--gradient_accumulation_steps=8"],
         "--model=175b-like fits no layout of 1 x 8 ranks of h100-nvlink (80 GB a rank)"),
        (["--hardware=all", "--nnodes=2", "--between=ethernet"], "--between='ethernet': use alpha_us:200,GBps:1, or one of"),
        (["--hardware=all", "--nnodes=2", "--quantize=int8"], "--quantize together with --nnodes, which is about training"),
        (["--hardware=all", "--dp_every=30"], "--dp_every needs --nnodes"),
        (["--hardware=all", "--nnodes=13", "--nproc_per_node=1", "--gradient_accumulation_steps=5"],
         "tp=13 is more than n_head=12"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_seconds_add_up_field_by_field() -> None:
    assert Seconds(weights=1.0, communication=2.0) + Seconds(weights=3.0) == Seconds(weights=4.0, communication=2.0)

"""The page of a report: whole, self-contained, true to any report, and legible in a browser."""

import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import test_drop_syncs
import test_sample_tp
import test_training
from browser import Browser, chromium
from ranks import run_ranks

import bench_tp
import drop_syncs
import eval_tp
import sample_tp
import train_tp
from base.errors import UserError
from base.numbers import nbytes, seconds
from cli.grammar import parse
from cli.options import EvalOptions, SampleOptions, TrainOptions
from report.diagram import Message
from report.page import STYLE, headline, page, record
from report.report import read, write
from report.sections import SECTIONS, picture
from train import directory, dry_run
from world.mesh import World

letters, home, unknown = test_training.letters, test_drop_syncs.home, test_sample_tp.unknown
RESULTS = Path(__file__).parent.parent / "docs" / "results"
VOID = {"meta"}
ENTRIES: dict[str, tuple[type[Any], Callable[[World, Any], None]]] = {
    "sample_tp.py": (SampleOptions, sample_tp.main),
    "eval_tp.py": (EvalOptions, eval_tp.main),
    "train_tp.py": (TrainOptions, train_tp.main),
    **{f"drop_syncs.py {name}": command for name, command in drop_syncs.COMMANDS.items()},
    **{f"bench_tp.py {name}": command for name, command in bench_tp.COMMANDS.items()},
}
SMALL = ["--n_layer=2", "--n_head=3", "--n_embd=24", "--vocab_size=67", "--repeats=2"]


class Reader(HTMLParser):
    """What is on a page: balanced tags, attributes, and the text of each kind of element."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.words.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.words[tag][-1] += data

    @property
    def said(self) -> str:
        """The text of the page, without its style and the record."""
        return self.words["main"][0].replace(self.words["pre"][0], "")


def check(text: str) -> Reader:
    """A page that parses, and asks for nothing that is not in it."""
    found = Reader(text)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "a",
                             "base", "image", "use"}
    for name, value in found.attributes:
        assert (name not in ("src", "href", "srcset", "action", "xlink:href")
                and not name.startswith("on"))
        assert "http" not in value.replace("http-equiv", "") and "url(" not in value
    assert not re.search(r"url\(|@import|http", found.words["style"][0])
    return found


# --- every kind of report ---------------------------------------------------------------------


def _run(world: World, entry: str, words: list[str]) -> None:
    cls, main = ENTRIES[entry]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        main(world, parse(cls, words, entry))


@pytest.fixture(scope="module")
def made(letters: Path, home: Path, unknown: Path,
         tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of every command that takes no torchrun of its own, as JSON, by name."""
    place = tmp_path_factory.mktemp("reports")
    weights, data = f"--init_from={home / 'weights'}", ["--dataset=letters", f"--data_dir={home}"]
    train = [f"--{name}={value}"
             for name, value in (test_training.TINY | {"max_iters": 4, "eval_iters": 1}).items()]
    train.append(f"--data_dir={letters}")
    drop = [weights, *data, "--max_tokens=61", "--batch_size=4"]
    runs: dict[str, tuple[str, int, list[str]]] = {
        "sample": ("sample_tp.py", 2, [f"--init_from={unknown}", "--prompt=1 2 3",
                                       "--num_samples=2", "--max_new_tokens=6"]),
        "sample_mlp": ("sample_tp.py", 3, [f"--init_from={unknown}", "--prompt=1 2 3", "--sync=mlp",
                                           "--max_new_tokens=40"]),
        "sample_one": ("sample_tp.py", 1,
                       [f"--init_from={unknown}", "--prompt=1 2 3", "--max_new_tokens=6"]),
        "eval": ("eval_tp.py", 2, [weights, *data, "--max_tokens=61"]),
        "train": ("train_tp.py", 2, [*train, f"--out_dir={place / 'out'}"]),
        "train_sequence": ("train_tp.py", 2,
                           [*train, f"--out_dir={place / 'seq'}", "--sequence_parallel=True"]),
        "train_dp": ("train_tp.py", 2,
                     [*train, f"--out_dir={place / 'dp'}", "--tp=1", "--dp_shard=True"]),
        "scan": ("drop_syncs.py scan", 2,
                 [*drop, "--search=order", "--budget=1000%", "--decode_tokens=3"]),
        "repair": ("drop_syncs.py repair", 2,
                   [*drop, "--sync=mlp", "--steps=3", "--whole_steps=3", f"--out={place / 'r'}"]),
        "group": ("drop_syncs.py group", 1, [*drop, f"--out={place / 'g'}"]),
        "decode": ("bench_tp.py decode", 2,
                   [*SMALL[:4], "--repeats=1", "--prompt_tokens=5", "--new_tokens=5"]),
        "prefill": ("bench_tp.py prefill", 2, [*SMALL, "--prompt_tokens=5"]),
        "bench_train": ("bench_tp.py train", 2,
                        [*SMALL, "--batch_size=2", "--block_size=8", "--steps=1"]),
        "save": ("bench_tp.py save", 2, [*SMALL, "--batch_size=2", "--block_size=8", "--steps=1"]),
        "allreduce": ("bench_tp.py allreduce", 2, ["--repeats=1", "--sizes=4,4096"]),
        "block": ("bench_tp.py block", 2,
                  [*SMALL[1:3], "--repeats=2", "--block_size=8", "--tp=1,2,3"]),
        "diagram": ("bench_tp.py diagram", 1, ["--tp=4,8", "--sync=every:2"]),
        "page": ("bench_tp.py page", 1, [f"--kept={RESULTS / 'scan_tp3.json'}"]),
    }
    found = {}
    for name, (entry, size, words) in runs.items():
        found[name] = place / f"{name}.json"
        run_ranks(size, _run, entry, [*words, "--device=cpu", f"--report={found[name]}"],
                  tp=1 if name == "train_dp" else size)
    with redirect_stdout(StringIO()):
        dry = [*train, f"--report={place / 'dry.json'}", "--dry_run=True", "--ranks=4", "--tp=2"]
        dry_run.show(parse(TrainOptions, dry, "train_tp.py"))
    return found | {"dry": place / "dry.json"}


TITLES = {  # what people come for, by report
    "sample": ("One layer", "Compute and", "Communication,", "Further", "Samples"),
    "sample_mlp": ("One layer", "Compute and", "Communication,", "Samples"),
    "sample_one": ("One layer", "Further", "Samples"),
    "eval": ("One layer", "Compute and", "Communication,", "Further"),
    "train": ("One layer", "Compute and", "Communication,", "Further", "Loss"),
    "train_sequence": ("One layer", "Communication,", "Loss"),
    "train_dp": ("One layer", "Communication,", "Loss"),
    "scan": ("One layer", "Perplexity against"),
    "repair": ("One layer", "Further"),
    "group": ("Further",),
    "decode": ("One layer", "Side by side", "Further"),
    "prefill": ("One layer", "Side by side", "Further"),
    "bench_train": ("One layer", "Side by side", "Further"),
    "save": ("Further",),
    "allreduce": ("Messages",),
    "block": ("Every strategy",),
    "diagram": ("One layer", "Every strategy"),
    "page": ("Perplexity against",),
    "dry": ("Further",),
}


def test_every_kind_of_report_is_a_page(made: dict[str, Path]) -> None:
    assert set(TITLES) == set(made)
    for name, path in made.items():
        report = json.loads(path.read_text())
        found = check(page(report))
        titles = found.words["h2"]
        assert all(any(title.startswith(wanted) for title in titles)
                   for wanted in TITLES[name]), (name, titles)
        assert len(titles) == len(set(titles))
        assert json.loads(found.words["pre"][0]) == report == json.loads(record(page(report)))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_kept_reports_are_pages(path: Path) -> None:
    check(page(json.loads(path.read_text())))


def test_the_figures_are_the_reports(made: dict[str, Path]) -> None:
    for name in ("sample", "sample_mlp", "eval", "train", "train_sequence", "train_dp"):
        report = json.loads(made[name].read_text())
        found = check(page(report))
        rows = cells(page(report))
        made_of = report["comm_account"]
        blocks = [(str(i), kind, layer[kind]) for i, layer in enumerate(made_of["layers"])
                  for kind in ("attention", "mlp")]
        blocks += [("-", kind, passes) for kind, passes in made_of["other"].items()]
        lines = [(i, kind, way, op, x) for i, kind, passes in blocks for way, ops in passes.items()
                 for op, x in ops.items()]
        for *where, x in lines:
            assert [*where, f"{x['calls']:,}", f"{x['bytes']:,}", f"{x['seconds']:.6f}"] in rows
        assert len([row for row in rows
                    if row[3:4] and row[3] in {line[3] for line in lines}]) == len(lines)
        total = report["comm_account"]["total"]
        assert ["", "sum", "", "", f"{total['calls']:,}", f"{total['bytes']:,}",
                f"{total['seconds']:.6f}"] in rows
        for kind in ("attention", "mlp"):  # in the picture
            op = "reduce_scatter" if name == "train_sequence" else "all_reduce"
            mine = [x for _, *where, x in lines if where == [kind, "forward", op]]
            calls, size, took = (sum(x[key] for x in mine) for key in ("calls", "bytes", "seconds"))
            assert (not mine or f"{calls:,} calls, {nbytes(size)}, {seconds(took)}"
                    in found.words["small"])
        sizes = report["memory"]["weight_bytes_per_rank"]
        assert ", ".join(map(nbytes, sizes)) in found.words["dd"]


def cells(text: str) -> list[list[str]]:
    """The rows of all tables."""
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
            for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]


def test_the_headline(made: dict[str, Path]) -> None:
    report = json.loads(made["sample"].read_text())
    said = dict(headline(report))
    # 1 layer: 2 all-reduces and the embedding's, 6 passes for 2 rows of 6 tokens each
    assert said["all-reduces a generated token"] == "1.5"
    assert (dict(headline(report | {"speculation": {"acceptance_rate": 0.7}}))
            ["of the draft's guesses right"] == "70.0 %")
    assert (said["of the time in collectives"]
            == f"{100 * report['comm_account']['total']['fraction_of_time']:.1f} %")
    one = dict(headline(json.loads(made["sample_one"].read_text())))
    assert one["all-reduces a generated token"] == "0" and "of the time in collectives" not in one
    scan = json.loads(made["scan"].read_text())
    assert (dict(headline(scan))["sync points within the budget"]
            == f"{scan['chosen']['points']} of 6")
    rows = [scan["plain"], *scan["curve"], *scan["others"], scan["chosen"]]
    assert all(row["all_reduces_per_token"] == row["points"] + 1
               and row["ms_per_token"]["median"] > 0 for row in rows)


def test_the_picture_is_of_the_schedule(made: dict[str, Path]) -> None:
    def messages(name: str) -> list[tuple[str, str, int]]:
        halves = picture(json.loads(made[name].read_text())).halves
        every = [(kind, place) for kind, places in halves.items() for place in places]
        return [(kind, place.name, place.times) for kind, place in every
                if isinstance(place, Message)]

    assert messages("sample") == [("attention", "f", 1), ("attention", "g", 1), ("mlp", "f", 1),
                                  ("mlp", "g", 1)]
    assert messages("sample_mlp") == [("attention", "f", 1), ("attention", "g", 0), ("mlp", "f", 0),
                                      ("mlp", "g", 1)]
    assert messages("sample_one") == messages("train_dp") == []
    assert [name for _, name, _ in messages("train_sequence")] == ["gather", "scatter"] * 2
    text = page(json.loads(made["sample_mlp"].read_text()))
    assert (text.count('class="message left-out"') == 2
            and text.count('class="on"') == 1 == text.count('class="off"'))


def test_a_loss_curve_is_thinned_and_whole(tmp_path: Path) -> None:
    lines = ([{"iter": i, "loss": 4.0 - i / 1000} for i in range(1001)]
             + [{"iter": 1001, "val_loss": 2.0}])
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"iter": 7, "lo')
    made = directory.loss_curve(tmp_path / "metrics.jsonl")
    assert (made["iter"][0] == 0 and made["iter"][-1] > 990
            and 150 < len(made["iter"]) <= directory.CURVE_POINTS)
    assert (made["loss"] == [4.0 - i / 1000 for i in made["iter"]]
            and (made["val_iter"], made["val_loss"]) == ([1001], [2.0]))
    assert directory.loss_curve(tmp_path / "none") == {"iter": [], "loss": [], "val_iter": [],
                                                        "val_loss": []}


# --- whatever is in it ------------------------------------------------------------------------

EVIL = (
    "</pre></title></style><script>alert(1)</script>"
    "<img src=http://x.invalid/a onerror=alert(2)>'\"&amp;<!-- ]]> "
    "\0\ud800\x1b[31m\r"
)


def hostile(report: dict[str, Any]) -> dict[str, Any]:
    """Evil text wherever a report has text, and as keys."""

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [turned(inner) for inner in value]
        return EVIL if isinstance(value, str) else value

    found: dict[str, Any] = turned(report)
    found["comm_account"]["other"][EVIL] = {EVIL: {EVIL: {"calls": 1, "bytes": 2, "seconds": 3.0}}}
    return found | {EVIL: {EVIL: [{EVIL: EVIL}]}}


def test_hostile_text_is_text(made: dict[str, Path], tmp_path: Path) -> None:
    report = json.loads(made["sample"].read_text())
    mild = report | {"samples": [{"prompt": EVIL, "prompt_tokens": [1], "tokens": [2],
                                  "text": EVIL}]}
    for evil in (hostile(report), mild):
        write(str(tmp_path / "evil.html"), evil)
        text = (tmp_path / "evil.html").read_text(encoding="utf-8")
        found = Reader(text)
        assert not found.tags & {"script", "img"} and "alert(1)" in found.said
        assert not [name for name, value in found.attributes
                    if name.startswith("on") or "alert" in value]
        assert json.loads(record(text)) == evil == read(tmp_path / "evil.html")
    assert "Samples" in found.words["h2"]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def test_no_report_fails(made: dict[str, Path]) -> None:
    """Any value of any report may be another one: what a section cannot read is shown as it is."""
    draw = random.Random(1)
    others: tuple[Any, ...] = (
        None, "x", -1, 0, 0.0, float("nan"), float("inf"), 1e300, 1e-320, 10**400, [], {}, [1],
        {"a": [{}]}, True,
    )  # fmt: skip
    for path in made.values():
        report = json.loads(path.read_text())
        every = [at for at in places(report) if at]
        for at in draw.sample(every, min(10, len(every))):
            broken = copy.deepcopy(report)
            inner = broken
            for key in at[:-1]:
                inner = inner[key]
            inner[at[-1]] = draw.choice(others)
            text = page(broken)
            assert (Reader(text).words["h1"]
                    and json.dumps(json.loads(record(text))) == json.dumps(broken))
    odds: list[dict[str, Any]] = [{}, {"comm_account": 5}, {"model": {}, "tp": 2}, {"samples": [1]},
                                  {"new": {"figure": 3}}]
    for odd in odds:
        assert all(key.replace("_", " ") in Reader(page(odd)).said for key in odd if key != "tp")


def only(value: Any, shape: Any, optional: bool) -> Any:
    """The value without what its shape does not name."""
    if isinstance(shape, list):
        return [only(item, shape[0], optional) for item in value]
    if not isinstance(shape, dict):
        return value
    if str in shape:
        return {key: only(item, shape[str], optional) for key, item in value.items()}
    named = {key.rstrip("?"): inner for key, inner in shape.items()
             if optional or not key.endswith("?")}
    return {key: only(value[key], inner, optional)
            for key, inner in named.items() if value.get(key) is not None}


def test_a_section_reads_what_its_shape_names(made: dict[str, Path]) -> None:
    """A key that a section reads and does not name would be a KeyError, which nobody catches."""
    drawn = set()
    for path in made.values():
        report = json.loads(path.read_text())
        for section in SECTIONS:
            if section.draw(report) is not None:
                drawn.add((section.title, *section.shape))
                for optional in (False, True):
                    section.make(only(report, section.shape, optional))
    assert drawn == {(section.title, *section.shape) for section in SECTIONS}


def test_a_mistake_in_a_section_surfaces(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not a missing section, on a page of any report."""

    def mistaken(report: dict[str, Any]) -> None:
        raise error("a typing mistake")

    report = json.loads(made["sample"].read_text())
    errors = (KeyError, TypeError, AttributeError, ValueError, IndexError)
    found = [i for i, section in enumerate(SECTIONS) if section.draw(report) is not None]
    assert len(found) == 4
    for i, error in itertools.product(found, errors):
        sections = [*SECTIONS[:i], replace(SECTIONS[i], make=mistaken), *SECTIONS[i + 1 :]]
        with monkeypatch.context() as patched:
            patched.setattr("report.page.SECTIONS", sections)
            with pytest.raises(error, match="a typing mistake"):
                write(str(tmp_path / "r.html"), report)
            page({"entry": "another", "model": report["model"]})  # none of this section's


def test_what_is_no_page(tmp_path: Path) -> None:
    for name, text in (("a.html", "<pre>{}</pre>"), ("b.html", '<pre id="report">{</pre>'),
                       ("c.html", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is no page of a report"):
            read(tmp_path / name)


# --- said before the run ----------------------------------------------------------------------

NEEDS_RANKS = ("drop_syncs.py scan", "drop_syncs.py repair")


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_report_that_cannot_be_written_is_said_first(entry: str, tmp_path: Path) -> None:
    """Before anything else is looked at: there are no weights, data or reports here."""
    cls, _ = ENTRIES[entry]
    fields = cls.__dataclass_fields__
    given = {name: "/nowhere" for name, field in fields.items() if field.metadata["required"]}
    given |= {"init_from": "/nowhere", "dataset": "none", "out": str(tmp_path / "out"),
              "plot": str(tmp_path / "plot.png")}
    words = [f"--{name}={value}" for name, value in given.items() if name in fields]
    for place, message in ((tmp_path, "is a directory"),
                           (tmp_path / "no" / "r.html", "does not exist")):
        with pytest.raises((UserError, AssertionError)) as caught:
            if entry in NEEDS_RANKS:
                run_ranks(2, _run, entry, [*words, f"--report={place}"])
            else:
                _run(test_sample_tp.alone(), entry, [*words, f"--report={place}"])
        assert f"--report={place}" in str(caught.value) and message in str(caught.value)


# --- seen in a browser ------------------------------------------------------------------------


def variables(dark: bool) -> dict[str, str]:
    """The colours of style.css."""
    light, _, rest = STYLE.read_text().partition("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    return found | (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", rest)) if dark else {})


def contrast(a: str, b: str) -> float:
    """The ratio of two colours' luminances as WCAG has it, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_it_is_on(dark: bool) -> None:
    colours = variables(dark)
    grounds = ("paper", "panel", "forward-tint", "backward-tint", "column-tint", "row-tint",
               "plain-tint")
    for ink in ("ink", "muted"):
        for ground in grounds:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for mark in ("forward", "backward", "step", "compute", "column", "row", "c0", "c1", "c2", "c3",
                 "c4", "c5", "wire"):
        assert contrast(colours[mark], colours["panel"]) >= 1.7, mark
    assert contrast("#000000", "#ffffff") == pytest.approx(21)  # WCAG's own examples
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


LAYOUT = """(() => {
  const bad = [], wide = document.documentElement;
  if (wide.scrollWidth > innerWidth) bad.push(`page ${wide.scrollWidth} of ${innerWidth}`);
  for (const svg of document.querySelectorAll('svg')) {
    const outer = svg.getBoundingClientRect(), scale = outer.width / svg.viewBox.baseVal.width;
    for (const text of svg.querySelectorAll('text')) {
      const box = text.getBoundingClientRect();
      const words = text.textContent, size = parseFloat(getComputedStyle(text).fontSize);
      if (size * scale < 10) bad.push(`small ${words}`);
      if (box.left < outer.left - 1 || box.right > outer.right + 1) bad.push(`cut ${words}`);
    }
  }
  for (const row of document.querySelectorAll('.part, .shared, .stream, .rank, .ranks, .message'))
    if (row.scrollWidth > row.clientWidth) bad.push(`out ${row.textContent}`);
  for (const one of document.querySelectorAll('p, dd, dt, h1, h2, h3, summary, blockquote, .half *')) {
    const box = one.getBoundingClientRect(), words = one.textContent.slice(0, 60);
    if (box.width && (box.left < 0 || box.right > innerWidth + 1)) bad.push(`wide ${words}`);
    if (parseFloat(getComputedStyle(one).fontSize) < 11) bad.push(`small ${words}`);
  }
  return [bad, getComputedStyle(document.body).backgroundColor];
})()"""


@pytest.mark.skipif(chromium() is None, reason="there is no Chromium here")
def test_pages_in_a_browser(made: dict[str, Path], tmp_path: Path) -> None:
    """From disk: no console messages, no requests, all within the window, light and dark."""
    texts = {name: page(json.loads(path.read_text())) for name, path in made.items()}
    texts["evil"] = page(hostile(json.loads(made["sample"].read_text())))
    browser = Browser(str(chromium()))
    try:
        for name, text in texts.items():
            path = tmp_path / f"{name}.html"
            path.write_text(text, encoding="utf-8")
            grounds = []
            for wide, dark in ((400, False), (1400, True)):
                browser.open(path, wide, dark)
                bad, ground = browser.ask(LAYOUT)
                assert bad == [] and browser.complaints() == [], (name, wide)
                grounds.append(ground)
            assert grounds == ["rgb(250, 249, 246)", "rgb(20, 23, 26)"]
        (tmp_path / "loud.html").write_text(
            "<script>console.error('x')</script><img src='file:///nowhere.png'><p>" + "x" * 200)
        browser.open(tmp_path / "loud.html", 400)
        # it would have been noticed
        assert len(browser.complaints()) >= 2 and browser.ask(LAYOUT)[0] != []
    finally:
        browser.close()

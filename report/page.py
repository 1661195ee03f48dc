"""A report as one page of HTML that needs no network, no script and no other file.

All of the report is on it: in sections, in tables of what no section shows, and as JSON.
"""

import html
import json
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import tostring

from base.numbers import count, nbytes, number, plural, share
from report.html import E, at, facts, fits, folded, is_number, note, plain, words
from report.sections import SECTIONS, Report, unit_of

STYLE = Path(__file__).with_name("style.css")
RECORD = '<pre id="report">'
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing from elsewhere
HEAD = {"entry", "what", "world_size", "tp", "pp", "dp", "comm", "device", "dtype", "quantize",
        "sync", "decoder", "source", "best_val_loss"}  # keys that the page's beginning shows
HEADINGS = {"block": "A layer under every strategy", "allreduce": "All-reduces of many sizes",
            "save": "What a checkpoint costs"}
lost = partial(share, digits=2)
HEADLINE = (  # name, text of the figures at these paths, paths
    ("sync points within the budget", "{} of {}".format, "chosen.points", "plain.points"),
    ("sync points", lambda n, layers: f"{n} of {2 * layers}", "points", "model.n_layer"),
    ("perplexity lost", lost, "chosen.loss"),
    ("perplexity lost", lost, "evidence.loss"),
    ("of the draft's guesses right", share, "speculation.acceptance_rate"),
    ("tokens/s", number, "timing.decode_tokens_per_s"),
    ("tokens/s", number, "timing.tokens_per_s"),
    ("perplexity", number, "evaluation.perplexity"),
    ("best validation loss", number, "best_val_loss"),
    ("of the time in collectives", share, "comm_account.total.fraction_of_time"),
    ("of the time in collectives", share, "share_in_collectives.median"),
)


def page(report: Report) -> str:
    shown, sections = set(HEAD), []
    for section in SECTIONS:
        if (drawn := section.draw(report)) is not None:
            sections.append(drawn)
            shown |= {key.rstrip("?") for key in section.shape} - {"model"}
    if rest := {key: value for key, value in report.items() if key not in shown}:
        sections.append(E("section", E("h2", "Further figures"), plain(rest)))
    record = E("pre", json.dumps(report, indent=1), id="report")
    title, cells = heading(report), headline(report)
    head = E("head", E("meta", charset="utf-8"),
             E("meta", http_equiv="Content-Security-Policy", content=POLICY),
             E("meta", name="viewport", content="width=device-width, initial-scale=1"),
             E("meta", name="color-scheme", content="light dark"),
             E("title", f"{title} – nanoTP"), E("style", STYLE.read_text(encoding="utf-8")))
    command = " ".join(str(report[key]) for key in ("entry", "what") if report.get(key))
    top = E("header", E("p", "nanoTP", E("span", command), class_="over"), E("h1", title),
            note(" · ".join(about(report))), facts(cells) if cells else None)
    end = E("section", folded("The report itself, as JSON", record), class_="record")
    body = E("body", E("main", top, sections, end))
    whole = tostring(E("html", head, body, lang="en"), encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{whole}\n"


def record(text: str) -> str:
    """The JSON that a page carries. ValueError if it is no page of this kind."""
    _, mark, rest = text.partition(RECORD)
    body, end, _ = rest.partition("</pre>")
    if not mark or not end:
        raise ValueError("there is no report in it")
    return html.unescape(body)


def heading(report: Report) -> str:
    """In a few words: the model or the measurement, and the number of ranks."""
    ranks = report.get("world_size") or report.get("tp") or report.get("ranks")
    where = f" on {plural(ranks, 'rank')}" if isinstance(ranks, int) else ""
    parameters, layers = at(report, "model.parameters"), at(report, "model.n_layer")
    if is_number(parameters):
        return f"GPT of {count(parameters)} parameters{where}"
    if isinstance(layers, int):
        return f"GPT of {plural(layers, 'layer')}{where}"
    what = str(report.get("what") or report.get("entry") or "report")
    return f"{HEADINGS.get(what, words(what).capitalize())}{where}"


def about(report: Report) -> list[str]:
    texts = {"model.n_layer": "{} layers", "model.n_head": "{} heads", "model.n_embd": "{} wide",
             "tp": "dp {dp} × tp {}" if "dp" in report else "tp {}", "comm": "{}", "device": "{}",
             "dtype": "{}", "source": "{}", "quantize": "{} weights", "decoder": "{} step",
             "sync": "sync points: {}"}
    return [text.format(value, dp=report.get("dp")) for path, text in texts.items()
            if (value := at(report, path)) and value != "none"]


def headline(report: Report) -> list[tuple[str, str]]:
    """The figures that a reader looks for first, each with its name. 0 stands for not measured."""
    found, unit = [], unit_of(report)
    if fits(report.get("per_token"), {"all_reduce?": float}):
        calls = report["per_token"].get("all_reduce") or 0
        found.append(("all-reduces a generated token", number(calls)))
    for name, text, *paths in ((unit, number, f"parties.nanotp.{unit}.median"), *HEADLINE):
        figures = [at(report, path) for path in paths]
        if fits(figures, [float]) and (any(figures) or text is lost):
            found.append((name, text(*figures)))
    weights = at(report, "memory.weight_bytes_per_rank")
    if weights and fits(weights, [int]):
        found.append(("weights a rank", nbytes(max(weights))))
    return found

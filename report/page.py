"""A report as one page of HTML that needs nothing else: no network, no script, no file beside it. The whole report is in it."""

import html
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree.ElementTree import Element

from base.errors import UserError
from base.numbers import count, nbytes, number, plural, share
from report import account
from report.html import Content, E, facts, is_short, plain, words, written
from report.sections import SECTIONS, Report, Section, note, unit_of

STYLE = Path(__file__).with_name("style.css")
RECORD = '<pre id="report">'
NOTHING_FROM_ELSEWHERE = "default-src 'none'; style-src 'unsafe-inline'"
# what a report lacks, or has otherwise than this version writes it, a section stumbles over in one of these ways
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, ArithmeticError, UserError)
HEAD = ("entry", "what", "world_size", "tp", "dp", "comm", "device", "dtype", "quantize", "sync", "decoder", "source",
        "best_val_loss")  # fmt: skip


HEADINGS = {  # of what has no model
    "block": "A layer under every strategy",
    "allreduce": "All-reduces of many sizes",
    "start": "From torchrun to the first token",
    "save": "What a checkpoint costs",
}


def page(report: Report) -> str:
    """The page. Whatever is in the report is on it: in a section of its own, in a table of what is left, and as JSON."""
    left, body = dict.fromkeys(report), list[Element]()
    for section in SECTIONS:
        found = _section(section, report)
        if found is not None:
            body.append(found)
            for key in section.shows:
                left.pop(key, None)
    for key in HEAD:
        left.pop(key, None)
    if left:
        rest = {key: " ".join(map(str, report[key])) if is_command(key, report[key]) else report[key] for key in left}
        short = {key: value for key, value in rest.items() if is_short(value)}
        tables = [E("div", E("h3", words(key)), paragraph(plain(rest[key]))) for key in rest if key not in short]
        body.append(E("section", E("h2", "Further figures"), plain(short) if short else None, E("div", tables, class_="rest")))
    record = json.dumps(report, indent=1)
    whole = E("details", E("summary", "The report itself, as JSON"), E("pre", record, id="report"))
    title = f"{heading(report)} – nanoTP"
    head = E(
        "head",
        E("meta", charset="utf-8"),
        E("meta", http_equiv="Content-Security-Policy", content=NOTHING_FROM_ELSEWHERE),
        E("meta", name="viewport", content="width=device-width, initial-scale=1"),
        E("meta", name="color-scheme", content="light dark"),
        E("title", title),
        E("style", STYLE.read_text(encoding="utf-8")),
    )
    main = E("main", top(report), body, E("section", whole, class_="record"))
    return "<!DOCTYPE html>\n" + written(E("html", head, E("body", main), lang="en")) + "\n"


def is_command(key: str, value: object) -> bool:
    return key == "command" and isinstance(value, list)


def paragraph(said: Content) -> Content:
    return E("p", said) if isinstance(said, str) else said


def record(text: str) -> str:
    """The JSON that a page carries. ValueError where it is none of these pages."""
    _, mark, rest = text.partition(RECORD)
    body, end, _ = rest.partition("</pre>")
    if not mark or not end:
        raise ValueError("there is no report in it")
    return html.unescape(body)


def _section(section: Section, report: Report) -> Element | None:
    """The section, or None where the report has nothing for it, or not as it should be: that is shown as it is, then."""
    if not all(report.get(key) for key in section.needs):
        return None
    try:
        content = section.make(report)
        return None if content is None else E("section", E("h2", section.title), content)
    except UNREADABLE:
        return None


# --- the beginning --------------------------------------------------------------------------------------------------


def top(report: Report) -> Element:
    said = headline(report)
    command = " ".join(str(report[key]) for key in ("entry", "what") if report.get(key))
    return E(
        "header",
        E("p", "nanoTP", E("span", command), class_="over"),
        E("h1", heading(report)),
        note(" · ".join(_about(report))),
        facts(said) if said else None,
    )


def heading(report: Report) -> str:
    """What ran, in a few words."""
    model = report.get("model")
    ranks = report.get("world_size") or report.get("tp") or report.get("ranks")
    where = f" on {plural(ranks, 'rank')}" if isinstance(ranks, int) else ""
    parameters = model.get("parameters") if isinstance(model, dict) else None
    if isinstance(parameters, int):
        return f"GPT of {count(parameters)} parameters{where}"
    layers = model.get("n_layer") if isinstance(model, dict) else None
    if isinstance(layers, int):
        return f"GPT of {plural(layers, 'layer')}{where}"
    what = str(report.get("what") or report.get("entry") or "report")
    return f"{HEADINGS.get(what, words(what).capitalize())}{where}"


def _about(report: Report) -> Iterator[str]:
    model = report.get("model")
    if isinstance(model, dict):
        for key, said in (("n_layer", "layers"), ("n_head", "heads"), ("n_embd", "wide")):
            if key in model:
                yield f"{model[key]} {said}"
    if "tp" in report:
        yield f"dp {report['dp']} × tp {report['tp']}" if "dp" in report else f"tp {report['tp']}"
    for key in ("comm", "device", "dtype", "source"):
        if report.get(key) and report[key] != "none":
            yield str(report[key])
    if report.get("quantize"):
        yield f"{report['quantize']} weights"
    if report.get("decoder"):
        yield f"{report['decoder']} step"
    if "sync" in report:
        yield f"sync points: {report['sync']}"


def headline(report: Report) -> list[tuple[str, str]]:
    """The figures that a reader looks for first, each with its name; up to the first that the report has otherwise."""
    found = []
    with suppress(*UNREADABLE):
        for named in _headline(report):
            found.append(named)
    return found


def _headline(report: Report) -> Iterator[tuple[str, str]]:
    said, timing = account.all_reduces_per_token(report), report.get("timing", {})
    if said is not None:
        yield "all-reduces a generated token", number(round(said, 3))
    if accepted := report.get("speculation", {}).get("acceptance_rate"):
        yield "of the draft's guesses right", share(accepted)
    for key in ("decode_tokens_per_s", "tokens_per_s"):
        if timing.get(key):
            yield "tokens/s", number(timing[key])
    if "evaluation" in report:
        yield "perplexity", number(report["evaluation"]["perplexity"])
    if "best_val_loss" in report:
        yield "best validation loss", number(report["best_val_loss"])
    if "parties" in report:
        unit = unit_of(report["parties"])
        yield unit, number(report["parties"]["nanotp"][unit]["median"])
    if chosen := report.get("chosen"):
        yield "sync points within the budget", f"{chosen['points']} of {report['plain']['points']}"
        yield "perplexity lost", share(chosen["loss"], 2)
    if "evidence" in report:
        yield "sync points", f"{report['points']} of {2 * report['model']['n_layer']}"
        yield "perplexity lost", share(report["evidence"]["loss"], 2)
    if "comm_account" in report and report.get("world_size", 1) > 1:
        yield "of the time in collectives", share(report["comm_account"]["total"]["fraction_of_time"])
    elif "share_in_collectives" in report:
        yield "of the time in collectives", share(report["share_in_collectives"]["median"])
    if "memory" in report:
        yield "weights a rank", nbytes(max(report["memory"]["weight_bytes_per_rank"]))

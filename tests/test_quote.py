"""docs/quote.py, and the pages that it keeps: every command is run and says what the page quotes; code is what the file has."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bench_tp
import shard_checkpoint
from cli.grammar import parse_command

ROOT = Path(__file__).parent.parent
PAGES = ["tensor_parallelism.md"]


def imported() -> ModuleType:
    """docs/ is no package."""
    spec = importlib.util.spec_from_file_location("quote", ROOT / "docs" / "quote.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quote"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


quote: Any = imported()


def page(*said: str, above: str = "", command: str = "cat said") -> list[str]:
    return [above, "```console", f"$ {command}", *said, "```", "and so on"]


def told(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "said").write_text("\n".join(lines) + "\n")
    return tmp_path


# --- writing --------------------------------------------------------------------------------------------------------


def test_what_a_command_says_is_written_and_then_found(tmp_path: Path) -> None:
    place = told(tmp_path, "3 calls", "0.12 ms")
    made = quote.outputs(page("nothing of this", "is true"), False, place)
    assert made == page("3 calls", "0.12 ms")
    assert quote.outputs(made, True, place) == made
    with pytest.raises(quote.Stale, match="the page has:   nothing of this\nwhat there is:  3 calls"):
        quote.outputs(page("nothing of this", "is true"), True, place)


def test_commands_stand_in_one_place_and_may_have_many_lines(tmp_path: Path) -> None:
    lines = ["```console", "$ python -c \"", "print('a')", "print('b')\" > kept", "$ cat \\", "    kept", "$ cat kept", "```"]
    expected = [*lines[:6], "a", "b", "$ cat kept", "a", "b", "```"]
    assert quote.outputs(lines, False, tmp_path) == expected


def test_lines_are_chosen(tmp_path: Path) -> None:
    place = told(tmp_path, "before", "a 1", "between", "between", "a 2", "a 3", "after")
    above = "<!-- quote lines=/^a / -->"
    made = quote.outputs(page(above=above), False, place)
    assert made == page("a 1", "...", "a 2", "a 3", above=above)
    with pytest.raises(quote.Stale, match="the page ends there, and there is more:   a 3"):
        quote.outputs(page("a 1", "...", "a 2", above=above), True, place)
    with pytest.raises(quote.Stale, match="the page has:   a 4\nwhat there is:  nothing more"):
        quote.outputs(page("a 1", "...", "a 2", "a 3", "a 4", above=above), True, place)


def test_an_error_is_quoted_with_its_status(tmp_path: Path) -> None:
    wrong = "echo out; echo 'that is wrong' >&2; exit 2"
    above = "<!-- quote exits=/2/ -->"
    assert quote.outputs(page(above=above, command=wrong), False, tmp_path)[3:5] == ["out", "that is wrong"]
    for at, status in (("", 2), ("<!-- quote exits=/1/ -->", 2)):
        with pytest.raises(quote.Stale, match=f"ended with status {status}, not [01]:\nout\nthat is wrong"):
            quote.outputs(page(above=at, command=wrong), False, tmp_path)
    with pytest.raises(quote.Stale, match="ended with status 0, not 2"):
        quote.outputs(page(above=above, command="true"), False, tmp_path)


def test_what_needs_a_package_that_is_not_there_is_left(tmp_path: Path) -> None:
    lines = page("as it was", above="<!-- quote needs=/a_package_that_nobody_has/ -->", command="false")
    assert quote.outputs(lines, True, tmp_path) == lines


@pytest.mark.parametrize("line", ["<!-- quote line=/a/ -->", "<!-- quote lines=/a/ exit=/1/ -->"])
def test_a_comment_that_says_nothing_known_is_refused(line: str) -> None:
    with pytest.raises(quote.Stale, match="is nothing that can be said of a quotation"):
        quote.comment(line)


def test_a_block_without_an_end_or_with_lines_of_no_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(quote.Stale, match="line 1: a block that begins with ```console has no end"):
        quote.outputs(["```console", "$ true"], False, tmp_path)
    with pytest.raises(quote.Stale, match="'true' stands in a console block before any command"):
        quote.outputs(["```console", "true", "```"], False, tmp_path)


# --- comparing ------------------------------------------------------------------------------------------------------

SAME = [
    ("1.5 ms", "200.25 ms"), ("30% of it", "7% of it"), ("5.5% of it", "77% of it"), ("1,989 tokens/s", "97 tokens/s"),
    ("in 3 s", "in 12 s"), ("error 2.1e-07", "error 9.9e-07"), ("a  b", "a b"), ("(1.0 to 7.25)", "(2.5 to 3.0)"),
]  # fmt: skip
DIFFERENT = [
    ("7 calls", "8 calls"), ("358,400 bytes", "358,404 bytes"), ("is wrong", "is right"), ("error 2.1e-07", "error 2.1e-02"),
    ("tp=2 0.5", "tp=3 0.5"), ("57 x 100", "57 x 101"), ("error 1.0e+00", "error 1.0e-07"), ("1.5 ms", "1.5 us"),
    ("step-000003", "step-000004"), ("3 steps", "4 steps"), ("error 1.0e-07", "error -1.0e-07"), ("0.5", "nan"), ("a", "a 1.5"),
]  # fmt: skip


@pytest.mark.parametrize("shown, seen", SAME)
def test_measured_numbers_may_differ(shown: str, seen: str) -> None:
    assert quote.alike(shown, seen, "") and quote.alike(seen, shown, "")
    assert shown.split() == seen.split() or not quote.alike(shown, seen, ".*")  # but not where they are said to be exact


@pytest.mark.parametrize("shown, seen", DIFFERENT)
def test_words_and_counts_may_not(shown: str, seen: str) -> None:
    assert not quote.alike(shown, seen, "") and not quote.alike(seen, shown, "")


def test_a_part_of_a_line_is_exact() -> None:
    exact = r"\d/\d +[\d.,]+"
    assert quote.alike("megatron 2.8e-07 1/1 65.5 5.37", "megatron 2.7e-07 1/1 65.5 9.99", exact)
    assert not quote.alike("megatron 2.8e-07 1/1 65.5 5.37", "megatron 2.8e-07 1/1 65.6 5.37", exact)


# --- code -----------------------------------------------------------------------------------------------------------


def test_code_is_what_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import b\n\n\n@b.c\nclass A:\n    x = 1\n\n    def y(self):\n        return 2\n\n\nz = 3\n")
    lines = ["<!-- code a.py A.y -->", "```python", "old", "```", "<!-- code a.py A -->", "```python", "```"]
    lines += ["```python", "x", "```"]
    made = quote.excerpts(lines, False, tmp_path)
    assert made[1:4] == ["```python", "def y(self):", "    return 2"]
    assert made[7:12] == ["@b.c", "class A:", "    x = 1", "", "    def y(self):"] and made[-3:] == lines[-3:]
    assert quote.excerpts(made, True, tmp_path) == made
    with pytest.raises(quote.Stale, match="line 2: a.py has another A.y by now"):
        quote.excerpts(lines, True, tmp_path)
    with pytest.raises(quote.Stale, match="a.py has no A.z"):
        quote.source("a.py", "A.z", tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_code_is_the_files(name: str) -> None:
    lines = (ROOT / "docs" / name).read_text().splitlines()
    assert quote.excerpts(lines, True) == lines


# --- the pages ------------------------------------------------------------------------------------------------------


def commands(name: str) -> list[str]:
    lines = (ROOT / "docs" / name).read_text().splitlines()
    found = (quote.commands(lines[block.first : block.last]) for block in quote.blocks(lines, "console"))
    return [command.text for several in found for command in several]


def test_a_pages_links_and_figures_are_there() -> None:
    for name in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / "docs" / name).read_text()):
            assert (ROOT / "docs" / target).exists(), target


def test_a_pages_commands_are_in_the_grammar() -> None:
    """Said in a moment; what they print is seen by the slow test below."""
    known: dict[str, Any] = {"bench_tp.py": bench_tp.COMMANDS, "shard_checkpoint.py": shard_checkpoint.COMMANDS}
    found = 0
    for text in commands("tensor_parallelism.md"):
        words = shlex.split(text.replace("\\\n", " ").partition(" > ")[0])
        words = [word for word in words if not word.startswith(("--standalone", "--nproc"))]
        if words[0] in ("python", "torchrun") and words[1] in known:
            table = {name: cls for name, (cls, _) in known[words[1]].items()}
            parse_command(table, words[2:], words[1])
            found += 1
    assert found > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_command_says_what_the_page_quotes(name: str) -> None:
    quote.quote(ROOT / "docs" / name, check=True)

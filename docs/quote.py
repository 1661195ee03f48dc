"""Pages whose commands and code are quoted from the real thing: run every command, write what it says into the page.

    python docs/quote.py docs/tensor_parallelism.md             run it all and rewrite the page
    python docs/quote.py docs/tensor_parallelism.md --check     change nothing; exit status 1 where the page says otherwise

In a page, each command of a ```console block stands after "$ " and its output below it, up to the next command. Commands run
one after the other in one copy of the repository, so that each finds what the ones before have written. A comment above the
block may say more, as <!-- quote KEY=/REGEX/ ... -->:

    lines=/REGEX/   quote only the lines that this is found in, with ... where others were between
    exact=/REGEX/   what this finds is compared to the letter, whatever the rule below says
    exits=/2/       the exit status, 0 otherwise; standard error is then quoted after standard output
    needs=/NAME/    a package that is not in requirements.txt: without it the block is left as it is

and <!-- code FILE NAME --> above a ```python block has it hold that class, function or method of the file.

Compared are words and numbers, but for numbers that were measured: one with a decimal point, a percent sign, or a unit of time
or speed may be any other. One with an exponent must be of about the same size, within a factor of 30. Blanks do not count.
"""

import argparse
import ast
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GAP = "..."
SECONDS = 120  # what a command may take
NUMBER = r"(?<![\w.])[-+]?\d[\d,]*"
MEASURED = re.compile(rf"{NUMBER}\.\d+(?P<power>e[-+]\d+)?%?|{NUMBER}(?:%|(?= (?:tokens/s|s|ms|us)\b))")
SAME_SIZE = math.log10(30)


class Stale(Exception):
    """The page and what it quotes differ, or cannot be compared; the message is for the reader, who knows the page."""


# --- a page ---------------------------------------------------------------------------------------------------------


@dataclass
class Quote:
    """A fenced block: lines [first, last) of the page are what is between the fences."""

    first: int
    last: int
    says: dict[str, str]  # of the comment above it


@dataclass
class Command:
    words: list[str]  # its lines, as the page has them
    output: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    @property
    def title(self) -> str:
        return self.words[0].removesuffix("\\") + ("..." if len(self.words) > 1 else "")


def blocks(lines: list[str], language: str) -> Iterator[Quote]:
    """The blocks of one language, each with the comment right above it."""
    first, fence = 0, ""
    for i, line in enumerate(lines):
        if not fence and line.startswith("```"):
            first, fence = i + 1, line
        elif fence and line == "```":
            if fence == f"```{language}":
                above = lines[first - 2] if first > 1 else ""
                yield Quote(first, i, comment(above))
            fence = ""
    if fence:
        raise Stale(f"line {first}: a block that begins with {fence} has no end")


def comment(line: str) -> dict[str, str]:
    if found := re.fullmatch(r"<!-- code (\S+) (\S+) -->", line):
        return {"file": found[1], "name": found[2]}
    if not (found := re.fullmatch(r"<!-- quote(( \w+=/.*?/)+) -->", line)):
        return {}
    said = dict(re.findall(r" (\w+)=/(.*?)/(?= \w+=/|$)", found[1]))
    if unknown := said.keys() - {"lines", "exact", "exits", "needs"}:
        raise Stale(f"{line}: {', '.join(sorted(unknown))} is nothing that can be said of a quotation")
    return said


def commands(lines: list[str]) -> list[Command]:
    """The commands of a block; one goes on over lines for as long as a quotation mark is open or a line ends in a backslash."""
    found: list[Command] = []
    for line in lines:
        if found and is_open(found[-1].text):
            found[-1].words.append(line)
        elif line.startswith("$ "):
            found.append(Command([line[2:]]))
        elif found:
            found[-1].output.append(line)
        else:
            raise Stale(f"{line!r} stands in a console block before any command")
    return found


def is_open(text: str) -> bool:
    """Whether a shell would wait for another line."""
    try:
        shlex.split(text)
    except ValueError:
        return True
    return False


# --- what it quotes -------------------------------------------------------------------------------------------------


def copy_of_repository(place: Path) -> Path:
    """What a fresh clone has, in `place`/repo."""
    not_source = shutil.ignore_patterns(".*", "__pycache__", "out", "out-*", "shards", "wandb", "*.bin", "*.pkl", "input.txt")
    return Path(shutil.copytree(ROOT, place / "repo", ignore=not_source))


def run(command: Command, place: Path, exits: int) -> list[str]:
    """The lines that a command prints, run in `place` with this Python's programs first in the PATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "PYTEST"))}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
    # a line on standard error is an error's: what a run is told in passing differs from machine to machine
    errors = subprocess.STDOUT if exits else subprocess.PIPE
    try:
        made = subprocess.run(
            ["bash", "-c", command.text], cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Stale(f"$ {command.title}\nhas not ended within {SECONDS} s") from None
    if made.returncode != exits:
        raise Stale(f"$ {command.title}\nended with status {made.returncode}, not {exits}:\n{made.stdout}{made.stderr or ''}")
    return [line.rstrip() for line in made.stdout.rstrip().splitlines()]


def chosen(lines: list[str], pattern: str) -> list[str]:
    """Those that the pattern is found in, with GAP where others were between two of them."""
    found: list[str] = []
    last = -1
    for i, line in enumerate(lines):
        if re.search(pattern, line):
            found += [GAP, line] if found and last < i - 1 else [line]
            last = i
    return found


def source(file: str, name: str, root: Path = ROOT) -> list[str]:
    """The lines of a class, a function or Class.method of a file, moved to the margin."""
    text = (root / file).read_text()
    nodes: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        named = [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
        if not named:
            raise Stale(f"{file} has no {name}")
        node, nodes = named[0], named[0].body
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno])).splitlines()


# --- the two, compared ----------------------------------------------------------------------------------------------


def masked(line: str, exact: str) -> tuple[str, list[float]]:
    """The line with # for each number that was measured, and those of them that have an exponent."""
    sizes: list[float] = []

    def mask(found: re.Match[str]) -> str:
        if found["power"]:
            sizes.append(float(found[0].rstrip("%").replace(",", "")))
        return "#"

    kept = [found.span() for found in re.finditer(exact, line)] if exact else []
    made, at = "", 0
    for lo, hi in [*kept, (len(line), len(line))]:
        made += MEASURED.sub(mask, line[at:lo]) + line[lo:hi]
        at = hi
    return " ".join(made.split()), sizes


def alike(shown: str, seen: str, exact: str) -> bool:
    (words, sizes), (other, others) = masked(shown, exact), masked(seen, exact)
    return words == other and all(
        a == b or a * b > 0 and abs(math.log10(a / b)) < SAME_SIZE for a, b in zip(sizes, others, strict=True)
    )


def compare(title: str, shown: list[str], seen: list[str], exact: str) -> None:
    """Stale where they differ, with the first line that does."""
    for i, line in enumerate(shown):
        if i >= len(seen) or not alike(line, seen[i], exact):
            now = seen[i] if i < len(seen) else "nothing more"
            raise Stale(f"{title}\nthe page has:   {line}\nwhat there is:  {now}")
    if len(seen) > len(shown):
        raise Stale(f"{title}\nthe page ends there, and there is more:   {seen[len(shown)]}")


def excerpts(lines: list[str], check: bool, root: Path = ROOT) -> list[str]:
    """The page's lines with its code as it is now; check: Stale where that is not what it has."""
    made, at = [], 0
    for block in blocks(lines, "python"):
        if "file" not in block.says:
            continue
        code = source(block.says["file"], block.says["name"], root)
        if check and lines[block.first : block.last] != code:
            raise Stale(f"line {block.first}: {block.says['file']} has another {block.says['name']} by now")
        made += lines[at : block.first] + code
        at = block.last
    return made + lines[at:]


def outputs(lines: list[str], check: bool, place: Path) -> list[str]:
    """The page's lines with what its commands say now, run in `place`; check: Stale at the first that says something else."""
    made, at = [], 0
    for block in blocks(lines, "console"):
        if (package := block.says.get("needs")) and importlib.util.find_spec(package) is None:
            continue
        made += lines[at : block.first]
        for command in commands(lines[block.first : block.last]):
            seen = run(command, place, int(block.says.get("exits", "0")))
            seen = chosen(seen, block.says["lines"]) if "lines" in block.says else seen
            if check:
                compare(f"$ {command.title}", command.output, seen, block.says.get("exact", ""))
            made += [f"$ {command.words[0]}", *command.words[1:], *seen]
        at = block.last
    return made + lines[at:]


def quote(page: Path, check: bool) -> None:
    """Rewrite a page; check: only compare."""
    lines = excerpts(page.read_text().splitlines(), check)
    with tempfile.TemporaryDirectory() as scratch:
        place = copy_of_repository(Path(scratch))
        lines = outputs(lines, check, place)
        if not check:
            page.write_text("\n".join(lines) + "\n")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("pages", type=Path, nargs="+", metavar="PAGE")
    asked.add_argument("--check", action="store_true", help="compare only")
    options = asked.parse_args()
    for page in options.pages:
        try:
            quote(page, options.check)
        except Stale as stale:
            sys.exit(f"{page}: {stale}")


if __name__ == "__main__":
    main()

"""The habits this code keeps, checked on its source."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms from the bottom to the top, the two models among them. A file imports what lies below
# its room, its own room's files, and what is not ours. Nobody imports the other files of the root:
# those are what one runs.
ORDER = (
    "base", "cli", "plan", "text", "model", "checkpoints", "parallel", "tp_model", "world", "report", "inference", "train",
    "bench", "fewer_syncs",
)  # fmt: skip
ROOMS = [name for name in ORDER if (ROOT / name).is_dir()]
SOURCES = [
    path
    for pattern in ("*.py", *(f"{room}/*.py" for room in ROOMS))
    for path in sorted(ROOT.glob(pattern))
]
LINES = 15_546  # non-blank, of all CODE, to fall to 11,000; only a new capability raises it
CODE = [*SOURCES, *sorted(ROOT.glob("*/*.c")), *sorted(ROOT.glob("report/*.css"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def uses(path: Path, *names: str) -> bool:
    """Whether the file evaluates an attribute such as dist.x or os.environ."""
    tree = ast.parse(path.read_text())
    return any(
        ast.unparse(node) in names or ast.unparse(node.value) in names
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_globals_and_no_hooks(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    hooks = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        and "_hook" in node.attr
    ]
    # DDP's comm hook is how its messages reach the ledger, and strategies.py weighs what torch
    # saves; no more hides in one
    allowed = {"data_parallel.py": ["register_comm_hook"], "strategies.py": ["saved_tensors_hooks"]}
    assert hooks == allowed.get(path.name, [])


def test_imports_point_down() -> None:
    """An arrow up, or to a file that one runs, is named with both its ends."""
    upward = set()
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        allowed = {*ORDER[: ORDER.index(room) + 1]} if room in ORDER else {*ORDER}
        ours = {name.partition(".")[0] for name in imports(path)} & {
            *ORDER, *(entry.stem for entry in ROOT.glob("*.py"))
        }
        upward |= {(str(path.relative_to(ROOT)), name) for name in ours - allowed - {room}}
    assert not upward


def test_the_root_has_what_one_runs_and_the_two_models() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == [
        "bench_tp.py", "drop_syncs.py", "eval_tp.py", "model.py", "sample_tp.py", "shard_checkpoint.py", "tp_model.py",
        "train_tp.py",
    ]  # fmt: skip


def lines_of(*paths: Path) -> int:
    return sum(bool(line.strip()) for path in paths for line in path.read_text().splitlines())


def test_lines_fit_a_window_and_files_an_hour() -> None:
    assert not [
        (path, line) for path in CODE for line in path.read_text().splitlines() if len(line) > 100
    ]
    assert not [path for path in CODE if len(path.read_text().splitlines()) > 400]
    assert lines_of(*CODE) <= LINES


def test_functions_fit_a_screen() -> None:
    functions = (
        (f"{path.relative_to(ROOT)}: {node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert len([name for name, length in functions if length > 40]) <= 5


def test_the_core_is_read_in_an_evening() -> None:
    """README's reading path: what a training step and a sampled token take, with counts to ten
    lines."""
    listed = re.findall(
        r"^\| `([\w/.]+)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(listed) > 10
    for name, count in listed:
        assert int(count) == round(lines_of(ROOT / name), -1), name
    assert sum(lines_of(ROOT / name) for name, _ in listed) <= 3_500


def test_paper_needs_no_torch() -> None:
    for path in ROOT.glob("plan/*.py"):
        assert not [name for name in imports(path) if name.startswith("torch")], path


def test_ranks_talk_in_one_place() -> None:
    talks = {path.name for path in SOURCES if uses(path, "dist")}
    # entry.py names an error class
    assert talks == {"collectives.py", "mesh.py", "launch.py", "entry.py"}


def test_the_environment_is_read_in_few_places() -> None:
    reads = {path.name for path in SOURCES if uses(path, "os.environ", "os.getenv")}
    # the tokenizer looks where tiktoken keeps its files, native.py for a compiler and a place for
    # what it makes
    assert reads <= {"mesh.py", "launch.py", "devices.py", "entry.py", "tokenizer.py", "native.py"}


def test_heavy_imports_stay_in_their_branches() -> None:
    for path in SOURCES:
        top = [
            node for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        modules = {
            alias.name for node in top if isinstance(node, ast.Import) for alias in node.names
        }
        modules |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not {"transformers", "wandb", "tiktoken", "huggingface_hub", "datasets"} & {
            name.split(".")[0] for name in modules
        }, path


def test_what_one_runs_starts_quickly() -> None:
    for path in ROOT.glob("*.py"):
        if "__main__" in path.read_text():
            first = (name for name in imports(path) if name not in sys.stdlib_module_names)
            assert next(first) == "base.quick_start", path


def test_every_option_is_read_somewhere() -> None:
    import dataclasses

    from cli import options

    text = "".join(path.read_text() for path in SOURCES if path.name != "options.py")
    for name in (name for name in vars(options) if name.endswith("Options") and name != "Options"):
        for field in dataclasses.fields(getattr(options, name)):
            assert f".{field.name}" in text or field.name == "backend", f"{name}.{field.name} is a dead knob"

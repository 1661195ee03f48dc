"""The habits this code keeps, checked on its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms from the bottom to the top, the two models among them. A file imports what lies below its room, its own
# room's files, and what is not ours. Nobody imports the other files of the root: those are what one runs.
ORDER = (
    "base", "cli", "plan", "text", "model", "checkpoints", "parallel", "tp_model", "world", "report", "inference", "train",
    "bench", "fewer_syncs",
)  # fmt: skip
ROOMS = [name for name in ORDER if (ROOT / name).is_dir()]
SOURCES = [
    path for pattern in ("*.py", *(f"{room}/*.py" for room in ROOMS)) for path in sorted(ROOT.glob(pattern))
]


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
    hooks = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "_hook" in node.attr]
    # DDP's comm hook is how its messages reach the ledger, and strategies.py weighs what torch saves; no more hides in one
    allowed = {"data_parallel.py": ["register_comm_hook"], "strategies.py": ["saved_tensors_hooks"]}
    assert hooks == allowed.get(path.name, [])


def test_imports_point_down() -> None:
    """An arrow up, or to a file that one runs, is named with both its ends."""
    upward = set()
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        allowed = {*ORDER[: ORDER.index(room) + 1]} if room in ORDER else {*ORDER}
        ours = {name.partition(".")[0] for name in imports(path)} & {*ORDER, *(entry.stem for entry in ROOT.glob("*.py"))}
        upward |= {(str(path.relative_to(ROOT)), name) for name in ours - allowed - {room}}
    assert not upward


def test_paper_needs_no_torch() -> None:
    for path in ROOT.glob("plan/*.py"):
        assert not [name for name in imports(path) if name.startswith("torch")], path


def test_ranks_talk_in_one_place() -> None:
    talks = {path.name for path in SOURCES if uses(path, "dist")}
    assert talks == {"collectives.py", "mesh.py", "launch.py", "entry.py"}  # entry.py names an error class


def test_the_environment_is_read_in_few_places() -> None:
    reads = {path.name for path in SOURCES if uses(path, "os.environ", "os.getenv")}
    # the tokenizer looks where tiktoken keeps its files, native.py for a compiler and a place for what it makes
    assert reads <= {"mesh.py", "launch.py", "devices.py", "entry.py", "tokenizer.py", "native.py"}


def test_heavy_imports_stay_in_their_branches() -> None:
    for path in SOURCES:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not {"transformers", "wandb", "tiktoken", "huggingface_hub", "datasets"} & {
            name.split(".")[0] for name in modules
        }, path


def test_every_option_is_read_somewhere() -> None:
    import dataclasses

    from cli import options

    text = "".join(path.read_text() for path in SOURCES if path.name != "options.py")
    for name in (name for name in vars(options) if name.endswith("Options") and name != "Options"):
        for field in dataclasses.fields(getattr(options, name)):
            assert f".{field.name}" in text or field.name == "backend", f"{name}.{field.name} is a dead knob"

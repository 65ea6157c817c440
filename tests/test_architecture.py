"""The import rules of the rooms, read from the source: stages -> pipeline -> cache_schemas."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "cache_schemas": {"pipeline", "stages", "torch", "transformers", "vllm", "typer", "rich"},
    "pipeline": {"stages", "typer", "rich"},
    "stages": {"tests", "benchmarks"},
}
ONLY_IN = {
    "vllm": ("pipeline/teacher/", "pipeline/generation/"),
    "triton": ("pipeline/kernels/", "pipeline/teacher/"),
}
NAMES_OF_NOTHING = {"utils.py", "helpers.py", "helper.py", "base.py", "common.py", "manager.py"}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of every module imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_go_one_way(room):
    offenders = {
        str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[room] for path in modules(room)
    }
    assert {name: bad for name, bad in offenders.items() if bad} == {}


@pytest.mark.parametrize("library", ONLY_IN)
def test_vendor_libraries_stay_behind_their_door(library):
    users = [
        str(path.relative_to(ROOT))
        for room in FORBIDDEN
        for path in modules(room)
        if library in imported(path)
    ]
    assert [user for user in users if not user.startswith(ONLY_IN[library])] == []


@pytest.mark.parametrize("room", FORBIDDEN)
def test_every_module_says_what_it_is(room):
    silent = [
        str(path.relative_to(ROOT))
        for path in modules(room)
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_module_is_named_after_nothing(room):
    assert [str(path) for path in modules(room) if path.name in NAMES_OF_NOTHING] == []


@pytest.mark.parametrize("room", ["cache_schemas", "pipeline", "stages"])
def test_nothing_is_unpickled(room):
    bad = [str(p) for p in modules(room) if imported(p) & {"pickle", "cloudpickle", "dill"}]
    assert bad == []


def test_long_files_are_only_kernels():
    long = [
        str(path.relative_to(ROOT))
        for room in FORBIDDEN
        for path in modules(room)
        if len(path.read_text().splitlines()) > 320 and "kernels" not in path.parts
    ]
    assert long == []

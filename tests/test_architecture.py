"""The rules of the house, read from the source: who imports whom, and what names say.

One idea: the order of rooms and wings is data here, and whatever is imported anywhere in a file
counts, inside a function too.
"""

import ast
import re
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest

from tests import import_graph

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "cache_schemas": {"pipeline", "stages", "torch", "transformers", "vllm", "typer", "rich"},
    "pipeline": {"stages", "typer", "rich"},
    "stages": {"tests", "benchmarks"},
}
WINGS = [
    "beginning",
    "doors",
    "evaluation",
    "training",
    "objectives",
    "generation",
    "student",
    "capture",
    "planning",
    "encoders",
    "corpus",
    "teacher",
    "data",
    "cache",
    "kernels",
    "config",
]
"""Of `pipeline`, from the top floor down: each may import only what stands below it. What each is
for is the one sentence of its `__init__`."""
ONLY_IN = {
    "vllm": ("pipeline/teacher/", "pipeline/generation/"),
    "triton": ("pipeline/kernels/", "pipeline/teacher/"),
}
NAMES_OF_NOTHING = {"utils.py", "helpers.py", "helper.py", "base.py", "common.py", "manager.py"}
ROOM_AS_NAME = re.compile(
    r"(^|[\s;\"'`(])((from|import)\s+(pipeline|stages|cache_schemas)\b|-m\s+(pipeline|stages)\b)",
    re.MULTILINE,
)


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """First part of every name imported anywhere in a file, our own without `stillroom`."""
    names = import_graph.names_imported(ast.parse(path.read_text()))
    return {name.removeprefix(import_graph.NAME).split(".")[0] for name in names}


def wing_of(module: str) -> str:
    """`pipeline.cache.reader` -> `cache`; empty for what all wings share."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and parts[1:] and parts[1] in WINGS else ""


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_go_one_way(room):
    offenders = {
        str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[room] for path in modules(room)
    }
    assert {name: bad for name, bad in offenders.items() if bad} == {}


def test_wings_import_only_what_stands_below_them():
    floor = {wing: -number for number, wing in enumerate(WINGS)} | {"": -len(WINGS)}
    upward = [
        f"{module} -> {name}"
        for module, names in import_graph.read(ROOT).items()
        for name in names
        if module.startswith("pipeline.") and name.startswith("pipeline.")
        if floor[wing_of(module)] < floor[wing_of(name)]
    ]
    assert upward == []


def test_every_folder_of_the_pipeline_is_a_wing_that_says_in_a_sentence_what_it_is():
    faces = {path.parent.name: path for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert sorted(faces) == sorted(WINGS)
    said = {name: ast.get_docstring(ast.parse(path.read_text())) for name, path in faces.items()}
    assert [
        name for name, text in said.items() if not re.fullmatch(r"[A-Z`].*\.", text or "")
    ] == []


def test_no_circle_of_files():
    """An import inside a function counts, so none can be there to hide one."""
    assert import_graph.circles(import_graph.read(ROOT)) == []


def test_a_circle_and_a_chain_are_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert import_graph.circles(graph) == [["b", "c"]]
    assert import_graph.floors(graph) == 2


@pytest.mark.parametrize("library", ONLY_IN)
def test_vendor_libraries_stay_behind_their_door(library):
    users = [
        str(path.relative_to(ROOT))
        for room in FORBIDDEN
        for path in modules(room)
        if library in imported(path)
    ]
    assert [user for user in users if not user.startswith(ONLY_IN[library])] == []


def test_the_rooms_have_one_name():
    """`import pipeline` works in a checkout alone, as a second copy of a module, and shows late."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py", "*.md", "*.toml", "*.sh", "*.yaml", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    texts = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    offenders = {
        f"{name}: {found.group().strip()}"
        for name in texts
        if ROOT / name != Path(__file__).resolve()
        for found in ROOM_AS_NAME.finditer((ROOT / name).read_text())
    }
    assert offenders == set()


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("import pipeline", True),
        ("    from pipeline.cache import reader", True),
        ('child = "import os; from stages import __main__"', True),
        ("torchrun -m stages train", True),
        ("import stillroom.pipeline", False),
        ("from stillroom.stages import console", False),
        ("from tests.pipeline_cases import x", False),
    ],
)
def test_the_room_rule_sees(line, refused):
    assert bool(ROOM_AS_NAME.search(line)) is refused


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


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_file_repeats_its_folder_or_a_library(room):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    libraries = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in wanted}
    offenders = [
        str(path.relative_to(ROOT))
        for path in modules(room)
        for folder in [path.parent.name]
        if path.stem in libraries | {folder} or path.stem.startswith(f"{folder}_")
    ]
    assert offenders == []


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

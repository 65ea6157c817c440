"""Which file of ours imports which, read from the source: `python -m tests.import_graph [ROOT]`.

One idea: a graph is a dict of sets, and imports inside functions and under TYPE_CHECKING count like
any other, so no import can hide. It runs nothing of what it reads.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOMS = ("cache_schemas", "pipeline", "stages")
NAME = "stillroom."

Graph = dict[str, set[str]]


def module_of(path: Path, root: Path) -> str:
    """`pipeline/cache/reader.py` -> `pipeline.cache.reader`; a package is named by its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def names_imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of every import statement, wherever it stands: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read(root: Path) -> Graph:
    """Module -> modules it imports, over the three rooms."""
    paths = {
        module_of(path, root): path
        for room in ROOMS
        for path in sorted((root / room).rglob("*.py"))
    }
    graph: Graph = {}
    for module, path in paths.items():
        names = (n.removeprefix(NAME) for n in names_imported(ast.parse(path.read_text())))
        found = {n if n in paths else n.rpartition(".")[0] for n in names}
        graph[module] = (found & paths.keys()) - {module}
    return graph


def folded(graph: Graph, fold) -> Graph:
    """The same graph over groups of modules; arrows inside a group disappear."""
    groups: Graph = {fold(module): set() for module in graph}
    for module, imports in graph.items():
        groups[fold(module)] |= {fold(name) for name in imports} - {fold(module)}
    return groups


def rooms(graph: Graph) -> Graph:
    """The graph over folders; what lies directly under `pipeline` stands for itself."""
    packages = {name.rpartition(".")[0] for name in graph}

    def room_of(module: str) -> str:
        folder = module.rpartition(".")[0]
        return module if module in packages or folder == "pipeline" else folder

    return folded(graph, room_of)


def circles(graph: Graph) -> list[list[str]]:
    """Groups of two or more modules that reach each other (each group sorted)."""
    reach = {module: _reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted({m} | {n for n in reach[m] if m in reach[n]})) for m in graph if m in reach[m]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: Graph, start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def floors(graph: Graph) -> int:
    """Modules on the longest chain of imports; a circle counts as one floor."""
    circle = {module: group[0] for group in circles(graph) for module in group}
    flat = folded(graph, lambda module: circle.get(module, module))

    @cache
    def height(module: str) -> int:
        return 1 + max(map(height, flat[module]), default=0)

    return max(map(height, flat))


def summary(graph: Graph) -> str:
    arrows = sum(map(len, graph.values()))
    return f"{len(graph)} on {floors(graph)} floors, {arrows} arrows, {len(circles(graph))} circles"


if __name__ == "__main__":
    files = read(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
    print("files:", summary(files))
    print("rooms:", summary(rooms(files)))

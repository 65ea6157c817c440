"""Every message of ours with its remedy, collected from the source.

One idea: an error is raised with what was found, what was expected and what to do, as texts in the
code; so the list of all messages is read from the code and cannot be out of date. What a person
types or names stands between angle brackets. It explains nothing; the page "When it breaks" does.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cache_schemas", "pipeline", "stages")
CODES = {"CacheIncomplete": 3, "Interrupted": 3, "SweepIncomplete": 3}
"""Exit codes that are not 2."""
HEAD = (
    "Collected from the source when these pages are made. What is known only when it happens "
    "stands between ⟨ and ⟩. Exit code 2: something to put right; 3: run the same command again."
)
FIELDS = ("found", "expected", "remedy")


@dataclass(frozen=True, slots=True)
class Message:
    """One place where an error is made.

    Attributes:
        error: name of its class.
        found, expected, remedy: the texts; `<...>` for what is known only when it happens.
        where: file in the repository.
    """

    error: str
    found: str
    expected: str
    remedy: str
    where: str

    @property
    def code(self) -> int:
        """Exit code of a command that ends with it."""
        return CODES.get(self.error, 2)


def messages(root: Path = ROOT) -> list[Message]:
    """All of them, by file and place."""
    found = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            found += _of_file(path, str(path.relative_to(root)))
    return found


def page(root: Path = ROOT) -> str:
    """All of them as Markdown, a table for each wing."""
    by_wing: dict[str, list[Message]] = {}
    for message in messages(root):
        wing = "/".join(Path(message.where).parts[:2]).removesuffix(".py")
        by_wing.setdefault(wing, []).append(message)
    lines = ["# Every message", "", HEAD, ""]
    for wing, own in sorted(by_wing.items()):
        lines += [f"## {wing}", "", "| code | message | what to do |", "|---|---|---|"]
        lines += [_row(one) for one in sorted(set(own), key=lambda m: (m.found, m.where))]
        lines.append("")
    return "\n".join(lines)


def _row(message: Message) -> str:
    said = message.found + (f"; expected {message.expected}" if message.expected else "")
    return f"| {message.code} | {_cell(said)} | {_cell(message.remedy)} |"


def _cell(text: str) -> str:
    escaped = re.sub(r"([|*_`\[\]\\])", r"\\\1", " ".join(text.split()))
    return escaped.replace("<", "⟨").replace(">", "⟩")


def _of_file(path: Path, where: str) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outer = _assigned(tree.body)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = {id(n): f for f in functions for n in ast.walk(f)}  # the innermost comes last
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and (name := _error_name(node.func))):
            continue
        function = inside.get(id(node))
        names = outer | (_assigned(list(ast.walk(function))) if function else {})
        given = dict(zip(FIELDS[:1], node.args))
        given |= {word.arg: word.value for word in node.keywords if word.arg}
        texts = {field: _text(given[field], names) for field in FIELDS if field in given}
        if re.sub(r"<[^>]*>", "", texts.get("found", "")).strip(" .:;,"):
            yield Message(name, *(texts.get(field, "") for field in FIELDS), where=where)


def _error_name(function: ast.expr) -> str:
    name = getattr(function, "id", getattr(function, "attr", ""))
    ours = r"(Stillroom|Config|Corpus|Teacher|Student|Cache)Error|PlanMismatch|ShardCorrupt"
    ours += r"|FormatTooNew|CacheIncomplete|Interrupted|SweepIncomplete|RejectedExample"
    return name if re.fullmatch(ours, name) else ""


def _assigned(nodes: list) -> dict[str, ast.expr]:
    """Name -> the text that it stands for, where that is one text."""
    return {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant | ast.JoinedStr)
    }


def _text(node: ast.expr, names: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, {}) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"<{_short(node.value)}>"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.Name) and node.id in names:
        return _text(names[node.id], {})
    return f"<{_short(node)}>"


def _short(node: ast.expr) -> str:
    """What stands there, in a word: the last name of an expression."""
    words = re.findall(r"[A-Za-z_]+", ast.unparse(node))
    told = [word for word in words if word not in ("self", "str", "len", "join", "f", "in", "for")]
    return (told or ["..."])[-1].replace("_", " ").strip()

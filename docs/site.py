"""Which files of the repository are pages of the browsable documentation, for MkDocs.

One idea: pages stay where they are read without a browser (runbooks, README, FORMAT.md), and links
between files of the repository become links between pages; a link to a file that is no page shows
as plain text. The list of all messages is made here too.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

from docs.messages import page as messages_page

ROOT = Path(__file__).resolve().parent.parent
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "cache_schemas/FORMAT.md": "format.md",
    "docs/kernels.md": "kernels.md",
    "docs/python.md": "python.md",
}
"""File of the repository -> page; files of runbooks/ keep their names."""
MADE = "messages.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
HIDDEN = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config) -> Files:
    """Add the pages that lie elsewhere."""
    for source, uri in MOVED.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    files.append(File.generated(config, MADE, content=messages_page()))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links of the repository as links of the site; marks for tests are left out."""
    origin = {uri: source for source, uri in MOVED.items()}.get(page.file.src_uri)
    origin = origin or f"runbooks/{page.file.src_uri}"
    known = {file.src_uri for file in files}
    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    pieces[::2] = [
        LINK.sub(lambda found: _link(found, origin, page.file.src_uri, known), text)
        for text in pieces[::2]
    ]
    return HIDDEN.sub("", "".join(pieces))


def _link(found: re.Match, origin: str, uri: str, known: set[str]) -> str:
    mark, text, target, anchor = found.groups()
    if not target or "://" in target or target.startswith("mailto:"):
        return found.group(0)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    page = MOVED.get(path, path.removeprefix("runbooks/") if path.startswith("runbooks/") else "")
    page = page or (path if path == MADE else "")
    if page not in known:
        return text
    there = posixpath.relpath(page, posixpath.dirname(uri) or ".")
    return f"{mark}[{text}]({there}{anchor or ''})"

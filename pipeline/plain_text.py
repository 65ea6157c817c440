"""Text of strangers, made safe to show.

One idea: whatever could move a cursor, hide, reorder or clear text becomes a visible escape; all
else, in any script, stays. It is for terminals and log files; it does not escape HTML.
"""

import json
import unicodedata

from stillroom.cache_schemas.scrubbing import scrub

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def plain(text: str, limit: int = 0) -> str:
    """`text` with control, format and private characters escaped, cut to `limit` characters."""
    shown = "".join(
        c.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(c) in HIDDEN
        else c
        for c in text
    )
    return shown[: limit - 1] + "…" if limit and len(shown) > limit else shown


def code_span(text: str, limit: int = 400) -> str:
    """A stranger's text as a code span of a Markdown table: no link, image or HTML can be in one,
    and no credential."""
    shown = plain(scrub(text), limit).replace("`", "'").replace("|", "\\|")
    return f"` {shown} `"


def plain_json(text: str) -> str:
    """JSON text with the same characters as JSON's own escapes; line ends stay."""
    return "".join(
        json.dumps(c)[1:-1] if unicodedata.category(c) in HIDDEN and c != "\n" else c for c in text
    )

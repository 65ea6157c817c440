"""The README of a sealed cache: what a hub shows, and which of its files its viewer opens.

One idea: it follows from the plan alone and says nothing that the manifest does not; it may be
edited or deleted, so nothing binds it.
"""

from stillroom.cache_schemas.manifest import Plan
from stillroom.cache_schemas.scrubbing import scrub
from stillroom.pipeline.plain_text import plain

README = "README.md"

TEXT = """---
pretty_name: Teacher cache {digest}
tags:
- distillation
- teacher-cache
configs:
- config_name: index
  data_files: index/*.parquet
---

# Teacher cache {digest}

What a teacher said about {num_examples:,} examples, for training students without it. The table
above is the index: one row per example, with the beginning of its text.

| | |
|---|---|
| teacher | {teacher} |
| row signals | {rows} |
| dense signals | {dense} |
| codec profile | {profile} |

Read it with stillroom: `stillroom cache show <url>`, `stillroom cache pull <url> <directory>`, or
train from it directly. The format is described in stillroom's FORMAT.md. Look up the licences of
the teacher and of the text before you use or share it.
"""


def card(plan: Plan) -> bytes:
    """The README of a cache of this plan."""
    facts = plan.facts
    teacher = f"{facts['teacher'].get('architecture', 'unknown')}, weights sha256 "
    text = TEXT.format(
        digest=plan.digest[:12],
        num_examples=plan.num_examples,
        teacher=_safe(teacher + str(facts["teacher"].get("weights_sha256", "unknown"))[:16]),
        rows=_safe(", ".join(plan.row_signals) or "none"),
        dense=_safe(", ".join(plan.dense_signals) or "none"),
        profile=_safe(facts["capture"]["profile"]),
    )
    return text.encode()


def _safe(text: str) -> str:
    """A stranger's text as a code span of a table: no link, image or HTML can be in one."""
    shown = plain(scrub(text), 400).replace("`", "'").replace("|", "\\|")
    return f"` {shown} `"

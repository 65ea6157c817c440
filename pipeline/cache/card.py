"""The README of a sealed cache: what a hub shows, which of its files its viewer opens, and how they
are read without stillroom.

One idea: it follows from the plan alone and says nothing that the manifest does not; it may be
edited or deleted, so nothing binds it, and a copy of a stranger's cache gets a new one.
"""

from stillroom.cache_schemas.manifest import Plan
from stillroom.cache_schemas.rows import is_portable
from stillroom.pipeline.plain_text import code_span

README = "README.md"

TEXT = """---
pretty_name: Teacher cache {digest}
license: unknown
size_categories:
- {size}
task_categories:
- text-generation
tags:
- distillation
- teacher-cache
configs:
- config_name: index
  data_files: index/*.parquet
  default: true
---

# Teacher cache {digest}

What a teacher said about {num_examples:,} examples, for training students without it.
{shown}

| | |
|---|---|
| teacher | {teacher} |
| row signals | {rows} |
| dense signals | {dense} |
| codec profile | {profile} |

Read it with stillroom: `stillroom cache show <url>`, `stillroom cache pull <url> <directory>`, or
train from it directly. The format is described in stillroom's FORMAT.md. Look up the licences of
the teacher and of the text before you use or share it.

## Without stillroom

- Index: any reader of Parquet, such as `SELECT * FROM 'index/*.parquet'` in DuckDB.
- Examples: {examples}
{more}"""
SHOWS_INDEX = """The table above is the index: one row per example, with the beginning of its
text."""
SHOWS_ROWS = """The table above shows the first examples as a person reads them: tokens as words,
the teacher's first guesses, its entropy."""
PORTABLE = """Arrow files of plain columns: `polars.read_ipc`,
  `pyarrow.ipc.open_file("rows/000/000000.arrow").read_all()` or
  `datasets.load_dataset("arrow", data_files="rows/*/*.arrow")`. Row t of an example describes the
  prediction made after token `first_row` + t; a signal has a list for every row."""
RECORDS = """the column `record` of `rows/*/*.arrow` is compressed.
  `stillroom cache export <url> <directory> --to parquet` writes nested lists."""
DENSE = """- Dense signals: `zarr.open_group("dense", mode="r")`, one array per signal of shape
  [examples, positions, width]; an example's `dense_lengths` say how many positions it uses.
  {codecs}
"""
PLAIN_CODECS = "Any library of Zarr v3 opens them; of `bf16` the numbers are the bits of bfloat16."
OWN_CODECS = """Their codec needs `pip install --no-deps stillroom` and
  `pip install 'zarr>=3.1.6' pcodec xxhash`, no torch."""

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)


def card(plan: Plan) -> bytes:
    """The README of a cache of this plan."""
    facts, portable = plan.facts, is_portable(plan)
    teacher = f"{facts['teacher'].get('architecture', 'unknown')}, weights sha256 "
    text = TEXT.format(
        digest=plan.digest[:12],
        num_examples=plan.num_examples,
        size=size_category(plan.num_examples),
        shown=SHOWS_INDEX,
        teacher=code_span(teacher + str(facts["teacher"].get("weights_sha256", "unknown"))[:16]),
        rows=code_span(", ".join(plan.row_signals) or "none"),
        dense=code_span(", ".join(plan.dense_signals) or "none"),
        profile=code_span(facts["capture"]["profile"]),
        examples=PORTABLE if portable else RECORDS,
        more=_dense(plan),
    )
    return text.encode()


def _dense(plan: Plan) -> str:
    """How dense signals are read, if there are any."""
    codecs = {shape["codec"]["name"] for shape in plan.dense_signals.values()}
    said = PLAIN_CODECS if codecs <= {"bf16", "fp16"} else OWN_CODECS
    return DENSE.format(codecs=said) if codecs else ""


def size_category(rows: int) -> str:
    """The hub's own word for a number of rows."""
    return next((name for limit, name in SIZES if rows < limit), "n>1T")

"""Where a corpus comes from and how it is prepared: `[prepare]` and its sources.

One idea: what a student learns to say follows from this table alone, so every choice about turns,
templates and rows that cannot be used is a key here. How a run file is read is not decided here.
"""

from typing import Any, Literal

from pydantic import Field

from stillroom.pipeline.config.recommending import Interactions
from stillroom.pipeline.config.strict import PathText, Table


class Source(Table):
    """One `[[prepare.source]]`: where text or chats come from."""

    name: str
    """Label kept with every example; `subset` and per-source weights select by it."""
    kind: Literal[
        "files",
        "pydoc_topics",
        "text",
        "jsonl",
        "parquet",
        "arrow",
        "webdataset",
        "hub",
        "images",
        "interactions",
    ] = "files"
    """`files` takes what the files' names say; `images`: pictures with captions beside them."""
    path: PathText = ""
    """File, glob or directory, or hub data set (`hub`)."""
    split: str = "train"
    """`hub`, and directories of several splits: which of them to read."""
    subset: str = ""
    """`hub`: configuration (subdirectory) of the data set; empty takes its only or default one."""
    revision: str = ""
    """`hub`: branch, tag or commit; empty takes the default branch. The commit is recorded."""
    format: Literal[
        "auto", "text", "messages", "sharegpt", "alpaca", "completion", "preference", "captions"
    ] = "auto"
    """How rows hold texts or conversations; `auto` looks at the first rows and says what it saw."""
    text_column: str = ""
    """Column of texts; empty takes what `format` says."""
    messages_column: str = ""
    """Column of chat messages; empty takes what `format` says."""
    teacher_messages_column: str = ""
    """Column of chat messages that the teacher reads in place of the student's: another prompt
    (an answer key, instructions, documents) before the same answers. Only the student's are kept in
    a cache, with what the teacher said of the answers."""
    image_column: str = ""
    """Column of images (paths, bytes or data URLs) that the messages show."""
    images_folder: str = ""
    """Where paths of images begin; empty takes the folder of the file that names them."""
    tools_column: str = ""
    """Column of tools (a list, or JSON text) for the chat template; empty takes `tools`."""
    documents_column: str = ""
    """Column of documents for the chat template; empty takes `documents`."""
    system_column: str = ""
    """Column of system prompts; empty takes `system`."""
    limit: int = 0
    """Keep at most this many documents; 0 keeps all."""
    interactions: Interactions | None = None
    """`interactions`: columns, filters, and what the teacher is asked."""


class Prepare(Table):
    """Corpus: tokenised, windowed, split by document."""

    source: tuple[Source, ...]
    tokenizer: PathText = ""
    """HF directory or hub id; empty takes the teacher's."""
    window: int = Field(default=512, ge=2)
    """Tokens in one example, at most."""
    overlap: int = Field(default=0, ge=0)
    """Texts: tokens repeated from the window before, as context whose rows are not kept."""
    end_of_text: bool = False
    """Put the tokenizer's end token behind every whole document of text, as a target; conversations
    end as their template says."""
    min_tokens: int = Field(default=2, ge=2)
    """Windows shorter than this are dropped and counted."""
    heldout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of documents held out."""
    turns: Literal["auto", "together", "each", "last"] = "auto"
    """Conversations of several answers. `each`: an example for every answer, with the history as
    it stood then. `auto`: answers share an example where that shows the same. `together`: one
    example, with those answers as targets that stand in it as they were written. `last`: the last
    answer alone."""
    chat_template: str = ""
    """File of a chat template; empty takes the teacher's."""
    template: dict[str, Any] = Field(default_factory=dict)
    """`[prepare.template]`: arguments of the chat template, such as `enable_thinking = false`."""
    leave_out: tuple[str, ...] = ()
    """Fields of messages and rows that the chat template is not given (`["reasoning_content"]`)."""
    long: Literal["cut", "skip", "keep_end"] = "cut"
    """Conversations longer than the window. `cut`: into several, between a question and the answer
    before it, each with the system prompt. `keep_end`: without their oldest questions. `skip`."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Examples that are there twice: one of them, or one that weighs as much as all."""
    processor_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to an image-text teacher's processor, such as `max_pixels`."""
    empty_documents: Literal["error", "skip"] = "error"
    """What a document without text means: a mistake to report, or one to count and leave out."""
    on_error: Literal["stop", "skip"] = "stop"
    """Rows that cannot be used: name up to ten and stop, or write them to `rejects.jsonl`."""
    seed: int = 0
    """Of the split into training and held-out documents."""

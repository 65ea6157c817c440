"""The tables of recommenders: interactions, what the teacher says of items, and the student.

One idea: what the teacher is asked and what is kept of it is in the plan; the student's shape is in
its checkpoint. Losses and steps are in the same `[[objective]]` and `[train]` as for any student.
"""

from typing import Literal

from pydantic import Field, model_validator

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.plain_template import PlainTemplate
from stillroom.pipeline.config.strict import Table


class Interactions(Table):
    """`[prepare.source.interactions]`: who took what, when, and what it is called."""

    catalogue: str = ""
    """File of items (CSV, Parquet, JSONL, `.dat`, `.item`); a directory of MovieLens or RecBole has
    its own."""
    user: str = ""
    """Column of users; empty takes the first that is there of `userId`, `user_id`, `user`."""
    item: str = ""
    """Column of items, in interactions and catalogue; empty takes the first of `movieId`,
    `item_id`, `item`, `asin`."""
    time: str = ""
    """Column of times, numbers or dates; empty takes the first of `timestamp`, `time`."""
    rating: str = ""
    """Column of ratings, which a file needs only with `min_rating`; empty takes `rating`."""
    title: str = ""
    """Column of titles, in the catalogue; empty takes the first of `title`, `movie_title`,
    `name`."""
    text_columns: tuple[str, ...] = ()
    """Further columns of the catalogue that `item_text` may name."""
    encoding: str = ""
    """Of text files; empty takes UTF-8, and for MovieLens' own `.dat` and `u.item` Latin-1 where
    they are not UTF-8."""
    min_rating: float = Field(default=0.0, allow_inf_nan=False)
    """Interactions rated lower are left out and counted."""
    k_core: int = Field(default=5, ge=1)
    """Users and items with fewer interactions are left out, again and again until none has."""
    unknown_items: Literal["error", "skip"] = "error"
    """What an interaction with an item outside the catalogue means: a mistake, or one to count and
    leave out."""
    keep_unused_items: bool = False
    """Keep items that nobody took."""
    history: int = Field(default=10, ge=1)
    """Items before the one in question that teacher and student see, at most."""
    prompt: str = "One person chose these, one after the other:\n\n{history}\n"
    """What the teacher is asked to continue by one line; `{history}` stands for a line per item."""
    line: str = "{title}"
    """One item of the history, as the teacher reads and writes it; braces are written `{{` and
    `}}`."""
    item_text: str = "{title}"
    """What stands for an item where it is embedded; may name `text_columns`, which are empty for a
    title that the teacher writes."""

    @model_validator(mode="after")
    def _templates_have_their_places(self) -> "Interactions":
        if "{history}" not in self.prompt:
            raise ValueError("prompt needs {history}")
        if self.line_template().count("title") != 1 or len((self.line + "|").splitlines()) != 1:
            raise ValueError("line needs {title} once, and is one line")
        if not self.item_template().count("title"):
            raise ValueError("item_text needs {title}: a title that a teacher writes stands there")
        return self

    def line_template(self) -> PlainTemplate:
        """`line`, read."""
        return PlainTemplate.of(self.line, ["title"])

    def item_template(self) -> PlainTemplate:
        """`item_text`, read."""
        return PlainTemplate.of(self.item_text, ["title", *self.text_columns])


OWN_CACHES = ("candidates", "items")
"""Caches of the run itself that need no entry under [train.caches]."""


class Items(Table):
    """`[items]`: one embedding for every item of the catalogue, from the teacher's states."""

    layer: int | Literal["final"] = "final"
    """Block (1-based) whose output is kept; "final" is the state after the final norm."""
    pooling: Literal["last", "mean"] = "last"
    """The state at the text's last token (DLLM2Rec), or the mean over its tokens."""
    codec: Literal["bf16", "fp16", "int8", "fp8", "step"] = "fp16"
    """How an embedding is stored; FORMAT.md states each one's error."""
    step: float = Field(default=0.05, gt=0)
    """Step of the RMS-scaled integers of codec `step`."""
    check: Literal["auto", "always", "never"] = "auto"
    """Compare vLLM with the model's definition before the first shard is kept, as `[capture] check`
    says it for the answers to texts. Not part of the plan."""
    items_per_shard: int = Field(default=1024, ge=1)
    """Items between two commits."""


class Candidates(Table):
    """`[candidates]`: the items that the teacher ranks best after each history."""

    method: Literal["grounded", "scored"] = "grounded"
    """`grounded` (BIGRec): the title that the teacher writes is embedded, the nearest items by L2
    are taken. `scored`: log-probability of each title of a shortlist after the history."""
    k: int = Field(default=10, ge=1, le=1024)
    """Items of one list."""
    seen: Literal["drop", "keep"] = "drop"
    """Whether items of the history itself may be candidates; the paper keeps them."""
    written_tokens: int = Field(default=24, ge=1)
    """`grounded`: tokens that the teacher writes, at most; it stops at the end of a line."""
    shortlist: Literal["popular", "similar"] = "popular"
    """`scored`: the items taken most often in training, or those nearest to the mean embedding of
    the history."""
    shortlist_size: int = Field(default=20, ge=1)
    """`scored`: items of the shortlist; every one costs a prompt."""
    exact: bool = True
    """`grounded`, `similar`: compare with every item; False searches a graph (HNSW), which is
    faster above some 100,000 items and may miss some."""
    histories_per_user: int = Field(default=0, ge=0)
    """Ask about the latest this many training histories of each user; 0 asks about all."""
    check: Literal["auto", "always", "never"] = "auto"
    """Compare vLLM with the model's definition before the first shard is kept, as `[capture] check`
    says it for the answers to texts. Not part of the plan."""
    histories_per_shard: int = Field(default=256, ge=1)
    """Histories between two commits."""
    batch: int = Field(default=128, ge=1)
    """Histories that are answered together; a matter of speed."""

    def check_fits(self, items: int) -> None:
        """Refuse longer lists than can be.

        Args:
            items: of the catalogue.

        Raises:
            ConfigError: k is more than the items, or than the shortlist.
        """
        room = min(items, self.shortlist_size) if self.method == "scored" else items
        if self.k > room:
            what = "shortlist_size" if room < items else "items in the catalogue"
            raise ConfigError(
                f"k = {self.k} candidates of {room} {what}",
                expected=f"k <= {room}",
                where="[candidates]",
                remedy=f"Set k = {room}, or less.",
            )


class Distilled(Table):
    """`[recommender.distilled]`: collaborative embedding distillation (DLLM2Rec section 4.2)."""

    cache: str
    """Name of an item cache under [train.caches]."""
    weight: float = Field(default=0.2, allow_inf_nan=False)
    """Of the projected teacher embedding beside the student's own."""


class Recommender(Table):
    """`[recommender]`: a small sequential recommender in the place of a language-model student."""

    kind: Literal["sasrec", "gru4rec", "caser"] = "sasrec"
    """Self-attention, a GRU, or convolutions over the history."""
    width: int = Field(default=64, ge=1)
    """Of an item's vector."""
    blocks: int = Field(default=1, ge=1)
    """Attention blocks, or layers of the GRU."""
    heads: int = Field(default=1, ge=1)
    """`sasrec`: attention heads; they share the width."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of values left out in training."""
    filters: int = Field(default=16, ge=1)
    """`caser`: horizontal filters of each height, and vertical ones."""
    distilled: Distilled | None = None
    batch: int = Field(default=256, ge=1)
    """Histories of one microbatch."""
    exclude_seen: bool = True
    """Evaluation and `stillroom recommend` leave out what the user has taken already."""
    select_by: Literal["ndcg@1", "ndcg@5", "ndcg@10", "ndcg@20"] = "ndcg@20"
    """The weights exported are those with the best value on the validation rows, among the steps
    that `[train] evaluate_every` names."""
    seed: int = 0
    """Of the first weights."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> "Recommender":
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        return self

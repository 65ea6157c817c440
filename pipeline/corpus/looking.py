"""A corpus for people: some examples with their targets, lengths, shares, and what was noticed.

One idea: everything is read from the corpus as capture will read it, so what is shown is what will
be paid for. It is numbers and texts here; colours are a stage's business.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import PlanMismatch
from stillroom.pipeline.corpus.files import SPLITS, Corpus
from stillroom.pipeline.corpus.overlap import overlap
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.pipeline.record import Example

BINS = 12


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one kind, as text."""

    text: str
    target: bool
    special: bool


def overview(corpus: Corpus) -> dict[str, Any]:
    """Numbers of a corpus, as JSON.

    Returns:
        `counts` per split, `sources` (name -> examples, tokens), `lengths` (bin edges in tokens,
        examples in each), `share_of_targets` and `share_without_targets` (of tokens; of the
        examples that were made), `dropped`, `repeats`, `chats`, `overlap`.
    """
    facts = corpus.facts
    lengths, sources = _sizes(corpus)
    counts, edges = np.histogram(lengths, bins=_edges(facts["settings"]["window"]))
    tokens = sum(split["tokens"] for split in facts["counts"].values())
    targets = sum(split["targets"] for split in facts["counts"].values())
    without = facts["dropped"].get("windows_without_targets", 0)
    return {
        "digest": corpus.digest,
        "counts": facts["counts"],
        "sources": sources,
        "lengths": {"edges": edges.tolist(), "examples": counts.tolist()},
        "share_of_targets": targets / max(tokens, 1),
        "share_without_targets": without / max(without + len(lengths), 1),
        "dropped": facts["dropped"],
        "repeats": facts.get("repeats", {}),
        "chats": facts.get("chats", {}),
        "overlap": overlap(corpus),
    }


def shown_examples(corpus: Corpus, tokenizer: CorpusTokenizer, number: int) -> list[dict[str, Any]]:
    """The first examples of the training split: id, source, tokens, and their `Segment`s.

    Raises:
        PlanMismatch: the corpus is of another tokenizer.
    """
    found, expected = tokenizer.facts["sha256"], corpus.facts["tokenizer"]["sha256"]
    if found != expected:
        raise PlanMismatch(
            f"tokenizer {found[:12]} cannot show a corpus of another",
            expected=expected[:12],
            where=str(corpus.directory),
            remedy="Run `stillroom prepare` again.",
        )
    return [
        {
            "example_id": example.example_id,
            "source": example.source,
            "tokens": len(example.token_ids),
            "targets": int(example.loss_mask[1:].sum()),
            "images": len(example.images),
            "segments": list(segments(example, tokenizer.hf)),
        }
        for example in corpus.split("train")[:number]
    ]


def segments(example: Example, tokenizer: Any) -> Iterator[Segment]:
    """An example as runs of tokens that are targets or not, special or not."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = zip(example.token_ids.tolist(), example.loss_mask.tolist())
    for (target, is_special), run in groupby(tokens, lambda one: (one[1], one[0] in special)):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        yield Segment(text, target, is_special)


def remarks(facts: dict[str, Any]) -> list[str]:
    """What a person should know about a corpus' conversations, in sentences.

    Args:
        facts: of the corpus.
    """
    noticed = Counter(facts.get("chats", {}))
    tokens = sum(split["tokens"] for split in facts["counts"].values())
    named = {name: f"{count:,}" for name, count in noticed.items()}
    named["share"] = f"{noticed['tokens_read_again'] / max(tokens, 1):.0%}"
    return [say.format_map(named) for name, say in REMARKS.items() if noticed[name]]


REMARKS = {
    "tokens_read_again": "{conversations} conversations are {examples_of_conversations} examples, "
    "because later turns change how earlier ones are shown: {tokens_read_again} tokens ({share}) "
    "are read again ([prepare] turns)",
    "conversations_without_an_assistant_turn": "{conversations_without_an_assistant_turn} "
    "conversations have no assistant's turn to learn and are left out",
    "assistant_turns_before_any_message": "{assistant_turns_before_any_message} answers come "
    "before any message; the template cannot ask for them, so they are read and not learned",
    "answers_that_follow_an_answer": "{answers_that_follow_an_answer} answers follow another "
    "answer; each is a turn of its own",
    "empty_answers": "{empty_answers} of {answers} answers are empty: what is learned is to end "
    "the turn",
    "answers_without_an_end_token": "warning: {answers_without_an_end_token} of {answers} answers "
    "end without a special token, so stopping is not learned there",
    "answers_that_end_without_stopping": "warning: {answers_that_end_without_stopping} of "
    "{answers} answers end with a special token that does not stop the model by its generation "
    "config; a student asked with that config goes on",
    "answers_that_begin_inside_a_token": "{answers_that_begin_inside_a_token} of {answers} answers "
    "share their first token with the end of their prompt",
    "answers_after_a_prompt_that_says_otherwise": "warning: "
    "{answers_after_a_prompt_that_says_otherwise} of {answers} answers fill a block that the "
    "generation prompt closes (set [prepare.template], such as enable_thinking = true)",
    "answers_whose_thoughts_the_template_drops": "warning: the chat template leaves out the "
    "reasoning of {answers_whose_thoughts_the_template_drops} of {answers} answers even where it "
    "would be learned ([prepare] chat_template)",
    "conversations_whose_arguments_the_template_drops": "warning: the chat template does not show "
    "every argument of the calls in {conversations_whose_arguments_the_template_drops} of "
    "{conversations} conversations",
    "conversations_with_calls_in_pythons_notation": "the chat template writes calls in Python's "
    "notation in {conversations_with_calls_in_pythons_notation} of {conversations} conversations",
    "marks_that_differ_from_the_rule": "warning: the template's generation marks differ from what "
    "the model would write in {marks_that_differ_from_the_rule} of "
    "{conversations_with_marks_of_their_own} conversations; what it would write counts",
    "template_writes_the_date": "warning: the chat template writes the day of preparation; "
    "another day gives another corpus (set its date by [prepare.template])",
}


def _sizes(corpus: Corpus) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Tokens of every example, and per source the numbers of both."""
    lengths: list[np.ndarray] = []
    sources: dict[str, dict[str, int]] = {}
    for name in SPLITS:
        for source, size in corpus.split(name).sizes():
            lengths.append(size)
            known = sources.setdefault(source, {"examples": 0, "tokens": 0})
            known["examples"] += len(size)
            known["tokens"] += int(size.sum())
    return np.concatenate([*lengths, np.empty(0, int)]), sources


def _edges(window: int) -> np.ndarray:
    """Bin edges from 0 to the window, whole and of one size where it can be."""
    return np.unique(np.linspace(0, window, min(BINS, window) + 1).round().astype(int))

"""`stillroom corpus`: look at what a run's corpus teaches, before a teacher is paid for it."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from stillroom.stages.arguments import AsJson, RunFile
from stillroom.stages.console import coloured, document, on_terminal, put, say, table, warn

group = typer.Typer(name="corpus", help="Look at a prepared corpus.", no_args_is_help=True)
SPECIAL, TARGET, BAR = "dim cyan", "bold green", 40


@group.callback()
def about() -> None:
    """Look at a prepared corpus."""


@group.command()
def show(
    run_file: RunFile,
    examples: Annotated[int, typer.Option(help="How many examples to show.", min=0)] = 3,
    as_json: AsJson = False,
) -> None:
    """Examples with their targets marked, lengths, shares, and what was left out."""
    from stillroom.pipeline import config
    from stillroom.pipeline.corpus.files import Corpus

    run = config.load(run_file)
    present(run, Corpus.open(run.path("corpus")), examples, as_json)


def present(run: Any, corpus: Any, examples: int, as_json: bool) -> None:
    """Show a corpus of a run: as JSON, or for a person."""
    from stillroom.pipeline.corpus.identity import chat_settings
    from stillroom.pipeline.corpus.looking import overview, shown_examples
    from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer

    teacher = run.teacher
    tokenizer = CorpusTokenizer.open(
        run.prepare.tokenizer if run.prepare else "",
        teacher.model if teacher else "",
        teacher.revision if teacher else "",
        teacher.trust_remote_code if teacher else False,
        chat_settings(run.prepare) if run.prepare else None,
    )
    made = shown_examples(corpus, tokenizer, examples)
    seen = overview(corpus)
    if as_json:
        listed = [{**one, "segments": [asdict(s) for s in one["segments"]]} for one in made]
        document(seen | {"examples": listed})
        return
    for example in made:
        _draw(example)
    _numbers(seen)
    tell(corpus)


SHARED = "questions_that_users_share"


def _singular(reason: str, number: int) -> str:
    """A reason whose first word is a plural, for one of them."""
    first, _, rest = reason.partition("_")
    if number != 1 or not first.endswith("s"):
        return reason
    one = first.removesuffix("ies") + "y" if first.endswith("ies") else first.removesuffix("s")
    return f"{one}_{rest}" if rest else one


def tell(corpus: Any) -> None:
    """What was left out of a corpus, and what was noticed in its conversations."""
    from stillroom.pipeline.corpus.looking import remarks
    from stillroom.pipeline.corpus.rejects import FILE

    facts = corpus.facts
    for reason, number in facts["dropped"].items():
        where = f" ({corpus.directory / FILE})" if reason == "rejected_rows" else ""
        if reason == SHARED:
            what = "question is" if number == 1 else "questions are"
            say(f"{number:,} {what} as another user's and asked once; each user keeps the row")
            continue
        say(f"left out: {number:,} {_singular(reason, number).replace('_', ' ')}{where}")
    if repeated := facts.get("repeats", {}).get("documents"):
        kept = (
            "weigh as much as all"
            if facts["settings"].get("duplicates") == "keep"
            else "count once"
        )
        say(f"exact duplicates: {repeated:,} documents; their examples {kept}")
    for remark in remarks(facts):
        say(remark)


def _draw(example: dict[str, Any]) -> None:
    """One example: what is learned is green, or between brackets where there are no colours."""
    words = f"{example['tokens']:,} tokens, {example['targets']:,} targets"
    images = f", {example['images']} images" if example["images"] else ""
    put(f"── {example['source']}  {example['example_id'][:12]}  {words}{images}")
    pieces, inside, marks = [], False, not on_terminal()
    for segment in example["segments"]:
        if segment.target != inside and marks:
            pieces.append(("⟦" if segment.target else "⟧", ""))
        inside = segment.target
        style = SPECIAL if segment.special else ""
        pieces.append((segment.text, f"{style} {TARGET}".strip() if segment.target else style))
    coloured([*pieces, ("⟧" if inside and marks else "", "")])


def _numbers(seen: dict[str, Any]) -> None:
    sources = seen["sources"]
    rows = [[name, f"{s['examples']:,}", f"{s['tokens']:,}"] for name, s in sources.items()]
    table("sources", ["source", "examples", "tokens"], rows)
    edges, counts = seen["lengths"]["edges"], seen["lengths"]["examples"]
    most = max([*counts, 1])
    bars = [
        [f"{low:,} to {high:,}", f"{count:,}", "█" * round(BAR * count / most)]
        for low, high, count in zip(edges, edges[1:], counts)
    ]
    table("lengths", ["tokens", "examples", ""], bars)
    put(f"targets: {seen['share_of_targets']:.1%} of the tokens")
    if seen["share_without_targets"]:
        share = seen["share_without_targets"]
        warn(f"warning: {share:.1%} of the examples had no target at all and are left out")
    _overlap(seen["overlap"])


def _overlap(found: dict[str, int]) -> None:
    if found["examples"]:
        put(f"held-out answers that are in the training split too: {shares(found)}")


def shares(found: dict[str, int]) -> str:
    """How much of some text is in another, in words."""
    shared = found["shared"] / max(found["spans"], 1)
    return (
        f"{shared:.1%} of spans of {found['span']} tokens; {found['examples_shared']:,} of "
        f"{found['examples']:,} examples by half or more"
    )

"""The model card of a trained student: where it is from, for a hub and for whoever finds it.

One idea: it says what `train.json` says, in the hub's own words (`ModelCardData`), and nothing that
is not known: a directory of this machine is no hub id and is left out. What was measured comes in
between two marks, and may be written again; whatever a person writes outside them stays.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stillroom.pipeline.config import Run, Student
from stillroom.pipeline.hub_card import card_of
from stillroom.pipeline.plain_text import code_span
from stillroom.pipeline.training.checkpoint import write_durably
from stillroom.pipeline.training.result import finished_facts

README = "README.md"
HUB = "hf://datasets/"
BEGIN, END = "<!-- stillroom: results -->", "<!-- stillroom: end of results -->"
TAGS = ["distillation", "knowledge-distillation", "stillroom"]

STEPS = re.compile(r"^\| steps \|.*\|$", re.MULTILINE)
BODY = """# {name}

A student that learned from a teacher's recorded answers, made with stillroom. No teacher was in
memory while it was trained.

| | |
|---|---|
| teacher | {teacher} |
| first weights | {first} |
| trained from | {caches} |
| objectives | {objectives} |
{steps}

A cache is derived from its teacher, and this student from both: their licences may bind it.

{begin}
{end}
"""


def write_card(run: Run) -> None:
    """Write the README of a finished run's student; one that is there stays."""
    path = run.path("student", README)
    facts = finished_facts(run)
    if facts is None or path.exists():
        return
    write_durably(path, str(_card(run, facts)))


def write_card_anew(run: Run) -> None:
    """The README of a student that was just exported, perhaps in place of an earlier one: what was
    measured of that one goes, and so do its steps; what a person wrote stays.

    Raises:
        CacheError: the card that is there cannot be read.
    """
    path, facts = run.path("student", README), finished_facts(run)
    if not path.exists() or facts is None:
        write_card(run)
        return
    card = card_of(ModelCard, path.read_bytes(), str(path))
    card.data.eval_results = card.data.model_name = None
    text = _between_marks(card.text, "") if BEGIN in card.text else card.text
    card.text = STEPS.sub(_steps(facts), text)
    write_durably(path, str(card))


def check_card(run: Run) -> None:
    """Refuse a card that results could not be added to, before hours are spent on them.

    Raises:
        CacheError: it cannot be read.
    """
    path = run.path("student", README)
    if path.exists():
        card_of(ModelCard, path.read_bytes(), str(path))


def add_results(run: Run, results: Sequence[EvalResult]) -> None:
    """Put what was measured into the card of a run's student, beside what else was.

    Args:
        run: the run; nothing happens where its student is not finished.
        results: replace older ones of the same data set and measure.

    Raises:
        CacheError: the card that is there cannot be read.
    """
    write_card(run)
    path = run.path("student", README)
    if not path.exists():
        return
    card = card_of(ModelCard, path.read_bytes(), str(path))
    kept = {_key(one): one for one in (*(card.data.eval_results or ()), *results)}
    card.data.model_name = run.name
    card.data.eval_results = list(kept.values())
    card.text = _between_marks(card.text, f"{_table(kept.values())}\n")
    write_durably(path, str(card))


def _between_marks(text: str, results: str) -> str:
    before, _, rest = text.partition(BEGIN)
    after = rest if END not in rest else rest.partition(END)[2]
    return f"{before}{BEGIN}\n{results}{END}{after}"


def hub_id(name: str) -> str:
    """A model's id on the hub; empty for a directory."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    return name if is_id else ""


def _card(run: Run, facts: Mapping[str, Any]) -> ModelCard:
    caches = _caches(run, facts["identity"])
    student, teacher = run.student or Student(), run.teacher.model if run.teacher else ""
    pruned = student.init.startswith("prune")
    origin = student.model or (teacher if pruned else "")
    adapter = facts.get("export", {}).get("form") == "adapter"
    base = hub_id(origin) if student.init != "config" else ""
    images = "vision_config" in run.path("student-initial", "config.json").read_text()
    published = sorted({place for place, _ in caches if place})
    data = ModelCardData(
        base_model=base or None,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=published or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text" if images else "text-generation",
        tags=list(TAGS),
        teacher_caches=[digest for _, digest in caches],
    )
    shown = ", ".join(f"{code_span(place or 'cache')} {digest[:12]}" for place, digest in caches)
    text = BODY.format(
        name=code_span(run.name),
        teacher=_taught_by(facts.get("teachers", ()), teacher),
        first=code_span(f"{student.init} {_shown(origin)}".strip()),
        caches=shown or "no cache",
        objectives=code_span(", ".join(one.name for one in run.objective)),
        steps=_steps(facts),
        begin=BEGIN,
        end=END,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _steps(facts: Mapping[str, Any]) -> str:
    return f"| steps | {facts['steps']:,}, {facts['tokens']:,} tokens |"


def _caches(run: Run, identity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(id on the hub or nothing, digest of the plan) of every cache that was trained from."""
    places = {"train.cache": run.train.cache, **run.train.caches} if run.train else {}
    named = {k.removeprefix("cache "): v for k, v in identity.items() if k.startswith("cache ")}
    return [(_published(places.get(name, "")), digest) for name, digest in sorted(named.items())]


def _published(place: str) -> str:
    named = place.removeprefix(HUB).partition("@")[0]  # what stands behind is a revision
    return "/".join(named.split("/")[:2]) if place.startswith(HUB) else ""


def _taught_by(teachers: Sequence[Mapping[str, Any]], named: str) -> str:
    """Whose answers a student learned, as the caches say; `[teacher]` only where it is looked up.

    Args:
        teachers: of `train.json`; runs of before have none there.
        named: `[teacher] model`.
    """
    if not teachers:
        return f"{code_span(_shown(named))}, as the run file says" if named else "not named"
    said = []
    for one in teachers:
        weights = (
            f", weights sha256 {one['weights_sha256'][:16]}" if "weights_sha256" in one else ""
        )
        known = code_span(one.get("architecture", "unknown")) + weights
        said.append(f"{code_span(_shown(one['model']))} ({known})" if "model" in one else known)
    return "; ".join(said)


def _shown(name: str) -> str:
    """A hub id as it is, of a directory its last name."""
    return hub_id(name) or Path(name).name


def _key(result: EvalResult) -> tuple:
    return result.dataset_type, result.dataset_config, result.metric_type


def _table(results: Any) -> str:
    lines = [
        f"| {code_span(one.dataset_name)} | {code_span(one.metric_name or one.metric_type)} "
        f"| {one.metric_value} |"
        for one in results
    ]
    return "\n".join(["## Results", "", "| data | measure | value |", "|---|---|---|", *lines, ""])

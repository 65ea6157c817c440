"""Teacher-written corpora: answers to prompts, kept as a corpus that capture and training read.

One idea: prompts are read once, answers are drawn in parts that are each committed by one rename,
and when no part is missing the answers become the run's corpus: prompt and answer as one example,
the answer under the loss mask, `behaviour_logprob` beside every token. So a kill costs one part,
workers share only the run's directory, and a capture over this corpus gives the teacher's rows at
the generated positions by the same path as for any other text.

This is SeqKD's data, LLAVADI's data enhancement and the roll-outs of offline MiniLLM. It trains
nothing; rounds are made by running it again with the student that was trained.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.differing import differences
from stillroom.cache_schemas.errors import ConfigError, PlanMismatch
from stillroom.pipeline.capture.plan import engine_facts
from stillroom.pipeline.config import Generate, Prepare, Run, Teacher, require
from stillroom.pipeline.corpus.files import (
    Corpus,
    ExampleFile,
    Split,
    read_examples,
    write_facts,
)
from stillroom.pipeline.corpus.identity import chat_settings, identity
from stillroom.pipeline.corpus.opening import open_source
from stillroom.pipeline.corpus.prompts import PromptReader
from stillroom.pipeline.corpus.scratch import replace_directory, scratch_beside
from stillroom.pipeline.corpus.splits import canonical_json, deal
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer, tokenizer_facts
from stillroom.pipeline.generation.definition import check_writers
from stillroom.pipeline.generation.opening import open_generator
from stillroom.pipeline.generation.parts import Parts, answered
from stillroom.pipeline.generation.writers import Generator, Writers
from stillroom.pipeline.images import ImageStore
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.facts import model_directory, teacher_facts
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.protocol import EngineName

Open = Callable[[], Generator]
DEFINITION = "definition.json"
SHOWN = 5
"""Differences in one message."""


@dataclass(frozen=True, slots=True)
class GenerateProgress:
    """How far one worker has come: prompts answered of its share, answers and tokens written."""

    prompts: int
    total_prompts: int
    answers: int
    tokens: int


def generate(
    run: Run,
    *,
    engine: EngineName = "vllm",
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[GenerateProgress], None] | None = None,
) -> Corpus | None:
    """Answer the run's prompts and make them its corpus; run again to go on after interruption.

    Args:
        run: needs the tables [prepare], [teacher] and [generate].
        engine: what runs whoever writes.
        rank, world_size: this worker's share of the parts.
        on_progress: called after every prompt.

    Returns:
        The corpus at `<run.directory>/corpus`, or None while other workers' parts are missing.

    Raises:
        ConfigError: tables that contradict each other, or a mixture that the engine cannot draw.
        CorpusError: sources or prompts that cannot be used.
        PlanMismatch: teacher and student have different tokenizers; or the run's corpus holds
            the answers of another generation.
    """
    job = _Job.open(run, engine)
    target = run.path("corpus")
    if (made := _made_before(target, job)) is not None:
        return made
    work = run.path(f"generated-{job.digest[:16]}")
    prompts = job.prompts(work)
    parts = Parts(work, prompts, job.settings.prompts_per_part)
    missing = parts.missing(rank, world_size)
    if missing:
        tell = on_progress or (lambda _: None)
        _answer(parts, missing, lambda: job.open_generator(engine, work), tell)
    if parts.missing():
        return None
    _assemble(job, work, parts, target)
    shutil.rmtree(work, ignore_errors=True)
    return Corpus.open(target)


@dataclass(frozen=True)
class _Job:
    """A generation with everything that its result follows from.

    Attributes:
        identity: those facts as JSON.
        check: whether whoever writes is held against its definition; see `[capture] check`.
        digest: names them.
    """

    prepare: Prepare
    settings: Generate
    teacher: Teacher
    tokenizer: CorpusTokenizer
    identity: dict[str, Any]
    check: str

    @classmethod
    def open(cls, run: Run, engine: EngineName) -> "_Job":
        prepare = require(run.prepare, "prepare", run.directory)
        settings = require(run.generate, "generate", run.directory)
        teacher = require(run.teacher, "teacher", run.directory)
        _check(prepare, settings)
        tokenizer = CorpusTokenizer.open(
            prepare.tokenizer,
            teacher.model,
            teacher.revision,
            teacher.trust_remote_code,
            chat_settings(prepare),
        )
        sources = [open_source(source) for source in prepare.source]
        made = identity(prepare, tokenizer, sources) | {
            "generated": {
                "settings": settings.model_dump(mode="json", exclude={"student"}),
                "engine": engine_facts(engine),
                "stop_ids": list(tokenizer.stop_ids),
                "teacher": teacher_facts(teacher, engine),
                "student": _student_facts(settings, tokenizer),
            },
        }
        check = run.capture.check if run.capture else "auto"
        return cls(prepare, settings, teacher, tokenizer, made, check)

    @property
    def digest(self) -> str:
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()

    def prompts(self, work: Path) -> Split:
        """The prompts, read by whichever worker comes first."""
        if not (work / "prompts").is_dir():
            work.mkdir(parents=True, exist_ok=True)
            made = work / f".prompts-{secrets.token_hex(8)}"
            made.mkdir()
            reader = PromptReader(self.prepare, self.settings, self.tokenizer)
            reader.write([open_source(source) for source in self.prepare.source], made)
            facts = {"dropped": dict(reader.dropped), **reader.image_facts}
            (made / "facts.json").write_bytes(canonical_json(facts))
            _rename(made, work / "prompts")
        return Split.open(work / "prompts" / "prompts.arrow")

    def open_generator(self, engine: EngineName, work: Path) -> Generator:
        """Load whoever writes."""
        pictures = None
        if self.tokenizer.has_processor:
            store = ImageStore(work / "prompts" / "images")
            read = lambda sha256: store.path(sha256).read_bytes()  # noqa: E731
            pictures = Pictures(read, self.prepare.processor_args)
        stop_ids = self.tokenizer.stop_ids
        writers = Writers(self.teacher, self.settings, stop_ids, self.prepare.window, pictures)
        generator = open_generator(engine, writers)
        noted = work / DEFINITION
        check_writers(generator, self.prompts(work), pictures, self.check, noted)
        return generator


def _answer(parts: Parts, missing: list[int], start: Open, tell) -> None:
    """Write every missing part; the generator reads ahead over the ends of parts."""
    total = sum(len(parts.prompts(number)) for number in missing)
    done = GenerateProgress(0, total, 0, 0)
    generator = start()
    try:
        wanted = (prompt for number in missing for prompt in parts.prompts(number))
        answers = generator.answer(wanted)
        for number in missing:
            examples: list[Example] = []
            for prompt in parts.prompts(number):
                found = next(answers)
                examples += answered(prompt, found)
                tokens = done.tokens + sum(len(answer.token_ids) for answer in found)
                done = GenerateProgress(done.prompts + 1, total, done.answers + len(found), tokens)
                tell(done)
            parts.write(number, examples)
    finally:
        generator.close()


def _assemble(job: _Job, work: Path, parts: Parts, target: Path) -> None:
    """Put all parts in place as the run's corpus."""
    read = json.loads((work / "prompts" / "facts.json").read_bytes())
    documents: dict[str, None] = {}
    endings: Counter[str] = Counter()
    with scratch_beside(target) as scratch:
        made = scratch / "corpus"
        made.mkdir()
        with ExampleFile(made / "all.arrow") as file:
            for number in range(parts.count):
                for example in read_examples(parts.path(number)):
                    documents[example.document_id] = None
                    ended = int(example.token_ids[-1]) in job.tokenizer.stop_ids
                    endings["ended" if ended else "cut"] += int(example.weight)
                    file.write(example)
        if (images := work / "prompts" / "images").is_dir():
            shutil.copytree(images, made / "images")
        meaning = job.identity | {name: read[name] for name in read if name != "dropped"}
        dealt = deal(made / "all.arrow", documents, job.prepare.heldout, job.prepare.seed, meaning)
        generated = job.identity["generated"] | {"identity": job.digest, "answers": dict(endings)}
        if (noted := work / DEFINITION).is_file():
            generated |= {"definition": json.loads(noted.read_bytes())}
        facts = job.identity | read | dealt | {"generated": generated}
        write_facts(made, facts | {"chat_template": job.tokenizer.template})
        try:
            replace_directory(made, target)
        except OSError:
            if _made_before(target, job) is None:  # else another worker was faster
                raise


def _made_before(target: Path, job: _Job) -> Corpus | None:
    """The corpus in place if it is this generation's; None where there is none, or a prepared one.

    Raises:
        PlanMismatch: it holds the answers of another generation, which are not thrown away.
    """
    if not (target / "corpus.json").is_file():
        return None
    corpus = Corpus.open(target)
    found = corpus.facts.get("generated", {}).get("identity", "")
    if found and found != job.digest:
        kept = {key: corpus.facts[key] for key in job.identity if key in corpus.facts}
        drawn = job.identity["generated"].keys()
        kept["generated"] = {k: v for k, v in kept["generated"].items() if k in drawn}
        different = "; ".join(differences(job.identity, kept)[:SHOWN])
        raise PlanMismatch(
            f"answers of another generation are here: {different}",
            where=str(target),
            remedy="Give the run another directory, or delete this corpus.",
        )
    return corpus if found else None


def _rename(made: Path, target: Path) -> None:
    """Put a directory in place unless another worker has."""
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)


def _check(prepare: Prepare, settings: Generate) -> None:
    if settings.max_tokens >= prepare.window:
        raise ConfigError(
            f"max_tokens = {settings.max_tokens} leaves no prompt in a window of {prepare.window}",
            expected="max_tokens < [prepare] window",
            where="[generate] max_tokens",
        )
    for source in prepare.source:
        if source.teacher_messages_column:
            raise ConfigError(
                f"source '{source.name}' has teacher_messages_column, and a teacher that writes "
                "reads what the student will",
                where="[[prepare.source]]",
                remedy="Leave it out here: write first, and capture the answers as a corpus of two "
                "columns.",
            )


def _student_facts(settings: Generate, tokenizer: CorpusTokenizer) -> dict[str, Any] | None:
    """Identity of the mixture's student.

    Raises:
        PlanMismatch: its tokenizer is not the teacher's.
    """
    if settings.teacher_share == 1 or not settings.student:
        return None
    student = Teacher(model=settings.student).named_by("[generate] student")
    found = tokenizer_facts(str(model_directory(student)))
    if found["sha256"] != tokenizer.facts["sha256"]:
        raise PlanMismatch(
            f"the student's tokenizer is another ({found['sha256'][:12]})",
            expected=f"the teacher's ({tokenizer.facts['sha256'][:12]})",
            where=f"[generate] student {settings.student}",
            remedy="Both write into one text: choose a student with the teacher's tokenizer.",
        )
    return teacher_facts(student)

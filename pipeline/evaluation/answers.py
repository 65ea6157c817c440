"""Answers to held-out instructions, and how near they are to those of the data: Rouge-L.

One idea: MiniLLM's protocol (arXiv 2306.08543, section 3.1): five answers are drawn to each
held-out instruction at temperature 1, each judged against the answer of the data by Rouge-L's
F-measure with stemming (`rouge-score`), and the mean of each of the five draws is a figure, so that
its standard error is over draws. Every draw has its own seed. Their prompts, lengths and data are
not copied.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.cache_schemas.extras import extra_package
from stillroom.pipeline.capture.plan import check_tokenizer
from stillroom.pipeline.config import Evaluate, Generate, Run, Teacher, require
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.pipeline.evaluation.compared import STUDENT, compared
from stillroom.pipeline.generation.reference_writer import ReferenceGenerator
from stillroom.pipeline.generation.writers import Writers
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.training.card import add_results
from stillroom.pipeline.training.checkpoint import write_durably

RESULT = "rouge.json"
LEAST_READ = 0.5
"""Share of letters that are a-z and 0-9; accents of Latin scripts stay far above it."""
DRAWS = 5
"""Answers to each instruction, as MiniLLM has it."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """A held-out text up to its last answer, and that answer.

    Attributes:
        prompt: an example without the answer.
        answer: int32 [n], of the data.
    """

    prompt: Example
    answer: np.ndarray


@dataclass(frozen=True, slots=True)
class Rouge:
    """Rouge-L of one model, in percent.

    Attributes:
        mean: over draws of the mean over instructions.
        standard_error: of that mean, over draws.
        draws: each one's mean.
    """

    mean: float
    standard_error: float
    draws: tuple[float, ...]


def instructions_of(run: Run, count: int = 0) -> tuple[list[Instruction], CorpusTokenizer]:
    """The held-out instructions of a run, and the tokenizer that they are in.

    Args:
        run: its corpus must be prepared.
        count: at most; 0 takes all.

    Raises:
        CorpusError: there is no corpus, or none of its held-out texts answers a prompt.
    """
    corpus = Corpus.open(run.path("corpus"))
    found = [one for one in map(_instruction, corpus.split("heldout")) if one is not None]
    if not found:
        raise CorpusError(
            "no held-out text is an answer to a prompt",
            expected="conversations, or prompts with answers",
            where=str(corpus.directory),
            remedy="Rouge-L is about instructions; for plain text there is `stillroom evaluate`.",
        )
    teacher = require(run.teacher, "teacher", run.name)
    check_tokenizer(corpus, teacher)
    trusts = teacher.trust_remote_code
    tokenizer = CorpusTokenizer.open("", teacher.model, teacher.revision, trusts)
    return found[: count or None], tokenizer


def _instruction(example: Example) -> Instruction | None:
    learned = np.flatnonzero(example.loss_mask)
    if not len(learned):
        return None
    end = int(learned[-1]) + 1
    gaps = np.flatnonzero(~example.loss_mask[:end])
    start = int(gaps[-1]) + 1 if len(gaps) else 0
    if start < 2:  # one token that begins a text is no prompt
        return None
    tokens, mask = example.token_ids[:start], np.zeros(start, dtype=bool)
    name = content_id(tokens, mask)
    images = tuple(one for one in example.images if one.start < start)
    prompt = Example(name, example.document_id, example.source, tokens, mask, images)
    return Instruction(prompt, example.token_ids[start:end])


def written(
    model: Teacher, prompts: Sequence[Example], settings: Generate, stop_ids: tuple[int, ...]
) -> Iterator[list[np.ndarray]]:
    """What a model answers: for each prompt `settings.n` arrays of ids."""
    longest = max(len(one.token_ids) for one in prompts) + settings.max_tokens
    generator = ReferenceGenerator(Writers(model, settings, stop_ids, longest))
    try:
        for answers in generator.answer(prompts):
            yield [one.token_ids for one in answers]
    finally:
        generator.close()


def side_by_side(
    run: Run, count: int, on_model: Callable[[str], None] = lambda _: None
) -> list[tuple[str, str, dict[str, str]]]:
    """(prompt, answer of the data, label -> answer) of held-out instructions; the most probable
    token every time, or as `[generate]` says."""
    given = run.generate or Generate(temperature=0.0)
    settings = given.model_copy(update={"n": 1, "teacher_share": 1.0, "student": ""})
    found, tokenizer = instructions_of(run, count)
    prompts = [one.prompt for one in found]
    said: list[dict[str, str]] = [{} for _ in found]
    for label, model in compared(run).items():
        on_model(label)
        for own, (ids,) in zip(said, written(model, prompts, settings, tokenizer.stop_ids)):
            own[label] = text_of(tokenizer, ids)
    return [
        (text_of(tokenizer, one.prompt.token_ids), text_of(tokenizer, one.answer), own)
        for one, own in zip(found, said)
    ]


def measure_rouge(
    run: Run, max_tokens: int = 256, on_model: Callable[[str], None] = lambda _: None
) -> dict[str, Rouge]:
    """Rouge-L of the teacher and every student on the held-out instructions; keeps `rouge.json`.

    Args:
        run: `[evaluate] examples` bounds the instructions.
        max_tokens: of an answer.
        on_model: called with the label of each before it answers.

    Raises:
        ConfigError: `rouge-score` is not installed.
        CorpusError: no held-out text is an answer to a prompt, or they are in a script that
            Rouge-L does not read.
    """
    scorer = _scorer()
    found, tokenizer = instructions_of(run, (run.evaluate or Evaluate()).examples)
    wanted = [text_of(tokenizer, one.answer) for one in found]
    check_script(wanted, str(run.path("corpus")))
    prompts = [one.prompt for one in found]
    settings = Generate(n=DRAWS, temperature=1.0, max_tokens=max_tokens)
    scores = {}
    for label, model in compared(run).items():
        on_model(label)
        answers = written(model, prompts, settings, tokenizer.stop_ids)
        values = [
            [_rouge_l(scorer, right, text_of(tokenizer, ids)) for ids in drawn]
            for right, drawn in zip(wanted, answers)
        ]
        scores[label] = _summed(np.array(values))
    _keep(run, scores, len(found), max_tokens)
    return scores


def _scorer() -> Any:
    scoring = extra_package("rouge_score.rouge_scorer", "eval", "--rouge-l")
    return scoring.RougeScorer(["rougeL"], use_stemmer=True)


def check_script(texts: Sequence[str], where: str) -> None:
    """Refuse texts of which `rouge-score` would see nothing: it drops all but a-z and 0-9.

    Raises:
        CorpusError: fewer than half of the letters are such.
    """
    letters = [letter for text in texts for letter in text.lower() if letter.isalnum()]
    read = sum(letter.isascii() for letter in letters)
    if read < LEAST_READ * len(letters):
        raise CorpusError(
            f"Rouge-L reads {read / len(letters):.0%} of the answers' letters: it knows a-z and "
            "0-9 alone",
            expected=f"at least {LEAST_READ:.0%}",
            where=where,
            remedy="In another script every answer would count 0: use `stillroom evaluate`.",
        )


def _rouge_l(scorer: Any, right: str, said: str) -> float:
    return 100 * scorer.score(target=right, prediction=said)["rougeL"].fmeasure


def _summed(values: np.ndarray) -> Rouge:
    """Of values [instructions, draws]."""
    draws = values.mean(axis=0)
    error = draws.std(ddof=1) / np.sqrt(len(draws))
    return Rouge(float(draws.mean()), float(error), tuple(draws.tolist()))


def text_of(tokenizer: CorpusTokenizer, ids: np.ndarray) -> str:
    """Ids as a person reads them: without special tokens."""
    return tokenizer.hf.decode(ids, skip_special_tokens=True).strip()


def _keep(run: Run, scores: Mapping[str, Rouge], count: int, max_tokens: int) -> None:
    from huggingface_hub import EvalResult

    models = {label: asdict(one) for label, one in scores.items()}
    facts = {"models": models, "instructions": count, "max_tokens": max_tokens}
    write_durably(run.path(RESULT), json.dumps(facts, indent=2) + "\n")
    own = scores.get(STUDENT)
    if own is None:
        return
    told = EvalResult(
        task_type="text-generation",
        dataset_type="held-out-instructions",
        dataset_name=f"{count} held-out instructions",
        metric_type="rouge",
        metric_name=f"Rouge-L, {DRAWS} draws, ± {own.standard_error:.2f}",
        metric_value=round(own.mean, 4),
    )
    add_results(run, [told])

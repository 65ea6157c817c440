"""Held-out measurement: how far each student is from the live teacher.

One idea: the yardstick is independent of the cache: full-vocabulary KL(teacher || student) against
the teacher itself, run here under transformers, on documents that nobody trained on. Logits exist
for a chunk of rows at a time.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CorpusError, StudentError
from stillroom.cache_schemas.plan import Plan
from stillroom.pipeline.capture.plan import check_tokenizer
from stillroom.pipeline.config import Run, Teacher, require
from stillroom.pipeline.config.training import Attention, Evaluate
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.privileged import asked
from stillroom.pipeline.corpus.tokenizer import vocabulary
from stillroom.pipeline.evaluation.scores import Scores, Sums
from stillroom.pipeline.evaluation.seen_text import seen_in_training
from stillroom.pipeline.evaluation.students import students_of
from stillroom.pipeline.record import Example
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.states import StudentStates, forward_states
from stillroom.pipeline.teacher.facts import model_directory, teacher_facts
from stillroom.pipeline.teacher.overrides import check_applicable
from stillroom.pipeline.teacher.reference.engine import load_merged
from stillroom.pipeline.teacher.sameness import check_same_teacher
from stillroom.pipeline.training.checkpoint import write_durably
from stillroom.pipeline.training.result import finished_facts

RESULT = "evaluation.json"
ROWS_PER_CHUNK = 256


@dataclass(frozen=True, slots=True)
class EvaluateProgress:
    """Examples measured, examples in all, and the mean KL of each student so far."""

    done: int
    total: int
    kl: dict[str, float]


def evaluate(
    run: Run, on_progress: Callable[[EvaluateProgress], None] | None = None
) -> dict[str, Scores]:
    """Measure the teacher and every student of a run, and write `evaluation.json`.

    See `students.students_of` for which; a run that trains nothing measures those that it names.

    Raises:
        CorpusError: there is no held-out text.
        StudentError: a student cannot be loaded or has another vocabulary.
        PlanMismatch: the corpus or the cache of this run is of another teacher.
        ConfigError: an engine argument of [teacher] that transformers cannot apply.
    """
    corpus, chosen = text_of(run)
    start = time.perf_counter()
    students = students_of(run)
    found = measure_on(run, corpus, chosen, students, on_progress)
    seconds = time.perf_counter() - start
    _write(run, found, chosen, seconds, seen_in_training(run, students, corpus, chosen))
    return found


def text_of(run: Run) -> tuple[Corpus, list[Example]]:
    """What a run is measured on, as [evaluate] chooses it.

    Raises:
        CorpusError: there is none.
    """
    settings = run.evaluate or Evaluate()
    place = settings.corpus or run.path("corpus")
    if not (settings.corpus or run.prepare or Path(place).exists()):
        raise CorpusError(
            f"there is no corpus in {place}, and no [prepare] to make one",
            where=run.name,
            remedy="Name a prepared corpus: [evaluate] corpus.",
        )
    corpus = Corpus.open(place)
    chosen = list(corpus.split(settings.split))[: settings.examples or None]
    if not chosen:
        where = '[prepare] heldout, or [evaluate] split = "train"'
        raise CorpusError("there is no held-out text", where=where)
    return corpus, chosen


def measure_on(
    run: Run,
    corpus: Corpus,
    chosen: Sequence[Example],
    students: Mapping[str, str],
    on_progress: Callable[[EvaluateProgress], None] | None = None,
) -> dict[str, Scores]:
    """Students against a run's teacher on a text of `text_of`; raises as `evaluate`."""
    settings = run.evaluate or Evaluate()
    teacher: Teacher = require(run.teacher, "teacher", run.name)
    check_tokenizer(corpus, teacher)
    _check_cache(run, teacher)
    return measure(teacher, students, chosen, settings.precision, on_progress, settings.attention)


def _check_cache(run: Run, teacher: Teacher) -> None:
    """Refuse a teacher that is not the one which this run's own cache is of, if there is one."""
    path = run.path("cache", layout.PLAN)
    if not path.is_file():
        return
    kept = Plan.from_bytes(path.read_bytes(), str(path)).facts["teacher"]
    remedy = "Name the teacher that made the cache under [teacher], as it was then."
    # It is run by transformers in float32 here, however it was run there.
    check_same_teacher(teacher_facts(teacher), kept, "[teacher]", remedy, as_run=False)


def measure(
    teacher: Teacher | str,
    students: Mapping[str, str],
    examples: Sequence[Example],
    precision: str = "float32",
    on_progress: Callable[[EvaluateProgress], None] | None = None,
    attention: Attention = "auto",
) -> dict[str, Scores]:
    """Compare students with a live teacher on given examples.

    Args:
        teacher: loaded in float32, with its own attention and `hf_overrides`; or the directory or
            hub id of one.
        students: label -> HF directory or hub id.
        examples: text; rows that predict tokens under the loss mask count.
        precision: of the forward passes.
        on_progress: called after every example.
        attention: see `[evaluate]`.

    Returns:
        "teacher" and every label -> scores.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = Teacher(model=teacher) if isinstance(teacher, str) else teacher
    models = _load(teacher, students, attention)
    models = {label: model.to(device).eval() for label, model in models.items()}
    tokens = _tokens_of(teacher, models).to(device)
    _check_vocabularies(models, tokens)
    sums = {label: Sums(_size(model)) for label, model in models.items()}
    for number, example in enumerate(examples):
        with torch.inference_mode(), _autocast(device, precision):
            _measure_one(models, sums, example, device, tokens)
        if on_progress is not None:
            means = {label: value.mean_kl() for label, value in sums.items()}
            on_progress(EvaluateProgress(number + 1, len(examples), means))
    return {label: value.scores() for label, value in sums.items()}


def _load(teacher: Teacher, students: Mapping[str, str], attention: Attention) -> dict[str, Any]:
    check_applicable(teacher)
    chosen: dict[str, Any] = {"dtype": "float32"}
    if attention != "auto":
        chosen["attention"] = attention
    loaded = {"teacher": load_merged(teacher.model_copy(update=chosen))}
    own = "eager" if attention == "auto" else attention
    return loaded | {label: load(path, own) for label, path in students.items()}


def _measure_one(models, sums, example: Example, device, tokens: torch.Tensor) -> None:
    ids = torch.as_tensor(example.token_ids, dtype=torch.long, device=device)
    # Row t predicts token t + 1.
    rows = torch.as_tensor(example.loss_mask[1:].nonzero()[0], device=device)
    places = torch.arange(len(ids), device=device)[None]
    told = torch.as_tensor(asked(example).token_ids, dtype=torch.long, device=device)
    moved = len(told) - len(ids)  # a teacher may have read another prompt before the same answer
    states = {label: forward_states(m, ids[None], places) for label, m in models.items()}
    if example.teacher_prompt is not None:
        at = torch.arange(len(told), device=device)[None]
        states["teacher"] = forward_states(models["teacher"], told[None], at)
    parts: dict[str, list] = {label: [] for label in models}
    for chunk in rows.split(ROWS_PER_CHUNK):
        target = ids[chunk + 1]
        truth = _logprobs(states["teacher"], chunk + moved)
        for label in models:
            own = truth if label == "teacher" else _logprobs(states[label], chunk)
            parts[label].append(_compare(truth, own, target, tokens))
    for label, found in parts.items():
        sums[label].add(*(torch.cat(column) for column in zip(*found)))


def _logprobs(states: StudentStates, rows: torch.Tensor) -> torch.Tensor:
    """fp32 log-softmax [rows, V] of chosen rows over the whole head, as transformers has it."""
    head = states.head
    logits = nn.functional.linear(states.at(rows), head.weight, head.bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(dim=-1)


def _compare(truth: torch.Tensor, own: torch.Tensor, target, tokens: torch.Tensor) -> tuple:
    """Per row: KL(truth || own), whether the first choices agree, -log own(target), own mass on
    ids that no token has, and KL(own || truth).

    The teacher has no mass on columns that only the student has; what the student counts there it
    has lost. Columns that only the teacher has are padding, and are left out of its softmax.
    """
    width = own.shape[1]
    if truth.shape[1] > width:
        truth = truth[:, :width].log_softmax(dim=-1)
    shared = own[:, : truth.shape[1]]
    kl = (truth.exp() * (truth - shared)).sum(dim=-1)
    no_token = own.exp()[:, ~tokens[:width]].sum(dim=-1)
    hits = truth.argmax(-1) == own.argmax(-1)
    both = shared.log_softmax(dim=-1)
    reverse = (both.exp() * (both - truth)).sum(dim=-1)
    return kl, hits, -own.gather(1, target[:, None])[:, 0], no_token, reverse


def _tokens_of(teacher: Teacher, models: Mapping[str, Any]) -> torch.Tensor:
    """bool [widest head]: which ids are tokens of the teacher's tokenizer."""
    width = max(_head_rows(model) for model in models.values())
    tokens = torch.zeros(width, dtype=torch.bool)
    known = vocabulary(str(model_directory(teacher)), teacher.trust_remote_code)
    tokens[[number for number in known.values() if number < width]] = True
    return tokens


def _head_rows(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _check_vocabularies(models: Mapping[str, Any], tokens: torch.Tensor) -> None:
    """Heads may differ by padding, not by tokens."""
    needed = int(tokens.nonzero().max()) + 1
    sizes = {label: _head_rows(model) for label, model in models.items()}
    if min(sizes.values()) < needed:
        raise StudentError(
            f"vocabularies differ: {sizes}",
            expected=f"at least {needed}, the ids of the teacher's tokenizer",
            remedy="Compare students of one tokenizer.",
        )


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _autocast(device: torch.device, precision: str) -> Any:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _write(
    run: Run,
    found: Mapping[str, Scores],
    examples: list[Example],
    seconds: float,
    seen: dict[str, dict[str, int]],
) -> None:
    facts = {
        "models": {label: asdict(scores) for label, scores in found.items()},
        "examples": len(examples),
        "rows": int(sum(example.loss_mask[1:].sum() for example in examples)),
        "seconds": seconds,
        "seen_in_training": seen,
        "steps": (finished_facts(run) or {}).get("steps"),  # of this run's student, as it was then
    }
    run.path().mkdir(parents=True, exist_ok=True)  # a run that only measures has none yet
    write_durably(run.path(RESULT), json.dumps(facts, indent=2) + "\n")

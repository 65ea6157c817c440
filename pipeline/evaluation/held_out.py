"""Held-out measurement: how far each student is from the live teacher.

One idea: the yardstick is independent of the cache: full-vocabulary KL(teacher || student) against
the teacher itself, run here under transformers, on documents that nobody trained on. Logits exist
for a chunk of rows at a time.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import CorpusError, StudentError
from stillroom.pipeline.config import Run, Teacher, require
from stillroom.pipeline.config.training import Evaluate
from stillroom.pipeline.record import Example
from stillroom.pipeline.student.model import load
from stillroom.pipeline.student.states import StudentStates, forward_states
from stillroom.pipeline.teacher.facts import model_directory
from stillroom.pipeline.training.checkpoint import write_durably

RESULT = "evaluation.json"
ROWS_PER_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Scores:
    """One model on the held-out text; every figure is a mean over the same rows.

    Attributes:
        kl: KL(teacher || model) over the full vocabulary, nats per token; 0 for the teacher.
        kl_standard_error: of that mean, over examples (rows of one example are not independent).
        top1: share of rows where the most probable token is the teacher's.
        perplexity: exp of the mean -log p of the text's own tokens.
        parameters: of the model.
    """

    kl: float
    kl_standard_error: float
    top1: float
    perplexity: float
    parameters: int


@dataclass
class _Sums:
    """Running sums of one model."""

    parameters: int
    kl: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    hits: int = 0
    nll: float = 0.0

    def add(self, kl: torch.Tensor, hits: torch.Tensor, nll: torch.Tensor) -> None:
        self.kl.append(float(kl.double().sum()))
        self.rows.append(len(kl))
        self.hits += int(hits.sum())
        self.nll += float(nll.double().sum())

    def scores(self) -> Scores:
        total, sums = sum(self.rows), torch.tensor(self.kl, dtype=torch.float64)
        rows = torch.tensor(self.rows, dtype=torch.float64)
        mean = float(sums.sum() / total)
        # Ratio estimator: the examples are the independent units, of unequal size.
        spread = float(((sums - mean * rows) ** 2).sum().sqrt() / total)
        perplexity = float(torch.tensor(self.nll / total, dtype=torch.float64).exp())
        return Scores(mean, spread, self.hits / total, perplexity, self.parameters)


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

    Students are `before` (untrained), `after` (trained) and those named in `[evaluate]`.

    Raises:
        CorpusError: there is no held-out text.
        StudentError: a student cannot be loaded or has another vocabulary.
    """
    from stillroom.pipeline.corpus.preparing import Corpus

    settings = run.evaluate or Evaluate()
    examples = list(Corpus.open(run.path("corpus")).split("heldout"))
    chosen = examples[: settings.examples or None]
    if not chosen:
        raise CorpusError("there is no held-out text", where="[prepare] heldout")
    teacher: Teacher = require(run.teacher, "teacher", run.name)
    start = time.perf_counter()
    found = measure(
        str(model_directory(teacher)), students_of(run), chosen, settings.precision, on_progress
    )
    _write(run, found, chosen, time.perf_counter() - start)
    return found


def students_of(run: Run) -> dict[str, str]:
    """Label -> HF directory of every student that a run compares.

    Raises:
        StudentError: a directory is missing.
    """
    named = {"before": str(run.path("student-initial")), "after": str(run.path("student"))}
    named |= (run.evaluate or Evaluate()).students
    for label, directory in named.items():
        if not (Path(directory) / "config.json").exists():
            raise StudentError(
                f"student '{label}' is not there",
                where=directory,
                remedy="Train it first with `stillroom train`, or correct [evaluate] students.",
            )
    return named


def measure(
    teacher: str,
    students: Mapping[str, str],
    examples: Sequence[Example],
    precision: str = "float32",
    on_progress: Callable[[EvaluateProgress], None] | None = None,
) -> dict[str, Scores]:
    """Compare students with a live teacher on given examples.

    Args:
        teacher: HF directory or hub id.
        students: label -> HF directory or hub id.
        examples: text; rows that predict tokens under the loss mask count.
        precision: of the forward passes.
        on_progress: called after every example.

    Returns:
        "teacher" and every label -> scores.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {"teacher": load(teacher)} | {label: load(path) for label, path in students.items()}
    models = {label: model.to(device).eval() for label, model in models.items()}
    vocabulary = _common_vocabulary(models)
    sums = {label: _Sums(_size(model)) for label, model in models.items()}
    for number, example in enumerate(examples):
        with torch.inference_mode(), _autocast(device, precision):
            _measure_one(models, sums, example, device, vocabulary)
        if on_progress is not None:
            means = {label: sum(s.kl) / sum(s.rows) for label, s in sums.items()}
            on_progress(EvaluateProgress(number + 1, len(examples), means))
    return {label: value.scores() for label, value in sums.items()}


def _measure_one(models, sums, example: Example, device, vocabulary: int) -> None:
    ids = torch.as_tensor(example.token_ids, dtype=torch.long, device=device)
    # Row t predicts token t + 1.
    rows = torch.as_tensor(example.loss_mask[1:].nonzero()[0], device=device)
    places = torch.arange(len(ids), device=device)[None]
    states = {label: forward_states(m, ids[None], places) for label, m in models.items()}
    parts: dict[str, list] = {label: [] for label in models}
    for chunk in rows.split(ROWS_PER_CHUNK):
        target = ids[chunk + 1]
        truth = _logprobs(states["teacher"], chunk, vocabulary)  # [rows, V]
        for label in models:
            own = truth if label == "teacher" else _logprobs(states[label], chunk, vocabulary)
            parts[label].append(_compare(truth, own, target))
    for label, found in parts.items():
        sums[label].add(*(torch.cat(column) for column in zip(*found)))


def _logprobs(states: StudentStates, rows: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """fp32 log-softmax [rows, vocabulary] of chosen rows."""
    head = states.head
    bias = None if head.bias is None else head.bias[:vocabulary]
    logits = nn.functional.linear(states.at(rows), head.weight[:vocabulary], bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(dim=-1)


def _compare(truth: torch.Tensor, own: torch.Tensor, target: torch.Tensor) -> tuple:
    """Per row: KL(truth || own), whether the first choices agree, -log own(target)."""
    kl = (truth.exp() * (truth - own)).sum(dim=-1)  # nats
    return kl, truth.argmax(-1) == own.argmax(-1), -own.gather(1, target[:, None])[:, 0]


def _common_vocabulary(models: Mapping[str, Any]) -> int:
    """Columns that all heads have; padding beyond them carries no token."""
    sizes = {label: m.get_output_embeddings().weight.shape[0] for label, m in models.items()}
    smallest = min(sizes.values())
    if max(sizes.values()) - smallest > max(1024, smallest // 50):
        raise StudentError(
            f"vocabularies differ: {sizes}", remedy="Compare students of one tokenizer."
        )
    return smallest


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _autocast(device: torch.device, precision: str) -> Any:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _write(run: Run, found: Mapping[str, Scores], examples: list[Example], seconds: float) -> None:
    facts = {
        "models": {label: asdict(scores) for label, scores in found.items()},
        "examples": len(examples),
        "rows": int(sum(example.loss_mask[1:].sum() for example in examples)),
        "seconds": seconds,
    }
    write_durably(run.path(RESULT), json.dumps(facts, indent=2) + "\n")

"""Training a recommender: the trainer of all students, on rows of interactions.

One idea: steps, ranks, checkpoints, exact resume, curves and the end are `Training`'s; what is here
is what a recommender is made of, and that the weights which go out are those with the best
validation ranking. The best so far lies in one file named by its step, so a run that was stopped
chooses among the same weights. The test rows are never looked at.
"""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.cache.care.empty_lists import EmptyLists
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.config.recommending import Recommender
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.data.histories import HistoryLoader, Rows
from stillroom.pipeline.data.loader import Geometry
from stillroom.pipeline.objectives.recommending import RankingDistiller, terms_of
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.recommenders.export import export
from stillroom.pipeline.student.recommenders.model import initial
from stillroom.pipeline.student.recommenders.ranks import measures, ranks
from stillroom.pipeline.training.checkpoint import (
    Checkpoints,
    TrainingState,
    trainable,
)
from stillroom.pipeline.training.exporting import form_of
from stillroom.pipeline.training.identity import HOW_NOT_WHAT
from stillroom.pipeline.training.interactions import Interactions
from stillroom.pipeline.training.lock import exclusive
from stillroom.pipeline.training.optimization import optimizer_of
from stillroom.pipeline.training.parallel import Parallel
from stillroom.pipeline.training.result import TrainResult, keep
from stillroom.pipeline.training.run import resolved
from stillroom.pipeline.training.stepping import Progress, Stepper
from stillroom.pipeline.training.trainer import Training

BEST = "best.safetensors"
CHOOSES = {"evaluate_every"}
"""How often validation is looked at decides which weights go out, so here it is part of a run."""
FOR_LANGUAGE_MODELS = (
    "activation_checkpointing",
    "batch_tokens",
    "ema",
    "export_dtype",
    "freeze",
    "heldout",
    "heldout_cache",
    "images",
    "joined",
    "keep_best",
    "lora",
    "parallel",
    "patience",
    "sequence_length",
)
"""Keys of [train] that would be ignored, or choose by the lowest value."""
INSTEAD = {
    "batch_tokens": " [recommender] batch is the number of histories.",
    "keep_best": " [recommender] select_by chooses.",
}


def train_recommender(
    run: Run,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_note: Callable[[str], None] = lambda _: None,
) -> TrainResult:
    """Train the recommender of a run; see `trainer.train`.

    Args:
        run: needs [recommender], [[objective]], [train], and a corpus of interactions.

    Raises:
        Interrupted: stopped on request; the same call goes on.
        StillroomError: the run, the corpus and the caches do not fit.
    """
    settings = require(run.train, "train", run.name)
    parallel = Parallel.start()
    try:
        with exclusive(run.path(), parallel):
            training = RecommenderTraining(run, settings, parallel, {}, on_note)
            return training.run(on_progress, stop)
    finally:
        parallel.close()


class RecommenderTraining(Training):
    """One process's part in one run."""

    measured_on = "validation"

    def __post_init__(self):
        run, settings = self.settings_run, self.settings
        _check_settings(settings)
        self.settings = settings = resolved(settings, self.parallel.device)
        self.table: Recommender = require(run.recommender, "recommender", run.name)
        self.data = Interactions(run, settings)
        self.terms = terms_of(run.objective, self.data.facts())
        self.used = {term.table.cache for term in self.terms} - {""}
        self.initial = run.path()
        self.initial.mkdir(parents=True, exist_ok=True)
        self.identity = self._identity()

    def build(self) -> None:
        """Make the student, its loader and everything that trains it."""
        settings, parallel, data = self.settings, self.parallel, self.data
        listed = {t.table.cache for t in self.terms if "candidate_ids" in t.needs.signals}
        self.rows = data.rows(listed)
        _check_lengths(self.terms, self.rows)
        self._tell_answered()
        part = self.table.distilled
        own = None if part is None else data.vectors(part.cache)
        model = initial(self.table, len(data.catalogue), data.length, own)
        hinted = {name: data.vectors(name) for name in self.used - listed}
        torch.manual_seed(settings.seed)
        device = parallel.device
        vectors = {name: found.to(device) for name, found in hinted.items()}
        self.distiller = RankingDistiller(
            model.train(), self.terms, data.counts().to(device), vectors
        ).to(device)
        self.module = parallel.wrap(self.distiller, settings)
        parameters = [parameter for _, parameter in trainable(self.distiller)]
        self.optimizer = optimizer_of(parameters, settings)
        self.stepper = Stepper(settings, parallel, self.distiller, self.module, self.optimizer, [])
        self.checkpoints = Checkpoints(
            self.settings_run.path("checkpoints"),
            parallel,
            settings.keep_last,
            settings.async_checkpoint,
        )
        geometry = Geometry(
            1, self.table.batch, settings.accumulate, parallel.rank, parallel.world_size
        )
        self.loader = HistoryLoader(self.rows, geometry, settings.seed)

    def _tell_answered(self) -> None:
        """A teacher that was asked about few rows teaches little, which no curve shows."""
        for name, where in self.rows.answers.items():
            known = int((where >= 0).sum())
            if known < len(where):
                self._note(f"cache '{name}' answers {known:,} of {len(where):,} training rows")
            found = EmptyLists.of(self.rows.candidates[name][0], self.data.caches[name].plan)
            if found.words:
                left = int(self.rows.answered(name).sum())
                has = f"{left:,} of {len(where):,} training rows have one with an item"
                self._note(f"cache '{name}': {found.words}; {has}")

    def _identity(self) -> dict[str, Any]:
        """Everything that makes a run what it is, flat, so that a difference has a name."""
        # Where no sequence is longer, another `history` asks the teacher the same questions, so the
        # corpus has the same digest; but it is a shape of the student's.
        identity = {"corpus": self.data.corpus.digest, "corpus history": self.data.length}
        part = self.table.distilled
        for name in sorted(self.used | ({part.cache} if part else set())):
            if name in self.data.caches:
                identity[f"cache {name}"] = self.data.caches[name].plan.digest
        tables = {"recommender": self.table, "train": self.settings}
        lines = {f"objective[{n}]": line for n, line in enumerate(self.settings_run.objective)}
        for label, table in (tables | lines).items():
            left_out = HOW_NOT_WHAT - CHOOSES if label == "train" else set()
            for key, value in table.model_dump(mode="json").items():
                if key not in left_out:
                    # How often students are compared may change for others, and decides here.
                    chooses = "chosen by " if label == "train" and key in CHOOSES else ""
                    identity[f"{chooses}{label}.{key}"] = value
        return identity

    def _heldout(self, step: int) -> dict[str, float]:
        """Validation measures when it is time for them; the best weights are kept."""
        every, last = self.settings.evaluate_every, self.settings.steps
        if not self.parallel.is_main or (step != last and (not every or step % every)):
            return {}
        found = self.validate()
        self._keep_if_best(step, found[self.table.select_by])
        return found

    def validate(self) -> dict[str, float]:
        """Mean measures on the validation rows."""
        histories, model = self.data.histories, self.distiller.model
        rows = histories.rows("validation")
        targets = histories.items[rows].astype(np.int64)

        def seen(row: int) -> np.ndarray:
            return histories.seen(int(rows[row]))

        left_out = seen if self.table.exclude_seen else None
        found = measures(ranks(model, self.data.windows(rows), targets, left_out))
        return {name: float(values.mean()) for name, values in found.items()}

    def _keep_if_best(self, step: int, value: float) -> None:
        """The highest value wins, and of equal ones the earliest step."""
        path = self.settings_run.path(BEST)
        if path.exists():
            held = _metadata(path)
            if (float(held["value"]), -int(held["step"])) >= (value, -step):
                return
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(self.distiller)}
        staging = path.with_name(path.name + ".part")
        save_file(tensors, staging, {"step": str(step), "value": repr(value)})
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        staging.replace(path)

    def _resume(self) -> TrainingState:
        state, path = super()._resume(), self.settings_run.path(BEST)
        every, steps = self.settings.evaluate_every, self.settings.steps
        if not state.step:
            # A run that has no checkpoint yet has no best weights either.
            path.unlink(missing_ok=True)
        elif state.step >= (every or steps):
            self.parallel.together(lambda: _metadata(path))
        return state

    def _finish(self, state: TrainingState, seconds: float) -> TrainResult:
        """Export the best student and say so; files are written by the main process."""
        student = self.settings_run.path("student")
        loss = math.nan if state.loss is None else state.loss
        result = TrainResult(str(student), "", state.step, loss, state.tokens, seconds)
        if self.parallel.is_main:
            chosen = self._load_best()
            result = replace(result, best_step=chosen["step"])
            self._export(chosen)
            steps = self.settings.steps
            keep(self.settings_run, result, steps, self.identity, form_of(self.settings))
        self.parallel.barrier()
        return result

    def _load_best(self) -> dict[str, Any]:
        """Put the best weights into the student; which step's they are."""
        path = self.settings_run.path(BEST)
        held = _metadata(path)
        with safe_open(path, "pt") as file, torch.no_grad():
            for name, parameter in trainable(self.distiller):
                parameter.copy_(file.get_tensor(name))
        return {"step": int(held["step"]), self.table.select_by: float(held["value"])}

    def _export(self, chosen: dict[str, Any]) -> None:
        data, device = self.data, self.parallel.device
        probe = torch.from_numpy(data.windows(data.histories.rows("validation")[:64]))
        answered = {name: float(self.rows.answered(name).mean()) for name in self.rows.answers}
        facts = {
            "catalogue": data.catalogue.facts,
            "chosen": chosen,
            "answered": answered,
            "identity": self.identity,
        }
        directory = self.settings_run.path("student")
        model = self.distiller.model
        export(model, self.table, directory, data.catalogue.item_ids, facts, probe.to(device))


def _check_settings(settings: Train) -> None:
    """Refuse what would be ignored."""
    usual = Train()
    for key in FOR_LANGUAGE_MODELS:
        if getattr(settings, key) != getattr(usual, key):
            raise ConfigError(
                f"{key} does nothing for a recommender",
                expected="the key left out",
                where="[train]",
                remedy=f"Remove {key}.{INSTEAD.get(key, '')}",
            )


def _check_lengths(terms: list[Term], rows: Rows) -> None:
    """Refuse to use more candidates than a list has."""
    for term in terms:
        lists = rows.candidates.get(term.table.cache)
        if lists is not None and term.options.k > lists[0].shape[1]:
            held = lists[0].shape[1]
            raise ConfigError(
                f"k = {term.options.k} candidates of lists of {held}",
                expected=f"k <= {held}",
                where=f"[[objective]] {term.label} options",
                remedy=f"Set options = {{ k = {held} }}, or capture longer lists.",
            )


def _metadata(path: Path) -> dict[str, str]:
    """Step and value of the best weights so far."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except (OSError, SafetensorError) as error:
        raise StudentError(
            f"the best weights so far cannot be read ({error})",
            where=str(path),
            remedy="Only this file knows which step was the best: train again in another run "
            "directory.",
        ) from None

"""What a run trains with: names looked up, student loaded, optimiser and loaders made.

One idea: everything that can be refused is refused here, in the order of what it costs to find out:
first what needs no weights, then what the loaded student decides. It takes no step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.config.training import Student, Train
from stillroom.pipeline.data.loader import DistillLoader, Geometry
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.data.records import RecordSource
from stillroom.pipeline.objectives.combine import Distiller, balancing_term, signals_needed
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.apart import BEYOND, heeds_the_longest, joined_by
from stillroom.pipeline.student.choosing_blocks import with_blocks_chosen
from stillroom.pipeline.student.llava import load_task_tokens
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.model import initial_student
from stillroom.pipeline.student.states import (
    balancing_weight,
    blocks_of,
    tells_its_routing,
)
from stillroom.pipeline.student.teacher_head import FILE as HEAD_FILE
from stillroom.pipeline.student.teacher_head import (
    check_head,
    keep_teacher_head,
    read_teacher_head,
    teacher_of,
)
from stillroom.pipeline.teacher.reference.head import Head
from stillroom.pipeline.training.checkpoint import Checkpoints, trainable
from stillroom.pipeline.training.exporting import Proof, adapted, rehearse
from stillroom.pipeline.training.held_out import HeldOut
from stillroom.pipeline.training.identity import identity_of
from stillroom.pipeline.training.memory import check_memory
from stillroom.pipeline.training.optimization import optimizer_of
from stillroom.pipeline.training.parallel import Parallel
from stillroom.pipeline.training.preflight import look_up
from stillroom.pipeline.training.run import (
    cache_locations,
    check_attention,
    check_fit,
    check_pictured,
    corpus_of,
    freeze,
    geometry_of,
    heldout_geometry,
    longest_of,
    pictures_of,
    resolved,
)
from stillroom.pipeline.training.said import (
    check_own_capture,
    check_teacher,
    is_own_cache,
    teachers_of,
    told_of,
)
from stillroom.pipeline.training.stepping import Stepper


@dataclass
class Setup:
    """One process's share of what a run trains with.

    Attributes:
        settings_run: the run.
        settings: its [train] table; here every `auto` that the device decides is decided.
        parallel: the ranks.
        caches: opened training caches by name; None opens those that the run names.
        on_note: called in the main process with what a person should know.
        blocks_measured: directory where `leave_out` keeps its passes; None takes the run's.
        ema: averages of the trainable weights, by name; empty without `ema`.
    """

    settings_run: Run
    settings: Train
    parallel: Parallel
    caches: Any = None
    on_note: Callable[[str], None] = lambda _: None
    blocks_measured: Path | None = None
    ema: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        run, parallel = self.settings_run, self.parallel
        self.settings = settings = resolved(self.settings, parallel.device)
        self.from_disk = self.caches is None
        self.named = named = look_up(run, settings, parallel, self.caches)
        self.caches, self.facts, self.terms = named.caches, named.facts, list(named.terms)
        self.teachers = parallel.together(self._check_said)
        self.initial = run.path("student-initial")
        # As it is unless the loaded student cannot keep packed documents apart.
        packed = settings.packing == "auto"
        self.geometry = geometry_of(settings, named.caches[""], parallel, packed)
        student = require(run.student, "student", run.name)
        parallel.together(lambda: self._make_initial(student))
        check_fit(self.initial, named.titled_caches())
        everything = {**named.caches, **named.images}
        self.identity = parallel.together(
            lambda: identity_of(run, settings, everything, self.initial)
        )
        for note in named.notes:
            self._note(note)

    def _check_said(self) -> list[dict[str, Any]]:
        """What the caches say of their teachers, with the name of the one that the run file names.

        Raises:
            PlanMismatch: the run file says otherwise.
        """
        run, taught = self.settings_run, teachers_of(self.caches)
        if self.from_disk and is_own_cache(run, cache_locations(run, self.settings)[""]):
            check_own_capture(run)
        same = check_teacher(run.teacher, taught)
        named = {number: {"model": run.teacher.model} for number in same if run.teacher}
        return [told_of(facts) | named.get(number, {}) for number, facts in enumerate(taught)]

    def _make_initial(self, student: Student) -> None:
        run = self.settings_run
        passes = self.blocks_measured or run.path()
        chosen = with_blocks_chosen(student, run.teacher, corpus_of(run), self.initial, passes)
        initial_student(chosen, run.teacher, self.initial)

    def build(self) -> None:
        """Load the student and everything that trains it; the weights are the initial ones."""
        settings, parallel = self.settings, self.parallel
        check_attention(settings, parallel.device)
        check_memory(self.initial, settings, parallel, longest_of(self.named.caches[""]))
        self.checkpoints = Checkpoints(
            self.settings_run.path("checkpoints"),
            parallel,
            settings.keep_last,
            settings.async_checkpoint,
        )
        if self.checkpoints.latest() is None:
            # Before the objectives see the student: adapters may break what they ask of it.
            parallel.together(lambda: rehearse(self.initial, settings))
        torch.manual_seed(settings.seed)
        model = load(self.initial, settings.attention).to(parallel.device).train()
        self._measure_student(model)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        freeze(model, settings)
        head, tokens = self._teacher_head(), load_task_tokens(self.initial)
        packed = self.geometry.packed
        self.make = lambda student: Distiller(
            student, self.terms, settings.kernel, head, tokens, packed
        )
        adapted(model, settings)
        self.distiller = self.make(model).to(parallel.device)
        check_pictured(self.distiller, self.named.caches[""])
        if settings.compile:
            for block in blocks_of(model):
                block.compile()
        self.module = parallel.wrap(self.distiller, settings)
        parameters = [parameter for _, parameter in trainable(self.distiller)]
        self.optimizer = optimizer_of(parameters, settings)
        if settings.ema:
            self.ema = {name: p.detach().clone() for name, p in trainable(self.distiller)}
        self.stepper = Stepper(
            settings, parallel, self.distiller, self.module, self.optimizer, list(self.ema.values())
        )
        self.loader = self.make_loader(self.caches, settings.workers)
        for heldout in self.named.heldout:
            heldout.loader = self._heldout_loader(heldout)
        self.proof = self._proof() if parallel.is_main else None

    def _measure_student(self, model: Any) -> None:
        """Whether rows may hold several documents, and whether routing has a loss."""
        settings = self.settings
        packed = self._keeps_apart(model)
        self.geometry = geometry_of(settings, self.named.caches[""], self.parallel, packed)
        balance = balancing_weight(model) if settings.load_balancing else 0.0
        if balance and not tells_its_routing(model):
            self._note(f"{type(model).__name__} hands out no router logits: no load balancing")
            balance = 0.0
        if balance:
            self.terms = [*self.terms, balancing_term(self.terms, balance, self.facts)]
            for heldout in self.named.heldout:
                heldout.terms = [*heldout.terms, self.terms[-1]]
        self.identity |= {
            "packing": "packed" if packed else "never",
            "load_balancing": balance,
        }

    def _keeps_apart(self, model: Any) -> bool:
        """Whether rows may hold several examples, as long as those of this run are; notes say why
        not, and what an example to itself does not mend."""
        name, words = type(model).__name__, self.facts[""].vocab_size
        held = [heldout.caches[""] for heldout in self.named.heldout]
        longest = max(longest_of(cache) for cache in [self.named.caches[""], *held])
        if self.settings.packing == "auto":
            rows = [heldout_geometry(self.geometry, self.settings, cache) for cache in held]
            width = max(one.width for one in [self.geometry, *rows])
            found = joined_by(model, words, width, longest)
            if not found:
                return True
            self._note(f"{name} {found}: one example per row")
        if heeds_the_longest(model, words, longest):
            self._note(BEYOND.format(name=name, longest=longest))
        return False

    def _note(self, text: str) -> None:
        if self.parallel.is_main:
            self.on_note(text)

    def make_loader(self, caches: Mapping[str, RecordSource], workers: int) -> DistillLoader:
        """A loader over caches that hold what the objectives need."""
        return self._loader(caches, self.terms, self.geometry, workers)

    def _heldout_loader(self, heldout: HeldOut) -> DistillLoader:
        geometry = heldout_geometry(self.geometry, self.settings, heldout.caches[""])
        return self._loader(heldout.caches, heldout.terms, geometry, 0)

    def _proof(self) -> Proof:
        """What the export is checked on, read before the first step: held-out text where there is
        some, else one step of the training text."""
        if self.named.heldout:
            first = self.named.heldout[0]
            batch, _ = next(first.loader.once())
            return Proof([batch], first.terms)
        batches, _ = next(self.make_loader(self.caches, 0).steps(Position(), 1))
        return Proof(batches, self.terms)

    def _loader(self, caches, terms: list[Term], geometry: Geometry, workers: int):
        run, settings, images = self.settings_run, self.settings, self.named.images
        signals = signals_needed(terms, [*caches, *images])
        return DistillLoader(
            caches,
            signals,
            geometry,
            settings.seed,
            settings.shuffle_shards,
            workers,
            pin_memory=self.parallel.device.type == "cuda",
            pictures=pictures_of(run, settings, self.initial, images, signals),
        )

    def _teacher_head(self) -> Head | None:
        asking = {term.table.cache: term.label for term in self.terms if term.needs.teacher_head}
        if not asking:
            return None
        if len(asking) > 1:
            raise StudentError(
                f"objectives {' and '.join(asking.values())} read the heads of different caches",
                expected="one cache under all objectives that rebuild the whole vocabulary",
                where="[[objective]] cache",
                remedy="Rebuild from one cache, and train on the other's lists.",
            )
        path, teacher = self.settings_run.path(HEAD_FILE), self.settings_run.teacher
        cache: TeacherCache = self.named.caches[next(iter(asking))]
        wanted = teacher_of(cache.plan)
        self.parallel.together(lambda: keep_teacher_head(teacher, wanted, path))
        head = read_teacher_head(path)
        check_head(head, cache.read(0), cache.plan, str(path))
        return head.to(self.parallel.device)

"""The student that a trainer has made, measured, and the objectives put beside it.

One idea: everything that depends on the loaded student is found out here, once, before the first
step: whether it fits the caches, whether it keeps packed documents apart, whether it sees the
images of the texts, and the teacher's head where an objective reads it. No loss is computed.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.strict import validate
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.doors.fit import bare, check_student, check_terms
from stillroom.pipeline.objectives.combine import Distiller, balancing_term
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.apart import BEYOND, heeds_the_longest, keeps_documents_apart
from stillroom.pipeline.student.llava import is_multimodal, load_task_tokens
from stillroom.pipeline.student.states import balancing_weight, tells_its_routing
from stillroom.pipeline.student.teacher_head import (
    FILE,
    check_head,
    check_named,
    is_whole,
    keep_teacher_head,
    read_teacher_head,
    teacher_of,
)
from stillroom.pipeline.teacher.reference.head import Head
from stillroom.pipeline.training.run import resolved


def adopt(trainer: Any, kernel: str, teacher: str) -> Distiller:
    """The objectives of a trainer's caches around its student.

    Args:
        trainer: made, with its `data` and its held-out sets.
        kernel: as `[train] kernel`.
        teacher: directory or hub id, for objectives that read the teacher's head.

    Raises:
        StillroomError: student and caches do not fit.
    """
    student, data = bare(trainer.accelerator.unwrap_model(trainer.model)), trainer.data
    sets = {"": data} | {_title(name): held.dataset for name, held in trainer.held_out.items()}
    named = {
        f"{title} cache '{name or 'cache'}'".lstrip(): cache
        for title, one in sets.items()
        for name, cache in one.sources.items()
    }
    longest = max(int(one.lengths.max()) for one in sets.values())
    check_student(student, trainer.processing_class, named, longest)
    check_terms(data.terms)
    for one in sets.values():
        _show_pictures(student, one)
    _lay_out(trainer, student, data, longest)
    terms = [*data.terms, *_balancing(student, data)]
    for held in trainer.held_out.values():
        held.heldout.terms.extend(terms[len(data.terms) :])
    settings = resolved(validate(Train, {"kernel": kernel}, "kernel"), trainer.args.device)
    head = _teacher_head(trainer, teacher)
    distiller = Distiller(student, terms, settings.kernel, head, packed=data.packed)
    return distiller.to(trainer.args.device if trainer.place_model_on_device else "cpu")


def _lay_out(trainer: Any, student: Any, data: CachedDataset, longest: int) -> None:
    """Whether rows hold several examples, and lie end to end; tokens of a row at the most."""
    words, args = data.facts[""].vocab_size, trainer.args
    flash = str(getattr(student.config, "_attn_implementation", "")).startswith("flash_attention")
    rows = max(args.per_device_train_batch_size, args.per_device_eval_batch_size) if flash else 1
    data.packed = keeps_documents_apart(student, words, longest * rows, longest)
    data.padding_free = data.packed and flash
    if not data.packed and heeds_the_longest(student, words, longest):
        warnings.warn(BEYOND.format(name=type(student).__name__, longest=longest), stacklevel=2)


def _title(name: str) -> str:
    return f"eval_cache '{name}'" if name else "eval_cache"


def _balancing(student: Any, data: CachedDataset) -> Iterator[Term]:
    weight = balancing_weight(student)
    if weight and tells_its_routing(student):
        yield balancing_term(data.terms, weight, data.facts)


def _show_pictures(student: Any, data: CachedDataset) -> None:
    """Have a data set give the pixels that its texts are about.

    Raises:
        StudentError: the student sees none, or nobody said where the pictures are.
    """
    if not data.has_images:
        return
    where = data.sources[""].storage.location if hasattr(data.sources[""], "storage") else "cache"
    if not is_multimodal(student):
        raise StudentError(
            f"the texts of the cache hold images, and {type(student).__name__} sees none",
            expected="a LLaVA-type student (vision tower, projector, language model)",
            where=where,
            remedy="Choose another student, or a cache of texts alone.",
        )
    if not data.corpus:
        raise StudentError(
            "the texts of the cache hold images, and a cache keeps no pictures",
            where=where,
            remedy="Give corpus = the directory of the prepared corpus that it was captured from.",
        )
    if load_task_tokens(Path(student.config._name_or_path)) is not None:
        raise StudentError(
            "the student was trained with task tokens, which a trainer would leave out",
            where=str(student.config._name_or_path),
            remedy="Use `stillroom train`.",
        )
    data.see(str(student.config._name_or_path))


def _teacher_head(trainer: Any, teacher: str) -> Head | None:
    """The teacher's head, kept once in the trainer's directory."""
    asking = [term for term in trainer.data.terms if term.needs.teacher_head]
    if not asking:
        return None
    path, cache = Path(trainer.args.output_dir) / FILE, trainer.data.sources[""]
    if not teacher and not path.exists():
        raise StudentError(
            f"objective {asking[0].label} reads the teacher's head, and a cache holds none",
            where=type(trainer).__name__,
            remedy="Give teacher = the directory or hub id of the cache's teacher; its head is "
            "taken once and kept in output_dir.",
        )
    named = Teacher(model=teacher).named_by("teacher =") if teacher else None
    facts = teacher_of(cache.plan)
    with trainer.args.main_process_first(local=False, desc="the teacher's head"):
        if named and is_whole(path):
            check_named(named, facts, path)
        keep_teacher_head(named, facts, path)
    head = read_teacher_head(path)
    check_head(head, cache.read(0), cache.plan, str(path))
    return head.to(trainer.args.device)

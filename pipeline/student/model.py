"""The student: its first weights, its hidden states, and its way out as a plain HF directory.

One idea: the teacher's weights are needed once, to make `<run>/student-initial`. That directory
is complete (weights, config, tokenizer) and carries `student.json`, which says from what it was
made; training, resuming and evaluating read it and never the teacher. Losses are not here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.differing import differences
from stillroom.cache_schemas.errors import PlanMismatch, StudentError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.corpus.tokenizer import vocabulary
from stillroom.pipeline.student.llava import load_task_tokens
from stillroom.pipeline.student.llava_parts import assemble
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.memory import FP32, check_room, numbers_in
from stillroom.pipeline.student.pruning import prune_layers, prune_width
from stillroom.pipeline.student.sameness import Expected, check_saved, expected_of
from stillroom.pipeline.student.saving import RECEIPT, export
from stillroom.pipeline.student.skeleton import config_of, not_a_student
from stillroom.pipeline.student.states import blocks_of
from stillroom.pipeline.teacher.adapter import merged
from stillroom.pipeline.teacher.facts import model_config, model_directory, teacher_facts
from stillroom.pipeline.teacher.identity import SILENT_KEYS, canonical_config, directory_facts
from stillroom.pipeline.teacher.sameness import SHOWN, check_same_teacher

__all__ = ["export", "initial_student", "load"]

TAKES_WEIGHTS = frozenset({"prune_layers", "prune_width", "model"})
"""Ways to make a student that take over weights of one model."""


def initial_student(student: Student, teacher: Teacher | None, directory: Path) -> Path:
    """Make the untrained student, or check and reuse the one that is there.

    Args:
        student: how it is made.
        teacher: what it is cut from and takes its tokenizer from; may be None (and its files may
            be gone) once the directory is complete.
        directory: where it is kept.

    Raises:
        PlanMismatch: the directory holds a student made from other settings, or from weights or
            a config that are others now (where their files are here to be read).
        StudentError: it has to be made and there is nothing to make it from.
    """
    settings = student.model_dump(mode="json")
    if (directory / RECEIPT).exists():
        receipt = json.loads((directory / RECEIPT).read_text())
        _check_receipt(receipt, directory, settings)
        _check_origin(receipt, directory, student, teacher)
        return directory
    if teacher is None:
        raise StudentError(
            "there is no initial student yet and no [teacher] to make one from",
            where=str(directory),
            remedy="Add the [teacher] table for the first run; later runs do not need it.",
        )
    model, expected = _made(student, teacher)
    facts = {"student": settings, "teacher": _origin(student, teacher)}
    tokens = load_task_tokens(Path(student.model)) if student.model else None
    _save(student, model, expected, directory, model_directory(teacher), facts, tokens)
    return directory


def load_teacher(teacher: Teacher) -> Any:
    """A teacher's own weights, fp32, its adapter added to them, under its config with the
    overrides of [teacher]: what students are cut from.

    Raises:
        StudentError: as for `load`.
        TeacherError: the adapter does not fit.
    """
    config, trusts_code = model_config(teacher), teacher.trust_remote_code
    model = load(model_directory(teacher), trusts_code=trusts_code, config=config)
    return merged(model, teacher)


def _save(student: Student, model: Any, expected: Expected, directory: Path, *rest) -> None:
    """Save a student that is what was meant; else what was asked for is refused, with a way out."""
    try:
        export(model, directory, *rest, check=lambda saved: check_saved(saved, expected))
    except StudentError as error:
        raise StudentError(
            f"init = '{student.init}' cannot be saved: {error.found}",
            expected=error.expected or "the same as that part of the source",
            where="[student]",
            remedy=_WAYS_OUT.get(student.init, error.remedy),
        ) from None


def _made(student: Student, teacher: Teacher) -> tuple[Any, Expected]:
    """A student in memory, and what it must say once it is saved."""
    if student.init == "prune_layers":
        model = load_source(student, teacher)
        blocks = blocks_of(model)
        keep = student.keep_layers or tuple(range(0, len(blocks), student.keep_every))
        return model, prune_layers(model, blocks, keep)
    if student.init == "prune_width":
        model = load_source(student, teacher)
        shares = student.keep_intermediate, student.keep_heads
        return model, prune_width(model, blocks_of(model), *shares)
    model = _MAKERS[student.init](student, teacher)
    return model, expected_of(model)


def _check_receipt(receipt: dict, directory: Path, settings: dict) -> None:
    made = Student().model_dump(mode="json") | receipt["student"]
    for key, wanted in settings.items():
        if made.get(key) != wanted:
            raise PlanMismatch(
                f"made with [student] {key} = {made.get(key)!r}",
                expected=f"{wanted!r}",
                where=str(directory),
                remedy="Use another run directory, or delete this one to make the student anew.",
            )


def _check_origin(
    receipt: dict, directory: Path, student: Student, teacher: Teacher | None
) -> None:
    """Refuse a student of another model's weights or config; nothing is fetched for that."""
    made = receipt.get("teacher") or {}
    _check_files(made, directory, student)
    source = teacher and _named(student, teacher)
    if "architecture" not in made or source is None or not Path(source.model).is_dir():
        return
    remedy = f"Delete {directory} to cut the student anew, or use another run directory."
    # Its weights are float32, however the teacher is run.
    check_same_teacher(made, teacher_facts(source), str(directory), remedy, as_run=False)


def _check_files(made: dict, directory: Path, student: Student) -> None:
    for name, now in _files_of(student).items():
        # A student of an earlier release does not say what it was made from.
        if name in made and (different := differences({name: now}, {name: made[name]})):
            raise PlanMismatch(
                f"is made from another {name} than is there now: {'; '.join(different[:SHOWN])}",
                where=str(directory),
                remedy=f"Delete {directory} to make the student anew, put the files back as they "
                "were, or use another run directory.",
            )


def _origin(student: Student, teacher: Teacher) -> dict:
    if student.init in TAKES_WEIGHTS:
        return source_facts(student, teacher)
    return {"model": student.model} | _files_of(student)


def _files_of(student: Student) -> dict:
    """What the files say that a student without one source is made from, of those that are here."""
    if student.init == "config":
        named = Path(student.model)
        path = named if named.is_file() else named / "config.json"
        return {"config": canonical_config(path, SILENT_KEYS)} if path.is_file() else {}
    if student.init == "parts":
        parts = {"language model": student.model, "vision tower": student.vision_model}
        return {k: directory_facts(Path(v), False) for k, v in parts.items() if Path(v).is_dir()}
    return {}


def source_facts(student: Student, teacher: Teacher) -> dict:
    """Identity of the model that a student is cut from."""
    return teacher_facts(_named(student, teacher))


def _named(student: Student, teacher: Teacher) -> Teacher:
    """The model whose weights a student takes over."""
    return Teacher(model=student.model).named_by("[student] model") if student.model else teacher


def load_source(student: Student, teacher: Teacher) -> Any:
    """What a student takes weights from, fp32.

    Raises:
        StudentError: it does not fit into memory, or as for `load`.
    """
    named = _named(student, teacher)
    directory = model_directory(named)
    needed = {"weights in fp32": FP32 * sum(numbers_in(directory).values())}
    remedy = (
        "Make it on a machine with more memory: `stillroom student` needs no GPU, and training "
    )
    remedy += "needs only the directory that it leaves."
    check_room(needed, torch.device("cpu"), str(directory), remedy)
    return load(directory) if student.model else load_teacher(teacher)


def _from_config(student: Student, _teacher: Teacher) -> Any:
    from transformers import AutoModelForCausalLM

    if not student.model:
        raise StudentError(
            "init = 'config' without a config",
            where="[student] model",
            remedy="Name a config.json, or a directory that holds one.",
        )
    config = config_of(student.model)
    with torch.random.fork_rng():
        torch.manual_seed(student.seed)
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # whatever numbers that fit nothing make the libraries raise
            raise not_a_student(student.model, error) from None


def _model(student: Student, teacher: Teacher) -> Any:
    if not student.model:
        raise StudentError(
            "init = 'model' without a model",
            where="[student] model",
            remedy="Name an HF directory or hub id with the teacher's tokenizer.",
        )
    _check_tokenizer(student.model, teacher)
    return load_source(student, teacher)


def _check_tokenizer(model: str, teacher: Teacher) -> None:
    """Every id must be the teacher's token; how text is cut is up to the teacher's tokenizer, which
    the student keeps."""
    own = vocabulary(model)
    theirs = vocabulary(teacher.model, teacher.trust_remote_code)
    if own == theirs:
        return
    differing = [token for token in own | theirs if own.get(token) != theirs.get(token)]
    raise StudentError(
        f"the tokenizer of {len(own)} tokens has {differing[0]!r} at {own.get(differing[0])}",
        expected=f"{theirs.get(differing[0])}, as the teacher's {len(theirs)}",
        where=model,
        remedy="Take a student of the teacher's tokenizer: init = 'prune_layers', "
        "'prune_width' or 'config'; projection across tokenizers does not exist here.",
    )


def _parts(student: Student, teacher: Teacher) -> Any:
    if not (student.model and student.vision_model):
        raise StudentError(
            "init = 'parts' needs a language model and a vision tower",
            where="[student] model, vision_model",
            remedy="Name an HF directory for each.",
        )
    tower, language = Path(student.vision_model), Path(student.model)
    return assemble(tower, language, student.vision_layer, student.seed)


_MAKERS: dict[str, Callable[[Student, Teacher], Any]] = {
    "config": _from_config,
    "model": _model,
    "parts": _parts,
}

_WAYS_OUT = {
    "prune_layers": "This architecture ties what a block does to its place: name the first blocks "
    "without a gap (keep_layers = [0, 1, ...]), or make the student with init = 'config'.",
    "prune_width": "Parts of this architecture read all heads or units at once: try "
    "keep_heads = 1.0 or keep_intermediate = 1.0, or take init = 'prune_layers'.",
}

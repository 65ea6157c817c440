"""The student: its first weights, its hidden states, and its way out as a plain HF directory.

One idea: the teacher's weights are needed once, to make `<run>/student-initial`. That directory
is complete (weights, config, tokenizer) and carries `student.json`, which says from what it was
made; training, resuming and evaluating read it and never the teacher. Losses are not here.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import PlanMismatch, StudentError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.student.llava import TASK_TOKENS, load_task_tokens
from stillroom.pipeline.student.llava_parts import assemble, name_for_vllm
from stillroom.pipeline.student.pruning import prune_layers, prune_width
from stillroom.pipeline.student.states import blocks_of
from stillroom.pipeline.teacher.facts import model_directory, teacher_facts

RECEIPT = "student.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def initial_student(student: Student, teacher: Teacher | None, directory: Path) -> Path:
    """Make the untrained student, or check and reuse the one that is there.

    Args:
        student: how it is made.
        teacher: what it is cut from and takes its tokenizer from; may be None (and its files may
            be gone) once the directory is complete.
        directory: where it is kept.

    Raises:
        PlanMismatch: the directory holds a student made from other settings.
        StudentError: it has to be made and there is nothing to make it from.
    """
    settings = student.model_dump(mode="json")
    if (directory / RECEIPT).exists():
        _check_receipt(directory, settings)
        return directory
    if teacher is None:
        raise StudentError(
            "there is no initial student yet and no [teacher] to make one from",
            where=str(directory),
            remedy="Add the [teacher] table for the first run; later runs do not need it.",
        )
    model = _MAKERS[student.init](student, teacher)
    facts = {"student": settings, "teacher": _origin(student, teacher)}
    tokens = load_task_tokens(Path(student.model)) if student.model else None
    export(model, directory, model_directory(teacher), facts, tokens)
    return directory


def load(directory: str | Path, attention: str = "sdpa", dtype=torch.float32) -> Any:
    """A causal LM or image-text model from an HF directory, in training precision.

    Raises:
        StudentError: the directory is missing or is not a model that transformers knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        sees = hasattr(AutoConfig.from_pretrained(directory), "vision_config")
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        return kind.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise StudentError(
            f"cannot be loaded ({str(error).splitlines()[0]})",
            expected="an HF causal language model",
            where=str(directory),
        ) from None


def export(
    model: Any,
    directory: Path,
    tokenizer_from: Path,
    facts: dict,
    task_tokens: torch.Tensor | None = None,
) -> None:
    """Write a plain HF directory in one move: it is there complete, or not at all.

    Args:
        model: a transformers model.
        directory: where it goes; what is there is replaced.
        tokenizer_from: HF directory whose tokenizer files are copied byte for byte.
        facts: JSON kept as `student.json`.
        task_tokens: [count, D], kept beside a student that was trained with them.
    """
    from safetensors.torch import save_file

    staging = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    name_for_vllm(staging)
    if task_tokens is not None:
        save_file({"task_tokens": task_tokens.contiguous()}, staging / TASK_TOKENS)
    for pattern in TOKENIZER_FILES:
        for path in tokenizer_from.glob(pattern):
            shutil.copyfile(path, staging / path.name)
    (staging / RECEIPT).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    # A directory cannot be renamed onto one that holds files: the old one steps aside first.
    if directory.exists():
        old = directory.with_name(directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        staging.rename(directory)
        shutil.rmtree(old)
    else:
        staging.rename(directory)


def _check_receipt(directory: Path, settings: dict) -> None:
    made = json.loads((directory / RECEIPT).read_text())["student"]
    made = Student().model_dump(mode="json") | made
    for key, wanted in settings.items():
        if made.get(key) != wanted:
            raise PlanMismatch(
                f"made with [student] {key} = {made.get(key)!r}",
                expected=f"{wanted!r}",
                where=str(directory),
                remedy="Use another run directory, or delete this one to make the student anew.",
            )


def _origin(student: Student, teacher: Teacher) -> dict:
    if student.init in ("prune_layers", "prune_width") and not student.model:
        return teacher_facts(teacher)
    return {"model": student.model}


def _source(student: Student, teacher: Teacher) -> Any:
    named = teacher.model_copy(update={"model": student.model}) if student.model else teacher
    return load(model_directory(named), dtype=torch.float32)


def _layer_pruned(student: Student, teacher: Teacher) -> Any:
    model = _source(student, teacher)
    keep = student.keep_layers or tuple(range(0, len(blocks_of(model)), student.keep_every))
    return prune_layers(model, blocks_of(model), keep)


def _width_pruned(student: Student, teacher: Teacher) -> Any:
    model = _source(student, teacher)
    return prune_width(model, blocks_of(model), student.keep_intermediate, student.keep_heads)


def _from_config(student: Student, _teacher: Teacher) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not student.model:
        raise StudentError(
            "init = 'config' without a config",
            where="[student] model",
            remedy="Name a directory that holds config.json.",
        )
    with torch.random.fork_rng():
        torch.manual_seed(student.seed)
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(student.model), dtype=torch.float32
        )


def _model(student: Student, teacher: Teacher) -> Any:
    if not student.model:
        raise StudentError(
            "init = 'model' without a model",
            where="[student] model",
            remedy="Name an HF directory or hub id with the teacher's tokenizer.",
        )
    _check_tokenizer(student.model, teacher)
    return _source(student, teacher)


def _check_tokenizer(model: str, teacher: Teacher) -> None:
    """The vocabulary must be the teacher's; the chat template is taken from the teacher."""
    from stillroom.pipeline.corpus.tokenizer import tokenizer_facts

    own, theirs = tokenizer_facts(model), tokenizer_facts(teacher.model)
    for key in ("vocab_size", "sha256"):
        if own[key] != theirs[key]:
            raise StudentError(
                f"tokenizer {key} is {own[key]}",
                expected=f"{theirs[key]} as the teacher's",
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
    "prune_layers": _layer_pruned,
    "prune_width": _width_pruned,
    "config": _from_config,
    "model": _model,
    "parts": _parts,
}

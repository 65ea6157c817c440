"""The teacher's LM head, kept once beside the student for objectives that rebuild its logits.

One idea: one tensor in one safetensors file, with the hash of the weights it came from; after it is
there the teacher's files may go.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stillroom.cache_schemas.errors import PlanMismatch, StudentError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.student.model import load
from stillroom.pipeline.teacher.facts import model_directory, teacher_facts

FILE = "teacher-head.safetensors"


def keep_teacher_head(teacher: Teacher | None, wanted_sha256: str, path: Path) -> Path:
    """Write the head if it is not there, and check that it is the cache's teacher's.

    Args:
        teacher: may be None once the file is there.
        wanted_sha256: `weights_sha256` of the teacher in the cache's plan.
        path: the file.

    Raises:
        StudentError: it has to be made and there is no [teacher].
        PlanMismatch: it is another teacher's.
    """
    if not path.exists():
        if teacher is None:
            raise StudentError(
                "the teacher's head is not there and there is no [teacher] to take it from",
                where=str(path),
            )
        _write(teacher, path)
    with safe_open(path, "pt") as file:
        found = file.metadata()["weights_sha256"]
    if found != wanted_sha256:
        raise PlanMismatch(
            f"is the head of teacher {found[:12]}",
            expected=f"that of the cache's teacher, {wanted_sha256[:12]}",
            where=str(path),
            remedy="Delete it, and name the cache's own teacher under [teacher].",
        )
    return path


def read_teacher_head(path: Path) -> torch.Tensor:
    """The head, float32 [V, D]."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("head")


def _write(teacher: Teacher, path: Path) -> None:
    model = load(model_directory(teacher), dtype=torch.float32)
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    capped = getattr(text, "final_logit_softcapping", None)
    if getattr(head, "bias", None) is not None or capped:
        raise StudentError(
            "a head with a bias or a soft cap cannot be rebuilt from its matrix",
            where=teacher.model,
            remedy="Use the divergences on cached top-k logits.",
        )
    metadata = {"weights_sha256": teacher_facts(teacher)["weights_sha256"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".part")
    save_file({"head": head.weight.detach().contiguous().clone()}, staging, metadata)  # [V, D]
    staging.replace(path)

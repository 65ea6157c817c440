"""The teacher's LM head, kept once beside the student for objectives that rebuild its logits.

One idea: the head's matrix, bias, factor and soft cap, as they were measured on the teacher, in one
safetensors file with the identity of that teacher; after it is there the teacher's files may go.
Before it is used, it is held against the cache: states and log-probabilities of one record must
belong together.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stillroom.cache_schemas.errors import StudentError, TeacherError
from stillroom.cache_schemas.manifest import Plan
from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.record import TeacherRecord
from stillroom.pipeline.teacher.facts import teacher_facts
from stillroom.pipeline.teacher.reference.engine import load_merged
from stillroom.pipeline.teacher.reference.head import Head, head_of
from stillroom.pipeline.teacher.sameness import check_same_teacher

FILE = "teacher-head.safetensors"
FINAL = hidden_name("final")
TEACHER = "teacher"
"""Key of the file's metadata: the facts of the teacher as JSON."""
STATE_ERROR = {"bf16": 2**-8, "fp16": 2**-8, "int8": 2**-5, "fp8": 2**-3}
"""Error of a stored state's number, as a share of the row's root mean square; codec `step` has its
own. The states of a bfloat16 teacher have no more than 8 bits before they are stored."""
LOGPROB_ERROR = 0.1
"""Nats: what storing and half precision may do to a listed log-probability."""
MOST_SURPRISE = 4.0
NAME_IT = "Name the cache's teacher: [teacher] model in a run file, teacher = of a trainer."


def keep_teacher_head(teacher: Teacher | None, facts: Mapping[str, Any], path: Path) -> Path:
    """Write the head if it is not there, and check that it is the cache's teacher's.

    Args:
        teacher: may be None once the file is there.
        facts: of the teacher in the cache's plan.
        path: the file.

    Raises:
        StudentError: it has to be made and there is no [teacher].
        PlanMismatch: it is another teacher's; nothing was written.
    """
    if not is_whole(path):
        if teacher is None:
            raise StudentError(
                "the teacher's head is not there"
                + " whole (an earlier release kept it)" * path.exists()
                + " and there is no [teacher] to take it from",
                where=str(path),
                remedy=NAME_IT,
            )
        found = teacher_facts(teacher)
        _check_teacher(found, facts, teacher.model, NAME_IT)
        _write(teacher, found, path)
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()[TEACHER])
    _check_teacher(found, facts, str(path), f"Delete it. {NAME_IT}")
    return path


def check_named(teacher: Teacher, facts: Mapping[str, Any], path: Path) -> None:
    """Refuse a teacher that is named where its head is already kept, and is another one.

    Args:
        teacher: as it is named now.
        facts: of the teacher in the cache's plan.
        path: the file with the head.

    Raises:
        StudentError: its files are gone.
        PlanMismatch: it is another teacher.
    """
    try:
        found = teacher_facts(teacher)
    except TeacherError as error:
        raise StudentError(
            f"cannot be compared with the cache's teacher ({error.found})",
            where=teacher.model,
            remedy=f"Leave teacher out: the head is kept in {path}.",
        ) from None
    _check_teacher(found, facts, teacher.model, NAME_IT)


def _check_teacher(
    found: Mapping[str, Any], facts: Mapping[str, Any], where: str, remedy: str
) -> None:
    # What an old cache does not record of its teacher is measured by `check_head`.
    check_same_teacher(found, facts, where, remedy, as_run=False)


def is_whole(path: Path) -> bool:
    """Whether it is there, and says what happens to its product and whose it is (earlier releases
    did not)."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return {"scale", TEACHER} <= file.metadata().keys()


def read_teacher_head(path: Path) -> Head:
    """The head, float32."""
    with safe_open(path, "pt") as file:
        said = file.metadata()
        bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118
        softcap = float(said["softcap"]) if "softcap" in said else None
        return Head(file.get_tensor("head"), bias, softcap, float(said["scale"]))


def teacher_of(plan: Plan) -> dict[str, Any]:
    """Facts of the one teacher that a cache is of, joined or not.

    Raises:
        PlanMismatch: joined caches of several.
    """
    facts = plan.facts["teacher"]
    first, *others = facts.get("joined", [facts])
    remedy = "Rebuild the vocabulary from one cache, or from joined ones of one teacher."
    for number, other in enumerate(others, 2):
        check_same_teacher(other, first, f"joined cache {number}", remedy)
    return first


def check_head(head: Head, record: TeacherRecord, plan: Plan, where: str) -> None:
    """Refuse a head that does not make a cached record's log-probabilities of its final states.

    Each log-probability is judged by what rounding the states can do to it: a state is stored with
    an error of at most some share of its norm, and a logit follows it by the norm of its word.

    Args:
        head: of the teacher.
        record: with `hidden.final` and top-k lists, if the cache has both.
        plan: of its cache.
        where: the cache, for the error.

    Raises:
        StudentError: states and head do not belong together.
    """
    said = record.signals
    rows = record.hidden_positions - record.first_row
    if FINAL not in said or "topk_ids" not in said or not len(rows) or not said["topk_ids"].size:
        return
    states = torch.as_tensor(said[FINAL]).float()
    ids = torch.as_tensor(said["topk_ids"][rows]).long()
    known = torch.as_tensor(said["topk_logprobs"][rows]).float()
    vocab_size = plan.facts["teacher"]["vocab_size"]
    made = head.logits(states)[:, :vocab_size].log_softmax(1).gather(1, ids.clamp_min(0))
    capture: dict[str, Any] = plan.facts["capture"]
    codec = capture["hidden_codec"]
    share = STATE_ERROR[codec] if codec in STATE_ERROR else float(capture["hidden_step"])
    words = abs(head.scale) * head.weight.float().norm(dim=1)[ids.clamp_min(0)]
    rms = states.square().mean(dim=1, keepdim=True).sqrt()
    noise = (share * rms * words).square() + LOGPROB_ERROR**2
    surprise = ((made - known).square() / noise)[ids >= 0].mean().sqrt()
    if not surprise <= MOST_SURPRISE:
        gap = float((made - known)[ids >= 0].abs().mean())
        raise StudentError(
            f"the teacher's head and the cached final states make log-probabilities {gap:.3g} nats"
            " from the cached ones",
            expected="the same but for rounding",
            where=where,
            remedy="The cache's final state is not what this head reads (caches of earlier releases"
            " kept another one of some architectures): capture again, or use the divergences on"
            " cached top-k logits.",
        )


def _write(teacher: Teacher, facts: Mapping[str, Any], path: Path) -> None:
    head = head_of(load_merged(teacher.model_copy(update={"dtype": "float32"})))
    tensors = {"head": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    metadata = {TEACHER: json.dumps(facts), "scale": repr(head.scale)}
    if head.softcap is not None:
        metadata["softcap"] = repr(head.softcap)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".part")
    kept = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, staging, metadata)
    staging.replace(path)

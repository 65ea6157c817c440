"""Which teachers are captured as they are: tiny random models of many architectures, or refused.

    python -m benchmarks.architectures --json
    python -m benchmarks.architectures --json --again   # forget the kept rows first
    python -m benchmarks.architectures --table      # the runbook's table, from the kept rows

Each row is a process of its own, so that one crash stops nothing, and is kept as a file; run again,
only what is missing is measured: after a change of the code, use `--again`. A row goes the way of a
capture: vLLM is started as capture starts it and held against the model's definition by the same
check; beyond that check, every number is measured here. `engine_difference`: vLLM against the
reference, nats (log p, log-sum-exp, entropy); `hidden_difference`: the same of every block's state
and the final one, as a share of the largest value; `definition_difference`: the reference against
plain eager transformers, nats; `full_vocabulary_kl`: what the kept head makes of the captured final
states against live logits.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import needs
from benchmarks._architecture_zoo import VOCABULARY, ZOO, save
from benchmarks.cache_trial import publish

BOUND = 1e-4
LENGTHS = (9, 48, 150)
"""Tokens of the texts: inside and outside of windows of 32, below and above a length of 64."""
CELLS = Path(".cache/architectures")
SECONDS = 900
LAYERS = {"all": (1, 2, 3, "final"), "final": ("final",), "none": ()}


def main() -> None:
    """Measure what is missing, write `benchmarks/results/`, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="*", default=list(ZOO), help="labels of models")
    parser.add_argument("--again", action="store_true", help="measure rows that are kept too")
    parser.add_argument("--table", action="store_true", help="print kept rows as Markdown")
    parser.add_argument("--cells", type=Path, default=CELLS, help="where rows are kept")
    arguments = parser.parse_args()
    if arguments.table:
        print(_table([_kept(arguments.cells, label) for label in arguments.only]))
        return
    if arguments.again:
        for label in arguments.only:
            (arguments.cells / f"{label}.json").unlink(missing_ok=True)
    if any(not (arguments.cells / f"{label}.json").exists() for label in arguments.only):
        _load_libraries()
    rows = [_cell(arguments.cells, label) for label in arguments.only]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    publish("architectures", {"bound": BOUND, "counts": counts, "rows": rows}, arguments.json)


VERDICTS = ("equal", "refused", "wrong")


def _kept(cells: Path, label: str) -> dict[str, Any]:
    return json.loads((cells / f"{label}.json").read_text())


def _cell(cells: Path, label: str) -> dict[str, Any]:
    """A row, measured or as it was kept."""
    if not (cells / f"{label}.json").exists():
        cells.mkdir(parents=True, exist_ok=True)
        row, refusals = {}, []
        for layers in LAYERS:
            row = _measured(label, layers)
            if row["verdict"] != "refused" or "hidden" not in row["reason"]:
                break
            refusals.append(row["reason"])
        if row["verdict"] == "equal" and refusals:
            row["reason"] = f"hidden layers refused: {refusals[0]}"
        (cells / f"{label}.json").write_text(json.dumps(row, indent=1) + "\n")
    row = _kept(cells, label)
    print(f"{label}: {row['verdict']} {row['reason'][:120]}", file=sys.stderr, flush=True)
    return row


def _measured(label: str, layers: str) -> dict[str, Any]:
    """A row, by a process that ends with it; it starts with the libraries that were loaded here."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as log:
        child = fork.Process(target=_child, args=(send, log.name, label, layers))
        child.start()
        send.close()
        try:
            if receive.poll(SECONDS):
                return receive.recv()
            reason = f"no answer in {SECONDS} s"
        except EOFError:
            child.join()
            last = (Path(log.name).read_text().strip().splitlines() or ["nothing"])[-1]
            reason = f"exit {child.exitcode}: {last}"
        finally:
            child.kill()
            child.join()
    return _empty(label) | {"verdict": "wrong", "reason": reason}


def _child(send: Any, log: str, label: str, layers: str) -> None:
    handle = os.open(log, os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    send.send(_row(label, layers))


def _load_libraries() -> None:
    """What every row would import, once."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import stillroom.pipeline  # noqa: F401  (repairs wheels before transformers is imported)

    for name in ("transformers", "vllm", "stillroom.pipeline.teacher.vllm.engine"):
        importlib.import_module(name)


def _empty(label: str) -> dict[str, Any]:
    kind = ZOO[label]
    numbers = ("engine_difference", "definition_difference", "hidden_difference")
    empty = dict.fromkeys((*numbers, "full_vocabulary_kl"))
    return {"label": label, "architecture": kind.model, "kind": kind.says, **empty}


@dataclass
class _Case:
    """What is measured of one model.

    Attributes:
        live: [L - 1, V] log-probabilities of each text by plain eager transformers.
        head: the teacher's, as it is kept beside a student.
    """

    teacher: Any
    capture: Any
    texts: list
    live: list
    head: Any


def _row(label: str, layers: str) -> dict[str, Any]:
    """Measure one model in this process: vLLM last, which changes transformers' classes."""
    from stillroom.cache_schemas.errors import StillroomError

    row = _empty(label)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            case = _case(label, layers, Path(scratch))
            truth = _reference(case, row)
            said = _vllm(case, label)
        except StillroomError as error:
            return row | {"verdict": "refused", "reason": str(error).replace(scratch, "")}
        _compare(case, said, truth, row)
    numbers = [row[name] for name in row if name.endswith("difference") and row[name] is not None]
    good = max(numbers) <= BOUND and (row["full_vocabulary_kl"] or 0) <= BOUND
    return row | {"verdict": "equal" if good else "wrong", "reason": ""}


def _case(label: str, layers: str, scratch: Path) -> _Case:
    from stillroom.pipeline.config import Capture, Teacher
    from stillroom.pipeline.student.teacher_head import keep_teacher_head, read_teacher_head
    from stillroom.pipeline.teacher.facts import teacher_facts

    teacher = Teacher(model=str(save(label, scratch / "model")), dtype="float32")
    capture = Capture(k=32, temperatures=(0.5,), hidden_layers=LAYERS[layers])
    path = keep_teacher_head(teacher, teacher_facts(teacher), scratch / "head.safetensors")
    head = read_teacher_head(path)
    texts = [_text(length) for length in LENGTHS]
    return _Case(teacher, capture, texts, _live(teacher, texts), head)


def _text(length: int) -> Any:
    from stillroom.pipeline.record import Example, content_id

    ids = np.random.default_rng(length).integers(4, VOCABULARY, length).astype(np.int32)
    mask = np.ones(length, dtype=bool)
    return Example(content_id(ids, mask), "text", "random", ids, mask)


def _live(teacher: Any, texts: list) -> list:
    import torch
    import transformers

    name = json.loads(Path(teacher.model, "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(
        teacher.model, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        ids = [torch.tensor(text.token_ids)[None].long() for text in texts]
        return [model.eval()(input_ids=each).logits[0, :-1].log_softmax(-1) for each in ids]


def _reference(case: _Case, row: dict) -> list:
    """The reference's answers; their distance from plain transformers goes into the row."""
    from stillroom.pipeline.teacher.opening import open_engine

    reference = open_engine("reference", case.teacher, case.capture)
    said = list(reference.score(case.texts))
    reference.close()
    furthest = 0.0
    for text, record, logprobs in zip(case.texts, said, case.live, strict=True):
        true = logprobs[range(len(logprobs)), text.token_ids[1:]].numpy()
        furthest = max(furthest, float(np.abs(record.signals["token_logprob"] - true).max()))
    row["definition_difference"] = furthest
    return said


def _vllm(case: _Case, label: str) -> list:
    """vLLM's answers, once the check before the first shard has passed."""
    from stillroom.pipeline.teacher.definition_check import Question, check_definition
    from stillroom.pipeline.teacher.images import Pictures
    from stillroom.pipeline.teacher.opening import open_engine

    pictures = Pictures(lambda _: b"") if label == "paligemma" else None
    engine = open_engine(
        "vllm", case.teacher, case.capture, max_tokens=max(LENGTHS), pictures=pictures
    )
    always = case.capture.model_copy(update={"check": "always"})
    check_definition(engine, Question(case.teacher, always, case.texts, None, sum(LENGTHS)))
    return list(engine.score(case.texts))


def _compare(case: _Case, said: list, truth: list, row: dict) -> None:
    from stillroom.pipeline.teacher.agreement import gap_between

    gap = gap_between(said, truth)
    row["engine_difference"] = gap.logprob
    if gap.hidden:
        row["hidden_difference"] = gap.furthest_hidden
        row["full_vocabulary_kl"] = _kl_of_head(case, said)


def _kl_of_head(case: _Case, said: list) -> float:
    """Largest KL of a row between live logits and those rebuilt from captured final states."""
    import torch

    furthest = 0.0
    for record, live in zip(said, case.live, strict=True):
        made = case.head.logits(torch.tensor(record.signals["hidden.final"]))[:, : live.shape[1]]
        kl = (live.exp() * (live - made.log_softmax(-1))).sum(-1)
        furthest = max(furthest, float(kl.max()))
    return furthest


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | what bites | vLLM | states | definition | head | verdict |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        names = ("engine_difference", "hidden_difference", "definition_difference")
        cells = ["-" if row[n] is None else f"{row[n]:.1g}" for n in (*names, "full_vocabulary_kl")]
        reason = row["reason"].removeprefix("/model: ").split("; expected")[0].split(". ")[0][:200]
        verdict = f"{row['verdict']}: {reason}" if reason else row["verdict"]
        name = f"{row['label']} (`{row['architecture']}`)"
        lines.append("| " + " | ".join([name, row["kind"], *cells, verdict]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs.run(main)

"""The reference engine in a process of its own, for a few texts.

One idea: vLLM changes transformers' classes in the process it runs in (its transformers backend
compiles them in place), so beside vLLM the definition is asked where vLLM has never been; and a
process can be stopped when its time is up. Question and answer are JSON and arrays in a directory.

    python -m stillroom.pipeline.teacher.reference.apart DIRECTORY
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import StillroomError, TeacherError
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord
from stillroom.pipeline.teacher.images import Pictures

QUESTION, ANSWER, REFUSAL = "question.json", "answer.npz", "refusal.json"


def answers_apart(
    teacher: Teacher,
    capture: Capture,
    examples: Sequence[Example],
    pictures: Pictures | None = None,
    *,
    placement: Mapping[str, Any] | None = None,
    accelerator: bool = False,
    seconds: float | None = None,
) -> list[TeacherRecord]:
    """What the reference engine says about these texts.

    Args:
        teacher, capture, examples, pictures: as for the engine.
        placement: see `ReferenceEngine`.
        accelerator: let it use one; else it runs on the processor.
        seconds: that it may take; None leaves it its time.

    Raises:
        TimeoutError: it took longer.
        TeacherError: it refuses, or its process ended.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        _ask(place, teacher, capture, examples, pictures, dict(placement or {}))
        ended, held = os.pipe()
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", __name__, scratch],
                env=_environment(accelerator),
                stdin=ended,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"it was not done after {seconds:.0f} s") from None
        finally:
            os.close(ended)
            os.close(held)
        if (place / REFUSAL).exists():
            raise TeacherError(**json.loads((place / REFUSAL).read_text()))
        if not (place / ANSWER).exists():
            last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise TeacherError(f"the reference engine's process ended ({last[:300]})")
        return _heard(place, examples)


def _environment(accelerator: bool) -> dict[str, str]:
    told = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return told if accelerator else told | {"CUDA_VISIBLE_DEVICES": ""}


def _ask(place: Path, teacher, capture, examples, pictures, placement) -> None:
    texts = []
    for number, example in enumerate(examples):
        np.savez(place / f"text-{number}.npz", ids=example.token_ids, mask=example.loss_mask)
        spans = [[span.sha256, span.start, span.length] for span in example.images]
        texts.append({"example_id": example.example_id, "images": spans})
        for span in example.images:
            (place / span.sha256).write_bytes(pictures.read(span.sha256))
    question = {
        "teacher": teacher.model_dump(mode="json"),
        "capture": capture.model_dump(mode="json"),
        "texts": texts,
        "processor": None if pictures is None else pictures.arguments,
        "placement": placement,
    }
    (place / QUESTION).write_text(json.dumps(question))


def _heard(place: Path, examples: Sequence[Example]) -> list[TeacherRecord]:
    records = []
    with np.load(place / ANSWER) as arrays:
        for number, example in enumerate(examples):
            mine = f"{number}/"
            signals = {n.removeprefix(mine): arrays[n] for n in arrays.files if n.startswith(mine)}
            first, positions = int(signals.pop("first_row")), signals.pop("positions")
            records.append(TeacherRecord(example, first, signals, positions))
    return records


def main(directory: str) -> None:
    """Answer the question in a directory."""
    place = Path(directory)
    question = json.loads((place / QUESTION).read_text())
    offloaded = question["placement"].get("offload_folder")
    scratch = [directory, offloaded] if offloaded else [directory]
    threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True).start()
    try:
        arrays = _answer(place, question)
    except StillroomError as error:
        names = ("found", "expected", "where", "remedy")
        (place / REFUSAL).write_text(json.dumps({name: getattr(error, name) for name in names}))
        return
    np.savez(place / "part.npz", **arrays)
    (place / "part.npz").replace(place / ANSWER)


def _end_with_parent(scratch: list[str]) -> None:
    """Wait until whoever asked is gone, killed perhaps, and leave neither a process nor files."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written there: this is the end of the pipe
    for path in scratch:
        shutil.rmtree(path, ignore_errors=True)
    os._exit(1)


def _answer(place: Path, question: dict[str, Any]) -> dict[str, Any]:
    from stillroom.pipeline.teacher.reference.engine import ReferenceEngine

    pictures = None
    if question["processor"] is not None:
        pictures = Pictures(lambda name: (place / name).read_bytes(), question["processor"])
    engine = ReferenceEngine(
        Teacher.model_validate(question["teacher"]),
        Capture.model_validate(question["capture"]),
        pictures,
        question["placement"],
    )
    texts = [_text(place, number, said) for number, said in enumerate(question["texts"])]
    arrays: dict[str, Any] = {}
    for number, record in enumerate(engine.score(texts)):
        arrays |= {f"{number}/{name}": array for name, array in record.signals.items()}
        arrays[f"{number}/first_row"] = record.first_row
        arrays[f"{number}/positions"] = record.hidden_positions
    return arrays


def _text(place: Path, number: int, said: dict[str, Any]) -> Example:
    with np.load(place / f"text-{number}.npz") as arrays:
        ids, mask = arrays["ids"], arrays["mask"]
    spans = tuple(ImageSpan(*span) for span in said["images"])
    return Example(said["example_id"], "text", "text", ids, mask, images=spans)


if __name__ == "__main__":
    main(sys.argv[1])

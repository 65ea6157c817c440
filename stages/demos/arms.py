"""The arms of the vision demo: what each student learns from, and how each one is measured.

One idea: students differ in their objectives and their seed, in nothing else, so that differences
between arms are paired by seed. Accuracy is on easy-VQA's own test pictures, and so are the probes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.training import Objective, Student, Train
from stillroom.pipeline.config.vision import Encoder
from stillroom.pipeline.encoders.engine import signal_name
from stillroom.pipeline.encoders.frozen import ImageEncoder, open_encoder
from stillroom.pipeline.evaluation.probe import ProbeData, probe
from stillroom.pipeline.record import TeacherRecord
from stillroom.stages.demos.answering import Answerer, Answers
from stillroom.stages.demos.small_vlm import LAYER, Picture, save_language_model

STUDENT_WIDTH, STUDENT_BLOCKS = 64, 3
LAYERS = (1, 2, 3)
PERMUTED = "vision-permuted"
NEXT_TOKEN: dict[str, Any] = {"name": "cross_entropy"}


def _logits(temperature: float = 1.0) -> dict[str, Any]:
    """LLAVADI's logit term, five times the weight of the next-token loss that rides along."""
    options = {"ce_weight": 0.2, "temperature": temperature}
    return {"name": "forward_kl", "weight": 5.0, "reduction": "sample", "options": options}


def _hidden(*pairs: tuple) -> dict[str, Any]:
    options = {"pairs": list(pairs)}
    return {"name": "hidden", "weight": 5.0, "mask": "all", "reduction": "sample"} | {
        "options": options
    }


def _embedding(cache: str = "vision", contrastive: float = 0.3) -> list[dict[str, Any]]:
    """Two targets at two layers each, as OLA-VLM spreads its tasks over the depth; both with the
    depth task's resampler, the one whose inside is as narrow as the student."""
    shape = {"task": "depth", "contrastive": contrastive, "seek": 4}
    tasks = (
        {"target": "dino", "layers": [1, 3], "queries": "grid"},
        {"target": "efficientnet", "layers": [2, 3], "queries": "tokens"},
    )
    return [
        {"name": "embedding", "cache": cache, "weight": 0.5, "options": task | shape}
        for task in tasks
    ]


ARMS: dict[str, list[dict[str, Any]]] = {
    "none": [NEXT_TOKEN],
    "logits": [_logits()],
    "joint": [_hidden(("final", "final")), _logits()],
    "embedding": [NEXT_TOKEN, *_embedding()],
    "smooth_l1_only": [NEXT_TOKEN, *_embedding(contrastive=0.0)],
    "permuted_targets": [NEXT_TOKEN, *_embedding(PERMUTED)],
    "joint_embedding": [_hidden(("final", "final")), _logits(), *_embedding()],
    "joint_many_layers": [_hidden((1, 1), (2, 2), (3, 3), ("final", "final")), _logits()],
    "logits_t0.25": [_logits(0.25)],
    "logits_t0.7": [_logits(0.7)],
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one student.

    Attributes:
        answers: to the test pictures' questions.
        probes: target -> layer -> mean cosine on the test pictures.
    """

    answers: Answers
    probes: dict[str, dict[int, float]]


def arm_of(run: Run, arm: str, seed: int, steps: int) -> Run:
    """The run of one student; its language model is made fresh from the seed."""
    models = run.path("models")
    language = models / f"student-{seed}"
    if not (language / "config.json").exists():
        save_language_model(language, STUDENT_WIDTH, STUDENT_BLOCKS, seed)
    student = Student(
        init="parts",
        model=str(language),
        vision_model=str(models / "tower"),
        vision_layer=LAYER,
        seed=seed,
    )
    images = {name: str(run.path(name)) for name in ("vision", PERMUTED)}
    train = Train(
        cache=str(run.path("cache")),
        images=images,
        corpus=str(run.path("corpus")),
        freeze=("model.vision_tower.*",),
        steps=steps,
        learning_rate=2e-3,
        seed=seed,
        checkpoint_every=steps,
    )
    changes = {
        "name": f"{arm}-{seed}",
        "directory": str(run.path("students", f"{arm}-{seed}")),
        "student": student,
        "objective": tuple(Objective(**line) for line in ARMS[arm]),
        "train": train,
    }
    return run.model_copy(update=changes)


def permute(source: Path, target: Path) -> None:
    """A vision cache in which every image has another image's targets: a control."""
    cache = TeacherCache.open(source)
    facts = {**cache.plan.facts, "corpus": {**cache.plan.facts["corpus"], "permuted": 1}}
    writer = CacheWriter.open(target, Plan(facts))
    for shard in writer.missing():
        records = []
        for number in writer.plan.shard_range(shard):
            other = cache.read((number + 1) % len(cache))  # the next one's
            records.append(TeacherRecord(cache.read(number, []).example, 0, other.signals))
        writer.write(shard, records)
    writer.seal()


def targets_from_cache(cache: TeacherCache, pictures: Sequence[Picture], name: str) -> torch.Tensor:
    """Targets of pictures that were captured, [I, positions, width]."""
    ids = cache.index(["example_id"]).column("example_id").to_pylist()
    numbers = {sha256: number for number, sha256 in enumerate(ids)}
    found = [
        cache.read(numbers[_sha256(picture)], [signal_name(name)]).signals[signal_name(name)]
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(found))


def targets_live(encoder: ImageEncoder, pictures: Sequence[Picture], batch: int = 16):
    """Targets of pictures that no student has seen, [I, positions, width]."""
    parts = []
    for start in range(0, len(pictures), batch):
        opened = [Image.open(picture.path).convert("RGB") for picture in pictures[start:][:batch]]
        pixels = np.stack([encoder.preparation.pixels(image) for image in opened])
        parts.append(torch.from_numpy(encoder(pixels)))
    return torch.cat(parts)


def kept_targets(
    encoders: Sequence[Encoder], pictures: Sequence[Picture], path: Path
) -> dict[str, torch.Tensor]:
    """Encoder -> its targets of pictures that no student has seen; made once, kept in `path`."""
    if not path.exists():
        found = {table.name: targets_live(open_encoder(table), pictures) for table in encoders}
        save_file(found, path)
    return load_file(path)


def measure(
    student: Path,
    train: tuple[list[Picture], dict[str, torch.Tensor]],
    test: tuple[list[Picture], dict[str, torch.Tensor]],
    asked: list[Picture],
    probe_steps: int = 100,
) -> Measured:
    """Answers and probes of one student.

    Args:
        student: HF directory.
        train, test: pictures of the probes, and target -> [I, positions, width].
        asked: pictures whose questions are answered.
        probe_steps: of each probe's training.
    """
    answerer = Answerer(student)
    seen, unseen = (answerer.states(pictures, list(LAYERS)) for pictures, _ in (train, test))
    probes = {
        name: probe(ProbeData(seen, train[1][name]), ProbeData(unseen, test[1][name]), probe_steps)
        for name in train[1]
    }
    return Measured(answerer.answer(asked), probes)


def _sha256(picture: Picture) -> str:
    return hashlib.sha256(picture.path.read_bytes()).hexdigest()

"""Vision targets: every image of a corpus through every encoder, once, into a cache of their own.

One idea: images are keyed by the hash of their bytes, so however many prompts share one it is
looked at once, and the cache serves every corpus, teacher and student that shows the same images.
Shards, receipts, resuming and sealing are those of any capture.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from stillroom.cache_schemas.errors import CorpusError
from stillroom.cache_schemas.manifest import Manifest, Plan, ShardReceipt
from stillroom.cache_schemas.signals import IMAGE_ERROR
from stillroom.pipeline.cache.formats import Encoded, Format
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.capture.job import Notes, OnError, Task, fill
from stillroom.pipeline.capture.plan import first_version
from stillroom.pipeline.capture.progress import CaptureProgress
from stillroom.pipeline.config import Run, require
from stillroom.pipeline.config.vision import Vision
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.encoders.engine import VisionEngine, image_example, signal_name
from stillroom.pipeline.encoders.frozen import ImageEncoder, open_encoder
from stillroom.pipeline.record import Example, TeacherRecord


def capture_images(
    run: Run,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_error: OnError = "stop",
    location: str = "",
    on_progress: Callable[[CaptureProgress], None] | None = None,
) -> Manifest | None:
    """Answer what is missing of a run's vision targets and seal them when nothing is.

    Args:
        run: needs [vision], and a prepared corpus with images.
        rank, world_size: this worker's share of the shards.
        on_error: `quarantine` puts an image that cannot be answered into `images/rejects.jsonl`,
            leaves a record without positions in its place, and goes on.
        location: directory or URL of the cache; empty takes `<run.directory>/vision`.
        on_progress: called after every image.

    Returns:
        The manifest, or None while other workers' shards are missing.

    Raises:
        PlanMismatch: the cache there has another plan.
        RejectedExample: an image cannot be answered and `on_error` is `stop`.
        TeacherError: an encoder cannot be loaded, or its output has not the planned shape.
    """
    task = open_task(run, location)
    notes = Notes(run.path("images"), rank, on_error)
    return fill(task.writer, task.examples, task.start, notes, rank, world_size, on_progress)


def open_task(run: Run, location: str = "") -> Task:
    """Plan the vision targets of a run and open their cache; see `capture_images`."""
    table: Vision = require(run.vision, "vision", run.directory)
    corpus = Corpus.open(run.path("corpus"))
    images = images_of(corpus)
    encoders = [open_encoder(encoder, run.teacher) for encoder in table.encoder]
    writer = MeasuringWriter.open(
        location or str(run.path("vision")), make_plan(table, encoders, images)
    )

    def start(scale: float) -> VisionEngine:
        batch = max(1, int(table.batch * scale))
        return VisionEngine(encoders, corpus.image_bytes, batch, table.decoders)

    return Task(writer, Images(images), start)


def images_of(corpus: Corpus) -> tuple[str, ...]:
    """Content hashes of a corpus's images, each once, in the order in which they first appear.

    Raises:
        CorpusError: there are none.
    """
    spans = (
        span.sha256
        for name in ("train", "heldout")
        for e in corpus.split(name)
        for span in e.images
    )
    found = tuple(dict.fromkeys(spans))
    if not found:
        raise CorpusError(
            "the corpus has no images",
            where=str(corpus.directory),
            remedy="Prepare it from a source with images, or leave the [vision] table out.",
        )
    return found


class Images(Sequence[Example]):
    """Image examples in order, made when they are asked for."""

    def __init__(self, names: tuple[str, ...]):
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Images": ...
    def __getitem__(self, index: int | slice) -> "Example | Images":
        if isinstance(index, slice):
            return Images(self._names[index])
        return image_example(self._names[index])


def make_plan(table: Vision, encoders: Iterable[ImageEncoder], images: Sequence[str]) -> Plan:
    """The plan of some encoders over some images."""
    opened = {encoder.table.name: encoder for encoder in encoders}
    dense = {signal_name(name): _shape(encoder) for name, encoder in opened.items()}
    dense[IMAGE_ERROR] = {
        "positions": len(opened),
        "width": 1,
        "codec": {"name": "bf16", "step": None},
    }
    digest = hashlib.sha256("".join(f"{name}\n" for name in images).encode()).hexdigest()
    return Plan.make(
        teacher={"encoders": {name: encoder.facts for name, encoder in opened.items()}},
        engine={"name": "vision", "stillroom": first_version("stillroom", ("stillroom",))},
        tokenizer={},
        corpus={"digest": digest, "images": len(images)},
        capture={"profile": "portable", "examples_per_shard": table.images_per_shard},
        num_examples=len(images),
        max_tokens=1,
        images=True,
        signals={"rows": [], "dense": dense},
    )


class MeasuringWriter(CacheWriter):
    """A writer that keeps, beside every image's targets, what they lose by being stored; nothing
    for an image without targets."""

    def write(self, number: int, records: Iterable[TeacherRecord]) -> ShardReceipt:
        form = self.fitted()
        return self.write_encoded(number, (self._encoded(form, record) for record in records))

    def _encoded(self, form: Format, record: TeacherRecord) -> Encoded:
        """Encoded once: errors come from the very bytes that are stored."""
        targets = [(name, target) for name, target in _sorted(record.signals) if len(target)]
        # Stands in for the errors, which are known once the targets are encoded.
        column = np.zeros((len(targets), 1), dtype=np.float32)
        made = form.encode(replace(record, signals={**record.signals, IMAGE_ERROR: column}))
        for place, (name, target) in enumerate(targets):
            where = self.storage.location
            stored = form.dense[name].decode(made.chunks[name], len(target), where)
            column[place] = _relative_error(stored, target)
        return replace(
            made, chunks=made.chunks | {IMAGE_ERROR: form.dense[IMAGE_ERROR].encode(column)}
        )


def _relative_error(stored: np.ndarray, target: np.ndarray) -> float:
    norm = float(np.sum(np.square(target, dtype=np.float64)))
    lost = float(np.sum(np.square(stored - target, dtype=np.float64)))
    return lost / norm if norm else lost  # a target of zeros: the error as it is


def _sorted(signals: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return sorted(signals.items())


def _shape(encoder: ImageEncoder) -> dict:
    positions, width = encoder.shape
    table = encoder.table
    codec = {"name": table.codec, "step": table.step if table.codec == "step" else None}
    return {"positions": positions, "width": width, "codec": codec}

"""Image encoders as a teacher engine: image examples in, records of image targets out.

One idea: an image is an example without tokens, so whatever captures, checks, resumes and repairs
answers about texts does the same for images. Threads open pictures ahead, the encoders run one
batch after another, and a picture that cannot be answered leaves an empty record.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from stillroom.cache_schemas.errors import TeacherError
from stillroom.cache_schemas.signals import IMAGE_PREFIX
from stillroom.pipeline.encoders.frozen import ImageEncoder
from stillroom.pipeline.images import BadImage, decode_image
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord
from stillroom.pipeline.teacher.protocol import Reject, RejectedExample, stop

NO_TOKENS = np.empty(0, dtype=np.int32)
NO_MASK = np.empty(0, dtype=bool)


def image_example(sha256: str) -> Example:
    """The example that stands for an image: named by its content hash, without tokens."""
    return Example(sha256, sha256, "image", NO_TOKENS, NO_MASK, (ImageSpan(sha256),))


def signal_name(encoder: str) -> str:
    """Signal of an encoder's targets."""
    return f"{IMAGE_PREFIX}{encoder}"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One picture on its way: pixels per encoder, or the reason why there are none."""

    example: Example
    pixels: tuple[np.ndarray, ...] = ()
    error: RejectedExample | None = None


class VisionEngine:
    """Encoders over images; a `stillroom.pipeline.teacher.protocol.TeacherEngine` but for `shape`.

    Args:
        encoders: loaded encoders; each gives the signal `image.<name>`.
        read: sha256 -> the image file's bytes; FileNotFoundError where it is gone.
        batch: images of one forward pass.
        decoders: threads that open pictures.
    """

    def __init__(
        self,
        encoders: Sequence[ImageEncoder],
        read: Callable[[str], bytes],
        batch: int = 16,
        decoders: int = 4,
    ):
        self.encoders, self._read, self._batch = tuple(encoders), read, batch
        self._pool = ThreadPoolExecutor(decoders, "images")
        self._ahead = 2 * batch  # one batch in the encoders, one being opened

    def score(self, examples: Iterable[Example], reject: Reject = stop) -> Iterator[TeacherRecord]:
        """One record per image example, in the order given.

        Args:
            examples: from `image_example`; taken ahead of what is asked for.
            reject: told of each image without an answer; if it returns, a record with no
                positions stands for that image.

        Raises:
            TeacherError: an encoder's output has another shape than the plan says.
        """
        prepared = ahead(self._pool, self._prepare, examples, self._ahead)
        while batch := list(itertools.islice(prepared, self._batch)):
            yield from self._answer(batch, reject)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(self, example: Example) -> _Prepared:
        try:
            image = decode_image(self._bytes(example.images[0].sha256), "")
        except FileNotFoundError:
            return _Prepared(example, error=RejectedExample(example, "the image file is gone"))
        except BadImage as error:
            return _Prepared(example, error=RejectedExample(example, f"the image {error.found}"))
        return _Prepared(example, tuple(e.preparation.pixels(image) for e in self.encoders))

    def _bytes(self, sha256: str) -> bytes:
        data = self._read(sha256)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise BadImage("is not the one that the corpus was made with: its bytes have changed")
        return data

    def _answer(self, batch: list[_Prepared], reject: Reject) -> Iterator[TeacherRecord]:
        good = [item for item in batch if item.error is None]
        answers = iter(self._targets([item.pixels for item in good]))
        for item in batch:
            signals = {} if item.error else next(answers)
            error = item.error or _not_finite(item.example, signals)
            if error:
                reject(error)
                signals = self._nothing()
            yield TeacherRecord(item.example, 0, signals)

    def _targets(self, pixels: list[tuple[np.ndarray, ...]]) -> list[dict[str, np.ndarray]]:
        found: list[dict[str, np.ndarray]] = [{} for _ in pixels]
        if not pixels:
            return found
        for encoder, batch in zip(self.encoders, zip(*pixels, strict=True), strict=True):
            targets = encoder(np.stack(batch))  # [B, positions, width]
            _check_shape(encoder, targets)
            for signals, target in zip(found, targets, strict=True):
                signals[signal_name(encoder.table.name)] = target
        return found

    def _nothing(self) -> dict[str, np.ndarray]:
        widths = {signal_name(e.table.name): e.shape[1] for e in self.encoders}
        return {name: np.empty((0, width), dtype=np.float32) for name, width in widths.items()}


def ahead(pool: ThreadPoolExecutor, work: Callable, items: Iterable, count: int) -> Iterator:
    """`map` in a pool, at most `count` items ahead of what has been asked for, in order."""
    waiting: deque[Future] = deque()
    todo = map(partial(pool.submit, work), items)
    waiting.extend(itertools.islice(todo, count))
    while waiting:
        done = waiting.popleft().result()
        waiting.extend(itertools.islice(todo, 1))
        yield done


def _check_shape(encoder: ImageEncoder, targets: np.ndarray) -> None:
    if targets.shape[1:] != encoder.shape:
        raise TeacherError(
            f"encoder '{encoder.table.name}' gave targets of shape {list(targets.shape[1:])}",
            expected=f"{list(encoder.shape)}, as in the plan",
            remedy="Its output depends on the picture: choose a fixed size, or set grid.",
        )


def _not_finite(example: Example, signals: dict[str, np.ndarray]) -> RejectedExample | None:
    bad = [name for name, target in signals.items() if not np.isfinite(target).all()]
    if not bad:
        return None
    remedy = "Try dtype = 'float32' for this encoder."
    return RejectedExample(example, f"NaN or infinite values in {bad[0]}", remedy=remedy)

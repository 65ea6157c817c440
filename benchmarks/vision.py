"""Vision capture against the bare encoder: `python -m benchmarks.vision --json`.

One idea: the same pictures go through the bare encoder (pixels already prepared) and through a
whole capture (open, resize, encode, compress, check, commit), in turns within one run, so that the
ratio holds whatever else the machine is doing. The encoder has DINOv2-small's architecture and
random weights: its speed is real, the compressibility of its targets is not.
"""

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cache_trial import asking, publish
from stillroom.pipeline.capture.images import Images, MeasuringWriter, make_plan
from stillroom.pipeline.config.vision import Encoder, Vision
from stillroom.pipeline.encoders.engine import VisionEngine
from stillroom.pipeline.encoders.frozen import ImageEncoder, open_encoder
from stillroom.pipeline.images import decode_image

SIZE, BATCH, PER_SHARD = 224, 8, 16


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), arguments.images, arguments.turns)
    publish("vision", found | {"torch": torch.__version__}, arguments.json)


def measure(scratch: Path, count: int, turns: int) -> dict[str, Any]:
    """Images per second of both, interleaved; medians over turns, and stored bytes per image."""
    encoder = open_encoder(_encoder(scratch))
    files = dict(itertools.islice(_files(), count))
    pixels = [encoder.preparation.pixels(decode_image(data, "")) for data in files.values()]
    bare, captured, size = [], [], 0
    _bare(encoder, pixels[:BATCH])
    for turn in range(turns):
        bare.append(count / _bare(encoder, pixels))
        seconds, size = _capture(encoder, files, scratch / str(turn))
        captured.append(count / seconds)
    positions, width = encoder.shape
    return {
        "encoder_img_s": float(np.median(bare)),
        "capture_img_s": float(np.median(captured)),
        "ratio": float(np.median(np.array(captured) / np.array(bare))),
        "bytes_per_image": size / count,
        "fp16_bytes_per_image": 2 * positions * width,
        "images": count,
        "codec": encoder.table.codec,
    }


def _bare(encoder: ImageEncoder, pixels: list[np.ndarray]) -> float:
    started = time.perf_counter()
    for start in range(0, len(pixels), BATCH):
        encoder(np.stack(pixels[start : start + BATCH]))
    return time.perf_counter() - started


def _capture(encoder: ImageEncoder, files: dict[str, bytes], root: Path) -> tuple[float, int]:
    """Seconds of a capture without loading the encoder, and bytes of its shards."""
    from stillroom.pipeline.capture.job import Notes, fill

    names = tuple(files)
    vision = Vision(encoder=(encoder.table,), images_per_shard=PER_SHARD, batch=BATCH)
    writer = MeasuringWriter.open(root, make_plan(vision, [encoder], names))
    engine = VisionEngine([encoder], files.__getitem__, BATCH, vision.decoders)
    notes = Notes(root.with_name(f"{root.name}-notes"), 0, "stop")
    started = time.perf_counter()
    manifest = fill(writer, Images(names), lambda _scale: engine, notes, 0, 1)
    assert manifest is not None
    return time.perf_counter() - started, manifest.num_bytes


def _encoder(scratch: Path) -> Encoder:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    directory = scratch / "dinov2-small"
    Dinov2Model(config).save_pretrained(directory)
    return Encoder(name="dino", kind="dinov2", model=str(directory), size=SIZE, codec="int8")


def _files():
    """Smooth random pictures of a phone's preview size as JPEG, by content hash."""
    import hashlib
    import io

    from PIL import Image

    for seed in itertools.count():
        random = np.random.default_rng(seed)
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        data = stream.getvalue()
        yield hashlib.sha256(data).hexdigest(), data


if __name__ == "__main__":
    main()

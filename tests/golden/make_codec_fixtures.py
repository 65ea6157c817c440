"""Writes golden records and chunks: `python -m tests.golden.make_codec_fixtures`.

One idea: bytes that a release wrote must be read for ever, so the fixtures are made once per format
version and never again; a new version gets a new directory beside the old.
"""

import json
import sys
from pathlib import Path

import numpy as np

from stillroom.cache_schemas import dense_codec, row_scaling
from stillroom.cache_schemas.record_codec import RowCodec
from tests.codec_samples import record

DIRECTORY = Path(__file__).parent / "codecs-v1"
SIZES = {"k": 12, "vocab_size": 400, "draws": 4, "temperatures": 2}
STEP = 0.05


def sample(seed: int) -> dict[str, np.ndarray]:
    """One example: a prompt of 5 tokens, 40 rows, lists cut to a nucleus when the seed is odd."""
    return record(seed, rows=40, k=12, vocab=400, draws=4, prompt=5, nucleus=bool(seed % 2))


def hidden() -> np.ndarray:
    """float32 [20, 16] with one massive row and a tail of zeros."""
    rows = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    rows[0] *= 300
    rows[15:] = 0
    return rows


def main() -> None:
    """Write every fixture, with what each decodes to."""
    if DIRECTORY.exists():
        sys.exit(f"{DIRECTORY} exists: fixtures of a version are made once")
    DIRECTORY.mkdir()
    for profile in ("exact", "small", "strict"):
        samples = [record(seed, rows=300, k=12, vocab=400, draws=4) for seed in (7, 8)]
        codec = RowCodec.fit(profile, samples, **SIZES)
        (DIRECTORY / f"{profile}.json").write_text(json.dumps(codec.facts(), indent=1) + "\n")
        for name, table in codec.tables.items():
            np.save(DIRECTORY / f"{profile}-{name}.npy", table, allow_pickle=False)
        for seed in (0, 1):
            blob = codec.encode(sample(seed))
            (DIRECTORY / f"{profile}-{seed}.record").write_bytes(blob)
            np.savez_compressed(DIRECTORY / f"{profile}-{seed}.npz", **codec.decode(blob))
    for form in row_scaling.FORMS:
        blob = row_scaling.encode(hidden(), form, STEP)
        (DIRECTORY / f"{form}.chunk").write_bytes(blob)
        np.save(DIRECTORY / f"{form}.npy", row_scaling.decode(blob, 20, 16, form, STEP))
    for name in ("bf16", "fp16"):
        np.save(DIRECTORY / f"{name}.npy", dense_codec.to_stored({"name": name}, hidden()))


if __name__ == "__main__":
    main()

"""Writes the golden caches of the current format version that are not there yet; a fixture is never
made again.

python -m tests.golden.make_cache_fixtures
"""

from pathlib import Path

import numpy as np

from stillroom.cache_schemas.manifest import FORMAT_VERSION
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.writer import CacheWriter
from tests.synthetic_records import make_candidates_plan, make_plan, records_of

FOLDER = Path(__file__).parent / f"cache-v{FORMAT_VERSION}"
PLANS = {
    "exact": make_plan(5, 2, 10, images=True, profile="exact", moments=True, tail_draws=2),
    "small": make_plan(5, 2, 10, profile="small", hidden_layers=[2], hidden_codec="step"),
    "strict": make_plan(5, 2, 10, profile="strict", hidden_layers=["final"], hidden_codec="int8"),
    "portable": make_plan(5, 2, 10, profile="portable", hidden_layers=[2], hidden_codec="bf16"),
    "candidates": make_candidates_plan(),
    "draws": make_plan(5, 2, 10, profile="small", k=0, tail_draws=6),
}


def main() -> None:
    """Write each new cache, and beside it what its reader returned, as one npz."""
    for name, plan in PLANS.items():
        if (FOLDER / name).exists():
            continue
        writer = CacheWriter.open(FOLDER / name, plan, preview=lambda example: example.source)
        if writer.needs_fit:
            writer.fit(records_of(plan, 0))
        for shard in writer.missing():
            writer.write(shard, records_of(plan, shard))
        writer.seal()
        np.savez_compressed(FOLDER / f"{name}.npz", **flat(TeacherCache.open(FOLDER / name)))


def flat(cache: TeacherCache) -> dict[str, np.ndarray]:
    """Every field of every record under `<number>/<name>`."""
    found = {}
    for number, record in enumerate(cache):
        example = record.example
        text = [example.example_id, example.document_id, example.source]
        found[f"{number}/text"] = np.array([*text, *(image.sha256 for image in example.images)])
        found[f"{number}/spans"] = np.array([(i.start, i.length) for i in example.images])
        found[f"{number}/numbers"] = np.array([example.weight, record.first_row])
        found[f"{number}/token_ids"] = example.token_ids
        found[f"{number}/loss_mask"] = example.loss_mask
        found[f"{number}/hidden_positions"] = record.hidden_positions
        found |= {f"{number}/{name}": array for name, array in record.signals.items()}
    return found


if __name__ == "__main__":
    main()
